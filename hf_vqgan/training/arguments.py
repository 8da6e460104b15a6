"""Command lines: dataclass defaults, overridden by a YAML recipe, overridden by flags."""

import argparse
import contextlib
import datetime
import difflib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, make_dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, get_type_hints

import datasets
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from ..configuration_vqgan import VQGANConfig, model_fields
from ..files.options import OPTION_KEYS, default_of, sections_of
from ..files.sources import HTTPError
from .configuration import VQGANTrainingConfig
from .interruption import INTERRUPTED_EXIT_CODE, CodebookCollapse, Preempted
from .recipes import find_recipe

# What users can mend, and get told in one line. Whatever else is raised is a bug, whose traceback is wanted.
USER_ERRORS = (
    ValueError,
    OSError,
    FloatingPointError,
    CodebookCollapse,
    datasets.exceptions.DatasetsError,
    HTTPError,
    StrictDataclassError,  # a value of the wrong type in a model's config.json
)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """
    End the program with one line: with exit code 1 for an error that users can mend, with 75 for a run that has made
    room and with 130 for one that Ctrl-C has ended.
    """
    program = Path(sys.argv[0]).name
    is_first = int(os.environ.get("RANK", 0)) == 0
    try:
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # else gloo may abort while the interpreter ends
    except USER_ERRORS as error:
        if not is_first:
            _wait_to_be_ended()  # the first process says it
        sys.exit(f"{program}: error: {' '.join(str(error).split())}")
    except Preempted as stop:
        if is_first:
            print(f"{program}: {stop} The same command goes on from there.", file=sys.stderr)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # else gloo may abort while the interpreter ends
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        if is_first:
            print(f"{program}: stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)
    except RuntimeError:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            _wait_to_be_ended()  # it may be that the connection to a process that has failed is lost: that one says why
        raise


def _wait_to_be_ended() -> None:
    """Launchers end all processes as soon as one has failed. Another one's error makes this one's superfluous."""
    time.sleep(3)


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
    return make_dataclass("ModelArguments", flags, namespace={"__doc__": "The model."})


ModelArguments = _model_arguments()


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Each flag's default, and the description's lines as they are."""


@dataclass
class _ArgumentGroup:
    """A parser's group, which is given all of a field's metadata and takes what argparse knows."""

    group: Any

    def add_argument(self, *names: str, **metadata) -> None:
        known = {key: value for key, value in metadata.items() if key not in OPTION_KEYS}
        self.group.add_argument(*names, **known)


class RecipeParser(HfArgumentParser):
    """
    Parses dataclasses from `--config RECIPE` and flags: dataclass default < recipe < flag. RECIPE is a YAML file or the
    name of a recipe that comes with the package.

    What a recipe says of its dataset (`describes_dataset` in `option`) goes when `dataset_name` names another one. An
    unknown flag or recipe key ends the program with its nearest known name.
    """

    def __init__(self, dataclass_types: Sequence[type], default_recipe: str | Path | None = None, **kwargs):
        self.fields = {item.name: item.metadata for kind in dataclass_types for item in fields(kind)}
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.default_recipe = default_recipe
        self.add_argument(
            "--config",
            default=None if default_recipe is None else str(default_recipe),
            help="YAML file, or recipe by name, with values for these flags; `none` for neither.",
        )

    def _add_dataclass_arguments(self, dtype: type) -> None:
        """As HfArgumentParser does it, but in one group per section."""
        types = get_type_hints(dtype)
        for title, section in sections_of(dtype).items():
            group = _ArgumentGroup(self.add_argument_group(title))
            for config_field in section:
                config_field.type = types[config_field.name]
                self._parse_dataclass_field(group, config_field)

    def parse(self, argv: Sequence[str] | None = None) -> tuple:
        """One instance per dataclass, then a namespace with the flags that belong to none."""
        argv = list(sys.argv[1:] if argv is None else argv)
        config = self._config_path(argv)
        recipe = {} if config in (None, "none") else self._read_recipe(config)
        named, dataset = _last_value(argv, "dataset_name"), recipe.get("dataset_name")
        if dataset is not None and named not in (None, dataset):
            recipe = {key: value for key, value in recipe.items() if not self.fields[key].get("describes_dataset")}
        self.set_defaults(**{key: value for key, value in recipe.items() if value == []})  # no flag can say that
        # --config again, so that a list at the recipe's end does not take positional arguments for its own
        *parsed, unknown = self.parse_args_into_dataclasses(
            [*_as_flags(recipe), f"--config={config}", *argv], look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            name = unknown[0].partition("=")[0]  # without the value, which may be a secret
            self.error(self._suggest(f"unknown argument {name!r}", name))
        return tuple(parsed)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # without the usage text, three screens long here

    def _config_path(self, argv: list[str]) -> str | None:
        if (config := _last_value(argv, "config")) is not None:
            return config
        if _last_value(argv, "init_from") is not None:
            return None  # the default recipe describes a model, and how to start it
        return self.get_default("config")

    def _read_recipe(self, name: str) -> dict:
        try:
            file = find_recipe(name)
        except FileNotFoundError as error:
            self.error(f"--config {error}")
        try:
            recipe = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            self.error(f"--config {file} is not YAML: {error}")
        if not isinstance(recipe, dict):
            self.error(f"--config {file}: expected `key: value` lines, found a {type(recipe).__name__}.")
        for key, value in recipe.items():
            if key not in self.fields:
                self.error(self._suggest(f"--config {file}: unknown key {key!r}", f"--{key}"))
            self._check_shape(f"--config {file}: {key}", value, self._option_string_actions[f"--{key}"].nargs == "+")
        return recipe

    def _check_shape(self, place: str, value, is_list: bool) -> None:
        """Refuse a list where one value belongs, the reverse, and what is nested: as text, some of it would pass."""
        entries = value if isinstance(value, list) else [value]
        single = all(isinstance(entry, (bool, int, float, str, datetime.date)) for entry in entries)
        if value is not None and (not single or isinstance(value, list) != is_list):
            expected = "a list of single values, as in [1, 2]" if is_list else "one value"
            self.error(f"{place}: expected {expected}, found {value!r}.")

    def _suggest(self, message: str, flag: str) -> str:
        close = difflib.get_close_matches(flag, self._option_string_actions, 1)
        return message + (f"; did you mean {close[0]}?" if close else "; --help lists all flags.")


def training_parser(
    dataclass_types: Sequence[type], description: str, default_recipe: str | None = None
) -> RecipeParser:
    """The parser of a command that trains, which all have `--dry_run`."""
    usage = "%(prog)s [--flag value ...]"
    parser = RecipeParser(dataclass_types, default_recipe, description=description, usage=usage)
    parser.add_argument("--dry_run", action="store_true", help="Check everything, print the plan, train nothing.")
    return parser


def flags_page() -> str:
    """docs/flags.md: every flag of `hf-vqgan train` with its default and meaning, as the dataclasses have them."""

    def table(rows) -> list[str]:
        return ["| flag | default | meaning |", "|---|---|---|", *(f"| `--{' | '.join(row)} |" for row in rows), ""]

    def default(value) -> str:
        return "" if value in (None, "") or value == [] else f"`{value}`"

    def sections(kind: type) -> Iterator[str]:
        for title, section in sections_of(kind).items():
            yield from (f"## {title}", "")
            yield from table((f"{item.name}`", default(default_of(item)), _help(item)) for item in section)

    model = {item.name: item for item in fields(VQGANConfig)}
    lines = [
        "# All flags of hf-vqgan train",
        "",
        "Written by `python -m hf_vqgan.training.arguments > docs/flags.md`; a test keeps it so. Recipes (`--config`)",
        "have the same names. Booleans are given as `--random_flip false`, lists as `--block_out_channels 64 128`.",
        "",
        *sections(VQGANTrainingConfig),
        "## The model",
        "",
        *table((f"{name}`", default(model[name].default), text) for name, text in _model_descriptions().items()),
    ]
    return "\n".join(lines)


def _help(config_field) -> str:
    choices = config_field.metadata.get("choices")
    text = config_field.metadata["help"].replace("|", "\\|")
    return text + (f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else "")


def _last_value(argv: list[str], name: str) -> str | None:
    """The value of a flag as argparse takes it, the last of several; `None` if it is not there."""
    names, found = (f"--{name}", f"--{name.replace('_', '-')}"), None
    for position, text in enumerate(argv):
        flag, equals, value = text.partition("=")
        if flag in names:
            found = value if equals else "".join(argv[position + 1 : position + 2])
    return found


def _as_flags(recipe: dict) -> list[str]:
    """A recipe as the command line that says the same, so that one parser checks both. Null keeps the default."""

    def text(value) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    flags = []
    for key, value in recipe.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(text, value)] if value else []
        elif value is not None:
            flags.append(f"--{key}={text(value)}")
    return flags


def given(arguments) -> dict:
    """The fields of a dataclass that were set, i.e. are not None."""
    values = {item.name: getattr(arguments, item.name) for item in fields(arguments)}
    return {name: value for name, value in values.items() if value is not None}


if __name__ == "__main__":
    print(flags_page(), end="")
