"""
Train a VQ-GAN.

    hf-vqgan train                                                    # the recipe `quickstart`
    hf-vqgan train --dataset_name path/to/images --output_dir runs/mine
    hf-vqgan train --config my_recipe.yaml --learning_rate 2e-4
    hf-vqgan train --num_processes 2 --dataset_name user/images       # and other flags of `accelerate launch`
    hf-vqgan train --dry_run                                          # check everything, train nothing

Values come from the dataclasses in hf_vqgan/, overridden by the recipe, overridden by flags. `hf-vqgan recipes` lists
the recipes. The same command again resumes.
"""

from ..configuration_vqgan import VQGANConfig
from ..files.sources import check_model_folder
from ..training.arguments import ModelArguments, RecipeParser, errors_in_one_line, given, training_parser
from ..training.configuration import VQGANTrainingConfig
from ..training.tokenizer import train


def make_parser() -> RecipeParser:
    return training_parser((VQGANTrainingConfig, ModelArguments), __doc__, default_recipe="quickstart")


def main() -> None:
    parser = make_parser()
    with errors_in_one_line():
        config, model, flags = parser.parse()
        fields = {"sample_size": config.resolution} | given(model)
        if config.init_from is None:
            model_config = VQGANConfig(**fields)
        else:
            check_model_folder(config.init_from)
            model_config = VQGANConfig.from_pretrained(config.init_from, **fields)
        train(config, model_config, dry_run=flags.dry_run)
