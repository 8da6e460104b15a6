"""What a tokenizer's training run is set up from: images, networks, optimizers and schedules."""

import copy

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from ..configuration_vqgan import VQGANConfig, model_fields
from ..data.datasets import (
    ImageTransform,
    MixedImages,
    TrainingImages,
    ValidationImages,
    map_style_images,
)
from ..data.images import TrainingOptions, load_image_datasets, load_train_images
from ..data.streams import StreamedImages, load_image_stream
from ..files.sources import check_model_folder
from ..losses.discriminators import DINODiscriminator, PatchDiscriminator, StyleGANDiscriminator
from ..losses.image_losses import LPIPS
from ..losses.regularizers import FeatureAlignment
from ..measurement.metrics import CodebookHealth
from ..modeling_vqgan import VQGANModel
from .configuration import VQGANTrainingConfig
from .fast_blocks import install_fast_blocks
from .optimization import build_optimizer
from .step import TrainState


def check_model(config: VQGANTrainingConfig, model_config: VQGANConfig) -> None:
    """
    Before anything is loaded, find out about a model that cannot be trained.

    Raises:
        ValueError: if it has no decoder, or does not fit the images.
        FileNotFoundError, ConnectionError: if `init_from` cannot be had.
    """
    if config.init_from is not None:
        check_model_folder(config.init_from)
    if model_config.encoder_only:
        raise ValueError("encoder_only=True: a model without a decoder reconstructs nothing, so it cannot be trained.")
    for name in ("in_channels", "out_channels"):
        if getattr(model_config, name) != 3:
            raise ValueError(f"{name}={getattr(model_config, name)}: training images are RGB, so it must be 3.")
    factor = model_config.downsample_factor
    if config.resolution % factor:
        raise ValueError(
            f"resolution={config.resolution} is not a multiple of {factor}, the downsampling factor of "
            f"{len(model_config.block_out_channels)} levels in block_out_channels."
        )


def load_images(
    config: VQGANTrainingConfig, model_config: VQGANConfig, accelerator: Accelerator
) -> tuple[TrainingImages | MixedImages | StreamedImages, ValidationImages]:
    """The training and validation images that the configuration names, checked against the model's factor."""
    transform = ImageTransform(config.resolution, config.resize, config.center_crop, config.random_flip)
    first = TrainingOptions.of(config.dataset_name, config)
    others = [
        TrainingOptions(
            name,
            image_column=config.image_column,
            cache_dir=config.cache_dir,
            train_split=config.train_split,
            max_train_samples=config.max_train_samples,
        )
        for name in config.extra_datasets
    ]
    weights = config.dataset_weights or None
    with accelerator.main_process_first():  # one process fills the dataset cache, the others read it
        if config.streaming:
            shards, validation_images = load_image_stream(first)
            more = [load_image_stream(options, hold_out=False)[0] for options in others]
            training = StreamedImages(
                [shards, *more], transform, config.seed, weights, config.shuffle_buffer_size, config.shard_groups
            )
        else:
            images, validation_images = load_image_datasets(first)
            more = [load_train_images(options) for options in others]
            training = map_style_images([images, *more], transform, config.seed, config.crops_per_image, weights)
    validation = ValidationImages(
        validation_images, transform, config.validate_whole_images, model_config.downsample_factor
    )
    if not len(validation):
        raise ValueError(f"none of the {len(validation_images)} validation images can be read.")
    return training, validation


def load_lpips(config: VQGANTrainingConfig, accelerator: Accelerator) -> tuple[LPIPS | None, LPIPS]:
    """The LPIPS networks of the loss (`None` if it has no weight) and of the validation metric."""
    given = config.perceptual_weights_path if config.validation_net == config.perceptual_net else None
    with accelerator.main_process_first():  # one process fetches the weights, the others read the cache
        metric = LPIPS(config.validation_net, given)
        perceptual = None
        if config.perceptual_weight:
            perceptual = LPIPS(config.perceptual_net, config.perceptual_weights_path, config.perceptual_upscale)
    for network, flag in ((metric, "validation_net"), (perceptual, "perceptual_net")):
        if network is not None and config.resolution < network.min_side:
            raise ValueError(
                f"resolution={config.resolution} is too small for LPIPS with {flag}={network.net!r}, which needs "
                f"{network.min_side} pixels here. Raise --resolution or --perceptual_upscale, or take `vgg`."
            )
        if network is not None:
            network.to(accelerator.device, memory_format=memory_format(config))
    if perceptual is not None and config.mixed_precision != "no":
        # Autocast would convert the frozen trunk anew in every pass, and keep the copies until the backward pass.
        perceptual.slices.to(torch.bfloat16 if config.mixed_precision == "bf16" else torch.float16)
    return perceptual, metric


