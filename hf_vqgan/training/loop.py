"""A training run: set-up, the loop around the step, validation, and what ends a run early."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import logging
import math
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import gather_object, send_to_device, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..configuration_vqgan import VQGANConfig
from ..data.datasets import (
    ImageTransform,
    MixedImages,
    TrainingImages,
    ValidationImages,
    WaitClock,
    available_cores,
    default_num_workers,
    load_batches,
    load_image_datasets,
    load_train_images,
    map_style_images,
    notices,
)
from ..data.streams import StreamedImages, load_image_stream
from ..files.sources import check_source
from ..hub.model_card import public_name
from ..hub.push import push_run_to_hub
from ..losses.discriminators import DINODiscriminator, PatchDiscriminator, StyleGANDiscriminator
from ..losses.image_losses import LPIPS
from ..losses.regularizers import FeatureAlignment
from ..measurement.metrics import CodebookHealth, evaluate_reconstruction, measure_latents
from ..measurement.pictures import draw_codebook, draw_curves, draw_gradients, draw_reconstructions
from ..modeling_vqgan import VQGANModel
from .checkpoint import LossScale, NamedAverages, NamedOptimizer, Part
from .configuration import VQGANTrainingConfig
from .gradient_flow import measure_gradients
from .run_folder import RunFolder, public_settings
from .step import StepOutput, TrainState, initialize_codebook, training_step, update_codebook

logger = logging.getLogger(__name__)

Batches = Generator[dict[str, Any], None, None]

NAMED_IMAGES = 10  # of the unreadable ones, how many are named; all are counted

# ---------------------------------------------------------------------------------------------------------------------
# What ends a run early

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT  # what shells report of a program that Ctrl-C has ended


class Preempted(RuntimeError):
    """
    The run was asked to stop. It has saved a checkpoint; the same command goes on from there.

    Args:
        exit_code (`int`): What a program that ends with this should return.
    """

    def __init__(self, message: str, exit_code: int = PREEMPTED_EXIT_CODE):
        super().__init__(message)
        self.exit_code = exit_code


class CodebookCollapse(RuntimeError):
    """The codebook has collapsed, and the run was told to stop then."""


class PreemptionNotice(contextlib.AbstractContextManager):
    """
    Takes as a request to save and stop: SIGTERM and SIGUSR1, with which clusters announce that they will end a job, and
    Ctrl-C. A second Ctrl-C stops at once.

    Args:
        accelerator (`Accelerator`): A notice to one process is one to all.
    """

    SAME_KEY = 1.0  # seconds: terminals and launchers may both pass one Ctrl-C on

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.name: str | None = None  # of the first signal that this process got
        self.interrupted: float | None = None  # when Ctrl-C was pressed
        self.previous: dict = {}

    def __enter__(self) -> "PreemptionNotice":
        if threading.current_thread() is threading.main_thread():  # Python lets only that one handle signals
            self.previous = {number: signal.signal(number, self._note) for number in notices()}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.name = self.name or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self.interrupted is not None and now - self.interrupted > self.SAME_KEY:
            raise KeyboardInterrupt
        if self.interrupted is None and self.accelerator.is_main_process:
            # Not by print, which may be what the signal has interrupted
            os.write(2, b"\nCtrl-C: saving after this step. Once more stops at once, without saving.\n")
        self.interrupted = self.interrupted or now

    @property
    def exit_code(self) -> int:
        return INTERRUPTED_EXIT_CODE if self.interrupted is not None else PREEMPTED_EXIT_CODE

    @property
    def received(self) -> bool:
        """Whether any process has had notice; to be asked by all of them at the same point."""
        if self.accelerator.num_processes == 1:
            return self.name is not None
        mine = torch.tensor(int(self.name is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(mine, "sum"))


def watch_health(state: TrainState) -> None:
    """
    Warn once of a codebook that collapses, and once of a discriminator that wins or dies, naming the remedies.

    Raises:
        CodebookCollapse: instead, if the run was told to `stop_on_collapse`.
    """
    codebook, discriminator = state.health.diagnosis(), state.disc_health.diagnosis()
    if codebook and state.config.stop_on_collapse:
        raise CodebookCollapse(f"step {state.step}: {codebook}")
    main = state.accelerator.is_main_process
    if codebook and not state.warned_of_codebook and main:
        logger.warning("%s", codebook)
    if discriminator and not state.warned_of_discriminator and main:
        logger.warning("%s", discriminator)
    state.warned_of_codebook |= codebook is not None
    state.warned_of_discriminator |= discriminator is not None


def watch_nonfinite(state: TrainState, output: StepOutput) -> None:
    """
    Count a skipped step.

    Raises:
        FloatingPointError: after `max_nonfinite_steps` of them in a row, with the terms that were not finite.
    """
    if not output.nonfinite:
        state.nonfinite_in_a_row = 0
        return
    state.nonfinite_steps += 1
    state.nonfinite_in_a_row += 1
    terms = ", ".join(output.nonfinite)
    if state.accelerator.is_main_process:
        logger.warning("step %d skipped: not finite: %s.", state.step, terms)
    if state.nonfinite_in_a_row >= state.config.max_nonfinite_steps:
        raise FloatingPointError(
            f"step {state.step}: {state.nonfinite_in_a_row} steps in a row (max_nonfinite_steps) were not finite in: "
            f"{terms}. Losses: {output.losses}. Lower the learning rate, or resume with mixed_precision bf16 or no."
        )


# ---------------------------------------------------------------------------------------------------------------------
# The run


def train(config: VQGANTrainingConfig, model_config: VQGANConfig, dry_run: bool = False) -> dict[str, float]:
    """
    Train a [`VQGANModel`] and leave in `config.output_dir`: the model in from_pretrained layout, metrics.json,
    reconstructions.png, curves.png, log.jsonl, training_config.yaml and checkpoint-N/.

    With `dry_run`, print the plan, check everything (data, columns, sizes, weights, a few steps of all networks, the
    folder), say how long the run will take, and leave nothing behind.

    Returns:
        The final metrics, as in metrics.json (empty for a dry run).

    Raises:
        FileExistsError: if `output_dir` holds a different run.
        ValueError, FileNotFoundError: for settings or data that cannot work, before anything is written.
        FloatingPointError: after `max_nonfinite_steps` steps in a row with a loss or gradient that is not finite.
        CodebookCollapse: if the codebook collapses and `stop_on_collapse` is set.
        Preempted: after SIGTERM, SIGUSR1 or Ctrl-C, once a checkpoint is saved.
        KeyboardInterrupt: after a second Ctrl-C, at once.
        OSError: if a checkpoint cannot be written. Earlier ones stay as they were, here and in all cases above.
    """
    check_model(config, model_config)
    accelerator = build_accelerator(config)
    set_seed(config.seed)
    dataset, validation = load_images(config, model_config, accelerator)
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    if config.max_train_steps is None:
        steps = max(1, config.num_train_epochs * len(dataset) // global_batch)
        config = dataclasses.replace(config, max_train_steps=steps)
    perceptual, metric = load_lpips(config, accelerator)
    state = build_state(config, model_config, accelerator, perceptual)

    accelerator.print(describe_plan(state, dataset, validation, global_batch))
    if accelerator.is_main_process and (idle := config.never_reached()):
        logger.warning(
            "in %d steps these settings have no effect, or not all of it: %s. Raise --max_train_steps, or lower them.",
            config.max_train_steps,
            "; ".join(idle),
        )
    if dry_run:
        accelerator.print(rehearse(state, dataset, validation, metric))
        return {}

    with RunFolder(config, model_config, accelerator) as run:
        resume(state, run, dataset)
        if state.step >= config.max_train_steps:
            accelerator.print(f"The run in {config.output_dir} is already complete ({state.step} steps).")
            return run.read_metrics()
        if config.report_to:
            settings = {name: str(value) for name, value in public_settings(config).items()}
            accelerator.init_trackers("vqgan", settings, init_kwargs={"wandb": {"dir": config.output_dir}})
        # Closed at once, whatever happens: workers that outlive the notice also outlive the program, which waits for
        # them.
        loader = micro_batch_loader(state, dataset)
        with PreemptionNotice(accelerator) as notice, contextlib.closing(loader):
            metrics = run_steps(state, run, dataset, WaitClock(loader), validation, metric, notice)
        if state.unreadable or state.upscaled:
            accelerator.print(describe_bad_images(state))
        if config.report_to:
            accelerator.end_training()
        return metrics


def check_model(config: VQGANTrainingConfig, model_config: VQGANConfig) -> None:
    """
    Before anything is loaded, find out about a model that cannot be trained.

    Raises:
        ValueError: if it has no decoder, or does not fit the images.
        FileNotFoundError, ConnectionError: if `init_from` cannot be had.
    """
    if config.init_from is not None:
        check_source(config.init_from)
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


def build_accelerator(config: VQGANTrainingConfig) -> Accelerator:
    """
    Raises:
        ValueError: for a launch that shards or splits the networks; the step needs each of them whole.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_distributed_type(accelerator.distributed_type)
    share_cpu_threads(config, accelerator)
    return accelerator


