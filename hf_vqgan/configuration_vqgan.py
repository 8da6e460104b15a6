"""Configuration of a VQ-GAN: what is needed to rebuild the model, and nothing about how it was trained."""

import contextlib
import difflib
import math
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Keys that transformers and diffusers add to a config.json or pass to a config's constructor on their own account.
# transformers would keep every other key, too, and say nothing; here it is an error in Python and a warning in a file.
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

# Whether the keys at hand come from a file or another serialized config, which may hold what others have added.
_reading: ContextVar[bool] = ContextVar("reading", default=False)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """While it lasts, unknown keys are kept with a warning instead of refused."""
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
            all the same and maps at its borders. (Weights cannot absorb the map: convolutions pad with zeros, which
            are grey in one range and black in the other.)
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
            Length of a list of codes by whose places `quantize.remap_to_used` renumbers indices (taming-transformers'
            `remap`); 0 for no list. Only for `"vq"` and `"vq_ema"`.
        rotation_trick (`bool`, defaults to `False`): Rotate the gradient from code to latent instead of copying it.
        entropy_weight (`float`, defaults to 0.0):
            Weight of the entropy loss E[H(p)] - H(E[p]). 0 means that codebook quantizers do not compute it.
        entropy_temperature (`float`, defaults to 0.01): Temperature τ of p ∝ exp(-|z - e|² / τ) in that loss.
        perturbation_share (`float`, defaults to 0.0): Share of the choices that training replaces by a near code.
        perturbation_neighbours (`int`, defaults to 8): Among how many nearest codes it then draws.
        ema_decay (`float`, defaults to 0.99): Decay γ of the moving averages of `vq_ema`.
        kl_weight (`float`, defaults to 5e-4): Weight of the `gumbel` quantizer's KL term.
        gumbel_temperature (`float`, defaults to 1.0): Temperature of the `gumbel` quantizer's soft choice.
        fsq_levels (`list[int]`, *optional*): Levels per dimension of `fsq`; they set `num_vq_embeddings` and
            `vq_embed_dim`. The paper advises `[8, 6, 5]`, `[8, 5, 5, 5]`, `[7, 5, 5, 5, 5]`, `[8, 8, 8, 5, 5, 5]`.
        num_codebooks (`int`, defaults to 1): Codes per position of `residual` and `grouped`.
        base_quantizer (`str`, defaults to `"vq"`): The quantizer of each codebook of `residual` and `grouped`.
        scaling_factor (`float`, defaults to 1.0):
            Gives the latents unit variance: diffusion models see `(latents - shift_factor) * scaling_factor`.
            Both are measured at the end of training, whatever they were before.
        shift_factor (`float`, defaults to 0.0): See `scaling_factor`.
        force_upcast (`bool`, defaults to `False`): diffusers pipelines decode in float32 if set.
        lookup_from_codebook (`bool`, defaults to `True`): Passed on to `diffusers.VQModel` by `to_diffusers()`.

    Raises:
        ValueError:
            For an unknown field (with the nearest known name) and for values that contradict each other. An unknown key
            of a file (`from_pretrained`, `from_dict`, ...) is kept with a warning: libraries write their own into it.
    """

    model_type = "vqgan"

    in_channels: int = 3
    out_channels: int = 3
    sample_size: int = 256
    block_out_channels: list[int] | tuple[int, ...] = (128, 128, 256, 256, 512)
    stem_channels: int | None = None
    decoder_block_out_channels: list[int] | tuple[int, ...] | None = None
    backbone: str = "vqgan"
    encoder_only: bool = False
    pixel_range: list[int] | tuple[int, ...] = (-1, 1)
    layers_per_block: int = 2
    down_block_types: list[str] | tuple[str, ...] | None = None
    up_block_types: list[str] | tuple[str, ...] | None = None
    mid_block_add_attention: bool = True
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_type: str = "group"
    latent_channels: int = 256
    quantizer: str = "vq"
    num_vq_embeddings: int = 8192
    vq_embed_dim: int | None = 8
    commitment_weight: float | int = 0.25
    codebook_weight: float | int = 1.0
    codebook_l2_norm: bool = False
    normalize_on_lookup: bool = False
    num_used_codes: int = 0
    rotation_trick: bool = False
    entropy_weight: float | int = 0.0
    entropy_temperature: float | int = 0.01
    perturbation_share: float | int = 0.0
    perturbation_neighbours: int = 8
    ema_decay: float | int = 0.99
    kl_weight: float | int = 5e-4
    gumbel_temperature: float | int = 1.0
    fsq_levels: list[int] | tuple[int, ...] | None = None
    num_codebooks: int = 1
    base_quantizer: str = "vq"
    scaling_factor: float | int = 1.0
    shift_factor: float | int = 0.0
    force_upcast: bool = False
    lookup_from_codebook: bool = True

    def __post_init__(self, **kwargs):
        self._report_unknown([key for key in kwargs if not key.startswith("_") and key not in LIBRARY_KEYS])

        # Tuples, so that a config built in Python equals the same config read back from JSON.
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
        self.decoder_block_out_channels = tuple(self.decoder_block_out_channels or self.block_out_channels)
        if self.vq_embed_dim is None:
            self.vq_embed_dim = self.latent_channels
        if self.quantizer == "fsq" and self.fsq_levels:
            self.fsq_levels = tuple(self.fsq_levels)
            self.num_vq_embeddings, self.vq_embed_dim = math.prod(self.fsq_levels), len(self.fsq_levels)
        self._check_values()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        with reading():
            return super().from_dict(config_dict, **kwargs)

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
            if bad := [c for c in channels if c < 1 or c % self.norm_num_groups]:
                raise ValueError(
                    f"norm_num_groups={self.norm_num_groups} does not divide the channel count(s) {bad} in "
                    f"{name}={value}. Set norm_num_groups to a common divisor."
                )
        for name in (
            "in_channels",
            "out_channels",
            "sample_size",
            "layers_per_block",
            "latent_channels",
            "num_vq_embeddings",
            "vq_embed_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.norm_type not in ("group", "spatial"):
            raise ValueError(f"norm_type={self.norm_type!r} must be 'group' or 'spatial'.")
        if self.backbone not in ("vqgan", "maskgit"):
            raise ValueError(f"backbone={self.backbone!r} must be 'vqgan' or 'maskgit'.")
        if self.backbone == "maskgit" and self.vq_embed_dim != self.latent_channels:
            raise ValueError(
                f"backbone='maskgit' quantizes the encoder's output as it is, so vq_embed_dim={self.vq_embed_dim} must "
                f"equal latent_channels={self.latent_channels}."
            )
        if self.backbone == "maskgit" and self.norm_type == "spatial":
            raise ValueError("backbone='maskgit' has no spatial norms: use norm_type='group'.")
        if self.pixel_range not in ((-1, 1), (0, 1)):
            raise ValueError(f"pixel_range={self.pixel_range} must be (-1, 1) or (0, 1).")
        self._check_quantizer()

    def _check_quantizer(self):
        kind, codes, dim = self.quantizer, self.num_vq_embeddings, self.vq_embed_dim
        if self.normalize_on_lookup and (kind != "vq" or self.codebook_l2_norm):
            raise ValueError(
                "normalize_on_lookup=True is for quantizer='vq' without codebook_l2_norm, not for "
                f"quantizer={kind!r} with codebook_l2_norm={self.codebook_l2_norm}."
            )
        if not 0 <= self.num_used_codes <= codes or (self.num_used_codes and kind not in ("vq", "vq_ema")):
            raise ValueError(
                f"num_used_codes={self.num_used_codes} must be in [0, {codes}], the codebook's size, and is for "
                f"quantizer='vq' or 'vq_ema', not for {kind!r}."
            )
        composite = kind in ("residual", "grouped")
        if composite != (self.num_codebooks > 1):
            raise ValueError(
                f"num_codebooks={self.num_codebooks} does not go with quantizer={kind!r}: 'residual' and 'grouped' "
                "need 2 or more, all others have 1."
            )
        if kind == "fsq" and (not self.fsq_levels or min(self.fsq_levels) < 2):
            raise ValueError(
                f"fsq_levels={self.fsq_levels}: quantizer='fsq' needs levels of 2 or more, e.g. [8, 5, 5, 5]."
            )
        if kind in ("lfq", "bsq") and codes != 2**dim:
            raise ValueError(
                f"quantizer={kind!r} has one bit per dimension: num_vq_embeddings={codes} must be 2**vq_embed_dim, and "
                f"vq_embed_dim is {dim}."
            )
        if kind == "grouped" and dim % self.num_codebooks:
            raise ValueError(f"vq_embed_dim={dim} is not a multiple of num_codebooks={self.num_codebooks}.")
        allowed = ("vq", "vq_ema", "simvq")
        if composite and self.base_quantizer not in allowed:
            raise ValueError(f"base_quantizer={self.base_quantizer!r} must be one of {', '.join(map(repr, allowed))}.")
        if kind == "residual" and self.codebook_l2_norm:
            raise ValueError(
                "codebook_l2_norm=True: unit codes cannot shrink a residual. Use 'grouped', or turn it off."
            )
        for name, low, high in (("ema_decay", 0, 1), ("perturbation_share", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} must be in [{low}, {high}].")
        for name in ("entropy_temperature", "gumbel_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")

    @property
    def downsample_factor(self) -> int:
        """f: how many pixels one latent position covers along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


def model_fields() -> list[str]:
    """Names of the fields that VQGANConfig adds to transformers' own."""
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return [field.name for field in fields(VQGANConfig) if field.name not in inherited]