def memory_format(config: VQGANTrainingConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


def build_state(
    config: VQGANTrainingConfig, model_config: VQGANConfig, accelerator: Accelerator, perceptual: LPIPS | None
) -> TrainState:
    """Networks, optimizers and schedules; the networks as Accelerate prepares them."""
    model = build_model(config, model_config)
    discriminator = disc_optimizer = disc_scheduler = None
    if config.adversarial_weight and config.disc_start < config.max_train_steps:
        discriminator = build_discriminator(config, model_config.out_channels)
    if config.torch_compile:
        compile_blocks(config, model, discriminator, perceptual)

    alignment = None
    if config.alignment_weight:
        alignment = FeatureAlignment(config.alignment_model, model_config.vq_embed_dim)
    optimizer = build_optimizer(config, (model, alignment), config.learning_rate)
    scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    model = prepare_generator(model, accelerator)
    if alignment is not None:
        alignment = accelerator.prepare_model(alignment)
    if discriminator is not None:
        learning_rate = config.learning_rate if config.disc_learning_rate is None else config.disc_learning_rate
        warmup = config.lr_warmup_steps if config.disc_lr_warmup_steps is None else config.disc_lr_warmup_steps
        disc_optimizer = build_optimizer(config, (discriminator,), learning_rate)
        disc_scheduler = get_scheduler(
            config.disc_lr_scheduler or config.lr_scheduler,
            disc_optimizer,
            num_warmup_steps=warmup,
            num_training_steps=config.max_train_steps - config.disc_start,
        )
        discriminator = accelerator.prepare_model(discriminator)
    ema = None
    if config.use_ema:
        ema = EMAModel(accelerator.unwrap_model(model).parameters(), decay=config.model_ema_decay)
        ema.to(accelerator.device)
    health = CodebookHealth(model_config.num_vq_embeddings, model_config.num_codebooks, config.codebook_window)
    return TrainState(
        config,
        accelerator,
        model,
        discriminator,
        perceptual,
        optimizer,
        scheduler,
        disc_optimizer,
        disc_scheduler,
        health,
        ema=ema,
        alignment=alignment,
    )


def prepare_generator(model: VQGANModel, accelerator: Accelerator) -> nn.Module:
    """
    The model as Accelerate prepares it, on its device and under DDP, but without the wrapper that mixed precision puts
    around `forward`: it returns float32 copies of all outputs, and a copy of the latents is not what the reconstruction
    was computed from. `generate` switches autocast on by itself.
    """
    prepared = accelerator.prepare_model(model)
    for wrapper in ("forward", "_original_forward"):
        model.__dict__.pop(wrapper, None)
    return prepared


def build_model(config: VQGANTrainingConfig, model_config: VQGANConfig) -> VQGANModel:
    """The model, new or from `init_from`, with frozen encoder and codes for `decoder_only`."""
    # A copy: the scaling factor measured at the end must not change the settings by which the run is recognised.
    model_config = copy.deepcopy(model_config)
    if config.init_from is None:
        model = VQGANModel(model_config)
    else:
        model = load_model_to_start_from(config.init_from, model_config)
    if config.decoder_only:
        for part in (model.encoder, model.quant_conv, model.quantize):
            part.requires_grad_(False)
    if config.gradient_checkpointing:
        # transformers 5 has renamed it on the way
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return install_fast_blocks(model).train().to(memory_format=memory_format(config))


def load_model_to_start_from(source: str, model_config: VQGANConfig) -> VQGANModel:
    """
    Raises:
        ValueError: if its weights have other shapes than this run's model.
    """
    try:
        return VQGANModel.from_pretrained(source, config=model_config, dtype=torch.float32)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        of_source = VQGANConfig.from_pretrained(source)
        pairs = {name: (getattr(of_source, name), getattr(model_config, name)) for name in model_fields()}
        changed = ", ".join(f"{name}={new!r} (there {old!r})" for name, (old, new) in pairs.items() if old != new)
        raise ValueError(
            f"init_from={source!r}: the model there has weights of other shapes than this run's"
            f"{', which has ' + changed if changed else ', although their settings are the same'}."
        ) from error


def build_discriminator(config: VQGANTrainingConfig, channels: int) -> nn.Module:
    match config.disc_type:
        case "patchgan":
            discriminator = PatchDiscriminator(channels, config.disc_channels, config.disc_layers)
        case "stylegan":
            discriminator = StyleGANDiscriminator(config.resolution, channels, config.disc_channels)
        case "dino":
            discriminator = DINODiscriminator(config.disc_backbone)
    return discriminator.train().to(memory_format=memory_format(config))


def compile_blocks(
    config: VQGANTrainingConfig, model: VQGANModel, discriminator: nn.Module | None, perceptual: LPIPS | None
) -> None:
    """
    Compile block by block: the step takes gradients at the decoder's last layer, which a graph of the whole decoder
    would hide; and equal blocks are compiled once.
    """
    if config.torch_compile_backend not in (known := torch._dynamo.list_backends(exclude_tags=())):
        raise ValueError(f"torch_compile_backend={config.torch_compile_backend!r} must be one of {', '.join(known)}.")
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    if discriminator is not None:
        blocks.append(discriminator)
    if perceptual is not None:
        blocks += perceptual.slices
    # Blocks of a class share their code, each with sizes of its own, with and without gradients.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(backend=config.torch_compile_backend)