def check_distributed_type(kind: DistributedType) -> None:
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ValueError(
            f"this launch uses {kind.value}, which splits up networks or optimizers. A VQ-GAN is small, and its step "
            "takes gradients at single layers: launch with DDP (`accelerate launch --multi_gpu`), and save memory with "
            "--gradient_checkpointing, --mixed_precision bf16 and --gradient_accumulation_steps."
        )


def resume(state: TrainState, run: RunFolder, dataset: TrainingImages | MixedImages | StreamedImages) -> None:
    """Claim the run's folder and load the latest checkpoint, if there is one."""
    if checkpoint := run.open():
        run.load_checkpoint(checkpoint, checkpoint_parts(state, dataset))
        state.accelerator.print(f"Resuming from {checkpoint} at step {state.step}.")
    run.truncate_log(state.step)


def checkpoint_parts(state: TrainState, dataset: TrainingImages | MixedImages | StreamedImages) -> dict[str, Part]:
    """What a checkpoint holds, by name, but for the random states."""
    networks = {"model": state.model, "alignment": state.alignment, "discriminator": state.discriminator}
    networks = {
        name: state.accelerator.unwrap_model(network) for name, network in networks.items() if network is not None
    }
    parts: dict[str, Part] = networks | {
        "optimizer": NamedOptimizer(state.optimizer, **networks),
        "scheduler": state.scheduler,
    }
    if state.discriminator is not None:
        parts["disc_optimizer"] = NamedOptimizer(state.disc_optimizer, **networks)
        parts["disc_scheduler"] = state.disc_scheduler
    if state.ema is not None:
        parts["averages"] = NamedAverages(state.ema, state.vqgan)
    parts["progress"] = state
    if isinstance(dataset, StreamedImages):
        parts["data"] = dataset
    return parts | {"loss_scale": LossScale(state.accelerator)}


