"""Which code is nearest, and codes to start from: exact, in float32 or better, in bounded memory.

Shapes: N vectors and K codes of dimension D.

Nothing here waits for a GPU: no size and no branch depends on the data, so that the searches also run in CUDA graphs.
"""

import contextlib
import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


def nearest_code(vectors: Tensor, codebook: Tensor, tile: int = 1024, inner_product: bool = False) -> Tensor:
    """
    Index of the nearest code in Euclidean distance, ties to the lowest index.

    Minimises ½|e|² - z·e, which orders codes as |z - e|² does. Adding |z|² in float32 would not only cost time, but
    swamp the differences between small codes and pick wrong ones. So would an offset that z and e have in common, which
    is subtracted from both first ([`common_offset`]).

    How depends on the device. On CPUs, scores are made in tiles that stay in cache; on others in as few products as
    256 MB of scores allow (`SCORE_BYTES`), each for all codes. With `HF_VQGAN_TRITON=1` in the environment, float32 and
    narrower vectors on CUDA devices go through one fused Triton kernel that writes no scores at all. It is opt-in
    because it has run in Triton's interpreter only, not yet on a GPU.

    Args:
        vectors (`Tensor` of shape `(N, D)`): z, any float dtype; compared in float32 (float64 stays).
        codebook (`Tensor` of shape `(K, D)`): e.
        tile (`int`, defaults to 1024): On CPUs, at most `tile`² scores exist at a time. Without effect elsewhere.
        inner_product (`bool`, defaults to `False`): Take the code with the largest z·e instead.

    Returns:
        `Tensor` of shape `(N,)`, int64.
    """
    find = _nearest_code_operator if torch.compiler.is_compiling() else _nearest_code
    return find(vectors.detach(), codebook.detach(), tile, inner_product)


def near_codes(vectors: Tensor, codebook: Tensor, count: int, inner_product: bool = False) -> Tensor:
    """
    Indices `(N, count)` of the nearest codes, nearest first; arguments as of [`nearest_code`].

    Holds at most 2^24 of the N x K scores at a time.
    """
    find = _near_codes_operator if torch.compiler.is_compiling() else _near_codes
    return find(vectors.detach(), codebook.detach(), count, inner_product)


