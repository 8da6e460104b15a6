#!/usr/bin/env python
"""
Train a VQ-GAN with Accelerate.

    accelerate launch scripts/train_vqgan.py                                    # recipes/quickstart.yaml
    accelerate launch scripts/train_vqgan.py --dataset_name user/images --output_dir runs/mine
    accelerate launch scripts/train_vqgan.py --config my_recipe.yaml --learning_rate 2e-4
    accelerate launch scripts/train_vqgan.py --dry_run                          # check everything, train nothing

Values come from the dataclasses in hf_vqgan/, overridden by the recipe, overridden by flags. `--help` lists them all.
"""

from pathlib import Path

from hf_vqgan import VQGANConfig
from hf_vqgan.files.sources import check_source
from hf_vqgan.training.arguments import ModelArguments, RecipeParser, errors_in_one_line, given
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.tokenizer import train

RECIPES = Path(__file__).parent / "recipes"


def main() -> None:
    parser = RecipeParser((VQGANTrainingConfig, ModelArguments), default_recipe=RECIPES / "quickstart.yaml")
    parser.add_argument("--dry_run", action="store_true", help="Check everything, print the plan, train nothing.")
    with errors_in_one_line():
        config, model, flags = parser.parse()
        fields = {"sample_size": config.resolution} | given(model)
        if config.init_from is None:
            model_config = VQGANConfig(**fields)
        else:
            check_source(config.init_from)
            model_config = VQGANConfig.from_pretrained(config.init_from, **fields)
        train(config, model_config, dry_run=flags.dry_run)


if __name__ == "__main__":
    main()
