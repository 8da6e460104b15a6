"""Training a diffusion model of a VQ-GAN's latents: networks, loss, one step, and the loop around it."""

import contextlib
import copy
import dataclasses
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import functional as tvF
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from ..data.datasets import EpochBatchSampler, ImageTransform
from ..data.images import load_splits
from ..files.sources import check_source
from ..hub.push import push_pipeline_to_hub
from ..modeling_vqgan import VQGANModel
from ..pipelines import VQGANLatentDiffusionPipeline, count_classes, normalize_latents, predict
from ..training.checkpoint import LossScale, NamedAverages, NamedOptimizer, Part
from ..training.configuration import LR_SCHEDULERS, MAX_SEED, TRACKERS, check_values, option
from ..training.run_folder import RunFolder
from ..training.setup import share_cpu_threads
from .samples import LatentSamples, encode_samples, raw_latents


@dataclass
class LatentDiffusionConfig:
    """How a latent diffusion model is trained. Every field is a flag of `train_latent_diffusion.py`."""

    # What a run reads and writes
    vqgan: str = option("", "VQGANModel whose latents are modelled: Hub name or folder.", nonempty=True)
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
        "runs/diffusion", "Folder of the run: pipeline, sample grids, log and checkpoints.", nonempty=True, role="place"
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
    latent_cache_gb: float = option(
        2.0,
        "Encode once, before training, if there is no random crop or flip and latents take at most so many GB.",
        at_least=0,
        role="watching",
    )

    # The denoiser
    denoiser: str = option("unet", "UNet2DModel or DiTTransformer2DModel.", choices=("unet", "dit"))
    block_out_channels: list[int] = option(
        [128, 256, 256], "UNet: channels per level, highest resolution first.", at_least=1, nonempty=True
    )
    layers_per_block: int = option(2, "UNet: residual blocks per level.", at_least=1)
    attention_levels: int = option(2, "UNet: so many of the lowest levels have attention.", at_least=0)
    norm_num_groups: int = option(32, "UNet: groups of every GroupNorm.", at_least=1)
    num_layers: int = option(12, "DiT: blocks.", at_least=1)
    num_attention_heads: int = option(6, "DiT: heads per block.", at_least=1)
    patch_size: int = option(2, "DiT: side in latents of a token.", at_least=1)
    attention_head_dim: int = option(64, "Both: channels per attention head.", at_least=1)
    gradient_checkpointing: bool = option(
        False, "Both: recompute activations in the backward pass to save memory.", role="watching"
    )

    # What it learns
    objective: str = option("flow_matching", "Flow ε - z, or a DDPM.", choices=("flow_matching", "ddpm"))
    prediction_type: str = option("v_prediction", "What a DDPM predicts.", choices=("epsilon", "v_prediction"))
    timestep_sampling: str = option(
        "logit_normal", "Training noise levels: mostly middle ones, or all alike.", choices=("logit_normal", "uniform")
    )
    flow_shift: float = option(
        1.0, "Flow matching: above 1 shifts noise levels up, for latents of many positions.", above=0
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
    learning_rate: float = option(2e-4, "Learning rate.", at_least=0)
    lr_scheduler: str = option(
        "constant_with_warmup", "Schedule, a name that diffusers' get_scheduler knows.", choices=LR_SCHEDULERS
    )
    lr_warmup_steps: int = option(500, "Steps of linear warm-up.", at_least=0)
    adam_beta1: float = option(0.9, "Adam's β1.", at_least=0, below=1)
    adam_beta2: float = option(0.99, "Adam's β2.", at_least=0, below=1)
    adam_weight_decay: float = option(0.0, "AdamW's weight decay.", at_least=0)
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
    sample_inference_steps: int = option(30, "Scheduler steps of a sample.", at_least=1, role="watching")
    sample_guidance_scale: float = option(2.0, "Guidance of class-conditional samples.", at_least=0, role="watching")
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


# ---------------------------------------------------------------------------------------------------------------------
# Networks, schedules, loss


def build_denoiser(config: LatentDiffusionConfig, channels: int, side: int, num_classes: int) -> nn.Module:
    """A denoiser of latents `(B, channels, side, side)`, with one more class embedding than classes: "no class"."""
    if config.denoiser == "dit":
        if side % config.patch_size:
            raise ValueError(f"patch_size={config.patch_size} does not divide the latents' side {side}.")
        denoiser = DiTTransformer2DModel(
            sample_size=side,
            in_channels=channels,
            patch_size=config.patch_size,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            num_embeds_ada_norm=max(num_classes, 1),  # it cannot do without; unconditional means never using it
        )
        # diffusers' DiT drops labels in every block anew, so that blocks of one pass disagree. `draw` does it here.
        for module in denoiser.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
    else:
        levels = len(config.block_out_channels)
        if side % 2 ** (levels - 1):
            raise ValueError(
                f"block_out_channels={config.block_out_channels} halve {levels - 1} times, which latents of side "
                f"{side} do not allow. Give fewer levels."
            )
        for name in ("norm_num_groups", "attention_head_dim"):
            if bad := [count for count in config.block_out_channels if count % getattr(config, name)]:
                raise ValueError(
                    f"{name}={getattr(config, name)} does not divide {bad} in block_out_channels. Set a common divisor."
                )
        attention = [level >= levels - config.attention_levels for level in range(levels)]
        denoiser = UNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
            up_block_types=tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
            attention_head_dim=config.attention_head_dim,
            norm_num_groups=config.norm_num_groups,
            num_class_embeds=num_classes + 1 if num_classes else None,
        )
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser


