"""Configuration of a VQ-GAN: everything needed to rebuild the model, and nothing about how it was trained."""

import contextlib
import difflib
import math
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import field, fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Keys that transformers and diffusers themselves add to a config.json or pass to a config's constructor. transformers
# would silently keep any other key, too; here it is an error in Python and a warning in a file.
LIBRARY_KEYS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "torch_dtype",
        "transformers_weights",
        "use_cache",
        "use_return_dict",
    }
)

LARGEST = 2**62  # of any value: indices of codes are 64-bit integers

# Kinds of quantizers
NEAREST = ("vq", "vq_ema", "simvq")  # a codebook, in which the nearest code is chosen
CODEBOOK = (*NEAREST, "ibq")
BITS = ("lfq", "bsq")
COMPOSITE = ("residual", "grouped")  # several quantizers of the kind `base_quantizer`
BUILT_IN = (*CODEBOOK, "gumbel", "fsq", *BITS, *COMPOSITE)

# Of diffusers
DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
SPATIAL_GROUPS = 32  # in a SpatialNorm


def setting(default, at_least=None, at_most=None, above=None, one_of=None, quantizers=None) -> Any:
    """
    A field with bounds for its value, or for each value in its list, and the quantizers that use it, if not all do.
    Numbers must always be finite.
    """
    bounds = {"at_least": at_least, "at_most": at_most, "above": above, "one_of": one_of, "quantizers": quantizers}
    return field(default=default, metadata={name: bound for name, bound in bounds.items() if bound is not None})


# Whether a config is being read from a file or a dict, which may hold keys that others have added.
_reading: ContextVar[bool] = ContextVar("reading", default=False)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """A context in which unknown keys and options without effect are warnings instead of errors."""
    token = _reading.set(True)
    try:
        yield
    finally:
        _reading.reset(token)


