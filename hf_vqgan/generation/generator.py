"""Training a generative model on top of a frozen tokenizer: what diffusion and token models have in common."""

import contextlib
import copy
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvF
from torchvision.utils import make_grid

from ..data.datasets import ImageTransform, collate_samples
from ..data.images import DatasetSource, check_splits
from ..files.options import option
from ..files.sources import check_model_folder
from ..modeling_vqgan import VQGANModel
from ..training.checkpoint import LossScale, NamedAverages, NamedOptimizer, Part
from ..training.configuration import LR_SCHEDULERS, DatasetOptions, HubOptions, OptimizationOptions, RunOptions
from ..training.optimization import build_optimizer, clip_gradient, step_optimizers
from ..training.plan import format_plan
from ..training.run_folder import RunFolder
from ..training.setup import Batches, step_batches
from ..training.task import RunState, StepOutput, Task, due
from .samples import EncodedSamples, LatentSamples, encode_samples


# Python collects the fields of bases from the last to the first: read these from below.
@dataclass
class GeneratorOptions(HubOptions, RunOptions, OptimizationOptions, DatasetOptions):
    """The tokenizer below, classes, averages and samples."""

    vqgan: str = option("", "VQGANModel whose latents or tokens are modelled: Hub name or folder.", nonempty=True)
    dataset_name: str = option(
        "",
        "Images, or what `hf-vqgan encode` made of them: Hub name, local path or package.",
        describes_dataset=True,
        nonempty=True,
    )
    class_column: str | None = option(None, "Column with class numbers to condition on. Default: unconditional.")
    resolution: int | None = option(
        None, "Side in pixels of the square crops. Default: the model's sample_size.", at_least=1
    )
    center_crop: bool = option(True, "Crop the centre instead of a random place.")
    random_flip: bool = option(False, "Mirror half of the crops.")
    dataloader_num_workers: int = option(0, "Processes that load data, per training process.", at_least=0, role="place")
    latent_cache_gb: float = option(
        2.0,
        "Encode once, before training, if there is no random crop or flip and the result takes at most so many GB.",
        at_least=0,
        role="watching",
    )
    label_dropout: float = option(
        0.1, "Share of samples trained without their class, for classifier-free guidance.", at_least=0, at_most=1
    )
    ema_decay: float = option(
        0.9999, "Largest decay of the averaged weights, which the pipeline gets; it warms up.", at_least=0, at_most=1
    )
    train_batch_size: int = option(64, "Samples per process and forward pass.", at_least=1)
    num_train_epochs: int = option(100, "Passes over the data, if max_train_steps is not given.", at_least=1)
    learning_rate: float = option(2e-4, "Learning rate.", at_least=0)
    lr_scheduler: str = option(
        "constant_with_warmup", "Schedule, a name that diffusers' get_scheduler knows.", choices=LR_SCHEDULERS
    )
    lr_warmup_steps: int = option(500, "Steps of linear warm-up.", at_least=0)
    adam_beta1: float = option(0.9, "Adam's β1.", at_least=0, below=1)
    adam_beta2: float = option(0.99, "Adam's β2.", at_least=0, below=1)
    logging_steps: int = option(
        50, "Steps between lines of log.jsonl and tracker entries.", at_least=1, role="watching"
    )
    sample_steps: int = option(
        1000, "Steps between sample grids; there is always one at the end.", at_least=1, role="watching"
    )
    sample_images: int = option(
        32, "Images in a grid; with classes, shared among them, one row each.", at_least=1, role="watching"
    )
    sample_inference_steps: int = option(30, "Scheduler steps of a sample.", at_least=1, role="watching")
    sample_guidance_scale: float = option(2.0, "Guidance of class-conditional samples.", at_least=0, role="watching")
    checkpointing_steps: int = option(
        1000, "Steps between checkpoints; there is always one at the end.", at_least=1, role="watching"
    )