def build_schedulers(config: LatentDiffusionConfig):
    """The scheduler that makes training targets, and the one that the pipeline samples with."""
    if config.objective == "flow_matching":
        return (FlowMatchEulerDiscreteScheduler(shift=config.flow_shift) for _ in range(2))
    training = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=config.prediction_type,
        clip_sample=False,  # latents are not confined to [-1, 1]
        timestep_spacing="trailing",
    )
    return training, DDIMScheduler.from_config(training.config)


def denoising_loss(
    denoiser: nn.Module,
    scheduler: FlowMatchEulerDiscreteScheduler | DDPMScheduler,
    latents: Tensor,
    noise: Tensor,
    levels: Tensor,
    labels: Tensor | None,
) -> Tensor:
    """
    Mean squared error of the denoiser's prediction of ε - z (flow matching), ε or v, for latents z `(B, D, h, w)`.

    Args:
        levels (`Tensor` of shape `(B,)`): u in [0, 1): which of the scheduler's timesteps, 0 the noisiest.
        labels (`Tensor` of shape `(B,)`, *optional*): Class numbers.
    """
    timesteps = scheduler.timesteps.to(latents.device)[(levels * len(scheduler.timesteps)).long()]
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        noisy, target = scheduler.scale_noise(latents, timesteps, noise), noise - latents
    else:
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicts_noise = scheduler.config.prediction_type == "epsilon"
        target = noise if predicts_noise else scheduler.get_velocity(latents, noise, timesteps)
    return F.mse_loss(predict(denoiser, noisy, timesteps, labels), target)


def draw(numbers: Tensor, shape: tuple[int, ...], config: LatentDiffusionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """
    What is random about samples: noise `(B, *shape)`, noise level u in [0, 1) `(B,)`, and who loses its class `(B,)`.

    All three are functions of (seed, sample number), so neither the number of processes nor an interruption changes
    what is learnt.
    """
    noise, levels, dropped = [], [], []
    for number in numbers.tolist():
        # Hashed: torch's generator takes 32 bits of its seed, so sums of seed and number would meet.
        generator = torch.Generator().manual_seed(random.Random(f"{config.seed} {number}").getrandbits(32))
        noise.append(torch.randn(shape, generator=generator))
        if config.timestep_sampling == "logit_normal":  # https://huggingface.co/papers/2403.03206
            levels.append(torch.randn((), generator=generator).sigmoid())
        else:
            levels.append(torch.rand((), generator=generator))
        dropped.append(torch.rand((), generator=generator) < config.label_dropout)
    return torch.stack(noise), torch.stack(levels).clamp(max=1 - 1e-6), torch.stack(dropped)


# ---------------------------------------------------------------------------------------------------------------------
# One step


@dataclass
class DiffusionState:
    """What a run consists of. `denoiser` is as Accelerate prepared it (DDP with many processes)."""

    config: LatentDiffusionConfig
    accelerator: Accelerator
    denoiser: nn.Module
    scheduler: FlowMatchEulerDiscreteScheduler | DDPMScheduler  # of training; the pipeline has its own
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel
    pipeline: VQGANLatentDiffusionPipeline  # its denoiser has the averaged weights of the latest `update_pipeline`
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of training, over all interruptions

    @property
    def vqgan(self) -> VQGANModel:
        return self.pipeline.vqvae

    @property
    def global_batch(self) -> int:
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def update_pipeline(self) -> None:
        self.ema.copy_to(self.pipeline.denoiser.parameters())

    def state_dict(self) -> dict:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.seconds = state["step"], state["seconds"]


@dataclass
class StepOutput:
    """
    Args:
        loss (`float`): Of the whole batch, over micro-batches and processes.
        grad_norm (`float`): Before clipping.
    """

    loss: float
    grad_norm: float


def training_step(state: DiffusionState, micro_batches: list[dict[str, Tensor]]) -> StepOutput:
    """
    One optimizer step on a list of micro-batches of `LatentSamples`.

    Raises:
        FloatingPointError: before any weight changes, if the loss is not finite.
    """
    config, accelerator = state.config, state.accelerator
    losses = []
    for number, batch in enumerate(micro_batches, start=1):
        # Processes exchange gradients at the last micro-batch only.
        last = number == len(micro_batches)
        with contextlib.nullcontext() if last else accelerator.no_sync(state.denoiser):
            loss = batch_loss(state, batch)
            accelerator.backward(loss / len(micro_batches))
        losses.append(loss.detach())
    loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"step {state.step}: the loss is {loss}. Lower --learning_rate.")
    grad_norm = accelerator.clip_grad_norm_(state.denoiser.parameters(), config.max_grad_norm or math.inf)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.lr_schedule.step()
    state.ema.step(state.denoiser.parameters())
    state.step += 1
    return StepOutput(loss, float(grad_norm))


