#!/usr/bin/env python
"""
Measure and picture a model's latent space: smoothness, holes, robustness, structure, diffusability.

    python scripts/analyze_latent_space.py MODEL DATASET
    python scripts/analyze_latent_space.py runs/mine user/images --output_dir runs/latent_space --max_samples 256
    python scripts/analyze_latent_space.py runs/mine user/images --measures smoothness holes diffusability
    python scripts/analyze_latent_space.py runs/a user/images --compare runs/b owner/name/vae
    python scripts/analyze_latent_space.py --compare runs/latent_space_a runs/latent_space_b

MODEL is a VQGANModel, a diffusers AutoencoderKL or VQModel, or another project's checkpoint: on disk or on the Hub.
Leaves latent_space.json, report.md and pictures in output_dir. What each figure means: docs/latent_space.md.
"""

import datasets

from hf_vqgan.evaluation.latent_analysis import LatentAnalysisConfig, analyze_and_compare
from hf_vqgan.training.arguments import RecipeParser, errors_in_one_line


def main() -> None:
    datasets.disable_progress_bars()
    parser = RecipeParser((LatentAnalysisConfig,))
    parser.add_argument("model", nargs="?", help="Model: folder, file, or owner/name on the Hub.")
    parser.add_argument(
        "dataset", nargs="?", help="Hub dataset, local path that load_dataset reads, or package:NAME/DIR."
    )
    with errors_in_one_line():
        config, names = parser.parse()
        analyze_and_compare(names.model, names.dataset, config)


if __name__ == "__main__":
    main()
