"""Models of VQ-GAN tokens: likelihoods that sum to one, what each logit may look at, and sampling."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from hf_vqgan import (
    AutoregressiveTokenConfig,
    AutoregressiveTokenModel,
    MaskedTokenConfig,
    MaskedTokenModel,
    TokenSampling,
)
from hf_vqgan.modeling_token_model import masked_count, random_subsets

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
TOY = SMALL | dict(num_vq_embeddings=3, sample_size=2, num_classes=2)
KINDS = {
    "autoregressive": (AutoregressiveTokenConfig, AutoregressiveTokenModel),
    "masked": (MaskedTokenConfig, MaskedTokenModel),
}
both = pytest.mark.parametrize("kind", KINDS)
books = pytest.mark.parametrize("num_codebooks", [1, 3])


def build(kind: str, **fields):
    """A model with weights large enough for every input to matter."""
    config, model = KINDS[kind]
    return model(config(**TOY | fields)).eval()


def every_image(shape: tuple[int, ...], codes: int) -> torch.Tensor:
    """All codes^count indices of a shape."""
    count = math.prod(shape)
    return torch.tensor(list(itertools.product(range(codes), repeat=count))).view(-1, *shape)


def some_indices(model, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.num_vq_embeddings, (batch, *model.config.grid_shape), generator=generator)


def some_orders(model, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, model.num_positions, generator=generator).argsort(1)


# Likelihood


@pytest.mark.parametrize("shuffled", [False, True], ids=["raster", "shuffled"])
@pytest.mark.parametrize("fields", [{}, {"num_codebooks": 2, "num_vq_embeddings": 2}], ids=["one", "two"])
def test_probabilities_of_all_images_sum_to_one(fields, shuffled):
    model = build("autoregressive", **fields).double()
    images = every_image(model.config.grid_shape, model.config.num_vq_embeddings)
    order = some_orders(model, 1).expand(len(images), -1) if shuffled else None
    for label in (0, 1, model.no_class):
        bits = model.bits(images, torch.full((len(images),), label), order)
        assert bits.std() > 0.1
        assert torch.exp2(-bits).sum().item() == pytest.approx(1, abs=1e-6)


def test_bits_are_the_training_loss_of_an_image():
    model = build("autoregressive", num_codebooks=3)
    indices, labels = some_indices(model), torch.tensor([1, 0])
    logits = model(indices, labels).logits
    nats = F.cross_entropy(logits.flatten(0, -2), indices.flatten(), reduction="sum")
    assert model.bits(indices, labels).sum().item() == pytest.approx(nats.item() / math.log(2), rel=1e-5)


def exact_bound(model: MaskedTokenModel, indices: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """E over all orders of -log2 p(indices | order), token by token, `(B,)`."""
    count, orders = indices[0].numel(), list(itertools.permutations(range(indices[0].numel())))
    total = torch.zeros(len(indices))
    for order in orders:
        masked = torch.ones(len(indices), count, dtype=torch.bool)
        for place in order:
            logits = model(indices, labels, masked=masked.view_as(indices)).logits.flatten(1, -2)
            chosen = indices.flatten(1)[:, place, None]
            total -= logits.log_softmax(-1)[:, place].gather(1, chosen)[:, 0] / math.log(2)
            masked[:, place] = False
    return total / len(orders)


@torch.no_grad()
@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_bound_of_a_masked_model(num_codebooks):
    """Without bias, and a bound: all images together have no more probability than one."""
    side = {1: 2, 2: 1}[num_codebooks]
    model = build("masked", num_vq_embeddings=2, num_codebooks=num_codebooks, sample_size=side)
    images = every_image(model.config.grid_shape, 2)
    labels = torch.zeros(len(images), dtype=torch.long)
    bound = exact_bound(model, images, labels)
    assert torch.exp2(-bound).sum() < 1
    estimates = torch.stack([
        model.bits_upper_bound(images, labels, num_draws=100, generator=torch.Generator().manual_seed(seed))
        for seed in range(20)
    ])  # fmt: skip
    error = estimates.std(0) / len(estimates) ** 0.5
    assert error.max() < 0.1 and bound.std() > 0.05
    assert ((estimates.mean(0) - bound).abs() < 4 * error).all()


# What a logit looks at


@books
@pytest.mark.parametrize("shuffled", [False, True], ids=["raster", "shuffled"])
def test_logits_depend_on_earlier_tokens_alone(num_codebooks, shuffled, monkeypatch):
    """By gradient: logits of (time t, code d) reach all inputs before it in the sequence, and no other."""
    model = build("autoregressive", num_codebooks=num_codebooks)
    order = some_orders(model) if shuffled else torch.arange(model.num_positions).expand(2, -1)
    tokens = some_indices(model)
    embedded = model.embed(model.flat(tokens)).detach().requires_grad_()  # (B, L, n, C)
    monkeypatch.setattr(model, "embed", lambda tokens: embedded[..., : tokens.shape[-1], :])
    logits = model(tokens, torch.tensor([0, 1]), order=order).logits.view(2, model.num_positions, num_codebooks, -1)
    for image, time, depth in itertools.product(range(2), range(model.num_positions), range(num_codebooks)):
        place = order[image, time]
        (gradient,) = torch.autograd.grad(
            logits[image, place, depth, 0], embedded, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        expected = torch.zeros(2, model.num_positions, num_codebooks, dtype=torch.bool)
        expected[image, order[image, :time]] = True
        expected[image, place, :depth] = True
        assert torch.equal(gradient.abs().sum(-1) > 0, expected)


@books
def test_masked_tokens_are_not_looked_at_and_all_others_are(num_codebooks):
    model = build("masked", num_codebooks=num_codebooks)
    indices, labels = some_indices(model), torch.tensor([0, 1])
    masked = some_indices(model, seed=1) == 0
    masked.view(2, -1)[:, 0], masked.view(2, -1)[:, 1] = True, False
    logits = model(indices, labels, masked=masked).logits
    others = torch.where(masked, (indices + 1) % 3, indices)
    assert torch.equal(model(others, labels, masked=masked).logits, logits)
    for place in (~masked[0]).nonzero():
        changed = indices.clone()
        changed[0][tuple(place)] = (changed[0][tuple(place)] + 1) % 3
        difference = (model(changed, labels, masked=masked).logits - logits).abs().flatten(1, -2).amax(-1)
        assert (difference[0] > 1e-6).all() and (difference[1] == 0).all()


@both
def test_the_class_matters_and_none_is_no_class(kind):
    model = build(kind)
    indices, outputs = some_indices(model), []
    masked = {} if kind == "autoregressive" else {"masked": torch.ones_like(indices, dtype=torch.bool)}
    for label in (0, 1, 2):
        outputs.append(model(indices, torch.full((2,), label), **masked).logits)
    assert torch.equal(model(indices, **masked).logits, outputs[2])
    assert (outputs[0] - outputs[1]).abs().flatten(1, -2).amax(-1).min() > 1e-6
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3


# TokenSampling


@books
@pytest.mark.parametrize("shuffled", [False, True], ids=["raster", "shuffled"])
def test_cached_sampling_takes_what_the_whole_sequence_says(num_codebooks, shuffled):
    """The likeliest tokens, one by one with a cache, are those of one pass over the result; with guidance, too."""
    model = build("autoregressive", num_codebooks=num_codebooks, sample_size=3)
    order = some_orders(model) if shuffled else None
    labels, nothing = torch.tensor([0, 1]), torch.full((2,), model.no_class)
    for scale in (1.0, 3.0):
        tokens = model.sample(labels, sampling=TokenSampling(scale, temperature=0), order=order)
        with_class, without = (model(tokens, each, order=order).logits for each in (labels, nothing))
        assert torch.equal((without + scale * (with_class - without)).argmax(-1), tokens)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_models_distribution(kind):
    """Frequencies of all images of one class against their probabilities, by Pearson's χ²."""
    model = build(kind, num_vq_embeddings=2)
    images, count = every_image((2, 2), 2), 8000
    labels = torch.ones(count, dtype=torch.long)
    sampling = TokenSampling(generator=torch.Generator().manual_seed(0))
    if kind == "autoregressive":
        tokens = model.sample(labels, sampling=sampling)
        probabilities = torch.exp2(-model.bits(images, labels[: len(images)]))
    else:  # in one pass, tokens are independent
        tokens = model.sample(labels, sampling=sampling, num_inference_steps=1)
        logits = model(images, labels[: len(images)], masked=torch.ones_like(images, dtype=torch.bool)).logits
        probabilities = logits.softmax(-1).gather(-1, images[..., None]).flatten(1).prod(1)
    numbers = (tokens.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1)
    found, expected = torch.bincount(numbers, minlength=16), probabilities * count
    assert ((found - expected).square() / expected).sum() < 40  # 15 degrees of freedom: one in 2000 has more


