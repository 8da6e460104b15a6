"""What a model of tokens learns from a sample: draws, losses, and indices from every form of data."""

import itertools
import math

import datasets
import pytest
import torch
from conftest import SPECIAL, TINY, smooth_pixels
from test_token_models import build, some_indices, some_orders
from torch import nn
from torch.nn import functional as F

from hf_vqgan import MaskedTokenConfig, VQGANConfig, VQGANModel
from hf_vqgan.data.datasets import ImageTransform
from hf_vqgan.generation.samples import LatentSamples, raw_indices, raw_latents
from hf_vqgan.generation.token_models import (
    MEAN_MASKED,
    Draws,
    TokenTrainingConfig,
    build_token_model,
    draw,
    shuffled_share,
    token_loss,
)

GRID = MaskedTokenConfig(num_vq_embeddings=8, num_codebooks=2, sample_size=4)


def settings(**fields) -> TokenTrainingConfig:
    return TokenTrainingConfig(**{"vqgan": "model", "dataset_name": "images"} | fields)


# Draws


@pytest.mark.parametrize("fields", [{"token_model": "masked"}, {"random_order": 1.0}, {}], ids=str)
def test_draws_depend_on_the_sample_alone(fields):
    config = settings(**fields)
    together = draw(torch.arange(6), GRID, config, 0.5)
    for number in range(6):
        alone = draw(torch.tensor([number]), GRID, config, 0.5)
        for name in ("dropped", "order", "masked"):
            part, whole = getattr(alone, name), getattr(together, name)
            assert (part is None) == (whole is None)
            assert part is None or torch.equal(part[0], whole[number])
    other = draw(torch.arange(6), GRID, settings(**fields, seed=1), 0.5)
    if fields:
        name = "masked" if "token_model" in fields else "order"
        assert not torch.equal(getattr(other, name), getattr(together, name))
    assert together.masked is None or together.masked.shape == (6, 4, 4, 2)


def test_draws_follow_their_distributions():
    drawn = draw(torch.arange(4000), GRID, settings(token_model="masked"))
    assert drawn.dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    shares = drawn.masked.flatten(1).float().mean(1)
    assert shares.min() >= 1 / 32 and shares.max() == 1
    # P(cos(π/2 * u) < s) = 1 - 2/π * acos(s), up to the rounding up to one of 32 tokens
    for share in (0.25, 0.5, 0.75):
        expected = 1 - math.acos(share) * 2 / math.pi
        assert (shares <= share).float().mean().item() == pytest.approx(expected, abs=0.03)
    assert (drawn.masked.float().mean(0) - MEAN_MASKED).abs().max() < 0.05

    orders = draw(torch.arange(1000), GRID, settings(random_order=0.5), 0.3).order
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(1000, -1))
    in_raster = (orders == torch.arange(16)).all(1).float().mean().item()
    assert in_raster == pytest.approx(0.7, abs=0.05)


def test_random_order_gives_way_to_raster():
    shares = [shuffled_share(progress, 0.75) for progress in (0, 0.5, 0.625, 0.75, 1)]
    assert shares == pytest.approx([1, 1, 0.5, 0, 0])
    assert shuffled_share(0.5, 0.0) == 0
    assert draw(torch.arange(3), GRID, settings()).order is None


# Losses


def test_loss_of_an_autoregressive_model_is_its_bits_per_token():
    model = build("autoregressive", num_codebooks=2)
    indices, labels, order = some_indices(model), torch.tensor([0, 1]), some_orders(model)
    loss = token_loss(model, indices, labels, Draws(torch.zeros(2), order=order))
    bits = model.bits(indices, labels, order).sum() / indices.numel()
    assert loss.item() == pytest.approx(bits.item() * math.log(2), rel=1e-5)


