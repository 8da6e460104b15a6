"""One contract for every quantizer, then what is particular to each."""

import math
import threading

import pytest
import torch
from conftest import SPECIAL
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersVectorQuantizer

from hf_vqgan import QUANTIZERS, VQGANConfig, VQGANModel, lookup
from hf_vqgan.configuration_vqgan import idle_options
from hf_vqgan.lookup import common_offset, exact_products, kmeans, kmeans_plus_plus, near_codes, nearest_code
from hf_vqgan.quantizers import (
    VectorQuantizer,
    _PassGradient,
    _Rotate,
    entropy_loss,
    entropy_loss_of_bits,
)

D, K = 4, 32


VARIANTS = {name: (name, {}) for name in QUANTIZERS} | {
    "vq-cosine": ("vq", {"codebook_l2_norm": True}),
    "vq-rotation": ("vq", {"rotation_trick": True}),
    "vq-entropy": ("vq", {"entropy_weight": 0.1}),
    "vq-perturbed": ("vq", {"perturbation_share": 0.5}),
    "ibq-perturbed": ("ibq", {"perturbation_share": 0.5}),
    "residual-rotation": ("residual", {"rotation_trick": True}),
    "vq_ema-cosine": ("vq_ema", {"codebook_l2_norm": True}),
    "ibq-cosine": ("ibq", {"codebook_l2_norm": True}),
    "residual-ema": ("residual", {"base_quantizer": "vq_ema"}),
    "grouped-simvq": ("grouped", {"base_quantizer": "simvq"}),
}


def build(name: str, **fields) -> torch.nn.Module:
    fields = {"vq_embed_dim": D, "num_vq_embeddings": K} | SPECIAL.get(name, {}) | fields
    quantizer = QUANTIZERS[name](VQGANConfig(quantizer=name, **fields))
    quantizer.initialize_codebook(torch.randn(4 * K, D), torch.Generator().manual_seed(0))
    return quantizer


@pytest.fixture(params=sorted(VARIANTS))
def variant(request):
    return request.param


@pytest.fixture
def quantizer(variant):
    name, fields = VARIANTS[variant]
    return build(name, **fields)


@pytest.fixture
def latents():
    return torch.randn(2, D, 5, 3)


# ------------------------------------------------------------------------------------------------ the contract


def test_quantized_is_the_codes_at_the_indices(quantizer, latents):
    output = quantizer(latents)
    several = (quantizer.num_codebooks,) if quantizer.num_codebooks > 1 else ()
    assert output.indices.shape == (2, 5, 3, *several) and output.indices.dtype == torch.int64
    assert output.indices.min() >= 0 and output.indices.max() < quantizer.num_codes
    assert len(output.indices.unique()) > 1
    assert torch.equal(output.quantized, quantizer.codes(output.indices))


def test_codes_quantize_to_themselves(quantizer, variant, latents):
    if variant.split("-")[0] in ("fsq", "ibq", "gumbel", "residual") or variant == "vq-perturbed":
        pytest.skip("not a projection: see the class's docstring")
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
    config = VQGANConfig()
    assert all(isinstance(getattr(config, f"{name}_weight"), float) for name in quantizer.loss_names)


def test_bfloat16_chooses_in_float32(quantizer, latents):
    """Rounded weights and latents, but a choice among them that is not rounded again."""
    quantizer = quantizer.to(torch.bfloat16).eval()
    latents = latents.to(torch.bfloat16)
    output = quantizer(latents)
    assert output.quantized.dtype == torch.bfloat16
    exact = quantizer.double()(latents.double())
    assert torch.equal(output.indices, exact.indices)


def test_saves_and_loads_exactly(quantizer, variant, latents):
    name, fields = VARIANTS[variant]
    torch.manual_seed(1)
    other = build(name, **fields)
    other.load_state_dict(quantizer.state_dict())
    quantizer.eval(), other.eval()
    assert torch.equal(other(latents).quantized, quantizer(latents).quantized)


