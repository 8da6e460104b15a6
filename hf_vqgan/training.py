"""Training a VQ-GAN: the state of a run, one step, and the loop around it."""

import contextlib
import copy
import dataclasses
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .configuration_training import VQGANTrainingConfig
from .configuration_vqgan import VQGANConfig
from .data import EpochBatchSampler, ImageTransform, TrainingImages, ValidationImages, load_image_datasets
from .discriminators import PatchDiscriminator
from .hub import push_run_to_hub
from .losses import (
    LPIPS,
    adaptive_weight,
    adversarial_loss,
    discriminator_losses,
    last_layer_gradient,
    ramp,
    reconstruction_losses,
    weighted_sum,
)
from .metrics import CodebookHealth, LatentStatistics, evaluate_reconstruction, gather_rows, measure_latents
from .modeling_vqgan import VQGANModel, VQGANOutput
from .pictures import draw_codebook, draw_curves, draw_reconstructions
from .run_folder import RunFolder, public_settings

logger = logging.getLogger(__name__)


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
    warned_of_collapse: bool = False
    latents: LatentStatistics | None = None  # measured when training is over

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
        config, model = self.config, self.vqgan
        weights = {
            name: getattr(model.config, f"{name}_weight") * self.quantizing for name in model.quantize.loss_names
        }
        if "entropy" in weights:
            remaining = 1 - ramp(self.step, config.quantize_start, config.entropy_anneal_steps)
            weights["entropy"] *= 1 + (config.entropy_anneal_factor - 1) * remaining
        return weights

    def state_dict(self) -> dict:
        counters = {
            name: getattr(self, name) for name in ("step", "seconds", "unreadable", "upscaled", "warned_of_collapse")
        }
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
        indices (`Tensor`): Codes of this process's images, `(M*B, h, w)` or `(M*B, h, w, n)`.
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
        reconstruction, adversarial = accelerator.reduce(sum(images.last_layer for images in passes) / count, "mean")
        balance = adaptive_weight(reconstruction, adversarial, config.adaptive_weight_max)

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


def flat_vectors(latents: Tensor) -> Tensor:
    """`(B, D, h, w)` to `(B*h*w, D)`, float32."""
    return latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2)


def initialize_codebook(state: TrainState, batches: Iterator[dict], vectors_per_code: int = 8) -> None:
    """Start the codes from the latents of coming batches, of all processes; the main process's result is everyone's."""
    quantizer, rows, have = state.vqgan.quantize, [], 0
    if not quantizer.codebook_parameters():
        return
    with torch.no_grad():
        for number, batch in enumerate(batches, start=1):
            rows.append(gather_rows(flat_vectors(state.vqgan.encode(batch["pixel_values"]).latents)))
            have += len(rows[-1])
            whole_steps = number % state.config.gradient_accumulation_steps == 0
            if whole_steps and have >= vectors_per_code * quantizer.num_codes:
                break
    quantizer.initialize_codebook(torch.cat(rows), torch.Generator().manual_seed(state.config.seed))
    broadcast(quantizer)


def update_codebook(state: TrainState, output: StepOutput) -> int:
    """
    What a step does to the codes besides gradients: moving averages, and the restart of dead codes on current latents.

    The optimizer's memory of restarted codes goes too: it would drag the new codes along the old codes' way.

    Returns:
        How many codes were restarted.
    """
    config, quantizer = state.config, state.vqgan.quantize
    indices = output.indices.flatten(0, 2)
    statistics = quantizer.codebook_statistics(flat_vectors(output.latents), indices)
    if statistics is not None:
        quantizer.update_codebook(state.accelerator.reduce(statistics, "sum"))

    state.health.update(output.indices)
    dead = state.health.age >= config.dead_code_restart_steps
    parameters = quantizer.codebook_parameters()
    if not (config.dead_code_restart_steps and parameters and dead.any()):
        return 0
    # (processes, micro-batches, ...) to the order in which one process would have seen them
    vectors = flat_vectors(output.latents).unflatten(0, (1, config.gradient_accumulation_steps, -1))
    vectors = gather_rows(vectors).transpose(0, 1).flatten(0, 2)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state.step)
    restarted = quantizer.restart_codes(dead.to(vectors.device), vectors, generator)
    broadcast(quantizer)
    for parameter, rows in zip(parameters, restarted.view(len(parameters), -1), strict=True):
        for memory in state.optimizer.state[parameter].values():
            if torch.is_tensor(memory) and memory.shape == parameter.shape:
                memory[rows] = 0
    state.health.age[restarted.cpu()] = 0
    return int(restarted.sum())


