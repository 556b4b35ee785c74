"""The trainer's side of the Hub: `overnight.hub.upload`, a process at low priority that is started when there is news.

No iteration waits for it: between two of them it is only looked at. There is one at a time.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator

from accelerate import Accelerator

from overnight.core.console import Console
from overnight.core.processes import beside
from overnight.errors import EXIT_INTERRUPTED
from overnight.run_dir.directory import RunDirectory

FIRST_WORD = 5.0  # seconds in which, before the first iteration, it can be known whether the Hub lets us
AGAIN = 300.0  # seconds until an upload that used up its patience is tried again
GRACE = 5.0  # seconds after the patience at a run's end in which a request may still come back
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Uploader:
    """Has what a run finishes published while it goes on; no step sees that fail."""

    def __init__(self, directory: RunDirectory, console: Console, *, active: bool):
        self.run, self.hub, self.console = directory.path, directory.recipe.hub, console
        self.active = active  # until nothing can be sent any more
        self.over = False  # the run: what is missing is still sent
        self.refusal = ""  # why nothing can be sent any more, in a line
        self.process: subprocess.Popen[str] | None = None
        self.due, self.checkpoints_due = 0.0, self._from_now(3600 * self.hub.every_hours)

    def first_word(self) -> None:
        """Wait for it, a little: what keeps everything from being sent is then said before the first iteration."""
        self.poll()
        self._wait(FIRST_WORD)

    def model_finished(self) -> None:
        """Have it sent as soon as nothing else is being sent."""
        self.due = 0.0

    def poll(self) -> None:
        """Say what an upload has said that ended, and start one where it is time."""
        if self.process is not None and self.process.poll() is not None:
            self._wait(0)
        if self.active and self.process is None and time.monotonic() >= min(self.due, self.checkpoints_due):
            self._start(checkpoints=time.monotonic() >= self.checkpoints_due)

    def close(self) -> None:
        """When the run is over, give what is missing the Hub's patience; otherwise end at once."""
        deadline = self._from_now(60 * self.hub.patience_minutes + GRACE)
        if self.refusal:
            self.console.log(self.refusal)  # which was said hours ago perhaps
        if self.over:
            self._wait(deadline - time.monotonic())
            if self.active and self.process is None:
                self._start(checkpoints=False)
                self._wait(deadline - time.monotonic())
        if self.process is not None:
            self.process.kill()
            self._say(self.process.communicate()[0])
            if self.over:
                self._say(f"hub: no answer. {self._later()}")

    def _start(self, *, checkpoints: bool) -> None:
        self.process = beside(
            *("-m", "overnight.hub.upload", str(self.run), *(["--checkpoints"] if checkpoints else [])),
            environment=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for the trainer
        )
        self.due = float("inf")
        if checkpoints:
            self.checkpoints_due = self._from_now(3600 * self.hub.every_hours)

    def _wait(self, seconds: float) -> None:
        """Wait for the upload, where there is one, and no longer than this; then say how it ended."""
        if self.process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            said, _ = self.process.communicate(timeout=max(0.0, seconds))
            self._ended(self.process, said)

    def _ended(self, process: subprocess.Popen[str], said: str) -> None:
        self.process = None
        self._say(said)
        if process.returncode < 0:
            self._say(f"hub: the upload was ended by signal {-process.returncode}. {self._later()}")
        if process.returncode < 0 or process.returncode == EXIT_INTERRUPTED:
            self.due = min(self.due, self._from_now(AGAIN))
            if "--checkpoints" in process.args:  # type: ignore[operator]  # which is a list here
                self.checkpoints_due = self._from_now(AGAIN)
        elif process.returncode:
            self.active, self.refusal = False, (said.splitlines() or ["hub: the upload failed"])[-1]

    def _say(self, lines: str) -> None:
        for line in lines.splitlines():
            self.console.log(line)

    def _later(self) -> str:
        return f"What is still missing, this sends: python recipes/publish.py {self.run}"

    @staticmethod
    def _from_now(seconds: float) -> float:
        return time.monotonic() + seconds


@contextlib.contextmanager
def uploading(accelerator: Accelerator, directory: RunDirectory, console: Console) -> Iterator[Uploader]:
    """Publish what the run finishes while the block goes on, and at its end if `over` was set."""
    uploader = Uploader(directory, console, active=bool(directory.recipe.hub.repo_id) and accelerator.is_main_process)
    try:
        yield uploader
    finally:
        uploader.close()