def test_empty_and_broken_input(quantizer, latents):
    with pytest.raises(ValueError, match="empty"):
        quantizer(latents[:0])
    with pytest.raises(ValueError, match=r"expected \(B, 4, h, w\)"):
        quantizer(latents[:, :3])
    latents[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 120 latent values are NaN"):
        quantizer.eval()(latents)
    # In training it has to come out in a loss or a gradient, where the trainer sees it.
    output = quantizer.train()(latents.requires_grad_())
    loss = sum(output.losses.values(), start=output.quantized.sum())
    loss.backward()
    assert not (loss.isfinite() and latents.grad.isfinite().all())


def test_unpacks_as_diffusers_expects(quantizer, latents):
    output = quantizer(latents)
    quantized, loss, (_, _, indices) = output
    assert torch.equal(quantized, output.quantized) and loss.ndim == 0
    assert torch.equal(output.indices.flatten(), indices)


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


@pytest.mark.parametrize("d", [8, 256])
def test_a_common_offset_changes_no_choice(d):
    """float32 products of vectors with an offset of 1,000 times their spread chose wrong half of the time."""
    codebook, vectors = torch.randn(2048, d) + 1000, torch.randn(256, d) + 1000
    exact = torch.cat([torch.cdist(rows, codebook.double()) for rows in vectors.double().split(16)])
    assert torch.equal(nearest_code(vectors, codebook), exact.argmin(dim=1))
    assert torch.equal(near_codes(vectors, codebook, 5), exact.topk(5, largest=False).indices)
    products = vectors.double() @ codebook.double().T
    assert torch.equal(nearest_code(vectors, codebook, inner_product=True), products.argmax(dim=1))
    assert torch.equal(near_codes(vectors, codebook, 5, inner_product=True), products.topk(5).indices)


@pytest.mark.parametrize("name", ["vq", "ibq"])
def test_a_common_offset_changes_no_probability(name, latents):
    """Entropy loss, IBQ's soft choice and the gradients of both, with an offset as in float64."""
    quantizer = build(name, entropy_weight=1.0, entropy_temperature=1.0)
    with torch.no_grad():
        quantizer.embedding.weight.add_(1000)
    results = {}
    for dtype in (torch.float32, torch.float64):
        z = (latents + 1000).to(dtype).requires_grad_()
        output = quantizer.to(dtype)(z)
        loss = output.losses["entropy"] + (output.quantized * torch.linspace(-1, 1, z.numel()).view(z.shape)).sum()
        results[dtype] = output.losses["entropy"], torch.autograd.grad(loss, z)[0]
    for single, double in zip(*results.values(), strict=True):
        torch.testing.assert_close(single.double(), double, atol=2e-3, rtol=1e-3)


def test_equal_distances_stay_equal_with_an_offset():
    codebook = torch.tensor([[103.0], [101.0], [99.0], [101.0], [99.0], [97.0]])
    assert nearest_code(torch.tensor([[100.0], [98.0], [102.0]]), codebook).tolist() == [1, 2, 0]
    assert not common_offset(torch.randn(500, 8)).any()  # what is about the origin is compared as it is


def test_a_broken_code_stays_visible():
    """It has to come out in the losses, where training notices it."""
    codebook = torch.randn(32, D)
    codebook[7] = torch.nan
    assert nearest_code(torch.randn(5, D), codebook).eq(7).all()


class WatchPrecision(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes at what precision each matrix product runs."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm"):
            self.seen.add(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["highest", "high", "medium"])
def process_precision(request):
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def test_choices_do_not_depend_on_the_precision_of_products(quantizer, latents, process_precision):
    """TF32, a setting of the process, chooses other codes. (Here only the setting is looked at.)"""
    with WatchPrecision() as watch:
        output = quantizer(latents)
        quantizer.codes(output.indices)
        kmeans(torch.randn(50, D), 10)
        nearest_code(torch.randn(50, D), torch.randn(5, D))
    assert watch.seen == {"highest"}
    assert torch.get_float32_matmul_precision() == process_precision


def test_precision_is_restored_exactly():
    backends = [b for b in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if hasattr(b, "fp32_precision")]

    def settings():
        return [backend.fp32_precision for backend in backends]

    try:
        torch.backends.cuda.matmul.allow_tf32 = True  # on its own: no precision of the set of all backends
        before = settings()
        with pytest.raises(KeyError), exact_products():
            assert not torch.backends.cuda.matmul.allow_tf32
            raise KeyError
        assert torch.backends.cuda.matmul.allow_tf32 and settings() == before
        for backend in backends:
            backend.fp32_precision = "tf32"  # one by one, which the getter for all of them refuses
        with exact_products():
            assert set(settings()) <= {"ieee"}
        assert set(settings()) <= {"tf32"}
    finally:
        for backend in backends:
            backend.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


def test_threads_share_the_precision():
    """The first to leave must not take it from the other, nor the last leave it behind."""
    inside, leave = threading.Event(), threading.Event()

    def other():
        with exact_products():
            inside.set()
            leave.wait(timeout=60)

    torch.set_float32_matmul_precision("high")
    try:
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(timeout=60)
        with exact_products():
            leave.set()
            thread.join()
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        leave.set()
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("codes", [K, 3000])
def test_compiled_quantizers_choose_alike(codes, latents, monkeypatch):
    """In one graph, whatever the number of codes, and with products at full precision there, too."""
    quantizer = build("vq", num_vq_embeddings=codes).eval()
    seen, inner = [], lookup._comparable

    def watched(*args):
        seen.append(torch.get_float32_matmul_precision())
        return inner(*args)

    monkeypatch.setattr(lookup, "_comparable", watched)
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, D)

    def search(latents, vectors):
        return quantizer(latents).indices, near_codes(vectors, quantizer.embedding.weight, 3)

    torch.set_float32_matmul_precision("high")
    try:
        compiled = torch.compile(search, backend="aot_eager", fullgraph=True)(latents, vectors)
        for found, expected in zip(compiled, search(latents, vectors), strict=True):
            assert torch.equal(found, expected)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.compiler.reset()
    assert seen == ["highest"] * 4


