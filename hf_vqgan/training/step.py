"""What a training run consists of, its step, and what a step does to the codes besides gradients."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import get_device_states, set_device_states

from ..data.randomness import rng, torch_rng
from ..losses.discriminators import diff_augment, draw_augmentations
from ..losses.image_losses import (
    LPIPS,
    adaptive_weight,
    adversarial_loss,
    discriminator_losses,
    last_layer_gradient,
    lecam_penalty,
    r1_penalty,
    ramp,
    reconstruction_losses,
    weighted_sum,
)
from ..losses.regularizers import FeatureAlignment, SpatialTransform, add_noise, draw_transform
from ..measurement.metrics import CodebookHealth, DiscriminatorHealth, LatentStatistics, gather_rows
from ..modeling_vqgan import VQGANModel, VQGANOutput
from .optimization import clip_gradient, step_optimizers
from .task import RunState, StepOutput

logger = logging.getLogger(__name__)


@dataclass
class TrainState(RunState):
    """A tokenizer's run. `model` and `discriminator` are as Accelerate prepared them (DDP with many processes)."""

    model: nn.Module
    discriminator: nn.Module | None
    perceptual: LPIPS | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    disc_optimizer: torch.optim.Optimizer | None
    disc_scheduler: torch.optim.lr_scheduler.LRScheduler | None
    health: CodebookHealth
    disc_health: DiscriminatorHealth = field(default_factory=DiscriminatorHealth)
    ema: EMAModel | None = None  # averages of the model's parameters
    alignment: FeatureAlignment | None = None  # as Accelerate prepared it
    lecam_anchors: tuple[float, float] | None = None  # moving averages of the real and the fake logits
    warned_of_codebook: bool = False
    warned_of_discriminator: bool = False
    latents: LatentStatistics | None = None  # measured when training is over

    @property
    def vqgan(self) -> VQGANModel:
        return self.accelerator.unwrap_model(self.model)

    @property
    def quantizing(self) -> bool:
        return self.step >= self.config.quantize_start

    @property
    def adversarial(self) -> bool:
        return self.discriminator is not None and self.step >= self.config.disc_start

    @property
    def penalizing(self) -> bool:
        """Whether this step has the lazy gradient penalty R1."""
        return bool(self.config.r1_weight) and (self.step - self.config.disc_start) % self.config.r1_interval == 0

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model has its averaged weights meanwhile, if the run keeps any."""
        if self.ema is None:
            yield
            return
        parameters = list(self.vqgan.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def image_loss_weights(self) -> dict[str, float]:
        config = self.config
        return {"l1": config.l1_weight, "l2": config.l2_weight, "perceptual": config.perceptual_weight}

    def latent_loss_weights(self) -> dict[str, float]:
        """The model's `NAME_weight` for each loss NAME of its quantizer, none before quantization starts; alignment."""
        config, model = self.config, self.vqgan
        weights = {
            name: getattr(model.config, f"{name}_weight") * self.quantizing for name in model.quantize.loss_names
        }
        if "entropy" in weights:
            remaining = 1 - ramp(self.step, config.quantize_start, config.entropy_anneal_steps)
            weights["entropy"] *= 1 + (config.entropy_anneal_factor - 1) * remaining
        if self.alignment is not None:
            weights["alignment"] = config.alignment_weight
        return weights

    def discriminator_loss_weights(self) -> dict[str, float]:
        """½ each for real and fake; γ/2 for R1, times the steps that one penalty stands for."""
        weights = {"disc_real": 0.5, "disc_fake": 0.5}
        if self.config.lecam_weight and self.lecam_anchors is not None:
            weights["disc_lecam"] = self.config.lecam_weight
        if self.penalizing:
            weights["disc_r1"] = self.config.r1_weight / 2 * self.config.r1_interval
        return weights

    COUNTERS: ClassVar[tuple[str, ...]] = (
        *RunState.COUNTERS,
        "warned_of_codebook",
        "warned_of_discriminator",
        "lecam_anchors",
    )

    def state_dict(self) -> dict:
        return super().state_dict() | {"health": self.health.state_dict(), "disc_health": self.disc_health.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.health.load_state_dict(state["health"])
        self.disc_health.load_state_dict(state["disc_health"])


# ---------------------------------------------------------------------------------------------------------------------
# One step


@dataclass
class TokenizerStepOutput(StepOutput):
    """
    Args:
        watched (`dict[str, float]`): How the game stands, empty before it starts. Means of real and fake logits
            (`logits_real`, `logits_fake`), shares on their right side of 0 (`disc_real_accuracy`,
            `disc_fake_accuracy`), and `gradient_ratio` = |λ w g_adv| / |g_rec| at the reconstruction.
        indices (`Tensor`): Codes of this process's images, `(M*B, h, w)` or `(M*B, h, w, n)`.
        latents (`Tensor`): Latents of this process's images, detached, `(M*B, D, h, w)`.
        adaptive_weight (`float`): λ; 0 while the discriminator is off.
        disc_grad_norm (`float`): Norm of the discriminator's gradient before clipping.
        restarted_codes (`int`): How many dead codes were restarted after the step.
    """

    watched: dict[str, float]
    indices: Tensor
    latents: Tensor
    adaptive_weight: float
    disc_grad_norm: float
    restarted_codes: int = 0


@dataclass
class ImageGradients:
    """What one micro-batch's image losses say about its reconstruction x̂ `(B, 3, H, W)`."""

    terms: dict[str, Tensor]
    reconstruction: Tensor  # ∂(Σ weight * term)/∂x̂ over L1, L2, perceptual
    adversarial: Tensor | None = None  # ∂L_adv/∂x̂, unweighted
    last_layer: Tensor | None = None  # (2, ...): the two gradients at the decoder's last weight
    watched: dict[str, Tensor] = field(default_factory=dict)


def training_step(state: TrainState, micro_batches: list[Tensor]) -> TokenizerStepOutput:
    r"""
    One optimizer step of both networks on a list of micro-batches `(B, 3, H, W)` in [-1, 1].

    The gradient is that of the textbook's L_rec + λ w L_adv + L_quantizer with λ from eq. 7 of VQ-GAN
    (https://huggingface.co/papers/2012.09841), got with less work: the two image gradients g_rec and g_adv stop at x̂,
    which suffices for λ, and their sum then goes through the generator once, by the chain rule
    ∂L/∂θ = (g_rec + λ w g_adv) ∂x̂/∂θ. The textbook propagates LPIPS and the discriminator twice. λ is that of the
    whole batch, of all micro-batches and processes, so accumulation equals a large batch.

    A step with NaN or infinity in a loss or gradient changes no weight; `StepOutput.nonfinite` names the terms.
    """
    config, accelerator, model = state.config, state.accelerator, state.model
    count = len(micro_batches)
    adversarial_factor = config.adversarial_weight * ramp(state.step, config.disc_start, config.disc_ramp_steps)

    # 1. Image losses of every micro-batch, back to the reconstruction. One micro-batch keeps its graph for 3; several
    #    run the generator again there, so that memory holds one at a time.
    passes, random_states = [], []
    for number, pixels in enumerate(micro_batches):
        random_states.append((torch.get_rng_state(), *get_device_states(pixels)))
        with (
            _no_sync_unless(accelerator, number == count - 1, state.discriminator),
            # Only the pass that 3 propagates backwards may tell DDP to expect gradients.
            _no_sync_unless(accelerator, count == 1, model),
        ):
            output = generate(state, pixels, number)
            passes.append(image_gradients(state, output.sample, pixels, number, count))

    # 2. λ balances the two gradients at the decoder's last layer.
    balance = torch.ones((), device=accelerator.device)
    if state.adversarial and config.adaptive_weight:
        reconstruction, adversarial = accelerator.reduce(sum(images.last_layer for images in passes) / count, "mean")
        balance = adaptive_weight(reconstruction, adversarial, config.adaptive_weight_max)

    # 3. One backward pass through decoder, quantizer and encoder: the product's gradient at x̂ is exactly `gradient`.
    latents, indices, figures = [], [], []
    for number, (pixels, images) in enumerate(zip(micro_batches, passes, strict=True)):
        with _no_sync_unless(accelerator, number == count - 1, model):
            if count > 1:
                with _random_state(random_states[number]):  # a quantizer's noise has to be the same both times
                    output = generate(state, pixels, number)
            terms = latent_losses(state, output, pixels)
            loss = weighted_sum(terms, state.latent_loss_weights())
            gradient = images.reconstruction
            if images.adversarial is not None:
                adversarial = balance * adversarial_factor * images.adversarial
                gradient = gradient + adversarial
                loss = loss + withhold(state, output, adversarial)
            accelerator.backward((loss + (output.sample * gradient).sum()) / count)
        latents.append(output.latents.detach())
        indices.append(output.indices)
        figures.append(images.terms | terms | images.watched)

    # 4. Both optimizers, unless something is not finite.
    means = mean_over_batch(accelerator, figures)
    watched = {name: means.pop(name) for name in passes[0].watched}
    norms = clip_gradients(state)
    nonfinite = tuple(name for name, value in (means | norms).items() if not math.isfinite(value))
    update_weights(state, apply=not nonfinite)
    applied = float(balance) if state.adversarial else 0.0
    if watched:
        rec, adv = watched.pop("rec_gradient_square"), watched.pop("adv_gradient_square")
        watched["gradient_ratio"] = applied * adversarial_factor * math.sqrt(adv / rec) if rec else 0.0
        if not nonfinite:
            move_lecam_anchors(state, watched)
    state.step += 1
    return TokenizerStepOutput(
        losses=means,
        watched=watched,
        indices=torch.cat(indices),
        latents=torch.cat(latents),
        adaptive_weight=applied,
        grad_norm=norms["grad_norm"],
        disc_grad_norm=norms["disc_grad_norm"],
        nonfinite=nonfinite,
    )


def loss_scale(accelerator: Accelerator) -> float:
    """By what every backward pass is scaled under fp16, where gradients of means over pixels would vanish; else 1."""
    return accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0


def generate(state: TrainState, pixels: Tensor, number: int, model: nn.Module | None = None) -> VQGANOutput:
    """
    The model's pass over micro-batch `number`, with latents transformed and noised if the run does so.

    Under autocast the latents keep the dtype of their convolution, so that they are what `sample` was computed from and
    gradients of `sample` can be taken at them. `sample` is in float32 or better, for the losses.
    """
    model = state.model if model is None else model
    config, transform = state.config, spatial_transform(state, pixels)

    def change(latents: Tensor) -> Tensor:
        if transform is not None:
            latents = transform(latents)
        if config.latent_noise_std:
            first = state.step * state.global_batch + place_in_batch(state, number, len(pixels))
            numbers = range(first, first + len(pixels))
            generators = [torch_rng(config.seed, "latent noise", sample) for sample in numbers]
            latents = add_noise(latents, config.latent_noise_std, generators)
        return latents

    changed = transform is not None or config.latent_noise_std
    with state.accelerator.autocast():
        output = model(pixels, force_not_quantize=not state.quantizing, latent_transform=change if changed else None)
    output.sample = at_least_float32(output.sample)
    return output


def place_in_batch(state: TrainState, number: int, size: int) -> int:
    """
    Where in a step's whole batch this process's micro-batch `number`, of `size` samples, begins. What is random about a
    sample is a function of its place, so it is the same for any number of processes and micro-batches.
    """
    return (number * state.accelerator.num_processes + state.accelerator.process_index) * size


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def spatial_transform(state: TrainState, pixels: Tensor) -> SpatialTransform | None:
    """This step's transform of latents and target, a function of (seed, step); images stay large enough for LPIPS."""
    config, factor = state.config, state.vqgan.config.downsample_factor
    if not config.equivariance_share:
        return None
    pixels_needed = max(16, state.perceptual.min_side if state.perceptual is not None else 0)
    sides = pixels.shape[2] // factor
    return draw_transform(
        config.equivariance_transforms,
        config.equivariance_share,
        sides,
        -(-pixels_needed // factor),
        rng(config.seed, "equivariance", state.step),
    )


def target_of(state: TrainState, pixels: Tensor) -> Tensor:
    """What the reconstruction should be: the images, transformed as the latents are."""
    transform = spatial_transform(state, pixels)
    return pixels if transform is None else transform(pixels).clamp(-1, 1)


def latent_losses(state: TrainState, output: VQGANOutput, pixels: Tensor) -> dict[str, Tensor]:
    """The losses that reach the encoder without the decoder, unweighted: the quantizer's, and alignment."""
    if state.alignment is None:
        return output.losses
    return output.losses | {"alignment": state.alignment(output.latents, target_of(state, pixels))}


def withhold(state: TrainState, output: VQGANOutput, adversarial: Tensor) -> Tensor:
    """
    A term that takes (1 - s) of the adversarial gradient back at z, s being `adversarial_gradient_at_z`: the decoder
    learns from all of it, encoder and z from the share s. Its gradient at z is (s - 1) (∂x̂/∂z)ᵀ `adversarial`.
    """
    share = state.config.adversarial_gradient_at_z
    if share == 1:
        return torch.zeros((), device=adversarial.device)
    scale = loss_scale(state.accelerator)
    (at_z,) = torch.autograd.grad(output.sample, output.latents, adversarial * scale, retain_graph=True)
    # In float32: autocast's latents and their gradient have 8 bits, or a range that the loss scale leaves.
    return (at_least_float32(output.latents) * at_least_float32(at_z)).sum() * ((share - 1) / scale)


def image_gradients(state: TrainState, sample: Tensor, pixels: Tensor, number: int, count: int) -> ImageGradients:
    """
    Gradients of the image losses at x̂ = `sample` of micro-batch `number` of `count`; on the way, the discriminator's.

    The discriminator sees x̂ once: its logits serve the generator's loss, whose gradient is taken at x̂, and its own,
    whose gradient (over `count`) is left in its parameters.
    """
    config, accelerator = state.config, state.accelerator
    x_hat, pixels = sample.detach().requires_grad_(), target_of(state, pixels)
    scale = loss_scale(accelerator)
    with accelerator.autocast():
        terms = reconstruction_losses(x_hat, pixels, state.perceptual)
    (reconstruction,) = torch.autograd.grad(weighted_sum(terms, state.image_loss_weights()) * scale, x_hat)
    reconstruction = reconstruction / scale
    if not state.adversarial:
        return ImageGradients(terms, reconstruction)

    real = pixels.detach().requires_grad_(state.penalizing)
    shown_real, shown_fake = (
        augment(state, images, number, count, kind) for kind, images in (("real", real), ("fake", x_hat))
    )
    fake_logits = state.discriminator(shown_fake)
    terms["adversarial"] = adversarial_loss(fake_logits, config.adversarial_loss)
    (adversarial,) = torch.autograd.grad(terms["adversarial"] * scale, x_hat, retain_graph=True)
    adversarial = adversarial / scale
    last_layer = None
    if config.adaptive_weight:
        weight, both = state.vqgan.last_layer, (reconstruction, adversarial)
        last_layer = torch.stack([last_layer_gradient(sample, weight, g * scale) / scale for g in both])

    # A gradient penalty differentiates twice, which of the kernels of attention only the plain one allows.
    kernel = sdpa_kernel(SDPBackend.MATH) if state.penalizing else contextlib.nullcontext()
    with kernel:
        real_logits = state.discriminator(shown_real)
    disc_terms = discriminator_losses(real_logits, fake_logits, config.adversarial_loss)
    weights = state.discriminator_loss_weights()
    if "disc_lecam" in weights:
        disc_terms["disc_lecam"] = lecam_penalty(real_logits, fake_logits, *state.lecam_anchors)
    if "disc_r1" in weights:
        disc_terms["disc_r1"] = r1_penalty(real_logits, real)
    accelerator.backward(weighted_sum(disc_terms, weights) / count)
    watched = {
        "logits_real": real_logits.mean(),
        "logits_fake": fake_logits.mean(),
        "disc_real_accuracy": (real_logits > 0).float().mean(),
        "disc_fake_accuracy": (fake_logits < 0).float().mean(),
        "rec_gradient_square": reconstruction.square().sum(),
        "adv_gradient_square": adversarial.square().sum(),
    }
    return ImageGradients(terms | disc_terms, reconstruction, adversarial, last_layer, watched)


def augment(state: TrainState, images: Tensor, number: int, count: int, kind: str) -> Tensor:
    """
    `diff_augment` for micro-batch `number` of `count`, of `kind` "real" or "fake". The draws are a function of
    (seed, step) and of an image's place in the whole batch, so any number of processes sees the same.
    """
    config, accelerator = state.config, state.accelerator
    if not config.diff_augment:
        return images
    generator = torch_rng(config.seed, f"augment {kind}", state.step)
    draws = draw_augmentations(len(images) * count * accelerator.num_processes, generator)
    first = place_in_batch(state, number, len(images))
    mine = {name: rows[first : first + len(images)] for name, rows in draws.items()}
    return diff_augment(images, config.diff_augment, mine)


def move_lecam_anchors(state: TrainState, watched: dict[str, float]) -> None:
    means, decay = (watched["logits_real"], watched["logits_fake"]), state.config.lecam_decay
    if state.config.lecam_weight:
        real, fake = state.lecam_anchors or means
        state.lecam_anchors = decay * real + (1 - decay) * means[0], decay * fake + (1 - decay) * means[1]


def mean_over_batch(accelerator: Accelerator, figures: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means of scalars over micro-batches and processes, in one exchange."""

    table = torch.stack(
        [torch.stack([at_least_float32(scalar.detach()) for scalar in row.values()]) for row in figures]
    )
    return dict(zip(figures[0], accelerator.reduce(table.mean(dim=0), "mean").tolist(), strict=True))


def clip_gradients(state: TrainState) -> dict[str, float]:
    """Clip each network's gradient to its own limit. Returns the norms before, 0 for a network that does not train."""
    config, norms = state.config, {"grad_norm": 0.0, "disc_grad_norm": 0.0}
    disc_limit = config.max_grad_norm if config.disc_max_grad_norm is None else config.disc_max_grad_norm
    limits = (config.max_grad_norm, disc_limit)
    for name, optimizer, limit in zip(norms, (state.optimizer, state.disc_optimizer), limits, strict=True):
        if name == "grad_norm" or state.adversarial:
            norms[name] = clip_gradient(state.accelerator, optimizer, limit)
    return norms


def update_weights(state: TrainState, apply: bool) -> None:
    """Both optimizers and their schedules, if `apply`; and the end of this step's gradients."""
    optimizers = [(state.optimizer, state.scheduler)]
    if state.adversarial:
        optimizers.append((state.disc_optimizer, state.disc_scheduler))
    step_optimizers(state.accelerator, optimizers, apply)


def _no_sync_unless(accelerator: Accelerator, last: bool, model: nn.Module | None):
    """Processes exchange a network's gradients at the last micro-batch only."""
    return contextlib.nullcontext() if last or model is None else accelerator.no_sync(model)


@contextlib.contextmanager
def _random_state(state: tuple) -> Iterator[None]:
    """Draw random numbers from a former state of CPU and accelerator, and go on from the present one afterwards."""
    cpu, devices, device_states = state
    with torch.random.fork_rng(devices):
        torch.set_rng_state(cpu)
        set_device_states(devices, device_states)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Codebook upkeep: what a quantizer needs besides gradients


def flat_vectors(latents: Tensor) -> Tensor:
    """`(B, D, h, w)` to `(B*h*w, D)`, in float32 or better."""
    return at_least_float32(latents.detach()).permute(0, 2, 3, 1).flatten(0, 2)


def initialize_codebook(state: TrainState, batches: Iterator[dict], vectors_per_code: int = 8) -> None:
    """Start the codes from the latents of coming batches, of all processes; the main process's result is everyone's."""
    quantizer, rows, have = state.vqgan.quantize, [], 0
    if not quantizer.codebook_parameters():
        return
    with torch.no_grad():
        for number, batch in enumerate(batches, start=1):
            rows.append(gather_rows(flat_vectors(state.vqgan.encode(batch["pixel_values"]).latents)))
            have += len(rows[-1])
            whole_steps = number % state.config.gradient_accumulation_steps == 0
            if whole_steps and have >= vectors_per_code * quantizer.num_codes:
                break
    quantizer.initialize_codebook(torch.cat(rows), torch_rng(state.config.seed, "codebook"))
    broadcast(quantizer)
    for parameter in quantizer.codebook_parameters():
        move_average(state, parameter, torch.ones(len(parameter), dtype=torch.bool))


def update_codebook(state: TrainState, output: TokenizerStepOutput) -> int:
    """
    What a step does to the codes besides gradients: moving averages, and the restart of dead codes on current latents.

    The optimizer's memory of restarted codes goes too: it would drag the new codes along the old codes' way.

    Returns:
        How many codes were restarted.
    """
    config, quantizer = state.config, state.vqgan.quantize
    state.health.update(output.indices)
    if config.decoder_only:
        return 0
    indices = output.indices.flatten(0, 2)
    statistics = quantizer.codebook_statistics(flat_vectors(output.latents), indices)
    if statistics is not None:
        quantizer.update_codebook(state.accelerator.reduce(statistics, "sum"))

    dead = state.health.age >= config.dead_code_restart_steps
    parameters = quantizer.codebook_parameters()
    if not (config.dead_code_restart_steps and parameters and dead.any()):
        return 0
    # (processes, micro-batches, ...) to the order in which one process would have seen them
    vectors = flat_vectors(output.latents).unflatten(0, (1, config.gradient_accumulation_steps, -1))
    vectors = gather_rows(vectors).transpose(0, 1).flatten(0, 2)
    generator = torch_rng(config.seed, "restart", state.step)
    restarted = quantizer.restart_codes(dead.to(vectors.device), vectors, generator)
    broadcast(quantizer)
    for parameter, rows in zip(parameters, restarted.view(len(parameters), -1), strict=True):
        for memory in state.optimizer.state.get(parameter, {}).values():
            if torch.is_tensor(memory) and memory.shape == parameter.shape:
                memory[rows] = 0
        move_average(state, parameter, rows)
    state.health.age[restarted.cpu()] = 0
    return int(restarted.sum())


def move_average(state: TrainState, codes: nn.Parameter, rows: Tensor) -> None:
    """Codes that jump take their averages along: halfway between an old and a new code there is nothing to decode."""
    if state.ema is not None:
        parameters = list(state.vqgan.parameters())
        average = state.ema.shadow_params[next(i for i, own in enumerate(parameters) if own is codes)]
        average[rows.to(average.device)] = codes.detach()[rows.to(codes.device)]


def broadcast(module: nn.Module) -> None:
    """The main process's weights and buffers to all: sums in another order must not let codebooks drift apart."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in module.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
