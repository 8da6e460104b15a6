"""How fast a model encodes and decodes, and the memory that it takes."""

import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .autoencoders import Autoencoder


@dataclass
class Speed:
    """
    Of one batch in one process; never the same twice. Peak memory is beyond weights and input: on CUDA the allocator's,
    elsewhere tensors alive at once. Encoding includes the choice of codes.
    """

    encode_images_per_second: float
    encode_peak_memory_mb: float
    decode_images_per_second: float
    decode_peak_memory_mb: float


def measure_speed(model: Autoencoder, pixels: Tensor, repeats: int = 5) -> Speed:
    """Median rates of `repeats` runs after a warm-up, of images `(B, 3, H, W)` in [-1, 1]."""

    def encode() -> Tensor:
        return model.quantize(model.encode(pixels))[0]

    quantized = encode()
    found: dict[str, float] = {}
    for name, run in (("encode", encode), ("decode", lambda: model.decode(quantized))):
        with peak_memory(pixels.device) as peak:  # warms up, too
            run()
        seconds = statistics.median(_seconds(run, pixels.device) for _ in range(repeats))
        found |= {f"{name}_images_per_second": len(pixels) / seconds, f"{name}_peak_memory_mb": peak[0] / 2**20}
    return Speed(**found)


def _seconds(run: Callable, device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


class AliveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operators make while it is on, until they are freed."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in before:  # neither a view nor in place
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.bytes -= size


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """
    Yields a list whose only entry, afterwards, is the peak of bytes allocated inside, beyond what was there before: on
    CUDA by the allocator, elsewhere as the sum of tensors alive, without the scratch memory of operators.
    """
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
    else:
        with AliveTensors() as alive:
            yield peak
        peak[0] = alive.peak