def run_steps(
    state: TrainState,
    run: RunFolder,
    dataset: TrainingImages | MixedImages | StreamedImages,
    loader: WaitClock,
    validation: ValidationImages,
    metric: LPIPS,
    notice: PreemptionNotice,
) -> dict[str, float]:
    """The steps from `state.step` to the last; returns the final metrics."""
    config, accelerator = state.config, state.accelerator
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    progress = tqdm(
        total=config.max_train_steps, initial=state.step, desc="train", disable=not accelerator.is_main_process
    )
    started = time.perf_counter() - state.seconds
    while state.step < config.max_train_steps:
        if state.step == config.quantize_start and config.codebook_init == "data" and not config.decoder_only:
            with contextlib.closing(micro_batch_loader(state, dataset)) as coming:
                initialize_codebook(state, coming)
        quantizing = state.quantizing
        phase = "train" if quantizing else f"autoencoder until step {config.quantize_start}"
        progress.set_description(phase, refresh=False)
        micro_batches = [next(loader) for _ in range(config.gradient_accumulation_steps)]
        if config.gradient_report_steps and (state.step + 1) % config.gradient_report_steps == 0:
            report = measure_gradients(state, micro_batches[0]["pixel_values"])
            run.log({"step": state.step + 1} | report)  # of the coming step: a resumed run measures it again
        output = training_step(state, [batch["pixel_values"] for batch in micro_batches])
        restarted = 0
        if not output.nonfinite:
            restarted = update_codebook(state, output) if quantizing else 0
            state.disc_health.update(output.watched)
            if state.ema is not None:
                state.ema.step(state.vqgan.parameters())
        state.seconds = time.perf_counter() - started
        watch_nonfinite(state, output)
        count_bad_images(state, micro_batches, global_batch)
        progress.update()

        last = state.step == config.max_train_steps
        if state.step % config.logging_steps == 0 or last:
            row = log_row(state, output, restarted, global_batch) | {"data_wait": loader.share()}
            run.log(row)
            watch_health(state)
            shown = ("l1", "perceptual", "adversarial", "perplexity", "usage", "images_per_second", "data_wait")
            progress.set_postfix({name: f"{row[name]:.3g}" for name in shown if name in row})
        if last and config.latent_statistics_images:
            with state.averaged_weights():
                measure_scale(state, dataset)
        if (state.step % config.validation_steps == 0 and quantizing) or last:
            with state.averaged_weights():
                metrics = validate(state, validation, metric, run)
            progress.write(
                f"step {state.step}: validation PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}, "
                f"LPIPS ({config.validation_net}) {metrics['lpips']:.3f}; training perplexity "
                f"{metrics['perplexity']:.0f} of {state.health.num_codes}, usage {metrics['usage']:.1%}"
            )
        preempted = notice.received and not last
        if state.step % config.checkpointing_steps == 0 or last or preempted:
            parts = checkpoint_parts(state, dataset)
            run.save_checkpoint(state.vqgan, state.step, parts, state.averaged_weights())
        if preempted:
            by = notice.name or "notice to another process"
            progress.close()
            raise Preempted(f"stopped by {by}: saved step {state.step}.", notice.exit_code)
        if state.step % config.checkpointing_steps == 0 or last:
            push(state, run)
    progress.close()
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
) -> tuple[TrainingImages | MixedImages | StreamedImages, ValidationImages]:
    """The training and validation images that the configuration names, checked against the model's factor."""
    transform = ImageTransform(config.resolution, config.resize, config.center_crop, config.random_flip)
    of_all: dict[str, Any] = dict(
        train_split=config.train_split,
        image_column=config.image_column,
        max_train_samples=config.max_train_samples,
        cache_dir=config.cache_dir,
    )
    of_first: dict[str, Any] = of_all | dict(
        dataset_config_name=config.dataset_config_name,
        validation_split=config.validation_split,
        train_files=config.train_files,
        validation_files=config.validation_files,
        max_validation_samples=config.max_validation_samples,
        revision=config.dataset_revision,
    )
    weights = config.dataset_weights or None
    with accelerator.main_process_first():  # one process fills the dataset cache, the others read it
        if config.streaming:
            shards, validation_images = load_image_stream(config.dataset_name, **of_first)
            more = [load_image_stream(name, **of_all, hold_out=False)[0] for name in config.extra_datasets]
            training = StreamedImages(
                [shards, *more], transform, config.seed, weights, config.shuffle_buffer_size, config.shard_groups
            )
        else:
            images, validation_images = load_image_datasets(config.dataset_name, **of_first, seed=config.seed)
            more = [load_train_images(name, **of_all) for name in config.extra_datasets]
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


