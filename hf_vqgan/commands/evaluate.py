"""
Measure how well models reconstruct a dataset, beside JPEG and WebP at the same bits.

    hf-vqgan evaluate MODEL DATASET
    hf-vqgan evaluate runs/mine owner/tokenizer owner/sd/vae DATASET --output_dir comparison
    hf-vqgan evaluate runs/mine DATASET --resolution 256 --update_model_card

MODEL is a VQGANModel, a diffusers AutoencoderKL or VQModel, or any checkpoint that VQGANModel.from_original reads: a
folder, a file, or `owner/name[/folder][@revision]` on the Hub. DATASET comes last, as load_dataset takes it. Writes
evaluation.json, evaluation.md and comparison.png. What the figures mean: docs/evaluation.md. Flags of
`accelerate launch`, such as --num_processes, are taken, too.
"""

from pathlib import Path

from accelerate import PartialState

from ..evaluation.comparison import EvaluationConfig, evaluate
from ..training.arguments import RecipeParser, errors_in_one_line


def make_parser() -> RecipeParser:
    parser = RecipeParser(
        (EvaluationConfig,), description=__doc__, usage="%(prog)s MODEL [MODEL ...] DATASET [--flag value ...]"
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="Models to compare, before all flags.")
    parser.add_argument("dataset", metavar="DATASET", help="Hub dataset, local path, or package:NAME/FOLDER.")
    return parser


def main() -> None:
    parser = make_parser()
    with errors_in_one_line():
        config, names = parser.parse()
        evaluate(names.models, names.dataset, config)
    if PartialState().is_main_process:
        print((Path(config.output_dir) / "evaluation.md").read_text(encoding="utf-8").split("\n## Protocol")[0])
