"""Models of tokens: how they are configured and built, what is random about a sample, and the loss."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration_token_model import AutoregressiveTokenConfig, MaskedTokenConfig, TokenModelConfig
from ..data.randomness import torch_rng
from ..files.options import check_values, option
from ..modeling_token_model import AutoregressiveTokenModel, MaskedTokenModel, random_subsets
from ..modeling_vqgan import VQGANModel
from ..training.configuration import LR_SCHEDULERS
from .generator import GeneratorOptions

MEAN_MASKED = 2 / math.pi  # the mean of cos(π/2 * u)


@dataclass
class TokenModelOptions:
    """The token model."""

    token_model: str = option(
        "autoregressive",
        "One token after another, with exact likelihoods; or filling in masked tokens, in few steps.",
        choices=("autoregressive", "masked"),
    )
    hidden_size: int = option(384, "Channels of the transformer.", at_least=4)
    num_layers: int = option(12, "Layers of the transformer.", at_least=1)
    num_attention_heads: int = option(6, "Heads per layer.", at_least=1)
    num_depth_layers: int = option(
        2, "Autoregressive: layers over the codes of one position, where there are several.", at_least=1
    )
    dropout: float = option(0.1, "Dropout of inputs and attention weights.", at_least=0, below=1)
    random_order: float = option(
        0.0,
        "Autoregressive: positions come in random order at first, in ever fewer samples from 2/3 of this share of the "
        "training on, and row by row after it (RAR: 0.75). 0: always row by row.",
        at_least=0,
        at_most=1,
    )


@dataclass
class TokenEvaluationOptions:
    """Likelihood and samples."""

    likelihood_images: int = option(
        256, "Measure the bits of up to so many images at the end, with the averaged weights. 0: none.", at_least=0
    )
    validation_split: str | None = option(
        None,
        "Split of these images. Default: `validation`, else `test`, else the training split.",
        describes_dataset=True,
    )
    sample_temperature: float = option(1.0, "Temperature of samples.", at_least=0, role="watching")
    sample_top_k: int = option(0, "Samples choose among so many likeliest tokens. 0: all.", at_least=0, role="watching")
    sample_top_p: float = option(
        1.0, "Samples choose among the likeliest tokens of this probability.", above=0, at_most=1, role="watching"
    )


# Python collects the fields of bases from the last to the first: read these from below.
@dataclass
class TokenTrainingConfig(TokenEvaluationOptions, TokenModelOptions, GeneratorOptions):
    """How a model of tokens is trained. Every field is a flag of `hf-vqgan train-tokens`."""

    output_dir: str = option(
        "runs/tokens", "Folder of the run: pipeline, sample grids, log and checkpoints.", nonempty=True, role="place"
    )
    learning_rate: float = option(4e-4, "Learning rate.", at_least=0)
    lr_scheduler: str = option("cosine", "Schedule, a name that diffusers' get_scheduler knows.", choices=LR_SCHEDULERS)
    adam_beta2: float = option(0.96, "Adam's β2.", at_least=0, below=1)
    adam_weight_decay: float = option(0.03, "AdamW's weight decay.", at_least=0)
    sample_inference_steps: int = option(12, "Masked: passes of a sample.", at_least=1, role="watching")

    def __post_init__(self):
        check_values(self)
        if self.token_model == "masked" and self.random_order:
            raise ValueError(
                f"random_order={self.random_order} is for token_model='autoregressive': a masked model has no order."
            )


def build_token_model(
    config: TokenTrainingConfig, vqgan: VQGANModel, side: int, num_classes: int
) -> AutoregressiveTokenModel | MaskedTokenModel:
    """A model of the VQ-GAN's tokens on a grid of `side` x `side` positions, with random weights."""
    shared = dict(
        num_vq_embeddings=vqgan.quantize.num_codes,
        num_codebooks=vqgan.quantize.num_codebooks,
        sample_size=side,
        num_classes=num_classes,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        dropout=config.dropout,
    )
    model: AutoregressiveTokenModel | MaskedTokenModel
    if config.token_model == "masked":
        model = MaskedTokenModel(MaskedTokenConfig(**shared))
    else:
        model = AutoregressiveTokenModel(AutoregressiveTokenConfig(num_depth_layers=config.num_depth_layers, **shared))
    if config.gradient_checkpointing:
        # Under its newer name, where it has one.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# What is learned from a sample


