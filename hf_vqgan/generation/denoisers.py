"""Denoisers of latents: networks, noise schedules, and the loss that trains them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from ..data.randomness import torch_rng
from ..files.options import check_values, option
from ..pipelines import predict
from .generator import GeneratorOptions

DDPM_STEPS = 1000  # of noise; sampling takes at most as many


@dataclass
class DenoiserOptions:
    """The denoiser."""

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


@dataclass
class ObjectiveOptions:
    """What the denoiser learns."""

    objective: str = option("flow_matching", "Flow ε - z, or a DDPM.", choices=("flow_matching", "ddpm"))
    prediction_type: str = option("v_prediction", "What a DDPM predicts.", choices=("epsilon", "v_prediction"))
    timestep_sampling: str = option(
        "logit_normal", "Training noise levels: mostly middle ones, or all alike.", choices=("logit_normal", "uniform")
    )
    flow_shift: float = option(
        1.0, "Flow matching: above 1 shifts noise levels up, for latents of many positions.", above=0
    )


# Python collects the fields of bases from the last to the first: read these from below.
@dataclass
class LatentDiffusionConfig(ObjectiveOptions, DenoiserOptions, GeneratorOptions):
    """How a latent diffusion model is trained. Every field is a flag of `hf-vqgan train-diffusion`."""

    output_dir: str = option(
        "runs/diffusion", "Folder of the run: pipeline, sample grids, log and checkpoints.", nonempty=True, role="place"
    )

    def __post_init__(self):
        check_values(self)
        if self.objective == "ddpm" and self.sample_inference_steps > DDPM_STEPS:
            raise ValueError(
                f"sample_inference_steps={self.sample_inference_steps}: with objective='ddpm' there are {DDPM_STEPS}."
            )


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
        num_train_timesteps=DDPM_STEPS,
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
        generator = torch_rng(config.seed, "denoising", number)
        noise.append(torch.randn(shape, generator=generator))
        if config.timestep_sampling == "logit_normal":  # https://huggingface.co/papers/2403.03206
            levels.append(torch.randn((), generator=generator).sigmoid())
        else:
            levels.append(torch.rand((), generator=generator))
        dropped.append(torch.rand((), generator=generator) < config.label_dropout)
    return torch.stack(noise), torch.stack(levels).clamp(max=1 - 1e-6), torch.stack(dropped)
