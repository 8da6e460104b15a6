"""Training a diffusion model of a VQ-GAN's latents."""

import dataclasses
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from ..hub.push import push_pipeline_to_hub
from ..modeling_vqgan import VQGANModel
from ..pipelines import VQGANLatentDiffusionPipeline, count_classes, normalize_latents
from ..training.loop import run_task
from ..training.setup import build_accelerator, count_steps
from .denoisers import LatentDiffusionConfig, build_denoiser, build_schedulers, denoising_loss, draw
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
    samples = make_samples(config, vqgan, load_rows(config, accelerator)[config.train_split])
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
        steps = config.sample_inference_steps
        return draw_grid(self.state.pipeline, config, "batch_size", num_inference_steps=steps)

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
    config = dataclasses.replace(config, max_train_steps=count_steps(config, len(samples), accelerator))
    channels, side = latent_shape(config, samples, vqgan)
    denoiser = build_denoiser(config, channels, side, len(samples.classes))
    scheduler, sampling_scheduler = build_schedulers(config)

    def pipeline_of(averaged: nn.Module) -> VQGANLatentDiffusionPipeline:
        return VQGANLatentDiffusionPipeline(vqgan, averaged, sampling_scheduler, samples.classes or None)

    return DenoisingTask(build_state(config, accelerator, denoiser, pipeline_of), samples, scheduler)


def latent_shape(config: LatentDiffusionConfig, samples: LatentSamples, vqgan: VQGANModel) -> tuple[int, int]:
    """
    Channels and side of the first sample's latents.

    Raises:
        ValueError: if they are not those of the model, or not square.
    """
    latents = raw_latents(vqgan, first_batch(samples, vqgan.device))
    channels, height, width = latents.shape[1:]
    if channels != vqgan.config.vq_embed_dim or height != width:
        raise ValueError(
            f"{config.dataset_name!r} has latents of shape {(channels, height, width)}, but {config.vqgan!r} has "
            f"{vqgan.config.vq_embed_dim} channels, and the latents must be square. Encode the dataset with this model."
        )
    return channels, height
