"""How fast the package is, next to what else does the same work, on CPU.

Machines are noisy and shared. Contestants therefore take turns within one process and medians are compared; floating
point operations, which are exact, and peak memory, which is nearly so, stand beside the times. Every group of
contestants runs in a process of its own (`in_fresh_process`), and every measurement of memory, because an allocator
that shows each tensor that is gone makes the next one slow.
"""

import contextlib
import copy
import ctypes
import functools
import gc
import math
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch
from accelerate.utils import patch_environment
from benchmarks.textbook_steps import (
    image_loss,
    one_pass_gradients,
    textbook_step,
    two_pass_gradients,
    use_plain_blocks,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hf_vqgan.configuration_vqgan import VQGANConfig
from hf_vqgan.losses.image_losses import LPIPS
from hf_vqgan.modeling_vqgan import VQGANModel
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.networks import build_state, load_lpips
from hf_vqgan.training.setup import build_accelerator
from hf_vqgan.training.step import TrainState, generate, training_step

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Setting:
    """What is measured, and how often."""

    resolution: int = 64
    batch_size: int = 4
    block_out_channels: tuple[int, ...] = (64, 128, 128)
    num_vq_embeddings: int = 1024
    mixed_precision: str = "no"
    threads: int = 1
    clock: str = "wall"  # "cpu": seconds of this process on the cores, which other processes disturb less
    repetitions: int = 5
    seed: int = 0

    def model_config(self) -> VQGANConfig:
        return VQGANConfig(
            block_out_channels=self.block_out_channels,
            sample_size=self.resolution,
            num_vq_embeddings=self.num_vq_embeddings,
        )

    def pixels(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self.batch_size, 3, self.resolution, self.resolution, generator=generator) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def in_fresh_process(function: Callable, *arguments, frees_at_once: bool = False):
    """`function(*arguments)` in a new process; `frees_at_once` as in `in_fresh_processes`."""
    return in_fresh_processes(1, function, *arguments, frees_at_once=frees_at_once)[0]


def in_fresh_processes(count: int, function: Callable, *arguments, frees_at_once: bool = False) -> list:
    """
    `function(*arguments)` in `count` new processes at once, which Accelerate finds to be one launch. With
    `frees_at_once`, memory that is freed goes back to the system at once, for `added_memory` to see (glibc).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launches: list[dict[str, str]] = [{}]
    if count > 1:
        common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        launches = [common | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"} for rank in range(count)]
    allocator = {"MALLOC_MMAP_THRESHOLD_": 2**16} if frees_at_once else {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch_environment(**allocator))  # read when a process starts
        context = multiprocessing.get_context("spawn")
        executors = [stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for _ in launches]
        calls = [
            executor.submit(_with_environment, launch, function, *arguments)
            for executor, launch in zip(executors, launches, strict=True)
        ]
        return [call.result() for call in calls]


def _with_environment(variables: dict, function: Callable, *arguments):
    os.environ.update({name: str(value) for name, value in variables.items()})
    return function(*arguments)


def median_seconds(
    functions: dict[str, Callable], repetitions: int = 9, clock: str = "wall", budget: float = math.inf
) -> dict[str, float]:
    """
    Median seconds of each function, called in turn, until `budget` seconds are spent (twice at least). Warming up is
    the caller's.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    for repetition in range(repetitions):
        for name, function in functions.items():
            before = CLOCKS[clock]()
            function()
            times[name].append(CLOCKS[clock]() - before)
        if repetition and time.perf_counter() - started > budget:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def added_memory(function: Callable) -> float:
    """MB that a call adds to this process's resident memory at its peak (Linux)."""

    def status(key: str) -> int:
        with open("/proc/self/status") as file:
            return int(file.read().split(key)[1].split()[0])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS:")
    function()
    return (status("VmHWM:") - before) / 1024


@dataclass
class Work:
    """What calls of one operator on tensors of the same shapes add up to."""

    calls: int = 0
    seconds: float = 0.0
    gflop: float = 0.0


class OperatorRecord(TorchDispatchMode):
    """
    Keeps time and floating point operations of every operator that PyTorch runs, on CPU: `work[name, shapes]`.
    (PyTorch's own counter also follows modules, with hooks that `autograd.grad` does not allow.)
    """

    def __init__(self):
        super().__init__()
        self.work: dict[tuple[str, tuple], Work] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        packet, kwargs = operator._overloadpacket, kwargs or {}
        before = time.perf_counter()
        out = operator(*args, **kwargs)
        seconds = time.perf_counter() - before
        shapes = tuple(tuple(argument.shape) for argument in args if isinstance(argument, Tensor))
        work = self.work.setdefault((packet.__name__, shapes), Work())
        work.calls += 1
        work.seconds += seconds
        if packet in flop_registry:
            work.gflop += flop_registry[packet](*args, **kwargs, out_val=out) / 1e9
        return out


def count_gflop(function: Callable) -> float:
    """Floating point operations of a call's convolutions and matrix products, in 10^9."""
    with OperatorRecord() as record:
        function()
    return sum(work.gflop for work in record.work.values())


# ---------------------------------------------------------------------------------------------------------------------
# Training step


def build_training(setting: Setting, textbook: bool = False, **fields) -> TrainState:
    """
    What a run would train at this setting, with a codebook spread as wide as the latents of a new model. For the
    textbook steps without what this package does to layouts, dtypes and blocks.
    """
    config = VQGANTrainingConfig(
        dataset_name="none",
        resolution=setting.resolution,
        train_batch_size=setting.batch_size,
        mixed_precision=setting.mixed_precision,
        cpu_threads=setting.threads,
        max_train_steps=10**6,
        channels_last=not textbook,
        **fields,
    )
    accelerator = build_accelerator(config)
    torch.manual_seed(setting.seed)
    perceptual = LPIPS(config.perceptual_net) if textbook else load_lpips(config, accelerator)[0]
    state = build_state(config, setting.model_config(), accelerator, perceptual)
    nn.init.normal_(state.vqgan.quantize.embedding.weight, std=0.5)
    if textbook:
        use_plain_blocks(state.vqgan)
        for group in (*state.optimizer.param_groups, *state.disc_optimizer.param_groups):
            group["fused"] = False
    return state


def ours(state: TrainState, pixels: Tensor) -> None:
    training_step(state, [pixels.contiguous(memory_format=torch.channels_last)])


# Name -> (step, arguments of build_training)
STEPS: dict[str, tuple[Callable, dict]] = {
    "ours": (ours, {}),
    "ours, checkpointed": (ours, {"gradient_checkpointing": True}),
    "one pass": (functools.partial(textbook_step, one_pass_gradients), {"textbook": True}),
    "two passes": (functools.partial(textbook_step, two_pass_gradients), {"textbook": True}),
}


def step_functions(setting: Setting, names: Iterable[str]) -> dict[str, Callable]:
    functions: dict[str, Callable] = {}
    for name in names:
        step, fields = STEPS[name]
        functions[name] = functools.partial(step, build_training(setting, **fields), setting.pixels())
    return functions


def compare_steps(setting: Setting, names: Iterable[str] = STEPS) -> dict[str, dict[str, float]]:
    """Step -> `gflop`, `seconds`, `memory` (MB that it adds at its peak)."""
    figures = in_fresh_process(time_steps, setting, tuple(names))
    for name in figures:
        figures[name]["memory"] = in_fresh_process(step_memory, setting, name, frees_at_once=True)
    return figures


def time_steps(setting: Setting, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Step -> `gflop`, `seconds`. The first call, which counts, warms up."""
    functions = step_functions(setting, names)
    gflop = {name: count_gflop(function) for name, function in functions.items()}
    seconds = median_seconds(functions, setting.repetitions, setting.clock)
    return {name: {"gflop": gflop[name], "seconds": seconds[name]} for name in functions}


def step_memory(setting: Setting, name: str) -> float:
    """MB that the second call of a step adds at its peak."""
    step = step_functions(setting, [name])[name]
    step()
    return added_memory(step)


GROWTH = {
    "resolution": (32, 64, 128),
    "batch_size": (1, 2, 4),
    "num_vq_embeddings": (1024, 16384),
    "processes": (1, 2),
}


def measure_growth(setting: Setting) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(what, value, figures of our step): one thing varied at a time. Every process has `setting.batch_size` images."""
    for what, values in GROWTH.items():
        for value in values:
            count, varied = value if what == "processes" else 1, setting
            if what != "processes":
                varied = replace(setting, **{what: value})  # type: ignore[arg-type]  # all of them numbers
            figures = in_fresh_processes(count, time_steps, varied, ["ours"])[0]["ours"]
            figures["memory"] = in_fresh_processes(count, step_memory, varied, "ours", frees_at_once=True)[0]
            yield what, value, figures | {"images/s": count * varied.batch_size / figures["seconds"]}


def loss_curves(setting: Setting, steps: int) -> dict[str, list[float]]:
    """
    L1 + LPIPS of `steps` steps on the same batches, for each step from the same start; and for ours again from the
    start moved by one part in a million: how far apart equal trainings drift.

    The images are smooth noise, new in every step.
    """
    curves: dict[str, list[float]] = {}
    for label, name in {
        "ours": "ours",
        "one pass": "one pass",
        "two passes": "two passes",
        "ours, moved": "ours",
    }.items():
        step, fields = STEPS[name]
        state = build_training(setting, **fields)
        if label == "ours, moved":
            with torch.no_grad():
                for parameter in state.vqgan.parameters():
                    parameter *= 1 + 1e-6
        generator, curves[label] = torch.Generator().manual_seed(1), []
        for _ in range(steps):
            coarse = torch.rand(setting.batch_size, 3, 6, 6, generator=generator) * 2 - 1
            pixels = nn.functional.interpolate(coarse, size=setting.resolution, mode="bilinear")
            with torch.no_grad():
                curves[label].append(float(image_loss(state, generate(state, pixels, 0).sample, pixels)))
            step(state, pixels)
    return curves


def quality_curves(
    setting: Setting, images: Tensor, validation: Tensor, steps: int, every: int
) -> dict[str, list[tuple[float, float]]]:
    """
    Step -> points (seconds of training, LPIPS of `validation`), one every `every` steps: for *two passes*, `steps`
    long, and for ours in the same time from the same start on the same batches.

    LPIPS is that of averaged weights, over about fifty steps: from one step to the next, the discriminator moves it by
    as much as hundreds of steps do.

    Args:
        images, validation (`Tensor` of shape `(N, 3, H, W)`): In [-1, 1].
    """

    def train(name: str, is_over: Callable[[int, float], bool]) -> list[tuple[float, float]]:
        step, fields = STEPS[name]
        state = build_training(setting, use_ema=True, model_ema_decay=0.98, **fields)
        generator = torch.Generator().manual_seed(setting.seed)
        curve: list[tuple[float, float]] = []
        number, seconds = 0, 0.0
        while not is_over(number, seconds):
            pixels = images[torch.randint(len(images), (setting.batch_size,), generator=generator)]
            before = CLOCKS[setting.clock]()
            step(state, pixels)
            seconds += CLOCKS[setting.clock]() - before
            number += 1
            state.ema.step(state.vqgan.parameters())
            if number % every == 0 or is_over(number, seconds):
                with state.averaged_weights():
                    curve.append((seconds, validation_lpips(state, validation)))
        return curve

    textbook = train("two passes", lambda number, seconds: number >= steps)
    return {"two passes": textbook, "ours": train("ours", lambda number, seconds: seconds >= textbook[-1][0])}


@torch.no_grad()
def validation_lpips(state: TrainState, validation: Tensor) -> float:
    """Mean LPIPS, by the network of the loss, of reconstructions in eval mode."""
    state.model.eval()
    parts = validation.split(state.config.train_batch_size)
    samples = [generate(state, part, 0).sample for part in parts]
    with state.accelerator.autocast():
        distances = [state.perceptual(sample, part) for sample, part in zip(samples, parts, strict=True)]
    state.model.train()
    return float(torch.cat(distances).mean())


def seconds_to(target: float, curve: list[tuple[float, float]]) -> float | None:
    """When a curve of falling figures first is at `target` or below, between two points linearly; `None`: never."""
    before = (0.0, math.inf)
    for point in curve:
        if point[1] <= target:
            share = (before[1] - target) / (before[1] - point[1]) if math.isfinite(before[1]) else 1.0
            return before[0] + share * (point[0] - before[0])
        before = point
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Where a step's time goes

# Kind -> beginnings of PyTorch's operator names
KINDS = {
    "convolution": ("convolution",),
    "normalisation": ("native_group_norm", "linalg_vector_norm"),
    "matrix product, attention": ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot"),
    "activation": ("silu", "relu", "threshold", "leaky", "softmax", "_softmax"),
    "resampling, pooling, padding": ("upsample", "max_pool", "avg_pool", "constant_pad"),
    "copy, cast, layout": ("copy_", "_to_copy", "clone", "cat", "fill_", "zero", "stack"),
    "optimizer": ("_fused_adam", "_foreach", "lerp"),
}  # fmt: skip


def kind_of(operator: str) -> str:
    for kind, beginnings in KINDS.items():
        if operator.startswith(beginnings):
            return kind
    return "element-wise and other"


def account_for_step(setting: Setting) -> dict:
    """
    Where the time of our step goes: `shares` of its operators' time by kind; `products`, which are convolutions and
    matrix products by shape, the most expensive first; `seconds` and `gflops` (GFLOP/s) of the whole step; and `peaks`,
    what this machine reaches, in GFLOP/s.
    """
    step = step_functions(setting, ["ours"])["ours"]
    step()
    with OperatorRecord() as record:
        step()
    total = sum(work.seconds for work in record.work.values())
    shares: dict[str, float] = {}
    for (operator, _), work in record.work.items():
        shares[kind_of(operator)] = shares.get(kind_of(operator), 0.0) + work.seconds / total
    products = [
        {
            "product": describe_product(*key),
            "calls": work.calls,
            "share": work.seconds / total,
            "gflops": work.gflop / work.seconds,
        }
        for key, work in record.work.items()
        if work.gflop
    ]
    gflop = sum(work.gflop for work in record.work.values())
    seconds = median_seconds({"step": step}, setting.repetitions, setting.clock)["step"]
    return {
        "seconds": seconds,
        "gflops": gflop / seconds,
        "shares": dict(sorted(shares.items(), key=lambda item: -item[1])),
        "products": sorted(products, key=lambda product: -product["share"]),
        "peaks": measure_peaks(setting),
    }


def describe_product(operator: str, shapes: tuple[tuple[int, ...], ...]) -> str:
    """`convolution: 64x3x3x3 on 2x3x64x64`, say: the weight, and what it is applied to."""
    if operator == "convolution":
        shapes = shapes[1], shapes[0]
    elif operator == "convolution_backward":
        shapes = shapes[2], shapes[1]
    return f"{operator.strip('_')}: " + " on ".join("x".join(map(str, shape)) for shape in shapes[:2])


def measure_peaks(setting: Setting) -> dict[str, float]:
    """GFLOP/s of a large matrix product, and of a 3x3 convolution of 128 channels forward and backward."""
    dtype = torch.bfloat16 if setting.mixed_precision == "bf16" else torch.float32
    matrix = torch.randn(2048, 2048, dtype=dtype)
    conv = nn.Conv2d(128, 128, 3, padding=1).to(dtype)
    features = torch.randn(4, 128, 64, 64, dtype=dtype, requires_grad=True)
    functions = {"matrix product": lambda: matrix @ matrix}
    for label, layout in {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}.items():
        module = nn.Conv2d(128, 128, 3, padding=1).to(dtype).to(memory_format=layout)
        module.load_state_dict(conv.state_dict())
        x = features.detach().contiguous(memory_format=layout).requires_grad_()
        out = module(x)
        gradient = torch.randn_like(out)
        functions[f"convolution {label}"] = functools.partial(_no_graph, module, x.detach())
        functions[f"convolution {label}, backward"] = functools.partial(
            torch.autograd.grad, out, [x, module.weight], gradient, retain_graph=True
        )
    seconds = median_seconds(functions, setting.repetitions, setting.clock)
    gflop = {name: count_gflop(function) for name, function in functions.items()}
    return {name: gflop[name] / seconds[name] for name in functions}


@torch.no_grad()
def _no_graph(function: Callable, *arguments):
    return function(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Inference


def compare_inference(setting: Setting, compile: bool = False) -> dict[str, dict[str, float]]:
    """Task -> contestant -> seconds, against `diffusers.VQModel` with the same weights."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if setting.mixed_precision == "bf16" else torch.float32
    plain = VQGANModel(setting.model_config()).eval().to(dtype)
    models = {
        "diffusers": plain.to_diffusers(),
        "hf_vqgan": plain,
        "hf_vqgan, channels_last": copy.deepcopy(plain).to(memory_format=torch.channels_last),
    }
    if compile:
        for name in tuple(models):
            models[f"{name}, compiled"] = _compiled(models[name])
    pixels = setting.pixels().to(dtype)
    latents = _no_graph(plain.encode, pixels).latents
    seconds = {}
    for task, x in {"encode": pixels, "decode": latents, "forward": pixels}.items():
        functions: dict[str, Callable] = {
            name: functools.partial(_no_graph, getattr(model, task), x) for name, model in models.items()
        }
        for function in functions.values():
            function()
        seconds[task] = median_seconds(functions, setting.repetitions, setting.clock)
    return seconds


def _compiled(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.encoder.compile()
    model.decoder.compile()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Import

IMPORTS = {
    "hf_vqgan": "import hf_vqgan",
    # What its classes are built on and registered with
    "diffusers, transformers": (
        "from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DModel, VQModel; "
        "from diffusers.image_processor import VaeImageProcessor; "
        "from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel; "
        "from transformers.image_processing_backends import TorchvisionBackend"
    ),
}


def compare_imports(repetitions: int) -> dict[str, float]:
    """Statement -> median seconds on the cores of processes that run it and nothing else, after one to warm up."""

    def run(statement: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", statement], check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for repetition in range(repetitions + 1):
        for name, statement in IMPORTS.items():
            seconds = run(statement)
            if repetition:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}
