"""
Measure and picture a model's latent space: smoothness, holes, robustness, structure, diffusability.

    hf-vqgan analyze MODEL DATASET
    hf-vqgan analyze runs/mine user/images --output_dir runs/latent_space --max_samples 256
    hf-vqgan analyze runs/mine user/images --measures smoothness holes diffusability
    hf-vqgan analyze runs/a user/images --compare runs/b owner/name/vae
    hf-vqgan analyze --compare runs/latent_space_a runs/latent_space_b

MODEL is a VQGANModel, a diffusers AutoencoderKL or VQModel, or another project's checkpoint: on disk or on the Hub.
Leaves latent_space.json, report.md and pictures in output_dir. What each figure means: docs/latent_space.md.
"""

import datasets

from ..evaluation.latent_analysis import LatentAnalysisConfig
from ..evaluation.latent_report import analyze_and_compare
from ..training.arguments import RecipeParser, errors_in_one_line


def make_parser() -> RecipeParser:
    parser = RecipeParser(
        (LatentAnalysisConfig,), description=__doc__, usage="%(prog)s [MODEL DATASET] [--flag value ...]"
    )
    parser.add_argument("model", nargs="?", help="Model: folder, file, or owner/name on the Hub.")
    parser.add_argument(
        "dataset", nargs="?", help="Hub dataset, local path that load_dataset reads, or package:NAME/DIR."
    )
    return parser


def main() -> None:
    datasets.disable_progress_bars()
    parser = make_parser()
    with errors_in_one_line():
        config, names = parser.parse()
        analyze_and_compare(names.model, names.dataset, config)
