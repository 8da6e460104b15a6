"""The training step as mathematics: against the textbook's, in float64."""

import math

import pytest
import torch
from accelerate import Accelerator
from benchmarks.textbook_steps import one_pass_gradients, two_pass_gradients, use_plain_blocks
from conftest import TINY

from hf_vqgan import VQGANConfig, VQGANModel
from hf_vqgan.blocks import lighten
from hf_vqgan.losses.discriminators import PatchDiscriminator
from hf_vqgan.losses.image_losses import LPIPS
from hf_vqgan.measurement.metrics import CodebookHealth
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.networks import build_model
from hf_vqgan.training.step import TrainState, training_step, update_codebook


def double_state(random_trunk, **fields) -> TrainState:
    """A float64 training state with plain SGD of rate 1: a step moves every weight by exactly its gradient."""
    defaults = dict(dataset_name="none", max_grad_norm=0.0, channels_last=False, perceptual_net="alex")
    config = VQGANTrainingConfig(**defaults | fields)
    torch.manual_seed(0)
    model = VQGANModel(VQGANConfig(**TINY)).double()
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    discriminator = PatchDiscriminator(channels=8, num_layers=1).double()
    optimizers = [torch.optim.SGD(network.parameters(), lr=1.0) for network in (model, discriminator)]
    schedules = [torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0) for optimizer in optimizers]
    return TrainState(
        config=config,
        accelerator=Accelerator(cpu=True),
        model=model,
        discriminator=discriminator,
        perceptual=LPIPS("alex", str(random_trunk / "alex.safetensors"), upscale=2).double(),
        optimizer=optimizers[0],
        scheduler=schedules[0],
        disc_optimizer=optimizers[1],
        disc_scheduler=schedules[1],
        health=CodebookHealth(TINY["num_vq_embeddings"]),
    )


def weights(*networks) -> list[torch.Tensor]:
    return [p.detach().clone() for network in networks for p in network.parameters()]


def applied_gradients(state: TrainState, micro_batches):
    before = weights(state.model, state.discriminator)
    output = training_step(state, micro_batches)
    after = weights(state.model, state.discriminator)
    return [old - new for old, new in zip(before, after, strict=True)], output


def textbook_gradients(state: TrainState, x: torch.Tensor, method=one_pass_gradients):
    """What plain autograd gives, and λ. Changes no weight and leaves no gradient behind."""
    use_plain_blocks(state.vqgan)
    balance = method(state, x)
    lighten(state.vqgan)
    gradients = [p.grad for network in (state.model, state.discriminator) for p in network.parameters()]
    for network in (state.model, state.discriminator):
        network.zero_grad(set_to_none=True)
    return gradients, balance


def assert_close(gradients, expected):
    for gradient, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-13)


REGULARIZED = {"lecam_weight": 0.3, "r1_weight": 2.0, "diff_augment": ["color", "translation", "cutout"]}


@pytest.mark.parametrize(
    "fields",
    [{}, {"adversarial_loss": "non_saturating"}, REGULARIZED, {"adaptive_weight": False}],
    ids=["hinge", "non_saturating", "regularized", "fixed_weight"],
)
def test_step_equals_the_textbook(random_trunk, fields):
    state = double_state(random_trunk, l2_weight=0.5, **fields)
    state.lecam_anchors = (0.1, -0.1) if "lecam_weight" in fields else None
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1
    expected, balance = textbook_gradients(state, x)
    with_two_passes, _ = textbook_gradients(state, x, two_pass_gradients)
    gradients, output = applied_gradients(state, [x])
    assert output.adaptive_weight == pytest.approx(float(balance), rel=1e-9)
    assert_close(gradients, expected)
    assert_close(with_two_passes, expected)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)


