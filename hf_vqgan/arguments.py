"""Command lines: dataclass defaults, overridden by a YAML recipe, overridden by flags."""

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import field as dataclass_field
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .configuration_training import VQGANTrainingConfig
from .configuration_vqgan import VQGANConfig, model_fields

# What names a dataset or says where things are in it. Overriding a recipe's dataset discards the recipe's description.
DATASET_FIELDS = ("dataset_name", "dataset_config_name", "dataset_revision", "extra_datasets", "dataset_weights",
                  "train_split", "validation_split", "train_files", "validation_files", "image_column")  # fmt: skip


def _model_descriptions() -> dict[str, str]:
    """What VQGANConfig's docstring says of each of its fields, on one line each."""
    arguments = VQGANConfig.__doc__.split("Args:\n")[1].split("\n\n")[0]
    entries = re.split(r"\n? {8}(?=\w+ \(`)", arguments)[1:]
    parts = (re.fullmatch(r"(\w+) \(.*?\):\s+(.*)", entry, re.DOTALL).groups() for entry in entries)
    return {name: " ".join(text.split()) for name, text in parts}


def _model_arguments() -> type:
    """A dataclass with VQGANConfig's own fields, in types that a command line can give; None means not given."""
    flags = []
    descriptions = _model_descriptions()
    for config_field in fields(VQGANConfig):
        if config_field.name in model_fields():
            kind = str(config_field.type)
            item: Any = str if "str" in kind else float if "float" in kind else int
            flag_type: Any = list[item] if "list" in kind else bool if config_field.type is bool else item
            help = descriptions[config_field.name].replace("%", "%%")
            flags.append((config_field.name, flag_type | None, dataclass_field(default=None, metadata={"help": help})))
    return make_dataclass("ModelArguments", flags)


ModelArguments = _model_arguments()


class RecipeParser(HfArgumentParser):
    """
    Parses dataclasses from `--config RECIPE.yaml` and flags: dataclass default < recipe < flag.

    An unknown flag or recipe key ends the program with its nearest known name.
    """

    def __init__(self, dataclass_types: Sequence[type], default_recipe: Path | None = None, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.default_recipe = default_recipe
        self.add_argument(
            "--config",
            default=None if default_recipe is None else str(default_recipe),
            help="YAML file with values for the flags below; `none` for no file. Default: %(default)s.",
        )

    def parse(self, argv: Sequence[str] | None = None) -> tuple:
        """One instance per dataclass, then a namespace with the flags that belong to none."""
        argv = list(sys.argv[1:] if argv is None else argv)
        config = self._config_path(argv)
        recipe = {} if config in (None, "none") else self._read_recipe(Path(config))
        if any(flag.partition("=")[0] == "--dataset_name" for flag in argv):
            recipe = {key: value for key, value in recipe.items() if key not in DATASET_FIELDS}
        *parsed, unknown = self.parse_args_into_dataclasses(
            [*_as_flags(recipe), *argv], look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            self.error(self._suggest(f"unknown argument {unknown[0]!r}", unknown[0]))
        return tuple(parsed)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # without the usage text, three screens long here

    def _config_path(self, argv: list[str]) -> str | None:
        for number, flag in enumerate(argv):
            if flag == "--config" and number + 1 < len(argv):
                return argv[number + 1]
            if flag.startswith("--config="):
                return flag.removeprefix("--config=")
        if any(flag.partition("=")[0] == "--init_from" for flag in argv):
            return None  # the default recipe describes a model, and how to start it
        return self.get_default("config")

    def _read_recipe(self, file: Path) -> dict:
        if not file.is_file():
            self.error(f"--config {file}: no such file.")
        try:
            recipe = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            self.error(f"--config {file} is not YAML: {error}")
        if not isinstance(recipe, dict):
            self.error(f"--config {file}: expected `key: value` lines, found a {type(recipe).__name__}.")
        for key in recipe:
            if f"--{key}" not in self._option_string_actions:
                self.error(self._suggest(f"--config {file}: unknown key {key!r}", f"--{key}"))
        return recipe

    def _suggest(self, message: str, flag: str) -> str:
        close = difflib.get_close_matches(flag.partition("=")[0], self._option_string_actions, 1)
        return message + (f"; did you mean {close[0]}?" if close else "; --help lists all flags.")


def flags_page() -> str:
    """docs/flags.md: every flag of `train_vqgan.py` with its default and meaning, as the dataclasses have them."""

    def table(rows) -> list[str]:
        return ["| flag | default | meaning |", "|---|---|---|", *(f"| `--{' | '.join(row)} |" for row in rows), ""]

    def default(value) -> str:
        return "" if value in (None, "") or value == [] else f"`{value}`"

    training, model = ({item.name: item for item in fields(kind)} for kind in (VQGANTrainingConfig, VQGANConfig))
    defaults = VQGANTrainingConfig(dataset_name="-")
    lines = [
        "# All flags of train_vqgan.py",
        "",
        "Written by `python -m hf_vqgan.arguments > docs/flags.md`; a test keeps it so. Recipes (`--config`) have the",
        "same names. Booleans are given as `--random_flip false`, lists as `--block_out_channels 64 128`.",
        "",
        "## The run",
        "",
        *table(
            (f"{name}`", default("" if name == "dataset_name" else getattr(defaults, name)), _help(training[name]))
            for name in training
        ),
        "## The model",
        "",
        *table((f"{name}`", default(model[name].default), text) for name, text in _model_descriptions().items()),
    ]
    return "\n".join(lines)


def _help(config_field) -> str:
    choices = config_field.metadata.get("choices")
    text = config_field.metadata["help"].replace("|", "\\|")
    return text + (f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else "")


def _as_flags(recipe: dict) -> list[str]:
    """A recipe as the command line that says the same, so that one parser checks both. Null keeps the default."""
    flags = []
    for key, value in recipe.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{key}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in values)]
    return flags


def given(arguments) -> dict:
    """The fields of a dataclass that were set, i.e. are not None."""
    values = {item.name: getattr(arguments, item.name) for item in fields(arguments)}
    return {name: value for name, value in values.items() if value is not None}


if __name__ == "__main__":
    print(flags_page(), end="")
