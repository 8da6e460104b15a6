"""What every trainer is set up with: an accelerator, its share of the processor, and batches on its device."""

import os
from collections.abc import Generator
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import send_to_device

from ..data.datasets import available_cores, default_num_workers, load_batches
from .configuration import DatasetOptions, OptimizationOptions

Batches = Generator[dict[str, Any], None, None]


def build_accelerator(config) -> Accelerator:
    """
    Raises:
        ValueError: for a launch that shards or splits the networks; the step needs each of them whole. For fp16 on a
            device for which Accelerate does without it. For a tracker that is not installed, likewise.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_distributed_type(accelerator.distributed_type)
    if config.mixed_precision == "fp16" and not accelerator.native_amp:
        raise ValueError(f"mixed_precision='fp16' does not work on device {accelerator.device.type}: take bf16 or no.")
    if config.report_to not in (None, "all") and not accelerator.log_with:
        raise ValueError(f"report_to={config.report_to!r}: its package is not installed here. Install it, or leave it.")
    share_cpu_threads(config, accelerator)
    return accelerator


def check_distributed_type(kind: DistributedType) -> None:
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ValueError(
            f"this launch uses {kind.value}, which splits up networks or optimizers. A VQ-GAN is small, and its step "
            "takes gradients at single layers: launch with DDP (`accelerate launch --multi_gpu`), and save memory with "
            "--gradient_checkpointing, --mixed_precision bf16 and --gradient_accumulation_steps."
        )


def share_cpu_threads(config, accelerator: Accelerator) -> None:
    """Use `config.cpu_threads`; by default all cores, since `accelerate launch` gives each process one thread."""
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    elif accelerator.device.type == "cpu":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, available_cores() // local_processes))


def count_steps(config: OptimizationOptions, num_samples: int, accelerator: Accelerator) -> int:
    """`max_train_steps`, or what `num_train_epochs` come to: whole steps, at least one."""
    if config.max_train_steps is not None:
        return config.max_train_steps
    batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    return max(1, config.num_train_epochs * num_samples // batch)


def step_batches(state, dataset, stop: int) -> Batches:
    """This process's micro-batches from the current step to step `stop`, on its device."""
    config = state.config
    per_step = config.gradient_accumulation_steps * state.accelerator.num_processes
    return device_batches(
        dataset, config, state.accelerator, config.train_batch_size, range(state.step * per_step, stop * per_step)
    )


def device_batches(
    dataset, config: DatasetOptions, accelerator: Accelerator, batch_size: int, numbers: range
) -> Batches:
    """This process's share of the batches with these numbers (`load_batches`), on its device."""
    workers = config.dataloader_num_workers
    batches = load_batches(
        dataset,
        batch_size,
        numbers.start,
        numbers.stop,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=default_num_workers() if workers is None else workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    for batch in batches:
        yield send_to_device(batch, accelerator.device, non_blocking=True)
