"""How many bits held-out images take under a model of tokens."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.randomness import torch_rng
from ..measurement.metrics import sum_over_processes
from ..modeling_token_model import AutoregressiveTokenModel, MaskedTokenModel
from .samples import EncodedSamples, LatentSamples
from .token_models import TokenTrainingConfig


@dataclass
class HeldOut:
    """Images to measure the likelihood of: the first ones of a split."""

    split: str
    samples: LatentSamples


def measure_bits(
    model: AutoregressiveTokenModel | MaskedTokenModel,
    samples: EncodedSamples,
    config: TokenTrainingConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """
    Mean code length of the samples, given their classes if the model has any: `bits_per_image` and `bits_per_token`; of
    a masked model, `..._upper_bound` of both. The processes share the work, and each gets the result.
    """
    mine = range(accelerator.process_index, len(samples), accelerator.num_processes)
    total = sum_over_processes(sum_bits(model, samples, mine, config), accelerator.device).item()
    suffix = "" if isinstance(model, AutoregressiveTokenModel) else "_upper_bound"
    tokens = math.prod(model.config.grid_shape)
    return {
        f"bits_per_image{suffix}": total / len(samples),
        f"bits_per_token{suffix}": total / len(samples) / tokens,
    }


def sum_bits(
    model: AutoregressiveTokenModel | MaskedTokenModel,
    samples: EncodedSamples,
    rows: range,
    config: TokenTrainingConfig,
) -> Tensor:
    """
    Sum of -log2 p(indices | class) over the rows, or of its upper bound for a masked model: float64, on the CPU.

    What is random about the bound of a row is a function of (seed, row), so that sums over parts add up.
    """
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(rows), config.train_batch_size):
        batch = list(rows[start : start + config.train_batch_size])
        indices, labels = (part[batch].to(model.device) for part in (samples.encoded, samples.labels))
        if isinstance(model, AutoregressiveTokenModel):
            bits = model.bits(indices, labels)
        else:
            generators = [torch_rng(config.seed, "likelihood", row) for row in batch]
            bits = model.bits_upper_bound(indices, labels, generator=generators)
        total += bits.double().sum().cpu()
    return total
