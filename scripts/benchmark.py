#!/usr/bin/env python
"""
Speed and memory on CPU, as ratios measured side by side in one run: medians over contestants that take turns.

    python scripts/benchmark.py lookup                      # nearest-code lookup against other implementations
    python scripts/benchmark.py step                        # training step against two textbook steps
    python scripts/benchmark.py curves --steps 100          # and their loss curves
    python scripts/benchmark.py quality --dataset_name DATASET --steps 400   # how soon each reaches the same LPIPS
    python scripts/benchmark.py account                     # where a training step's time goes
    python scripts/benchmark.py inference                   # against diffusers.VQModel
    python scripts/benchmark.py import                      # against importing diffusers and transformers
    python scripts/benchmark.py growth                      # over image size, batch, codes, processes

Machines are noisy: compare within a run, never across runs. Results: docs/performance.md.
"""

import argparse
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator

import torch
from benchmarks import lookup_speed, speed
from benchmarks.speed import Setting, in_fresh_process

from hf_vqgan.data.images import ImageOptions, open_images
from hf_vqgan.training.arguments import errors_in_one_line

PRECISIONS = {"no": "fp32", "bf16": "bf16"}


def settings(arguments: argparse.Namespace) -> Iterator[tuple[str, Setting]]:
    """Label and setting for each resolution and precision asked for. Larger images come in smaller batches."""
    names = {field.name for field in dataclasses.fields(Setting)} & vars(arguments).keys()
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    pixels = Setting(**given).batch_size * min(arguments.resolutions) ** 2
    for resolution in arguments.resolutions:
        for precision in arguments.precisions:
            batch_size = max(1, pixels // resolution**2)
            fields = given | {"resolution": resolution, "batch_size": batch_size, "mixed_precision": precision}
            yield f"{resolution}², batch {batch_size}, {PRECISIONS[precision]}", Setting(**fields)


def print_row(*cells) -> None:
    print(
        "| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def print_head(*cells: str) -> None:
    print_row(*cells)
    print("|---" * len(cells) + "|")


def lookup(arguments: argparse.Namespace) -> list[dict]:
    rivals = "diffusers (cdist)", "vector-quantize-pytorch"
    print_head("N x K x D", *lookup_speed.NAMES, "ours: times faster than cdist / vqp")
    rows = []
    for size in arguments.sizes:
        n, k, d = map(int, size.split("x"))
        figures = lookup_speed.compare_lookups(n, k, d, arguments.memory, arguments.device)
        cells = {
            name: f"{row['seconds'] * 1e3:.1f} ms" + (f", {row['memory']:.0f} MB" if "memory" in row else "")
            for name, row in figures.items()
        }
        ratios = [
            f"{figures[name]['seconds'] / figures['ours']['seconds']:.2f}" if name in figures else "-"
            for name in rivals
        ]
        print_row(size, *(cells.get(name, "-") for name in lookup_speed.NAMES), " / ".join(ratios))
        rows.append({"size": size, "figures": figures})
    return rows


def step(arguments: argparse.Namespace) -> list[dict]:
    print_head("setting", "step", "GFLOP", "MB added", "seconds", "GFLOP / ours", "MB: of two passes", "seconds / ours")
    rows = []
    for label, setting in settings(arguments):
        figures = speed.compare_steps(setting, arguments.contestants)
        ours, textbook = figures["ours"], figures["two passes"]
        for name, row in figures.items():
            shares = (
                row["gflop"] / ours["gflop"],
                row["memory"] / textbook["memory"],
                row["seconds"] / ours["seconds"],
            )
            print_row(label, name, row["gflop"], f"{row['memory']:.0f}", row["seconds"], *shares)
        rows.append({"setting": dataclasses.asdict(setting), "figures": figures})
    return rows


def curves(arguments: argparse.Namespace) -> list[dict]:
    print_head("setting", "training", "first loss", "last fifth, mean", "last fifth, largest difference from ours")
    rows = []
    for label, setting in settings(arguments):
        losses = in_fresh_process(speed.loss_curves, setting, arguments.steps)
        last = {name: curve[-max(1, arguments.steps // 5) :] for name, curve in losses.items()}
        for name, values in last.items():
            difference = max(abs(a - b) for a, b in zip(values, last["ours"], strict=True))
            mean = sum(values) / len(values)
            print_row(label, name, f"{losses[name][0]:.4f}", f"{mean:.4f}", f"{difference:.1e}")
        rows.append({"setting": dataclasses.asdict(setting), "losses": losses})
    return rows


def quality(arguments: argparse.Namespace) -> list[dict]:
    if not arguments.dataset_name:
        raise SystemExit("benchmark.py: error: quality needs --dataset_name: images to train on and to validate with.")
    print_head("setting", "seed", "LPIPS to reach", "two passes: seconds", "ours: seconds", "times sooner")
    rows = []
    for label, setting in settings(arguments):
        options = ImageOptions(arguments.dataset_name, resolution=setting.resolution, shuffle_seed=0)
        images, validation = (
            open_images(dataclasses.replace(options, split=split, max_samples=count)).squares().read_all().pixels
            for split, count in (("train", 4096), (None, 64))
        )
        every = max(1, arguments.steps // 20)
        for seed in range(arguments.seeds):
            setting = dataclasses.replace(setting, seed=seed)
            curves = in_fresh_process(speed.quality_curves, setting, images, validation, arguments.steps, every)
            seconds, target = curves["two passes"][-1]
            reached = speed.seconds_to(target, curves["ours"])
            print_row(label, seed, f"{target:.4f}", seconds, "never" if reached is None else reached,
                      "-" if reached is None else seconds / reached)  # fmt: skip
            rows.append({"setting": dataclasses.asdict(setting), "curves": curves})
    return rows


def account(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    for label, setting in settings(arguments):
        figures = in_fresh_process(speed.account_for_step, setting)
        print(f"\n{label}\n")
        print_head("what", "share of the step's time")
        for kind, share in figures["shares"].items():
            print_row(kind, f"{share:.1%}")
        print()
        peak = max(figures["peaks"].values())
        print_head("rate", "GFLOP/s", "of the best")
        for name, rate in {"the whole step": figures["gflops"], **figures["peaks"]}.items():
            print_row(name, f"{rate:.0f}", f"{rate / peak:.0%}")
        print()
        print_head("product (share of 1 % or more)", "calls", "share", "GFLOP/s", "of the best")
        for product in figures["products"]:
            if product["share"] >= 0.01:
                rate = product["gflops"]
                print_row(
                    product["product"], product["calls"], f"{product['share']:.1%}", f"{rate:.0f}", f"{rate / peak:.0%}"
                )
        rows.append({"setting": dataclasses.asdict(setting), "figures": figures})
    return rows


def inference(arguments: argparse.Namespace) -> list[dict]:
    print_head("setting", "task", "contestant", "seconds", "times faster than diffusers")
    rows = []
    for label, setting in settings(arguments):
        figures = in_fresh_process(speed.compare_inference, setting, arguments.compile)
        for task, seconds in figures.items():
            for name, value in seconds.items():
                print_row(label, task, name, f"{value:.3f}", seconds["diffusers"] / value)
        rows.append({"setting": dataclasses.asdict(setting), "seconds": figures})
    return rows


def import_(arguments: argparse.Namespace) -> list[dict]:
    seconds = speed.compare_imports(arguments.repetitions or Setting().repetitions)
    print_head("import", "seconds on the cores", "ratio")
    for name, value in seconds.items():
        print_row(name, value, value / seconds["diffusers, transformers"])
    return [seconds]


def growth(arguments: argparse.Namespace) -> list[dict]:
    print_head("what changes", "to", "GFLOP", "MB added", "seconds", "images/s")
    rows = []
    for what, value, figures in speed.measure_growth(next(settings(arguments))[1]):
        print_row(what, value, figures["gflop"], f"{figures['memory']:.0f}", figures["seconds"], figures["images/s"])
        rows.append({"what": what, "value": value, "figures": figures})
    return rows


SUBCOMMANDS = {
    "lookup": lookup,
    "step": step,
    "curves": curves,
    "quality": quality,
    "account": account,
    "inference": inference,
    "import": import_,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SUBCOMMANDS)
    parser.add_argument("--resolutions", nargs="+", type=int, help="Default: 64 and 128; 256 for inference.")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batch_size", type=int, help="At the smallest resolution; others have as many pixels.")
    parser.add_argument("--block_out_channels", nargs="+", type=int)
    parser.add_argument("--num_vq_embeddings", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads.")
    parser.add_argument("--clock", choices=speed.CLOCKS, help="cpu: seconds on the cores, for busy machines.")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=speed.STEPS,
        default=tuple(speed.STEPS),
        help="step: `ours` and `two passes` at least.",
    )
    parser.add_argument("--steps", type=int, default=100, help="curves, quality: training steps.")
    parser.add_argument(
        "--seeds", type=int, default=1, help="quality: trainings, each with a start and batches of its own."
    )
    parser.add_argument("--dataset_name", help="quality: Hub dataset, or a folder that load_dataset reads.")
    parser.add_argument("--compile", action="store_true", help="inference: torch.compile as well (needs a compiler).")
    parser.add_argument("--sizes", nargs="+", default=lookup_speed.SIZES, help="lookup: N x K x D. Default: full grid.")
    parser.add_argument("--memory", action="store_true", help="lookup: peak memory on CPU, in a process for each.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="lookup: where the contestants run.")
    parser.add_argument("--output", help="Write the figures to this JSON file, too.")
    arguments = parser.parse_args()
    arguments.resolutions = arguments.resolutions or ([256] if arguments.what == "inference" else [64, 128])
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    rows = SUBCOMMANDS[arguments.what](arguments)
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
