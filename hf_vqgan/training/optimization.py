"""Adam over networks, gradient clipping, and steps that skip what is not finite."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .configuration import OptimizationOptions

# An optimizer and its schedule. Both are plain ones: Accelerate's would advance the schedule once per process, and
# update the fp16 loss scale after each of two optimizers.
Scheduled = tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]


def build_optimizer(
    config: OptimizationOptions, networks: tuple[nn.Module | None, ...], learning_rate: float
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


def clip_gradient(accelerator: Accelerator, optimizer: torch.optim.Optimizer, limit: float) -> float:
    """Clip the gradient of all of an optimizer's parameters to a norm, 0 for none. Returns the norm before."""
    if accelerator.scaler is not None:
        accelerator.scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return float(torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf))


def step_optimizers(accelerator: Accelerator, optimizers: Sequence[Scheduled], apply: bool) -> None:
    """Step optimizers and their schedules, if `apply`; and end this step's gradients."""
    scaler = accelerator.scaler
    for optimizer, schedule in optimizers:
        if apply:
            optimizer.step() if scaler is None else scaler.step(optimizer)
            schedule.step()
        optimizer.zero_grad()
    if scaler is not None:
        scaler.update()
