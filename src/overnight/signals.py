"""The signals that ask a process to end, for as long as it wants to end in its own way."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # linux/prctl.h
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ORPHANED = signal.SIGUSR1  # sent by the kernel when the launcher is gone; none of the above, since it never is a second
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what accelerate's launcher and torchrun leave


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
