"""
Encode an image dataset into a dataset of latents and codes.

    hf-vqgan encode MODEL DATASET OUT
    hf-vqgan encode runs/mine user/images latents --what latents --latents_dtype float16
    hf-vqgan encode runs/mine user/images codes --what indices --push_to_hub

MODEL and DATASET are Hub names or local folders. The same command again continues where it was interrupted. Flags of
`accelerate launch`, such as --num_processes, are taken, too.
"""

import datasets

from ..generation.encoded_dataset import EncodingConfig, encode_dataset
from ..training.arguments import RecipeParser, errors_in_one_line


def make_parser() -> RecipeParser:
    parser = RecipeParser((EncodingConfig,), description=__doc__, usage="%(prog)s MODEL DATASET OUT [--flag value ...]")
    parser.add_argument("model", help="VQGANModel: Hub name or folder.")
    parser.add_argument("dataset", help="Hub dataset, local path that load_dataset reads, or package:NAME/FOLDER.")
    parser.add_argument("out", help="Folder for the encoded dataset.")
    return parser


def main() -> None:
    datasets.disable_progress_bars()  # there is one of our own, of all shards
    parser = make_parser()
    with errors_in_one_line():
        config, names = parser.parse()
        encode_dataset(names.model, names.dataset, names.out, config)
