"""VQGANModel -> published VQ tokenizers: weights by another project's names, its config, its files.

Everything that a project's code cannot represent is listed in one error, and nothing is written.
"""

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import __version__ as diffusers_version
from safetensors.torch import save_file
from torch import Tensor

from ..configuration_vqgan import VQGANConfig
from ..modeling_vqgan import VQGANModel
from .families import FAMILIES

EXPORTS = ("taming", "ldm", "llamagen", "diffusers")
REMAP_NAME = "used.npy"  # read by taming-transformers' quantizer from the working directory


def export_original(model: VQGANModel, format: str) -> tuple[dict[str, Tensor], dict]:
    """State dict and config as another project names them. See [`VQGANModel.to_original`]."""
    if format not in EXPORTS:
        raise ValueError(f"format={format!r} is not one of {', '.join(map(repr, EXPORTS))}.")
    if format == "diffusers":
        fields, tensors = model.diffusers_parts()
        return tensors, {"_class_name": "VQModel", "_diffusers_version": diffusers_version} | fields
    family, levels = FAMILIES[format], len(model.config.block_out_channels)
    if obstacles := find_obstacles(model, format):
        raise ValueError(f"{family.title} cannot hold this model: {'; '.join(obstacles)}.")
    is_gumbel = model.config.quantizer == "gumbel"
    tensors = {
        family.name(ours, levels): tensor.detach().reshape(family.shape(ours, tensor.shape))
        for ours, tensor in model.state_dict().items()
        if is_gumbel or ours == "quantize.used" or not ours.startswith("quantize.")
    }
    if not is_gumbel:
        # LlamaGen stores the rows as they were trained and normalizes them itself
        as_trained = format == "llamagen" and model.config.quantizer in ("vq", "vq_ema")
        codebook = model.quantize.embedding.weight if as_trained else model.quantize.to_codebook().to(model.dtype)
        tensors["quantize.embedding.weight"] = codebook.detach()
    return tensors, _llamagen_config(model.config) if format == "llamagen" else _taming_config(model.config, format)


def _attention_levels(config: VQGANConfig) -> list[int]:
    return [level for level, block in enumerate(config.down_block_types) if block.startswith("Attn")]


def find_obstacles(model: VQGANModel, format: str) -> list[str]:
    """What the original code of `format` cannot represent about the model, in words."""
    config = model.config
    down, up = config.block_out_channels, config.decoder_block_out_channels
    attention = _attention_levels(config)
    up_attention = [level for level, block in enumerate(reversed(config.up_block_types)) if block.startswith("Attn")]
    is_gumbel, lowest = config.quantizer == "gumbel", [len(down) - 1]
    # For latent diffusion, attn_type: none switches attention off in the middle block and at all levels
    needs_mid_attention = format != "ldm" or attention != []
    obstacles = {
        f"backbone={config.backbone!r}": config.backbone != "vqgan",
        "encoder_only=True": config.encoder_only,
        "normalize_on_lookup=True": config.normalize_on_lookup,
        f"pixel_range={config.pixel_range}": config.pixel_range != (-1, 1),
        f"norm_type={config.norm_type!r}": config.norm_type != "group",
        f"norm_num_groups={config.norm_num_groups}, not 32": config.norm_num_groups != 32,
        f"act_fn={config.act_fn!r}": config.act_fn not in ("silu", "swish"),
        f"levels of {sorted({*down, *up})} channels are not multiples of stem_channels={config.stem_channels}": any(
            channels % config.stem_channels for channels in (*down, *up)
        ),
        "attention at different levels of encoder and decoder": up_attention != attention,
        "mid_block_add_attention=False": not config.mid_block_add_attention and needs_mid_attention,
        f"quantizer={config.quantizer!r} is not nearest-code lookup in a plain codebook": (
            not is_gumbel and model.quantize.to_codebook() is None
        ),
        "quantizer='gumbel'": is_gumbel and format != "taming",
    }
    if format == "llamagen":
        obstacles[f"attention at levels {attention}, not {lowest}"] = attention != lowest
        obstacles[f"num_used_codes={config.num_used_codes}"] = config.num_used_codes > 0
    else:
        obstacles[f"decoder_block_out_channels={up} unlike the encoder's"] = up != down
        obstacles["quantizer='gumbel' with vq_embed_dim unlike latent_channels"] = (
            is_gumbel and config.vq_embed_dim != config.latent_channels
        )
    return [text for text, applies in obstacles.items() if applies]


def _taming_config(config: VQGANConfig, format: str) -> dict:
    """For taming-transformers or latent diffusion."""
    ddconfig = {
        "double_z": False,
        "z_channels": config.latent_channels,
        "resolution": config.sample_size,
        "in_channels": config.in_channels,
        "out_ch": config.out_channels,
        "ch": config.stem_channels,
        "ch_mult": [channels // config.stem_channels for channels in config.block_out_channels],
        "num_res_blocks": config.layers_per_block,
        "attn_resolutions": [config.sample_size // 2**level for level in _attention_levels(config)],
        "dropout": 0.0,
    }
    if not config.mid_block_add_attention:
        ddconfig["attn_type"] = "none"
    params = {"embed_dim": config.vq_embed_dim, "n_embed": config.num_vq_embeddings, "ddconfig": ddconfig}
    if config.num_used_codes:
        params["remap"] = REMAP_NAME
    if config.quantizer == "gumbel":
        params["kl_weight"] = config.kl_weight
    if format == "ldm":
        target, loss = "ldm.models.autoencoder.VQModel", "torch.nn.Identity"
    else:
        target = f"taming.models.vqgan.{'GumbelVQ' if config.quantizer == 'gumbel' else 'VQModel'}"
        loss = "taming.modules.losses.vqperceptual.DummyLoss"
    return {"model": {"target": target, "params": params | {"lossconfig": {"target": loss}}}}


def _llamagen_config(config: VQGANConfig) -> dict:
    return {
        "codebook_size": config.num_vq_embeddings,
        "codebook_embed_dim": config.vq_embed_dim,
        "codebook_l2_norm": config.quantizer in ("vq", "vq_ema") and config.codebook_l2_norm,
        "commit_loss_beta": config.commitment_weight,
        "encoder_ch_mult": [channels // config.stem_channels for channels in config.block_out_channels],
        "decoder_ch_mult": [channels // config.stem_channels for channels in config.decoder_block_out_channels],
        "z_channels": config.latent_channels,
        "ch": config.stem_channels,
        "num_res_blocks": config.layers_per_block,
    }


def save_original(model: VQGANModel, format: str, folder: Path) -> None:
    """Write what `export_original` returns into `folder`, as the files that the project's own code reads."""
    tensors, config = export_original(model, format)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if format == "diffusers":
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return
    if "quantize.used" in tensors:
        np.save(folder / REMAP_NAME, tensors["quantize.used"].numpy())
    container, name = ("model", "vq.pt") if format == "llamagen" else ("state_dict", "model.ckpt")
    torch.save({container: tensors}, folder / name)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
