"""The lookup as GPUs run it, without one: exact, in few kernels, never waiting; and Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import SPECIAL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from hf_vqgan import QUANTIZERS, VQGANConfig, lookup, quantizers
from hf_vqgan.lookup import cluster_sums, kmeans, kmeans_plus_plus, near_codes, nearest_code
from hf_vqgan.quantizers import constant

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NO_KERNEL = {"_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "unbind"}
NO_KERNEL |= {"split_with_sizes", "squeeze", "t", "transpose", "unsqueeze", "view"}  # views, then memory, then none
NO_KERNEL |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types"}
# Their results or their work depend on the data, so on a GPU the host waits for them.
WAITING = {"_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "unique_consecutive"}


class Launches(TorchDispatchMode):
    """Counts the operators that would start a kernel on a GPU, and those for which the host would wait."""

    def __init__(self):
        super().__init__()
        self.kernels, self.waits, self.largest = Counter(), Counter(), 0
        self.undo = pytest.MonkeyPatch()

    def __enter__(self):
        def noted(tensor):  # on CPUs, it reads the memory and calls no operator
            self.waits["tolist"] += 1
            return listed(tensor)

        listed = torch.Tensor.tolist
        self.undo.setattr(torch.Tensor, "tolist", noted)
        return super().__enter__()

    def __exit__(self, *error):
        self.undo.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        masks = args[1] if name.startswith(("index", "_index_put")) and isinstance(args[1], (list, tuple)) else ()
        if name in WAITING or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.waits[name] += 1
        elif namespace == "aten" and name not in NO_KERNEL:
            self.kernels[name] += 1
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (list, tuple)) else [result]
        self.largest = max([self.largest, *(t.nbytes for t in tensors if isinstance(t, torch.Tensor))])
        return result


@pytest.fixture
def as_on_gpus(monkeypatch):
    monkeypatch.setattr(lookup, "_is_cached", lambda device: False)


@pytest.fixture
def fused(monkeypatch):
    """The Triton kernel: in its interpreter, or on a GPU where there is one."""
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("runs in Triton's interpreter: see test_triton_kernel_in_its_interpreter")
    monkeypatch.setenv("HF_VQGAN_TRITON", "1")


# ------------------------------------------------------------------------------------------------ few kernels


@pytest.mark.parametrize(
    "n, k, d, kernels", [(8192, 16384, 8, 20), (8192, 16384, 256, 20), (2048, 1024, 8, 20), (32768, 262144, 32, 275)]
)
def test_search_takes_few_kernels_and_bounded_memory(as_on_gpus, n, k, d, kernels):
    """In cache-sized tiles, it would be 900 of them for the first size, and 45,000 for the last."""
    with FakeTensorMode(), Launches() as launches:
        found = nearest_code(torch.empty(n, d), torch.empty(k, d))
    assert found.shape == (n,) and found.dtype == torch.int64
    assert launches.kernels.total() <= kernels and not launches.waits
    assert launches.largest <= lookup.SCORE_BYTES


def test_double_precision_and_huge_codebooks_stay_within_bounds(as_on_gpus):
    with FakeTensorMode(), Launches() as launches:
        nearest_code(torch.empty(8192, 8, dtype=torch.float64), torch.empty(16384, 8, dtype=torch.float64))
    assert launches.largest <= lookup.SCORE_BYTES
    with FakeTensorMode(), Launches() as launches:  # one vector's scores are the least that there can be
        nearest_code(torch.empty(3, 2), torch.empty(2**27, 2))
    assert launches.kernels["addmm"] == 3


SPECIAL_PARTS = {
    "vq-entropy": ("vq", {"entropy_weight": 0.1}),
    "vq-perturbed": ("vq", {"perturbation_share": 0.5}),
    "vq-rotation": ("vq", {"rotation_trick": True}),
    "residual-ema": ("residual", {"base_quantizer": "vq_ema"}),
}
LIMITS = {  # kernels of a forward and backward pass, a tenth above today's
    "vq": 33, "vq_ema": 29, "simvq": 35, "ibq": 57, "gumbel": 38, "fsq": 27, "lfq": 96, "bsq": 112, "residual": 102,
    "grouped": 70, "vq-entropy": 121, "vq-perturbed": 60, "vq-rotation": 58, "residual-ema": 87,
}  # fmt: skip


@pytest.mark.parametrize("variant", sorted(LIMITS))
def test_training_never_waits(as_on_gpus, variant):
    """Forward, backward, update and restart of every quantizer."""
    name, fields = SPECIAL_PARTS.get(variant, (variant, {}))
    fields = {"vq_embed_dim": 4, "num_vq_embeddings": 32} | SPECIAL.get(name, {}) | fields
    quantizer = QUANTIZERS[name](VQGANConfig(quantizer=name, **fields)).train()
    latents = torch.randn(2, 4, 5, 3, requires_grad=True)
    quantizer(latents)
    with Launches() as step:
        output = quantizer(latents)
        sum(output.losses.values(), start=output.quantized.sum()).backward()
    vectors = latents.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    with Launches() as upkeep:
        statistics = quantizer.codebook_statistics(vectors, output.indices.flatten(0, 2))
        if statistics is not None:
            quantizer.update_codebook(statistics)
        dead = torch.ones(quantizer.num_codebooks * quantizer.num_codes, dtype=torch.bool)
        quantizer.restart_codes(dead, vectors, torch.Generator().manual_seed(0))
    assert not step.waits and not upkeep.waits
    assert step.kernels.total() <= LIMITS[variant], step.kernels.most_common()


def test_starting_from_data_never_waits(as_on_gpus):
    points = torch.randn(60, 4)
    with Launches() as launches:
        kmeans(points, 20, iterations=2)
        kmeans(points, 100, iterations=2)
        kmeans_plus_plus(points, 10)
        near_codes(points, points, 3)
    assert not launches.waits


def test_waiting_would_be_noticed():
    mask = torch.tensor([True, False])
    waits = [mask.nonzero, lambda: mask[mask], lambda: mask.long().bincount(), lambda: mask.long().tolist()]
    waits += [lambda: bool(mask.any()), lambda: torch.zeros(2).__setitem__(mask, torch.ones(1))]
    for wait in waits:
        with Launches() as launches:
            wait()
        assert launches.waits


# ------------------------------------------------------------------------------------------------ what GPUs choose


@pytest.mark.parametrize("score_bytes", [2**28, 2**12])
@pytest.mark.parametrize("inner_product", [False, True])
def test_large_products_choose_as_tiles_do(as_on_gpus, monkeypatch, score_bytes, inner_product):
    monkeypatch.setattr(lookup, "SCORE_BYTES", score_bytes)
    for n, k, d in [(0, 5, 3), (1, 1, 1), (130, 300, 8), (64, 3000, 2)]:
        vectors, codebook = (torch.randn(rows, d, dtype=torch.float64) + 3 for rows in (n, k))
        scores = -vectors @ codebook.T if inner_product else torch.cdist(vectors, codebook)
        assert torch.equal(nearest_code(vectors, codebook, inner_product=inner_product), scores.argmin(dim=1))


# Below, at and beyond the kernel's blocks of 64 vectors, 128 codes, 16 dimensions
SHAPES = [(0, 5, 3), (1, 1, 1), (70, 1, 4), (64, 128, 16), (7, 300, 1), (130, 257, 2), (65, 400, 40), (3, 129, 256)]


class Precisions(TorchDispatchMode):
    """Notes at what precision each matrix product runs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm"):
            seen = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
            self.seen = getattr(self, "seen", set()) | {seen}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_tf32_changes_no_choice(as_on_gpus, precision):
    vectors, codebook = torch.randn(64, 256), torch.randn(500, 256)
    exact = torch.cdist(vectors.double(), codebook.double()).argmin(dim=1)
    torch.set_float32_matmul_precision(precision)
    try:
        with Precisions() as precisions:
            found = nearest_code(vectors, codebook)
            nearest_code(vectors, codebook, inner_product=True)
        with pytest.raises(RuntimeError):
            nearest_code(vectors[:, :3], codebook)  # fails inside
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precisions.seen == {("highest", False)}
    assert torch.equal(found, exact)