@dataclass
class Draws:
    """
    What is random about a batch.

    Args:
        dropped (bool `Tensor` of shape `(B,)`): Who loses its class.
        order (`Tensor` of shape `(B, L)`, *optional*): Autoregressive: the order of positions, as `forward` takes it.
        masked (bool `Tensor` of the shape of the indices, *optional*): Masked: the tokens to fill in.
    """

    dropped: Tensor
    order: Tensor | None = None
    masked: Tensor | None = None

    def to(self, device: torch.device) -> "Draws":
        parts = (self.dropped, self.order, self.masked)
        return Draws(*(part if part is None else part.to(device) for part in parts))


def draw(numbers: Tensor, model: TokenModelConfig, config: TokenTrainingConfig, shuffled_share: float = 0.0) -> Draws:
    """
    What is random about the samples of these numbers `(B,)`: functions of (seed, sample number), so that neither the
    number of processes nor an interruption changes what is learned.

    Args:
        shuffled_share (`float`): Of the samples, in random order; see `shuffled_share`.
    """
    dropped, orders, masks = [], [], []
    for number in numbers.tolist():
        generator = torch_rng(config.seed, "tokens", number)
        dropped.append(torch.rand((), generator=generator) < config.label_dropout)
        if config.token_model == "masked":
            masks.append(draw_mask(model.grid_shape, generator))
        elif config.random_order:
            shuffled = torch.rand((), generator=generator) < shuffled_share
            order = torch.randperm(model.sample_size**2, generator=generator)
            orders.append(order if shuffled else torch.arange(len(order)))
    return Draws(torch.stack(dropped), torch.stack(orders) if orders else None, torch.stack(masks) if masks else None)


def draw_mask(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random set of at least one token: the share cos(π/2 * u), u uniform (https://huggingface.co/papers/2202.04200)."""
    count = math.prod(shape)
    size = torch.cos(torch.rand(1, generator=generator) * math.pi / 2).mul(count).ceil().clamp(1, count)
    return random_subsets(1, size, count, generator).view(shape)


def shuffled_share(progress: float, random_order: float) -> float:
    """
    Share of samples in random order at `progress` in [0, 1] of the training: all until 2/3 of `random_order`, then
    linearly fewer, and none from `random_order` on. RAR (https://huggingface.co/papers/2411.00776) has 0.75.
    """
    return min(1.0, max(0.0, 3 * (1 - progress / random_order))) if random_order else 0.0


def token_loss(model: nn.Module, indices: Tensor, class_labels: Tensor | None, draws: Draws) -> Tensor:
    """
    Cross-entropy in nats: per token, for an autoregressive model; for a masked one, the sum over masked tokens, divided
    by their expected number, so that a batch's loss is the mean of its parts' losses, whatever they have masked.

    Args:
        model (`nn.Module`): A token model, possibly wrapped for distributed training.
        class_labels (`Tensor` of shape `(B,)`, *optional*): `num_classes` for samples without class.
    """
    if draws.masked is None:
        (logits,) = model(indices, class_labels, order=draws.order, return_dict=False)
        return F.cross_entropy(logits.flatten(0, -2).float(), indices.flatten())
    (logits,) = model(indices, class_labels, masked=draws.masked, return_dict=False)
    total = F.cross_entropy(logits[draws.masked].float(), indices[draws.masked], reduction="sum")
    return total / (indices.numel() * MEAN_MASKED)
