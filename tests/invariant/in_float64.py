"""
Runs a script in float64: `python in_float64.py SCRIPT ARGUMENTS`.

In float32, two processes add up in another order than one, a nearest code flips, and after a few steps the runs have
visibly parted. In float64 they agree to many digits for as long as one likes, so a comparison can be strict.
"""

import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor

import hf_vqgan.data.datasets


def to_pixel_values(pixels: Tensor) -> Tensor:
    return pixels.double() / 127.5 - 1


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    hf_vqgan.data.datasets.to_pixel_values = to_pixel_values
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
