"""
Train a model of a VQ-GAN's tokens, autoregressive or masked.

    hf-vqgan train-tokens --vqgan runs/mine --dataset_name user/images
    hf-vqgan train-tokens --vqgan runs/mine --dataset_name codes --class_column label
    hf-vqgan train-tokens --vqgan runs/mine --dataset_name codes --token_model masked

The dataset holds images, or what `hf-vqgan encode` made of them. Values come from the dataclass in
hf_vqgan/generation/token_models.py, overridden by a recipe (--config), by flags. The same command again resumes. Flags
of `accelerate launch`, such as --num_processes, are taken, too.
"""

from ..generation.token_models import TokenTrainingConfig
from ..generation.tokens import train_token_model
from ..training.arguments import RecipeParser, errors_in_one_line, training_parser


def make_parser() -> RecipeParser:
    return training_parser((TokenTrainingConfig,), __doc__)


def main() -> None:
    parser = make_parser()
    with errors_in_one_line():
        config, flags = parser.parse()
        train_token_model(config, dry_run=flags.dry_run)
