"""A training run: the loop around the step, with its log, validation, checkpoints and resumption."""

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Collection

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm.auto import tqdm

from ..configuration_vqgan import VQGANConfig
from ..data.datasets import (
    MixedImages,
    TrainingImages,
    ValidationImages,
    WaitClock,
)
from ..data.streams import StreamedImages
from ..hub.model_card import public_name
from ..hub.push import push_run_to_hub
from ..losses.image_losses import LPIPS
from ..measurement.metrics import evaluate_reconstruction, measure_latents
from ..measurement.pictures import draw_codebook, draw_curves, draw_gradients, draw_reconstructions
from ..measurement.protocol import Protocol
from .checkpoint import LossScale, NamedAverages, NamedOptimizer, Part
from .configuration import VQGANTrainingConfig
from .gradient_flow import measure_gradients
from .interruption import Preempted, PreemptionNotice, watch_health, watch_nonfinite
from .plan import describe_plan, rehearse
from .run_folder import RunFolder, public_settings
from .setup import (
    build_accelerator,
    build_state,
    check_model,
    device_batches,
    load_images,
    load_lpips,
    memory_format,
    micro_batch_loader,
)
from .step import StepOutput, TrainState, initialize_codebook, training_step, update_codebook

logger = logging.getLogger(__name__)


NAMED_IMAGES = 10  # of the unreadable ones, how many are named; all are counted


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
            run.require_model()
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
        "protocol": Protocol(
            dataset=public_name(config.dataset_name),
            split=validation.split,
            num_images=len(validation),
            resolution=config.resolution,
            resize=validation.transform.resize,
            crop="none" if validation.whole else "center",
            lpips_net=config.validation_net,
            codebook_steps=report.window_steps,
            codebook_positions=report.positions,
            latent_images=state.latents.num_images if state.latents is not None else None,
        ).as_dict(),
    }
    if state.latents is not None:
        metrics |= {name: getattr(state.vqgan.config, name) for name in ("scaling_factor", "shift_factor")}
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
