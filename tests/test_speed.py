"""What the benchmark's figures rest on. The textbook steps' gradients are checked in test_training_step.py."""

import subprocess
import sys

import pytest
import torch
from benchmarks.speed import OperatorRecord, added_memory, count_gflop, describe_product, kind_of, seconds_to
from torch import nn

from hf_vqgan.losses.image_losses import LPIPS

HEAVY = {"datasets", "gradio", "lpips", "matplotlib", "pandas", "skimage", "sklearn", "tensorboard", "torchmetrics"}


def test_import_leaves_out_what_only_training_needs():
    code = "import sys, hf_vqgan; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)
    assert not {f"hf_vqgan.{name}" for name in ("losses", "training", "training_step", "metrics")} & set(loaded)


def test_lpips_trunk_in_bfloat16_gives_what_autocast_gives(random_trunk):
    """`load_lpips` casts it once, where autocast would in every pass."""
    networks = [LPIPS("alex", str(random_trunk / "alex.safetensors"), upscale=2) for _ in range(2)]
    networks[1].slices.to(torch.bfloat16)
    target, results = torch.rand(2, 3, 16, 16), []
    for network in networks:
        sample = target.flip(0).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            distance = network(sample, target)
        results.append((distance, *torch.autograd.grad(distance.sum(), sample)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_gflop_of_a_convolution_and_its_gradients():
    conv, x = nn.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 16, 16, requires_grad=True)
    forward = 2 * 2 * 16 * 16 * 8 * 4 * 9 / 1e9
    assert count_gflop(lambda: conv(x)) == pytest.approx(forward)
    out = conv(x).sum()
    assert count_gflop(lambda: torch.autograd.grad(out, [x, conv.weight])) == pytest.approx(2 * forward)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_added_memory_is_that_of_the_peak():
    def peak_of_64_mb():
        torch.ones(2**24)

    assert added_memory(peak_of_64_mb) == pytest.approx(64, abs=8)


def test_seconds_to_a_quality_are_between_two_points():
    curve = [(10.0, 0.5), (20.0, 0.3), (30.0, 0.1)]
    assert seconds_to(0.2, curve) == pytest.approx(25)
    assert seconds_to(0.6, curve) == 10 and seconds_to(0.1, curve) == 30
    assert seconds_to(0.05, curve) is None


def test_kinds_know_the_operators_of_a_step():
    assert kind_of("convolution_backward") == kind_of("convolution") == "convolution"
    assert kind_of("native_group_norm_backward") == "normalisation"
    assert kind_of("add_") == "element-wise and other"
    assert kind_of("addmm") == "matrix product, attention"


def test_products_are_described_by_weight_and_input():
    """Whatever order an operator has its arguments in."""
    conv, x = nn.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 6, 5, requires_grad=True)
    with OperatorRecord() as record:
        conv(x).sum().backward()
    products = {describe_product(*key): work for key, work in record.work.items() if work.gflop}
    assert products.keys() == {"convolution: 8x4x3x3 on 2x4x6x5", "convolution_backward: 8x4x3x3 on 2x4x6x5"}
    assert all(work.calls == 1 and work.seconds > 0 for work in products.values())
