"""What only informs never ends a run: power, trackers, samples, forecasts, lines. One guard stands around all of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from overnight.device.faults import lost, with_room
from overnight.errors import first_line

if TYPE_CHECKING:
    from overnight.training.setup import Run

P = ParamSpec("P")
T = TypeVar("T")


def informs(what: str) -> Callable[[Callable[Concatenate[Run, P], T]], Callable[Concatenate[Run, P], T | None]]:
    """Mark a function of a run whose failure must not end it: it then returns None, and that is told once.

    Out of memory it is tried once more. A device that is lost is raised: without it there is no run.
    """

    def marked(act: Callable[Concatenate[Run, P], T]) -> Callable[Concatenate[Run, P], T | None]:
        @functools.wraps(act)
        def guarded(run: Run, *args: P.args, **kwargs: P.kwargs) -> T | None:
            try:
                return with_room(run.device, lambda: act(run, *args, **kwargs))
            except Exception as error:
                if lost(error):
                    raise
                tell(run, what, error)
                return None

        return guarded

    return marked


def tell(run: Run, what: str, error: Exception) -> None:
    """Say and record why something failed, the first time that it does."""
    if what in run.failed:
        return
    run.failed.add(what)
    problem = f"{type(error).__name__}: {first_line(error)}"
    with contextlib.suppress(Exception):  # it may be the screen itself, or the log
        if run.accelerator.is_main_process:
            run.directory.append("event", run.iteration, event="failed", what=what, problem=problem)
        run.console.say(f"{what}: failed ({problem}); the run goes on without, and this is said once")
