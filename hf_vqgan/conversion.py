"""Published VQ tokenizers <-> VQGANModel.

A family of checkpoints is a table (`conversion_families.py`), and its renames serve both directions: import looks every
weight of the model up under its original name, export writes it there. Sizes and options are read from names and
shapes; a config, where there is one, adds what they do not show and is held against what they do.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import __version__ as diffusers_version
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .checkpoint_files import Checkpoint, locate, read_checkpoint, read_config
from .configuration_vqgan import VQGANConfig, idle_options
from .conversion_families import (
    ANCHORS,
    CONFIG_PATHS,
    FAMILIES,
    NOT_REPRESENTED,
    PREFIXES,
    REQUIRED_SETTINGS,
    SETTINGS,
    Family,
    paper_weights,
)
from .image_processing_vqgan import VQGANImageProcessor
from .modeling_vqgan import VQGANModel

logger = logging.get_logger(__name__)


def read_settings(config: dict) -> tuple[str | None, dict]:
    """The class name and the settings of the tokenizer in a config, whatever project it comes from."""
    part = config
    for path in CONFIG_PATHS:
        found = reduce(lambda inner, key: inner.get(key) if isinstance(inner, dict) else None, path, config)
        if isinstance(found, dict):
            part = found
            break
    kind = next((part[key] for key in ("target", "class_path", "_class_name", "model_type") if key in part), None)
    settings = next((part[key] for key in ("params", "init_args") if isinstance(part.get(key), dict)), part)
    return kind, settings | (settings.get("ddconfig") or {})


def recognise(checkpoint: Checkpoint, kind: str | None, format: str) -> tuple[str, str]:
    """
    Name of the family, and the prefix of its keys.

    Raises:
        ValueError: for an unknown format, or keys that fit none.
    """
    if format != "auto" and format not in FAMILIES:
        raise ValueError(f"format={format!r} is not one of 'auto', {', '.join(map(repr, FAMILIES))}.")
    shapes = checkpoint.shapes
    prefix = find_prefix(checkpoint)
    names = "\n".join(name.removeprefix(prefix) for name in shapes if name.startswith(prefix))

    def fits(family: Family) -> bool:
        return all(re.search(f"^{pattern}", names, re.MULTILINE) for pattern in family.keys)

    if format != "auto":
        if fits(FAMILIES[format]):
            return format, prefix
        _unknown(checkpoint, f"are not those of {FAMILIES[format].title} (format={format!r})")
    fitting = [name for name, family in FAMILIES.items() if fits(family)]
    # Keys of the same family tree: Janus counts decoder levels from below, so that its first has the upsampling.
    if "taming" in fitting and re.search(r"^decoder\.up\.0\.upsample\.", names, re.MULTILINE):
        fitting = ["janus"]
    if not fitting:
        _unknown(checkpoint, "are those of no tokenizer that this package knows")
    if not re.search(r"^quantize\.", names, re.MULTILINE):
        _unknown(checkpoint, "hold no codebook (quantize.embedding.weight), as those of a continuous autoencoder")
    by_config = [name for name in fitting if kind and re.search(FAMILIES[name].kinds, kind)]
    if by_config:
        return by_config[0], prefix
    if fitting[0] == "taming":
        # IBQ's moving average has no warm-up, which its count says; all others count up. One beside a prefixed
        # tokenizer is another network's.
        counter = "model_ema.num_updates"
        if kind is None and prefix == "" and counter in shapes and int(checkpoint.load(counter)) < 0:
            return "ibq", prefix
        if prefix == "first_stage_model." or counter in shapes:
            return "ldm", prefix
        config = "there is no config" if kind is None else f"the config's {kind!r} is unknown"
        logger.warning(
            f"{checkpoint.source}: the keys are those of taming-transformers, latent diffusion, IBQ and openMUSE "
            f"alike, and {config} to tell them apart. Taken as taming-transformers; for IBQ pass format='ibq', "
            "for openMUSE format='openmuse'."
        )
    return fitting[0], prefix


def find_prefix(checkpoint: Checkpoint) -> str:
    """What stands before the tokenizer's names: of several tokenizers that of the earliest in `PREFIXES`."""
    found = {name.removesuffix(anchor) for name in checkpoint.shapes for anchor in ANCHORS if name.endswith(anchor)}
    found = {prefix for prefix in found if prefix == "" or prefix.endswith(".")}
    if known := [prefix for prefix in PREFIXES if prefix in found]:
        return known[0]
    if len(found) > 1:
        raise ValueError(
            f"{checkpoint.source} holds several autoencoders: {', '.join(sorted(found))}. Save the tensors of one of "
            "them to a file of its own."
        )
    return found.pop() if found else ""


