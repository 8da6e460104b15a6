"""Small text, JSON and YAML files: strict reading, with errors that name the file; atomic writing."""

import json
import os
from pathlib import Path
from typing import Any

import yaml


def read_json(file: Path) -> Any:
    """
    A file of strict JSON.

    Raises:
        ValueError: if it is not valid, or too deeply nested.
    """
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is not a file.")
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid in JSON")


def read_mapping(file: Path) -> dict:
    """
    A JSON file that holds an object.

    Raises:
        ValueError: if it does not.
    """
    found = read_json(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__} instead of an object.")
    return found


def read_settings(file: Path) -> dict:
    """
    A run's training_config.yaml.

    Raises:
        ValueError: if it is missing or damaged.
    """
    if not file.is_file():
        raise ValueError(f"{file} is {'not a file' if file.exists() else 'missing'}.")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except Exception as error:  # a damaged YAML tag fails in whatever way its constructor does
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} is damaged: it is not YAML ({reason}).") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged: it has no settings.")
    return settings


def write_text(file: Path, text: str) -> None:
    """Write a file completely or not at all, even if power fails."""
    temporary = file.with_name(f".{file.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(file)
