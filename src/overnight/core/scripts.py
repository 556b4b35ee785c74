"""The scripts and recipes of recipes/: where they lie, and what a person types to start one.

A checkout has them beside src/, and a wheel carries a copy in the package (setup.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from overnight.errors import EXIT_INPUT, IN_WHEEL, InputError, nearest_first, script_command

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE if IN_WHEEL else PACKAGE.parents[1]
RECIPES = ROOT / "recipes"


def typed_again() -> list[str]:
    """The words that start this process's script once more."""
    script, *arguments = sys.argv
    return ["overnight", Path(script).stem, *arguments] if IN_WHEEL else ["python", script, *arguments]


def no_command(name: str) -> int:
    """Say what to type in place of `python -m` with the module that does a script's work; the exit code."""
    print(f"this module is no command; `{script_command(f'{name}.py')}` would work", file=sys.stderr)
    return EXIT_INPUT


def recipe_file(name: str) -> Path:
    """The recipe that a command line names: a file, or one that comes with the project, as `quickstart`.

    Raises `InputError` for a name of none, with those that there are, beside that file too.
    """
    places = (Path(name), ROOT / name, RECIPES / f"{name}.yaml")
    if found := next((path for path in places if path.is_file()), None):
        return found
    if Path(name).exists():
        raise InputError(f"{name}: not a recipe's file; {RECIPES.name}/quickstart.yaml is one")
    ours = [Path(RECIPES.name, path.name) for path in RECIPES.glob("*.yaml")]
    beside = [] if Path(name).absolute().parent in (ROOT, RECIPES) else Path(name).parent.glob("*.yaml")
    known = ", ".join(nearest_first(name, [*ours, *beside]))
    raise InputError(f"{name}: there is no such recipe; there are {known}")
