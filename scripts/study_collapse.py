#!/usr/bin/env python
"""
Codebook collapse and its remedies, side by side: same data, encoder, decoder, steps and seed, other quantizers.

    python scripts/study_collapse.py --dataset_name user/images --output_dir runs/collapse

Every variant is a run of its own in output_dir/NAME (an interrupted study goes on where it was). The comparison is in
study.json, study.md and study.png. Results and what they mean: docs/codebook_health.md.
"""

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import HfArgumentParser

from hf_vqgan import VQGANConfig
from hf_vqgan.data.datasets import ImageTransform, TrainingImages, load_image_datasets
from hf_vqgan.training.arguments import errors_in_one_line
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.tokenizer import train


@dataclass
class StudyArguments:
    dataset_name: str = field(metadata={"help": "Hub dataset or local path, as for train_vqgan.py."})
    output_dir: str = field(default="runs/collapse", metadata={"help": "Folder of the study."})
    resolution: int = field(default=64, metadata={"help": "Side of the training images."})
    num_vq_embeddings: int = field(default=8192, metadata={"help": "Number of codes K, a power of two."})
    max_train_steps: int = field(default=200, metadata={"help": "Steps of every variant."})
    train_batch_size: int = field(default=16, metadata={"help": "Images per step."})
    perceptual_net: str = field(default="alex", metadata={"help": "LPIPS network, in training and validation."})
    variants: list[str] = field(default_factory=list, metadata={"help": "Run only these. Default: all."})
    seed: int = field(default=0, metadata={"help": "Seed of every variant."})