def passes(model) -> list[int]:
    """Batch sizes of the transformer's passes, noted as they happen."""
    seen: list[int] = []
    model.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[4])))
    return seen


@both
def test_guidance_of_one_is_none_at_half_the_work(kind):
    model = build(kind)
    labels, seen, draw = torch.tensor([0, 1, 1]), passes(model), lambda: torch.Generator().manual_seed(0)
    plain = model.sample(labels, sampling=TokenSampling(generator=draw()))
    assert set(seen) == {3}
    seen.clear()
    guided = model.sample(labels, sampling=TokenSampling(1 + 1e-6, generator=draw()))
    assert set(seen) == {6}
    assert torch.equal(plain, guided)
    # All the way to the prediction without class
    free = model.sample(batch=3, sampling=TokenSampling(generator=draw()))
    assert torch.equal(model.sample(labels, sampling=TokenSampling(0.0, generator=draw())), free)


@books
@pytest.mark.parametrize("steps", [1, 3, "all", 1000])
def test_every_token_is_filled_in_once(num_codebooks, steps):
    model = build("masked", num_codebooks=num_codebooks)
    count = math.prod(model.config.grid_shape)
    seen = []
    forward = model.forward

    def noting(indices, labels, masked):
        seen.append((indices.clone(), masked.clone()))
        return forward(indices, labels, masked=masked)

    model.forward = noting
    steps = count if steps == "all" else steps
    tokens = model.sample(batch=2, num_inference_steps=steps)
    assert len(seen) == min(steps, count)
    seen.append((tokens, torch.zeros_like(tokens, dtype=torch.bool)))
    for (before, masked), (after, still) in itertools.pairwise(seen):
        assert torch.equal(before[~masked], after[~masked])  # what is filled in stays
        assert not (still & ~masked).any() and (masked & ~still).flatten(1).any(1).all()
        if steps == count:
            assert (masked & ~still).flatten(1).sum(1).tolist() == [1, 1]


