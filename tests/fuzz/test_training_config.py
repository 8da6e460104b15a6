"""Random values in every field: a configuration takes them, or says in one line which it does not take."""

import dataclasses
import math
import random
import typing
from pathlib import Path
from types import NoneType

import numpy as np
import pytest
import yaml
from studies.loss_study import LossStudyConfig

from hf_vqgan.evaluation.comparison import EvaluationConfig
from hf_vqgan.evaluation.latent_analysis import LatentAnalysisConfig
from hf_vqgan.generation.denoisers import LatentDiffusionConfig
from hf_vqgan.generation.encoded_dataset import EncodingConfig
from hf_vqgan.training.arguments import ModelArguments, RecipeParser
from hf_vqgan.training.configuration import VQGANTrainingConfig

CONFIGS = [VQGANTrainingConfig, EvaluationConfig, LatentAnalysisConfig, EncodingConfig, LatentDiffusionConfig,
           LossStudyConfig]  # fmt: skip
NEEDED = {"dataset_name": "images", "vqgan": "model"}
WORDS = ["", "a", "none", "true", "1", "nan", "-1", "--seed", "ü", "a b", "\n", "{}", "linear", "data", "x" * 500]
SCALARS = [None, True, False, 0, 1, -1, 7, 2**31, -(2**63), 10**400, 0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, -3.5, math.nan,
           math.inf, -math.inf, *WORDS]  # fmt: skip
ONLY_PYTHON = [np.float32(0.5), np.int64(3), np.array([1]), Path("runs/x"), b"bytes", object(), int, 1j, (1, 2), {1}]


def draw(rng: random.Random, scalars: list, depth: int = 0):
    """Anything."""
    kind = rng.random()
    if kind < 0.7 or depth == 2:
        return rng.choice(scalars)
    if kind < 0.9:
        return [draw(rng, scalars, depth + 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(WORDS)): draw(rng, scalars, depth + 1) for _ in range(rng.randrange(3))}


def draw_fields(rng: random.Random, kind: type, scalars: list) -> dict:
    names = [field.name for field in dataclasses.fields(kind)]
    needed = {name: value for name, value in NEEDED.items() if name in names}
    drawn = rng.sample(names, rng.choice([1, 1, 1, 2, 8]))
    hints = typing.get_type_hints(kind)
    return needed | {
        name: draw(rng, scalars) if rng.random() < 0.4 else draw_plausible(rng, hints[name]) for name in drawn
    }


def draw_plausible(rng: random.Random, hint):
    """Something of the type."""
    if typing.get_origin(hint) is list:
        return [draw_plausible(rng, *typing.get_args(hint)) for _ in range(rng.randrange(1, 4))]
    kind = rng.choice(typing.get_args(hint) or (hint,))
    if typing.get_origin(kind) is list:
        return draw_plausible(rng, kind)
    words = ["vgg", "alex", "patchgan", "hinge", "linear", "no", "bf16", "a"]
    likely = {int: [1, 2, 8, 100], float: [0.0, 0.5, 1.0, 1e-4], str: words, bool: [True, False], NoneType: [None]}
    return rng.choice(likely[kind])


def assert_sound(config) -> None:
    """Every field is of its type, and every number is one."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), list(typing.get_args(hint) or (hint,))
        if typing.get_origin(hint) is list:
            assert isinstance(value, list) and all(type(entry) is kinds[0] for entry in value)
        else:
            assert value is None and NoneType in kinds or type(value) in kinds
        for entry in value if isinstance(value, list) else [value]:
            assert not isinstance(entry, float) or math.isfinite(entry)


def assert_names_one(fields: dict, message: str) -> None:
    assert any(name in message for name in fields), f"{fields} -> {message}"
    assert len(message) < 2500, message


def try_python(seed: int) -> bool:
    rng = random.Random(seed)
    kind = rng.choice([VQGANTrainingConfig, *CONFIGS])
    fields = draw_fields(rng, kind, SCALARS + ONLY_PYTHON)
    try:
        assert_sound(kind(**fields))
    except ValueError as error:
        assert_names_one(fields, str(error))
        return False
    return True


def try_recipe(seed: int, file: Path, parser: RecipeParser, capsys) -> bool:
    rng = random.Random(seed)
    kind = rng.choice([VQGANTrainingConfig, ModelArguments])
    fields = draw_fields(rng, kind, SCALARS)
    file.write_text(yaml.safe_dump(fields))
    argv = ["--config", str(file), "--dataset_name", "images"]
    if rng.random() < 0.3:  # a flag on top
        name = rng.choice([field.name for field in dataclasses.fields(VQGANTrainingConfig)])
        fields[name] = text = str(rng.choice(SCALARS))
        argv.append(f"--{name}={text}")
    try:
        config, *_ = parser.parse(argv)
        assert_sound(config)
    except ValueError as error:
        assert_names_one(fields, str(error))
        return False
    except SystemExit as stop:
        message = capsys.readouterr().err
        assert stop.code == 2
        assert_names_one(fields, message)
        return False
    return True


def fuzz(count: int, tmp_path, capsys) -> None:
    taken = [try_python(seed) for seed in range(count)]
    assert 0.1 < sum(taken) / count < 0.9  # or it would try nothing worth trying
    parser = RecipeParser((VQGANTrainingConfig, ModelArguments))
    taken = [try_recipe(seed, tmp_path / "recipe.yaml", parser, capsys) for seed in range(count)]
    assert 0.1 < sum(taken) / count < 0.9


def test_random_values(tmp_path, capsys):
    fuzz(300, tmp_path, capsys)


@pytest.mark.slow
def test_many_random_values(tmp_path, capsys):
    fuzz(3000, tmp_path, capsys)