@pytest.mark.parametrize("fields", [{}, REGULARIZED], ids=["plain", "regularized"])
def test_accumulation_equals_a_large_batch(random_trunk, fields):
    """λ included, which other trainers compute anew for each micro-batch."""
    x = torch.rand(6, 3, 16, 16, dtype=torch.float64) * 2 - 1
    states = double_state(random_trunk, **fields), double_state(random_trunk, **fields)
    for state in states:
        state.lecam_anchors = (0.1, -0.1) if fields else None
    whole, one = applied_gradients(states[0], [x])
    parts, three = applied_gradients(states[1], list(x.split(2)))
    assert states[1].lecam_anchors == pytest.approx(states[0].lecam_anchors)
    ratios = [output.watched.pop("gradient_ratio") for output in (one, three)]
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-9)
    assert three.watched == pytest.approx(one.watched, rel=1e-6)
    assert_close(parts, whole)
    assert three.adaptive_weight == pytest.approx(one.adaptive_weight, rel=1e-9)
    assert three.losses == pytest.approx(one.losses, rel=1e-9)
    assert torch.equal(three.indices, one.indices) and torch.equal(three.latents, one.latents)


def test_discriminator_waits_for_its_start_and_ramps(random_trunk):
    state = double_state(random_trunk, disc_start=2, disc_ramp_steps=4)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    initial = weights(state.discriminator)
    outputs = [training_step(state, [x]) for _ in range(2)]
    assert all("adversarial" not in output.losses and output.adaptive_weight == 0 for output in outputs)
    assert all(torch.equal(a, b) for a, b in zip(initial, weights(state.discriminator), strict=True))
    # At disc_start the discriminator learns while its pull on the generator is still 0.
    off = double_state(random_trunk, adversarial_weight=0.0)
    off.model.load_state_dict(state.model.state_dict())
    off.disc_optimizer = off.discriminator = None
    first = weights(state.model)
    training_step(state, [x])
    training_step(off, [x])
    assert any(not torch.equal(a, b) for a, b in zip(initial, weights(state.discriminator), strict=True))
    moved = zip(weights(state.model), weights(off.model), first, strict=True)
    for with_disc, without, start in moved:
        torch.testing.assert_close(with_disc - start, without - start, rtol=1e-9, atol=1e-13)


def test_no_codebook_gradient_before_quantization(random_trunk):
    state = double_state(random_trunk, quantize_start=1, adversarial_weight=0.0)
    state.discriminator = None
    codebook = state.model.quantize.embedding.weight.detach().clone()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    training_step(state, [x])
    assert torch.equal(state.model.quantize.embedding.weight, codebook)
    training_step(state, [x])
    assert not torch.equal(state.model.quantize.embedding.weight, codebook)


def test_entropy_weight_is_annealed(random_trunk):
    state = double_state(random_trunk, quantize_start=10, entropy_anneal_factor=3.0, entropy_anneal_steps=4)
    state.model.quantize.loss_names = ("commitment", "codebook", "entropy")
    state.model.config.entropy_weight = 0.5
    found = {}
    for state.step in (9, 10, 12, 14, 99):
        found[state.step] = state.latent_loss_weights()["entropy"]
    assert found == {9: 0, 10: 1.5, 12: 1.0, 14: 0.5, 99: 0.5}


@pytest.mark.parametrize("adversarial_weight", [0.0, 0.8])
def test_step_with_nan_changes_no_weight(random_trunk, adversarial_weight):
    state = double_state(random_trunk, adversarial_weight=adversarial_weight, lecam_weight=0.1)
    before = weights(state.model, state.discriminator)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    heads = state.perceptual.heads[0].data.clone()
    state.perceptual.heads[0].data.fill_(torch.nan)
    output = training_step(state, [x])
    assert output.nonfinite[0] == "perceptual" and "grad_norm" in output.nonfinite
    assert all(torch.equal(a, b) for a, b in zip(before, weights(state.model, state.discriminator), strict=True))
    assert state.step == 1 and state.lecam_anchors is None
    state.perceptual.heads[0].data.copy_(heads)  # nothing of it is left: the next step is a step like any other
    expected, _ = textbook_gradients(state, x)
    gradients, output = applied_gradients(state, [x])
    assert output.nonfinite == ()
    if adversarial_weight:
        assert_close(gradients, expected)


def test_nan_in_an_image_is_skipped_too(random_trunk):
    state = double_state(random_trunk)
    state.model.train()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    x[0, 0, 0, 0] = torch.nan
    assert "l1" in training_step(state, [x]).nonfinite


