#!/usr/bin/env python
"""
Train a VQ-GAN with Accelerate.

    accelerate launch scripts/train_vqgan.py                                    # recipes/quickstart.yaml
    accelerate launch scripts/train_vqgan.py --dataset_name user/images --output_dir runs/mine
    accelerate launch scripts/train_vqgan.py --config my_recipe.yaml --learning_rate 2e-4
    accelerate launch scripts/train_vqgan.py --dry_run                          # check everything, train nothing

Values come from the dataclasses in hf_vqgan/, overridden by the recipe, overridden by flags. `--help` lists them all.
"""

import sys
from pathlib import Path

import datasets

from hf_vqgan import VQGANConfig
from hf_vqgan.arguments import ModelArguments, RecipeParser, given
from hf_vqgan.training import PREEMPTED_EXIT_CODE, CodebookCollapse, Preempted, VQGANTrainingConfig, train

RECIPES = Path(__file__).parent / "recipes"


def main() -> None:
    parser = RecipeParser((VQGANTrainingConfig, ModelArguments), default_recipe=RECIPES / "quickstart.yaml")
    parser.add_argument("--dry_run", action="store_true", help="Check everything, print the plan, train nothing.")
    try:
        config, model, flags = parser.parse()
        fields = {"sample_size": config.resolution} | given(model)
        if config.init_from is None:
            model_config = VQGANConfig(**fields)
        else:
            model_config = VQGANConfig.from_pretrained(config.init_from, **fields)
        train(config, model_config, dry_run=flags.dry_run)
    except Preempted as error:
        print(f"{Path(__file__).name}: {error} The same command goes on from there.", file=sys.stderr)
        sys.exit(PREEMPTED_EXIT_CODE)
    except (ValueError, OSError, FloatingPointError, CodebookCollapse, datasets.exceptions.DatasetsError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")


if __name__ == "__main__":
    main()
