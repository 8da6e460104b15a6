"""
Measure how close generated images are to real ones: gFID, gKID, Inception score, precision, recall, sFID, copies.

    hf-vqgan evaluate-generation runs/diffusion --dataset_name DATASET --class_column label
    hf-vqgan evaluate-generation runs/a owner/b samples/ --dataset_name DATASET --guidance_scale 1 1.5 2 3 4
    hf-vqgan evaluate-generation owner/dit --reference VIRTUAL_imagenet256_labeled.npz --num_samples 50000

PIPELINE is whatever DiffusionPipeline.from_pretrained loads and returns images, on the Hub or in a folder; or a folder
of pictures or an archive (.npz) of images that were made elsewhere. Writes generation.json, generation.md, samples.png,
neighbours.png and, for several guidance scales, guidance.png. What the figures mean: docs/generation_evaluation.md.
Flags of `accelerate launch`, such as --num_processes, are taken, too.
"""

from pathlib import Path

from accelerate import PartialState

from ..evaluation.generation import GenerationConfig, evaluate_generation
from ..training.arguments import RecipeParser, errors_in_one_line


def make_parser() -> RecipeParser:
    parser = RecipeParser(
        (GenerationConfig,), description=__doc__, usage="%(prog)s PIPELINE [PIPELINE ...] [--flag value ...]"
    )
    parser.add_argument("pipelines", nargs="+", metavar="PIPELINE", help="What to judge, before all flags.")
    return parser


def main() -> None:
    parser = make_parser()
    with errors_in_one_line():
        config, names = parser.parse()
        evaluate_generation(names.pipelines, config)
    if PartialState().is_main_process:
        print((Path(config.output_dir) / "generation.md").read_text(encoding="utf-8").split("\n## Protocol")[0])
