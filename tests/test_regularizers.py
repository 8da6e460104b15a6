import math
import random

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import TINY
from test_training_step import applied_gradients, assert_close, double_state

from hf_vqgan import VQGANConfig
from hf_vqgan.data.randomness import rng, torch_rng
from hf_vqgan.losses.discriminators import DINODiscriminator
from hf_vqgan.losses.image_losses import adversarial_loss
from hf_vqgan.losses.regularizers import FeatureAlignment, SpatialTransform, add_noise, draw_transform
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.gradient_flow import measure_gradients
from hf_vqgan.training.networks import build_state, load_lpips
from hf_vqgan.training.setup import build_accelerator
from hf_vqgan.training.step import TrainState, training_step


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1


def parameters(state: TrainState, part: str) -> list[torch.Tensor]:
    return [p for name, p in state.model.named_parameters() if name.startswith(part)]


# ------------------------------------------------------------------------------------------------ the knob at z


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_adversarial_gradient_at_z_against_autograd(random_trunk, images, share):
    """The encoder gets ∂(L_rec + s λ w L_adv + L_quantizer), the decoder ∂(L_rec + λ w L_adv)."""
    state = double_state(random_trunk, adversarial_gradient_at_z=share)
    model = state.model
    output = model(images)
    rec = (output.sample - images).abs().mean() + state.perceptual(output.sample, images).mean()
    adv = adversarial_loss(state.discriminator(output.sample), "hinge")
    pair = [torch.autograd.grad(loss, model.last_layer, retain_graph=True)[0].norm() for loss in (rec, adv)]
    weight = pair[0] / (pair[1] + 1e-4) * state.config.adversarial_weight
    quantizer = 0.25 * output.losses["commitment"] + output.losses["codebook"]
    encoder = parameters(state, "encoder") + parameters(state, "quant_conv")
    decoder = parameters(state, "decoder") + parameters(state, "post_quant_conv")
    at_encoder = torch.autograd.grad(rec + share * weight * adv + quantizer, encoder, retain_graph=True)
    at_decoder = torch.autograd.grad(rec + weight * adv, decoder)
    applied, _ = applied_gradients(state, [images])
    by_name = dict(zip([name for name, _ in model.named_parameters()], applied, strict=False))
    for part, expected in (("encoder quant_conv", at_encoder), ("decoder post_quant_conv", at_decoder)):
        found = [by_name[name] for head in part.split() for name in by_name if name.startswith(head)]
        assert_close(found, expected)


# ------------------------------------------------------------------------------------------------ transforms, noise


def test_transform_is_the_same_for_images_and_latents():
    """Of an image made of constant 4x4 blocks, and its map of blocks."""
    latents = torch.arange(64.0).view(1, 1, 8, 8)
    images = latents.repeat_interleave(4, 2).repeat_interleave(4, 3)
    turned = SpatialTransform(quarter_turns=1, flip=True, side=8, sides=8)
    expected = turned(latents).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(turned(images), expected) and not torch.equal(turned(latents), latents)
    small = SpatialTransform(quarter_turns=0, flip=False, side=4, sides=8)
    assert small(images).shape == (1, 1, 16, 16) and small(latents).shape == (1, 1, 4, 4)
    means = F.avg_pool2d(small(images), 4)
    torch.testing.assert_close(means[..., 1:-1, 1:-1], small(latents)[..., 1:-1, 1:-1], rtol=0.05, atol=0.5)


def test_draws_stay_within_their_bounds():
    rng = random.Random(0)
    draws = [draw_transform(["scale", "rotate"], 0.5, sides=16, smallest=6, rng=rng) for _ in range(400)]
    drawn = [draw for draw in draws if draw is not None]
    assert 150 < len(drawn) < 250
    assert {draw.side for draw in drawn} == set(range(6, 17)) and {draw.quarter_turns for draw in drawn} == {1, 2, 3}
    assert not any(draw.flip for draw in drawn)
    tiny = draw_transform(["scale"], 1.0, sides=4, smallest=9, rng=rng)
    assert tiny.side == 4  # nothing smaller is large enough


def test_noise_has_its_deviation_and_depends_on_the_seed_alone():
    latents = torch.zeros(3, 8, 32, 32)
    noise = add_noise(latents, 0.5, [torch_rng(0, purpose) for purpose in "aba"])
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert noise.std() == pytest.approx(0.5, rel=0.05) and abs(noise.mean()) < 0.02