# ------------------------------------------------------------------------------------------------ options

# An option, another value than its default, and what it needs beside it to have an effect.
OPTIONS = {
    "commitment_weight": (0.5, {}),
    "codebook_weight": (0.5, {}),
    "codebook_l2_norm": (True, {}),
    "rotation_trick": (True, {}),
    "entropy_weight": (0.1, {}),
    "entropy_temperature": (0.5, {"entropy_weight": 0.1}),
    "perturbation_share": (0.5, {}),
    "perturbation_neighbours": (3, {"perturbation_share": 0.5}),
    "ema_decay": (0.5, {}),
    "kl_weight": (0.1, {}),
    "gumbel_temperature": (0.5, {}),
    "fsq_levels": ((5, 3, 2, 2), {}),
    "num_codebooks": (4, {}),
    "base_quantizer": ("simvq", {}),
    "normalize_on_lookup": (True, {}),
    "num_used_codes": (5, {}),
}
KINDS = {name: {} for name in QUANTIZERS} | {
    f"{name}-{base}": {"base_quantizer": base} for name in ("residual", "grouped") for base in ("vq_ema", "simvq")
}


def training_step(name: str, **fields) -> list[torch.Tensor]:
    """All that one step of training with a quantizer comes to: its loss, gradients, new codes, what codes look like."""
    torch.manual_seed(0)
    config = VQGANConfig(quantizer=name, **{"vq_embed_dim": D, "num_vq_embeddings": K} | SPECIAL.get(name, {}) | fields)
    quantizer = QUANTIZERS[name](config)
    latents = torch.randn(2, D, 5, 3, requires_grad=True)
    vectors = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
    quantizer.initialize_codebook(torch.randn(4 * K, D), torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    output = quantizer(latents)
    loss = (output.quantized * torch.linspace(-1, 1, latents.numel()).view(latents.shape)).sum()
    for term, value in output.losses.items():
        loss = loss + getattr(config, f"{term}_weight") * value
    loss.backward()
    statistics = quantizer.codebook_statistics(vectors, output.indices.flatten(0, 2))
    if statistics is not None:
        quantizer.update_codebook(statistics)
    gradients = [parameter.grad for parameter in quantizer.parameters() if parameter.grad is not None]
    looked_up = quantizer.codes(output.indices)
    return [loss, output.quantized, latents.grad, *gradients, *quantizer.state_dict().values(), looked_up]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_has_an_effect_or_is_refused(option, kind):
    name, fields = kind.split("-")[0], KINDS[kind]
    value, beside = OPTIONS[option]
    if option in fields:
        fields = {}
    config = {"quantizer": name} | fields | {option: value}
    try:
        after = training_step(name, **fields | beside | {option: value})
    except ValueError as error:
        assert option in str(error)
        if option in idle_options(config):
            assert f"{option}={value!r} is for quantizer=" in str(error) and f"not for {name!r}" in str(error)
        return
    before = training_step(name, **fields | beside)
    same = len(before) == len(after) and all(map(torch.equal, before, after))
    assert not same, "neither an effect nor an error"


def test_which_options_are_refused():
    """What the table in the README says of options that combine."""
    refused = {
        option: {name for name in QUANTIZERS if option in idle_options({"quantizer": name, option: value})}
        for option, (value, _) in OPTIONS.items()
    }
    rounding = {"fsq", "lfq", "bsq"}
    assert refused["rotation_trick"] == {"ibq", "gumbel", *rounding}
    assert refused["perturbation_share"] == refused["codebook_l2_norm"] == {"gumbel", *rounding}
    assert refused["entropy_weight"] == {"gumbel", "fsq"}
    assert refused["commitment_weight"] == {"gumbel", "fsq", "bsq"}


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
            torch.testing.assert_close(
                grad,
                want,
            )


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
    found = kmeans(points, 3, generator=torch.Generator().manual_seed(0))
    assert torch.cdist(centers, found).min(dim=1).values.max() < 0.05


def test_kmeans_with_fewer_points_than_clusters_gives_distinct_codes():
    points = torch.randn(10, D)
    codes = kmeans(points, K, generator=torch.Generator().manual_seed(0))
    assert codes.shape == (K, D) and torch.isfinite(codes).all() and len(codes.unique(dim=0)) > 10


def test_single_code():
    quantizer = VectorQuantizer(VQGANConfig(vq_embed_dim=D, num_vq_embeddings=1))
    assert quantizer(torch.randn(1, D, 2, 2)).indices.eq(0).all()


# ------------------------------------------------------------------------------------------------ the other quantizers


def test_rotation_trick_is_the_householder_product():
    """Against the rotation matrix itself, in float64: e = λ R z exactly, and the gradient is λ Rᵀ g."""
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    e, grad = torch.randn(2, 6, 5, dtype=torch.float64)
    _Rotate.apply(z, e).backward(grad)
    for row in range(6):
        z_hat, e_hat = (x / x.norm() for x in (z[row].detach(), e[row]))
        r = (z_hat + e_hat) / (z_hat + e_hat).norm()
        rotation = torch.eye(5, dtype=torch.float64) - 2 * r.outer(r) + 2 * e_hat.outer(z_hat)
        scale = e[row].norm() / z[row].detach().norm()
        torch.testing.assert_close(scale * rotation @ z[row].detach(), e[row])
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(5, dtype=torch.float64))
        torch.testing.assert_close(z.grad[row], scale * rotation.T @ grad[row])


