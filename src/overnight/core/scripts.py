"""The scripts and recipes of recipes/: where they lie, and what a person types to start one.

A checkout has them beside src/, and a wheel carries a copy in the package (setup.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from overnight.errors import EXIT_INPUT, IN_WHEEL, script_command

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
    """The recipe that a command line names: a file, or one that comes with the project, as `quickstart`."""
    places = (Path(name), ROOT / name, RECIPES / f"{name}.yaml")
    return next((path for path in places if path.is_file()), Path(name))
