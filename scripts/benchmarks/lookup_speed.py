"""Speed and memory of the nearest-code lookup, next to other implementations of the quantizer's step."""

import contextlib
import math
from collections.abc import Callable

import torch
from benchmarks.speed import added_memory, in_fresh_process, median_seconds
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersVectorQuantizer

from hf_vqgan.configuration_vqgan import VQGANConfig
from hf_vqgan.quantizers import VectorQuantizer

SIZES = [f"{n}x{k}x{d}" for n in (4096, 65536) for k in (1024, 16384, 262144) for d in (8, 32, 256)]
NAMES = ["ours", "diffusers (cdist)", "materialised", "vector-quantize-pytorch", "matrix product alone"]
# N x K numbers, several times over for some, would not fit into 24 GB beyond these.
LIMITS = {"diffusers (cdist)": 2**31, "materialised": 2**28, "vector-quantize-pytorch": 2**28}


def materialised(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The textbook: all N x K squared distances at once, straight-through, both losses."""
    distances = latents.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * latents @ codebook.T
    codes = codebook[distances.argmin(dim=1)]
    loss = 0.25 * (codes.detach() - latents).square().mean() + (codes - latents.detach()).square().mean()
    return (latents + (codes - latents).detach()).sum() + loss


def contestants(n: int, k: int, d: int, names: list[str]) -> dict[str, Callable]:
    """Name -> a function that runs one forward and backward pass on N vectors, K codes, D dimensions."""
    latents = torch.randn(1, d, 64, n // 64)
    codebook = torch.randn(k, d)
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, d)
    names = [name for name in names if n * k <= LIMITS.get(name, math.inf)]
    made = {}
    if "ours" in names:
        ours = VectorQuantizer(VQGANConfig(num_vq_embeddings=k, vq_embed_dim=d))
        ours.embedding.weight.data.copy_(codebook)

        def step_ours():
            z = latents.requires_grad_()
            output = ours(z)
            loss = 0.25 * output.losses["commitment"] + output.losses["codebook"]
            (output.quantized.sum() + loss).backward()

        made["ours"] = step_ours
    if "diffusers (cdist)" in names:
        theirs = DiffusersVectorQuantizer(k, d, beta=0.25, legacy=False)
        theirs.embedding.weight.data.copy_(codebook)

        def step_diffusers():
            quantized, loss, _ = theirs(latents.requires_grad_())
            (quantized.sum() + loss).backward()

        made["diffusers (cdist)"] = step_diffusers
    if "materialised" in names:
        weight = codebook.clone().requires_grad_()
        made["materialised"] = lambda: materialised(vectors.detach().requires_grad_(), weight).backward()
    if "vector-quantize-pytorch" in names:
        with contextlib.suppress(ImportError):
            from vector_quantize_pytorch import VectorQuantize

            vqp = VectorQuantize(dim=d, codebook_size=k).train()

            def step_vqp():
                quantized, _, loss = vqp(vectors[None].detach().requires_grad_())
                (quantized.sum() + loss.sum()).backward()

            made["vector-quantize-pytorch"] = step_vqp
    if "matrix product alone" in names:
        rows = vectors.detach().contiguous()

        def product():
            # The limit: N x K x D multiplications, the scores thrown away tile by tile.
            out = rows.new_empty(1024, 1024)
            for part in rows.split(1024):
                for codes in codebook.split(1024):
                    torch.mm(part, codes.T, out=out)

        made["matrix product alone"] = product
    return made


def lookup_memory(n: int, k: int, d: int, name: str) -> float:
    """MB that one contestant's second step adds at its peak (the first one, a small one, loads libraries)."""
    contestants(64, 64, d, [name])[name]()
    return added_memory(contestants(n, k, d, [name])[name])


def until_done(function: Callable) -> Callable:
    """`function`, waiting for the GPU to finish."""

    def run():
        function()
        torch.cuda.synchronize()

    return run


def compare_lookups(
    n: int, k: int, d: int, with_memory: bool = False, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Contestant -> `seconds`, and on CPUs `memory` in MB."""
    with torch.device(device):
        functions = contestants(n, k, d, NAMES)
    if device == "cuda":
        functions = {name: until_done(function) for name, function in functions.items()}
    for function in functions.values():
        function()
    figures = {name: {"seconds": seconds} for name, seconds in median_seconds(functions, budget=12.0).items()}
    if with_memory:
        for name in figures:
            figures[name]["memory"] = in_fresh_process(lookup_memory, n, k, d, name, frees_at_once=True)
    return figures
