"""Scripts as processes that need no time to import: each is forked from a server that has imported the libraries.

A process of its own, with its own pid, environment, folder, signals and exit code; only the nine seconds of importing
torch and transformers are spent once. Tests of launchers and of a fresh machine start Python itself.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

PRELOADED = ["overnight.training.train", "overnight.prepare.prepare"]


@cache
def server() -> ForkServerContext:
    """The context whose server has the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_script(command: list[str], folder: str, environment: Mapping[str, str], out: str, err: str) -> None:
    """What the forked process does: become the process of `command`."""
    for path, number in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.stdin = open(os.devnull)  # noqa: SIM115  # for as long as the process
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")


class Started:
    """A running script, with what the tests use of `subprocess.Popen`."""

    def __init__(self, command: list[str], folder: Path, environment: Mapping[str, str], *, merged: bool = True):
        self._scratch = tempfile.TemporaryDirectory()
        pipes = [str(Path(self._scratch.name) / name) for name in (("out",) if merged else ("out", "err"))]
        for pipe in pipes:
            os.mkfifo(pipe)
        arguments = (command, str(folder), dict(environment), pipes[0], pipes[-1])
        self._process = server().Process(target=run_script, args=arguments)
        self._process.start()
        self.stdout = open(pipes[0], encoding="utf-8")  # noqa: SIM115  # read by the test
        self.stderr = None if merged else open(pipes[-1], encoding="utf-8")  # noqa: SIM115
        self.pid = self._process.pid or 0

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative after a signal."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the script", timeout or 0)
        return self._process.exitcode