def test_schedule_of_masks():
    for count in range(1, 40):
        for steps in range(1, count + 1):
            schedule = [masked_count(step, steps, count) for step in range(steps + 1)]
            assert schedule[0] == count and schedule[-1] == 0
            assert all(a > b for a, b in itertools.pairwise(schedule))
    # MaskGIT's: half of the passes leave cos(π/4) masked
    assert masked_count(6, 12, 256) == math.floor(256 * 2**-0.5)


def test_random_subsets():
    masked = random_subsets(4000, torch.arange(4000) % 4 + 1, 4, torch.Generator().manual_seed(0))
    assert torch.equal(masked.sum(1), torch.arange(4000) % 4 + 1)
    assert (masked[::4].float().mean(0) - 0.25).abs().max() < 0.06


@both
@books
def test_one_generator_per_image_makes_images_independent_of_their_batch(kind, num_codebooks):
    model = build(kind, num_codebooks=num_codebooks, sample_size=4)

    def images(seeds, labels):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return model.sample(torch.tensor(labels), sampling=TokenSampling(2.0, generator=generators))

    both = images([5, 6], [0, 1])
    assert torch.equal(both[1:], images([6], [1])) and not torch.equal(both[0], both[1])
    with pytest.raises(ValueError, match="2 generators for 1 images"):
        images([5, 6], [0])