REGULARIZED = {"equivariance_share": 1.0, "latent_noise_std": 0.1, "adversarial_gradient_at_z": 0.5}


def test_step_with_transform_and_noise_equals_autograd(random_trunk, images):
    state = double_state(random_trunk, **REGULARIZED, adversarial_weight=0.0)
    state.discriminator = None
    drawn = rng(state.config.seed, "equivariance", 0)
    transform = draw_transform(["scale", "rotate"], 1.0, sides=8, smallest=-(-16 // 2), rng=drawn)
    assert transform.quarter_turns
    target = transform(images).clamp(-1, 1)
    output = state.model(
        images,
        latent_transform=lambda z: add_noise(transform(z), 0.1, [torch_rng(0, "latent noise", i) for i in range(4)]),
    )
    loss = (output.sample - target).abs().mean() + state.perceptual(output.sample, target).mean()
    loss = loss + 0.25 * output.losses["commitment"] + output.losses["codebook"]
    expected = torch.autograd.grad(loss, list(state.model.parameters()))
    before = [p.detach().clone() for p in state.model.parameters()]
    training_step(state, [images])
    assert_close([old - new for old, new in zip(before, state.model.parameters(), strict=True)], expected)


def test_regularized_accumulation_equals_a_large_batch(random_trunk, images):
    whole, _ = applied_gradients(double_state(random_trunk, **REGULARIZED), [images])
    parts, _ = applied_gradients(double_state(random_trunk, **REGULARIZED), list(images.split(2)))
    assert_close(parts, whole)


# ------------------------------------------------------------------------------------------------ alignment


def test_alignment_is_zero_for_the_features_themselves_and_pulls_others(backbone):
    alignment = FeatureAlignment(backbone, 16)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        alignment.project.weight.copy_(torch.eye(16)[:, :, None, None])
        alignment.project.bias.zero_()
    features = alignment.features(images, (4, 4))
    assert alignment(features, images).item() == pytest.approx(0, abs=1e-6)
    assert alignment(-features, images).item() == pytest.approx(1.5, abs=1e-5)  # cos = -1: 1 - m₁ + 1; relations equal
    latents = torch.randn(2, 16, 4, 4, requires_grad=True)
    loss = alignment(latents, images)
    loss.backward()
    nearer = alignment(latents - 0.5 * latents.grad / latents.grad.norm(), images)
    assert nearer < loss and not any(p.grad is not None for p in alignment.backbone.parameters())


def test_alignment_model_that_cannot_be_had_is_named(tmp_path):
    with pytest.raises(ValueError, match="alignment_model='.*none' cannot be had.*set alignment_weight to 0"):
        FeatureAlignment(str(tmp_path / "none"), 4)


# ------------------------------------------------------------------------------------------------ gradient flow


def test_measured_gradients_are_autograd_s(random_trunk, images):
    state = double_state(random_trunk, adversarial_weight=0.6)
    weights = [p.detach().clone() for p in state.model.parameters()]
    figures = measure_gradients(state, images)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, state.model.parameters(), strict=True))

    output = state.model(images)
    rec = {"l1": (output.sample - images).abs().mean(), "perceptual": state.perceptual(output.sample, images).mean()}
    adv = adversarial_loss(state.discriminator(output.sample), "hinge")
    norms = [
        torch.autograd.grad(x, state.model.last_layer, retain_graph=True)[0].norm() for x in (sum(rec.values()), adv)
    ]
    terms = rec | {
        "adversarial": 0.6 * norms[0] / (norms[1] + 1e-4) * adv,
        "commitment": 0.25 * output.losses["commitment"],
    }
    at = {"x_hat": output.sample, "z": output.latents, "encoder_first": state.model.encoder.conv_in.weight,
          "encoder_last": state.model.encoder.conv_out.weight}  # fmt: skip
    expected = {}
    for place, tensor in at.items():
        own = {k: v for k, v in terms.items() if not (place == "x_hat" and k == "commitment")}
        gradients = {k: torch.autograd.grad(v, tensor, retain_graph=True)[0].flatten() for k, v in own.items()}
        total = sum(gradients.values())
        for name, g in gradients.items():
            expected[f"gradient_{place}_{name}"] = g.norm().item()
            expected[f"cosine_{place}_{name}"] = F.cosine_similarity(g, total, dim=0).item()
    assert figures == pytest.approx(expected, rel=1e-6)
    assert math.isfinite(sum(figures.values())) and "gradient_z_codebook" not in figures


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_measured_gradients_are_those_that_pass(random_trunk, images, share):
    """What is withheld at z is not reported there; at x̂ nothing is withheld."""
    whole = measure_gradients(double_state(random_trunk, adversarial_weight=0.6), images)
    cut = measure_gradients(double_state(random_trunk, adversarial_weight=0.6, adversarial_gradient_at_z=share), images)
    assert cut["gradient_x_hat_adversarial"] == pytest.approx(whole["gradient_x_hat_adversarial"])
    for place in ("z", "encoder_first", "encoder_last"):
        key = f"gradient_{place}_adversarial"
        assert key not in cut if share == 0 else cut[key] == pytest.approx(share * whole[key])


