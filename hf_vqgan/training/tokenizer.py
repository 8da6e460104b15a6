"""Training a tokenizer: what the loop runs, validates and keeps when the task is a VQ-GAN."""

import contextlib
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor

from ..configuration_vqgan import VQGANConfig
from ..data.datasets import MixedImages, TrainingImages, ValidationImages
from ..data.streams import StreamedImages
from ..hub.model_card import public_name
from ..hub.push import push_run_to_hub
from ..image_processing_vqgan import VQGANImageProcessor
from ..losses.image_losses import LPIPS
from ..measurement.metrics import evaluate_reconstruction, measure_latents
from ..measurement.pictures import draw_codebook, draw_curves, draw_gradients, draw_reconstructions
from ..measurement.protocol import Protocol
from .checkpoint import LossScale, NamedAverages, NamedOptimizer, Part
from .configuration import VQGANTrainingConfig
from .gradient_flow import measure_gradients
from .interruption import CodebookCollapse
from .loop import run_task
from .networks import build_state, check_model, load_images, load_lpips, memory_format
from .plan import format_plan
from .run_folder import RunFolder
from .setup import Batches, build_accelerator, count_steps, device_batches, step_batches
from .step import TokenizerStepOutput, TrainState, initialize_codebook, training_step, update_codebook
from .task import Task, due

logger = logging.getLogger(__name__)


def train(config: VQGANTrainingConfig, model_config: VQGANConfig, dry_run: bool = False) -> dict[str, float]:
    """
    Train a [`VQGANModel`] and leave in `config.output_dir`: the model in from_pretrained layout, metrics.json,
    reconstructions.png, curves.png, log.jsonl, training_config.yaml and checkpoint-N/.

    With `dry_run`, print the plan, check everything (data, columns, sizes, weights, a few steps of all networks, the
    folder), say how long the run will take, and leave nothing behind.

    Returns:
        The final metrics, as in metrics.json (empty for a dry run).

    Raises:
        ValueError, FileNotFoundError: for settings or data that cannot work, before anything is written.
        CodebookCollapse: if the codebook collapses and `stop_on_collapse` is set.

        And what `run_task` raises.
    """
    check_model(config, model_config)
    accelerator = build_accelerator(config)
    set_seed(config.seed)
    dataset, validation = load_images(config, model_config, accelerator)
    if config.max_train_steps is None:  # a stream, whose length is not known, has them
        config = dataclasses.replace(config, max_train_steps=count_steps(config, len(dataset), accelerator))
    perceptual, metric = load_lpips(config, accelerator)
    state = build_state(config, model_config, accelerator, perceptual)
    return run_task(TokenizerTask(state, dataset, validation, metric, model_config), dry_run)


