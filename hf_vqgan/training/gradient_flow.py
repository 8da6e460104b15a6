"""How much of each loss's gradient arrives where: at the reconstruction, at z, and in the encoder.

The adversarial loss judges pixels, yet what it teaches has to pass through the decoder to z and the encoder to shape
the latent space. Here is how much of it gets there, beside the other losses, and whether they pull the same way.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import get_device_states

from ..losses.image_losses import adaptive_weight, adversarial_loss, last_layer_gradient, ramp, reconstruction_losses
from .step import TrainState, augment, generate, latent_losses, loss_scale, target_of

PLACES = ("x_hat", "z", "encoder_first", "encoder_last")


def measure_gradients(state: TrainState, pixels: Tensor) -> dict[str, float]:
    """
    Norms and directions of the gradient of every weighted loss term at four places, for one micro-batch `(B, 3, H, W)`
    per process, all processes together. It changes nothing and costs about as much as three steps.

    Returns:
        `gradient_PLACE_TERM`, the norm of weight * ∂term (for the adversarial term, λ is in the weight), and
        `cosine_PLACE_TERM`, its cosine with the sum of all terms' gradients there, for PLACE in `PLACES`: the
        reconstruction x̂, the latents z, the weights of the encoder's first and last convolution. A term without a
        gradient at a place (the quantizer's losses at x̂) is left out there. Nothing for a frozen encoder.
    """
    if state.config.decoder_only:
        return {}
    devices, _ = get_device_states(pixels)
    # In eval mode, a discriminator's spectral norms stay where they are.
    judging = state.discriminator is not None and state.discriminator.training
    try:
        if judging:
            state.discriminator.eval()
        with torch.random.fork_rng(devices):
            gradients = term_gradients(state, pixels)
    finally:
        if judging:
            state.discriminator.train()
    figures: dict[str, float] = {}
    for place in PLACES:
        present = {term: rows[place] for term, rows in gradients.items() if place in rows}
        gram = gram_matrix(state, list(present.values()), per_image=place in ("x_hat", "z"))
        norms = gram.diagonal().clamp(min=0).sqrt()
        with_total = gram.sum(dim=1) / (norms * gram.sum().clamp(min=0).sqrt()).clamp(min=1e-30)
        for term, norm, cosine in zip(present, norms.tolist(), with_total.tolist(), strict=True):
            figures |= {f"gradient_{place}_{term}": norm, f"cosine_{place}_{term}": cosine}
    return figures


def term_gradients(state: TrainState, pixels: Tensor) -> dict[str, dict[str, Tensor]]:
    """For each term with a weight, its weighted gradient at each place that it has one."""
    # Without DDP around them: no gradient is exchanged here, and none is left in a parameter.
    unwrap = state.accelerator.unwrap_model
    output = generate(state, pixels, 0, unwrap(state.model))
    model, x_hat, target = state.vqgan, output.sample, target_of(state, pixels)
    inner = {
        "z": output.latents,
        "encoder_first": model.encoder.conv_in.weight,
        "encoder_last": model.encoder.conv_out.weight,
    }
    scale = loss_scale(state.accelerator)

    def gradient(loss: Tensor, at: Tensor) -> Tensor:
        return torch.autograd.grad(loss * scale, at, retain_graph=True)[0] / scale

    leaf = x_hat.detach().requires_grad_()
    with state.accelerator.autocast():
        terms = reconstruction_losses(leaf, target, state.perceptual)
    weights = {name: weight for name, weight in state.image_loss_weights().items() if weight}
    at_x_hat = {name: gradient(weight * terms[name], leaf) for name, weight in weights.items()}
    if state.adversarial:
        config = state.config
        logits = unwrap(state.discriminator)(augment(state, leaf, 0, 1, "fake"))
        adversarial = gradient(adversarial_loss(logits, config.adversarial_loss), leaf)
        weight = config.adversarial_weight * ramp(state.step, config.disc_start, config.disc_ramp_steps)
        if config.adaptive_weight:
            pair = (sum(at_x_hat.values()), adversarial)
            pair = torch.stack([last_layer_gradient(x_hat, model.last_layer, g * scale) / scale for g in pair])
            rec_at_last, adv_at_last = state.accelerator.reduce(pair, "mean")
            weight = weight * adaptive_weight(rec_at_last, adv_at_last, config.adaptive_weight_max)
        at_x_hat["adversarial"] = weight * adversarial

    found = {}
    for name, g in at_x_hat.items():
        share = state.config.adversarial_gradient_at_z if name == "adversarial" else 1.0
        arrived = torch.autograd.grad(x_hat, list(inner.values()), g * scale, retain_graph=True) if share else ()
        found[name] = {"x_hat": g} | {place: row * (share / scale) for place, row in zip(inner, arrived, strict=False)}
    weights = state.latent_loss_weights()
    for name, term in latent_losses(state, output, pixels).items():
        if weights[name] and term.requires_grad:
            arrived = torch.autograd.grad(
                weights[name] * term * scale, list(inner.values()), retain_graph=True, allow_unused=True
            )
            # The codebook loss has none: it moves codes only.
            found[name] = {
                p: row / scale for p, row in zip(inner, arrived, strict=True) if row is not None and row.any()
            }
    return found


def gram_matrix(state: TrainState, gradients: list[Tensor], per_image: bool) -> Tensor:
    """
    Inner products `(n, n)`, float64, of gradients of the mean over all processes' images.

    Images and latents are different ones on each process, so their inner products add up; weights are the same ones, so
    their gradients are averaged first.
    """
    rows = torch.stack([gradient.detach().flatten() for gradient in gradients])
    processes = state.accelerator.num_processes
    if not per_image:
        rows = state.accelerator.reduce(rows, "mean")
    gram = rows.double() @ rows.double().T
    if per_image and processes > 1:
        dist.all_reduce(gram)
        gram = gram / processes**2
    return gram.cpu()
