#!/usr/bin/env python
"""
Measure how well models reconstruct a dataset, beside JPEG and WebP at the same bits.

    accelerate launch scripts/evaluate_vqgan.py MODEL DATASET
    accelerate launch scripts/evaluate_vqgan.py runs/mine owner/tokenizer owner/sd/vae DATASET --output_dir comparison
    accelerate launch scripts/evaluate_vqgan.py runs/mine DATASET --resolution 256 --update_model_card

MODEL is a VQGANModel, a diffusers AutoencoderKL or VQModel, or any checkpoint that VQGANModel.from_original reads: a
folder, a file, or owner/name[/folder][@revision] on the Hub. DATASET comes last, as load_dataset takes it. Writes
evaluation.json, evaluation.md and comparison.png. What the figures mean: docs/evaluation.md.
"""

from pathlib import Path

from hf_vqgan.evaluation.comparison import EvaluationConfig, evaluate
from hf_vqgan.training.arguments import RecipeParser, errors_in_one_line


def main() -> None:
    parser = RecipeParser((EvaluationConfig,))
    parser.add_argument("models", nargs="+", metavar="MODEL", help="Models to compare, before all flags.")
    parser.add_argument("dataset", metavar="DATASET", help="Hub dataset, local path, or package:NAME/FOLDER.")
    with errors_in_one_line():
        config, names = parser.parse()
        evaluate(names.models, names.dataset, config)
    print((Path(config.output_dir) / "evaluation.md").read_text(encoding="utf-8").split("\n## Protocol")[0])


if __name__ == "__main__":
    main()
