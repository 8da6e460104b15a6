"""Training a model of a VQ-GAN's tokens."""

import dataclasses
import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from ..data.images import TrainingOptions, find_validation_split
from ..hub.push import push_pipeline_to_hub
from ..modeling_token_model import AutoregressiveTokenModel, MaskedTokenModel
from ..modeling_vqgan import VQGANModel
from ..token_pipeline import VQGANTokenPipeline
from ..training.loop import run_task
from ..training.setup import build_accelerator, count_steps
from ..training.task import StepOutput
from .generator import (
    GeneratorState,
    GeneratorTask,
    build_state,
    draw_grid,
    first_batch,
    load_rows,
    load_tokenizer,
    make_samples,
)
from .likelihood import HeldOut, measure_bits, sum_bits
from .samples import EncodedSamples, LatentSamples, encode_samples, raw_indices
from .token_models import TokenTrainingConfig, build_token_model, draw, shuffled_share, token_loss

FORMS = ("indices", "latents")  # of an encoded dataset with both, the indices need no further work

INSTEAD = "Choose another --validation_split, or --likelihood_images 0."  # of what is held out and does not fit


def train_token_model(config: TokenTrainingConfig, dry_run: bool = False) -> dict[str, float]:
    """
    Train a model of the tokens of `config.vqgan`, and leave in `config.output_dir` a [`VQGANTokenPipeline`] with the
    averaged weights, which `DiffusionPipeline.from_pretrained` loads, and samples-N.png, metrics.json, log.jsonl,
    training_config.yaml, checkpoint-N/.

    With `dry_run`, check everything (data, sizes, a few steps, samples, likelihood), print the plan, write nothing.

    Returns:
        The final metrics, as in metrics.json (empty for a dry run).

    Raises:
        ValueError, FileNotFoundError: for settings or data that cannot work, before anything is written.

        And what `run_task` raises.
    """
    accelerator = build_accelerator(config)
    set_seed(config.seed)
    vqgan = load_tokenizer(config.vqgan, accelerator.device)
    samples, held_out = load_samples(config, vqgan, accelerator)
    task = build_task(config, accelerator, vqgan, samples, held_out)
    set_seed(config.seed, device_specific=True)  # processes that start with the same weights drop out different ones
    return run_task(task, dry_run)


def load_samples(
    config: TokenTrainingConfig, vqgan: VQGANModel, accelerator: Accelerator
) -> tuple[LatentSamples, HeldOut | None]:
    """
    The training rows, and those whose likelihood is measured, if any.

    Raises:
        ValueError: if the dataset has no such splits, or they have no such images or classes.
    """
    splits = load_rows(config, accelerator)
    samples = make_samples(config, vqgan, splits[config.train_split], preferred=FORMS)
    if not config.likelihood_images:
        return samples, None
    split = find_validation_split(splits, TrainingOptions.of(config.dataset_name, config)) or config.train_split
    rows = splits[split].select(range(min(len(splits[split]), config.likelihood_images)))
    central = dataclasses.replace(config, center_crop=True, random_flip=False)
    try:
        return samples, HeldOut(split, make_samples(central, vqgan, rows, preferred=FORMS))
    except ValueError as error:  # say, classes that a test split keeps to itself
        raise ValueError(f"split {split!r}, whose likelihood is to be measured: {error} {INSTEAD}") from error