class CodebookCollapse(RuntimeError):
    """The codebook has collapsed, and the run was told to stop then."""


def watch_codebook(state: TrainState) -> None:
    """
    Warn once of a codebook that collapses, naming the remedies.

    Raises:
        CodebookCollapse: instead, if the run was told to `stop_on_collapse`.
    """
    problem = state.health.diagnosis()
    if problem and state.config.stop_on_collapse:
        raise CodebookCollapse(f"step {state.step}: {problem}")
    if problem and not state.warned_of_collapse:
        state.warned_of_collapse = True
        if state.accelerator.is_main_process:
            logger.warning("%s", problem)


def broadcast(module: nn.Module) -> None:
    """The main process's weights and buffers to all: sums in another order must not let codebooks drift apart."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in module.state_dict().values():
            torch.distributed.broadcast(tensor, 0)


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
        CodebookCollapse: if the codebook collapses and `stop_on_collapse` is set.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    share_cpu_threads(config, accelerator)
    set_seed(config.seed)
    dataset, validation = load_images(config, model_config, accelerator)
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    if config.max_train_steps is None:
        steps = max(1, config.num_train_epochs * len(dataset) // global_batch)
        config = dataclasses.replace(config, max_train_steps=steps)
    perceptual, metric = load_lpips(config, accelerator)
    state = build_state(config, model_config, accelerator, perceptual)

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
    if state.step >= config.max_train_steps:
        accelerator.print(f"The run in {config.output_dir} is already complete ({state.step} steps).")
        return run.read_metrics()
    if config.report_to:
        accelerator.init_trackers("vqgan", config={k: str(v) for k, v in public_settings(config).items()})

    progress = tqdm(
        total=config.max_train_steps, initial=state.step, desc="train", disable=not accelerator.is_main_process
    )
    loader = micro_batch_loader(state, dataset)
    started = time.perf_counter() - state.seconds
    while state.step < config.max_train_steps:
        if state.step == config.quantize_start and config.codebook_init == "data":
            initialize_codebook(state, micro_batch_loader(state, dataset))
        quantizing = state.quantizing
        micro_batches = [next(loader) for _ in range(config.gradient_accumulation_steps)]
        output = training_step(state, [batch["pixel_values"] for batch in micro_batches])
        restarted = update_codebook(state, output) if quantizing else 0
        state.seconds = time.perf_counter() - started
        count_bad_images(state, micro_batches, global_batch)
        progress.update()

        last = state.step == config.max_train_steps
        if state.step % config.logging_steps == 0 or last:
            row = log_row(state, output, restarted, global_batch)
            run.log(row)
            watch_codebook(state)
            shown = ("l1", "perceptual", "adversarial", "perplexity", "usage", "images_per_second")
            progress.set_postfix({name: f"{row[name]:.3g}" for name in shown if name in row})
        if last and config.latent_statistics_images:
            measure_scale(state, dataset)
        if (state.step % config.validation_steps == 0 and quantizing) or last:
            metrics = validate(state, validation, metric, run)
            progress.write(
                f"step {state.step}: validation PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}, "
                f"LPIPS ({config.validation_net}) {metrics['lpips']:.3f}; training perplexity "
                f"{metrics['perplexity']:.0f} of {state.health.num_codes}, usage {metrics['usage']:.1%}"
            )
        if state.step % config.checkpointing_steps == 0 or last:
            run.save_checkpoint(state.vqgan, state.step)
            push(state, run)
    progress.close()
    if state.unreadable or state.upscaled:
        accelerator.print(f"Over all epochs: {state.unreadable} unreadable images skipped, {state.upscaled} enlarged.")
    if config.report_to:
        accelerator.end_training()
    return metrics


def push(state: TrainState, run: RunFolder) -> None:
    """Push the run to the Hub, if it is to be pushed and has been validated at least once."""
    config = state.config
    if config.push_to_hub and state.accelerator.is_main_process and run.has_metrics:
        push_run_to_hub(
            run.folder,
            config.hub_model_id or run.folder.name,
            token=config.hub_token,
            private=config.hub_private_repo,
            license=config.hub_license,
            commit_message=f"Step {state.step} of {config.max_train_steps}",
        )


def load_images(
    config: VQGANTrainingConfig, model_config: VQGANConfig, accelerator: Accelerator
) -> tuple[TrainingImages, ValidationImages]:
    """The training and validation images that the configuration names, checked against the model's factor."""
    factor = model_config.downsample_factor
    if config.resolution % factor:
        raise ValueError(
            f"resolution={config.resolution} is not a multiple of {factor}, the downsampling factor of "
            f"{len(model_config.block_out_channels)} levels in block_out_channels."
        )
    transform = ImageTransform(config.resolution, config.resize, config.center_crop, config.random_flip)
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
    validation = ValidationImages(validation_images, transform, config.validate_whole_images, factor)
    if not len(validation):
        raise ValueError(f"none of the {len(validation_images)} validation images can be read.")
    return TrainingImages(train_images, transform, config.seed, config.crops_per_image), validation


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
    return perceptual, metric