def common_offset(codebook: Tensor, sample: int = 1024) -> Tensor:
    """
    A vector `(D,)` near the mean of the codes `(K, D)`, to be subtracted from them and from the latents that they are
    compared with. With an offset of 1,000 times the spread, half of the choices by float32 products are wrong.

    Any vector would be correct, so about `sample` codes are enough to find one. It lies on a grid as wide as the next
    power of two above their standard deviation: codes around the origin stay the same bit for bit, and values with few
    digits keep them, so that ties stay ties. Codes that are not finite have no offset; they show in the losses then,
    instead of spoiling all scores.
    """
    with torch.no_grad():
        variance, mean = torch.var_mean(codebook[:: 1 + (len(codebook) - 1) // sample], dim=0, correction=0)
        grid = variance.mean().sqrt().log2().ceil().exp2()
        return ((mean / grid).round() * grid).nan_to_num(0, 0, 0)


_precision_lock = threading.Lock()
_precision_users = 0
_precision_before: tuple[str | None, ...] = ()
_backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
_precision_of_backends = [backend for backend in _backends if hasattr(backend, "fp32_precision")]  # PyTorch >= 2.9


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """
    Matrix products of float32 tensors in float32, whatever `torch.set_float32_matmul_precision` allows: with TF32, .2
    to .5 % of the choices are other ones.

    The setting is global to the process: the first thread to enter changes it, the last to leave restores it. It has no
    effect on compiled code; see `_nearest_code_operator`.
    """
    global _precision_users, _precision_before
    if torch.compiler.is_compiling():
        yield
        return
    with _precision_lock:
        if not _precision_users:
            _precision_before = _get_precision()
            _set_precision(_precision_before[0] and "highest", *["ieee" for _ in _precision_of_backends])
        _precision_users += 1
    try:
        yield
    finally:
        with _precision_lock:
            _precision_users -= 1
            if not _precision_users:
                _set_precision(*_precision_before)


def _get_precision() -> tuple[str | None, ...]:
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # raised if backends were set one by one
        overall = None
    return overall, *(backend.fp32_precision for backend in _precision_of_backends)


def _set_precision(overall: str | None, *backends: str | None) -> None:
    if overall is not None:
        torch.set_float32_matmul_precision(overall)
    for backend, precision in zip(_precision_of_backends, backends, strict=True):
        backend.fp32_precision = precision


def _comparable(vectors: Tensor, codebook: Tensor, inner_product: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors z and codes e in float32 or better, and their common offset, already subtracted from z."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    vectors, codebook = vectors.to(dtype), codebook.to(dtype)
    offset = common_offset(codebook)
    # z·(e - offset) orders codes as z·e does, so for inner products z stays the same
    return vectors if inner_product else vectors - offset, codebook, offset


def _with_bias(codes: Tensor, offset: Tensor, inner_product: bool) -> Tensor:
    """Codes e `(K, D)` as [-e, ½|e|²] `(K, D+1)`, [-e, 0] for inner products, with e less the offset."""
    minus = offset - codes
    bias = torch.zeros_like(minus[:, :1]) if inner_product else 0.5 * minus.square().sum(dim=1, keepdim=True)
    return torch.cat([minus, bias], dim=1)


SCORE_BYTES = 2**28  # of scores at a time, except on CPUs; a single vector's scores may take more, from K = 2^26 on


def _nearest_code(vectors: Tensor, codebook: Tensor, tile: int, inner_product: bool) -> Tensor:
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False), exact_products():
        if _is_fused(vectors.device) and torch.float64 not in (vectors.dtype, codebook.dtype):
            from .lookup_triton import fused_nearest_code  # not at the top: Triton takes long to import

            return fused_nearest_code(vectors, codebook, common_offset(codebook.float()), inner_product)
        vectors, codebook, offset = _comparable(vectors, codebook, inner_product)
        if _is_cached(vectors.device):
            return _nearest_in_tiles(vectors, codebook, offset, tile, inner_product)
        minus, bias = _minus_and_bias(codebook, offset, inner_product)
        rows_at_a_time = max(1, SCORE_BYTES // (codebook.itemsize * len(codebook)))
        indices = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
        for rows, chosen in zip(vectors.split(rows_at_a_time), indices.split(rows_at_a_time), strict=True):
            torch.argmin(_scores(rows, minus, bias), dim=1, out=chosen)
        return indices


def _is_cached(device: torch.device) -> bool:
    """Whether products are best made in tiles as large as a core's cache, instead of as few as possible."""
    return device.type == "cpu"


def _is_fused(device: torch.device) -> bool:
    switch = os.environ.get("HF_VQGAN_TRITON", "0")
    if switch not in ("0", "1"):
        raise ValueError(f"HF_VQGAN_TRITON={switch!r} must be 1 (search by the fused Triton kernel) or 0.")
    return switch == "1" and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def _minus_and_bias(codebook: Tensor, offset: Tensor, inner_product: bool) -> tuple[Tensor, Tensor | None]:
    """-e `(K, D)` and ½|e|² `(K,)`, the latter `None` for inner products, with e less the offset."""
    minus = offset - codebook
    return minus, None if inner_product else 0.5 * minus.square().sum(dim=1)


def _scores(rows: Tensor, minus: Tensor, bias: Tensor | None) -> Tensor:
    """½|e|² - z·e, or -z·e, `(n, K)`."""
    return rows @ minus.T if bias is None else torch.addmm(bias, rows, minus.T)


def _nearest_in_tiles(vectors: Tensor, codebook: Tensor, offset: Tensor, tile: int, inner_product: bool) -> Tensor:
    """
    As one product [z, 1]·[-e, ½|e|²] the scores are written once. `amin` is twice as fast as `argmin` on CPUs, so a
    first pass finds each vector's best tile, and a second its best code there.
    """
    z = torch.cat([vectors, vectors.new_ones(len(vectors), 1)], dim=1)
    tiles = codebook.split(tile)
    buffer = z.new_empty(min(len(z), tile) * len(tiles[0]))

    def scores(rows: Tensor, codes: Tensor) -> Tensor:
        return torch.mm(rows, codes.T, out=buffer[: len(rows) * len(codes)].view(len(rows), len(codes)))

    if len(tiles) == 1:
        codes = _with_bias(codebook, offset, inner_product)
        return torch.cat([scores(rows, codes).argmin(dim=1) for rows in z.split(tile)])
    best = z.new_full((len(z),), torch.inf)
    best_tile = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    for index, codes_of_tile in enumerate(tiles):
        codes = _with_bias(codes_of_tile, offset, inner_product)
        for rows, low, chosen in zip(z.split(tile), best.split(tile), best_tile.split(tile), strict=True):
            score = scores(rows, codes).amin(dim=1)
            chosen.masked_fill_(score < low, index)  # strictly less: ties go to the earlier tile
            torch.minimum(low, score, out=low)

    indices = torch.empty_like(best_tile)
    members_of_tiles = best_tile.argsort().split(best_tile.bincount(minlength=len(tiles)).tolist())
    for index, members in enumerate(members_of_tiles):
        if len(members):
            codes = _with_bias(tiles[index], offset, inner_product)
            for part in members.split(tile):
                indices[part] = scores(z[part], codes).argmin(dim=1) + index * tile
    return indices


def _near_codes(vectors: Tensor, codebook: Tensor, count: int, inner_product: bool) -> Tensor:
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False), exact_products():
        vectors, codebook, offset = _comparable(vectors, codebook, inner_product)
        minus, bias = _minus_and_bias(codebook, offset, inner_product)
        parts = vectors.split(max(1, 2**24 // len(codebook)))
        return torch.cat([_scores(rows, minus, bias).topk(count, dim=1, largest=False).indices for rows in parts])


# In compiled code, each search is one operator: traced, its products would run at the precision set at run time, and
# its sizes depend on the data. Every copy of this module (a pushed model includes one) registers its own.
_namespace = __name__.replace(".", "_")
_nearest_code_operator = torch.library.custom_op(f"{_namespace}::nearest_code", _nearest_code, mutates_args=())
_near_codes_operator = torch.library.custom_op(f"{_namespace}::near_codes", _near_codes, mutates_args=())


@_nearest_code_operator.register_fake
def _(vectors: Tensor, codebook: Tensor, tile: int, inner_product: bool) -> Tensor:
    return vectors.new_empty(len(vectors), dtype=torch.int64)


@_near_codes_operator.register_fake
def _(vectors: Tensor, codebook: Tensor, count: int, inner_product: bool) -> Tensor:
    return vectors.new_empty(len(vectors), count, dtype=torch.int64)


def kmeans_plus_plus(points: Tensor, num_clusters: int, generator: torch.Generator | None = None) -> Tensor:
    """
    Initial centres drawn one by one, each with probability proportional to its squared distance from the previous ones
    (Arthur & Vassilvitskii 2007). `(N, D)` to `(K, D)`; needs K <= N.
    """
    # All random numbers first, so that the loop never waits for the device.
    first = torch.randint(len(points), (1,), generator=generator)
    draws = torch.rand(num_clusters - 1, generator=generator, dtype=torch.float64).to(points.device)
    chosen = torch.empty(num_clusters, dtype=torch.int64, device=points.device)
    chosen[:1] = first
    distance = torch.full((len(points),), torch.inf, device=points.device)
    for index in range(1, num_clusters):
        newest = points.index_select(0, chosen[index - 1 : index])
        distance = torch.minimum(distance, (points - newest).square().sum(dim=1))
        # Inverse transform sampling: multinomial is limited to 2^24 points and slower.
        mass = distance.double().cumsum(dim=0)
        found = torch.searchsorted(mass, draws[index - 1 : index] * mass[-1])
        chosen[index : index + 1] = found.clamp_(max=len(points) - 1)
    return points[chosen]


def kmeans(points: Tensor, num_clusters: int, iterations: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """
    Lloyd's algorithm; a cluster that loses all its points restarts at a random one.

    Starts from k-means++ for up to 2048 clusters; for more, where drawing one by one would take longer than the
    iterations that it saves, from a random subset of the points.

    Args:
        points (`Tensor` of shape `(N, D)`): With N < K, points are repeated with a little noise.
        num_clusters (`int`): K.

    Returns:
        `Tensor` of shape `(K, D)`, float32: the cluster means.
    """
    points = points.float()

    def sample(count: int) -> Tensor:
        order = torch.randperm(len(points), generator=generator)[:count].to(points.device, non_blocking=True)
        chosen = points[order]
        if count > len(points):
            rest = torch.randint(len(points), (count - len(points),), generator=generator)
            rest = rest.to(points.device, non_blocking=True)
            noise = torch.randn(len(rest), points.shape[1], generator=generator)
            noise = noise.to(points.device, non_blocking=True)
            chosen = torch.cat([chosen, points[rest] + 0.01 * points.std(dim=0, correction=0) * noise])
        return chosen

    one_by_one = num_clusters <= min(2048, len(points))
    centers = kmeans_plus_plus(points, num_clusters, generator) if one_by_one else sample(num_clusters)
    for _ in range(iterations):
        counts, sums = cluster_sums(points, nearest_code(points, centers), num_clusters)
        empty = (counts == 0)[:, None]
        restarts = sample(num_clusters).index_select(0, (empty[:, 0].cumsum(dim=0) - 1).clamp_(min=0))
        centers = torch.where(empty, restarts, sums / counts.clamp(min=1)[:, None])
    return centers


def cluster_sums(vectors: Tensor, indices: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Number `(K,)` and sum `(K, D)` of the vectors `(N, D)` at each index `(N,)`."""
    counts = indices.new_zeros(num_clusters).scatter_add_(0, indices, torch.ones_like(indices))  # bincount would wait
    return counts.to(vectors.dtype), vectors.new_zeros(num_clusters, vectors.shape[1]).index_add_(0, indices, vectors)
