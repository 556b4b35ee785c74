"""Processes: the signals that ask one to end in its own way, and helpers that run beside a training."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LOOK = 0.05  # seconds between two looks at a helper that is waited for
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ORPHANED = signal.SIGUSR1  # sent by the kernel when the launcher is gone; none of the above, since it never is a second
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what accelerate's launcher and torchrun leave
# What a launcher tells its processes about their group.
OF_THE_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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


def tied(*command: str) -> list[str]:
    """A command as one that the kernel ends with this process, however this one ends."""
    return [sys.executable, "-m", "overnight.core.processes", str(os.getpid()), *command]


class Helper:
    """Python outside of the run's group of processes: it dies with us, and never holds us.

    What it says goes to a file without a name: a pipe that nobody reads would be full one day, and stop it.
    """

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None, priority: int = 10):
        """`priority` is a niceness: low unless we wait for it."""
        inherited = {key: value for key, value in os.environ.items() if key not in OF_THE_GROUP}
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # for as long as it lives
        self.process = subprocess.Popen(
            tied("nice", "-n", str(priority), sys.executable, *arguments),
            env=inherited | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C is for us
        )

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.poll()

    def wait(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Whether it ends in that time, or before there is `enough` of waiting."""
        deadline = time.monotonic() + seconds
        while self.code is None and not enough() and time.monotonic() < deadline:
            time.sleep(LOOK)
        return self.code is not None

    def stop(self) -> None:
        """End it, and whatever it has started; one that the kernel does not let go of is not waited for."""
        with suppress(ProcessLookupError):
            if self.code is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.wait(5)

    def said(self) -> str:
        """All that it has said so far."""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")


def main() -> None:
    """Become the command, which ends with the process that asked for it: `... PID COMMAND ARGUMENT ...`."""
    die_with_parent()
    if os.getppid() == int(sys.argv[1]):  # it is still there
        os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