@dataclass
class GeneratorState(RunState):
    """A generator's run. `network` is as Accelerate prepared it (DDP with many processes)."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel
    pipeline: DiffusionPipeline  # with a copy of the network, which has the averaged weights of `update_pipeline`


class GeneratorTask(Task):
    """
    A network that models what a frozen [`VQGANModel`] makes of images.

    Args:
        samples ([`LatentSamples`]): Rows of the training split.
        component (`str`): The network's name in pipeline and checkpoints.
        form (`str`): In which it takes images, `"latents"` or `"indices"`.
    """

    component: ClassVar[str]
    form: ClassVar[str]
    unit = "samples"
    shown = ("loss", "samples_per_second", "data_wait")
    state: GeneratorState

    def __init__(self, state: GeneratorState, samples: LatentSamples):
        self.state = state
        self.samples: LatentSamples | EncodedSamples = samples

    # ------------------------------------------------------------------------------------------- what kinds differ in

    @abstractmethod
    def batch_loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss of one micro-batch: a function of the network, the samples and their numbers."""

    @abstractmethod
    def encode(self, batch: dict[str, Any]) -> Tensor:
        """A batch in the task's `form`, whichever form its rows have."""

    @abstractmethod
    def draw_samples(self, config: Any) -> Image.Image:
        """A grid of `sample_images` of the pipeline's samples, the same noise every time."""

    @abstractmethod
    def describe_network(self) -> dict[str, str]:
        """Lines of the plan."""

    @abstractmethod
    def encoded_gigabytes(self) -> float:
        """What all samples take in memory once they are encoded."""

    def measure(self) -> dict[str, Any]:
        """More of the final metrics. All processes call it together."""
        return {}

    # --------------------------------------------------------------------------------------------------- before

    @property
    def vqgan(self) -> VQGANModel:
        return self.state.pipeline.vqvae

    def describe_plan(self) -> str:
        state, config, samples = self.state, self.state.config, self.samples
        size, seen = self.encoded_gigabytes(), config.max_train_steps * state.global_batch
        if not samples.fixed:
            encoding = "encoded at every step, as crops are random"
        elif size > config.latent_cache_gb:
            encoding = f"encoded at every step, as all of them, {size:.1f} GB, are more than --latent_cache_gb"
        else:
            encoding = f"encoded once, {size:.2g} GB"
        lines = {
            "data": f"{config.dataset_name}: {len(samples):,} rows of {samples.kind}, {len(samples.classes)} classes; "
            f"{encoding}",
            **self.describe_network(),
            "steps": f"{config.max_train_steps:,} of {state.global_batch} samples = {seen / len(samples):.1f} epochs",
            "device": f"{state.accelerator.device}, mixed precision {config.mixed_precision}",
            "output": config.output_dir,
        }
        return format_plan(lines)

    def checkpoint_parts(self) -> dict[str, Part]:
        state = self.state
        network = state.accelerator.unwrap_model(state.network)
        return {
            self.component: network,
            "optimizer": NamedOptimizer(state.optimizer, **{self.component: network}),
            "scheduler": state.scheduler,
            "averages": NamedAverages(state.ema, network),
            "progress": state,
            "loss_scale": LossScale(state.accelerator),
        }

    def prepare(self) -> None:
        """Encode all samples, if they are the same in every epoch and fit into `latent_cache_gb`."""
        config, samples = self.state.config, self.samples
        if samples.fixed and self.encoded_gigabytes() <= config.latent_cache_gb:
            self.samples = encode_samples(
                samples,
                self.encode,
                self.form,
                self.state.accelerator,
                batch_size=config.train_batch_size,
                num_workers=config.dataloader_num_workers,
            )

    # ---------------------------------------------------------------------------------------------------- steps

    def batches(self, stop: int) -> Batches:
        return step_batches(self.state, self.samples, stop)

    def take_step(self, micro_batches: list[dict[str, Any]], run: RunFolder | None = None) -> StepOutput:
        """One optimizer step; the averages follow unless a loss or the gradient's norm is not finite."""
        state, accelerator = self.state, self.state.accelerator
        losses = []
        for number, batch in enumerate(micro_batches, start=1):
            # Processes exchange gradients at the last micro-batch only.
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last else accelerator.no_sync(state.network):
                loss = self.batch_loss(batch)
                accelerator.backward(loss / len(micro_batches))
            losses.append(loss.detach())
        loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        norm = clip_gradient(accelerator, state.optimizer, state.config.max_grad_norm)
        nonfinite = tuple(name for name, value in (("loss", loss), ("grad_norm", norm)) if not math.isfinite(value))
        step_optimizers(accelerator, [(state.optimizer, state.scheduler)], apply=not nonfinite)
        if not nonfinite:
            state.ema.step(state.network.parameters())
        state.step += 1
        return StepOutput({"loss": loss}, norm, nonfinite=nonfinite)

    def rehearse_step(self, micro_batches: list[dict[str, Any]]) -> StepOutput:
        return self.take_step(micro_batches)

    def rehearse_evaluation(self) -> str:
        self.update_pipeline()
        self.draw_samples(dataclasses.replace(self.state.config, sample_images=1))
        return "a sample"

    def fit(self) -> DiffusionPipeline:
        """All steps in memory, without a folder. Returns the pipeline with the averaged weights."""
        state, config = self.state, self.state.config
        self.prepare()
        with contextlib.closing(self.batches(config.max_train_steps)) as loader:
            while state.step < config.max_train_steps:
                output = self.take_step([next(loader) for _ in range(config.gradient_accumulation_steps)])
                if output.nonfinite and state.accelerator.scaler is None:
                    raise FloatingPointError(f"step {state.step}: not finite: {', '.join(output.nonfinite)}.")
        self.update_pipeline()
        return state.pipeline

    # --------------------------------------------------------------------------------------------------- between

    def update_pipeline(self) -> None:
        self.state.ema.copy_to(self.state.pipeline.components[self.component].parameters())

    def log_row(self, output: StepOutput) -> dict[str, float]:
        return {
            "learning_rate": self.state.scheduler.get_last_lr()[0],
            "ema_decay": self.state.ema.cur_decay_value,
        }

    def report(self, run: RunFolder, output: StepOutput, last: bool) -> str | None:
        state, config = self.state, self.state.config
        if (due(state.step, config.sample_steps) or last) and state.accelerator.is_main_process:
            self.update_pipeline()
            run.save_picture(f"samples-{state.step}.png", self.draw_samples(config), state.step)
        if due(state.step, config.checkpointing_steps) or last:
            run.write_metrics({
                "loss": output.losses["loss"],
                "steps": state.step,
                "seconds": round(state.seconds, 1),
                "samples_per_second": state.step * state.global_batch / state.seconds,
                **(self.measure() if last else {}),
            })  # fmt: skip
        return None

    def save_model(self, folder: Path) -> None:
        self.update_pipeline()
        self.state.pipeline.save_pretrained(folder)


