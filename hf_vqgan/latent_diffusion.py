"""Training a diffusion model of a VQ-GAN's latents: its data, its loss, and the loop."""

import contextlib
import copy
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
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
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tvF
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from .configuration_training import check_values, option
from .data import EpochBatchSampler, ImageTransform, TrainingImages, find_image_column, load_splits
from .modeling_vqgan import VQGANModel
from .pipelines import VQGANLatentDiffusionPipeline, count_classes, normalize_latents, predict
from .run_folder import RunFolder
from .training import share_cpu_threads


@dataclass
class LatentDiffusionConfig:
    """How a latent diffusion model is trained. Every field is a flag of `train_latent_diffusion.py`."""

    # What a run reads and writes
    vqgan: str = option("", "VQGANModel whose latents are modelled: Hub name or folder.")
    dataset_name: str = option("", "Images, or what encode_dataset.py made of them: Hub name, local path or package.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    train_split: str = option("train", "Split to train on.")
    image_column: str | None = option(None, "Column with the images. Default: the only image column.")
    class_column: str | None = option(None, "Column with class numbers to condition on. Default: unconditional.")
    max_train_samples: int | None = option(None, "Use only the first so many rows.")
    cache_dir: str | None = option(None, "Where `datasets` keeps what it downloads.")
    output_dir: str = option("runs/diffusion", "Folder of the run: pipeline, sample grids, log and checkpoints.")
    overwrite_output_dir: bool = option(False, "Delete the run that is in output_dir, if there is one.")
    resume_from_checkpoint: str | None = option(
        None, "`latest`, or a checkpoint folder. Without it, the same command run again resumes too."
    )

    # From images to pixels; not used with an encoded dataset
    resolution: int | None = option(None, "Side in pixels of the square crops. Default: the model's sample_size.")
    resize: int | None = option(None, "Shorter side before cropping. Default: resolution. 0: keep the image's size.")
    center_crop: bool = option(True, "Crop the centre instead of a random place.")
    random_flip: bool = option(False, "Mirror half of the crops.")
    dataloader_num_workers: int = option(0, "Processes that load data, per training process.")

    # The denoiser
    denoiser: str = option("unet", "UNet2DModel or DiTTransformer2DModel.", choices=("unet", "dit"))
    block_out_channels: list[int] = option([128, 256, 256], "UNet: channels per level, highest resolution first.")
    layers_per_block: int = option(2, "UNet: residual blocks per level.")
    attention_levels: int = option(2, "UNet: so many of the lowest levels have attention.")
    norm_num_groups: int = option(32, "UNet: groups of every GroupNorm.")
    num_layers: int = option(12, "DiT: blocks.")
    num_attention_heads: int = option(6, "DiT: heads per block.")
    patch_size: int = option(2, "DiT: side in latents of a token.")
    attention_head_dim: int = option(64, "Both: channels per attention head.")
    gradient_checkpointing: bool = option(False, "Both: recompute activations in the backward pass to save memory.")

    # What it learns
    objective: str = option("flow_matching", "Flow ε - z, or a DDPM.", choices=("flow_matching", "ddpm"))
    prediction_type: str = option("v_prediction", "What a DDPM predicts.", choices=("epsilon", "v_prediction"))
    timestep_sampling: str = option(
        "logit_normal", "Training noise levels: mostly middle ones, or all alike.", choices=("logit_normal", "uniform")
    )
    flow_shift: float = option(1.0, "Flow matching: above 1 shifts noise levels up, for latents of many positions.")
    label_dropout: float = option(0.1, "Share of samples trained without their class, for classifier-free guidance.")
    ema_decay: float = option(0.9999, "Largest decay of the averaged weights, which the pipeline gets; it warms up.")

    # Optimisation
    train_batch_size: int = option(64, "Samples per process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.")
    max_train_steps: int | None = option(None, "Optimizer steps. Default: what num_train_epochs gives.")
    num_train_epochs: int = option(100, "Passes over the data, if max_train_steps is not given.")
    learning_rate: float = option(2e-4, "Learning rate.")
    lr_scheduler: str = option("constant_with_warmup", "Schedule, a name that diffusers' get_scheduler knows.")
    lr_warmup_steps: int = option(500, "Steps of linear warm-up.")
    adam_beta1: float = option(0.9, "Adam's β1.")
    adam_beta2: float = option(0.99, "Adam's β2.")
    adam_weight_decay: float = option(0.0, "AdamW's weight decay.")
    adam_epsilon: float = option(1e-8, "Adam's ε.")
    max_grad_norm: float = option(1.0, "Clip the gradient to this norm. 0: never.")
    mixed_precision: str = option("no", "Autocast.", choices=("no", "bf16", "fp16"))
    cpu_threads: int | None = option(None, "Threads per process on CPU. Default: the cores shared evenly.")
    seed: int = option(0, "Seed of everything random.")

    # Watching, keeping, sharing
    logging_steps: int = option(50, "Steps between lines of log.jsonl and tracker entries.")
    sample_steps: int = option(1000, "Steps between sample grids; there is always one at the end.")
    sample_images: int = option(32, "Images in a grid; with classes, shared among them, one row each.")
    sample_inference_steps: int = option(30, "Scheduler steps of a sample.")
    sample_guidance_scale: float = option(2.0, "Guidance of class-conditional samples.")
    checkpointing_steps: int = option(1000, "Steps between checkpoints; there is always one at the end.")
    checkpoints_total_limit: int | None = option(2, "Keep only the latest so many checkpoints.")
    report_to: str | None = option(None, "Tracker, as Accelerate names it: tensorboard, wandb, trackio, all.")
    push_to_hub: bool = option(False, "Share the pipeline on the Hub at the end.")
    hub_model_id: str | None = option(None, "Its repository, `user/name`. Default: the output folder's name.")
    hub_private_repo: bool = option(False, "Make the repository private.")
    hub_token: str | None = option(None, "Token for the Hub. Default: the one that is logged in.")

    def __post_init__(self):
        check_values(
            self,
            positive=("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "logging_steps",
                      "sample_steps", "sample_images", "sample_inference_steps", "checkpointing_steps", "patch_size",
                      "num_layers", "layers_per_block"),
            not_negative=("learning_rate", "lr_warmup_steps", "max_grad_norm", "attention_levels"),
        )  # fmt: skip
        for name in ("label_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1].")
        for name, what in (("vqgan", "the model"), ("dataset_name", "a dataset")):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name {what}, on the Hub or in a folder.")


# ---------------------------------------------------------------------------------------------------------------------
# Data


class LatentSamples(Dataset):
    """
    Rows of an image dataset, or of one that `encode_dataset.py` made, as `{"number", "label", NAME}` with NAME one of
    `latents` `(D, h, w)`, `indices` `(h, w[, n])` and `pixel_values` `(3, H, W)`.

    Sample numbers count on across epochs, as in `TrainingImages`; the label is 0 without `class_column`.

    Raises:
        ValueError: if there are neither images nor latents, or no such class column.
    """

    def __init__(self, rows: datasets.Dataset, config: LatentDiffusionConfig, resolution: int):
        self.kind = next((name for name in ("latents", "indices") if name in rows.column_names), "pixel_values")
        self.classes: dict[int, str] = {}
        self.labels: list[int] | None = None
        if config.class_column is not None:
            self.labels, self.classes = _read_classes(rows, config.class_column)
        if self.kind == "pixel_values":
            column = find_image_column(rows, config.dataset_name, config.image_column)
            images = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            transform = ImageTransform(resolution, config.resize, config.center_crop, config.random_flip)
            self.items = TrainingImages(images.rename_columns({column: "image"}), transform, config.seed)
        else:
            self.items = rows.select_columns([self.kind]).with_format("torch")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = number % len(self)
        # TrainingImages counts epochs itself, and puts the next readable image in an unreadable one's place.
        item = self.items[number if self.kind == "pixel_values" else row]
        row = (row + item.get("unreadable", 0)) % len(self)
        label = self.labels[row] if self.labels is not None else 0
        return {"number": number, "label": label, self.kind: item[self.kind]}


def _read_classes(rows: datasets.Dataset, column: str) -> tuple[list[int], dict[int, str]]:
    """Class number of every row, and the names of all classes."""
    if column not in rows.column_names:
        raise ValueError(f"class_column={column!r} is not a column; columns: {', '.join(rows.column_names)}.")
    labels, feature = rows[column][:], rows.features[column]
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(f"class_column={column!r} is {feature}: expected class numbers from 0, none missing.")
    names = feature.names if isinstance(feature, datasets.ClassLabel) else [str(n) for n in range(max(labels) + 1)]
    return labels, dict(enumerate(names))


@torch.no_grad()
def latents_of(vqgan: VQGANModel, batch: dict[str, Tensor]) -> Tensor:
    """The batch's normalised latents `(B, D, h, w)`, float32, whichever of the three forms it has."""
    if "pixel_values" in batch:
        latents = vqgan.encode(batch["pixel_values"]).latents
    elif "indices" in batch:
        latents = vqgan.quantize.codes(batch["indices"].long())
    else:
        latents = batch["latents"]
    return normalize_latents(vqgan, latents.float())


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


# ---------------------------------------------------------------------------------------------------------------------
# The run


class PipelineRunFolder(RunFolder):
    """A run's output folder whose model is a diffusers pipeline."""

    def _save_model(self, model: VQGANLatentDiffusionPipeline, folder: Path) -> None:
        model.save_pretrained(folder)


@dataclass
class Progress:
    """How far a run is; saved with its checkpoints."""

    step: int = 0
    seconds: float = 0.0  # of training, over all interruptions

    def state_dict(self) -> dict:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.seconds = state["step"], state["seconds"]


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
    vqgan = VQGANModel.from_pretrained(config.vqgan).eval().requires_grad_(False).to(accelerator.device)
    with accelerator.main_process_first():  # one process fills the dataset cache, the others read it
        splits = load_splits(
            config.dataset_name,
            config.dataset_config_name,
            cache_dir=config.cache_dir,
            revision=config.dataset_revision,
        )
    if config.train_split not in splits:
        raise ValueError(
            f"dataset {config.dataset_name!r} has no split {config.train_split!r}; it has {', '.join(splits)}."
        )
    rows = splits[config.train_split]
    rows = rows.select(range(min(len(rows), config.max_train_samples or len(rows))))
    samples = LatentSamples(rows, config, config.resolution or vqgan.config.sample_size)
    first = {name: value[None] for name, value in samples[0].items() if torch.is_tensor(value)}
    shape = tuple(latents_of(vqgan, {name: value.to(accelerator.device) for name, value in first.items()}).shape[1:])
    if shape[0] != vqgan.config.vq_embed_dim or shape[1] != shape[2]:
        raise ValueError(
            f"{config.dataset_name!r} has latents of shape {shape}, but {config.vqgan!r} has "
            f"{vqgan.config.vq_embed_dim} channels, and the latents must be square. Encode the dataset with this model."
        )
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    max_steps = config.max_train_steps or max(1, config.num_train_epochs * len(samples) // global_batch)

    denoiser = build_denoiser(config, shape[0], shape[1], len(samples.classes))
    averaged = copy.deepcopy(denoiser).eval().requires_grad_(False).to(accelerator.device)
    scheduler, sampling_scheduler = build_schedulers(config)
    pipeline = VQGANLatentDiffusionPipeline(vqgan, averaged, sampling_scheduler, samples.classes or None)
    no_class = count_classes(denoiser)
    ema = EMAModel(denoiser.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    # Not prepared: Accelerate would advance a prepared schedule once per process and step.
    lr_schedule = get_scheduler(config.lr_scheduler, optimizer, config.lr_warmup_steps, max_steps)
    denoiser, optimizer = accelerator.prepare(denoiser.train(), optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(lr_schedule, ema, progress)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        latents = latents_of(vqgan, batch)
        noise, levels, dropped = (part.to(latents.device) for part in draw(batch["number"], shape, config))
        labels = torch.where(dropped, no_class, batch["label"]) if samples.classes else None
        if labels is None and no_class:  # a DiT
            labels = torch.full_like(batch["label"], no_class)
        with accelerator.autocast():
            return denoising_loss(denoiser, scheduler, latents, noise, levels, labels)

    accelerator.print(
        f"      data: {config.dataset_name}: {len(samples):,} rows of {samples.kind}, {len(samples.classes)} classes\n"
        f"   latents: {' x '.join(map(str, shape))}, scaling factor {vqgan.config.scaling_factor:.4g}, "
        f"shift {vqgan.config.shift_factor:.4g}\n"
        f"  denoiser: {type(averaged).__name__}, {sum(p.numel() for p in averaged.parameters()) / 1e6:.2f} M parameters"
        f", {config.objective}\n"
        f"     steps: {max_steps:,} of {global_batch} samples = {max_steps * global_batch / len(samples):.1f} epochs\n"
        f"    device: {accelerator.device}, mixed precision {config.mixed_precision}\n"
        f"    output: {config.output_dir}"
    )
    if dry_run:
        with torch.no_grad():
            loss_of(torch.utils.data.default_collate([samples[0]]))
        return {}

    run = PipelineRunFolder(config, None, accelerator)  # type: ignore[arg-type]  # has the fields that it reads
    if checkpoint := run.open():
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"Resuming from {checkpoint} at step {progress.step}.")
    run.truncate_log(progress.step)
    if config.report_to:
        accelerator.init_trackers("vqgan_latent_diffusion", config={k: str(v) for k, v in vars(config).items()})

    per_step = config.gradient_accumulation_steps * accelerator.num_processes
    sampler = EpochBatchSampler(
        len(samples),
        config.train_batch_size,
        num_batches=(max_steps - progress.step) * per_step,
        seed=config.seed,
        start=progress.step * per_step,
    )
    loader = DataLoader(samples, batch_sampler=sampler, num_workers=config.dataloader_num_workers)
    batches = iter(accelerator.prepare_data_loader(loader))
    bar = tqdm(total=max_steps, initial=progress.step, desc="train", disable=not accelerator.is_main_process)
    started = time.perf_counter() - progress.seconds
    metrics: dict[str, float] = {}
    while progress.step < max_steps:
        losses = []
        for micro in range(config.gradient_accumulation_steps):
            last_micro = micro == config.gradient_accumulation_steps - 1
            with contextlib.nullcontext() if last_micro else accelerator.no_sync(denoiser):
                losses.append(loss_of(next(batches)) / config.gradient_accumulation_steps)
                accelerator.backward(losses[-1])
        loss = accelerator.reduce(torch.stack(losses).detach().sum(), "mean").item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {progress.step}: the loss is {loss}. Lower --learning_rate.")
        grad_norm = accelerator.clip_grad_norm_(denoiser.parameters(), config.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        lr_schedule.step()
        ema.step(denoiser.parameters())
        progress.step += 1
        progress.seconds = time.perf_counter() - started

        bar.update()
        last = progress.step == max_steps
        if progress.step % config.logging_steps == 0 or last:
            row = {
                "step": progress.step,
                "loss": loss,
                "grad_norm": float(grad_norm),
                "learning_rate": lr_schedule.get_last_lr()[0],
                "ema_decay": ema.cur_decay_value,
                "samples_per_second": progress.step * global_batch / progress.seconds,
            }
            run.log(row)
            bar.set_postfix(loss=f"{loss:.3f}")
        sampling = progress.step % config.sample_steps == 0 or last
        saving = progress.step % config.checkpointing_steps == 0 or last
        if sampling or saving:
            ema.copy_to(averaged.parameters())
        if sampling and accelerator.is_main_process:
            run.save_picture(f"samples-{progress.step}.png", draw_samples(pipeline, config))
        if last:
            metrics = {
                "loss": loss,
                "steps": progress.step,
                "seconds": round(progress.seconds, 1),
                "samples_per_second": row["samples_per_second"],
            }
            run.write_metrics(metrics)
        if saving:
            run.save_checkpoint(pipeline, progress.step)
    bar.close()
    if not metrics:
        accelerator.print(f"The run in {config.output_dir} is already complete ({progress.step} steps).")
        metrics = run.read_metrics()
        ema.copy_to(averaged.parameters())
    if config.report_to:
        accelerator.end_training()
    if config.push_to_hub and accelerator.is_main_process:
        repository = config.hub_model_id or Path(config.output_dir).resolve().name
        pipeline.push_to_hub(repository, private=config.hub_private_repo, token=config.hub_token)
        print(f"Pushed to {repository}.")
    return metrics


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
