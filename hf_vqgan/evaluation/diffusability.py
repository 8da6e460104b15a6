"""How well a small diffusion model learns the latents in a given number of steps."""

import copy

import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from torch import Tensor

from ..generation.denoisers import LatentDiffusionConfig, denoising_loss
from ..generation.diffusion import build_task
from ..generation.generator import load_rows, make_samples
from ..pipelines import normalize_latents
from ..training.setup import build_accelerator
from .latent_subject import Subject


def train_small_diffusion(subject: Subject, channels: list[int]) -> DiffusionPipeline:
    """A small UNet, trained for `config.diffusion_steps` steps on latents of zero mean and unit variance."""
    config, latents = subject.config, subject.latents
    settings = LatentDiffusionConfig(
        vqgan=subject.autoencoder.name,
        dataset_name=subject.dataset_name,
        dataset_config_name=config.dataset_config_name,
        dataset_revision=config.dataset_revision,
        cache_dir=config.cache_dir,
        train_split=config.diffusion_train_split,
        image_column=config.image_column,
        resolution=subject.pixels.shape[2],
        resize=config.resize,
        block_out_channels=channels,
        layers_per_block=1,
        attention_levels=1,
        attention_head_dim=32,
        train_batch_size=32,
        learning_rate=1e-3,
        lr_warmup_steps=min(50, config.diffusion_steps),
        ema_decay=0.99,
        max_train_steps=config.diffusion_steps,
        seed=config.seed,
    )
    accelerator = build_accelerator(settings)
    set_seed(settings.seed)
    # Whatever the model's own factors say, so that models compare.
    model = copy.deepcopy(subject.autoencoder.model).to(accelerator.device)
    model.config.scaling_factor, model.config.shift_factor = 1 / float(latents.std()), float(latents.mean())
    samples = make_samples(settings, model, load_rows(settings, accelerator)[settings.train_split])
    with torch.enable_grad():
        pipeline = build_task(settings, accelerator, model, samples).fit()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(latents.device)


@torch.no_grad()
def heldout_denoising_losses(subject: Subject, pipeline: DiffusionPipeline, levels: int = 8) -> Tensor:
    """Flow-matching loss of every image at `levels` evenly spread noise levels, `(N,)`."""
    generator, losses = subject.generator(), []
    for latents in subject.latents.split(1):
        repeated = normalize_latents(pipeline.vqvae, latents).expand(levels, *latents.shape[1:])
        noise = torch.randn(repeated.shape, generator=generator).to(repeated)
        at = ((torch.arange(levels) + 0.5) / levels).to(repeated.device)
        losses.append(denoising_loss(pipeline.denoiser, pipeline.scheduler, repeated, noise, at, None))
    return torch.stack(losses)
