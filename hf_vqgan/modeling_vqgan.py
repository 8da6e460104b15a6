"""The VQ-GAN as a transformers model with diffusers' interface: image -> encoder -> quantizer -> decoder -> image.

Nothing about losses on images, discriminators or training is here: see losses/ and training/.
"""

import contextlib
import copy
import importlib
import inspect
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from diffusers.models.activations import get_activation
from diffusers.models.attention_processor import SpatialNorm
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder, IdentityDistribution
from diffusers.models.unets.unet_2d_blocks import get_down_block
from diffusers.models.upsampling import Upsample2D
from diffusers.utils.accelerate_utils import apply_forward_hook
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .blocks import UpsamplingBlock, replace_blocks
from .configuration_vqgan import VQGANConfig
from .modeling_maskgit import MaskGitDecoder, MaskGitEncoder
from .quantizers import QUANTIZERS, Quantizer, layerwise_casting


@dataclass
class VQGANEncoderOutput(ModelOutput):
    """
    Args:
        latents (`Tensor` of shape `(B, D, h, w)`): Continuous latents, before quantization.
    """

    latents: Tensor | None = None

    @property
    def latent_dist(self) -> IdentityDistribution:
        """The latents as the (degenerate) distribution that diffusers' pipelines sample from."""
        return IdentityDistribution(self.latents)