def test_top_k_and_top_p_leave_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, 4)
    choose = lambda **options: TokenSampling(generator=torch.Generator().manual_seed(0), **options).choose(logits)  # noqa: E731
    for options, kept in (({"top_k": 2}, 2), ({"top_p": 0.79}, 2), ({"top_p": 0.81}, 3), ({"top_k": 9}, 4)):
        tokens = choose(**options)
        share = torch.bincount(tokens, minlength=4) / len(tokens)
        expected = logits[0].exp() * (torch.arange(4) < kept)
        torch.testing.assert_close(share, expected / expected.sum(), atol=0.04, rtol=0)
    cold = choose(temperature=0.5)
    expected = logits[0].exp() ** 2
    torch.testing.assert_close(torch.bincount(cold) / 2000, expected / expected.sum(), atol=0.04, rtol=0)
    assert choose(temperature=0.0).unique().tolist() == [0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan must be"),
        ({"top_k": -1}, "top_k=-1 must be"),
        ({"top_p": 0.0}, "top_p=0.0 must be in"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        TokenSampling(**options)


# As models of transformers


@both
@books
def test_a_saved_model_comes_back_whole(tmp_path, kind, num_codebooks):
    model = build(kind, num_codebooks=num_codebooks)
    model.save_pretrained(tmp_path)
    loaded, report = KINDS[kind][1].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.to_dict() == AutoModel.from_pretrained(tmp_path).config.to_dict()
    indices = some_indices(model)
    assert torch.equal(loaded(indices).logits, model(indices).logits)
    assert not loaded.training


@both
@books
def test_bfloat16_is_close_to_float32(kind, num_codebooks):
    """Also far from the grid's start, where rounded rotations would turn to other places."""
    model = build(kind, num_codebooks=num_codebooks, sample_size=12, initializer_range=0.1)
    indices = some_indices(model)
    exact, close = model(indices).logits, copy.deepcopy(model).to(torch.bfloat16)(indices).logits
    assert close.dtype == torch.bfloat16
    assert (close - exact).abs().max() < 0.05 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(indices).logits - exact).abs().max() < 0.05 * exact.abs().max()
    tokens = copy.deepcopy(model).to(torch.bfloat16).sample(batch=1)
    assert tokens.shape == (1, *model.config.grid_shape)


@both
@books
def test_all_weights_learn_also_with_gradient_checkpointing(kind, num_codebooks):
    model = build(kind, num_codebooks=num_codebooks)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:  # under its newer name, where it has one
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train().zero_grad()
        indices = some_indices(model)
        masked = {} if kind == "autoregressive" else {"masked": indices == 0}
        logits = model(indices, torch.tensor([0, 1]), **masked).logits
        F.cross_entropy(logits.flatten(0, -2), indices.flatten()).backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


@both
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_codebooks": 0}, "num_codebooks=0 must be at least 1"),
        ({"hidden_size": 20}, "hidden_size=20 must be a multiple of 4 x num_attention_heads=2"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_bad_configs(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        KINDS[kind][0](**TOY | fields)


@both
def test_indices_of_another_model_are_refused(kind):
    with pytest.raises(ValueError, match=r"indices of shape \(1, 3, 2\).*\('B', 2, 2\)"):
        build(kind)(torch.zeros(1, 3, 2, dtype=torch.long))
