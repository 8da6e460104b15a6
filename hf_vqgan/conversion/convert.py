"""Published VQ tokenizers <-> VQGANModel.

A family of checkpoints is a table (`families.py`), whose renames serve both directions: import looks up each weight of
the model by its original name, export writes it by that name. Sizes and options are read from names and shapes; a
config, if there is one, adds what these do not show, and must agree with what they do.
"""

import os
import re
import tempfile
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.utils import logging

from ..configuration_vqgan import VQGANConfig, idle_options
from ..files.checkpoint_files import Checkpoint, listed, locate, plain, read_checkpoint, read_config, shown
from ..image_processing_vqgan import VQGANImageProcessor
from ..modeling_vqgan import VQGANModel
from .export import EXPORTS, export_original, save_original
from .families import (
    ANCHORS,
    CLASS_NAMES,
    CONFIG_PATHS,
    FAMILIES,
    IBQ_SETTINGS,
    MULTIPLIERS,
    NOT_REPRESENTED,
    OPTIONS,
    OTHER_TOKENIZERS,
    PREFIXES,
    REQUIRED_SETTINGS,
    SETTINGS,
    USE_EMA,
    Family,
    paper_weights,
)

__all__ = ["EXPORTS", "FAMILIES", "convert", "export_original", "load_original"]

logger = logging.get_logger(__name__)

MOST_LEVELS, MOST_LAYERS = 12, 32  # published: 6 and 4. A model of thousands would take minutes to build
LONGEST_SIDE = 2**26  # of a tensor: tensors without elements can claim any
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
LARGEST = 1e10  # of a weight; a flipped bit of an exponent makes 1e19 or 1e38 of 1


def read_settings(config: dict, source: str) -> tuple[str | None, dict]:
    """
    The class name and the settings of the tokenizer in a config, whatever project it comes from.

    Raises:
        ValueError: if what should be a name or a group of settings is something else.
    """
    part = config
    for path in CONFIG_PATHS:
        found = reduce(lambda inner, key: inner.get(key) if isinstance(inner, dict) else None, path, config)
        if isinstance(found, dict):
            part = found
            break
    kinds = {name: part[name] for name in CLASS_NAMES if part.get(name) is not None}
    settings = next((part[key] for key in ("params", "init_args") if isinstance(part.get(key), dict)), part)
    ddconfig = settings.get("ddconfig") or {}
    if not isinstance(ddconfig, dict):
        raise ValueError(f"{source}: its config has ddconfig={shown(ddconfig)}, expected names and values.")
    if bad := [f"{key}={shown(value)}" for key, value in kinds.items() if not isinstance(value, str)]:
        raise ValueError(f"{source}: its config has {bad[0]}, expected the name of a class.")
    return next(iter(kinds.values()), None), settings | ddconfig


def recognise(checkpoint: Checkpoint, kind: str | None, settings: dict, format: str) -> tuple[str, str, list[str]]:
    """
    Name of the family, the prefix of its keys, and a description of what had to be assumed to tell it from others.

    Raises:
        ValueError: for an unknown format, keys that fit none, or those of a tokenizer that `VQGANModel` cannot hold.
    """
    if format != "auto" and format not in FAMILIES:
        raise ValueError(f"format={format!r} is not one of 'auto', {', '.join(map(repr, FAMILIES))}.")
    prefix = find_prefix(checkpoint)
    shapes = {name.removeprefix(prefix): shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)}
    names = "\n".join(shapes)

    def has(pattern: str) -> bool:
        return re.search(f"^{pattern}", names, re.MULTILINE) is not None

    for pattern, title, reason in OTHER_TOKENIZERS:
        if has(pattern):
            raise ValueError(
                f"{checkpoint.source} is {title}, which this package does not read: {reason}. Nothing was loaded."
            )
    fitting = [name for name, family in FAMILIES.items() if all(map(has, family.keys))]
    # With the same keys, Janus counts decoder levels from the lowest resolution, so that its first one upsamples,
    # and openMUSE's MOVQ has linear layers, whose weights have two dimensions, in its attention.
    projections = [shapes.get(f"{half}.mid.attn_1.q.weight", ()) for half in ("encoder", "decoder")]
    if "taming" in fitting and has(r"decoder\.up\.0\.upsample\."):
        fitting = ["janus"]
    if "movq" in fitting and 2 in map(len, projections):
        fitting = ["openmuse_movq"]
    if format != "auto":
        if not all(map(has, FAMILIES[format].keys)):
            _unknown(checkpoint, f"are not those of {FAMILIES[format].title} (format={format!r})")
        return format, prefix, []
    if not fitting:
        _unknown(checkpoint, "are those of no tokenizer that this package knows")
    if not has(r"quantize\."):
        _unknown(checkpoint, "hold no codebook (quantize.embedding.weight), as those of a continuous autoencoder")
    by_config = [name for name in fitting if kind and re.search(FAMILIES[name].kinds, kind)]
    name = (by_config or fitting)[0]
    if by_config or name != "taming":
        return name, prefix, []
    return _one_of_taming(checkpoint, kind, settings, prefix)