@dataclass
class VQGANOutput(ModelOutput):
    """
    Args:
        sample (`Tensor` of shape `(B, C, H, W)`): Reconstruction, about [-1, 1] (not clamped).
        latents (`Tensor` of shape `(B, D, h, w)`): Continuous latents, before quantization.
        indices (`Tensor` of shape `(B, h, w)`, int64): Chosen codes; `(B, h, w, n)` with n codes per position.
        losses (`dict[str, Tensor]`): The quantizer's named, unweighted losses.
        hidden_states (`tuple[Tensor]`, *optional*):
            With `output_hidden_states`, the features in order of computation: after each level of the encoder
            `(B, C_i, H_i, W_i)` and its middle block, then after the decoder's middle block and each of its levels.
    """

    sample: Tensor | None = None
    latents: Tensor | None = None
    indices: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class VQGANModel(PreTrainedModel):
    r"""
    An image tokenizer: B x 3 x H x W pixels in [-1, 1] to B x H/f x W/f codes and back.

    State-dict keys are those of `diffusers.VQModel`, so weights move between the two unchanged (`to_diffusers`).

    Example:
    ```python
    model = VQGANModel(VQGANConfig(block_out_channels=(32, 64), latent_channels=32, num_vq_embeddings=512))
    indices = model.encode_indices(pixel_values)  # (B, H/2, W/2)
    pixel_values = model.decode_indices(indices).sample  # (B, 3, H, W)
    ```
    """

    config_class = VQGANConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "DownEncoderBlock2D",
        "AttnDownEncoderBlock2D",
        "UNetMidBlock2D",
        "UpDecoderBlock2D",
        "AttnUpDecoderBlock2D",
        "MaskGitBlock",
        *(kind.__name__ for kind in QUANTIZERS.values()),
    ]
    _skip_layerwise_casting_patterns = ["quantize"]

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        if config.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer={config.quantizer!r} is not one of {', '.join(map(repr, QUANTIZERS))}.")
        self.encoder = build_encoder(config)
        self.quantize: Quantizer = QUANTIZERS[config.quantizer](config)
        if config.backbone == "vqgan":
            self.quant_conv = nn.Conv2d(config.latent_channels, config.vq_embed_dim, 1)
            if not config.encoder_only:
                self.post_quant_conv = nn.Conv2d(config.vq_embed_dim, config.latent_channels, 1)
        else:
            self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()
        if not config.encoder_only:
            self.decoder = build_decoder(config)
        self.use_slicing = self.use_tiling = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As in transformers; damaged weights are an `OSError`, too.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"the weights of {pretrained_model_name_or_path} are damaged ({error}). Copy or download them again."
            ) from error

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        config = Path(save_directory, "config.json")
        for file in config.parent.glob("*.safetensors") if config.is_file() else ():
            shutil.copymode(config, file)  # safetensors makes files that only their owner can read

    # By which diffusers' pipelines find out what they may pass on
    save_pretrained.__signature__ = inspect.signature(PreTrainedModel.save_pretrained)  # type: ignore[attr-defined]

    @classmethod
    def from_config(cls, config: VQGANConfig | str | Path, return_unused_kwargs: bool = False):
        """A model with new weights, as diffusers' `EMAModel` asks for it; its own settings are the unused arguments."""
        own = copy.deepcopy(config) if isinstance(config, VQGANConfig) else VQGANConfig.from_pretrained(config)
        return (cls(own), getattr(own, "_ema", {})) if return_unused_kwargs else cls(own)

    def register_to_config(self, **settings) -> None:
        """Note the settings of diffusers' `EMAModel` in config.json."""
        self.config._ema = settings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers would draw every weight from N(0, 0.02). Here layers initialize themselves: at PyTorch's fan-in
        # scale, which diffusers' blocks are designed for. Each module sets only its direct parameters.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype of the first layer. With layerwise casting, its weights are stored in another one."""
        for module in self.modules():
            if (casting := layerwise_casting(module)) is not None:
                return casting.compute_dtype
            for weight in module.parameters(recurse=False):
                if weight.is_floating_point():
                    return weight.dtype
        raise AttributeError("the model has no floating-point weights, and so no dtype.")

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, at which loss gradients are compared (adaptive weight)."""
        return self.decoder.conv_out.weight

    def enable_slicing(self) -> None:
        """Encode and decode one image of a batch at a time: the memory of one image, with the same results."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self, tile_sample_min_size: int | None = None, tile_overlap_factor: float = 0.25) -> None:
        """
        Encode and decode images larger than a tile in overlapping tiles, blended linearly: the memory of one tile.

        Normalization and attention then see a tile instead of the image, so results differ slightly from untiled ones;
        docs/diffusers.md has measurements. Codes are chosen once, on the blended latents.

        Args:
            tile_sample_min_size (`int`, *optional*):
                Side of a tile in pixels, a multiple of f. Default: about `config.sample_size`, as in training.
            tile_overlap_factor (`float`, defaults to 0.25): Share of a tile that overlaps the next, in [0, 1).

        Raises:
            ValueError: for a side that f does not divide, or an overlap out of range.
        """
        factor = self.config.downsample_factor
        side = max(1, self.config.sample_size // factor) * factor
        side = side if tile_sample_min_size is None else tile_sample_min_size
        if side < factor or side % factor:
            raise ValueError(
                f"tile_sample_min_size={side} must be a positive multiple of {factor}, the downsampling factor."
            )
        if not 0 <= tile_overlap_factor < 1:
            raise ValueError(f"tile_overlap_factor={tile_overlap_factor} must be in [0, 1).")
        self.use_tiling = True
        self.tile_latent_min_size = side // factor
        self.tile_latent_overlap = int(self.tile_latent_min_size * tile_overlap_factor)

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def enable_group_offload(
        self, onload_device: torch.device | str, offload_to_disk_path: str | None = None, **options
    ) -> None:
        """
        Keep the networks' weights elsewhere, and move groups of layers to `onload_device` as they run; the codebook
        stays there, as it belongs to no layer. Diffusers' pipelines call this from their own `enable_group_offload`.

        Args:
            onload_device (`torch.device` or `str`): Where to compute, and where inputs are expected.
            offload_to_disk_path (`str`, *optional*): Folder to keep the weights in, instead of main memory.
            options: Of `diffusers.hooks.apply_group_offloading`: `offload_type`, `num_blocks_per_group`, ...
        """
        self.quantize.to(onload_device)
        for name, part in self.named_children():
            if part is not self.quantize and next(part.parameters(), None) is not None:
                folder = offload_to_disk_path and str(Path(offload_to_disk_path) / name)
                apply_group_offloading(part, onload_device, offload_to_disk_path=folder, **options)

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: tuple[str, ...] | None = None,
        **options,
    ) -> None:
        """
        Store the networks' weights in fewer bits, and cast each layer's when it runs: for inference, as diffusers'
        models do. Normalization and the codebook stay in `compute_dtype`.

        Args:
            storage_dtype (`torch.dtype`): Of the weights at rest.
            compute_dtype (`torch.dtype`, *optional*): Of computations. Default: the model's dtype.
            skip_modules_pattern (`tuple[str, ...]`, *optional*):
                Regular expressions for the names of layers to leave unchanged besides the quantizer. Default: those of
                diffusers, mainly norms.
            options: Of `diffusers.hooks.apply_layerwise_casting`: `skip_modules_classes`, `non_blocking`.
        """
        compute_dtype = compute_dtype or self.dtype
        self.to(compute_dtype)
        patterns = DEFAULT_SKIP_MODULES_PATTERN if skip_modules_pattern is None else skip_modules_pattern
        skipped = (*patterns, *self._skip_layerwise_casting_patterns)
        apply_layerwise_casting(self, storage_dtype, compute_dtype, skipped, **options)

    @apply_forward_hook
    def encode(self, pixel_values: Tensor, return_dict: bool = True) -> VQGANEncoderOutput | tuple[Tensor]:
        """
        Args:
            pixel_values (`Tensor` of shape `(B, C, H, W)`): Images in [-1, 1]; H and W multiples of f.

        Returns:
            [`VQGANEncoderOutput`] with continuous `latents` `(B, D, H/f, W/f)`, or a tuple if not `return_dict`.

        Raises:
            ValueError: for integer pixels, a wrong number of channels, or sides that f does not divide.
        """
        self._check_pixels(pixel_values)
        pixel_values = pixel_values.to(self.dtype)
        if self.config.pixel_range == (0, 1):
            pixel_values = (pixel_values + 1) / 2
        latents = self._in_parts(lambda x: self.quant_conv(self.encoder(x)), pixel_values, encoding=True)
        return VQGANEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, int, int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """
        Decode latents, which are quantized first unless `force_not_quantize`, or indices, which are looked up.

        Args:
            z (`Tensor`): Float latents `(B, D, h, w)`; or integer indices `(B, h, w)`, or flat ones with `shape`.
            shape (`tuple`, *optional*): `(B, h, w, D)` of flat indices, as diffusers' Amused pipeline passes it.
            generator (`torch.Generator`, *optional*): Accepted for diffusers' pipelines; decoding draws no noise.

        Returns:
            `DecoderOutput` with `sample` `(B, C, h*f, w*f)`, about [-1, 1].
        """
        if not z.is_floating_point():
            per_position = z.shape[3:] if self.quantize.num_codebooks == 1 else (self.quantize.num_codebooks,)
            quantized = self._look_up(z if shape is None else z.reshape(*shape[:3], *per_position))
        else:
            z = z.to(self.dtype)
            quantized = z if force_not_quantize else self.quantize(z).quantized
        sample = self._decode_quantized(quantized)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode_indices(self, pixel_values: Tensor) -> Tensor:
        """
        Images `(B, C, H, W)` in [-1, 1] to codes `(B, H/f, W/f)`, or `(B, H/f, W/f, n)`, int64.

        Raises:
            ValueError: as `encode`; in eval mode, for pixels that are NaN or infinite.
        """
        return self.quantize(self.encode(pixel_values).latents).indices

    def decode_indices(self, indices: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Codes as `encode_indices` gives them, any integer dtype, to images `(B, C, h*f, w*f)`, about [-1, 1]."""
        return self.decode(indices, return_dict=return_dict)

    def forward(
        self,
        pixel_values: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool | None = None,
        latent_transform: Callable[[Tensor], Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> VQGANOutput | tuple[Tensor, ...]:
        """
        Reconstruct `pixel_values` `(B, C, H, W)` in [-1, 1].

        With `force_not_quantize` the decoder gets the continuous latents, as at the start of some trainings; indices
        and losses are still the quantizer's. `latent_transform` maps the latents before quantization, for training
        objectives on latents; the output's `latents` are then its result.

        Args:
            return_dict (`bool`, *optional*):
                Whether to return a [`VQGANOutput`] or a tuple of its values. Default: `config.return_dict`.
            output_hidden_states (`bool`, *optional*):
                Whether to return the features of every level, too. Default: `config.output_hidden_states`.
            output_attentions (`bool`, *optional*): Not supported: the attention kernels keep no weights.

        Raises:
            ValueError: as `encode`; for `output_attentions`; for `output_hidden_states` with slicing or tiling.
        """
        config = self.config
        if config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions=True: the attention kernels of VQGANModel keep no weights to return.")
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if wanted and (self.use_slicing or self.use_tiling):
            raise ValueError(
                "output_hidden_states=True does not work with slicing or tiling. Call disable_slicing() and "
                "disable_tiling() first."
            )
        with recorded(self._levels() if wanted else []) as features:
            latents = self.encode(pixel_values).latents
            if latent_transform is not None:
                latents = latent_transform(latents)
            chosen = self.quantize(latents)
            sample = self._decode_quantized(latents if force_not_quantize else chosen.quantized)
        output = VQGANOutput(
            sample=sample,
            latents=latents,
            indices=chosen.indices,
            losses=chosen.losses,
            hidden_states=tuple(features) if wanted else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @classmethod
    def from_original(
        cls,
        path_or_repo: str | Path,
        format: str = "auto",
        config: dict | str | Path | None = None,
        weights: str = "auto",
    ) -> "VQGANModel":
        """
        Load a checkpoint of another project: taming-transformers, latent diffusion, LlamaGen, Janus, IBQ, openMUSE,
        MaskGIT, MoVQGAN, Chameleon, diffusers (docs/checkpoints.md). No code from the file is run.

        Args:
            path_or_repo (`str` or `Path`): A file; a folder; or `owner/name` on the Hub, with `/folder` or `/file`.
            format (`str`, defaults to `"auto"`): A key of `conversion.families.FAMILIES`, or found from the keys.
            config (`dict` or path, *optional*): The original's config, YAML or JSON; by default one beside the file.
            weights (`str`, defaults to `"auto"`):
                `"raw"`, or `"ema"` for their moving average; by default what the original's evaluation uses.

        Returns:
            [`VQGANModel`] in eval mode and in the file's dtype. Its pixels are in [-1, 1], whatever the original's.

        Raises:
            FileNotFoundError: if there is no such file or folder.
            ValueError: for a damaged file, an unknown family, a pickle that would run other code, and tensors that are
                missing, surplus or misshapen (all of them listed). Nothing is loaded partially.
        """
        model = _conversion().load_original(path_or_repo, format, config, weights)
        for tensor in model.state_dict(keep_vars=True).values():  # one by one, so that the file's pages can be freed
            tensor.data = tensor.data.clone()
        return model

    def to_original(self, format: str) -> tuple[dict[str, Tensor], dict]:
        """
        The weights by another project's names, and its config.

        Args:
            format (`str`): `"taming"`, `"ldm"`, `"llamagen"` or `"diffusers"`.

        Returns:
            `(dict[str, Tensor], dict)`: state dict, sharing memory with the model, and config.

        Raises:
            ValueError: if the project's code cannot hold the model; lists all reasons.
        """
        return _conversion().export_original(self, format)

    def diffusers_parts(self) -> tuple[dict, dict[str, Tensor]]:
        """
        The arguments and the state dict of an equal `diffusers.VQModel`.

        Raises:
            ValueError: if `diffusers.VQModel` cannot hold the model; lists all reasons.
        """
        config, codebook = self.config, self.quantize.to_codebook()
        obstacles = {
            f"quantizer={config.quantizer!r} is not nearest-code lookup in a plain codebook": codebook is None,
            f"backbone={config.backbone!r}": config.backbone != "vqgan",
            "encoder_only=True": config.encoder_only,
            f"pixel_range={config.pixel_range}": config.pixel_range != (-1, 1),
            "normalize_on_lookup=True": config.normalize_on_lookup,
            f"stem_channels={config.stem_channels}": config.stem_channels != config.block_out_channels[0],
            f"decoder_block_out_channels={config.decoder_block_out_channels}": (
                config.decoder_block_out_channels != config.block_out_channels
            ),
            f"norm_type='spatial' with vq_embed_dim={config.vq_embed_dim} unlike latent_channels": (
                config.norm_type == "spatial" and config.vq_embed_dim != config.latent_channels
            ),
        }
        if found := [text for text, applies in obstacles.items() if applies]:
            raise ValueError(
                f"diffusers.VQModel cannot hold this model: {'; '.join(found)}. "
                "Use VQGANModel itself as the pipeline's autoencoder."
            )
        names = VQModel._get_init_keys(VQModel) - {"self"}
        weights = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("quantize.")}
        return {name: getattr(config, name) for name in names}, weights | {"quantize.embedding.weight": codebook}

    def to_diffusers(self) -> VQModel:
        """
        The same model as a stock `diffusers.VQModel`, with copied weights and equal outputs.

        Raises:
            ValueError: if `diffusers.VQModel` cannot hold the model; lists all reasons.
        """
        fields, weights = self.diffusers_parts()
        model = VQModel(**fields)
        model.load_state_dict(weights)
        for parameter in model.parameters():  # Module.to would warn about layers to keep in float32; there are none
            parameter.data = parameter.data.to(self.device, self.dtype)
        return model.train(self.training)

    def _levels(self) -> list[nn.Module]:
        """The blocks of encoder and decoder, in order."""
        blocks = [*self.encoder.down_blocks, self.encoder.mid_block]
        return blocks if self.config.encoder_only else [*blocks, self.decoder.mid_block, *self.decoder.up_blocks]

    def _decode_quantized(self, quantized: Tensor) -> Tensor:
        if self.config.encoder_only:
            raise ValueError(
                "this model has encoder_only=True: its checkpoint holds no decoder, so codes cannot become images. "
                "encode, quantize and encode_indices work."
            )

        def decode(codes: Tensor) -> Tensor:
            # The spatial norms of MoVQ take the codes in addition to the features
            return self.decoder(self.post_quant_conv(codes), codes if self.config.norm_type == "spatial" else None)

        sample = self._in_parts(decode, quantized, encoding=False)
        return sample * 2 - 1 if self.config.pixel_range == (0, 1) else sample

    def _in_parts(self, network: Callable[[Tensor], Tensor], x: Tensor, encoding: bool) -> Tensor:
        """`network(x)`, image by image with slicing and tile by tile with tiling."""
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._in_parts(network, image, encoding) for image in x.split(1)])
        factor = self.config.downsample_factor
        latent_sides = [side // factor if encoding else side for side in x.shape[2:]]
        if not self.use_tiling or max(latent_sides) <= self.tile_latent_min_size:
            return network(x)
        before, after = (factor, 1) if encoding else (1, factor)
        channels = self.config.vq_embed_dim if encoding else self.config.out_channels
        # In float32 whatever the model's dtype: rounding errors of the sums would be visible
        weights = torch.zeros([side * after for side in latent_sides], device=x.device)
        blended = torch.zeros(len(x), channels, *weights.shape, device=x.device)
        tiles = [tile_slices(side, self.tile_latent_min_size, self.tile_latent_overlap) for side in latent_sides]
        for rows, columns in itertools.product(*tiles):
            out = network(x[..., scaled(rows, before), scaled(columns, before)])
            ramps = [blend_ramp(side, self.tile_latent_overlap * after, x.device) for side in out.shape[2:]]
            weight = ramps[0][:, None] * ramps[1]
            blended[..., scaled(rows, after), scaled(columns, after)] += weight * out
            weights[scaled(rows, after), scaled(columns, after)] += weight
        return (blended / weights).to(x.dtype)

    def _look_up(self, indices: Tensor) -> Tensor:
        if not indices.numel():
            raise ValueError(f"indices of shape {tuple(indices.shape)} hold no codes: expected some.")
        several = self.quantize.num_codebooks > 1
        expected = f"(B, h, w, {self.quantize.num_codebooks})" if several else "(B, h, w)"
        if indices.ndim != 3 + several or (several and indices.shape[3] != self.quantize.num_codebooks):
            raise ValueError(f"indices of shape {tuple(indices.shape)}: expected {expected}.")
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= self.quantize.num_codes:
            raise ValueError(
                f"indices span [{low}, {high}] but the codebook has codes 0 to {self.quantize.num_codes - 1}."
            )
        return self.quantize.codes(indices.long()).to(self.dtype)

    def _check_pixels(self, pixel_values: Tensor) -> None:
        if not pixel_values.numel():
            raise ValueError(f"pixel_values of shape {tuple(pixel_values.shape)} hold no pixels: expected an image.")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.in_channels:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)}: expected (B, {self.config.in_channels}, H, W)."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixel_values.dtype}: expected floats in [-1, 1]. VQGANImageProcessor makes them."
            )
        factor = self.config.downsample_factor
        height, width = pixel_values.shape[2:]
        if height % factor or width % factor:
            raise ValueError(
                f"image size {height}x{width} is not a multiple of {factor}, the model's downsampling factor. Crop or "
                f"resize to {height // factor * factor}x{width // factor * factor} "
                f"(VQGANImageProcessor(size_divisor={factor}) does)."
            )


@contextlib.contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of `modules` while the context is active, in the order of their calls."""
    outputs: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _, inputs, output: outputs.append(output)) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _conversion():
    """The module that knows other projects' formats. It imports this one, hence the late import; and by name, because
    transformers copies every module that a saved model's code imports by a statement."""
    return importlib.import_module("hf_vqgan.conversion.convert")


