"""`python -m overnight.doctor`: checks of this machine before a run."""

from __future__ import annotations

import sys

from overnight.core.console import outlets
from overnight.core.scripts import recipe_file
from overnight.doctor.checks import examine
from overnight.errors import InputError
from overnight.recipe.load import load


def main(arguments: list[str]) -> int:
    """Exit code 0, 1 when something would stop training, 2 when the recipe cannot be used."""
    outlets()
    if arguments[:1] in (["--help"], ["-h"]):
        print("overnight doctor [RECIPE [--section.key VALUE ...]]: check this machine for a run")
        return 0
    try:
        recipe = load(recipe_file(arguments[0]), arguments[1:]) if arguments else None
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if examine(recipe) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
