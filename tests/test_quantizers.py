"""One contract for every quantizer, then what is particular to each."""

import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersVectorQuantizer

from hf_vqgan import QUANTIZERS, VQGANConfig
from hf_vqgan.quantizers import VectorQuantizer, kmeans, nearest_code

D, K = 4, 32


def build(name: str, **fields) -> torch.nn.Module:
    config = VQGANConfig(quantizer=name, vq_embed_dim=D, num_vq_embeddings=K, **fields)
    quantizer = QUANTIZERS[name](config)
    if hasattr(quantizer, "initialize_codebook"):
        quantizer.initialize_codebook(torch.randn(4 * K, D), torch.Generator().manual_seed(0))
    return quantizer


@pytest.fixture(params=sorted(QUANTIZERS))
def quantizer(request):
    return build(request.param)


@pytest.fixture
def latents():
    return torch.randn(2, D, 5, 3)


# ------------------------------------------------------------------------------------------------ the contract


def test_quantized_is_the_codes_at_the_indices(quantizer, latents):
    output = quantizer(latents)
    assert output.indices.shape == (2, 5, 3) and output.indices.dtype == torch.int64
    assert torch.equal(output.quantized, quantizer.codes(output.indices))


def test_codes_quantize_to_themselves(quantizer, latents):
    first = quantizer(latents)
    again = quantizer(first.quantized.detach())
    assert torch.equal(again.quantized, first.quantized)


def test_forward_changes_nothing(quantizer, latents):
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    for mode in (True, False):
        quantizer.train(mode)(latents)
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


def test_gradient_reaches_the_encoder(quantizer, latents):
    latents.requires_grad_()
    (quantizer(latents).quantized * torch.randn_like(latents)).sum().backward()
    assert torch.isfinite(latents.grad).all() and latents.grad.abs().sum() > 0


def test_losses_are_the_announced_ones(quantizer, latents):
    losses = quantizer(latents).losses
    assert tuple(losses) == quantizer.loss_names
    assert all(loss.ndim == 0 and loss.dtype == torch.float32 for loss in losses.values())


def test_bfloat16_chooses_in_float32(quantizer, latents):
    """Rounded weights and latents, but a choice among them that is not rounded again."""
    quantizer = quantizer.to(torch.bfloat16)
    latents = latents.to(torch.bfloat16)
    output = quantizer(latents)
    assert output.quantized.dtype == torch.bfloat16
    exact = quantizer.double()(latents.double())
    assert torch.equal(output.indices, exact.indices)


def test_saves_and_loads_exactly(quantizer, latents):
    other = build({v: k for k, v in QUANTIZERS.items()}[type(quantizer)])
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(latents).quantized, quantizer(latents).quantized)