def test_fp16_scale_changes_nothing_and_gives_way_on_overflow(random_trunk):
    """Accelerate's wrapped optimizers would unscale the second network twice, and its clipping raises."""
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    plain, _ = applied_gradients(double_state(random_trunk, max_grad_norm=0.5), [x])
    state = double_state(random_trunk, max_grad_norm=0.5)
    state.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled, _ = applied_gradients(state, [x])
    assert_close(scaled, plain)
    state.accelerator.scaler.update(2.0**127)  # the scale is a float32
    x = x.requires_grad_()
    state.config.l1_weight = 1e300  # x̂'s gradient overflows
    before = weights(state.model, state.discriminator)
    output = training_step(state, [x.detach()])
    assert "grad_norm" in output.nonfinite and state.accelerator.scaler.get_scale() == 2.0**126
    assert all(torch.equal(a, b) for a, b in zip(before, weights(state.model, state.discriminator), strict=True))


def test_each_network_is_clipped_to_its_own_norm(random_trunk):
    state = double_state(random_trunk, max_grad_norm=0.5, disc_max_grad_norm=0.25)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    gradients, output = applied_gradients(state, [x])
    count = len(list(state.model.parameters()))
    norms = [math.sqrt(sum(float(g.square().sum()) for g in part)) for part in (gradients[:count], gradients[count:])]
    assert norms == pytest.approx([0.5, 0.25], rel=1e-4)
    assert output.grad_norm > 0.5 and output.disc_grad_norm > 0.25


def test_gradient_ratio_and_logits_are_what_they_say(random_trunk):
    state = double_state(random_trunk, adversarial_weight=0.7)
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64) * 2 - 1
    sample = state.model(x).sample.detach().requires_grad_()
    losses = (sample - x).abs().mean() + state.perceptual(sample, x).mean()
    (rec,) = torch.autograd.grad(losses, sample)
    fake, real = state.discriminator(sample), state.discriminator(x)
    (adv,) = torch.autograd.grad(-fake.mean(), sample)
    output = training_step(state, [x])
    assert output.watched["gradient_ratio"] == pytest.approx(
        output.adaptive_weight * 0.7 * float(adv.norm() / rec.norm()), rel=1e-9
    )
    assert output.watched["logits_real"] == pytest.approx(real.mean().item())
    assert output.watched["disc_fake_accuracy"] == pytest.approx(float((fake < 0).double().mean()))
    assert 0 < output.watched["disc_fake_accuracy"] < 1  # or the line above would not tell it from others


def test_decoder_only_leaves_codes_alone(random_trunk, tmp_path):
    state = double_state(random_trunk, decoder_only=True, init_from="itself", dead_code_restart_steps=1)
    state.model.save_pretrained(tmp_path)
    state.config.init_from = str(tmp_path)
    state.model = build_model(state.config, state.model.config).double()
    trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    state.optimizer = torch.optim.SGD(trained, lr=1.0)
    state.scheduler = torch.optim.lr_scheduler.ConstantLR(state.optimizer, factor=1.0)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    assert update_codebook(state, training_step(state, [x])) == 0
    changed = {
        name.split(".")[0] for name, tensor in state.model.state_dict().items() if not tensor.equal(before[name])
    }
    assert changed == {"decoder", "post_quant_conv"}


def test_gradient_checkpointing_gives_the_same_gradients_for_less_memory(random_trunk):
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    kept = {}

    def gradients(checkpointing: bool):
        state = double_state(random_trunk)
        plain = state.model.train()
        if checkpointing:
            state.config.gradient_checkpointing = True
            state.model = build_model(state.config, state.model.config).double()
            state.model.load_state_dict(plain.state_dict())
            state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
            state.scheduler = torch.optim.lr_scheduler.ConstantLR(state.optimizer, factor=1.0)
        seen: dict[int, int] = {}

        def keep(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            state.model(x)
        kept[checkpointing] = sum(seen.values())
        return applied_gradients(state, [x])[0]

    assert_close(gradients(True), gradients(False))
    assert kept[True] < 0.5 * kept[False]