def micro_batch_loader(state: TrainState, dataset) -> Batches:
    """This process's micro-batches from the current step to the end of the run, on its device."""
    config = state.config
    per_step = config.gradient_accumulation_steps * state.accelerator.num_processes
    return device_batches(
        state, dataset, config.train_batch_size, state.step * per_step, config.max_train_steps * per_step
    )


def device_batches(state: TrainState, dataset, batch_size: int, start: int, stop: int) -> Batches:
    """This process's share of the batches `start` to `stop` (`load_batches`), on its device."""
    accelerator, workers = state.accelerator, state.config.dataloader_num_workers
    batches = load_batches(
        dataset,
        batch_size,
        start,
        stop,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=default_num_workers() if workers is None else workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    for batch in batches:
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        yield batch | {"pixel_values": batch["pixel_values"].contiguous(memory_format=memory_format(state.config))}


def log_row(state: TrainState, output: StepOutput, restarted: int, global_batch: int) -> dict[str, float]:
    """One line of log.jsonl: every loss, unweighted, and how the run is doing; of codes, once there are any."""
    report = state.health.report()
    codes = ("perplexity", "usage", "dead_codes", "top_code_share") if report.window_steps else ()
    return {
        "step": state.step,
        **output.losses,
        "adaptive_weight": output.adaptive_weight,
        "grad_norm": output.grad_norm,
        "disc_grad_norm": output.disc_grad_norm,
        **output.watched,
        "nonfinite_steps": state.nonfinite_steps,
        "learning_rate": state.scheduler.get_last_lr()[0],
        **{name: getattr(report, name) for name in codes},
        **({"restarted_codes": restarted} if codes else {}),
        "images_per_second": state.step * global_batch / state.seconds,
    }


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
    # Accelerate's own optimizers would not do: two of them cannot share one fp16 scale (`update_weights`).
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
        model = VQGANModel.from_pretrained(config.init_from, config=model_config, dtype=torch.float32)
    if config.decoder_only:
        for part in (model.encoder, model.quant_conv, model.quantize):
            part.requires_grad_(False)
    if config.gradient_checkpointing:
        # transformers 5 has renamed it on the way
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model.train().to(memory_format=memory_format(config))


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


def build_optimizer(
    config: VQGANTrainingConfig, networks: tuple[nn.Module | None, ...], learning_rate: float
) -> torch.optim.Optimizer:
    """
    AdamW over the networks' parameters that are not frozen.

    Raises:
        ValueError: if `use_8bit_adam` is set and bitsandbytes is not installed.
    """
    # One pass over weights, moments and gradients, where PyTorch's default makes a dozen
    optimizer_class: Any = functools.partial(torch.optim.AdamW, fused=True)
    if config.use_8bit_adam:
        try:
            import bitsandbytes.optim
        except ImportError as error:
            raise ValueError("use_8bit_adam=True needs bitsandbytes: `pip install bitsandbytes`.") from error
        optimizer_class = bitsandbytes.optim.AdamW8bit
    return optimizer_class(
        [p for network in networks if network is not None for p in network.parameters() if p.requires_grad],
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


def measure_scale(state: TrainState, dataset, batch_size: int = 16) -> None:
    """
    Set the model's `scaling_factor` and `shift_factor` to what gives latents of training crops unit variance.

    Latents that are all equal, or not finite, have no such factors: a warning, and the model's stay as they are. The
    run goes on to save its weights and to tell what became of the images.
    """
    count, config = state.config.latent_statistics_images, state.vqgan.config
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    batches = device_batches(state, dataset, batch_size, 0, len(sizes))  # in the order in which they are asked for

    def load(number: int) -> Tensor:
        return next(batches)["pixel_values"][: sizes[number]]

    with contextlib.closing(batches):
        found = measure_latents(state.vqgan, load, len(sizes))
    if not found.std > 1e-6 * abs(found.mean):  # smaller is rounding; NaN is not larger
        if state.accelerator.is_main_process:
            logger.warning(
                "the latents of %d training crops are constant or not finite (mean %g, standard deviation %g): the "
                "encoder has collapsed. scaling_factor=%g and shift_factor=%g stay as they were.",
                *(found.num_images, found.mean, found.std, config.scaling_factor, config.shift_factor),
            )
        return
    state.latents = found
    config.scaling_factor, config.shift_factor = 1 / found.std, found.mean


def memory_format(config: VQGANTrainingConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


def share_cpu_threads(config, accelerator: Accelerator) -> None:
    """Use `config.cpu_threads`; by default all cores, since `accelerate launch` gives each process one thread."""
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    elif accelerator.device.type == "cpu":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, available_cores() // local_processes))


def count_bad_images(state: TrainState, micro_batches: list[dict], global_batch: int) -> None:
    """
    Count samples from unreadable and from enlarged images over all processes, and name each unreadable image once.

    Raises:
        ValueError: once the images of more than `max_unreadable_share` of the samples, of at least 100 or one batch,
            were unreadable.
    """
    config, main = state.config, state.accelerator.is_main_process
    met = {name: reason for batch in micro_batches for name, reason in batch["skipped"].items()}
    new = [(name, reason) for name, reason in met.items() if name not in state.unreadable_images]
    counts = sum(torch.stack([batch["unreadable"].sum(), batch["upscaled"].sum()]) for batch in micro_batches)
    counts = torch.cat([counts, counts.new_tensor([len(new)])])
    unreadable, upscaled, anywhere_new = state.accelerator.reduce(counts, "sum").tolist()
    if anywhere_new:  # in all processes or in none, as all must gather together
        for name, reason in gather_object(new):
            named = len(state.unreadable_images)
            if main and name not in state.unreadable_images and named < NAMED_IMAGES:
                logger.warning("skipped an unreadable image: %s", reason)
            state.unreadable_images[name] = None
    if upscaled and not state.upscaled and main:
        logger.warning("Some images are smaller than resolution=%d and are enlarged.", config.resolution)
    state.unreadable += unreadable
    state.upscaled += upscaled
    seen = state.step * global_batch
    if seen >= 100 and state.unreadable > config.max_unreadable_share * seen:
        raise ValueError(
            f"{state.unreadable} of {seen} training images could not be read, more than "
            f"max_unreadable_share={config.max_unreadable_share}: {name_some(state.unreadable_images)}. Repair the "
            "dataset, or raise the share."
        )


def name_some(names: Collection[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = len(names) - NAMED_IMAGES
    return ", ".join(itertools.islice(names, NAMED_IMAGES)) + (f" and {more:,} more" if more > 0 else "")


def describe_bad_images(state: TrainState) -> str:
    """One line about the whole run."""
    parts = []
    if state.unreadable:
        images = f"{len(state.unreadable_images):,} unreadable image(s): {name_some(state.unreadable_images)}"
        parts.append(f"{images}; replaced in {state.unreadable:,} training sample(s)")
    if state.upscaled:
        parts.append(f"{state.upscaled:,} training sample(s) from enlarged images")
    return "Over all epochs: " + "; ".join(parts) + "."


def describe_plan(state: TrainState, dataset, validation: ValidationImages, global_batch: int) -> str:
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
    epochs = "" if config.streaming else f" = {seen / len(dataset):.1f} epochs"
    lines = {
        "data": f"{', '.join([config.dataset_name, *config.extra_datasets])}: {dataset.describe()}, "
        f"{len(validation)} for validation",
        "crops": describe_crops(config)[0],
        "validation": describe_crops(config)[1],
        "parameters": ", ".join(f"{name} {count:.2f} M" for name, count in millions.items()),
        "tokens": f"{config.resolution}x{config.resolution} pixels -> {side}x{side} codes of "
        f"{model.config.num_vq_embeddings:,} ({model.config.quantizer}, f{factor}, {bits:.3f} bits per pixel)",
        "losses": ", ".join(f"{name} x {weight:g}" for name, weight in active.items()),
        "batch": f"{config.train_batch_size} x {config.gradient_accumulation_steps} accumulation x "
        f"{state.accelerator.num_processes} process(es) = {global_batch}",
        "steps": f"{config.max_train_steps:,} = {seen:,} crops{epochs}",
        "device": f"{state.accelerator.device}, mixed precision {config.mixed_precision}",
        "output": config.output_dir,
    }
    if idle := config.never_reached():
        lines["no effect"] = "; ".join(idle)
    return "\n".join(f"{name:>10}: {text}" for name, text in lines.items())


def describe_crops(config: VQGANTrainingConfig) -> tuple[str, str]:
    """How training images are cut, and how those for validation are, in words."""
    side, resize = config.resolution, config.resolution if config.resize is None else config.resize
    size = f"shorter side to {resize} pixels" if resize else "at their own size"
    place = "central" if config.center_crop else "random"
    mirrored = ", half of them mirrored" if config.random_flip else ""
    training = f"{size}, {config.crops_per_image} {place} {side}x{side} crop(s) of an image per epoch{mirrored}"
    if config.validate_whole_images:
        return training, f"{size}, whole images"
    same = "" if resize == side else f"; evaluate_vqgan.py measures the same with --resize {resize}"
    return training, f"{size}, the central {side}x{side}{same}"


# ---------------------------------------------------------------------------------------------------------------------
# A dry run


def rehearse(state: TrainState, dataset, validation: ValidationImages, metric: LPIPS, steps: int = 3) -> str:
    """
    Take a few steps with everything on that would start later, measure one validation image, and see whether
    `output_dir` can be written to. Nothing is left but the changed `state`.

    Returns:
        A line that says so, and how long the run will take.

    Raises:
        OSError: if the folder cannot be written to.
        FloatingPointError: if a loss or gradient is not finite.
    """
    config, accelerator = state.config, state.accelerator
    check_writable(Path(config.output_dir))
    state.config = dataclasses.replace(config, quantize_start=0, disc_start=0, disc_ramp_steps=0)
    micro_batches = config.gradient_accumulation_steps
    stop = steps * micro_batches * accelerator.num_processes
    seconds = []
    with contextlib.closing(device_batches(state, dataset, config.train_batch_size, 0, stop)) as loader:
        for _ in range(steps):
            started = time.perf_counter()
            output = training_step(state, [next(loader)["pixel_values"] for _ in range(micro_batches)])
            update_codebook(state, output)
            seconds.append(time.perf_counter() - started)
            if output.nonfinite and accelerator.scaler is None:  # fp16 finds its scale by skipping steps
                raise FloatingPointError(f"not finite in a first step: {', '.join(output.nonfinite)}.")
    image = validation[0][None].contiguous(memory_format=memory_format(config))
    evaluate_reconstruction(state.vqgan, [image], metric)
    a_step = statistics.median(seconds[1:])  # the first one warms up
    return (
        f"OK: {steps} steps and a validation image went through, and {config.output_dir} can be written to. "
        f"{config.max_train_steps:,} steps of {a_step:.2g} s take about {duration(config.max_train_steps * a_step)}, "
        "without validation and checkpoints."
    )


def check_writable(folder: Path) -> None:
    """Raise OSError if a folder, which need not be there yet, could not be written to. Leaves nothing."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OSError(f"output_dir={str(folder)!r} cannot be written to: {nearest}: {error.strerror}.") from error


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def validate(state: TrainState, validation: ValidationImages, metric: LPIPS, run: RunFolder) -> dict[str, float]:
    """
    Measure the model on the validation images, which the processes share among them; write metrics.json,
    reconstructions.png and curves.png.

    Returns:
        What metrics.json says.
    """
    config, accelerator = state.config, state.accelerator
    _, size = describe_crops(config)
    mine = range(accelerator.process_index, len(validation), accelerator.num_processes)
    images = (validation[index][None].contiguous(memory_format=memory_format(config)) for index in mine)
    found = evaluate_reconstruction(state.vqgan, images, metric).as_dict()
    run.log({"step": state.step} | {f"validation_{name}": value for name, value in found.items()})

    report = state.health.report()
    of_codes = ("perplexity", "usage")
    metrics = {name: value for name, value in found.items() if name not in of_codes}
    metrics |= {name: getattr(report, name) for name in of_codes}
    metrics |= {f"validation_{name}": found[name] for name in of_codes}
    metrics |= {
        "num_codes": state.health.num_codes,
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "nonfinite_steps": state.nonfinite_steps,
        "unreadable_images": len(state.unreadable_images),
        "upscaled_images": state.upscaled,
        "measured_on": {
            "psnr, ssim, lpips, l1, validation_*": f"{len(validation)} validation image(s) of "
            f"{public_name(config.dataset_name)} ({size}), pixels clamped and mapped to [0, 1], mean over images; "
            f"LPIPS v0.1 {config.validation_net}",
            "perplexity, usage": f"codes of the training crops of the last {report.window_steps} steps "
            f"({report.positions:,} positions); usage is the share of codes hit at least once",
            "seconds": "training loop with validation, without set-up",
            "unreadable_images": "different training images that could not be read",
            "upscaled_images": "training samples, over all epochs, from images that had to be enlarged",
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
        rows = run.read_log()
        run.save_picture("reconstructions.png", draw_reconstructions(state.vqgan, shown), state.step)
        run.save_picture("curves.png", draw_curves(rows, state.health.num_codes), state.step)
        if any(name.startswith("gradient_z_") for row in rows for name in row):
            run.save_picture("gradients.png", draw_gradients(rows), state.step)
        run.save_picture("codebook.png", draw_codebook(state.vqgan, state.health.counts, rows), state.step)
    return metrics