def batch_loss(state: DiffusionState, batch: dict[str, Tensor]) -> Tensor:
    """The loss of one micro-batch, with the noise, noise levels and dropped labels that belong to its samples."""
    latents = normalize_latents(state.vqgan, raw_latents(state.vqgan, batch))
    drawn = draw(batch["number"], latents.shape[1:], state.config)
    noise, levels, dropped = (part.to(latents.device) for part in drawn)
    labels = None
    if no_class := count_classes(state.pipeline.denoiser):
        # A DiT cannot do without a class: an unconditional one always gets "no class".
        unconditional = state.pipeline.config.id2label is None
        labels = torch.where(dropped | unconditional, no_class, batch["label"])
    with state.accelerator.autocast():
        return denoising_loss(state.denoiser, state.scheduler, latents, noise, levels, labels)


# ---------------------------------------------------------------------------------------------------------------------
# The run


class PipelineRunFolder(RunFolder):
    """A run's output folder whose model is a diffusers pipeline."""

    def _save_model(self, model: VQGANLatentDiffusionPipeline, folder: Path) -> None:
        model.save_pretrained(folder)


def train_latent_diffusion(config: LatentDiffusionConfig, dry_run: bool = False) -> dict[str, float]:
    """
    Train a denoiser on the latents of `config.vqgan`, and leave in `config.output_dir` a
    [`VQGANLatentDiffusionPipeline`] with the averaged weights, which `DiffusionPipeline.from_pretrained` loads, and
    samples-N.png, metrics.json, log.jsonl, training_config.yaml, checkpoint-N/.

    With `dry_run`, check everything (data, sizes, one forward pass), print the plan, write nothing.

    Returns:
        The final metrics, as in metrics.json (empty for a dry run).

    Raises:
        FileExistsError: if `output_dir` holds a different run.
        ValueError, FileNotFoundError: for settings or data that cannot work, before anything is written.
        FloatingPointError: if the loss stops being finite. Checkpoints stay as they were.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, log_with=config.report_to, project_dir=config.output_dir
    )
    share_cpu_threads(config, accelerator)
    set_seed(config.seed)
    check_source(config.vqgan)
    vqgan = VQGANModel.from_pretrained(config.vqgan).eval().requires_grad_(False).to(accelerator.device)
    samples = load_samples(config, vqgan, accelerator)
    state = build_state(config, accelerator, vqgan, samples)
    config = state.config
    accelerator.print(describe_plan(state, samples))
    if dry_run:
        with torch.no_grad():
            batch_loss(state, send_to_device(default_collate([samples[0]]), accelerator.device))
        return {}

    with PipelineRunFolder(config, None, accelerator) as run:
        if checkpoint := run.open():
            run.load_checkpoint(checkpoint, checkpoint_parts(state))
            accelerator.print(f"Resuming from {checkpoint} at step {state.step}.")
        run.truncate_log(state.step)
        if state.step < config.max_train_steps:
            run_steps(state, samples, run)
        else:
            accelerator.print(f"The run in {config.output_dir} is already complete ({state.step} steps).")
            push(state, run)
        return run.read_metrics()


def checkpoint_parts(state: DiffusionState) -> dict[str, Part]:
    """What a checkpoint holds, by name, but for the random states."""
    denoiser = state.accelerator.unwrap_model(state.denoiser)
    return {
        "denoiser": denoiser,
        "optimizer": NamedOptimizer(state.optimizer, denoiser=denoiser),
        "scheduler": state.lr_schedule,
        "averages": NamedAverages(state.ema, denoiser),
        "progress": state,
        "loss_scale": LossScale(state.accelerator),
    }


def run_steps(state: DiffusionState, samples: LatentSamples, run: PipelineRunFolder) -> None:
    """From the current step to the last one, with everything that happens between steps."""
    config, accelerator = state.config, state.accelerator
    if config.report_to:
        accelerator.init_trackers("vqgan_latent_diffusion", config={k: str(v) for k, v in run.settings.items()})
    if samples.fixed and cache_size(state, samples) <= config.latent_cache_gb:
        samples = encode_samples(
            samples, state.vqgan, accelerator, config.train_batch_size, config.dataloader_num_workers
        )
    loader = micro_batch_loader(state, samples)
    progress = tqdm(
        total=config.max_train_steps, initial=state.step, desc="train", disable=not accelerator.is_main_process
    )
    started = time.perf_counter() - state.seconds
    while state.step < config.max_train_steps:
        output = training_step(state, [next(loader) for _ in range(config.gradient_accumulation_steps)])
        state.seconds = time.perf_counter() - started
        progress.update()

        last = state.step == config.max_train_steps
        row = log_row(state, output)
        if state.step % config.logging_steps == 0 or last:
            run.log(row)
            progress.set_postfix(loss=f"{row['loss']:.3f}")
        sampling = state.step % config.sample_steps == 0 or last
        saving = state.step % config.checkpointing_steps == 0 or last
        if sampling or saving:
            state.update_pipeline()
        if sampling and accelerator.is_main_process:
            run.save_picture(f"samples-{state.step}.png", draw_samples(state.pipeline, config), state.step)
        if saving:
            run.write_metrics({
                "loss": row["loss"],
                "steps": state.step,
                "seconds": round(state.seconds, 1),
                "samples_per_second": row["samples_per_second"],
            })  # fmt: skip
            run.save_checkpoint(state.pipeline, state.step, checkpoint_parts(state))
            push(state, run)
    progress.close()
    if config.report_to:
        accelerator.end_training()


def push(state: DiffusionState, run: PipelineRunFolder) -> None:
    """Push the run to the Hub, if it is to be pushed."""
    config = state.config
    if config.push_to_hub and state.accelerator.is_main_process:
        push_pipeline_to_hub(
            run.folder,
            config.hub_model_id or run.folder.resolve().name,
            token=config.hub_token,
            private=config.hub_private_repo,
            license=config.hub_license,
            commit_message=f"Step {state.step} of {config.max_train_steps}",
        )


def load_samples(config: LatentDiffusionConfig, vqgan: VQGANModel, accelerator: Accelerator) -> LatentSamples:
    """The training rows that the configuration names, checked against the model."""
    with accelerator.main_process_first():  # one process fills the dataset cache, the others read it
        splits = load_splits(
            config.dataset_name, config.dataset_config_name, None, config.cache_dir, config.dataset_revision
        )
    if config.train_split not in splits:
        raise ValueError(
            f"dataset {config.dataset_name!r} has no split {config.train_split!r}; it has {', '.join(splits)}."
        )
    rows = splits[config.train_split]
    rows = rows.select(range(min(len(rows), config.max_train_samples or len(rows))))
    resolution = config.resolution or vqgan.config.sample_size
    transform = ImageTransform(resolution, config.resize, config.center_crop, config.random_flip)
    samples = LatentSamples(rows, transform, config.dataset_name, config.image_column, config.class_column, config.seed)
    channels, height, width = latent_shape(samples, vqgan)
    if channels != vqgan.config.vq_embed_dim or height != width:
        raise ValueError(
            f"{config.dataset_name!r} has latents of shape {(channels, height, width)}, but {config.vqgan!r} has "
            f"{vqgan.config.vq_embed_dim} channels, and the latents must be square. Encode the dataset with this model."
        )
    return samples


def latent_shape(samples: LatentSamples, vqgan: VQGANModel) -> tuple[int, int, int]:
    """`(D, h, w)` of the first sample's latents."""
    return tuple(raw_latents(vqgan, send_to_device(default_collate([samples[0]]), vqgan.device)).shape[1:])


