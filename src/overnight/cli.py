"""The command line that the scripts in recipes/ share: a recipe file first, then dotted overrides."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from overnight.core.console import outlets
from overnight.core.files import errno_of
from overnight.core.scripts import RECIPES, recipe_file
from overnight.errors import InputError, first_line, refused_by_system, script_command
from overnight.recipe.identity import flat
from overnight.recipe.load import leaves, load
from overnight.recipe.schema import Recipe


def recipe_command(
    description: str,
    run: Callable[[Recipe, argparse.Namespace], int],
    *,
    default: Callable[[], Path] | None = None,
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    alone: Callable[[argparse.Namespace], int | None] = lambda chosen: None,
) -> int:
    """Parse the command line, load the recipe, call `run`, and turn errors into one message and an exit code.

    `default` says which recipe is meant when none is named; `options` adds what the script knows beside overrides;
    `alone` does what needs no recipe, and returns None where the options ask for no such thing. In the namespace that
    `run` gets, `arguments` are the recipe and overrides again, for a process that it starts.
    """
    outlets()
    arguments = sys.argv[1:]
    named = [arguments.pop(0)] if arguments and not arguments[0].startswith("-") else []
    parser = argparse.ArgumentParser(
        usage="%(prog)s " + ("[RECIPE]" if default else "RECIPE") + " [options] [--section.key VALUE ...]",
        description=description,
        epilog=f"keys of {named[0] if named else 'a recipe'} and their values, which `--section.key VALUE` overrides:\n"
        + (key_help(named[0] if named else None) if {"-h", "--help"} & set(arguments) else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print all derived numbers and the resolved recipe; change nothing"
    )
    options(parser)
    chosen, overrides = parser.parse_known_args(arguments)

    def work() -> int:
        if (code := alone(chosen)) is not None:
            return code
        if not named and default is None:
            example = script_command(Path(sys.argv[0]).name, "recipes/quickstart.yaml", *arguments)
            raise InputError(f"no recipe was named; `{example}` would work")
        path = recipe_file(named[0]) if named else default()  # type: ignore[misc]  # one of the two is there
        chosen.arguments = [str(path), *overrides]
        return run(load(path, overrides), chosen)

    return exit_code(work)


def exit_code(work: Callable[[], int]) -> int:
    """What `work` returns; after an error that a user can mend, its message and the exit code of its kind.

    75 where the system refused a file, and where a device was lost or its memory ran out. Any other error is raised
    again: it is a mistake of the program.
    """
    try:
        return work()
    except InputError as error:
        return _told(error)
    except Exception as error:
        if errno_of(error) is not None:
            return _told(refused_by_system(error))
        if not isinstance(error, RuntimeError):
            raise
        from overnight.device import faults  # with torch, which whatever meets such an error has imported

        return faults.end(error)


def starting(work: str) -> None:
    """Say at once what begins: its imports take seconds. Of a run's processes one speaks."""
    if _speaks():
        print(f"starting {work}: importing PyTorch and transformers", flush=True)


def _speaks() -> bool:
    """Whether this is the first process of a group, or in none: names that were left in a shell make no group."""
    group = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return not group or os.environ["WORLD_SIZE"] == "1" or os.environ["RANK"] == "0"


def user_path(text: str) -> Path:
    """The path of an option, with the home folder for `~`: a shell leaves it in `--option=~/folder`."""
    return Path(text).expanduser()


def _told(error: InputError) -> int:
    """Print every problem of `error`, once for all processes of a run, and return the exit code of its kind."""
    if _speaks():
        print("\n".join(error.problems), file=sys.stderr)
    return error.code


def default_recipe() -> Path:
    """The recipe for the device at hand where none was named; says which and why."""
    import torch  # takes seconds: --help needs none of it

    cuda = torch.cuda.is_available()
    path = RECIPES / ("fineweb_edu_40m.yaml" if cuda else "quickstart.yaml")
    try:
        found = f"a CUDA device, {torch.cuda.get_device_name()}" if cuda else "no CUDA device"
    except RuntimeError as error:
        found = f"a CUDA device that does not answer ({first_line(error)})"
    print(f"no recipe was named and there is {found}: recipes/{path.name} runs", flush=True)
    return path


def key_help(name: str | None) -> str:
    """Every key with its docstring, by section, and its value in the recipe that was named, or else its default."""
    try:
        recipe = load(recipe_file(name)) if name else Recipe()
    except (InputError, OSError):  # which is told when the recipe is loaded for more than its help
        recipe = Recipe()
    values, lines, before = flat(recipe.model_dump()), [], None
    for key, field in leaves():
        section = key.rpartition(".")[0]
        if section != before:
            lines += ["", f"{section or 'the run'}:"]
        before = section
        lines.append(f"  --{key}  ({values[key]})")
        lines += textwrap.wrap(field.description or "", 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
