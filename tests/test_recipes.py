"""Every recipe builds its networks and passes its own check, on whatever images are at hand."""

import dataclasses
import functools

import pytest

from hf_vqgan import VQGANConfig
from hf_vqgan.training.arguments import ModelArguments, RecipeParser, given
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.plan import rehearse
from hf_vqgan.training.recipes import find_recipe, recipe_names
from hf_vqgan.training.tokenizer import train

RECIPES = [find_recipe(name) for name in recipe_names()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_dry_run(recipe, image_folder, random_trunk, backbone, tmp_path, capsys, monkeypatch):
    # At their real widths, on small images; two steps are the fewest that tell a time
    monkeypatch.setattr("hf_vqgan.training.loop.rehearse", functools.partial(rehearse, steps=2))
    replaced = {"dataset_name": image_folder, "output_dir": tmp_path / "run", "disc_backbone": backbone,
                "mixed_precision": "no", "cpu_threads": 2, "resolution": 64, "train_batch_size": 1}  # fmt: skip
    flags = [text for name, value in replaced.items() for text in (f"--{name}", str(value))]
    config, model, _ = RecipeParser((VQGANTrainingConfig, ModelArguments)).parse(["--config", str(recipe), *flags])
    trunk = random_trunk / f"{config.perceptual_net}.safetensors"
    config = dataclasses.replace(config, perceptual_weights_path=str(trunk), validation_net=config.perceptual_net)
    train(config, VQGANConfig(sample_size=config.resolution, **given(model)), dry_run=True)
    plan = capsys.readouterr().out
    assert plan.splitlines()[-1].startswith("OK: ")
    assert f"f{VQGANConfig(**given(model)).downsample_factor}," in plan
    assert not (tmp_path / "run").exists()