class TokenTask(GeneratorTask):
    """A model of tokens."""

    name = "vqgan_tokens"
    component = "token_model"
    form = "indices"
    model_files = ("model_index.json", "token_model/*.safetensors")
    push = staticmethod(push_pipeline_to_hub)

    def __init__(self, state: GeneratorState, samples: LatentSamples, held_out: HeldOut | None):
        super().__init__(state, samples)
        self.held_out = held_out
        self.encoded_held_out: EncodedSamples | None = None  # from `prepare` on

    @property
    def model(self) -> AutoregressiveTokenModel | MaskedTokenModel:
        """The one with the averaged weights."""
        return self.state.pipeline.token_model

    def encode(self, batch: dict[str, Any]) -> Tensor:
        return raw_indices(self.vqgan, batch).int()

    def batch_loss(self, batch: dict[str, Any]) -> Tensor:
        """With the masks, orders and dropped labels that belong to the samples."""
        state, config = self.state, self.state.config
        indices = self.encode(batch).long()
        shuffled = shuffled_share(state.step / config.max_train_steps, config.random_order)
        draws = draw(batch["number"], self.model.config, config, shuffled).to(indices.device)
        labels = torch.where(draws.dropped, self.model.no_class, batch["label"])
        with state.accelerator.autocast():
            return token_loss(state.network, indices, labels, draws)

    def draw_samples(self, config: TokenTrainingConfig) -> Image.Image:
        return draw_samples(self.state.pipeline, config)

    def encoded_gigabytes(self) -> float:
        return len(self.samples) * math.prod(self.model.config.grid_shape) * 4 / 1e9  # int32

    def describe_network(self) -> dict[str, str]:
        shape, parameters = self.model.config.grid_shape, sum(p.numel() for p in self.model.parameters())
        lines = {
            "tokens": f"{' x '.join(map(str, shape))} of {self.model.config.num_vq_embeddings:,} codes",
            "model": f"{type(self.model).__name__}, {parameters / 1e6:.2f} M parameters",
        }
        if self.held_out is not None:
            lines["likelihood"] = f"of {len(self.held_out.samples):,} images of split {self.held_out.split!r}"
        return lines

    def log_row(self, output: StepOutput) -> dict[str, float]:
        row = super().log_row(output)
        if isinstance(self.model, AutoregressiveTokenModel):
            row["bits_per_token"] = output.losses["loss"] / math.log(2)
        return row

    # ----------------------------------------------------------------------------------------------- likelihood

    def prepare(self) -> None:
        """As for every generator; and encode what is held out, so that its faults are found before the first step."""
        super().prepare()
        if self.held_out is not None:
            config, samples = self.state.config, self.held_out.samples
            batch, workers = config.train_batch_size, config.dataloader_num_workers
            accelerator = self.state.accelerator
            self.encoded_held_out = encode_samples(samples, self.encode, self.form, accelerator, batch, workers)

    def measure(self) -> dict[str, Any]:
        """The likelihood of what is held out, with the averaged weights: see `measure_bits`."""
        if self.encoded_held_out is None:
            return {}
        self.update_pipeline()
        bits = measure_bits(self.model, self.encoded_held_out, self.state.config, self.state.accelerator)
        return bits | {"likelihood_split": self.held_out.split, "likelihood_images": len(self.encoded_held_out)}

    def rehearse_evaluation(self) -> str:
        rehearsed = super().rehearse_evaluation()
        if self.held_out is None:
            return rehearsed
        batch = first_batch(self.held_out.samples, self.state.accelerator.device)
        one = EncodedSamples(self.form, self.encode(batch).cpu(), batch["label"].cpu())
        sum_bits(self.model, one, range(1), self.state.config)
        return f"{rehearsed} and its likelihood"


def build_task(
    config: TokenTrainingConfig,
    accelerator: Accelerator,
    vqgan: VQGANModel,
    samples: LatentSamples,
    held_out: HeldOut | None = None,
) -> TokenTask:
    """
    The network, optimizer and schedule, prepared by Accelerate.

    Raises:
        ValueError: if samples, what is held out and tokenizer do not fit together.
    """
    config = dataclasses.replace(config, max_train_steps=count_steps(config, len(samples), accelerator))
    shape = grid_shape(config, samples, vqgan)
    if held_out is not None:
        check_held_out(config, samples, held_out, vqgan)
    network = build_token_model(config, vqgan, shape[0], len(samples.classes))

    def pipeline_of(averaged: nn.Module) -> VQGANTokenPipeline:
        return VQGANTokenPipeline(vqgan, averaged, samples.classes or None)

    return TokenTask(build_state(config, accelerator, network, pipeline_of), samples, held_out)


def grid_shape(config: TokenTrainingConfig, samples: LatentSamples, vqgan: VQGANModel) -> tuple[int, ...]:
    """
    Shape of the first sample's indices, `(h, w)` or `(h, w, n)`.

    Raises:
        ValueError: if they are not those of the VQ-GAN, or not square.
    """
    shape = tuple(raw_indices(vqgan, first_batch(samples, vqgan.device)).shape[1:])
    if shape[0] != shape[1]:
        raise ValueError(
            f"{config.dataset_name!r} has {shape[0]} x {shape[1]} tokens per image, but token models have a square "
            "grid. Encode square crops."
        )
    return shape


def check_held_out(config: TokenTrainingConfig, samples: LatentSamples, held_out: HeldOut, vqgan: VQGANModel) -> None:
    """
    Raises:
        ValueError: if what is held out has another grid or more classes than the training samples.
    """
    shape, found = (grid_shape(config, part, vqgan) for part in (samples, held_out.samples))
    if found != shape:
        raise ValueError(
            f"{config.dataset_name!r} has tokens of shape {shape} in split {config.train_split!r} and {found} in "
            f"{held_out.split!r}. {INSTEAD}"
        )
    largest = max(held_out.samples.labels or [0])
    if samples.classes and largest not in samples.classes:
        raise ValueError(
            f"{config.class_column!r} goes up to {largest} in split {held_out.split!r}, but {config.train_split!r} has "
            f"{len(samples.classes)} classes. {INSTEAD}"
        )


def draw_samples(pipeline: VQGANTokenPipeline, config: TokenTrainingConfig) -> Image.Image:
    """A grid of samples, as `draw_grid` lays it out."""
    return draw_grid(
        pipeline,
        config,
        "num_images",
        temperature=config.sample_temperature,
        top_k=config.sample_top_k,
        top_p=config.sample_top_p,
        num_inference_steps=config.sample_inference_steps if config.token_model == "masked" else None,
    )
