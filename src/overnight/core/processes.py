"""Processes: the signals that ask one to end in its own way, and helpers that run beside a training."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ORPHANED = signal.SIGUSR1  # sent by the kernel when the launcher is gone; none of the above, since it never is a second
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what accelerate's launcher and torchrun leave
# What a launcher tells its processes about their group.
OF_THE_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def in_group(environ: Mapping[str, str]) -> bool:
    """Whether a launcher made this process one of several; a name that was left in a shell makes no group."""
    whole = all(name in environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return whole and environ["WORLD_SIZE"] != "1"


@contextmanager
def handled(answer: Callable[[int, object], None]) -> Iterator[None]:
    """While this lasts SIGINT, SIGTERM, SIGHUP and the launcher's end do not end the process.

    They call `answer(number, frame)` instead.
    """
    before = {number: signal.signal(number, answer) for number in (*ENDING, ORPHANED)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process `number` when the one that started it ends, in whatever way."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def end_with_launcher() -> None:
    """Where a launcher started this process, have its death end us too: at once, or while `handled` by its answer.

    A shell that started us may go: it is no launcher.
    """
    if any(name in os.environ for name in LAUNCHED):
        die_with_parent(ORPHANED)


def beside(*arguments: str, environment: dict[str, str] | None = None, **how: Any) -> subprocess.Popen[str]:
    """Start Python at low priority, outside of the run's group of processes; all that it says is on its `stdout`."""
    inherited = {key: value for key, value in os.environ.items() if key not in OF_THE_GROUP}
    return subprocess.Popen(
        ["nice", sys.executable, *arguments],
        env=inherited | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **how,
    )