def _one_of_taming(checkpoint: Checkpoint, kind: str | None, settings: dict, prefix: str) -> tuple[str, str, list[str]]:
    """What `recognise` returns for the keys that taming-transformers shares with others, if no class is named."""
    counter = "model_ema.num_updates"  # with a prefixed tokenizer, it belongs to another network
    if kind is None and "ddconfig" in settings and "lossconfig" not in settings:
        # Emu3.5's config is a flat list of arguments; those of the others have a class, and a loss.
        told = any(name in settings for name in IBQ_SETTINGS)
        doubt = "the family: taken as IBQ, as Emu3.5 has flat configs without a loss; for others pass format='taming'"
        return "ibq", prefix, [] if told else [doubt]
    updates = checkpoint.load(counter) if checkpoint.shapes.get(counter) == () else torch.tensor(0)
    if kind is None and prefix == "" and updates.dtype in INTEGERS and updates < 0:
        # SEED-Voken's moving averages have no warm-up, which a negative count of updates marks
        doubt = (
            "the class (model.class_path): taken as IBQ, which takes the code of the largest dot product; for its "
            "sister VQModel, which takes the nearest one, pass format='seed_voken'"
        )
        return "ibq", prefix, [doubt]
    if prefix == "first_stage_model." or counter in checkpoint.shapes:
        return "ldm", prefix, []
    unknown = "" if kind is None else f", and {shown(kind)} is not known here"
    doubt = (
        f"the family (model.target{unknown}), since taming-transformers, latent diffusion, IBQ and openMUSE have the "
        "same keys: taken as taming-transformers; for IBQ pass format='ibq', for openMUSE format='openmuse'"
    )
    return "taming", prefix, [doubt]


def find_prefix(checkpoint: Checkpoint) -> str:
    """The prefix of the tokenizer's names; of several tokenizers, the earliest in `PREFIXES`."""
    anchor = re.compile(rf"(|.*\.)({'|'.join(map(re.escape, ANCHORS))})", re.DOTALL)
    found = {match[1] for match in map(anchor.fullmatch, checkpoint.shapes) if match}
    if known := [prefix for prefix in PREFIXES if prefix in found]:
        return known[0]
    if len(found) > 1:
        raise ValueError(
            f"{checkpoint.source} holds several autoencoders: {listed(sorted(found))}. Save the tensors of one "
            "of them to a file of its own."
        )
    return found.pop() if found else ""


