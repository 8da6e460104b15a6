"""Training a VQ-GAN: its configuration, its state, one step, and the loop around it."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .configuration_vqgan import VQGANConfig, model_fields
from .data import EpochBatchSampler, ImageTransform, TrainingImages, ValidationImages, load_image_datasets
from .discriminators import PatchDiscriminator
from .image_processing_vqgan import VQGANImageProcessor
from .losses import (
    ADVERSARIAL_LOSSES,
    LPIPS,
    adaptive_weight,
    adversarial_loss,
    discriminator_losses,
    last_layer_gradient,
    ramp,
    reconstruction_losses,
    weighted_sum,
)
from .lpips_weights import NETWORKS
from .metrics import CodebookHealth, evaluate_reconstruction, gather_rows
from .modeling_vqgan import VQGANModel, VQGANOutput
from .pictures import draw_curves, draw_reconstructions

logger = logging.getLogger(__name__)

CONFIG_FILE = "training_config.yaml"
LOG_FILE = "log.jsonl"


def option(default, help: str, choices: tuple[str, ...] | None = None):
    """A field of the training configuration with the help text of its command-line flag."""
    metadata = {"help": help} | ({"choices": choices} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class VQGANTrainingConfig:
    """Everything about a training run but the model's architecture. Every field is a flag of `train_vqgan.py`."""

    # What a run reads and writes
    dataset_name: str = option("", "Hub dataset, local path that load_dataset reads, or package:NAME/FOLDER.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    train_split: str = option("train", "Split to train on.")
    validation_split: str | None = option(None, "Default: `validation`, else `test`, else images held out of train.")
    train_files: list[str] = option([], "Patterns of the training files inside the dataset. Default: all.")
    validation_files: list[str] = option([], "Patterns of the validation files inside the dataset.")
    image_column: str | None = option(None, "Column with the images. Default: the only image column.")
    max_train_samples: int | None = option(None, "Use only the first so many training images.")
    max_validation_samples: int | None = option(64, "Use only the first so many validation images.")
    cache_dir: str | None = option(None, "Where `datasets` keeps what it downloads.")
    output_dir: str = option("runs/vqgan", "Folder of the run: model, pictures, metrics and checkpoints.")
    overwrite_output_dir: bool = option(False, "Delete the run that is in output_dir, if there is one.")
    resume_from_checkpoint: str | None = option(
        None, "`latest`, or a checkpoint folder. Without it, the same command run again resumes too."
    )

    # From images to pixels
    resolution: int = option(256, "Side in pixels of the square crops to train on.")
    resize: int | None = option(None, "Shorter side before cropping. Default: resolution. 0: keep the image's size.")
    center_crop: bool = option(False, "Crop the centre instead of a random place.")
    random_flip: bool = option(True, "Mirror half of the crops.")
    crops_per_image: int = option(1, "Crops that one image yields per epoch.")
    validate_whole_images: bool = option(False, "Validate on whole images instead of their central square.")
    max_unreadable_share: float = option(0.2, "Stop when a larger share of the training images cannot be decoded.")
    dataloader_num_workers: int = option(0, "Processes that decode images, per training process.")

    # The three losses (losses.py) and their weights
    l1_weight: float = option(1.0, "Weight of |x̂ - x|: counts pixels.")
    l2_weight: float = option(0.0, "Weight of (x̂ - x)².")
    perceptual_weight: float = option(1.0, "Weight of LPIPS: compares features.")
    perceptual_net: str = option("vgg", "LPIPS network for training.", choices=tuple(NETWORKS))
    perceptual_weights_path: str | None = option(None, "File with the LPIPS network's weights. Default: fetched.")
    perceptual_upscale: int = option(1, "Enlarge crops this many times before LPIPS; 2 helps crops below 64 pixels.")
    adversarial_weight: float = option(0.8, "Weight of the adversarial loss: keeps pace with the decoder. 0: none.")
    adversarial_loss: str = option("hinge", "Form of the adversarial loss.", choices=ADVERSARIAL_LOSSES)
    adaptive_weight: bool = option(True, "Scale the adversarial gradient to the reconstruction gradient's size.")
    adaptive_weight_max: float = option(1e4, "Cap of that scale.")
    disc_start: int = option(0, "Step at which the discriminator starts to train.")
    disc_ramp_steps: int = option(0, "Steps over which the adversarial weight then grows from 0 to full.")
    disc_channels: int = option(64, "Channels of the discriminator's first layer.")
    disc_layers: int = option(3, "Stride-2 layers of the discriminator: patches of 16, 34, 70 pixels for 1, 2, 3.")

    # Codebook
    quantize_start: int = option(0, "Steps to train as a plain autoencoder before quantizing.")
    codebook_init: str = option("data", "Codebook at quantize_start: k-means of latents, or left as it is.",
                                choices=("data", "none"))  # fmt: skip
    dead_code_restart_steps: int = option(0, "Move codes unused for this many steps onto current latents. 0: never.")
    codebook_window: int = option(100, "Training steps over which perplexity and usage are counted.")

    # Optimisation
    train_batch_size: int = option(16, "Images per process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.")
    max_train_steps: int | None = option(None, "Optimizer steps. Default: what num_train_epochs gives.")
    num_train_epochs: int = option(1, "Passes over the data, if max_train_steps is not given.")
    learning_rate: float = option(1e-4, "Learning rate of encoder, quantizer and decoder.")
    disc_learning_rate: float | None = option(None, "Learning rate of the discriminator. Default: learning_rate.")
    lr_scheduler: str = option("constant", "Schedule of both rates, a name that diffusers' get_scheduler knows.")
    lr_warmup_steps: int = option(0, "Steps of linear warm-up.")
    adam_beta1: float = option(0.5, "Adam's β1, both networks.")
    adam_beta2: float = option(0.9, "Adam's β2, both networks.")
    adam_weight_decay: float = option(0.0, "AdamW's weight decay, both networks.")
    adam_epsilon: float = option(1e-8, "Adam's ε, both networks.")
    max_grad_norm: float = option(1.0, "Clip each network's gradient to this norm. 0: never.")
    mixed_precision: str = option("no", "Autocast.", choices=("no", "bf16", "fp16"))
    channels_last: bool = option(True, "Keep activations in channels_last memory format.")
    cpu_threads: int | None = option(None, "Threads per process on CPU. Default: the cores shared evenly.")
    seed: int = option(0, "Seed of everything random.")

    # Watching and keeping
    logging_steps: int = option(10, "Steps between lines of log.jsonl and tracker entries.")
    validation_steps: int = option(500, "Steps between validations.")
    validation_net: str = option("alex", "LPIPS network of the reported metric.", choices=tuple(NETWORKS))
    validation_pictures: int = option(4, "Validation images in reconstructions.png.")
    checkpointing_steps: int = option(500, "Steps between checkpoints; there is always one at the end.")
    checkpoints_total_limit: int | None = option(2, "Keep only the latest so many checkpoints.")
    report_to: str | None = option(None, "Tracker, as Accelerate names it: tensorboard, wandb, trackio, all.")

    def __post_init__(self):
        for name in ("resolution", "crops_per_image", "train_batch_size", "gradient_accumulation_steps",
                     "num_train_epochs", "logging_steps", "validation_steps", "checkpointing_steps",
                     "codebook_window", "perceptual_upscale", "disc_layers"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("l1_weight", "l2_weight", "perceptual_weight", "adversarial_weight", "learning_rate",
                     "disc_start", "disc_ramp_steps", "quantize_start", "dead_code_restart_steps",
                     "lr_warmup_steps", "max_grad_norm", "dataloader_num_workers"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for config_field in dataclasses.fields(self):
            choices = config_field.metadata.get("choices")
            if choices and getattr(self, config_field.name) not in choices:
                raise ValueError(f"{config_field.name}={getattr(self, config_field.name)!r} must be one of {choices}.")
        if not (self.l1_weight or self.l2_weight or self.perceptual_weight):
            raise ValueError("l1_weight, l2_weight and perceptual_weight are all 0: nothing says what to reconstruct.")
        if not 0 <= self.max_unreadable_share <= 1:
            raise ValueError(f"max_unreadable_share={self.max_unreadable_share} must be in [0, 1].")
        if self.max_train_steps is not None and self.max_train_steps < 1:
            raise ValueError(f"max_train_steps={self.max_train_steps} must be at least 1.")
        if not self.dataset_name:
            raise ValueError("dataset_name is empty: name a Hub dataset, a local folder, or package:NAME/FOLDER.")


@dataclass
class TrainState:
    """What a run consists of. `model` and `discriminator` are as Accelerate prepared them (DDP with many processes)."""

    config: VQGANTrainingConfig
    accelerator: Accelerator
    model: nn.Module
    discriminator: nn.Module | None
    perceptual: LPIPS | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    disc_optimizer: torch.optim.Optimizer | None
    disc_scheduler: torch.optim.lr_scheduler.LRScheduler | None
    health: CodebookHealth
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of training, over all interruptions
    unreadable: int = 0
    upscaled: int = 0

    @property
    def vqgan(self) -> VQGANModel:
        return self.accelerator.unwrap_model(self.model)

    @property
    def quantizing(self) -> bool:
        return self.step >= self.config.quantize_start

    @property
    def adversarial(self) -> bool:
        return self.discriminator is not None and self.step >= self.config.disc_start

    def image_loss_weights(self) -> dict[str, float]:
        config = self.config
        return {"l1": config.l1_weight, "l2": config.l2_weight, "perceptual": config.perceptual_weight}

    def quantizer_loss_weights(self) -> dict[str, float]:
        """The model's `NAME_weight` for each loss NAME of its quantizer; none before quantization starts."""
        model = self.vqgan
        return {name: getattr(model.config, f"{name}_weight") * self.quantizing for name in model.quantize.loss_names}

    def state_dict(self) -> dict:
        counters = {name: getattr(self, name) for name in ("step", "seconds", "unreadable", "upscaled")}
        return counters | {"health": self.health.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.health.load_state_dict(state.pop("health"))
        for name, value in state.items():
            setattr(self, name, value)


# ---------------------------------------------------------------------------------------------------------------------
# One step


@dataclass
class StepOutput:
    """
    Args:
        losses (`dict[str, float]`): Every term, unweighted, averaged over micro-batches and processes.
        indices (`Tensor`): Codes of this process's images, `(M*B, h, w)`.
        latents (`Tensor`): Latents of this process's images, detached, `(M*B, D, h, w)`.
        adaptive_weight (`float`): λ; 0 while the discriminator is off.
        grad_norm, disc_grad_norm (`float`): Norms before clipping.
    """

    losses: dict[str, float]
    indices: Tensor
    latents: Tensor
    adaptive_weight: float
    grad_norm: float
    disc_grad_norm: float


@dataclass
class ImageGradients:
    """What one micro-batch's image losses say about its reconstruction x̂ `(B, 3, H, W)`."""

    terms: dict[str, Tensor]
    reconstruction: Tensor  # ∂(Σ weight * term)/∂x̂ over L1, L2, perceptual
    adversarial: Tensor | None  # ∂L_adv/∂x̂, unweighted
    last_layer: Tensor | None  # (2, ...): the two gradients at the decoder's last weight


def training_step(state: TrainState, micro_batches: list[Tensor]) -> StepOutput:
    r"""
    One optimizer step of both networks on a list of micro-batches `(B, 3, H, W)` in [-1, 1].

    The gradient is that of the textbook's L_rec + λ w L_adv + L_quantizer with λ from eq. 7 of VQ-GAN
    (https://huggingface.co/papers/2012.09841), got with less work: the two image gradients g_rec and g_adv stop at x̂,
    which suffices for λ, and their sum then goes through the generator once, by the chain rule
    ∂L/∂θ = (g_rec + λ w g_adv) ∂x̂/∂θ. The textbook propagates LPIPS and the discriminator twice. λ is that of the
    whole batch, of all micro-batches and processes, so accumulation equals a large batch.

    Raises:
        FloatingPointError: before any weight changes, if a loss or gradient is not finite; it names the term.
    """
    config, accelerator, model = state.config, state.accelerator, state.model
    count = len(micro_batches)
    adversarial_factor = config.adversarial_weight * ramp(state.step, config.disc_start, config.disc_ramp_steps)

    # 1. Image losses of every micro-batch, back to the reconstruction. One micro-batch keeps its graph for 3; several
    #    run the generator again there, so that memory holds one at a time.
    passes: list[ImageGradients] = []
    rng_states = []
    for number, pixels in enumerate(micro_batches):
        rng_states.append(torch.get_rng_state())
        with _no_sync_unless(accelerator, number == count - 1, state.discriminator):
            output = generate(state, pixels)
            passes.append(image_gradients(state, output.sample, pixels, 1 / count))

    # 2. λ balances the two gradients at the decoder's last layer.
    balance = torch.ones((), device=accelerator.device)
    if state.adversarial and config.adaptive_weight:
        last_layer = accelerator.reduce(sum(images.last_layer for images in passes) / count, "mean")
        balance = adaptive_weight(*last_layer, config.adaptive_weight_max)

    # 3. One backward pass through decoder, quantizer and encoder: the product's gradient at x̂ is exactly `gradient`.
    latents, indices, terms = [], [], []
    for number, (pixels, images) in enumerate(zip(micro_batches, passes, strict=True)):
        with _no_sync_unless(accelerator, number == count - 1, model):
            if count > 1:
                with torch.random.fork_rng():  # a quantizer's noise has to be the same both times
                    torch.set_rng_state(rng_states[number])
                    output = generate(state, pixels)
            gradient = images.reconstruction
            if images.adversarial is not None:
                gradient = gradient + balance * adversarial_factor * images.adversarial
            loss = (output.sample * gradient).sum() + weighted_sum(output.losses, state.quantizer_loss_weights())
            accelerator.backward(loss / count)
        latents.append(output.latents.detach())
        indices.append(output.indices)
        terms.append(images.terms | {name: term.detach() for name, term in output.losses.items()})

    # 4. Both optimizers, unless something is not finite.
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
    disc_grad_norm = torch.zeros(())
    if state.adversarial:
        disc_grad_norm = accelerator.clip_grad_norm_(state.discriminator.parameters(), config.max_grad_norm or math.inf)
    losses = {name: torch.stack([micro[name] for micro in terms]).mean() for name in terms[0]}
    losses = dict(zip(losses, accelerator.reduce(torch.stack(list(losses.values())), "mean").tolist(), strict=True))
    norms = {"grad_norm": float(grad_norm), "disc_grad_norm": float(disc_grad_norm)}
    if broken := [name for name, value in (losses | norms).items() if not math.isfinite(value)]:
        raise FloatingPointError(f"step {state.step}: not finite: {', '.join(broken)} (losses: {losses}, {norms}).")
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.scheduler.step()
    if state.adversarial:
        state.disc_optimizer.step()
        state.disc_optimizer.zero_grad()
        state.disc_scheduler.step()
    applied = float(balance) if state.adversarial else 0.0
    state.step += 1
    return StepOutput(losses, torch.cat(indices), torch.cat(latents), applied, **norms)


def generate(state: TrainState, pixels: Tensor) -> VQGANOutput:
    return state.model(pixels, force_not_quantize=not state.quantizing)


def image_gradients(state: TrainState, sample: Tensor, pixels: Tensor, share: float) -> ImageGradients:
    """
    Gradients of the image losses at x̂ = `sample`; on the way, the discriminator's own gradients.

    The discriminator sees x̂ once: its logits serve the generator's loss, whose gradient is taken at x̂, and its own,
    whose gradient (times `share`) is left in its parameters.
    """
    config, accelerator = state.config, state.accelerator
    x_hat = sample.detach().requires_grad_()
    with accelerator.autocast():
        terms = reconstruction_losses(x_hat, pixels, state.perceptual)
    (reconstruction,) = torch.autograd.grad(weighted_sum(terms, state.image_loss_weights()), x_hat)
    terms = {name: term.detach() for name, term in terms.items()}
    if not state.adversarial:
        return ImageGradients(terms, reconstruction, None, None)

    fake_logits = state.discriminator(x_hat)
    terms["adversarial"] = adversarial_loss(fake_logits, config.adversarial_loss)
    (adversarial,) = torch.autograd.grad(terms["adversarial"], x_hat, retain_graph=True)
    last_layer = None
    if config.adaptive_weight:
        weight = state.vqgan.last_layer
        last_layer = torch.stack([last_layer_gradient(sample, weight, g) for g in (reconstruction, adversarial)])
    real_logits = state.discriminator(pixels)
    disc_terms = discriminator_losses(real_logits, fake_logits, config.adversarial_loss)
    accelerator.backward(weighted_sum(disc_terms, dict.fromkeys(disc_terms, 0.5)) * share)
    terms = {name: term.detach() for name, term in (terms | disc_terms).items()}
    return ImageGradients(terms, reconstruction, adversarial, last_layer)


def _no_sync_unless(accelerator: Accelerator, last: bool, model: nn.Module | None):
    """Processes exchange a network's gradients at the last micro-batch only."""
    return contextlib.nullcontext() if last or model is None else accelerator.no_sync(model)


# ---------------------------------------------------------------------------------------------------------------------
# Codebook upkeep: what a quantizer needs besides gradients


def initialize_codebook(state: TrainState, batches: Iterator[Tensor], vectors_per_code: int = 8) -> None:
    """Start the codebook from the latents of coming batches, of all processes; every process computes the same."""
    model, rows, have = state.vqgan, [], 0
    with torch.no_grad():
        for pixels in batches:
            latents = gather_rows(model.encode(pixels).latents.float())
            rows.append(latents.permute(0, 2, 3, 1).flatten(0, 2))
            have += len(rows[-1])
            if have >= vectors_per_code * model.quantize.num_codes:
                break
    generator = torch.Generator().manual_seed(state.config.seed)
    model.quantize.initialize_codebook(torch.cat(rows), generator)


def restart_dead_codes(state: TrainState, latents: Tensor) -> int:
    """
    Move codes that no image used for `dead_code_restart_steps` steps onto current latents; returns how many.

    The optimizer's memory of those rows goes too: it would drag the new codes along the old codes' way.
    """
    dead = state.health.age >= state.config.dead_code_restart_steps
    if not dead.any():
        return 0
    quantizer, device = state.vqgan.quantize, latents.device
    vectors = gather_rows(latents.float()).permute(0, 2, 3, 1).flatten(0, 2)
    generator = torch.Generator().manual_seed(state.config.seed * 1_000_003 + state.step)
    dead = quantizer.restart_codes(dead.to(device), vectors, generator)
    for parameter in quantizer.parameters():
        for memory in state.optimizer.state[parameter].values():
            if torch.is_tensor(memory) and memory.shape == parameter.shape:
                memory[dead] = 0
    state.health.age[dead.cpu()] = 0
    return int(dead.sum())


# ---------------------------------------------------------------------------------------------------------------------
# The run


def train(config: VQGANTrainingConfig, model_config: VQGANConfig, dry_run: bool = False) -> dict[str, float]:
    """
    Train a [`VQGANModel`] and leave in `config.output_dir`: the model in from_pretrained layout, metrics.json,
    reconstructions.png, curves.png, log.jsonl, training_config.yaml and checkpoint-N/.

    With `dry_run`, check everything (data, columns, sizes, weights, one forward pass), print the plan, write nothing.

    Returns:
        The final metrics, as in metrics.json (empty for a dry run).

    Raises:
        FileExistsError: if `output_dir` holds a different run.
        ValueError, FileNotFoundError: for settings or data that cannot work, before anything is written.
        FloatingPointError: if a loss or gradient stops being finite. Checkpoints stay as they were.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    share_cpu_threads(config, accelerator)
    set_seed(config.seed)
    with accelerator.main_process_first():  # one process fills the dataset cache, the others read it
        train_images, validation_images = load_image_datasets(
            config.dataset_name,
            dataset_config_name=config.dataset_config_name,
            train_split=config.train_split,
            validation_split=config.validation_split,
            train_files=config.train_files,
            validation_files=config.validation_files,
            image_column=config.image_column,
            max_train_samples=config.max_train_samples,
            max_validation_samples=config.max_validation_samples,
            cache_dir=config.cache_dir,
            revision=config.dataset_revision,
            seed=config.seed,
        )
    transform = ImageTransform(config.resolution, config.resize, config.center_crop, config.random_flip)
    if config.resolution % model_config.downsample_factor:
        raise ValueError(
            f"resolution={config.resolution} is not a multiple of {model_config.downsample_factor}, the downsampling "
            f"factor of {len(model_config.block_out_channels)} levels in block_out_channels."
        )
    dataset = TrainingImages(train_images, transform, config.seed, config.crops_per_image)
    validation = ValidationImages(
        validation_images, transform, config.validate_whole_images, model_config.downsample_factor
    )
    if not len(validation):
        raise ValueError(f"none of the {len(validation_images)} validation images can be read.")
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    if config.max_train_steps is None:
        config = dataclasses.replace(
            config, max_train_steps=max(1, config.num_train_epochs * len(dataset) // global_batch)
        )
    with accelerator.main_process_first():  # likewise for the LPIPS networks' weights
        given = config.perceptual_weights_path if config.validation_net == config.perceptual_net else None
        metric = LPIPS(config.validation_net, given)
        perceptual = None
        if config.perceptual_weight:
            perceptual = LPIPS(config.perceptual_net, config.perceptual_weights_path, config.perceptual_upscale)
    for network, flag in ((metric, "validation_net"), (perceptual, "perceptual_net")):
        if network is not None and config.resolution < network.min_side:
            raise ValueError(
                f"resolution={config.resolution} is too small for LPIPS with {flag}={network.net!r}, which needs "
                f"{network.min_side} pixels here. Raise --resolution, take `vgg`, or (in training) --perceptual_upscale."
            )
    state = build_state(config, model_config, accelerator, perceptual)
    metric.to(accelerator.device)

    if accelerator.is_main_process:
        print(describe_plan(state, dataset, validation, global_batch))
    if dry_run:
        with torch.no_grad():
            state.model(dataset[0]["pixel_values"][None].to(accelerator.device))
        return {}

    run = RunFolder(config, model_config, accelerator)
    if checkpoint := run.open():
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"Resuming from {checkpoint} at step {state.step}.")
    run.truncate_log(state.step)
    if config.report_to:
        accelerator.init_trackers("vqgan", config={k: str(v) for k, v in asdict(config).items()})

    def batches(start_step: int) -> DataLoader:
        """Micro-batches from optimizer step `start_step` to the end of the run."""
        per_step = config.gradient_accumulation_steps * accelerator.num_processes
        sampler = EpochBatchSampler(
            len(dataset),
            config.train_batch_size,
            num_batches=(config.max_train_steps - start_step) * per_step,
            seed=config.seed,
            start=start_step * per_step,
        )
        workers = config.dataloader_num_workers
        return accelerator.prepare_data_loader(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))

    progress = tqdm(
        total=config.max_train_steps, initial=state.step, desc="train", disable=not accelerator.is_main_process
    )
    loader = iter(batches(state.step))
    started = time.perf_counter() - state.seconds
    metrics: dict[str, float] = {}
    while state.step < config.max_train_steps:
        if state.step == config.quantize_start and config.codebook_init == "data":
            if hasattr(state.vqgan.quantize, "initialize_codebook"):
                initialize_codebook(state, (batch["pixel_values"] for batch in batches(state.step)))
        quantizing = state.quantizing
        micro_batches = [next(loader) for _ in range(config.gradient_accumulation_steps)]
        output = training_step(state, [channels_last(config, batch["pixel_values"]) for batch in micro_batches])
        state.seconds = time.perf_counter() - started
        count_bad_images(state, micro_batches, global_batch)

        restarted = 0
        if quantizing:
            state.health.update(output.indices)
            if config.dead_code_restart_steps:
                restarted = restart_dead_codes(state, output.latents)

        progress.update()
        last = state.step == config.max_train_steps
        if state.step % config.logging_steps == 0 or last:
            report = state.health.report()
            row = {
                "step": state.step,
                **output.losses,
                "adaptive_weight": output.adaptive_weight,
                "grad_norm": output.grad_norm,
                "disc_grad_norm": output.disc_grad_norm,
                "learning_rate": state.scheduler.get_last_lr()[0],
                "perplexity": report.perplexity,
                "usage": report.usage,
                "dead_codes": report.dead_codes,
                "top_code_share": report.top_code_share,
                "restarted_codes": restarted,
                "images_per_second": state.step * global_batch / state.seconds,
            }
            run.log(row)
            shown = ("l1", "perceptual", "adversarial", "perplexity", "usage")
            progress.set_postfix({name: f"{row[name]:.3g}" for name in shown if name in row})
        if (state.step % config.validation_steps == 0 and quantizing) or last:
            metrics = validate(state, validation, metric)
            run.log({"step": state.step} | {f"validation_{name}": value for name, value in metrics.items()})
            metrics = run.write_report(state, metrics, validation, len(dataset))
            progress.write(
                f"step {state.step}: validation PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}, "
                f"LPIPS ({config.validation_net}) {metrics['lpips']:.3f}; training perplexity "
                f"{metrics['perplexity']:.0f} of {state.health.num_codes}, usage {metrics['usage']:.1%}"
            )
        if state.step % config.checkpointing_steps == 0 or last:
            run.save_checkpoint(state)
    progress.close()
    if not metrics:
        accelerator.print(f"The run in {config.output_dir} is already complete ({state.step} steps).")
        metrics = json.loads((run.folder / "metrics.json").read_text())
    if config.report_to:
        accelerator.end_training()
    return metrics


def build_state(
    config: VQGANTrainingConfig, model_config: VQGANConfig, accelerator: Accelerator, perceptual: LPIPS | None
) -> TrainState:
    """Networks, optimizers and schedules, prepared by Accelerate and registered with its checkpoints."""

    def optimizer_and_schedule(network: nn.Module, learning_rate: float, steps: int):
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        # Not prepared: Accelerate would advance a prepared schedule once per process and step.
        schedule = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps
        )
        network, optimizer = accelerator.prepare(network, optimizer)
        accelerator.register_for_checkpointing(schedule)
        return network, optimizer, schedule

    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model = VQGANModel(model_config).train().to(memory_format=memory_format)
    model, optimizer, scheduler = optimizer_and_schedule(model, config.learning_rate, config.max_train_steps)
    discriminator = disc_optimizer = disc_scheduler = None
    if config.adversarial_weight and config.disc_start < config.max_train_steps:
        discriminator = PatchDiscriminator(model_config.out_channels, config.disc_channels, config.disc_layers)
        discriminator, disc_optimizer, disc_scheduler = optimizer_and_schedule(
            discriminator.to(memory_format=memory_format),
            config.learning_rate if config.disc_learning_rate is None else config.disc_learning_rate,
            config.max_train_steps - config.disc_start,
        )
    if perceptual is not None:
        perceptual = perceptual.to(accelerator.device, memory_format=memory_format)
    health = CodebookHealth(model_config.num_vq_embeddings, config.codebook_window)
    state = TrainState(
        config, accelerator, model, discriminator, perceptual, optimizer, scheduler, disc_optimizer, disc_scheduler, health
    )
    accelerator.register_for_checkpointing(state)
    return state


def channels_last(config: VQGANTrainingConfig, pixels: Tensor) -> Tensor:
    return pixels.contiguous(memory_format=torch.channels_last) if config.channels_last else pixels


def share_cpu_threads(config: VQGANTrainingConfig, accelerator: Accelerator) -> None:
    """`accelerate launch` gives a process one thread unless told otherwise; on CPU that wastes all other cores."""
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    elif accelerator.device.type == "cpu":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes))


def count_bad_images(state: TrainState, micro_batches: list[dict], global_batch: int) -> None:
    """Count unreadable and enlarged images over all processes.

    Raises:
        ValueError: once more than `max_unreadable_share` of at least 100 (or one batch of) images were unreadable.
    """
    config = state.config
    counts = sum(torch.stack([batch["unreadable"].sum(), batch["upscaled"].sum()]) for batch in micro_batches)
    unreadable, upscaled = state.accelerator.reduce(counts, "sum").tolist()
    if upscaled and not state.upscaled:
        logger.warning("Some images are smaller than resolution=%d and are enlarged.", config.resolution)
    state.unreadable += unreadable
    state.upscaled += upscaled
    seen = (state.step * global_batch) + state.unreadable
    if seen >= 100 and state.unreadable > config.max_unreadable_share * seen:
        raise ValueError(
            f"{state.unreadable} of {seen} training images could not be read, more than "
            f"max_unreadable_share={config.max_unreadable_share}. Repair the dataset, or raise the share."
        )


def describe_plan(state: TrainState, dataset: TrainingImages, validation: ValidationImages, global_batch: int) -> str:
    """The plan of a run, as printed before it starts and by --dry_run."""
    config, model = state.config, state.vqgan
    factor = model.config.downsample_factor
    side = config.resolution // factor
    bits = math.log2(model.config.num_vq_embeddings) / factor**2
    millions = {
        name: sum(p.numel() for p in network.parameters()) / 1e6
        for name, network in (("encoder", model.encoder), ("decoder", model.decoder), ("codebook", model.quantize))
    }
    if state.discriminator is not None:
        millions["discriminator"] = sum(p.numel() for p in state.discriminator.parameters()) / 1e6
    active = {name: weight for name, weight in state.image_loss_weights().items() if weight}
    if state.discriminator is not None:
        active[f"adversarial ({config.adversarial_loss}, from step {config.disc_start})"] = config.adversarial_weight
    seen = config.max_train_steps * global_batch
    lines = {
        "data": f"{config.dataset_name}: {len(dataset.images):,} training images, {len(validation)} for validation",
        "parameters": ", ".join(f"{name} {count:.2f} M" for name, count in millions.items()),
        "tokens": f"{config.resolution}x{config.resolution} pixels -> {side}x{side} codes of {model.config.num_vq_embeddings:,} "
        f"({model.config.quantizer}, f{factor}, {bits:.3f} bits per pixel)",
        "losses": ", ".join(f"{name} x {weight:g}" for name, weight in active.items()),
        "batch": f"{config.train_batch_size} x {config.gradient_accumulation_steps} accumulation x "
        f"{state.accelerator.num_processes} process(es) = {global_batch}",
        "steps": f"{config.max_train_steps:,} = {seen:,} crops = {seen / len(dataset):.1f} epochs",
        "device": f"{state.accelerator.device}, mixed precision {config.mixed_precision}",
        "output": config.output_dir,
    }
    return "\n".join(f"{name:>10}: {text}" for name, text in lines.items())


def validate(state: TrainState, validation: ValidationImages, metric: LPIPS) -> dict[str, float]:
    """Measure the model on the validation images, which the processes share among them."""
    accelerator = state.accelerator
    mine = range(accelerator.process_index, len(validation), accelerator.num_processes)
    images = (channels_last(state.config, validation[index][None]) for index in mine)
    return evaluate_reconstruction(state.vqgan, images, metric).as_dict()


class RunFolder:
    """The output folder: which run it holds, its log, reports and checkpoints. Files appear whole or not at all."""

    def __init__(self, config: VQGANTrainingConfig, model_config: VQGANConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.folder = Path(config.output_dir)
        not_identity = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "cpu_threads")
        identity = {name: value for name, value in asdict(config).items() if name not in not_identity}
        self.identity = identity | {name: getattr(model_config, name) for name in model_fields()}

    def open(self) -> Path | None:
        """
        Claim the folder for this run, and return the checkpoint to resume from, if any.

        Raises:
            FileExistsError: if the folder holds a run with other settings; it names them.
            FileNotFoundError: if `resume_from_checkpoint` names nothing.
        """
        config, main = self.config, self.accelerator.is_main_process
        if config.overwrite_output_dir and main and not config.resume_from_checkpoint:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        settings = self.folder / CONFIG_FILE
        if settings.is_file():
            there, here = yaml.safe_load(settings.read_text()), yaml.safe_load(self._identity_yaml())
            differing = [key for key in here.keys() | there.keys() if here.get(key) != there.get(key)]
            if differing and not config.resume_from_checkpoint:
                raise FileExistsError(
                    f"{self.folder} holds another run; it differs in: {', '.join(sorted(differing))}. Choose another "
                    "--output_dir, or replace that run with --overwrite_output_dir."
                )
        elif any(self.folder.glob("checkpoint-*")) or (self.folder / "config.json").exists():
            raise FileExistsError(
                f"{self.folder} holds a model or checkpoints, but no {CONFIG_FILE} that says of which run. Choose "
                "another --output_dir, or replace them with --overwrite_output_dir."
            )
        checkpoint = self._find_checkpoint()
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(settings, self._identity_yaml())
        self.accelerator.wait_for_everyone()
        return checkpoint

    def _identity_yaml(self) -> str:
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in self.identity.items()}
        return yaml.safe_dump(lists, sort_keys=False)

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def _find_checkpoint(self) -> Path | None:
        asked = self.config.resume_from_checkpoint
        if asked in (None, "latest"):
            checkpoints = self.checkpoints()
            if asked and not checkpoints:
                raise FileNotFoundError(f"--resume_from_checkpoint latest: no checkpoint-N in {self.folder}.")
            return checkpoints[-1] if checkpoints else None
        if not Path(asked).is_dir():
            raise FileNotFoundError(f"--resume_from_checkpoint {asked}: no such folder.")
        return Path(asked)

    def save_checkpoint(self, state: TrainState) -> None:
        """checkpoint-N, whole or not at all, and the model beside it; then drop checkpoints past the limit."""
        target = self.folder / f"checkpoint-{state.step}"
        temporary = self.folder / f".checkpoint-{state.step}.tmp"
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            self._save_model(state)
            limit = self.config.checkpoints_total_limit
            for old in self.checkpoints()[:-limit] if limit else []:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _save_model(self, state: TrainState) -> None:
        resolution = self.config.resolution
        processor = VQGANImageProcessor(
            size={"shortest_edge": resolution},
            crop_size={"height": resolution, "width": resolution},
            size_divisor=state.vqgan.config.downsample_factor,
        )
        temporary = self.folder / ".model.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        state.vqgan.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        for file in temporary.iterdir():
            file.replace(self.folder / file.name)
        temporary.rmdir()

    def log(self, row: dict[str, float]) -> None:
        """Append to log.jsonl and to the trackers."""
        if self.accelerator.is_main_process:
            with open(self.folder / LOG_FILE, "a") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def read_log(self) -> list[dict[str, float]]:
        file = self.folder / LOG_FILE
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def truncate_log(self, step: int) -> None:
        """Forget what an interrupted run logged after the checkpoint that is now resumed."""
        if self.accelerator.is_main_process:
            rows = [row for row in self.read_log() if row["step"] <= step]
            write_text(self.folder / LOG_FILE, "".join(json.dumps(row) + "\n" for row in rows))

    def write_report(self, state: TrainState, validation_metrics: dict, validation, train_size: int) -> dict[str, float]:
        """metrics.json, reconstructions.png and curves.png; returns what metrics.json says."""
        config, report = state.config, state.health.report()
        size = "whole images" if config.validate_whole_images else f"central {config.resolution}-pixel squares"
        metrics = {name: value for name, value in validation_metrics.items() if name not in ("perplexity", "usage")}
        metrics |= {
            "perplexity": report.perplexity,
            "usage": report.usage,
            "validation_perplexity": validation_metrics["perplexity"],
            "validation_usage": validation_metrics["usage"],
            "num_codes": state.health.num_codes,
            "steps": state.step,
            "seconds": round(state.seconds, 1),
            "unreadable_images": state.unreadable,
            "upscaled_images": state.upscaled,
            "measured_on": {
                "psnr, ssim, lpips, l1, validation_*": f"{len(validation)} validation images of {config.dataset_name} "
                f"({size}), pixels clamped and mapped to [0, 1], mean over images; LPIPS v0.1 {config.validation_net}",
                "perplexity, usage": f"codes of the training crops of the last {report.window_steps} steps "
                f"({report.positions:,} positions); usage is the share of codes hit at least once",
                "seconds": "training loop with validation, without set-up",
            },
        }
        if self.accelerator.is_main_process:
            write_text(self.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
            pictures = min(config.validation_pictures, len(validation))
            save_image(draw_reconstructions(state.vqgan, [validation[i] for i in range(pictures)]),
                       self.folder / "reconstructions.png")  # fmt: skip
            save_image(draw_curves(self.read_log(), state.health.num_codes), self.folder / "curves.png")
        return metrics


def write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    temporary.replace(file)


def save_image(image, file: Path) -> None:
    temporary = file.with_name(f".{file.name}")
    image.save(temporary)
    temporary.replace(file)
