"""Training a diffusion model of a VQ-GAN's latents."""

import copy
import dataclasses
import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms.v2 import functional as tvF
from torchvision.utils import make_grid

from ..hub.push import push_pipeline_to_hub
from ..modeling_vqgan import VQGANModel
from ..pipelines import VQGANLatentDiffusionPipeline, count_classes, normalize_latents
from ..training.loop import run_task
from ..training.optimization import build_optimizer
from ..training.setup import build_accelerator
from .denoisers import LatentDiffusionConfig, build_denoiser, build_schedulers, denoising_loss, draw
from .generator import GeneratorState, GeneratorTask, count_steps, load_samples, load_tokenizer
from .samples import LatentSamples, raw_latents


def train_latent_diffusion(config: LatentDiffusionConfig, dry_run: bool = False) -> dict[str, float]:
    """
    Train a denoiser on the latents of `config.vqgan`, and leave in `config.output_dir` a
    [`VQGANLatentDiffusionPipeline`] with the averaged weights, which `DiffusionPipeline.from_pretrained` loads, and
    samples-N.png, metrics.json, log.jsonl, training_config.yaml, checkpoint-N/.

    With `dry_run`, check everything (data, sizes, a few steps, samples), print the plan, write nothing.

    Returns:
        The final metrics, as in metrics.json (empty for a dry run).

    Raises:
        ValueError, FileNotFoundError: for settings or data that cannot work, before anything is written.

        And what `run_task` raises.
    """
    accelerator = build_accelerator(config)
    set_seed(config.seed)
    vqgan = load_tokenizer(config.vqgan, accelerator.device)
    samples = load_samples(config, vqgan, accelerator)
    return run_task(build_task(config, accelerator, vqgan, samples), dry_run)


class DenoisingTask(GeneratorTask):
    """A denoiser of latents."""

    name = "vqgan_latent_diffusion"
    component = "denoiser"
    form = "latents"
    model_files = ("model_index.json", "denoiser/*.safetensors")
    push = staticmethod(push_pipeline_to_hub)

    def __init__(
        self, state: GeneratorState, samples: LatentSamples, scheduler: FlowMatchEulerDiscreteScheduler | DDPMScheduler
    ):
        super().__init__(state, samples)
        self.scheduler = scheduler  # of training; the pipeline has its own

    def encode(self, batch: dict[str, Any]) -> Tensor:
        return raw_latents(self.vqgan, batch)

    def batch_loss(self, batch: dict[str, Any]) -> Tensor:
        """With the noise, noise levels and dropped labels that belong to the samples."""
        state = self.state
        latents = normalize_latents(self.vqgan, self.encode(batch))
        drawn = draw(batch["number"], latents.shape[1:], state.config)
        noise, levels, dropped = (part.to(latents.device) for part in drawn)
        labels = None
        if no_class := count_classes(state.pipeline.denoiser):
            # A DiT cannot do without a class: an unconditional one always gets "no class".
            unconditional = state.pipeline.config.id2label is None
            labels = torch.where(dropped | unconditional, no_class, batch["label"])
        with state.accelerator.autocast():
            return denoising_loss(state.network, self.scheduler, latents, noise, levels, labels)

    def draw_samples(self, config: LatentDiffusionConfig) -> Image.Image:
        return draw_samples(self.state.pipeline, config)

    def encoded_gigabytes(self) -> float:
        denoiser = self.state.pipeline.denoiser.config
        return len(self.samples) * denoiser.in_channels * denoiser.sample_size**2 * 4 / 1e9

    def describe_network(self) -> dict[str, str]:
        denoiser, vqgan = self.state.pipeline.denoiser, self.vqgan.config
        side, parameters = denoiser.config.sample_size, sum(p.numel() for p in denoiser.parameters())
        return {
            "latents": f"{denoiser.config.in_channels} x {side} x {side}, scaling factor {vqgan.scaling_factor:.4g}, "
            f"shift {vqgan.shift_factor:.4g}",
            "denoiser": f"{type(denoiser).__name__}, {parameters / 1e6:.2f} M parameters, "
            f"{self.state.config.objective}",
        }


def build_task(
    config: LatentDiffusionConfig, accelerator: Accelerator, vqgan: VQGANModel, samples: LatentSamples
) -> DenoisingTask:
    """
    Networks, optimizer and schedules, prepared by Accelerate.

    Raises:
        ValueError: if samples, tokenizer and denoiser do not fit together.
    """
    config = dataclasses.replace(config, max_train_steps=count_steps(config, samples, accelerator))
    channels, side = latent_shape(config, samples, vqgan)
    denoiser = build_denoiser(config, channels, side, len(samples.classes))
    averaged = copy.deepcopy(denoiser).eval().requires_grad_(False).to(accelerator.device)
    scheduler, sampling_scheduler = build_schedulers(config)
    pipeline = VQGANLatentDiffusionPipeline(vqgan, averaged, sampling_scheduler, samples.classes or None)
    ema = EMAModel(denoiser.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    optimizer = build_optimizer(config, (denoiser,), config.learning_rate)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    network = accelerator.prepare_model(denoiser.train())
    state = GeneratorState(config, accelerator, network, optimizer, schedule, ema, pipeline)
    return DenoisingTask(state, samples, scheduler)


def latent_shape(config: LatentDiffusionConfig, samples: LatentSamples, vqgan: VQGANModel) -> tuple[int, int]:
    """
    Channels and side of the first sample's latents.

    Raises:
        ValueError: if they are not those of the model, or not square.
    """
    first = {name: value for name, value in samples[0].items() if name != "skipped"}
    latents = raw_latents(vqgan, send_to_device(default_collate([first]), vqgan.device))
    channels, height, width = latents.shape[1:]
    if channels != vqgan.config.vq_embed_dim or height != width:
        raise ValueError(
            f"{config.dataset_name!r} has latents of shape {(channels, height, width)}, but {config.vqgan!r} has "
            f"{vqgan.config.vq_embed_dim} channels, and the latents must be square. Encode the dataset with this model."
        )
    return channels, height


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
