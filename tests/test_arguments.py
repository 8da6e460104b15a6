from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from hf_vqgan import VQGANConfig
from hf_vqgan.configuration_vqgan import model_fields
from hf_vqgan.files.options import option
from hf_vqgan.training.arguments import ModelArguments, RecipeParser, _model_descriptions, flags_page, given
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.recipes import find_recipe, recipe_names

RECIPES = [find_recipe(name) for name in recipe_names()]


def test_the_page_of_flags_is_up_to_date():
    page = Path(__file__).parent.parent / "docs" / "flags.md"
    assert page.read_text() == flags_page(), "run `python -m hf_vqgan.training.arguments > docs/flags.md`"


def test_every_field_of_the_model_is_described():
    assert set(_model_descriptions()) == set(model_fields())


@dataclass
class Options:
    dataset_name: str = option("default", "Data.", describes_dataset=True)
    image_column: str | None = option(None, "Column.", describes_dataset=True)
    rate: float = 1.0
    sizes: list[int] = field(default_factory=list)
    flag: bool = True


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("dataset_name: mine\nimage_column: picture\nrate: 1e-4\nsizes: [1, 2]\nflag: false\n")
    return file


def test_precedence(recipe):
    parser = RecipeParser((Options,))
    assert parser.parse([])[0] == Options()
    options, _ = parser.parse(["--config", str(recipe)])
    assert options == Options("mine", "picture", 1e-4, [1, 2], False)
    options, _ = parser.parse([f"--config={recipe}", "--rate", "2", "--sizes", "3", "--flag", "true"])
    assert options == Options("mine", "picture", 2.0, [3], True)


def test_another_dataset_discards_the_recipes_description_of_its_own(recipe):
    for argv in (["--dataset_name", "other"], ["--dataset_name=other"], ["--dataset-name", "other"]):
        options, _ = RecipeParser((Options,), default_recipe=recipe).parse(argv)
        assert options == Options("other", None, 1e-4, [1, 2], False)
    options, _ = RecipeParser((Options,), default_recipe=recipe).parse(["--dataset_name", "mine"])
    assert options == Options("mine", "picture", 1e-4, [1, 2], False)
    options, _ = RecipeParser((Options,), default_recipe=recipe).parse(["--config", "none"])
    assert options == Options()


def test_crops_made_for_one_dataset_are_not_cut_from_another():
    """Those of the quickstart's eight photographs enlarge small images eight times, and then measure that."""
    parser = RecipeParser((VQGANTrainingConfig, ModelArguments), default_recipe=RECIPES[0].with_name("quickstart.yaml"))
    crops = ("resize", "crops_per_image", "validate_whole_images")
    config, *_ = parser.parse([])
    assert [getattr(config, name) for name in crops] == [256, 64, True]
    config, *_ = parser.parse(["--dataset_name", "mine"])
    assert [getattr(config, name) for name in crops] == [None, 1, False]
    config, *_ = parser.parse(["--dataset_name", "mine", "--resize", "48"])
    assert [getattr(config, name) for name in crops] == [48, 1, False]


def test_a_recipe_without_a_dataset_keeps_what_it_says_of_crops(tmp_path):
    (tmp_path / "recipe.yaml").write_text("image_column: picture\nrate: 2\n")
    argv = ["--config", str(tmp_path / "recipe.yaml"), "--dataset_name", "other"]
    assert RecipeParser((Options,)).parse(argv)[0] == Options("other", "picture", 2.0)


def test_a_list_at_a_recipes_end_leaves_positional_arguments_alone(tmp_path):
    (tmp_path / "recipe.yaml").write_text("sizes: [1]\n")
    parser = RecipeParser((Options,))
    parser.add_argument("number", type=int)
    options, names = parser.parse(["7", "--config", str(tmp_path / "recipe.yaml")])
    assert (options.sizes, names.number) == ([1], 7)


def test_an_empty_list_in_a_recipe_is_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset_name: mine\nequivariance_transforms: []\n")
    config, *_ = RecipeParser((VQGANTrainingConfig,)).parse(["--config", str(tmp_path / "recipe.yaml")])
    assert config.equivariance_transforms == []


def test_a_model_to_start_from_discards_the_default_recipe(recipe):
    """The recipe's architecture is another one, and its settings would start the codebook anew."""
    parser = RecipeParser((VQGANTrainingConfig, ModelArguments), default_recipe=RECIPES[0])
    config, model, _ = parser.parse(["--init_from", "tokenizer", "--dataset_name", "mine"])
    assert config == VQGANTrainingConfig(init_from="tokenizer", dataset_name="mine") and given(model) == {}
    assert config.codebook_init == "none"


@pytest.mark.parametrize(
    "text, argv, message",
    [
        ("", ["--raet", "1"], "unknown argument '--raet'; did you mean --rate?"),
        ("", ["--rat", "1"], "unknown argument '--rat'; did you mean --rate?"),  # no silent abbreviations
        ("raet: 1", [], "unknown key 'raet'; did you mean --rate?"),
        ("rate: fast", [], "argument --rate: invalid float value: 'fast'"),
        ("- rate", [], "expected `key: value` lines, found a list"),
        ("rate: [", [], "is not YAML"),
        ("sizes: 64", [], "sizes: expected a list of single values, as in [1, 2], found 64"),
        ("sizes: [[64]]", [], "sizes: expected a list of single values, as in [1, 2], found [[64]]"),
        ("rate: [1, 2]", [], "rate: expected one value, found [1, 2]"),
        ("dataset_name: {a: 1}", [], "dataset_name: expected one value, found {'a': 1}"),
        ("help: true", [], "unknown key 'help'"),
        (None, [], "no such file"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, text, argv, message):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        RecipeParser((Options,), default_recipe=file).parse(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "usage" not in error


def test_every_model_field_is_a_flag():
    argv = []
    config = VQGANConfig(quantizer="fsq", fsq_levels=(8, 5))  # for fsq alone is None not a value
    for name in model_fields():
        value = getattr(config, name)
        argv += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    arguments, _ = RecipeParser((ModelArguments,)).parse(argv)
    assert VQGANConfig(**given(arguments)).to_dict() == config.to_dict()


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_hold_known_keys_and_no_defaults(file):
    """A value that equals the default is said twice, and will contradict itself one day."""
    recipe = yaml.safe_load(file.read_text())
    argv = ["--config", str(file), "--dataset_name", recipe.get("dataset_name", "x")]
    _, model, _ = RecipeParser((VQGANTrainingConfig, ModelArguments)).parse(argv)
    VQGANConfig(**given(model))
    defaults = VQGANTrainingConfig(dataset_name="x")
    repeated = [key for key, value in recipe.items() if getattr(defaults, key, ...) == value]
    assert repeated == []
