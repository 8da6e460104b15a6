"""Training a model of a VQ-GAN's tokens: its configuration, what is random about a sample, and the loss."""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvF
from torchvision.utils import make_grid

from ..configuration_token_model import AutoregressiveTokenConfig, MaskedTokenConfig, TokenModelConfig
from ..modeling_token_model import AutoregressiveTokenModel, MaskedTokenModel, random_subsets
from ..modeling_vqgan import VQGANModel
from ..token_pipeline import VQGANTokenPipeline
from ..training.configuration import LR_SCHEDULERS, MAX_SEED, TRACKERS, check_values, option

MEAN_MASKED = 2 / math.pi  # the mean of cos(π/2 * u)


@dataclass
class TokenTrainingConfig:
    """How a model of tokens is trained. Every field is a flag of `train_token_model.py`."""

    # What a run reads and writes
    vqgan: str = option("", "VQGANModel whose tokens are modelled: Hub name or folder.", nonempty=True)
    dataset_name: str = option(
        "", "Images, or what encode_dataset.py made of them: Hub name, local path or package.", nonempty=True
    )
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    train_split: str = option("train", "Split to train on.")
    image_column: str | None = option(None, "Column with the images. Default: the only image column.")
    class_column: str | None = option(None, "Column with class numbers to condition on. Default: unconditional.")
    max_train_samples: int | None = option(None, "Use only the first so many rows.", at_least=1)
    cache_dir: str | None = option(None, "Where `datasets` keeps what it downloads.", role="place")
    output_dir: str = option(
        "runs/tokens", "Folder of the run: pipeline, sample grids, log and checkpoints.", nonempty=True, role="place"
    )
    overwrite_output_dir: bool = option(
        False, "Delete a run with other settings from output_dir. The same command again still resumes.", role="place"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "`latest` (none yet: a new run), or a checkpoint folder. The same command run again resumes without it, too.",
        role="place",
    )

    # From images to pixels; not used with an encoded dataset
    resolution: int | None = option(
        None, "Side in pixels of the square crops. Default: the model's sample_size.", at_least=1
    )
    resize: int | None = option(
        None, "Shorter side before cropping. Default: resolution. 0: keep the image's size.", at_least=0
    )
    center_crop: bool = option(True, "Crop the centre instead of a random place.")
    random_flip: bool = option(False, "Mirror half of the crops.")
    dataloader_num_workers: int = option(0, "Processes that load data, per training process.", at_least=0, role="place")

    # The model
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
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", role="watching"
    )

    # What it learns
    random_order: float = option(
        0.0,
        "Autoregressive: positions come in random order at first, in ever fewer samples from 2/3 of this share of the "
        "training on, and row by row after it (RAR: 0.75). 0: always row by row.",
        at_least=0,
        at_most=1,
    )
    label_dropout: float = option(
        0.1, "Share of samples trained without their class, for classifier-free guidance.", at_least=0, at_most=1
    )
    ema_decay: float = option(
        0.9999, "Largest decay of the averaged weights, which the pipeline gets; it warms up.", at_least=0, at_most=1
    )

    # Optimisation
    train_batch_size: int = option(64, "Samples per process and forward pass.", at_least=1)
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.", at_least=1)
    max_train_steps: int | None = option(None, "Optimizer steps. Default: what num_train_epochs gives.", at_least=1)
    num_train_epochs: int = option(100, "Passes over the data, if max_train_steps is not given.", at_least=1)
    learning_rate: float = option(4e-4, "Learning rate.", at_least=0)
    lr_scheduler: str = option("cosine", "Schedule, a name that diffusers' get_scheduler knows.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = option(500, "Steps of linear warm-up.", at_least=0)
    adam_beta1: float = option(0.9, "Adam's β1.", at_least=0, below=1)
    adam_beta2: float = option(0.96, "Adam's β2.", at_least=0, below=1)
    adam_weight_decay: float = option(0.03, "AdamW's weight decay.", at_least=0)
    adam_epsilon: float = option(1e-8, "Adam's ε.", above=0)
    max_grad_norm: float = option(1.0, "Clip the gradient to this norm. 0: never.", at_least=0)
    mixed_precision: str = option("no", "Autocast.", choices=("no", "bf16", "fp16"))
    cpu_threads: int | None = option(
        None, "Threads per process on CPU. Default: the cores shared evenly.", at_least=1, role="place"
    )
    seed: int = option(0, "Seed of everything random.", at_least=0, at_most=MAX_SEED)

    # Watching, keeping, sharing
    logging_steps: int = option(
        50, "Steps between lines of log.jsonl and tracker entries.", at_least=1, role="watching"
    )
    sample_steps: int = option(
        1000, "Steps between sample grids; there is always one at the end.", at_least=1, role="watching"
    )
    sample_images: int = option(
        32, "Images in a grid; with classes, shared among them, one row each.", at_least=1, role="watching"
    )
    sample_inference_steps: int = option(12, "Masked: passes of a sample.", at_least=1, role="watching")
    sample_guidance_scale: float = option(2.0, "Guidance of class-conditional samples.", at_least=0, role="watching")
    sample_temperature: float = option(1.0, "Temperature of samples.", at_least=0, role="watching")
    sample_top_k: int = option(0, "Samples choose among so many likeliest tokens. 0: all.", at_least=0, role="watching")
    sample_top_p: float = option(
        1.0, "Samples choose among the likeliest tokens of this probability.", above=0, at_most=1, role="watching"
    )
    checkpointing_steps: int = option(
        1000, "Steps between checkpoints; there is always one at the end.", at_least=1, role="watching"
    )
    checkpoints_total_limit: int | None = option(
        2, "Keep only the latest so many checkpoints.", at_least=1, role="watching"
    )
    report_to: str | None = option(
        None, "Tracker, as Accelerate names it: tensorboard, wandb, trackio, all.", choices=TRACKERS, role="place"
    )
    push_to_hub: bool = option(False, "Push the pipeline to the Hub at every checkpoint.", role="place")
    hub_model_id: str | None = option(None, "Repository to push to. Default: the name of output_dir.", role="place")
    hub_token: str | None = option(None, "Token to push with. Default: the one of `hf auth login`.", role="secret")
    hub_private_repo: bool | None = option(None, "Make a new repository private.", role="place")
    hub_license: str | None = option(
        None, "Licence of the weights for the model card, as the Hub names it.", role="place"
    )

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


@torch.no_grad()
def raw_indices(vqgan: VQGANModel, batch: dict[str, Tensor]) -> Tensor:
    """
    The batch's indices `(B, h, w)` or `(B, h, w, n)`, int64, whichever of the three forms of `LatentSamples` it has.

    Raises:
        ValueError: for encoded indices that the VQ-GAN does not have.
    """
    if "pixel_values" in batch:
        return vqgan.encode_indices(batch["pixel_values"])
    if "latents" in batch:
        return vqgan.quantize(batch["latents"]).indices
    indices = batch["indices"].long()
    codes, several = vqgan.quantize.num_codes, vqgan.quantize.num_codebooks
    expected = "(B, h, w)" if several == 1 else f"(B, h, w, {several})"
    if indices.shape[3:] != (() if several == 1 else (several,)) or indices.min() < 0 or indices.max() >= codes:
        raise ValueError(
            f"indices of shape {tuple(indices.shape)} in [{indices.min()}, {indices.max()}]: this VQ-GAN has indices "
            f"{expected} in [0, {codes - 1}]. Encode the dataset with it."
        )
    return indices


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
        # Hashed: torch's generator takes 32 bits of its seed, so sums of seed and number would meet.
        generator = torch.Generator().manual_seed(random.Random(f"{config.seed} {number}").getrandbits(32))
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


def draw_samples(pipeline: VQGANTokenPipeline, config: TokenTrainingConfig) -> Image.Image:
    """A grid of samples, the same randomness every time; with classes, one row per class (as many as there is room)."""
    classes = len(pipeline.config.id2label or {})
    per_row = max(1, config.sample_images // classes) if classes else math.ceil(config.sample_images**0.5)
    rows = min(classes, config.sample_images)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        num_images=per_row if classes else config.sample_images,
        class_labels=list(range(rows)) if classes else None,
        guidance_scale=config.sample_guidance_scale if classes else 1.0,
        temperature=config.sample_temperature,
        top_k=config.sample_top_k,
        top_p=config.sample_top_p,
        num_inference_steps=config.sample_inference_steps if config.token_model == "masked" else None,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="pt",
    ).images
    return tvF.to_pil_image(make_grid(images.float().cpu(), nrow=per_row, pad_value=1.0))