@strict
class VQGANConfig(PreTrainedConfig):
    r"""
    Architecture of a [`VQGANModel`]. Fields shared with `diffusers.VQModel` carry its names and meaning.

    The defaults are the f16 ImageNet tokenizer of taming-transformers (https://huggingface.co/papers/2012.09841) with
    the low-dimensional codes of LlamaGen (https://huggingface.co/papers/2406.06525).

    Args:
        in_channels (`int`, defaults to 3): Channels of the input image.
        out_channels (`int`, defaults to 3): Channels of the reconstruction.
        sample_size (`int`, defaults to 256): Side in pixels of the images the model was trained on.
        block_out_channels (`list[int]`, defaults to `(128, 128, 256, 256, 512)`):
            Channels of each resolution level, highest resolution first. Every level but the last halves the
            resolution, so n levels give an f = 2^(n-1) tokenizer.
        stem_channels (`int`, *optional*):
            Channels of the encoder's first convolution; `None` means `block_out_channels[0]`. Original code calls them
            `ch`, which differs from the first level's where `ch_mult[0]` is not 1.
        decoder_block_out_channels (`list[int]`, *optional*):
            Channels of the decoder's levels, highest resolution first; `None` means `block_out_channels`.
        backbone (`str`, defaults to `"vqgan"`):
            `"vqgan"`: diffusers' encoder and decoder; `"maskgit"`: those of MaskGIT, without attention, strided
            convolutions and convolutions around the quantizer (https://huggingface.co/papers/2202.04200).
        encoder_only (`bool`, defaults to `False`): No decoder: images become codes, and `decode` is an error.
        pixel_range (`list[int]`, defaults to `(-1, 1)`):
            Range of the pixels that the networks work on, `(-1, 1)` or `(0, 1)`. The model takes and returns [-1, 1]
            in either case and converts. (Weights cannot absorb the conversion: convolutions pad with zeros, which are
            grey in one range and black in the other.)
        layers_per_block (`int`, defaults to 2): Residual blocks per encoder level (the decoder has one more).
        down_block_types (`list[str]`, *optional*):
            diffusers block per encoder level; `None` means plain blocks with attention at the lowest level.
        up_block_types (`list[str]`, *optional*): Likewise for the decoder, lowest resolution first.
        mid_block_add_attention (`bool`, defaults to `True`): Attention between the two middle residual blocks.
        act_fn (`str`, defaults to `"silu"`): Activation.
        norm_num_groups (`int`, defaults to 32): Groups of every GroupNorm; must divide every level's channels.
        norm_type (`str`, defaults to `"group"`):
            Decoder normalisation: `"group"`, or `"spatial"` (MoVQ, https://huggingface.co/papers/2209.09002).
        latent_channels (`int`, defaults to 256): Channels of the encoder's output and the decoder's input.
        quantizer (`str`, defaults to `"vq"`): A key of `hf_vqgan.QUANTIZERS`.
        num_vq_embeddings (`int`, defaults to 8192): Number of codes K.
        vq_embed_dim (`int`, *optional*): Dimension D of a code; `None` means `latent_channels`.
        commitment_weight (`float`, defaults to 0.25):
            Weight β of the commitment term |z - sg(e)|², which pulls the encoder towards its codes
            (eq. 3 of https://huggingface.co/papers/1711.00937). Applied by the trainer, never by the quantizer.
        codebook_weight (`float`, defaults to 1.0): Weight of the codebook term |sg(z) - e|², which pulls codes to data.
        codebook_l2_norm (`bool`, defaults to `False`): Compare latents and codes on the unit sphere.
        normalize_on_lookup (`bool`, defaults to `False`):
            Codes looked up by index have unit length, although `quantize` compares and returns them at their full
            length (Janus in transformers). Only for `quantizer="vq"` without `codebook_l2_norm`.
        num_used_codes (`int`, defaults to 0):
            Length of a list of codes; `quantize.remap_to_used` maps indices to positions in it (taming-transformers'
            `remap`). 0 for no list. Only for `"vq"` and `"vq_ema"`.
        rotation_trick (`bool`, defaults to `False`): Rotate the gradient from code to latent instead of copying it.
        entropy_weight (`float`, defaults to 0.0):
            Weight of the entropy loss E[H(p)] - H(E[p]). With 0, codebook quantizers do not compute it.
        entropy_temperature (`float`, defaults to 0.01): Temperature τ of p ∝ exp(-|z - e|² / τ) in that loss.
        perturbation_share (`float`, defaults to 0.0): Share of the choices that training replaces by a nearby code.
        perturbation_neighbours (`int`, defaults to 8): How many nearest codes it draws the replacement from.
        ema_decay (`float`, defaults to 0.99): Decay γ of the moving averages of `vq_ema`.
        kl_weight (`float`, defaults to 5e-4): Weight of the `gumbel` quantizer's KL term.
        gumbel_temperature (`float`, defaults to 1.0): Temperature of the `gumbel` quantizer's soft choice.
        fsq_levels (`list[int]`, *optional*): Levels per dimension of `fsq`; they set `num_vq_embeddings` and
            `vq_embed_dim`. The paper advises `[8, 6, 5]`, `[8, 5, 5, 5]`, `[7, 5, 5, 5, 5]`, `[8, 8, 8, 5, 5, 5]`.
        num_codebooks (`int`, defaults to 1): Codes per position of `residual` and `grouped`.
        base_quantizer (`str`, defaults to `"vq"`): The quantizer of each codebook of `residual` and `grouped`.
        scaling_factor (`float`, defaults to 1.0):
            Gives the latents unit variance: diffusion models see `(latents - shift_factor) * scaling_factor`.
            Both are measured at the end of training, which overwrites earlier values.
        shift_factor (`float`, defaults to 0.0): See `scaling_factor`.
        force_upcast (`bool`, defaults to `False`): diffusers pipelines decode in float32 if set.
        lookup_from_codebook (`bool`, defaults to `True`): Passed on to `diffusers.VQModel` by `to_diffusers()`.

    Raises:
        ValueError:
            For an unknown field (with the most similar known name), values out of bounds, contradictions, and options
            that the quantizer does not have. In a file (`from_pretrained`, `from_dict`, ...), unknown keys and such
            options are warnings, since libraries and earlier versions wrote them.
    """

    model_type = "vqgan"

    in_channels: int = setting(3, at_least=1)
    out_channels: int = setting(3, at_least=1)
    sample_size: int = setting(256, at_least=1)
    block_out_channels: list[int] | tuple[int, ...] = setting((128, 128, 256, 256, 512), at_least=1)
    stem_channels: int | None = setting(None, at_least=1)
    decoder_block_out_channels: list[int] | tuple[int, ...] | None = setting(None, at_least=1)
    backbone: str = setting("vqgan", one_of=("vqgan", "maskgit"))
    encoder_only: bool = False
    pixel_range: list[int] | tuple[int, ...] = (-1, 1)
    layers_per_block: int = setting(2, at_least=1)
    down_block_types: list[str] | tuple[str, ...] | None = setting(None, one_of=DOWN_BLOCKS)
    up_block_types: list[str] | tuple[str, ...] | None = setting(None, one_of=UP_BLOCKS)
    mid_block_add_attention: bool = True
    act_fn: str = setting("silu", one_of=("silu", "swish", "mish", "gelu", "relu"))
    norm_num_groups: int = setting(32, at_least=1)
    norm_type: str = setting("group", one_of=("group", "spatial"))
    latent_channels: int = setting(256, at_least=1)
    quantizer: str = "vq"
    num_vq_embeddings: int = setting(8192, at_least=1)
    vq_embed_dim: int | None = setting(8, at_least=1)
    commitment_weight: float | int = setting(0.25, at_least=0, quantizers=(*CODEBOOK, "lfq"))
    codebook_weight: float | int = setting(1.0, at_least=0, quantizers=("vq", "simvq", "ibq"))
    codebook_l2_norm: bool = setting(False, quantizers=CODEBOOK)
    normalize_on_lookup: bool = setting(False, quantizers=("vq",))
    num_used_codes: int = setting(0, at_least=0, quantizers=("vq", "vq_ema"))
    rotation_trick: bool = setting(False, quantizers=NEAREST)
    entropy_weight: float | int = setting(0.0, at_least=0, quantizers=(*CODEBOOK, *BITS))
    entropy_temperature: float | int = setting(0.01, at_least=1e-6, quantizers=(*CODEBOOK, *BITS))
    perturbation_share: float | int = setting(0.0, at_least=0, at_most=1, quantizers=CODEBOOK)
    perturbation_neighbours: int = setting(8, at_least=1, quantizers=CODEBOOK)
    ema_decay: float | int = setting(0.99, at_least=0, at_most=1, quantizers=("vq_ema",))
    kl_weight: float | int = setting(5e-4, at_least=0, quantizers=("gumbel",))
    gumbel_temperature: float | int = setting(1.0, at_least=1e-6, quantizers=("gumbel",))
    fsq_levels: list[int] | tuple[int, ...] | None = setting(None, at_least=2, quantizers=("fsq",))
    num_codebooks: int = setting(1, at_least=1)
    base_quantizer: str = setting("vq", one_of=NEAREST, quantizers=COMPOSITE)
    scaling_factor: float | int = setting(1.0, above=0)
    shift_factor: float | int = 0.0
    force_upcast: bool = False
    lookup_from_codebook: bool = True

    def __post_init__(self, **kwargs):
        self._report_unknown([key for key in kwargs if not key.startswith("_") and key not in LIBRARY_KEYS])

        self._check_bounds()
        # Tuples, so that a config built in Python equals the one read back from JSON
        self.block_out_channels = tuple(self.block_out_channels)
        levels = len(self.block_out_channels)
        if self.down_block_types is None:
            self.down_block_types = ("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",)
        if self.up_block_types is None:
            self.up_block_types = ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1)
        self.down_block_types = tuple(self.down_block_types)
        self.up_block_types = tuple(self.up_block_types)
        self.pixel_range = tuple(self.pixel_range)
        if self.stem_channels is None:
            self.stem_channels = self.block_out_channels[0]
        if self.decoder_block_out_channels is None:
            self.decoder_block_out_channels = self.block_out_channels
        self.decoder_block_out_channels = tuple(self.decoder_block_out_channels)
        if self.vq_embed_dim is None:
            self.vq_embed_dim = self.latent_channels
        if self.quantizer == "fsq" and self.fsq_levels:
            self.fsq_levels = tuple(self.fsq_levels)
            self.num_vq_embeddings, self.vq_embed_dim = math.prod(self.fsq_levels), len(self.fsq_levels)
        self._check_values()
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not values:  # transformers would return the default config
            raise OSError(f"{pretrained_model_name_or_path} does not appear to have a file named config.json.")
        return values, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # transformers would set these fields after the checks
        changes = {name: kwargs.pop(name) for name in model_fields() if name in kwargs}
        with reading():
            return super().from_dict({**config_dict, **changes}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file):
        with reading():
            return super().from_json_file(json_file)

    def _report_unknown(self, keys: list[str]):
        if not keys:
            return
        known = [field.name for field in fields(self)]
        hints = ", ".join(
            f"{key!r}" + "".join(f" (did you mean {m!r}?)" for m in difflib.get_close_matches(key, known, 1))
            for key in keys
        )
        if not _reading.get():
            raise ValueError(f"VQGANConfig has no field {hints}. Its fields are: {', '.join(model_fields())}.")
        warnings.warn(f"the config has keys that VQGANModel does not read: {hints}.", stacklevel=2)

    def _report_idle(self):
        """Report options that the quantizer does not have; earlier versions wrote them into files without effect."""
        idle = idle_options(vars(self))
        if not idle:
            return
        if not _reading.get():
            raise ValueError("; ".join(idle.values()) + ". It would have no effect: leave it out.")
        warnings.warn(f"left out of the config, as it has no effect: {'; '.join(idle.values())}.", stacklevel=2)
        for item in fields(self):
            if item.name in idle:
                setattr(self, item.name, item.default)

    def _check_bounds(self):
        for item in fields(self):
            value = getattr(self, item.name)
            several = isinstance(value, (list, tuple))
            for each in value if several else [value]:
                if expected := bounds_broken(each, item.metadata):
                    raise ValueError(f"{item.name}={value!r} must be {expected}{', each of them' * several}.")
        if not self.block_out_channels:
            raise ValueError("block_out_channels=() must have at least one level.")

    def _check_values(self):
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types", "decoder_block_out_channels"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries but block_out_channels={self.block_out_channels} "
                    f"has {levels}. Give one per level, or leave {name} out."
                )
        for name in ("block_out_channels", "decoder_block_out_channels", "stem_channels"):
            value = getattr(self, name)
            channels = (value,) if isinstance(value, int) else value
            if bad := [c for c in channels if c % self.norm_num_groups]:
                raise ValueError(
                    f"norm_num_groups={self.norm_num_groups} does not divide the channel count(s) {bad} in "
                    f"{name}={value}. Set norm_num_groups to a common divisor."
                )
        if self.sample_size % self.downsample_factor:
            raise ValueError(
                f"sample_size={self.sample_size} must be a multiple of {self.downsample_factor}, the downsampling "
                f"factor of block_out_channels={self.block_out_channels}."
            )
        if self.backbone == "maskgit" and self.vq_embed_dim != self.latent_channels:
            raise ValueError(
                f"backbone='maskgit' quantizes the encoder's output directly, so vq_embed_dim={self.vq_embed_dim} must "
                f"equal latent_channels={self.latent_channels}."
            )
        if self.backbone == "maskgit" and self.norm_type == "spatial":
            raise ValueError("backbone='maskgit' has no spatial norms: use norm_type='group'.")
        if self.norm_type == "spatial" and (bad := [c for c in self.decoder_block_out_channels if c % SPATIAL_GROUPS]):
            raise ValueError(
                f"norm_type='spatial' has {SPATIAL_GROUPS} groups, which do not divide the channel count(s) {bad} in "
                f"decoder_block_out_channels={self.decoder_block_out_channels}. Use multiples, or norm_type='group'."
            )
        if self.pixel_range not in ((-1, 1), (0, 1)):
            raise ValueError(f"pixel_range={self.pixel_range} must be (-1, 1) or (0, 1).")
        self._check_quantizer()

    def _check_quantizer(self):
        kind, codes, dim = self.quantizer, self.num_vq_embeddings, self.vq_embed_dim
        self._report_idle()
        if self.normalize_on_lookup and (kind != "vq" or self.codebook_l2_norm):
            raise ValueError(
                "normalize_on_lookup=True is for quantizer='vq' without codebook_l2_norm, not for "
                f"quantizer={kind!r} with codebook_l2_norm={self.codebook_l2_norm}."
            )
        if self.num_used_codes > codes or (self.num_used_codes and kind not in ("vq", "vq_ema")):
            raise ValueError(
                f"num_used_codes={self.num_used_codes} must be in [0, {codes}], num_vq_embeddings, and is for "
                f"quantizer='vq' or 'vq_ema', not for {kind!r}."
            )
        composite = kind in COMPOSITE
        if composite != (self.num_codebooks > 1):
            raise ValueError(
                f"num_codebooks={self.num_codebooks} does not go with quantizer={kind!r}: 'residual' and 'grouped' "
                "need 2 or more, all others have 1."
            )
        if kind == "fsq" and not self.fsq_levels:
            raise ValueError(
                f"fsq_levels={self.fsq_levels}: quantizer='fsq' needs levels of 2 or more, e.g. [8, 5, 5, 5]."
            )
        if codes > LARGEST:
            raise ValueError(f"fsq_levels={self.fsq_levels} make more than 2**62 codes, too many for 64-bit indices.")
        if kind in BITS and (dim > 62 or codes != 2**dim):
            raise ValueError(
                f"quantizer={kind!r} has one bit per dimension, 62 at most: num_vq_embeddings={codes} must be "
                f"2**vq_embed_dim, and vq_embed_dim is {dim}."
            )
        if kind == "grouped" and dim % self.num_codebooks:
            raise ValueError(
                f"vq_embed_dim={dim} is not a multiple of num_codebooks={self.num_codebooks}, the number of groups "
                "that quantizer='grouped' splits it into."
            )
        if kind == "residual" and self.codebook_l2_norm:
            raise ValueError(
                "codebook_l2_norm=True with quantizer='residual': unit codes cannot shrink a residual. Use 'grouped', "
                "or turn it off."
            )

    @property
    def downsample_factor(self) -> int:
        """f: how many pixels one latent position covers along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


def model_fields() -> list[str]:
    """Names of the fields that VQGANConfig adds to transformers' own."""
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return [field.name for field in fields(VQGANConfig) if field.name not in inherited]


