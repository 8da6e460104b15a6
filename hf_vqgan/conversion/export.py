"""VQGANModel -> published VQ tokenizers: weights by another project's names, its config, its files.

What a project's code cannot hold is listed in one error, and nothing is written.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import __version__ as diffusers_version
from torch import Tensor
from tqdm.auto import tqdm

from ..configuration_vqgan import VQGANConfig
from ..modeling_vqgan import VQGANModel
from .families import FAMILIES


def export_original(model: VQGANModel, format: str) -> tuple[dict[str, Tensor], dict]:
    """State dict and config in the words of another project. See [`VQGANModel.to_original`]."""
    if format not in EXPORTS:
        raise ValueError(f"format={format!r} is not one of {', '.join(map(repr, EXPORTS))}.")
    export = EXPORTS[format]
    if format == "diffusers":
        fields, tensors = model.diffusers_parts()
        return tensors, {"_class_name": "VQModel", "_diffusers_version": diffusers_version} | fields
    if obstacles := [text for text, applies in export.obstacles(model).items() if applies]:
        raise ValueError(
            f"{FAMILIES[format].title} cannot hold this model: {'; '.join(obstacles)}. Expected what its code has."
        )
    family, levels = FAMILIES[format], len(model.config.block_out_channels)
    tensors = {
        family.name(ours, levels): tensor.detach().reshape(family.shape(ours, tensor.shape))
        for ours, tensor in model.state_dict().items()
        if model.config.quantizer == "gumbel" or ours == "quantize.used" or not ours.startswith("quantize.")
    }
    if model.config.quantizer != "gumbel":
        tensors["quantize.embedding.weight"] = export.codebook(model)
    return tensors, export.config(model)


def _multipliers(config: VQGANConfig, channels: tuple[int, ...]) -> list[int]:
    return [count // config.stem_channels for count in channels]


def _attention_levels(config: VQGANConfig) -> list[int]:
    return [level for level, block in enumerate(config.down_block_types) if block.startswith("Attn")]


def _original_obstacles(model: VQGANModel) -> dict[str, bool]:
    """What stands against all original projects, and whether it applies."""
    config = model.config
    channels = {*config.block_out_channels, *config.decoder_block_out_channels}
    up = [block.removeprefix("Attn") != block for block in reversed(config.up_block_types)]
    return {
        f"backbone={config.backbone!r}": config.backbone != "vqgan",
        "encoder_only=True": config.encoder_only,
        "normalize_on_lookup=True": config.normalize_on_lookup,
        f"pixel_range={config.pixel_range}": config.pixel_range != (-1, 1),
        f"norm_type={config.norm_type!r}": config.norm_type != "group",
        f"norm_num_groups={config.norm_num_groups}, not 32": config.norm_num_groups != 32,
        f"act_fn={config.act_fn!r}": config.act_fn not in ("silu", "swish"),
        f"levels of {sorted(channels)} channels are not multiples of stem_channels={config.stem_channels}": any(
            count % config.stem_channels for count in channels
        ),
        "attention at different levels of encoder and decoder": (
            [level for level, attends in enumerate(up) if attends] != _attention_levels(config)
        ),
        f"quantizer={config.quantizer!r} is not nearest-code lookup in a plain codebook": (
            config.quantizer != "gumbel" and model.quantize.to_codebook() is None
        ),
    }


def _taming_obstacles(model: VQGANModel) -> dict[str, bool]:
    config = model.config
    return _original_obstacles(model) | {
        f"decoder_block_out_channels={config.decoder_block_out_channels} unlike the encoder's": (
            config.decoder_block_out_channels != config.block_out_channels
        ),
        "mid_block_add_attention=False": not config.mid_block_add_attention,
        "quantizer='gumbel' with vq_embed_dim unlike latent_channels": (
            config.quantizer == "gumbel" and config.vq_embed_dim != config.latent_channels
        ),
    }


def _ldm_obstacles(model: VQGANModel) -> dict[str, bool]:
    config = model.config
    obstacles = _taming_obstacles(model)
    # attn_type: none is for the middle and all levels
    obstacles["mid_block_add_attention=False"] = not config.mid_block_add_attention and _attention_levels(config) != []
    return obstacles | {"quantizer='gumbel'": config.quantizer == "gumbel"}


def _llamagen_obstacles(model: VQGANModel) -> dict[str, bool]:
    config = model.config
    lowest = [len(config.block_out_channels) - 1]
    return _original_obstacles(model) | {
        f"attention at levels {_attention_levels(config)}, not {lowest}": _attention_levels(config) != lowest,
        "mid_block_add_attention=False": not config.mid_block_add_attention,
        "quantizer='gumbel'": config.quantizer == "gumbel",
        f"num_used_codes={config.num_used_codes}": config.num_used_codes > 0,
    }


def _taming_config(model: VQGANModel, target: str = "taming.models.vqgan.VQModel") -> dict:
    config = model.config
    gumbel = config.quantizer == "gumbel"
    ddconfig = {
        "double_z": False,
        "z_channels": config.latent_channels,
        "resolution": config.sample_size,
        "in_channels": config.in_channels,
        "out_ch": config.out_channels,
        "ch": config.stem_channels,
        "ch_mult": _multipliers(config, config.block_out_channels),
        "num_res_blocks": config.layers_per_block,
        "attn_resolutions": [config.sample_size // 2**level for level in _attention_levels(config)],
        "dropout": 0.0,
    }
    params = {"embed_dim": config.vq_embed_dim, "n_embed": config.num_vq_embeddings, "ddconfig": ddconfig}
    loss = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    if config.num_used_codes:
        params["remap"] = REMAP_NAME
    if gumbel:
        params["kl_weight"] = config.kl_weight
        target = "taming.models.vqgan.GumbelVQ"
    return {"model": {"target": target, "params": params | {"lossconfig": loss}}}


def _ldm_config(model: VQGANModel) -> dict:
    config = _taming_config(model, "ldm.models.autoencoder.VQModel")
    if not model.config.mid_block_add_attention:
        config["model"]["params"]["ddconfig"]["attn_type"] = "none"
    config["model"]["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    return config


def _llamagen_config(model: VQGANModel) -> dict:
    config = model.config
    return {
        "codebook_size": config.num_vq_embeddings,
        "codebook_embed_dim": config.vq_embed_dim,
        "codebook_l2_norm": config.quantizer in ("vq", "vq_ema") and config.codebook_l2_norm,
        "commit_loss_beta": config.commitment_weight,
        "encoder_ch_mult": _multipliers(config, config.block_out_channels),
        "decoder_ch_mult": _multipliers(config, config.decoder_block_out_channels),
        "z_channels": config.latent_channels,
        "ch": config.stem_channels,
        "num_res_blocks": config.layers_per_block,
    }


def _stored_codebook(model: VQGANModel) -> Tensor:
    """LlamaGen stores the rows as they were trained and normalises them itself."""
    if model.config.quantizer in ("vq", "vq_ema"):
        return model.quantize.embedding.weight.detach()
    return model.quantize.to_codebook().to(model.dtype)


@dataclass(frozen=True)
class Export:
    """
    Args:
        obstacles: What the format cannot hold, and whether the model has it.
        config: The model's config in the format's words.
        codebook: The codes `(K, D)` as the format stores them.
        save: Writes state dict and config into a folder.
    """

    save: Callable[[dict[str, Tensor], dict, Path], None]
    obstacles: Callable[[VQGANModel], dict[str, bool]] | None = None
    config: Callable[[VQGANModel], dict] | None = None
    codebook: Callable[[VQGANModel], Tensor] = lambda model: model.quantize.to_codebook().to(model.dtype)


REMAP_NAME = "used.npy"  # read by taming-transformers' quantizer from the working directory


def _save_torch(tensors: dict[str, Tensor], config: dict, folder: Path, container: str, names: tuple[str, str]) -> None:
    if "quantize.used" in tensors:
        np.save(folder / REMAP_NAME, tensors["quantize.used"].numpy())
    torch.save({container: {name: tensor.contiguous() for name, tensor in tensors.items()}}, folder / names[0])
    (folder / names[1]).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _save_diffusers(tensors: dict[str, Tensor], config: dict, folder: Path) -> None:
    write_safetensors(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def write_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    """
    `safetensors.torch.save_file`, but tensor by tensor and with a progress bar, in bytes.

    The format: length of the header (8 bytes, little endian), header in JSON, padded to a multiple of 8, tensors.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream, tqdm(total=end, desc=f"Writing {file.name}", unit="B", unit_scale=True) as bar:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            bar.update(tensor.nbytes)


_save_lightning = partial(_save_torch, container="state_dict", names=("model.ckpt", "config.yaml"))
EXPORTS = {
    "taming": Export(_save_lightning, _taming_obstacles, _taming_config),
    "ldm": Export(_save_lightning, _ldm_obstacles, _ldm_config),
    "llamagen": Export(
        partial(_save_torch, container="model", names=("vq.pt", "config.yaml")),
        _llamagen_obstacles,
        _llamagen_config,
        _stored_codebook,
    ),
    "diffusers": Export(_save_diffusers),
}