@pytest.mark.parametrize("function, plain", [
    (_PassGradient.apply, lambda z, e: z + e - z.detach()),
    (lambda z, e: _Rotate.apply(z, e.detach()), lambda z, e: rotated(z, e.detach())),
])  # fmt: skip
def test_second_derivatives_are_those_of_the_plain_formula(function, plain):
    z, e = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = []
    for each in (function, plain):
        output = each(z, e)
        # a loss that is not linear in the output, and a penalty on its gradients
        loss = (output**3 * (3 + torch.arange(output.numel()).view(output.shape))).sum()
        first = torch.autograd.grad(loss, (z, e), create_graph=True, allow_unused=True, materialize_grads=True)
        penalty = sum((gradient**3).sum() for gradient in first)
        found.append([*first, *torch.autograd.grad(penalty, (z, e), allow_unused=True, materialize_grads=True)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def rotated(z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """λ R z with λ and R constants, row by row."""
    rows = []
    for row, code in zip(z, e, strict=True):
        z_hat, e_hat = (x.detach() / x.detach().norm() for x in (row, code))
        r = (z_hat + e_hat) / (z_hat + e_hat).norm()
        rotation = torch.eye(len(row), dtype=row.dtype) - 2 * r.outer(r) + 2 * e_hat.outer(z_hat)
        rows.append(code.detach().norm() / row.detach().norm() * rotation @ row)
    return torch.stack(rows)


def test_residual_rotates_by_the_sum_of_its_codes():
    quantizer = build("residual", rotation_trick=True).double()
    z = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(z)
    total, _, _ = quantizer.quantize_vectors(z)
    (found,) = torch.autograd.grad((total * upstream).sum(), z)
    (expected,) = torch.autograd.grad((rotated(z, total.detach()) * upstream).sum(), z)
    torch.testing.assert_close(found, expected)


def test_entropy_loss_against_its_definition():
    z, codebook = torch.randn(50, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    z.requires_grad_()
    p = (-torch.cdist(z, codebook).square() / 0.3).softmax(dim=1)
    mean = p.mean(dim=0)
    expected = -(p * p.log()).sum(dim=1).mean() + (mean * mean.log()).sum()
    loss = entropy_loss(z, codebook, temperature=0.3, max_scores=100)  # in parts of 14 rows
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, z, retain_graph=True)[0] for x in (loss, expected)))


def test_entropy_of_bits_is_that_of_all_their_combinations():
    """Factorised and joint form agree for p(bits) = Π p(bit); over two groups H(E[p]) is an upper bound."""
    logits = torch.randn(40, 4, dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)  # (16, 4)
    # a bit of logit l is ±1 with probability ∝ exp(-(l/4 ∓ 1)²)
    joint = (-(logits[:, None] / 4 - signs).square().sum(dim=-1)).softmax(dim=1)
    mean = joint.mean(dim=0)
    expected = -(joint * joint.log()).sum(dim=1).mean() + (mean * mean.log()).sum()
    torch.testing.assert_close(entropy_loss_of_bits(logits), expected)
    assert entropy_loss_of_bits(logits, group=2) <= expected + 1e-12


def test_ema_follows_the_written_recursion():
    quantizer = build("vq_ema", ema_decay=0.8)
    size, total = quantizer.cluster_size.clone(), quantizer.embed_avg.clone()
    for _ in range(3):
        vectors = torch.randn(40, D)
        indices = nearest_code(vectors, quantizer.embedding.weight)
        for code in range(K):
            mine = vectors[indices == code]
            size[code] = 0.8 * size[code] + 0.2 * len(mine)
            total[code] = 0.8 * total[code] + 0.2 * mine.sum(dim=0)
        quantizer.update_codebook(quantizer.codebook_statistics(vectors, indices))
        torch.testing.assert_close(quantizer.embedding.weight.detach(), total / size[:, None])


def test_ema_leaves_long_unused_codes_in_place():
    quantizer = build("vq_ema", ema_decay=0.5)
    before = quantizer.embedding.weight.detach().clone()
    vectors = before[:1].repeat(10, 1)
    for _ in range(200):  # 0.5^200 is below float32's smallest number
        statistics = quantizer.codebook_statistics(vectors, torch.zeros(10, dtype=torch.int64))
        quantizer.update_codebook(statistics)
    torch.testing.assert_close(quantizer.embedding.weight.detach(), before)


def test_ema_restart_resets_the_averages():
    quantizer = build("vq_ema")
    quantizer.cluster_size.mul_(100)
    dead = torch.zeros(K, dtype=torch.bool)
    dead[5] = True
    quantizer.restart_codes(dead, torch.full((3, D), 9.0))
    quantizer.update_codebook(quantizer.codebook_statistics(torch.zeros(1, D), torch.zeros(1, dtype=torch.int64)))
    torch.testing.assert_close(quantizer.embedding.weight[5].detach(), torch.full((D,), 9.0))


def test_ema_statistics_stay_float32_and_travel_with_the_model(tmp_path, tiny_config):
    tiny_config.quantizer = "vq_ema"
    model = VQGANModel(tiny_config)
    model.quantize.cluster_size.uniform_(1, 2)
    exact = model.quantize.cluster_size.clone()
    model.to(torch.bfloat16)
    assert model.quantize.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(model.quantize.cluster_size, exact)
    model.float().save_pretrained(tmp_path)
    assert torch.equal(VQGANModel.from_pretrained(tmp_path).quantize.cluster_size, exact)
    half = VQGANModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.quantize.cluster_size, exact)