class TokenizerTask(Task):
    """
    A [`VQGANModel`] and its discriminator.

    Args:
        metric ([`LPIPS`]): For validation.
        model_config ([`VQGANConfig`]): As it was before training measured the scaling factor.
    """

    name = "vqgan"
    model_files = ("config.json", "model*.safetensors")
    shown = ("l1", "perceptual", "adversarial", "perplexity", "usage", "images_per_second", "data_wait")
    push = staticmethod(push_run_to_hub)
    state: TrainState

    def __init__(
        self,
        state: TrainState,
        dataset: TrainingImages | MixedImages | StreamedImages,
        validation: ValidationImages,
        metric: LPIPS,
        model_config: VQGANConfig,
    ):
        self.state, self.model_config = state, model_config
        self.dataset, self.validation, self.metric = dataset, validation, metric

    # --------------------------------------------------------------------------------------------------- before

    def describe_plan(self) -> str:
        return describe_plan(self.state, self.dataset, self.validation)

    def idle_settings(self) -> list[str]:
        return self.state.config.never_reached()

    def checkpoint_parts(self) -> dict[str, Part]:
        return checkpoint_parts(self.state, self.dataset)

    # ---------------------------------------------------------------------------------------------------- steps

    @property
    def phase(self) -> str:
        state = self.state
        return "train" if state.quantizing else f"autoencoder until step {state.config.quantize_start}"

    def batches(self, stop: int) -> Batches:
        return in_memory_format(self.state, step_batches(self.state, self.dataset, stop))

    def take_step(self, micro_batches: list[dict[str, Any]], run: RunFolder) -> TokenizerStepOutput:
        state, config = self.state, self.state.config
        if state.step == config.quantize_start and config.codebook_init == "data" and not config.decoder_only:
            with contextlib.closing(self.batches(config.max_train_steps)) as coming:
                initialize_codebook(state, coming)
        if due(state.step + 1, config.gradient_report_steps):
            report = measure_gradients(state, micro_batches[0]["pixel_values"])
            run.log({"step": state.step + 1} | report)  # of the coming step: a resumed run measures it again
        quantizing = state.quantizing
        output = training_step(state, [batch["pixel_values"] for batch in micro_batches])
        if not output.nonfinite:
            if quantizing:
                output.restarted_codes = update_codebook(state, output)
            state.disc_health.update(output.watched)
            if state.ema is not None:
                state.ema.step(state.vqgan.parameters())
        return output

    def rehearse_step(self, micro_batches: list[dict[str, Any]]) -> TokenizerStepOutput:
        state = self.state
        state.config = dataclasses.replace(state.config, quantize_start=0, disc_start=0, disc_ramp_steps=0)
        output = training_step(state, [batch["pixel_values"] for batch in micro_batches])
        update_codebook(state, output)
        return output

    def rehearse_evaluation(self) -> str:
        image = self.validation[0][None].contiguous(memory_format=memory_format(self.state.config))
        evaluate_reconstruction(self.state.vqgan, [image], self.metric)
        return "a validation image"

    # --------------------------------------------------------------------------------------------------- between

    def log_row(self, output: TokenizerStepOutput) -> dict[str, float]:
        """How the game and the codebook are doing; of codes, once there are any."""
        state = self.state
        report = state.health.report()
        codes = ("perplexity", "usage", "dead_codes", "top_code_share") if report.window_steps else ()
        return {
            "adaptive_weight": output.adaptive_weight,
            "disc_grad_norm": output.disc_grad_norm,
            **output.watched,
            "learning_rate": state.scheduler.get_last_lr()[0],
            **{name: getattr(report, name) for name in codes},
            **({"restarted_codes": output.restarted_codes} if codes else {}),
        }

    def check_health(self) -> None:
        check_health(self.state)

    def report(self, run: RunFolder, output: TokenizerStepOutput, last: bool) -> str | None:
        state, config = self.state, self.state.config
        if not last and not (due(state.step, config.validation_steps) and state.quantizing):
            return None
        with state.averaged_weights():
            if last and config.latent_statistics_images:
                measure_scale(state, self.dataset)
            metrics = validate(state, self.validation, self.metric, run)
        return (
            f"step {state.step}: validation PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}, "
            f"LPIPS ({config.validation_net}) {metrics['lpips']:.3f}; training perplexity "
            f"{metrics['perplexity']:.0f} of {state.health.num_codes}, usage {metrics['usage']:.1%}"
        )

    def save_model(self, folder: Path) -> None:
        """With the averaged weights, if the run keeps any."""
        model, resolution = self.state.vqgan, self.state.config.resolution
        with self.state.averaged_weights():
            model.save_pretrained(folder)
        VQGANImageProcessor(
            size={"shortest_edge": resolution},
            crop_size={"height": resolution, "width": resolution},
            size_divisor=model.config.downsample_factor,
        ).save_pretrained(folder)


def in_memory_format(state: TrainState, batches: Batches) -> Batches:
    """The batches with their pixels in the networks' memory format."""
    for batch in batches:
        pixels = batch["pixel_values"].contiguous(memory_format=memory_format(state.config))
        yield batch | {"pixel_values": pixels}


def describe_plan(state: TrainState, dataset, validation: ValidationImages) -> str:
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
    seen = config.max_train_steps * state.global_batch
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
        f"{state.accelerator.num_processes} process(es) = {state.global_batch}",
        "steps": f"{config.max_train_steps:,} = {seen:,} crops{epochs}",
        "device": f"{state.accelerator.device}, mixed precision {config.mixed_precision}",
        "output": config.output_dir,
    }
    if idle := config.never_reached():
        lines["no effect"] = "; ".join(idle)
    return format_plan(lines)


def describe_crops(config: VQGANTrainingConfig) -> tuple[str, str]:
    """How training images are cut, and how those for validation are, in words."""
    side, resize = config.resolution, config.resolution if config.resize is None else config.resize
    size = f"shorter side to {resize} pixels" if resize else "at their own size"
    place = "central" if config.center_crop else "random"
    mirrored = ", half of them mirrored" if config.random_flip else ""
    training = f"{size}, {config.crops_per_image} {place} {side}x{side} crop(s) of an image per epoch{mirrored}"
    if config.validate_whole_images:
        return training, f"{size}, whole images"
    same = "" if resize == side else f"; `hf-vqgan evaluate` measures the same with --resize {resize}"
    return training, f"{size}, the central {side}x{side}{same}"


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


def measure_scale(state: TrainState, dataset, batch_size: int = 16) -> None:
    """
    Set the model's `scaling_factor` and `shift_factor` to what gives latents of training crops unit variance.

    Latents that are all equal, or not finite, have no such factors: a warning, and the model's stay as they are. The
    run goes on to save its weights and to tell what became of the images.
    """
    count, config = state.config.latent_statistics_images, state.vqgan.config
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    # In the order in which they are asked for
    numbered = device_batches(dataset, state.config, state.accelerator, batch_size, range(len(sizes)))
    batches = in_memory_format(state, numbered)

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


def check_health(state: TrainState) -> None:
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
