"""How a script ends when it cannot continue: errors of one line each, their exit codes, the command that continues."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

IN_WHEEL = Path(__file__).with_name("recipes").is_dir()  # where setup.py puts them; a checkout has them beside src/
AWAY = {"LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError"}
EXIT_INPUT, EXIT_DAMAGED, EXIT_DIVERGED, EXIT_INTERRUPTED = 2, 3, 4, 75


class InputError(Exception):
    """What a user gave cannot be used; carries every problem found. Scripts print it and end with its exit code."""

    code = EXIT_INPUT

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(self.problems)  # what pickle makes it from again

    def __str__(self) -> str:
        return "\n".join(self.problems)


def all_of(*steps: Callable[[], Any]) -> list[Any]:
    """What each step returns; where several raise `InputError`, one with all of their problems."""
    found, errors = [], []
    for step in steps:
        try:
            found.append(step())
        except InputError as error:
            errors.append(error)
    if errors:
        problems = [problem for error in errors for problem in error.problems]
        raise errors[0] if len(errors) == 1 else InputError(problems)
    return found


class Unreachable(InputError):
    """A server or a disk that refuses for now; what was done is kept."""

    code = EXIT_INTERRUPTED


def network_away(error: BaseException | None) -> bool:
    """Whether a Hub client's error comes of a server that cannot be reached, and was not told to stay offline.

    huggingface_hub, httpx, datasets and transformers share no base class, and importing them takes seconds.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    while error is not None:
        if type(error).__name__ in AWAY:
            return True
        error = error.__cause__ or error.__context__
    return False


def refused_by_system(error: Exception) -> Unreachable:
    """What the system refused, which says nothing of the file: no descriptor, no room, no permission, a bad disk."""
    return Unreachable(f"{first_line(error)}: mend that, and the same command continues; what was done is kept")


class DamagedData(InputError):
    """A file differs from what its manifest or checksum says."""

    code = EXIT_DAMAGED


def script_command(script: str, *arguments: object) -> str:
    """A command that is suggested to the user: the script in recipes/ with its arguments, quoted for a shell.

    Where the package is installed it is `overnight eval` in place of `python recipes/eval.py`.
    """
    started = ["overnight", script.removesuffix(".py")] if IN_WHEEL else ["python", f"recipes/{script}"]
    return shlex.join([*started, *map(str, arguments)])


def listed(values: object) -> str:
    """A value, or several, as a sentence has them: `6,000, 10,000 and 15,000`, and never a list as Python writes it."""
    several = values if isinstance(values, list | tuple) else [values]
    *most, last = [f"{value:,}" if type(value) is int else str(value) for value in several] or ["none"]
    return f"{', '.join(most)} and {last}" if most else last


def first_line(error: Exception) -> str:
    """The first line of what another library's error says, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def nearest_first(meant: str, names: Iterable[object]) -> list[str]:
    """The names of what there is, those most like the one that was `meant` first."""
    return sorted(map(str, names), key=lambda name: (-SequenceMatcher(None, meant, name).ratio(), name))