def test_vq_weights_become_ema_weights(tmp_path, tiny_model):
    """Averages that a checkpoint lacks start at its codes, not at zero."""
    tiny_model.save_pretrained(tmp_path)
    model = VQGANModel.from_pretrained(tmp_path, quantizer="vq_ema")
    assert torch.equal(model.quantize.embed_avg, tiny_model.quantize.embedding.weight.detach())
    assert model.quantize.cluster_size.eq(1).all()


def test_ibq_gradient_against_the_written_formula():
    quantizer = build("ibq").double()
    quantizer.max_scores = 100  # several parts
    z = torch.randn(2, D, 3, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(z)
    weight = quantizer.embedding.weight
    rows = z.permute(0, 2, 3, 1).reshape(-1, D)
    p = (rows @ weight.T).softmax(dim=1)
    hard = torch.nn.functional.one_hot(p.argmax(dim=1), K).double()
    textbook = ((hard - p).detach() + p) @ weight
    textbook = (textbook.view(2, 3, 3, D).permute(0, 3, 1, 2) * upstream).sum()
    ours = (quantizer(z).quantized * upstream).sum()
    torch.testing.assert_close(ours, textbook)
    for got, want in zip(
        torch.autograd.grad(ours, (z, weight)), torch.autograd.grad(textbook, (z, weight)), strict=True
    ):
        torch.testing.assert_close(got, want)
    assert (torch.autograd.grad((quantizer(z).quantized * upstream).sum(), weight)[0].abs().sum(dim=1) > 0).all()


def test_gumbel_draws_in_training_only(latents):
    quantizer = build("gumbel")
    first, second = (quantizer.train()(latents).indices for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (quantizer.eval()(latents).indices for _ in range(2))
    assert torch.equal(first, second)
    # The draw follows softmax(logits): for one latent, frequencies match probabilities.
    one = torch.randn(1, D, 1, 1)
    drawn = quantizer.train()(one.expand(20000, -1, -1, -1)).indices.flatten().bincount(minlength=K) / 20000
    torch.testing.assert_close(drawn, quantizer.proj(one.flatten()).softmax(dim=0).detach(), atol=0.015, rtol=0)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3, 4), (7, 5)])
