"""What a run is going to do: told before it starts, and rehearsed by a dry run."""

import contextlib
import dataclasses
import math
import statistics
import tempfile
import time
from pathlib import Path

from ..data.datasets import ValidationImages
from ..losses.image_losses import LPIPS
from ..measurement.metrics import evaluate_reconstruction
from .configuration import VQGANTrainingConfig
from .setup import device_batches, memory_format
from .step import TrainState, training_step, update_codebook


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
    same = "" if resize == side else f"; `hf-vqgan evaluate` measures the same with --resize {resize}"
    return training, f"{size}, the central {side}x{side}{same}"


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