def bounds_broken(value, bounds: Mapping[str, Any]) -> str | None:
    """What `value` should be according to a field's `bounds`; `None` if it is."""
    if value is None:
        return None
    if "one_of" in bounds:
        return None if value in bounds["one_of"] else f"one of {', '.join(map(repr, bounds['one_of']))}"
    if not isinstance(value, (int, float)):
        return None
    if not abs(value) <= LARGEST:  # nor is NaN
        return "a finite number, 2**62 at most"
    low, high, above = bounds.get("at_least"), bounds.get("at_most"), bounds.get("above")
    if high is not None and not low <= value <= high:
        return f"in [{low}, {high}]"
    if low is not None and value < low:
        return f"at least {low}"
    return f"above {above}" if above is not None and value <= above else None


def idle_options(values: Mapping[str, Any]) -> dict[str, str]:
    """The options not at their defaults that the quantizer in `values` does not have, with those that do, in words."""
    kind, base = values.get("quantizer", "vq"), values.get("base_quantizer", "vq")
    idle: dict[str, str] = {}
    if kind not in BUILT_IN:  # a user's own quantizer may have any option
        return idle
    kinds, described = [kind], repr(kind)
    if kind in COMPOSITE:
        kinds, described = [kind, base], f"{kind!r} with base_quantizer={base!r}"
    for item in fields(VQGANConfig):
        owners, value = item.metadata.get("quantizers"), values.get(item.name, item.default)
        if owners and value != item.default and not any(each in owners for each in kinds):
            *others, last = map(repr, owners)
            names = f"{', '.join(others)} or {last}" if others else last
            idle[item.name] = f"{item.name}={value!r} is for quantizer={names}, not for {described}"
    return idle