def test_empty_and_broken_input(quantizer, latents):
    with pytest.raises(ValueError, match="empty"):
        quantizer(latents[:0])
    with pytest.raises(ValueError, match=r"expected \(B, 4, h, w\)"):
        quantizer(latents[:, :3])
    latents[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 120 latent values are NaN"):
        quantizer(latents)


def test_unpacks_as_diffusers_expects(quantizer, latents):
    output = quantizer(latents)
    quantized, loss, (_, _, indices) = output
    assert torch.equal(quantized, output.quantized) and loss.ndim == 0
    assert torch.equal(output[2][2], indices) and indices.shape == (2 * 5 * 3,)


# ------------------------------------------------------------------------------------------------ lookup


@pytest.mark.parametrize("n, k, d, tile", [(7, 5, 3, 1024), (130, 300, 8, 64), (64, 64, 2, 64), (3, 1, 1, 2)])
def test_nearest_code_is_exact(n, k, d, tile):
    vectors, codebook = torch.randn(n, d, dtype=torch.float64), torch.randn(k, d, dtype=torch.float64)
    exact = (vectors[:, None] - codebook[None]).square().sum(-1).argmin(dim=1)
    assert torch.equal(nearest_code(vectors, codebook, tile), exact)
    assert torch.equal(nearest_code(vectors.float(), codebook.float(), tile), exact)


def test_ties_go_to_the_lowest_index():
    codebook = torch.tensor([[2.0], [1.0], [1.0], [5.0], [1.0]])
    for tile in (1, 2, 3, 1024):
        assert nearest_code(torch.tensor([[0.0], [1.0]]), codebook, tile).tolist() == [1, 1]


def test_small_codes_are_told_apart():
    """At the usual start U(±1/K) forms that add |z|² in float32 pick wrong codes; this one must not."""
    codebook = (torch.rand(16384, 8) * 2 - 1) / 16384
    vectors = torch.randn(512, 8)
    assert torch.equal(nearest_code(vectors, codebook), nearest_code(vectors.double(), codebook.double()))


def test_lookup_memory_is_bounded():
    """No N x K matrix: the largest tensor that the lookup allocates stays far below it."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            tensors = out if isinstance(out, (tuple, list)) else (out,)
            largest = max([largest, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
            return out

    with Watch():
        nearest_code(torch.randn(3000, 4), torch.randn(5000, 4), tile=256)
    assert largest <= max(5000 * 4, 256 * 256)


# ------------------------------------------------------------------------------------------------ vq


def test_vq_gradients_against_autograd():
    """Straight-through, commitment and codebook terms, each against its textbook form in float64."""
    quantizer = build("vq").double()
    z = torch.randn(2, D, 3, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(z)
    output = quantizer(z)
    e = quantizer.embedding.weight[output.indices].permute(0, 3, 1, 2)
    textbook = ((z + (e - z).detach()) * upstream).sum()
    for ours, theirs in [
        ((output.quantized * upstream).sum(), textbook),
        (output.losses["commitment"], (z - e.detach()).square().mean()),
        (output.losses["codebook"], (z.detach() - e).square().mean()),
    ]:
        parameters = (z, quantizer.embedding.weight)
        grads = torch.autograd.grad(ours, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        expected = torch.autograd.grad(theirs, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for grad, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, want, )


def test_vq_agrees_with_diffusers(latents):
    quantizer = build("vq")
    theirs = DiffusersVectorQuantizer(K, D, beta=0.25, legacy=False)
    theirs.embedding.weight.data.copy_(quantizer.embedding.weight)
    quantized, loss, (_, _, indices) = theirs(latents)
    output = quantizer(latents)
    assert torch.equal(output.indices.flatten(), indices)
    torch.testing.assert_close(output.quantized, quantized)
    torch.testing.assert_close(0.25 * output.losses["commitment"] + output.losses["codebook"], loss)


def test_restart_moves_only_dead_codes_onto_latents():
    quantizer = build("vq")
    before = quantizer.embedding.weight.detach().clone()
    dead = torch.zeros(K, dtype=torch.bool)
    dead[[3, 7, 20]] = True
    vectors = torch.randn(50, D)
    restarted = quantizer.restart_codes(dead, vectors, torch.Generator().manual_seed(1))
    after = quantizer.embedding.weight.detach()
    assert torch.equal(restarted, dead)
    assert torch.equal(after[~dead], before[~dead])
    assert all((row == vectors).all(dim=1).any() for row in after[dead])
    assert quantizer.restart_codes(torch.ones(K, dtype=torch.bool), vectors[:5]).sum() == 5


def test_kmeans_finds_separated_clusters():
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = centers.repeat(100, 1) + 0.1 * torch.randn(300, 2)
    # Lloyd can start with two seeds in one cluster; an empty-cluster restart or another seed finds all three.
    found = min(
        (kmeans(points, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(10)),
        key=lambda c: torch.cdist(points, c).min(dim=1).values.sum(),
    )
    torch.testing.assert_close(found[found.sum(dim=1).argsort()][0], centers[0], atol=0.05, rtol=0)
    assert torch.cdist(centers, found).min(dim=1).values.max() < 0.05


def test_kmeans_with_fewer_points_than_clusters_gives_distinct_codes():
    points = torch.randn(10, D)
    codes = kmeans(points, K, generator=torch.Generator().manual_seed(0))
    assert codes.shape == (K, D) and torch.isfinite(codes).all() and len(codes.unique(dim=0)) > 10


def test_single_code():
    quantizer = VectorQuantizer(VQGANConfig(vq_embed_dim=D, num_vq_embeddings=1))
    assert quantizer(torch.randn(1, D, 2, 2)).indices.eq(0).all()
