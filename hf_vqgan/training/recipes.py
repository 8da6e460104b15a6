"""The recipes that come with the package: YAML files with flags, known by their names."""

import difflib
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """
    The file that `--config name` means: the file of that path, else the recipe of that name.

    Raises:
        FileNotFoundError: if it is neither; the error lists the recipes.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipe_names()
    if name in known:
        return RECIPES / f"{name}.yaml"
    close = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise FileNotFoundError(f"{name}: no such file, and no recipe of that name.{hint} Recipes: {', '.join(known)}.")


def summary(name: str) -> str:
    """The first sentence or line of a recipe's opening comment."""
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