def grid_points(n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers in [-2, 2]: float32 scores are exact, and ties many."""
    return torch.randint(-2, 3, (n, d)).to(dtype)


@pytest.mark.parametrize("path", ["as_on_gpus", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "n, k, d", [(0, 5, 3), (1, 1, 1), (70, 1, 4), (7, 300, 1), (130, 257, 2), (65, 400, 40), (3, 129, 256)]
)
def test_choices_equal_float64_with_the_lowest_of_ties(request, path, n, k, d, dtype):
    request.getfixturevalue(path)
    device = "cuda" if path == "fused" and not INTERPRETED else "cpu"
    vectors = grid_points(d, n, dtype).T.to(device)  # not contiguous
    codebook = grid_points(k, 2 * d, dtype)[:, ::2].to(device)
    for inner_product in (False, True):
        products = vectors.double() @ codebook.double().T
        scores = -products if inner_product else 0.5 * codebook.double().square().sum(dim=1) - products
        assert torch.equal(nearest_code(vectors, codebook, inner_product=inner_product), scores.argmin(dim=1))


@pytest.mark.parametrize("path", ["as_on_gpus", "fused"])
@pytest.mark.parametrize("d", [8, 100])
def test_offsets_and_small_codes_cost_no_choice(request, path, d):
    request.getfixturevalue(path)
    device = "cuda" if path == "fused" and not INTERPRETED else "cpu"
    small = (torch.rand(500, d) * 2 - 1) / 500
    for codebook, vectors in [(small, torch.randn(64, d)), (torch.randn(500, d) + 1000, torch.randn(64, d) + 1000)]:
        scores = 0.5 * codebook.double().square().sum(dim=1) - vectors.double() @ codebook.double().T
        found = nearest_code(vectors.to(device), codebook.to(device)).cpu()
        loss = scores.gather(1, found[:, None])[:, 0] - scores.amin(dim=1)
        spread = (codebook - codebook.mean(dim=0)).double().norm(dim=1).max()
        assert loss.max() <= 2e-6 * spread * (vectors - codebook.mean(dim=0)).norm(dim=1).max()
        assert (found == scores.argmin(dim=1)).float().mean() > 0.98


@pytest.mark.parametrize("path", ["as_on_gpus", "fused"])
def test_a_broken_code_is_chosen(request, path):
    """So that it shows in the losses."""
    request.getfixturevalue(path)
    device = "cuda" if path == "fused" and not INTERPRETED else "cpu"
    codebook = torch.randn(300, 4, device=device)
    codebook[170] = torch.nan
    assert nearest_code(torch.randn(5, 4, device=device), codebook).eq(170).all()


def test_fused_search_serves_kmeans_and_inner_products(fused, monkeypatch):
    """The same kernel for all callers; float64 goes the usual way."""
    calls = []
    from hf_vqgan import lookup_triton

    inner = lookup_triton.fused_nearest_code
    monkeypatch.setattr(lookup_triton, "fused_nearest_code", lambda *a: calls.append(a[3]) or inner(*a))
    device = "cpu" if INTERPRETED else "cuda"
    points = torch.randn(100, 4, device=device)
    kmeans(points, 10, iterations=1)
    quantizer = QUANTIZERS["ibq"](VQGANConfig(quantizer="ibq", vq_embed_dim=4, num_vq_embeddings=32)).to(device)
    quantizer(torch.randn(1, 4, 3, 3, device=device))
    nearest_code(points.double(), points.double())
    assert calls == [False, True]


# ------------------------------------------------------------------------------------------------ the Triton kernel


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="is what runs now")
def test_triton_kernel_in_its_interpreter():
    """In a process of its own: Triton decides on import whether it interprets. There, `fused` skips nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__, "-k", "fused"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")
def test_triton_kernel_compiles_without_tf32(tmp_path, monkeypatch):
    """For an H100 (no GPU needed): products are float32 FMAs, and two blocks of threads fit into a multiprocessor."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_vqgan import lookup_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"z": "*bf16", "e": "*fp32", "offset": "*fp32", "lowest": "*fp32", "chosen": "*i64"}
    constants = {"INNER_PRODUCT": False} | {
        name: getattr(lookup_triton, name) for name in ("BLOCK_N", "BLOCK_K", "BLOCK_D")
    }
    names = lookup_triton._search.arg_names
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    source = ASTSource(lookup_triton._search, signature, {(names.index(name),): v for name, v in constants.items()})
    options = {"num_warps": lookup_triton.WARPS}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "fma.rn.f32" in kernel.asm["ptx"] and "tf32" not in kernel.asm["ptx"] and "mma" not in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 100 * 1024


def test_a_missing_triton_and_a_wrong_switch_are_named(monkeypatch):
    from hf_vqgan import lookup_triton

    monkeypatch.setattr(lookup_triton, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        lookup_triton.fused_nearest_code(torch.randn(2, 2), torch.randn(2, 2), torch.zeros(2))
    monkeypatch.setenv("HF_VQGAN_TRITON", "yes")
    with pytest.raises(ValueError, match="HF_VQGAN_TRITON='yes' must be 1"):
        nearest_code(torch.randn(2, 2), torch.randn(2, 2))


# ------------------------------------------------------------------------------------------------ upkeep


def test_cluster_sums_are_exact():
    indices = torch.tensor([2, 0, 2, 2])
    counts, sums = cluster_sums(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), indices, 4)
    assert counts.tolist() == [1, 0, 3, 0] and sums.tolist() == [[2], [0], [8], [0]]


def test_constants_made_in_inference_serve_training():
    quantizers._constants.clear()
    quantizer = QUANTIZERS["fsq"](VQGANConfig(quantizer="fsq", vq_embed_dim=4, num_vq_embeddings=240, **SPECIAL["fsq"]))
    with torch.inference_mode():
        quantizer(torch.randn(1, 4, 2, 2))
    latents = torch.randn(1, 4, 2, 2, requires_grad=True)
    quantizer(latents).quantized.square().sum().backward()
    assert latents.grad.abs().sum() > 0


def test_constants_of_a_trace_are_not_kept():
    quantizers._constants.clear()
    with FakeTensorMode():
        constant((1, 2), torch.device("cpu"))
    assert type(constant((1, 2), torch.device("cpu"))) is torch.Tensor
    assert constant((1.0, 2.0), torch.device("cpu")).dtype == torch.float32  # equal keys, other type


def test_a_known_share_of_choices_is_perturbed():
    config = VQGANConfig(vq_embed_dim=2, num_vq_embeddings=50, perturbation_share=0.25, perturbation_neighbours=50)
    quantizer = QUANTIZERS["vq"](config).train()
    vectors = torch.randn(400, 2)
    moved = (quantizer.quantize_vectors(vectors)[1] != nearest_code(vectors, quantizer.embedding.weight)).sum()
    assert 80 < moved <= 100  # a draw among all 50 codes leaves 1 of 50 where it is
    assert quantizer.quantize_vectors(vectors[:1])[1].shape == (1,)  # none of one


def test_perturbation_compiles_in_one_graph_for_all_sizes():
    config = VQGANConfig(vq_embed_dim=2, num_vq_embeddings=50, perturbation_share=0.25, perturbation_neighbours=3)
    quantizer = QUANTIZERS["vq"](config).train()
    try:
        compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True, dynamic=True)
        for batch in (2, 3):
            assert compiled(torch.randn(batch, 2, 5, 3)).indices.shape == (batch, 5, 3)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_compiled_quantizers_keep_their_constants_to_themselves(name):
    """What a compiled graph returns may lie in memory that its next call overwrites."""
    fields = {"num_vq_embeddings": 48} | SPECIAL[name]
    quantizer = QUANTIZERS[name](VQGANConfig(quantizer=name, vq_embed_dim=4, **fields)).train()
    latents = torch.randn(2, 4, 5, 3)
    quantizers._constants.clear()
    try:
        compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)(latents)
    finally:
        torch.compiler.reset()
    assert not quantizers._constants
    assert torch.equal(compiled.indices, quantizer(latents).indices)


def test_a_pushed_model_takes_the_kernel_along():
    """transformers copies what is imported relatively, and refuses to load files whose imports are missing."""
    files = {os.path.basename(file) for file in get_relative_import_files(quantizers.__file__)}
    assert {"lookup.py", "lookup_triton.py"} <= files
    assert get_imports(importlib.util.find_spec("hf_vqgan.lookup_triton").origin) == ["torch"]