def _unknown(checkpoint: Checkpoint, what: str):
    names = sorted(checkpoint.shapes)
    seen = ", ".join(map(plain, names[:: max(1, len(names) // 6)][:6])) or "none"
    known = "; ".join(f"{name} ({family.title})" for name, family in FAMILIES.items())
    raise ValueError(f"{checkpoint.source}: its {len(names)} tensors {what}. Seen: {seen}. Known: {known}.")


def read_architecture(shapes: dict[str, tuple[int, ...]], family: Family) -> dict:
    """
    Config fields found in the names and shapes of the original tensors.

    Tolerates missing tensors as far as it can, so that they are reported by name and not as a strange architecture.

    Raises:
        ValueError: for more levels or layers, or larger tensors, than any tokenizer has.
    """

    def inside(ours: str) -> set[str]:
        """What follows our `ours` in original names, up to the next dot."""
        start = family.name(ours)
        return {name[len(start) :].split(".", 1)[0] for name in shapes if name.startswith(start)}

    def count(ours: str, most: int) -> int:
        """One more than the highest index with at least half of those below it; higher ones are reported as surplus."""
        numbers = {int(text) for text in inside(ours) if re.fullmatch(r"0|[1-9][0-9]{0,8}", text, re.ASCII)}
        found = max((number for number in numbers if number < 2 * len(numbers)), default=-1) + 1
        if found > most:
            raise ValueError(f"{family.name(ours)}N counts to {found - 1}, and no known tokenizer has over {most}.")
        return found

    def size(axis: int, *candidates: str) -> int | None:
        """Length of an axis of the first candidate that exists."""
        for name in map(family.name, candidates):
            shape = shapes.get(name, ())
            if len(shape) > axis:
                if shape[axis] > LONGEST_SIDE:
                    raise ValueError(f"{name} is {shown(shape)}, and no known tokenizer has sides over {LONGEST_SIDE}.")
                return shape[axis]
        return None

    def levels(side: str, block_type: str) -> tuple[list[int], list[str], int]:
        channels: list[int] = []
        types: list[str] = []
        layers = 0
        for level in range(count(f"{side}_blocks.", MOST_LEVELS)):
            resnet, attentions = f"{side}_blocks.{level}.resnets.0.", f"{side}_blocks.{level}.attentions."
            known = size(0, *(resnet + part for part in ("conv2.weight", "conv1.weight", "conv2.bias")))
            channels.append(known or (channels[-1] if channels else 32))
            runs = count(attentions, MOST_LAYERS) >= family.attentions_needed
            types.append(f"Attn{block_type}" if runs else block_type)
            layers = max(layers, count(f"{side}_blocks.{level}.resnets.", MOST_LAYERS))
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


def read_options(settings: dict, family: Family) -> dict:
    """
    Config fields found only in a config.

    Raises:
        ValueError: for settings that `VQGANModel` cannot represent, or that have the wrong type.
    """
    required = {name: values for name, values in REQUIRED_SETTINGS.items() if name not in family.ignored}
    bad = [name for name, allowed in required.items() if settings.get(name) not in allowed]
    if bad:
        said = ", ".join(f"{name}={shown(settings[name])}" for name in bad)
        raise ValueError(f"its config has {said}, which VQGANModel cannot represent.")
    options = {option.ours: value for option in OPTIONS if (value := option.read(settings)) is not None}
    return family.defaults | family.losses(options.pop("beta", 0.25)) | options


def read_contradictions(settings: dict, architecture: dict) -> list[str]:
    """Descriptions of where a config and the tensors disagree."""
    stem = architecture.get("stem_channels")
    expected = {name: architecture.get(ours) for ours, names in SETTINGS.items() for name in names}
    for ours, names in MULTIPLIERS.items() if stem else ():
        multiples = [channels / stem for channels in architecture[ours]] if ours in architecture else None
        expected |= dict.fromkeys(names, multiples)
    return [
        f"{name}={shown(said)} but {shown(found)}"
        for name, found in expected.items()
        if found is not None and (said := settings.get(name)) is not None
        if (list(said) if isinstance(said, tuple) else said) != found
    ]


def build_model(checkpoint: Checkpoint, shapes: dict, family: Family, settings: dict) -> VQGANModel:
    """
    The model without weights, from the shapes of its original tensors (without prefix) and the settings in its config.

    Raises:
        ValueError: if the two contradict each other, or `VQGANModel` cannot represent them.
    """
    try:
        architecture = read_architecture(shapes, family)
        options = read_options(settings, family)
    except ValueError as error:
        raise ValueError(f"{checkpoint.source}, read as {family.title}: {error}") from error
    if contradictions := read_contradictions(settings, architecture):
        raise ValueError(
            f"{checkpoint.source}: its config does not match its tensors. The config says, but the tensors say: "
            f"{'; '.join(contradictions)}. Give the right config."
        )
    if settings.get("remap") and "quantize.used" not in shapes:
        raise ValueError(
            f"{checkpoint.source}: its config renumbers the codes by remap={shown(settings['remap'])}, but the file "
            "has no tensor quantize.used with the mapping. A config with remap: null keeps the codebook's indices."
        )
    fields = options | architecture | family.fields
    if fields.get("quantizer") == "vq_ema":
        fields |= paper_weights(fields["codebook_weight"])  # its only loss is the commitment term, and β is on it
    if family is FAMILIES["ibq"]:
        fields.pop("num_used_codes", None)  # there they restrict the choice, too
    fields.setdefault("sample_size", 256)
    # Some configs hold weights of losses that their quantizer does not have
    idle = idle_options(fields)
    fields = {name: value for name, value in fields.items() if name not in idle}
    try:
        with torch.device("meta"):
            return VQGANModel(VQGANConfig(**fields))
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
            misshapen.append(f"{plain(source)} is {shown(checkpoint.shapes[source])}, expected {expected}")
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
    surplus_names = "\n".join(name.removeprefix(prefix) for name in surplus)
    reasons = {reason for pattern, reason in NOT_REPRESENTED if re.search(pattern, surplus_names, re.MULTILINE)}
    parts = [
        f"{len(names)} {what}: {', '.join(map(plain, names[:50]))}{' ...' if len(names) > 50 else ''}."
        for what, names in (("missing", missing), ("surplus", surplus), ("of the wrong shape", misshapen))
        if names
    ]
    explanation = f" VQGANModel cannot represent {' and '.join(sorted(reasons))}." if reasons else ""
    raise ValueError(
        f"{checkpoint.source}, read as {family.title}, does not fit.{explanation} Tensors {' '.join(parts)} "
        "Nothing was loaded. If another project wrote the file, pass its name as format."
    )


def load_tensors(checkpoint: Checkpoint, model: VQGANModel, sources: dict[str, str]) -> dict[str, Tensor]:
    """
    The weights of `model`, mapped from the file: floating-point ones in one dtype, that of the file or the widest of
    several.

    Raises:
        ValueError: for tensors with a dtype not meant for weights, weights that are not finite, and invalid indices.
    """
    tensors, mistyped, broken = {}, [], []
    for ours, placeholder in model.state_dict().items():
        tensor = checkpoint.load(sources[ours])
        if tensor.dtype not in (FLOATS if placeholder.is_floating_point() else INTEGERS):
            mistyped.append(f"{sources[ours]} is {tensor.dtype}")
        elif not _is_sane(tensor):
            broken.append(sources[ours])
        tensors[ours] = tensor.reshape(placeholder.shape)
    if mistyped:
        raise ValueError(
            f"{checkpoint.source}: {listed(mistyped)}. Expected weights in float16, bfloat16, float32 or float64, and "
            "indices of codes in int64. Save them again in one of these."
        )
    if broken:
        raise ValueError(
            f"{checkpoint.source}: {len(broken)} tensors hold NaN, infinity or numbers beyond {LARGEST:g}: "
            f"{listed(broken)}. The file is damaged, or its training diverged: take another."
        )
    used, codes = tensors.get("quantize.used"), model.config.num_vq_embeddings
    if used is not None and not ((used >= 0) & (used < codes)).all():
        raise ValueError(
            f"{checkpoint.source}: quantize.used spans [{int(used.min())}, {int(used.max())}], expected indices of "
            f"{codes} codes."
        )
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()})
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _is_sane(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = tensor.aminmax()  # NaN if there is one
    return bool(low >= -LARGEST) and bool(high <= LARGEST)


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
    if weights not in ("auto", "raw", "ema"):
        raise ValueError(f"weights={weights!r} must be one of 'auto', 'raw', 'ema'.")

    # The files: tensors, and perhaps a config
    file, config_beside = locate(path_or_repo)
    original_config = read_config(config_beside if config is None else config)
    if original_config.get("model_type") == VQGANConfig.model_type:
        raise ValueError(f"{path_or_repo} is a VQGANModel already: use VQGANModel.from_pretrained.")
    containers = ("state_dict", "model", "vae")
    checkpoint = read_checkpoint(file, containers if weights == "raw" else ("ema", *containers))
    kind, settings = read_settings(original_config, checkpoint.source)

    # The family, and which of the weights to load
    name, prefix, assumptions = recognise(checkpoint, kind, settings, format)
    family = FAMILIES[name]
    shadow = choose_shadow(checkpoint, family, prefix, settings, weights)
    described = kind is not None or any(settings.get(name) is not None for names in SETTINGS.values() for name in names)
    if shadow is None and weights == "auto" and family.prefers_shadow and settings.get("use_ema"):
        assumptions.append("the weights: raw, as the file has no moving averages in spite of use_ema: true")
    if not described:
        assumptions += [f"{name}: taken as {value}" for name, value in family.unseen.items() if name not in settings]
    if assumptions:
        logger.warning(
            f"{checkpoint.source}: read as {family.title}. Assumed, since neither its tensors nor a config say: "
            f"{'; '.join(assumptions)}. A wrong assumption gives wrong codes or pixels without an error; the "
            "original's config settles them."
        )

    # The model, and its tensors by name
    shapes = {name.removeprefix(prefix): shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)}
    model = build_model(checkpoint, shapes, family, settings)
    logger.info(f"{checkpoint.source}: {family.title}, {len(shapes)} tensors, {'EMA' if shadow else 'raw'} weights")
    sources = match_tensors(checkpoint, model, family, prefix, shadow)
    tensors = load_tensors(checkpoint, model, sources)
    model.load_state_dict(tensors, assign=True)
    model.config.dtype = tensors["encoder.conv_in.weight"].dtype
    return model.eval()


def choose_shadow(
    checkpoint: Checkpoint, family: Family, prefix: str, settings: dict, weights: str
) -> Callable[[str], str] | None:
    """
    Maps the name of a weight to that of its moving average, if these are to be loaded; else `None`.

    Raises:
        ValueError: if moving averages are asked for and the file has none, or `use_ema` is neither true nor false.
    """
    try:
        evaluated = family.prefers_shadow and USE_EMA.read(settings) is not False
    except ValueError as error:
        raise ValueError(f"{checkpoint.source}, read as {family.title}: {error}") from error
    if weights == "raw" or (weights == "auto" and not evaluated):
        return None
    anchor = family.shadow and prefix + family.shadow("encoder.conv_in.weight")
    shadow = family.shadow if anchor in checkpoint.shapes else None
    if weights == "ema" and shadow is None and checkpoint.container != "ema":
        raise ValueError(f"{checkpoint.source} holds no moving average of the weights: use weights='raw'.")
    return shadow


def convert(
    source: str | Path,
    out: str | Path,
    format: str = "auto",
    to: str | None = None,
    config: dict | str | Path | None = None,
    weights: str = "auto",
) -> VQGANModel:
    """
    Write the checkpoint `source` to the folder `out`: for `VQGANModel.from_pretrained`, or in the format of project
    `to`. The folder appears complete or not at all. Weights stay mapped from the source file.

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
            model.save_pretrained(folder)
            side = model.config.sample_size
            VQGANImageProcessor(
                size={"shortest_edge": side},
                crop_size={"height": side, "width": side},
                size_divisor=model.config.downsample_factor,
            ).save_pretrained(folder)
        else:
            save_original(model, to, folder)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    return model


def _is_ours(source: str | Path) -> bool:
    config = Path(source) / "config.json"
    return config.is_file() and read_config(config).get("model_type") == VQGANConfig.model_type
