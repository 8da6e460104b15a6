#!/usr/bin/env python
"""
Speed and memory, as ratios measured side by side in one run: medians over interleaved repetitions.

    python scripts/benchmark.py lookup                      # nearest-code lookup against other implementations
    python scripts/benchmark.py lookup --sizes 4096x16384x8 --output lookup.json

Machines are noisy: compare within a run, never across runs. Results: docs/performance.md.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings

import torch
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersVectorQuantizer

from hf_vqgan import VQGANConfig
from hf_vqgan.quantizers import VectorQuantizer

SIZES = [f"{n}x{k}x{d}" for n in (4096, 65536) for k in (1024, 16384, 262144) for d in (8, 32, 256)]
# N x K numbers, several times over for some, would not fit into 24 GB beyond these.
LIMITS = {"diffusers (cdist)": 2**31, "materialised": 2**28, "vector-quantize-pytorch": 2**28}


def materialised(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The textbook: all N x K squared distances at once, straight-through, both losses."""
    distances = latents.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * latents @ codebook.T
    codes = codebook[distances.argmin(dim=1)]
    loss = 0.25 * (codes.detach() - latents).square().mean() + (codes - latents.detach()).square().mean()
    return (latents + (codes - latents).detach()).sum() + loss


def lookup_contestants(n: int, k: int, d: int, names: list[str]) -> dict:
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
            out = torch.empty(1024, 1024)
            for part in rows.split(1024):
                for codes in codebook.split(1024):
                    torch.mm(part, codes.T, out=out)

        made["matrix product alone"] = product
    return made


NAMES = ["ours", "diffusers (cdist)", "materialised", "vector-quantize-pytorch", "matrix product alone"]


def time_interleaved(functions: dict, budget: float = 12.0, most: int = 9) -> dict[str, float]:
    """Median seconds of each function, called in turn until the budget is spent (twice at least)."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    for repetition in range(most + 1):
        for name, function in functions.items():
            before = time.perf_counter()
            function()
            if repetition:  # the first call warms up
                times[name].append(time.perf_counter() - before)
        if repetition >= 2 and time.perf_counter() - started > budget:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(n: int, k: int, d: int, name: str) -> float:
    """MB that one contestant's second step adds to the peak of a fresh process (the first one loads libraries)."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import benchmark, torch\n"
        "n, k, d, name = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]\n"
        "benchmark.lookup_contestants(64, 64, d, [name])[name]()\n"
        "step = benchmark.lookup_contestants(n, k, d, [name])[name]\n"
        "status = lambda key: int(open('/proc/self/status').read().split(key)[1].split()[0])\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = status('VmRSS:'); step(); print((status('VmHWM:') - before) / 1024)"
    )
    arguments = [os.path.dirname(os.path.abspath(__file__)), str(n), str(k), str(d), name]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")


def benchmark_lookup(sizes: list[str], with_memory: bool) -> list[dict]:
    rows = []
    print("| N x K x D | " + " | ".join(f"{name}" for name in NAMES) + " | ours: times faster than cdist / vqp |")
    print("|---" * (len(NAMES) + 2) + "|")
    for size in sizes:
        n, k, d = map(int, size.split("x"))
        seconds = time_interleaved(lookup_contestants(n, k, d, NAMES))
        memory = {name: peak_memory(n, k, d, name) for name in seconds} if with_memory else {}
        cells = [
            f"{seconds[name] * 1e3:.1f} ms" + (f", {memory[name]:.0f} MB" if name in memory else "")
            if name in seconds
            else "-"
            for name in NAMES
        ]
        ratios = [
            f"{seconds[name] / seconds['ours']:.2f}" if name in seconds else "-"
            for name in ("diffusers (cdist)", "vector-quantize-pytorch")
        ]
        print(f"| {size} | {' | '.join(cells)} | {' / '.join(ratios)} |", flush=True)
        rows.append({"size": size, "seconds": seconds, "memory_mb": memory})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lookup"])
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="N x K x D of the lookup. Default: the full grid.")
    parser.add_argument("--memory", action="store_true", help="Also the peak memory of each, in a process of its own.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads.")
    parser.add_argument("--output", help="Write the figures to this JSON file, too.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    rows = benchmark_lookup(arguments.sizes, arguments.memory)
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
