"""Tables of the differences between families of published VQ tokenizers, which `convert.py` works from.

To add a family, add an entry to `FAMILIES`: how it names the parts of a model, what else its files hold, and what names
and shapes do not show.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce

from ..files.checkpoint_files import shown

# (pattern in our name, replacement), applied one after the other
COMMON_NAMES = (
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"\.(group|spatial)_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"quantize\.(cluster_size|embed_avg)", r"quantize.embedding.\1"),
)
TAMING_NAMES = (
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"(down|up)_blocks\.", r"\1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    *COMMON_NAMES,
)
LLAMAGEN_NAMES = (
    (r"mid_block\.resnets\.0\.", "mid.0."),
    (r"mid_block\.attentions\.0\.", "mid.1."),
    (r"mid_block\.resnets\.1\.", "mid.2."),
    (r"(down|up)_blocks\.", "conv_blocks."),
    (r"\.resnets\.", ".res."),
    (r"\.attentions\.", ".attn."),
    *COMMON_NAMES,
)
MASKGIT_NAMES = (
    (r"mid_block\.resnets\.", "mid."),
    (r"\.upsamplers\.0\.conv\.", ".upsample_conv."),
    (r"(down|up)_blocks\.", r"\1."),
    (r"\.resnets\.", ".block."),
    *COMMON_NAMES,
)
OLD_DIFFUSERS_NAMES = (  # attention before diffusers 0.18
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn."),
)
# Linear layers here, 1x1 convolutions in original code
CONVOLVED = re.compile(r"\.to_[qkv]\.weight$|\.to_out\.0\.weight$|^quantize\.proj\.weight$")


def legacy_weights(beta: float) -> dict:
    """
    Loss weights of code derived from taming-transformers' quantizer in its default "legacy" form, where β multiplies
    |sg(z) - e|² although the paper (https://huggingface.co/papers/1711.00937, eq. 3) has it on |z - sg(e)|².
    """
    return {"commitment_weight": 1.0, "codebook_weight": beta}


def paper_weights(beta: float) -> dict:
    """Loss weights of code that has β on |z - sg(e)|²."""
    return {"commitment_weight": beta, "codebook_weight": 1.0}


def double_quantization_weights(beta: float) -> dict:
    """
    Loss weights of SEED-Voken's IBQ, whose quantizer adds |z - q|² to taming-transformers' legacy pair (`quant_loss` in
    https://github.com/TencentARC/SEED-Voken/blob/main/src/IBQ/modules/vqvae/quantize.py). That third term pulls
    both latents and codes. Its gradient through the soft choice cannot be expressed by the two weights.
    """
    return {"commitment_weight": 2.0, "codebook_weight": 1 + beta}


@dataclass(frozen=True)
class Family:
    """
    Args:
        title: What users call it.
        names: Renames from our names to the original's.
        keys: Patterns, each of which matches the start of some original name.
        kinds: Pattern of the class name in its config.
        lowest_first: Whether decoder level 0 is the lowest resolution, as here, and not the full one.
        convolved: Whether attention projections (and the Gumbel quantizer's) are 1x1 convolutions.
        bookkeeping: Patterns of names that belong to training or are unused; nothing else may be left over.
        fields: Config fields that are the same for the whole family.
        losses: Loss weights of the original trainer, for β.
        shadow: Where the moving average of a weight is stored.
        prefers_shadow: Whether the original evaluates with it.
        attentions_needed: A level with fewer attention layers than this has their weights but never runs them.
        ignored: Settings that the original takes and never reads, or that `defaults` name.
        defaults: Config fields where no config says otherwise.
        unseen: Settings that tensors do not show, and the value assumed for each without a config, in words.
    """

    title: str
    names: tuple[tuple[str, str], ...]
    keys: tuple[str, ...]
    kinds: str
    lowest_first: bool = False
    convolved: bool = True
    bookkeeping: tuple[str, ...] = ()
    fields: dict = field(default_factory=dict)
    losses: Callable[[float], dict] = legacy_weights
    shadow: Callable[[str], str] | None = None
    prefers_shadow: bool = False
    attentions_needed: int = 1
    ignored: tuple[str, ...] = ()
    defaults: dict = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)

    def name(self, ours: str, levels: int | None = None) -> str:
        """The original's name of our `ours`; without the count of decoder `levels`, in the stored order."""
        if levels is not None and not self.lowest_first:
            ours = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", ours)
        return reduce(lambda text, rule: re.sub(rule[0], rule[1], text), self.names, ours)

    def shape(self, ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The original's shape of our weight `ours`."""
        return (*shape, 1, 1) if self.convolved and CONVOLVED.search(ours) else shape


def flat_shadow(name: str) -> str:
    """Latent diffusion's LitEma over the whole model."""
    return "model_ema." + name.replace(".", "")


def shadow_per_module(name: str) -> str:
    """Sber MoVQGAN's LitEma, one for each module."""
    module, rest = name.split(".", 1)
    return f"ema_{module}.{rest.replace('.', '')}"


_taming = Family(
    title="taming-transformers VQGAN or GumbelVQ",
    names=TAMING_NAMES,
    keys=(r"encoder\.down\.\d+\.block\.", r"encoder\.mid\.block_1\.", r"decoder\.up\.\d+\.block\."),
    kinds=r"^taming\.",
    bookkeeping=(r"loss\.", r"model_ema\.", r"colorize$"),
    shadow=flat_shadow,
    unseen={"tanh_out": "false", "give_pre_end": "false"},
)
_plain_taming = replace(_taming, bookkeeping=(), shadow=None, unseen={})
_openmuse = replace(_plain_taming, fields={"pixel_range": (0, 1)}, attentions_needed=2)
_diffusers = Family(
    title="diffusers VQModel",
    names=(),
    keys=(r"encoder\.down_blocks\.", r"decoder\.up_blocks\."),
    kinds=r"^VQModel$",
    lowest_first=True,
    convolved=False,
    unseen={"norm_num_groups": "32", "act_fn": "silu"},
)
# In this order: the first whose keys fit is taken unless a config says otherwise.
FAMILIES = {
    "movq": replace(
        _taming,
        title="Sber MoVQGAN",
        keys=(*_taming.keys, r"decoder\.norm_out\.conv_y\."),
        kinds=r"^movqgan\.",
        bookkeeping=(r"loss\.", r"ema_(encoder|decoder|quantize|quant_conv|post_quant_conv)\."),
        fields={"norm_type": "spatial"},
        shadow=shadow_per_module,
    ),
    "taming": _taming,
    "ldm": replace(_taming, title="latent-diffusion VQ", kinds=r"^ldm\."),
    "ibq": replace(
        _taming,
        title="IBQ of SEED-Voken or Emu3.5",
        kinds=r"(^|\.)IBQ$",
        fields={"quantizer": "ibq"},
        losses=double_quantization_weights,
        prefers_shadow=True,
        ignored=("cosine_similarity", "l2_normalize"),
    ),
    "seed_voken": replace(
        _taming,
        title="SEED-Voken VQModel, which takes the nearest code",
        kinds=r"(^|\.)IBQ\.models\.\w+\.VQModel$",
        prefers_shadow=True,
    ),
    "openmuse": replace(_openmuse, title="openMUSE VQGAN", kinds=r"^VQGANModel$"),
    "openmuse_movq": replace(
        _openmuse,
        title="openMUSE MOVQ",
        keys=(*_taming.keys, r"decoder\.norm_out\.conv_y\."),
        kinds=r"^MOVQ$",
        convolved=False,
        fields={"norm_type": "spatial", "pixel_range": (0, 1)},
    ),
    "janus": replace(
        _plain_taming,
        title="Janus VQ (transformers)",
        kinds=r"^janus",
        lowest_first=True,
        fields={"normalize_on_lookup": True},
    ),
    "maskgit": Family(
        title="openMUSE MaskGitVQGAN",
        names=MASKGIT_NAMES,
        keys=(r"encoder\.down\.\d+\.block\.", r"encoder\.mid\.\d+\.norm1\.", r"decoder\.up\.\d+\.block\."),
        kinds=r"^MaskGitVQGAN$",
        fields={"pixel_range": (0, 1), "backbone": "maskgit"},
        ignored=("resample_with_conv",),
    ),
    "chameleon": Family(
        title="Chameleon VQ (transformers)",
        names=TAMING_NAMES,
        keys=_taming.keys[:2],
        kinds=r"^chameleon",
        bookkeeping=(r"post_quant_conv\.",),  # of a decoder that is not there
        fields={"encoder_only": True},
    ),
    "llamagen": Family(
        title="LlamaGen VQ",
        names=LLAMAGEN_NAMES,
        keys=(r"encoder\.conv_blocks\.", r"decoder\.conv_blocks\."),
        kinds=r"^llamagen",
        lowest_first=True,
        bookkeeping=(r"quantize\.codebook_used$",),
        losses=paper_weights,
        ignored=("codebook_l2_norm",),
        defaults={"codebook_l2_norm": True},
        unseen={"codebook_l2_norm": "true"},
    ),
    "diffusers_old": replace(
        _diffusers,
        title="diffusers VQModel with attention named as before diffusers 0.18",
        names=OLD_DIFFUSERS_NAMES,
        keys=(*_diffusers.keys, r"encoder\..*attentions\.0\.query\."),
    ),
    "diffusers": _diffusers,
}

# Prefixes of a tokenizer inside a larger model. Names without the prefix are not part of it.
PREFIXES = ("", "first_stage_model.", "model.vqmodel.", "vqmodel.", "gen_vision_model.", "vqvae.", "module.", "model.")
ANCHORS = ("encoder.conv_in.weight", "encoder.conv_in.bias", "encoder.conv_out.weight")

# Why a checkpoint with otherwise known keys cannot be read: (pattern of a surplus name, reason)
NOT_REPRESENTED = (
    (r"attn.*\.to_(qkv|out)\.", "linear attention"),
    (r"^quantize\.used$", "`remap` in a quantizer that then chooses among fewer codes"),
    (r"norm\w*\.conv\.", "spatial norms with a convolution of their own (`add_conv`)"),
    (r"\.block\.\d+\.conv_shortcut\.", "3x3 convolutions as shortcuts"),
    (r"\.extra_mid_res_blocks\.", "more than two residual blocks in the middle"),
    (r"\.temb_proj\.", "time embeddings"),
)
# Settings of original configs that change the computation but not the keys: (name, the only value represented)
REQUIRED_SETTINGS = {
    "attn_type": ("vanilla", "none", None),
    "codebook_l2_norm": (False, None),
    "cosine_similarity": (False, None),
    "double_z": (False, None),
    "double_latent": (False, None),
    "give_pre_end": (False, None),
    "l2_normalize": (False, None),
    "resamp_with_conv": (True, None),
    "resample_with_conv": (True, None),
    "tanh_out": (False, None),
}
# Our field: its names in original configs. Must agree with the tensors.
SETTINGS = {
    "num_vq_embeddings": ("n_embed", "num_embeddings", "codebook_size", "num_vq_embeddings"),
    "vq_embed_dim": ("embed_dim", "quantized_embed_dim", "codebook_embed_dim", "vq_embed_dim"),
    "latent_channels": ("z_channels", "latent_channels"),
    "layers_per_block": ("num_res_blocks", "layers_per_block"),
    "stem_channels": ("ch", "hidden_channels", "base_channels"),
    "block_out_channels": ("block_out_channels",),
    "in_channels": ("in_channels", "num_channels"),
    "out_channels": ("out_ch",),
}
# Likewise, in multiples of the stem's channels
MULTIPLIERS = {
    "block_out_channels": ("ch_mult", "channel_mult", "channel_multiplier", "encoder_ch_mult"),
    "decoder_block_out_channels": ("decoder_ch_mult",),
}
IBQ_SETTINGS = ("use_entropy_loss", "sample_minimization_weight", "batch_maximization_weight", "entropy_temperature")


@dataclass(frozen=True)
class Option:
    """
    A field found only in a config.

    Args:
        ours: The field, or "beta".
        names: Its names in original configs.
        kind: Of its values; whole numbers pass for floats.
        low, high: Their range.
    """

    ours: str
    names: tuple[str, ...]
    kind: type
    low: float = -math.inf
    high: float = math.inf

    def read(self, settings: dict):
        """
        The value in `settings`, `None` if there is none.

        Raises:
            ValueError: if it is of another kind or out of range.
        """
        name = next((name for name in self.names if settings.get(name) is not None), None)
        if name is None:
            return None
        value, is_number = settings[name], self.kind in (int, float)
        kinds = (int, float) if self.kind is float else self.kind
        fits = isinstance(value, kinds) and (self.kind is bool or not isinstance(value, bool))
        if fits and is_number:
            fits = self.low <= value <= self.high and abs(value) <= 1e30  # NaN is in no range
        if not fits:
            limits = f" in [{self.low:g}, {self.high:g}]" if is_number else ""
            what = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}[self.kind]
            raise ValueError(f"its config has {name}={shown(value)}, expected {what}{limits}.")
        return value


OPTIONS = (
    Option("beta", ("beta", "commitment_cost", "commit_loss_beta"), float, 0),
    Option("sample_size", ("resolution", "sample_size", "image_size"), int, 1, 2**16),
    Option("kl_weight", ("kl_weight",), float, 0),
    Option("ema_decay", ("decay",), float, 0, 1),
    Option("act_fn", ("act_fn",), str),
    Option("norm_num_groups", ("norm_num_groups",), int, 1, 2**16),
    Option("scaling_factor", ("scaling_factor",), float, 1e-6, 1e6),
    Option("shift_factor", ("shift_factor",), float, -1e6, 1e6),
    Option("force_upcast", ("force_upcast",), bool),
    Option("lookup_from_codebook", ("lookup_from_codebook",), bool),
    Option("codebook_l2_norm", ("codebook_l2_norm",), bool),
)
USE_EMA = Option("use_ema", ("use_ema",), bool)  # whether the original's evaluation takes the moving averages
# Tokenizers with keys like those of FAMILIES but other computations: (pattern of a name, title, reason)
OTHER_TOKENIZERS = (
    (r"quantize\.quant_resi\.", "a multi-scale VQVAE of VAR", "it quantizes each image at many scales"),
    (
        r"quantizer?\.lfq\.|encoder\.conv_in\.conv\.weight$",
        "the multi-scale tokenizer of Infinity",
        "it quantizes bits at many scales",
    ),
    (
        r"quantizer\.codebooks\.",
        "RQ-VAE",
        "this package has no residual quantizer like its own, with a row of padding in each codebook",
    ),
    (
        r"decoder\.adaptive\.|encoder\.mid_block\.\d+\.",
        "Open-MAGVIT2 of SEED-Voken",
        "its blocks have no biases, and its decoder norms that see the code map",
    ),
    (
        r"quantize\.power_vals$|encoder\.quant_conv\.",
        "MAGVITv2 of Show-o",
        "its halves have levels of different numbers of blocks",
    ),
)
CLASS_NAMES = ("target", "class_path", "_class_name", "model_type")
# Paths to the tokenizer's part of a config; the first that exists is read.
CONFIG_PATHS = (
    ("model", "params", "first_stage_config"),
    ("params", "first_stage_config"),
    ("model",),
    ("vq_config",),
    ("vqvae_config",),
    ("gen_vision_config",),
)
