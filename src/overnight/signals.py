"""The signals that ask a process to end, for as long as it wants to end in its own way."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # linux/prctl.h
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handled(answer: Callable[[int, object], None]) -> Iterator[None]:
    """While this lasts SIGINT, SIGTERM and SIGHUP do not end the process but call `answer(number, frame)`."""
    before = {number: signal.signal(number, answer) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, in whatever way."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
