#!/usr/bin/env python
"""
Encode an image dataset into a dataset of latents and codes.

    accelerate launch scripts/encode_dataset.py MODEL DATASET OUT
    accelerate launch scripts/encode_dataset.py runs/mine user/images latents --what latents --latents_dtype float16
    accelerate launch scripts/encode_dataset.py runs/mine user/images codes --what indices --push_to_hub

MODEL and DATASET are Hub names or local folders. The same command again continues where it was interrupted.
"""

import datasets

from hf_vqgan.generation.encoded_dataset import EncodingConfig, encode_dataset
from hf_vqgan.training.arguments import RecipeParser, errors_in_one_line


def main() -> None:
    datasets.disable_progress_bars()  # there is one of our own, of all shards
    parser = RecipeParser((EncodingConfig,))
    parser.add_argument("model", help="VQGANModel: Hub name or folder.")
    parser.add_argument("dataset", help="Hub dataset, local path that load_dataset reads, or package:NAME/FOLDER.")
    parser.add_argument("out", help="Folder for the encoded dataset.")
    with errors_in_one_line():
        config, names = parser.parse()
        encode_dataset(names.model, names.dataset, names.out, config)


if __name__ == "__main__":
    main()