def cache_size(state: DiffusionState, samples: LatentSamples) -> float:
    """Gigabytes that all samples' latents take in float32."""
    config = state.pipeline.denoiser.config
    return len(samples) * config.in_channels * config.sample_size**2 * 4 / 1e9


def build_state(
    config: LatentDiffusionConfig, accelerator: Accelerator, vqgan: VQGANModel, samples: LatentSamples
) -> DiffusionState:
    """Networks, optimizer and schedules, prepared by Accelerate."""
    channels, side, _ = latent_shape(samples, vqgan)
    denoiser = build_denoiser(config, channels, side, len(samples.classes))
    averaged = copy.deepcopy(denoiser).eval().requires_grad_(False).to(accelerator.device)
    scheduler, sampling_scheduler = build_schedulers(config)
    pipeline = VQGANLatentDiffusionPipeline(vqgan, averaged, sampling_scheduler, samples.classes or None)
    ema = EMAModel(denoiser.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    state = DiffusionState(config, accelerator, denoiser, scheduler, optimizer, None, ema, pipeline)
    if config.max_train_steps is None:
        steps = max(1, config.num_train_epochs * len(samples) // state.global_batch)
        state.config = dataclasses.replace(config, max_train_steps=steps)
    # Not prepared: Accelerate would advance a prepared schedule once per process and step.
    state.lr_schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=state.config.max_train_steps,
    )
    state.denoiser, state.optimizer = accelerator.prepare(denoiser.train(), optimizer)
    return state


def describe_plan(state: DiffusionState, samples: LatentSamples) -> str:
    """The plan of a run, as printed before it starts and by --dry_run."""
    config, denoiser, vqgan = state.config, state.pipeline.denoiser, state.vqgan.config
    size, seen = cache_size(state, samples), config.max_train_steps * state.global_batch
    if not samples.fixed:
        encoding = "encoded at every step, as crops are random"
    elif size > config.latent_cache_gb:
        encoding = f"encoded at every step, as all of them, {size:.1f} GB, are more than --latent_cache_gb"
    else:
        encoding = f"encoded once, {size:.2g} GB"
    side = denoiser.config.sample_size
    lines = {
        "data": f"{config.dataset_name}: {len(samples):,} rows of {samples.kind}, {len(samples.classes)} classes",
        "latents": f"{denoiser.config.in_channels} x {side} x {side}, scaling factor {vqgan.scaling_factor:.4g}, "
        f"shift {vqgan.shift_factor:.4g}; {encoding}",
        "denoiser": f"{type(denoiser).__name__}, {sum(p.numel() for p in denoiser.parameters()) / 1e6:.2f} M "
        f"parameters, {config.objective}",
        "steps": f"{config.max_train_steps:,} of {state.global_batch} samples = {seen / len(samples):.1f} epochs",
        "device": f"{state.accelerator.device}, mixed precision {config.mixed_precision}",
        "output": config.output_dir,
    }
    return "\n".join(f"{name:>10}: {text}" for name, text in lines.items())


def micro_batch_loader(state: DiffusionState, samples: Dataset) -> Iterator[dict[str, Tensor]]:
    """This process's micro-batches from the current step to the end of the run, on its device."""
    config, accelerator = state.config, state.accelerator
    per_step = config.gradient_accumulation_steps * accelerator.num_processes
    sampler = EpochBatchSampler(
        len(samples),
        config.train_batch_size,
        num_batches=(config.max_train_steps - state.step) * per_step,
        seed=config.seed,
        start=state.step * per_step,
    )
    loader = DataLoader(samples, batch_sampler=sampler, num_workers=config.dataloader_num_workers)
    return iter(accelerator.prepare_data_loader(loader))


def log_row(state: DiffusionState, output: StepOutput) -> dict[str, float]:
    """One line of log.jsonl."""
    return {
        "step": state.step,
        "loss": output.loss,
        "grad_norm": output.grad_norm,
        "learning_rate": state.lr_schedule.get_last_lr()[0],
        "ema_decay": state.ema.cur_decay_value,
        "samples_per_second": state.step * state.global_batch / state.seconds,
    }


def draw_samples(pipeline: VQGANLatentDiffusionPipeline, config: LatentDiffusionConfig) -> Image.Image:
    """A grid of samples from the same noise every time; with classes, one row per class (as many as there is room)."""
    classes = len(pipeline.config.id2label or {})
    per_row = max(1, config.sample_images // classes) if classes else math.ceil(config.sample_images**0.5)
    count = per_row * min(classes, config.sample_images) if classes else config.sample_images
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=1 if classes else count,
        class_labels=[number // per_row for number in range(count)] if classes else None,
        guidance_scale=config.sample_guidance_scale if classes else 1.0,
        num_inference_steps=config.sample_inference_steps,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="pt",
    ).images
    return tvF.to_pil_image(make_grid(images.float().cpu(), nrow=per_row, pad_value=1.0))
