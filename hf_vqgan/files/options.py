"""The language that all configurations are written in: a field, its default, help, bounds and role, in one place."""

import dataclasses
import math
import operator
import os
from dataclasses import field
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}

# Bounds that a field may have: how to compare with one, and how to write it as the end of an interval.
BOUNDS = {
    "at_least": (operator.ge, "[{}"),
    "above": (operator.gt, "({}"),
    "at_most": (operator.le, "{}]"),
    "below": (operator.lt, "{})"),
}
OPTION_KEYS = ("nonempty", "describes_dataset", "bounds", "role")  # what `option` adds to a field's metadata
MAX_SEED = 2**32 - 1  # numpy takes no larger one


def option(
    default,
    help: str,
    choices: tuple[str, ...] | None = None,
    nonempty: bool = False,
    describes_dataset: bool = False,
    role: str = "result",
    **bounds: float,
):
    """
    A field of a configuration and what is to be known about it, for `check_values` and for its command-line flag.

    Args:
        help (`str`): The help text of the flag.
        choices (`tuple`, *optional*): What the value can be, or each one in a list.
        nonempty (`bool`): Whether a string or list has to have something in it.
        describes_dataset (`bool`): Whether it says how to read or crop one dataset, and means nothing for others.
        role (`str`): What another value means. `"result"`: another run, as it changes what is learned or measured.
            `"watching"`: the same run, kept or looked at in another way. `"place"`: the same run on another machine or
            for another account; no file of the run names it. `"secret"`: the same, and it is never shown.
        bounds: Of the value, or of each one in a list: `at_least`, `above`, `at_most`, `below`.
    """
    metadata = {
        "help": help,
        "nonempty": nonempty,
        "describes_dataset": describes_dataset,
        "role": role,
        "bounds": bounds,
    }
    if choices:
        metadata["choices"] = choices
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata, repr=role != "secret")


def role_of(config_field: dataclasses.Field) -> str:
    """The field's role, as `option` describes them."""
    return config_field.metadata["role"]


def default_of(config_field: dataclasses.Field) -> Any:
    factory = config_field.default_factory
    return config_field.default if factory is dataclasses.MISSING else factory()


def sections_of(config_class: type) -> dict[str, list[dataclasses.Field]]:
    """
    The fields of a configuration by the section that declares them: a base class, titled by its docstring's first line.
    """
    sections: dict[str, list[dataclasses.Field]] = {}
    for config_field in dataclasses.fields(config_class):
        declaring = [
            base for base in config_class.__mro__ if config_field.name in base.__dict__.get("__annotations__", {})
        ]
        title = declaring[-1].__doc__.strip().splitlines()[0].rstrip(".")
        sections.setdefault(title, []).append(config_field)
    return sections


def check_values(config) -> None:
    """
    Check every field of a dataclass against its type and against the bounds and choices that `option` gave it.

    What says the same in another type is converted: integers to floats, tuples to lists, paths to strings.

    Raises:
        ValueError: with field, value and expectation.
    """
    types = get_type_hints(type(config))
    for config_field in dataclasses.fields(config):
        value = _checked(config_field, types[config_field.name], getattr(config, config_field.name))
        setattr(config, config_field.name, value)


def _checked(config_field: dataclasses.Field, kind: Any, value: Any) -> Any:
    optional = NoneType in get_args(kind)
    if optional and value is None:
        return None
    (kind,) = [part for part in get_args(kind) if part is not NoneType] if optional else [kind]
    is_list = get_origin(kind) is list
    (kind,) = get_args(kind) if is_list else [kind]
    shown = f"{config_field.name}={repr(value)[:200]}"

    entries = value if isinstance(value, (list, tuple)) else [value]
    try:
        if is_list != isinstance(value, (list, tuple)):
            raise TypeError
        entries = [_as_type(entry, kind) for entry in entries]
    except (TypeError, OverflowError):  # an integer too large for a float
        expected = f"a list, and in it {TYPE_NAMES[kind]} each" if is_list else TYPE_NAMES[kind]
        raise ValueError(f"{shown} must be {expected}{', or null' if optional else ''}.") from None

    choices, bounds = config_field.metadata.get("choices"), config_field.metadata["bounds"]
    if config_field.metadata["nonempty"] and not value:
        raise ValueError(f"{config_field.name} is empty: {config_field.metadata['help']}")
    if choices and not set(entries) <= set(choices):
        raise ValueError(f"{shown} must be one of {', '.join(choices)}.")
    if not all(BOUNDS[name][0](entry, limit) for entry in entries for name, limit in bounds.items()):
        raise ValueError(f"{shown} must be {_words(bounds)}.")
    return entries if is_list else entries[0]


def _as_type(value: Any, kind: type) -> Any:
    """`value` in the type `kind`. Raises TypeError for what is of another type, or not finite."""
    match value:
        case bool() if kind is bool:
            return value
        case bool():
            raise TypeError
        case Integral() if kind is int:
            return int(value)
        case Real() if kind is float and math.isfinite(value):
            return float(value)
        case str() | os.PathLike() if kind is str:
            return os.fspath(value)
    raise TypeError


def _words(bounds: dict[str, float]) -> str:
    """One bound in words, two as an interval."""
    if len(bounds) == 1:
        (name, limit), *_ = bounds.items()
        return f"{name.replace('_', ' ')} {limit}"
    return "in " + ", ".join(BOUNDS[name][1].format(limit) for name, limit in bounds.items())
