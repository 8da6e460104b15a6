"""The training step as other trainers write it: what ours is checked against and timed against.

Both functions leave the gradients of one batch in the networks' parameters, as `training_step` has them before
clipping, and share its losses. Neither knows micro-batches, fp16 or several processes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_vqgan.blocks import LIGHT_BLOCKS
from hf_vqgan.losses.image_losses import (
    adversarial_loss,
    discriminator_losses,
    lecam_penalty,
    r1_penalty,
    reconstruction_losses,
)
from hf_vqgan.modeling_vqgan import VQGANOutput
from hf_vqgan.training.step import TrainState, augment, clip_gradients, generate, update_weights


def one_pass_gradients(state: TrainState, pixels: Tensor) -> Tensor:
    """
    LlamaGen's way: both networks learn from one pass of the generator. As there, the generator's loss also computes
    gradients of the discriminator's weights, which are thrown away.

    Args:
        pixels (`Tensor` of shape `(B, C, H, W)`): Images in [-1, 1].

    Returns:
        `Tensor`: λ, the adaptive weight.
    """
    output = generate(state, pixels, 0)
    balance = generator_gradients(state, output, pixels)
    for parameter in state.discriminator.parameters():
        parameter.grad = None
    discriminator_gradients(state, output.sample.detach(), pixels)
    return balance


def two_pass_gradients(state: TrainState, pixels: Tensor) -> Tensor:
    """
    taming-transformers' way: the discriminator's turn runs generator and LPIPS again. As Lightning does it there, the
    network whose turn it is not is frozen, so that the second pass keeps no graph.

    Args and Returns: as `one_pass_gradients`.
    """
    state.discriminator.requires_grad_(False)
    balance = generator_gradients(state, generate(state, pixels, 0), pixels)
    state.discriminator.requires_grad_(True)
    with torch.no_grad():
        output = generate(state, pixels, 0)
        image_loss(state, output.sample, pixels)
    discriminator_gradients(state, output.sample, pixels)
    return balance


def generator_gradients(state: TrainState, output: VQGANOutput, pixels: Tensor) -> Tensor:
    """Two `autograd.grad` calls at the decoder's last layer for λ, then the whole loss backwards. Returns λ."""
    config, last_layer = state.config, state.vqgan.last_layer
    reconstruction = image_loss(state, output.sample, pixels)
    fake_logits = state.discriminator(augment(state, output.sample, 0, 1, "fake"))
    adversarial = adversarial_loss(fake_logits, config.adversarial_loss)
    balance = torch.ones(())
    if config.adaptive_weight:
        (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
        balance = (of_reconstruction.norm() / (of_adversarial.norm() + 1e-4)).clamp(max=config.adaptive_weight_max)
    quantizer = sum(getattr(state.vqgan.config, f"{name}_weight") * loss for name, loss in output.losses.items())
    (reconstruction + balance * config.adversarial_weight * adversarial + quantizer).backward()
    return balance


def image_loss(state: TrainState, sample: Tensor, pixels: Tensor) -> Tensor:
    with state.accelerator.autocast():
        terms = reconstruction_losses(sample, pixels, state.perceptual)
    config = state.config
    return (
        config.l1_weight * terms["l1"] + config.l2_weight * terms["l2"] + config.perceptual_weight * terms["perceptual"]
    )


def discriminator_gradients(state: TrainState, sample: Tensor, pixels: Tensor) -> None:
    config, real = state.config, pixels.clone().requires_grad_(state.penalizing)
    real_logits = state.discriminator(augment(state, real, 0, 1, "real"))
    fake_logits = state.discriminator(augment(state, sample, 0, 1, "fake"))
    loss = 0.5 * sum(discriminator_losses(real_logits, fake_logits, config.adversarial_loss).values())
    if state.penalizing:
        loss = loss + config.r1_weight / 2 * config.r1_interval * r1_penalty(real_logits, real)
    if state.lecam_anchors:
        loss = loss + config.lecam_weight * lecam_penalty(real_logits, fake_logits, *state.lecam_anchors)
    loss.backward()


def use_plain_blocks(network: nn.Module) -> None:
    """Let the blocks in `network` be diffusers' own again: what `lighten` did, undone."""
    plain_blocks = {light: plain for plain, light in LIGHT_BLOCKS.items()}
    for block in network.modules():
        if type(block) in plain_blocks:
            block.__class__ = plain_blocks[type(block)]


def textbook_step(gradients: Callable[[TrainState, Tensor], Tensor], state: TrainState, pixels: Tensor) -> Tensor:
    """One optimizer step of both networks on `one_pass_gradients` or `two_pass_gradients`. Returns λ."""
    balance = gradients(state, pixels)
    clip_gradients(state)
    update_weights(state, apply=True)
    state.step += 1
    return balance