def variants(num_codes: int) -> dict[str, tuple[dict, dict]]:
    """Name -> fields of model and training that differ from `vq` with commitment loss and codes started at U(±1/K)."""
    bits = int(math.log2(num_codes))
    return {
        "no commitment": ({"commitment_weight": 0.0}, {}),
        "commitment": ({}, {}),
        "commitment x 4": ({"commitment_weight": 1.0}, {}),
        "k-means start": ({}, {"codebook_init": "data"}),
        "restart": ({}, {"dead_code_restart_steps": 20}),
        "EMA": ({"quantizer": "vq_ema"}, {}),
        "cosine": ({"codebook_l2_norm": True}, {}),
        "rotation trick": ({"rotation_trick": True}, {}),
        "SimVQ": ({"quantizer": "simvq"}, {}),
        "FSQ": ({"quantizer": "fsq", "fsq_levels": [8] * (bits // 3) + [2 ** (bits % 3)] * bool(bits % 3)}, {}),
        "LFQ + entropy": (
            {"quantizer": "lfq", "vq_embed_dim": bits, "entropy_weight": 0.1, "entropy_temperature": 1.0},
            {"entropy_anneal_factor": 3.0, "entropy_anneal_steps": 100},
        ),
        "default": (
            {"quantizer": "vq_ema"},
            {"codebook_init": "data", "dead_code_restart_steps": 20, "quantize_start": 30},
        ),
    }


def local_content_perplexity(arguments: StudyArguments, patch: int = 12, images: int = 256) -> float:
    """
    The perplexity that an ideal quantizer would reach if it saw `patch` pixels around each position: windows that recur
    exactly (white background, mostly) share one code each, all others spread evenly over the rest of the codes.

    A yardstick, not a bound: an encoder whose receptive field is larger may give the same background different codes,
    depending on what is near. The bound is K, or the number of positions if that is smaller.
    """
    train_images, _ = load_image_datasets(arguments.dataset_name, seed=arguments.seed)
    dataset = TrainingImages(train_images, ImageTransform(arguments.resolution, 0, random_flip=False))
    windows: Counter = Counter()
    for number in range(min(images, len(dataset))):
        pixels = dataset[number]["pixel_values"]
        for window in pixels.unfold(1, patch, 4).unfold(2, patch, 4).permute(1, 2, 0, 3, 4).flatten(0, 1):
            windows[(window * 127.5).round().to(torch.int16).numpy().tobytes()] += 1
    total = windows.total()
    recurring = [count / total for count in windows.values() if count > 1]
    rest = 1 - sum(recurring)
    free_codes = max(1, arguments.num_vq_embeddings - len(recurring))
    entropy = -sum(share * math.log(share) for share in recurring)
    entropy += -rest * math.log(rest / free_codes) if rest > 0 else 0
    return min(math.exp(entropy), arguments.num_vq_embeddings)


def run_variant(arguments: StudyArguments, name: str, model_fields: dict, training_fields: dict) -> dict:
    folder = Path(arguments.output_dir) / name.replace(" ", "_").replace("+", "and")
    model = dict(
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        norm_num_groups=8,
        latent_channels=32,
        vq_embed_dim=8,
        num_vq_embeddings=arguments.num_vq_embeddings,
        sample_size=arguments.resolution,
    )
    training = dict(
        dataset_name=arguments.dataset_name,
        output_dir=str(folder),
        resolution=arguments.resolution,
        resize=0,
        perceptual_net=arguments.perceptual_net,
        validation_net=arguments.perceptual_net,
        perceptual_weight=0.3,
        adversarial_weight=0.0,
        codebook_init="none",
        train_batch_size=arguments.train_batch_size,
        max_train_steps=arguments.max_train_steps,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=20,
        adam_beta1=0.9,
        adam_beta2=0.99,
        codebook_window=50,
        validation_steps=arguments.max_train_steps,
        checkpointing_steps=arguments.max_train_steps,
        seed=arguments.seed,
    )
    metrics = train(VQGANTrainingConfig(**training | training_fields), VQGANConfig(**model | model_fields))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    curve = [(row["step"], row["perplexity"], row["usage"]) for row in rows if "perplexity" in row]
    return {"curve": curve} | {
        key: metrics[key] for key in ("perplexity", "usage", "psnr", "lpips", "num_codes", "seconds")
    }


def draw(results: dict[str, dict], local: float) -> Figure:
    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, 3)
    for number, (name, result) in enumerate(results.items()):
        steps, perplexities, usages = zip(*result["curve"], strict=True)
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        panels[0].plot(steps, perplexities, label=name, linewidth=3 if name == "default" else 1, **style)
        panels[1].plot(steps, usages, label=name, linewidth=3 if name == "default" else 1, **style)
        panels[2].scatter(result["usage"], result["lpips"], color=style["color"])
        panels[2].annotate(
            name, (result["usage"], result["lpips"]), fontsize=8, xytext=(3, 3), textcoords="offset points"
        )
    panels[0].axhline(local, color="grey", linewidth=0.5)
    panels[0].set(title="perplexity, last 50 steps (grey: ideal for local content)", xlabel="step", yscale="log")
    panels[1].set(title="share of codes used, last 50 steps", xlabel="step")
    panels[2].set(title="validation LPIPS (lower is better)", xlabel="share of codes used at the end")
    panels[0].legend(fontsize=7, loc="lower left", ncols=2)
    return figure


def main() -> None:
    (arguments,) = HfArgumentParser(StudyArguments).parse_args_into_dataclasses()
    chosen = variants(arguments.num_vq_embeddings)
    if unknown := set(arguments.variants) - chosen.keys():
        sys.exit(f"study_collapse.py: error: no variant {sorted(unknown)}; there are: {', '.join(chosen)}.")
    folder = Path(arguments.output_dir)
    results = {}
    for name, fields in chosen.items():
        if not arguments.variants or name in arguments.variants:
            print(f"--- {name}", flush=True)
            results[name] = run_variant(arguments, name, *fields)
    local = local_content_perplexity(arguments)
    lines = ["| variant | perplexity | usage | PSNR (dB) | LPIPS |", "|---|---|---|---|---|"]
    for name, result in results.items():
        cells = (
            f"{result['perplexity']:.0f}",
            f"{result['usage']:.1%}",
            f"{result['psnr']:.2f}",
            f"{result['lpips']:.3f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"\nPerplexity that local content would give an ideal quantizer: {local:.0f}; bound: all codes.")
    (folder / "study.md").write_text("\n".join(lines) + "\n")
    (folder / "study.json").write_text(json.dumps({"local_content_perplexity": local, "results": results}, indent=1))
    draw(results, local).savefig(folder / "study.png")
    print("\n".join(lines))


if __name__ == "__main__":
    with errors_in_one_line():
        main()