def micro_batch_loader(state: TrainState, dataset: TrainingImages) -> Iterator[dict[str, Tensor]]:
    """This process's micro-batches from the current step to the end of the run, on its device."""
    config, accelerator = state.config, state.accelerator
    per_step = config.gradient_accumulation_steps * accelerator.num_processes
    sampler = EpochBatchSampler(
        len(dataset),
        config.train_batch_size,
        num_batches=(config.max_train_steps - state.step) * per_step,
        seed=config.seed,
        start=state.step * per_step,
    )
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=config.dataloader_num_workers)
    for batch in accelerator.prepare_data_loader(loader):
        yield batch | {"pixel_values": batch["pixel_values"].contiguous(memory_format=memory_format(config))}


def log_row(state: TrainState, output: StepOutput, restarted: int, global_batch: int) -> dict[str, float]:
    """One line of log.jsonl: every loss, unweighted, and how the run is doing."""
    report = state.health.report()
    return {
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

    # A copy: the scaling factor measured at the end must not change the settings by which the run is recognised.
    model_config = copy.deepcopy(model_config)
    if config.init_from is None:
        model = VQGANModel(model_config)
    else:
        model = VQGANModel.from_pretrained(config.init_from, config=model_config, dtype=torch.float32)
    model = model.train().to(memory_format=memory_format(config))
    model, optimizer, scheduler = optimizer_and_schedule(model, config.learning_rate, config.max_train_steps)
    discriminator = disc_optimizer = disc_scheduler = None
    if config.adversarial_weight and config.disc_start < config.max_train_steps:
        discriminator = PatchDiscriminator(model_config.out_channels, config.disc_channels, config.disc_layers)
        discriminator, disc_optimizer, disc_scheduler = optimizer_and_schedule(
            discriminator.to(memory_format=memory_format(config)),
            config.learning_rate if config.disc_learning_rate is None else config.disc_learning_rate,
            config.max_train_steps - config.disc_start,
        )
    health = CodebookHealth(model_config.num_vq_embeddings, model_config.num_codebooks, config.codebook_window)
    state = TrainState(
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
    )
    accelerator.register_for_checkpointing(state)
    return state


def measure_scale(state: TrainState, dataset: TrainingImages, batch_size: int = 16) -> None:
    """Set the model's `scaling_factor` and `shift_factor` to what gives latents of training crops unit variance."""
    count, config = state.config.latent_statistics_images, state.vqgan.config
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    batches = list(EpochBatchSampler(len(dataset), batch_size, num_batches=len(sizes), seed=state.config.seed))

    def load(number: int) -> Tensor:
        crops = [dataset[item]["pixel_values"] for item in batches[number][: sizes[number]]]
        return torch.stack(crops).contiguous(memory_format=memory_format(state.config))

    state.latents = measure_latents(state.vqgan, load, len(sizes))
    config.scaling_factor, config.shift_factor = 1 / state.latents.std, state.latents.mean


def memory_format(config: VQGANTrainingConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


def share_cpu_threads(config, accelerator: Accelerator) -> None:
    """Use `config.cpu_threads`; by default all cores, since `accelerate launch` gives each process one thread."""
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
    bits = model.config.num_codebooks * math.log2(model.config.num_vq_embeddings) / factor**2
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
        "tokens": f"{config.resolution}x{config.resolution} pixels -> {side}x{side} codes of "
        f"{model.config.num_vq_embeddings:,} ({model.config.quantizer}, f{factor}, {bits:.3f} bits per pixel)",
        "losses": ", ".join(f"{name} x {weight:g}" for name, weight in active.items()),
        "batch": f"{config.train_batch_size} x {config.gradient_accumulation_steps} accumulation x "
        f"{state.accelerator.num_processes} process(es) = {global_batch}",
        "steps": f"{config.max_train_steps:,} = {seen:,} crops = {seen / len(dataset):.1f} epochs",
        "device": f"{state.accelerator.device}, mixed precision {config.mixed_precision}",
        "output": config.output_dir,
    }
    return "\n".join(f"{name:>10}: {text}" for name, text in lines.items())


def validate(state: TrainState, validation: ValidationImages, metric: LPIPS, run: RunFolder) -> dict[str, float]:
    """
    Measure the model on the validation images, which the processes share among them; write metrics.json,
    reconstructions.png and curves.png.

    Returns:
        What metrics.json says.
    """
    config, accelerator = state.config, state.accelerator
    mine = range(accelerator.process_index, len(validation), accelerator.num_processes)
    images = (validation[index][None].contiguous(memory_format=memory_format(config)) for index in mine)
    found = evaluate_reconstruction(state.vqgan, images, metric).as_dict()
    run.log({"step": state.step} | {f"validation_{name}": value for name, value in found.items()})

    report = state.health.report()
    size = "whole images" if config.validate_whole_images else f"central {config.resolution}-pixel squares"
    of_codes = ("perplexity", "usage")
    metrics = {name: value for name, value in found.items() if name not in of_codes}
    metrics |= {name: getattr(report, name) for name in of_codes}
    metrics |= {f"validation_{name}": found[name] for name in of_codes}
    metrics |= {
        "num_codes": state.health.num_codes,
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "unreadable_images": state.unreadable,
        "upscaled_images": state.upscaled,
        "measured_on": {
            "psnr, ssim, lpips, l1, validation_*": f"{len(validation)} validation image(s) of {config.dataset_name} "
            f"({size}), pixels clamped and mapped to [0, 1], mean over images; LPIPS v0.1 {config.validation_net}",
            "perplexity, usage": f"codes of the training crops of the last {report.window_steps} steps "
            f"({report.positions:,} positions); usage is the share of codes hit at least once",
            "seconds": "training loop with validation, without set-up",
        },
    }
    if state.latents is not None:
        metrics |= {name: getattr(state.vqgan.config, name) for name in ("scaling_factor", "shift_factor")}
        metrics["measured_on"]["scaling_factor, shift_factor"] = (
            f"continuous latents of {state.latents.num_images} training crops: 1 / standard deviation, mean"
        )
    run.write_metrics(metrics)
    if accelerator.is_main_process:
        shown = [validation[index] for index in range(min(config.validation_pictures, len(validation)))]
        run.save_picture("reconstructions.png", draw_reconstructions(state.vqgan, shown))
        run.save_picture("curves.png", draw_curves(run.read_log(), state.health.num_codes))
        run.save_picture("codebook.png", draw_codebook(state.vqgan, state.health.counts, run.read_log()))
    return metrics
