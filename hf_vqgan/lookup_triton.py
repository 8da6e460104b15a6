"""Nearest-code search as one Triton kernel: scores stay in registers, with a running minimum over tiles of codes.

Opt-in (`HF_VQGAN_TRITON=1`, see `nearest_code`), as it has run in Triton's interpreter only, not yet on a GPU.

Shapes: N vectors and K codes of dimension D; S parts of the codebook, searched side by side.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # wheels for Linux only; a pushed model takes this file along
    triton = None

# Compiled for an H100, these take 186 registers a thread and spill none; larger ones spill.
BLOCK_N, BLOCK_K, BLOCK_D, WARPS = 64, 128, 16, 8
PROGRAMS = 512  # enough for every GPU's multiprocessors; with fewer blocks of vectors, the codes are divided, too

if triton is not None:

    @triton.jit
    def _search(
        z, e, offset, lowest, chosen,  # pointers: (N, D), (K, D), (D,), (S, N), (S, N)
        N, K, D, K_part,
        z_row, z_column, e_row, e_column,  # strides
        INNER_PRODUCT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        part = tl.program_id(1)
        rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        first = part * K_part
        end = tl.minimum(first + K_part, K)
        low = tl.full((BLOCK_N,), float("inf"), tl.float32)
        best = tl.zeros((BLOCK_N,), tl.int32) + first
        for start in range(first, end, BLOCK_K):
            codes = start + tl.arange(0, BLOCK_K)
            # Products and squares, a block of dimensions at a time
            product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            square = tl.zeros((BLOCK_K,), tl.float32)
            for column in range(0, D, BLOCK_D):
                columns = column + tl.arange(0, BLOCK_D)
                inside = columns < D
                shift = tl.load(offset + columns, mask=inside, other=0.0)
                z_at = z + rows[:, None] * z_row + columns[None, :] * z_column
                z_block = tl.load(z_at, mask=(rows < N)[:, None] & inside[None, :], other=0.0).to(tl.float32)
                if not INNER_PRODUCT:
                    z_block -= shift[None, :]
                e_at = e + codes[None, :].to(tl.int64) * e_row + columns[:, None] * e_column
                e_block = tl.load(e_at, mask=inside[:, None] & (codes < end)[None, :], other=0.0).to(tl.float32)
                e_block -= shift[:, None]
                product = tl.dot(z_block, e_block, product, input_precision="ieee")
                square += tl.sum(e_block * e_block, axis=0)
            # Scores and their minimum. NaN is the lowest, as in `torch.argmin`: a broken code has to show.
            score = -product if INNER_PRODUCT else 0.5 * square[None, :] - product
            score = tl.where(score != score, float("-inf"), score)
            score = tl.where((codes < end)[None, :], score, float("inf"))
            tile_low, tile_best = tl.min(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
            better = tile_low < low  # strictly: ties go to the earlier tile
            best = tl.where(better, start + tile_best, best)
            low = tl.where(better, tile_low, low)
        tl.store(lowest + part.to(tl.int64) * N + rows, low, mask=rows < N)
        tl.store(chosen + part.to(tl.int64) * N + rows, best.to(tl.int64), mask=rows < N)


def fused_nearest_code(vectors: Tensor, codebook: Tensor, offset: Tensor, inner_product: bool = False) -> Tensor:
    """
    Index of the nearest code, ties to the lowest index: what `nearest_code` returns, for float32 or narrower.

    Products are made and summed up in float32, never in TF32. Holds S x N minima: N, or 2^16 if that is more.

    Args:
        vectors (`Tensor` of shape `(N, D)`): z, with any strides.
        codebook (`Tensor` of shape `(K, D)`): e, with any strides; K < 2^31.
        offset (`Tensor` of shape `(D,)`, float32): What z and e have in common, subtracted from both.
        inner_product (`bool`, defaults to `False`): Take the code with the largest z·e instead.

    Returns:
        `Tensor` of shape `(N,)`, int64.

    Raises:
        ImportError: if Triton is not installed.
    """
    if triton is None:
        raise ImportError("HF_VQGAN_TRITON=1 needs Triton (pip install triton), which this Python lacks.")
    (n, d), k = vectors.shape, len(codebook)
    row_blocks, code_blocks = triton.cdiv(n, BLOCK_N), triton.cdiv(k, BLOCK_K)
    parts = min(code_blocks, triton.cdiv(PROGRAMS, max(1, row_blocks)))
    k_part = triton.cdiv(code_blocks, parts) * BLOCK_K
    parts = triton.cdiv(k, k_part)  # without empty ones
    lowest = torch.empty(parts, n, device=vectors.device)
    chosen = torch.empty(parts, n, dtype=torch.int64, device=vectors.device)
    if n == 0:
        return chosen[0]
    strides = (*vectors.stride(), *codebook.stride())
    with torch.cuda.device_of(vectors):  # kernels start on the current device, which may be another one
        _search[row_blocks, parts](
            vectors, codebook, offset.contiguous(), lowest, chosen, n, k, d, k_part, *strides,
            inner_product, BLOCK_N, BLOCK_K, BLOCK_D, num_warps=WARPS,
        )  # fmt: skip
    if parts == 1:
        return chosen[0]
    return chosen.gather(0, lowest.argmin(dim=0, keepdim=True))[0]