def load_tokenizer(source: str, device: torch.device) -> VQGANModel:
    """A frozen [`VQGANModel`] from the Hub or a folder."""
    check_model_folder(source)
    return VQGANModel.from_pretrained(source).eval().requires_grad_(False).to(device)


def build_state(
    config: GeneratorOptions,
    accelerator: Accelerator,
    network: nn.Module,
    pipeline_of: Callable[[nn.Module], DiffusionPipeline],
) -> GeneratorState:
    """
    A network's run before its first step, prepared by Accelerate: averages, optimizer and schedule.

    Args:
        config (`GeneratorOptions`): Knows its `max_train_steps`.
        pipeline_of (function): Makes a pipeline of a copy of the network, which gets the averaged weights.
    """
    averaged = copy.deepcopy(network).eval().requires_grad_(False).to(accelerator.device)
    ema = EMAModel(network.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    optimizer = build_optimizer(config, (network,), config.learning_rate)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    prepared = accelerator.prepare_model(network.train())
    return GeneratorState(config, accelerator, prepared, optimizer, schedule, ema, pipeline_of(averaged))


def load_rows(config: GeneratorOptions, accelerator: Accelerator) -> datasets.DatasetDict:
    """
    All splits of the dataset that the configuration names, the training split cut to `max_train_samples`.

    Raises:
        ValueError: if it has no such training split.
    """
    with accelerator.main_process_first():  # one process fills the dataset cache, the others read it
        splits = DatasetSource.of(config.dataset_name, config).load_splits()
    check_splits(splits, config.dataset_name, config.train_split)
    rows = splits[config.train_split]
    splits[config.train_split] = rows.select(range(min(len(rows), config.max_train_samples or len(rows))))
    return splits


def make_samples(config: GeneratorOptions, vqgan: VQGANModel, rows: datasets.Dataset, **options) -> LatentSamples:
    """Rows as the configuration says to read and crop them; `options` are more of [`LatentSamples`]."""
    resolution = config.resolution or vqgan.config.sample_size
    transform = ImageTransform(resolution, config.resize, config.center_crop, config.random_flip)
    return LatentSamples(
        rows, transform, config.dataset_name, config.image_column, config.class_column, config.seed, **options
    )


def first_batch(samples: LatentSamples, device: torch.device) -> dict[str, Any]:
    """The first sample as a batch, by which to see what form the samples have."""
    return send_to_device(collate_samples([samples[0]]), device)


def draw_grid(
    pipeline: DiffusionPipeline, config: GeneratorOptions, batch_argument: str, **options: Any
) -> Image.Image:
    """
    A grid of samples, the same randomness every time; with classes, one row per class (as many as there is room).

    Args:
        batch_argument (`str`): What the pipeline calls the number of images per class.
        options: More arguments for the pipeline.
    """
    classes = len(pipeline.config.id2label or {})
    per_row = max(1, config.sample_images // classes) if classes else math.ceil(config.sample_images**0.5)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        class_labels=list(range(min(classes, config.sample_images))) if classes else None,
        guidance_scale=config.sample_guidance_scale if classes else 1.0,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="pt",
        **{batch_argument: per_row if classes else config.sample_images},
        **options,
    ).images
    return tvF.to_pil_image(make_grid(images.float().cpu(), nrow=per_row, pad_value=1.0))