def test_fsq_reaches_every_code_and_numbers_them(levels):
    quantizer = build("fsq", fsq_levels=levels)
    count = math.prod(levels)
    codes = quantizer.code_vectors(torch.arange(count))
    assert len(codes.unique(dim=0)) == count and codes.abs().max() <= 1
    _, indices, _ = quantizer.quantize_vectors(1.5 * torch.randn(400 * count, len(levels)))
    assert len(indices.unique()) == count


def test_fsq_with_two_levels_is_alive():
    """The paper's shift, atanh(1) there, left 5 of these 16 codes, and a thousandth of the gradient."""
    quantizer = build("fsq", fsq_levels=(2, 2, 2, 2))
    vectors = torch.randn(4000, 4, requires_grad=True)
    quantized, indices, _ = quantizer.quantize_vectors(vectors)
    assert indices.bincount(minlength=16).min() > 4000 / 16 / 2
    assert torch.equal(quantized.detach() == 0, vectors > 0) and quantized.detach().unique().tolist() == [-1, 0]
    assert torch.autograd.grad(quantized.mean(), vectors)[0].mean() * vectors.numel() > 0.25


@pytest.mark.parametrize("levels", [3, 4, 5, 8, 9])
def test_fsq_is_the_papers_from_three_levels_on(levels):
    quantizer = build("fsq", fsq_levels=(levels,), vq_embed_dim=1)
    vectors = torch.linspace(-4, 4, 3001, dtype=torch.float64)[:, None]
    half, offset = (levels - 1) * 1.001 / 2, 0.0 if levels % 2 else 0.5
    expected = (torch.tanh(vectors + math.atanh(offset / half)) * half - offset).round() / (levels // 2)
    torch.testing.assert_close(quantizer.quantize_vectors(vectors)[0], expected)


def test_fsq_numbers_stay_in_range_with_many_levels():
    quantizer = build("fsq", fsq_levels=(5001, 3000))
    _, indices, _ = quantizer.quantize_vectors(torch.tensor([[20.0, 20.0], [-20.0, -20.0]]))
    assert indices.tolist() == [5001 * 3000 - 1, 0]


def test_lookup_free_codes_are_the_nearest():
    for name in ("lfq", "bsq"):
        quantizer = build(name)
        vectors = torch.randn(100, D)
        _, indices, _ = quantizer.quantize_vectors(vectors)
        codebook = quantizer.code_vectors(torch.arange(2**D))
        assert torch.equal(indices, nearest_code(vectors, codebook))
    assert torch.allclose(codebook.norm(dim=1), torch.ones(2**D))  # bsq: on the unit sphere


def test_residual_stages_shrink_the_error():
    quantizer = build("residual", num_codebooks=4)
    vectors = torch.randn(200, D)
    _, indices, _ = quantizer.quantize_vectors(vectors)
    errors = [share.square().mean() for share in quantizer.shares(vectors, indices)]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize(
    "name, fields", [("residual", {}), ("grouped", {}), ("residual", {"base_quantizer": "vq_ema"})]
)
def test_composites_pass_upkeep_to_their_parts(name, fields):
    quantizer = build(name, **fields)
    vectors = torch.randn(100, D)
    _, indices, _ = quantizer.quantize_vectors(vectors)
    statistics = quantizer.codebook_statistics(vectors, indices)
    assert (statistics is None) == (not fields)
    if fields:
        quantizer.update_codebook(statistics)
    before = [p.detach().clone() for p in quantizer.codebook_parameters()]
    dead = torch.zeros(quantizer.num_codebooks * K, dtype=torch.bool)
    dead[K + 2] = True  # code 2 of the second codebook
    assert torch.equal(quantizer.restart_codes(dead, vectors, torch.Generator().manual_seed(0)), dead)
    moved = [(a != b).any(dim=1) for a, b in zip(before, quantizer.codebook_parameters(), strict=True)]
    assert [rows.nonzero().flatten().tolist() for rows in moved] == [[], [2]] + [[]] * (quantizer.num_codebooks - 2)


def test_perturbed_choices_are_near_codes_and_only_in_training():
    quantizer = build("vq", perturbation_share=1.0, perturbation_neighbours=3)
    vectors = torch.randn(300, D)
    near = torch.cdist(vectors, quantizer.embedding.weight).topk(3, largest=False).indices
    chosen = quantizer.train().quantize_vectors(vectors)[1]
    assert (near == chosen[:, None]).any(dim=1).all() and (chosen != near[:, 0]).float().mean() > 0.5
    assert torch.equal(quantizer.eval().quantize_vectors(vectors)[1], near[:, 0])


def test_perturbed_ibq_draws_among_the_largest_products():
    quantizer = build("ibq", perturbation_share=1.0, perturbation_neighbours=3)
    vectors = torch.randn(300, D)
    near = (vectors @ quantizer.embedding.weight.T).topk(3).indices
    chosen = quantizer.train().quantize_vectors(vectors)[1]
    assert (near == chosen[:, None]).any(dim=1).all() and (chosen != near[:, 0]).float().mean() > 0.5


def test_plain_codebooks_export_exactly(variant, quantizer, latents):
    """to_codebook() with nearest-code lookup has to be the quantizer, to the last index."""
    codebook = quantizer.to_codebook()
    if codebook is None:
        pytest.skip("not a plain codebook")
    output = quantizer.eval()(latents)
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, D)
    assert torch.equal(nearest_code(vectors, codebook), output.indices.flatten())


def test_kmeans_plus_plus_spreads_its_start():
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = centers.repeat(50, 1) + 0.1 * torch.randn(200, 2)
    for seed in range(5):
        start = kmeans_plus_plus(points, 4, torch.Generator().manual_seed(seed))
        assert torch.cdist(centers, start).min(dim=1).values.max() < 1