def build_encoder(config: VQGANConfig) -> nn.Module:
    """The encoder: images `(B, C, H, W)` to features `(B, latent_channels, H/f, W/f)`."""
    shared: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.latent_channels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
    }
    if config.backbone == "maskgit":
        return MaskGitEncoder(stem_channels=config.stem_channels, act=get_activation(config.act_fn), **shared)
    encoder = Encoder(
        down_block_types=config.down_block_types,
        act_fn=config.act_fn,
        mid_block_add_attention=config.mid_block_add_attention,
        double_z=False,
        **shared,
    )
    first = config.block_out_channels[0]
    if config.stem_channels != first:  # diffusers has one setting for both
        encoder.conv_in = nn.Conv2d(config.in_channels, config.stem_channels, 3, padding=1)
        encoder.down_blocks[0] = get_down_block(
            config.down_block_types[0],
            num_layers=config.layers_per_block,
            in_channels=config.stem_channels,
            out_channels=first,
            temb_channels=None,
            add_downsample=len(config.block_out_channels) > 1,
            resnet_eps=1e-6,
            resnet_act_fn=config.act_fn,
            resnet_groups=config.norm_num_groups,
            downsample_padding=0,
            attention_head_dim=first,
        )
    return encoder


def build_decoder(config: VQGANConfig) -> nn.Module:
    """The decoder: features `(B, latent_channels, h, w)`, and the codes for spatial norms, to images."""
    shared: dict[str, Any] = {
        "in_channels": config.latent_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.decoder_block_out_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
    }
    if config.backbone == "maskgit":
        return MaskGitDecoder(act=get_activation(config.act_fn), **shared)
    decoder = Decoder(
        up_block_types=config.up_block_types,
        act_fn=config.act_fn,
        mid_block_add_attention=config.mid_block_add_attention,
        norm_type=config.norm_type,
        **shared,
    )
    if config.vq_embed_dim != config.latent_channels:  # diffusers has one setting for both
        for norm in decoder.modules():
            if isinstance(norm, SpatialNorm):
                channels = norm.norm_layer.num_channels
                norm.conv_y = nn.Conv2d(config.vq_embed_dim, channels, 1)
                norm.conv_b = nn.Conv2d(config.vq_embed_dim, channels, 1)
    return replace_blocks(decoder, {Upsample2D: UpsamplingBlock})


def tile_slices(side: int, tile: int, overlap: int) -> list[slice]:
    """
    Slices of length `tile` that cover `side`, neighbours overlapping by at least `overlap`. The last one is moved
    inwards instead of cut: the normalization statistics of a sliver would be visible as a seam.
    """
    tile = min(tile, side)
    count = 1 + math.ceil((side - tile) / (tile - min(overlap, tile - 1)))
    starts = [0] if count == 1 else [round(index * (side - tile) / (count - 1)) for index in range(count)]
    return [slice(start, start + tile) for start in starts]


def scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)


def blend_ramp(side: int, overlap: int, device: torch.device) -> Tensor:
    """Weights `(side,)` that rise linearly from a tile's edges to 1 over `overlap`; the caller normalizes them."""
    position = torch.arange(side, device=device) + 0.5
    return (torch.minimum(position, side - position) / max(overlap, 0.5)).clamp(max=1)