def test_measuring_moves_no_spectral_norm(random_trunk, images, backbone):
    state = double_state(random_trunk)
    state.discriminator = DINODiscriminator(backbone).double().train()
    before = {name: tensor.clone() for name, tensor in state.discriminator.state_dict().items()}
    assert "gradient_z_adversarial" in measure_gradients(state, images)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.discriminator.state_dict().items())
    assert state.discriminator.heads.training


# ------------------------------------------------------------------------------------------------ mixed precision


def prepared_state(image_folder, random_trunk, precision: str, **fields):
    """The state of a real run, before quantization: rounding would move some latents to other codes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    config = VQGANTrainingConfig(
        dataset_name=str(image_folder),
        mixed_precision=precision,
        max_train_steps=9,
        quantize_start=8,
        resolution=32,
        disc_channels=8,
        disc_layers=1,
        perceptual_net="alex",
        perceptual_weights_path=str(random_trunk / "alex.safetensors"),
        **fields,
    )
    accelerator = build_accelerator(config)
    state = build_state(config, VQGANConfig(**TINY), accelerator, load_lpips(config, accelerator)[0])
    torch.nn.init.normal_(state.vqgan.quantize.embedding.weight, std=0.5)
    return state


def test_gradients_measured_under_bf16_are_those_of_float32(image_folder, random_trunk, images):
    """At every place: Accelerate's float32 copies of latents are in nobody's graph."""
    images = F.interpolate(images.float(), 32)
    exact, rounded = (
        measure_gradients(prepared_state(image_folder, random_trunk, precision), images) for precision in ("no", "bf16")
    )
    assert exact.keys() == rounded.keys() and {"gradient_z_adversarial", "gradient_x_hat_l1"} <= exact.keys()
    for name, value in exact.items():
        tolerance = {"abs": 0.1} if name.startswith("cosine") else {"rel": 0.1}
        assert rounded[name] == pytest.approx(value, **tolerance), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_half_precision_withholds_the_adversarial_gradient_at_z_too(
    image_folder, random_trunk, images, share, precision
):
    """The encoder's gradient is the one that float32 gives it, far from the one that has nothing withheld."""
    images = F.interpolate(images.float(), 32)

    def encoder_gradient(precision, share):
        knobs = dict(adversarial_gradient_at_z=share, adaptive_weight=False, adversarial_weight=5.0, max_grad_norm=0.0)
        state = prepared_state(image_folder, random_trunk, "no" if precision == "fp16" else precision, **knobs)
        if precision == "fp16":  # which Accelerate grants to accelerators only
            state.accelerator.autocast = lambda: torch.autocast("cpu", torch.float16)
            state.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        kept = []
        state.optimizer.register_step_pre_hook(
            lambda *_: kept.extend(p.grad.flatten().clone() for p in state.vqgan.encoder.parameters())
        )
        training_step(state, [images])
        return torch.cat(kept)

    exact, rounded, whole = (
        encoder_gradient("no", share),
        encoder_gradient(precision, share),
        encoder_gradient("no", 1.0),
    )
    assert F.cosine_similarity(exact, rounded, dim=0) > 0.97
    assert (rounded - exact).norm() < 0.2 * (whole - exact).norm()
