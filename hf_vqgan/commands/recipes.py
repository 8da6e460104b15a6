"""
List the recipes that come with the package, or print one.

    hf-vqgan recipes
    hf-vqgan recipes quickstart > mine.yaml      # to edit, and to give to: hf-vqgan train --config mine.yaml
    hf-vqgan train --config quickstart           # or as it is, with flags that override it
"""

import argparse
import sys

from ..training.recipes import find_recipe, recipe_names, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="Recipe to print. Default: list them all.")
    name = parser.parse_args().name
    if name is None:
        for known in recipe_names():
            print(f"{known:24} {summary(known)}")
        return
    try:
        print(find_recipe(name).read_text(encoding="utf-8"), end="")
    except OSError as error:
        sys.exit(f"{parser.prog}: error: {error}")