def test_loss_of_a_masked_model_counts_masked_tokens_and_is_the_mean_of_its_parts():
    model = build("masked", num_codebooks=2)
    indices, labels = some_indices(model, 4), torch.tensor([0, 1, 2, 0])
    masked = torch.rand(indices.shape, generator=torch.Generator().manual_seed(1)) < torch.tensor(
        [0.2, 0.9, 0.5, 0.6]
    ).view(4, 1, 1, 1)

    def loss(rows):
        return token_loss(model, indices[rows], labels[rows], Draws(torch.zeros(4), masked=masked[rows]))

    logits = model(indices, labels, masked=masked).logits
    nats = F.cross_entropy(logits.flatten(0, -2), indices.flatten(), reduction="none").view(masked.shape)
    expected = (nats * masked).sum() / (MEAN_MASKED * masked.numel())
    torch.testing.assert_close(loss(slice(4)), expected)
    torch.testing.assert_close((loss(slice(2)) + loss(slice(2, 4))) / 2, expected)


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_two_pictures_are_learned_by_heart(kind):
    """Each class has one picture: after a short training its bits are few, and samples are that picture."""
    model = build(kind, num_vq_embeddings=8, sample_size=3, initializer_range=0.1)
    config = settings(token_model=kind, label_dropout=0.3, random_order=0.3 * (kind == "autoregressive"))
    pictures, labels = some_indices(model), torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for step in range(200):
        numbers = torch.arange(8) + 8 * step
        rows = numbers % 2
        draws = draw(numbers, model.config, config, shuffled_share(step / 200, config.random_order))
        loss = token_loss(model, pictures[rows], torch.where(draws.dropped, model.no_class, labels[rows]), draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert torch.equal(model.sample(labels), pictures)
    bits = model.bits if kind == "autoregressive" else model.bits_upper_bound
    assert bits(pictures, labels).max() < 0.5  # of 27
    assert bits(pictures, labels.flip(0)).min() > 4
    if kind == "autoregressive":  # without class, there are two pictures
        assert bits(pictures).mean().item() == pytest.approx(1, abs=0.5)


def test_losses_go_through_a_wrapped_model():
    """DDP and torch.compile wrap `forward`, and nothing else."""

    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *arguments, **options):
            return self.module(*arguments, **options)

    for kind in ("autoregressive", "masked"):
        model = build(kind)
        indices, masked = some_indices(model), some_indices(model, seed=1) > 0
        draws = Draws(torch.zeros(2), masked=masked if kind == "masked" else None)
        losses = [token_loss(each, indices, None, draws) for each in (model, Wrapped(model))]
        assert torch.equal(*losses)


# Indices


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "residual"])
def test_images_latents_and_indices_are_the_same_tokens(quantizer):
    vqgan = VQGANModel(VQGANConfig(**TINY | {"quantizer": quantizer} | SPECIAL.get(quantizer, {}))).eval()
    for codebook in vqgan.quantize.codebook_parameters():
        nn.init.normal_(codebook, std=0.5)
    pixels = torch.stack([smooth_pixels(seed, 16) for seed in range(2)])
    expected = vqgan.encode_indices(pixels)
    batches = ({"pixel_values": pixels}, {"latents": vqgan.encode(pixels).latents}, {"indices": expected.int()})
    for batch in batches:
        found = raw_indices(vqgan, batch)
        assert found.dtype == torch.int64 and torch.equal(found, expected)


@pytest.mark.parametrize(
    "indices", [torch.full((1, 8, 8), 16), torch.full((1, 8, 8), -1), torch.zeros(1, 8, 8, 2, dtype=torch.long)],
    ids=["large", "negative", "several"],
)  # fmt: skip
def test_indices_of_another_vqgan_are_refused(tiny_model, indices):
    with pytest.raises(ValueError, match=r"this VQ-GAN has indices \(B, h, w\) in \[0, 15\]"):
        raw_indices(tiny_model, {"indices": indices})
    with pytest.raises(ValueError, match=r"this VQ-GAN has indices \(B, h, w\) in \[0, 15\]"):  # for diffusion models
        raw_latents(tiny_model, {"indices": indices})


def test_indices_are_preferred_to_latents_where_both_are_there():
    rows = datasets.Dataset.from_dict({"latents": [[[[0.0]]]], "indices": [[[3]]]})
    transform = ImageTransform(16, None, True, False)
    kinds = [LatentSamples(rows, transform, "rows", preferred=order).kind for order in
             itertools.permutations(("latents", "indices"))]  # fmt: skip
    assert kinds == ["latents", "indices"]


# Configuration


def test_bad_configs():
    with pytest.raises(ValueError, match="random_order=0.5 is for token_model='autoregressive'"):
        settings(token_model="masked", random_order=0.5)
    with pytest.raises(ValueError, match="token_model='diffusion' must be one of"):
        settings(token_model="diffusion")
    with pytest.raises(ValueError, match="vqgan"):
        settings(vqgan="")


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_built_as_configured(kind, tiny_model):
    config = settings(
        token_model=kind, hidden_size=16, num_layers=3, num_attention_heads=2, dropout=0.25, gradient_checkpointing=True
    )
    model = build_token_model(config, tiny_model, side=8, num_classes=5)
    assert model.config.grid_shape == (8, 8) and model.config.num_vq_embeddings == 16 and model.no_class == 5
    assert len(model.transformer.layers) == 3 and model.dropout.p == 0.25
    assert model.transformer.layers[0].self_attn.attention_dropout == 0.25
    assert model.transformer.gradient_checkpointing or model.transformer.layers[0].gradient_checkpointing