def _unknown(checkpoint: Checkpoint, what: str):
    names = sorted(checkpoint.shapes)
    seen = ", ".join(names[:: max(1, len(names) // 6)][:6]) or "none"
    known = "; ".join(f"{name} ({family.title})" for name, family in FAMILIES.items())
    raise ValueError(f"{checkpoint.source}: its {len(names)} tensors {what}. Seen: {seen}. Known: {known}.")


def read_architecture(shapes: dict[str, tuple[int, ...]], family: Family) -> dict:
    """
    Config fields that names and shapes of the original tensors tell.

    Gets by with missing tensors as far as it can, so that they are reported by name and not as a strange architecture.
    """

    def inside(ours: str) -> set[str]:
        """What follows our `ours` in original names, up to the next dot."""
        start = family.name(ours)
        return {name[len(start) :].split(".", 1)[0] for name in shapes if name.startswith(start)}

    def count(ours: str) -> int:
        return max((int(number) for number in inside(ours) if number.isdigit()), default=-1) + 1

    def size(axis: int, *candidates: str) -> int | None:
        """Length of an axis of the first candidate that is there."""
        found = (shapes.get(family.name(ours), ()) for ours in candidates)
        return next((shape[axis] for shape in found if len(shape) > axis), None)

    def levels(side: str, block_type: str) -> tuple[list[int], list[str], int]:
        channels: list[int] = []
        types: list[str] = []
        layers = 0
        for level in range(count(f"{side}_blocks.")):
            resnet, attentions = f"{side}_blocks.{level}.resnets.0.", f"{side}_blocks.{level}.attentions."
            known = size(0, *(resnet + part for part in ("conv2.weight", "conv1.weight", "conv2.bias")))
            channels.append(known or (channels[-1] if channels else 32))
            runs = count(attentions) >= family.attentions_needed
            types.append(f"Attn{block_type}" if runs else block_type)
            layers = max(layers, count(f"{side}_blocks.{level}.resnets."))
        return channels, types, layers

    down_channels, down_types, layers = levels("encoder.down", "DownEncoderBlock2D")
    up_channels, up_types, _ = levels("decoder.up", "UpDecoderBlock2D")  # as stored
    if family.lowest_first:
        up_channels = up_channels[::-1]
    else:
        up_types = up_types[::-1]
    codes = ("quantize.embedding.weight", "quantize.embed.weight")
    embed_dim = size(1, *codes) or size(0, "quant_conv.weight", "quant_conv.bias")
    fields = {
        "in_channels": size(1, "encoder.conv_in.weight"),
        "stem_channels": size(0, "encoder.conv_in.weight", "encoder.conv_in.bias"),
        "block_out_channels": down_channels,
        "down_block_types": down_types,
        "layers_per_block": layers,
        "mid_block_add_attention": bool(
            inside("encoder.mid_block.attentions.0.") | inside("decoder.mid_block.attentions.0.")
        ),
        "latent_channels": size(0, "encoder.conv_out.weight", "encoder.conv_out.bias"),
        "num_vq_embeddings": size(0, *codes),
        "vq_embed_dim": embed_dim,
        "norm_type": "spatial" if inside("decoder.conv_norm_out.conv_y.") else "group",
    }
    if not family.fields.get("encoder_only"):
        fields["decoder_block_out_channels"] = up_channels
        fields["up_block_types"] = up_types
        fields["out_channels"] = size(0, "decoder.conv_out.weight", "decoder.conv_out.bias")
    if inside("quantize.proj."):
        fields["quantizer"] = "gumbel"
    elif inside("quantize.cluster_size"):
        fields["quantizer"] = "vq_ema"
    if fields.get("quantizer") != "gumbel":
        fields["num_used_codes"] = size(0, "quantize.used")
    return {name: value for name, value in fields.items() if value is not None}


def read_options(settings: dict, family: Family, source: str) -> dict:
    """
    Config fields that only a config tells.

    Raises:
        ValueError: for settings that `VQGANModel` cannot represent.
    """
    required = {name: values for name, values in REQUIRED_SETTINGS.items() if name not in family.ignored}
    if bad := [f"{name}={settings[name]!r}" for name, allowed in required.items() if settings.get(name) not in allowed]:
        raise ValueError(f"{source}: its config has {', '.join(bad)}, which VQGANModel cannot represent.")
    beta = next((settings[name] for name in ("beta", "commitment_cost", "commit_loss_beta") if name in settings), 0.25)
    options = family.losses(beta)
    for ours, theirs in {
        "sample_size": ("resolution", "sample_size", "image_size"),
        "kl_weight": ("kl_weight",),
        "ema_decay": ("decay",),
        **{name: (name,) for name in ("act_fn", "norm_num_groups", "scaling_factor", "shift_factor", "force_upcast")},
        "lookup_from_codebook": ("lookup_from_codebook",),
    }.items():
        if value := [settings[name] for name in theirs if settings.get(name) is not None]:
            options[ours] = value[0]
    return options


def read_config_of(checkpoint: Checkpoint, shapes: dict, family: Family, settings: dict) -> VQGANConfig:
    """
    The model's config, from the shapes of its original tensors (without prefix) and the settings in its config.

    Raises:
        ValueError: if the two contradict each other, or `VQGANModel` cannot represent them.
    """
    architecture = read_architecture(shapes, family)
    contradictions = [
        f"{theirs}={settings[theirs]} but {shape_says}"
        for ours, names in SETTINGS.items()
        for theirs in names
        if settings.get(theirs) is not None and ours in architecture
        if (shape_says := architecture[ours]) != (list(said) if isinstance(said := settings[theirs], tuple) else said)
    ]
    if contradictions:
        raise ValueError(
            f"{checkpoint.source}: its config does not belong to its tensors. The config says, and the tensors say: "
            f"{'; '.join(contradictions)}. Give the right config."
        )
    if settings.get("remap") and "quantize.used" not in shapes:
        raise ValueError(
            f"{checkpoint.source}: its config renumbers the codes by remap={settings['remap']!r}, but the file has no "
            "tensor quantize.used with the new numbers. Give a config with remap: null to have the codebook's own."
        )
    if family.kinds == "^VQModel$" and "norm_num_groups" not in settings:
        logger.warning(
            f"{checkpoint.source}: no config says what the tensors do not show. Taken as norm_num_groups=32, "
            "act_fn='silu', the defaults of diffusers."
        )
    fields = read_options(settings, family, checkpoint.source) | architecture | family.fields
    if fields.get("quantizer") == "vq_ema":
        fields |= paper_weights(fields["codebook_weight"])  # its only loss is the commitment term, and β is on it
    if family is FAMILIES["llamagen"]:
        fields["codebook_l2_norm"] = settings.get("codebook_l2_norm", True)
    elif family is FAMILIES["ibq"]:
        fields.pop("num_used_codes", None)  # there they restrict the choice, too
    fields.setdefault("sample_size", 256)
    # Their configs hold weights for quantizers that have no such loss
    idle = idle_options(fields)
    fields = {name: value for name, value in fields.items() if name not in idle}
    try:
        return VQGANConfig(**fields)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{checkpoint.source}, read as {family.title}: {error}") from error


def match_tensors(
    checkpoint: Checkpoint, model: VQGANModel, family: Family, prefix: str, shadow: Callable[[str], str] | None
) -> dict[str, str]:
    """
    Name in the file of each weight of `model`.

    Raises:
        ValueError: one error that lists all missing, surplus and misshapen tensors.
    """
    levels = len(model.config.block_out_channels)
    names = {ours: family.name(ours, levels) for ours in model.state_dict()}
    averaged = {ours for ours, weight in model.named_parameters() if weight.requires_grad} if shadow else set()
    sources = {ours: prefix + (shadow(name) if ours in averaged else name) for ours, name in names.items()}
    missing, misshapen = [], []
    for ours, tensor in model.state_dict().items():
        source, expected = sources[ours], family.shape(ours, tuple(tensor.shape))
        if source not in checkpoint.shapes:
            missing.append(source)
        elif checkpoint.shapes[source] != expected:
            misshapen.append(f"{source} is {checkpoint.shapes[source]}, expected {expected}")
    accounted = {prefix + name for name in names.values()} | set(sources.values())
    never_run = [
        family.name(f"encoder.down_blocks.{level}.attentions.")
        for level, block in enumerate(model.config.down_block_types)
        if family.attentions_needed > 1 and not block.startswith("Attn")
    ]
    known = re.compile("|".join([*family.bookkeeping, *map(re.escape, never_run)]) or r"(?!)")
    surplus = [
        name
        for name in checkpoint.shapes
        if name not in accounted and name.startswith(prefix) and not known.match(name.removeprefix(prefix))
    ]
    if not (missing or misshapen or surplus):
        return sources
    reasons = {
        reason
        for pattern, reason in NOT_REPRESENTED
        if any(re.search(pattern, name.removeprefix(prefix)) for name in surplus)
    }
    parts = [
        f"{len(names)} {what}: {', '.join(names[:50])}{' ...' if len(names) > 50 else ''}."
        for what, names in (("missing", missing), ("surplus", surplus), ("of the wrong shape", misshapen))
        if names
    ]
    explanation = f" VQGANModel cannot represent {' and '.join(sorted(reasons))}." if reasons else ""
    raise ValueError(
        f"{checkpoint.source}, read as {family.title}, does not fit.{explanation} Tensors {' '.join(parts)} "
        "Nothing was loaded. If another project wrote the file, pass its name as format."
    )


def load_original(
    path_or_repo: str | Path,
    format: str = "auto",
    config: dict | str | Path | None = None,
    weights: str = "auto",
) -> VQGANModel:
    """
    A published checkpoint as a [`VQGANModel`] in eval mode, whose weights are mapped from the file.

    See [`VQGANModel.from_original`], which reads them into memory.
    """
    containers = {
        "auto": ("ema", "state_dict", "model"),
        "raw": ("state_dict", "model"),
        "ema": ("ema", "state_dict", "model"),
    }
    if weights not in containers:
        raise ValueError(f"weights={weights!r} must be one of {', '.join(map(repr, containers))}.")
    file, config_beside = locate(path_or_repo)
    original_config = read_config(config_beside if config is None else config)
    if original_config.get("model_type") == VQGANConfig.model_type:
        raise ValueError(f"{path_or_repo} is a VQGANModel already: use VQGANModel.from_pretrained.")
    checkpoint = read_checkpoint(file, containers[weights])
    kind, settings = read_settings(original_config)
    name, prefix = recognise(checkpoint, kind, format)
    family = FAMILIES[name]
    shadow = None
    if weights == "ema" or (weights == "auto" and family.prefers_shadow):
        anchor = family.shadow and prefix + family.shadow("encoder.conv_in.weight")
        shadow = family.shadow if anchor in checkpoint.shapes else None
        if weights == "ema" and shadow is None and checkpoint.container != "ema":
            raise ValueError(f"{checkpoint.source} holds no moving average of the weights: use weights='raw'.")
    shapes = {name.removeprefix(prefix): shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)}
    model_config = read_config_of(checkpoint, shapes, family, settings)
    logger.info(f"{checkpoint.source}: {family.title}, {len(shapes)} tensors, {'EMA' if shadow else 'raw'} weights")

    with torch.device("meta"):
        model = VQGANModel(model_config)
    sources = match_tensors(checkpoint, model, family, prefix, shadow)
    tensors = {
        ours: checkpoint.load(sources[ours]).reshape(tensor.shape) for ours, tensor in model.state_dict().items()
    }
    # One dtype for all weights: that of the file, or the widest of several
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()})
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    model.config.dtype = dtype
    return model.eval()


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


def convert(
    source: str | Path,
    out: str | Path,
    format: str = "auto",
    to: str | None = None,
    config: dict | str | Path | None = None,
    weights: str = "auto",
) -> VQGANModel:
    """
    Write the checkpoint `source` to the folder `out`: for `VQGANModel.from_pretrained`, or as the project `to` has it.

    The folder appears complete or not at all. Weights go from file to file; none but the current one is held.

    Args:
        source: What [`VQGANModel.from_original`] takes, or a folder of `VQGANModel.save_pretrained`.
        to: `None` or a format of [`VQGANModel.to_original`].

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        ValueError: as the two methods do.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder. Remove it or choose another.")
    if to is not None and to not in EXPORTS:
        raise ValueError(f"to={to!r} is not one of {', '.join(map(repr, EXPORTS))}.")
    if to is not None and _is_ours(source):
        model = VQGANModel.from_pretrained(source)
    else:
        model = load_original(source, format, config, weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "converted"  # with the permissions that folders normally get
        folder.mkdir()
        if to is None:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
            write_safetensors(model.state_dict(), folder / SAFE_WEIGHTS_NAME)
            side = model.config.sample_size
            VQGANImageProcessor(
                size={"shortest_edge": side},
                crop_size={"height": side, "width": side},
                size_divisor=model.config.downsample_factor,
            ).save_pretrained(folder)
        else:
            EXPORTS[to].save(*export_original(model, to), folder)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    return model


def _is_ours(source: str | Path) -> bool:
    config = Path(source) / "config.json"
    return config.is_file() and read_config(config).get("model_type") == VQGANConfig.model_type
