"""The trainer's side of the Hub: `overnight.hub.upload`, a process at low priority that is started when there is news.

No iteration waits for it: between two of them it is only looked at. There is one at a time.
"""

from __future__ import annotations

import time

from overnight.core.console import Console
from overnight.core.processes import Helper
from overnight.errors import EXIT_INTERRUPTED, script_command
from overnight.run_dir.directory import RunDirectory

FIRST_WORD = 5.0  # seconds in which, before the first iteration, it can be known whether the Hub lets us
GRACE = 5.0  # seconds after the patience at a run's end in which a request may still come back
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Uploader:
    """Publishes what a run finishes while it trains; no step sees that fail."""

    def __init__(self, directory: RunDirectory, console: Console, *, active: bool):
        """`active` on the process that may send, where the recipe names a repository."""
        self.run, self.hub, self.console = directory.path, directory.recipe.hub, console
        self.active = active and self.hub.repo_id is not None  # until the Hub refuses
        self.later = f"What is still missing, this sends: {script_command('publish.py', self.run)}"
        self.last_line = ""
        self.over = False  # the run: what is missing is still sent
        self.news = True  # what an earlier session may have left
        self.checkpoints_due = time.monotonic() + 3600 * self.hub.every_hours
        self.helper: Helper | None = None

    def first_word(self) -> None:
        """Wait for it, a little: what keeps everything from being sent is then said before the first iteration."""
        self.poll()
        self._wait(FIRST_WORD)

    def poll(self) -> None:
        """Tell what an upload that ended has said, and start another where there is news and none is underway."""
        self._wait(0)
        if self.helper is None and self.active and (self.news or time.monotonic() >= self.checkpoints_due):
            self._start()

    def close(self) -> None:
        """When the run is over, give what is missing the patience of the recipe; otherwise end at once."""
        if self.last_line and not self.active:
            self.console.log(self.last_line)  # which was said hours ago perhaps
        if self.over:
            deadline = time.monotonic() + 60 * self.hub.patience_minutes + GRACE
            self._wait(deadline - time.monotonic())
            if self.helper is None and self.active:
                self._start()
                self._wait(deadline - time.monotonic())
        if self.helper is not None:
            self.helper.stop()
            self._tell(self.helper.said())
            self._tell(f"hub: no answer. {self.later}" if self.over else "")

    def _start(self) -> None:
        arguments = ["-m", "overnight.hub.upload", str(self.run)]
        if time.monotonic() >= self.checkpoints_due and not self.over:
            arguments.append("--checkpoints")
            self.checkpoints_due = time.monotonic() + 3600 * self.hub.every_hours
        self.news = False
        try:
            self.helper = Helper(*arguments, environment=ENVIRONMENT)
        except OSError as error:  # no memory to fork with
            self._tell(f"hub: the upload cannot be started ({error}). {self.later}")

    def _wait(self, seconds: float) -> None:
        """Wait for the upload, where there is one, but no longer than this; then tell how it ended."""
        if self.helper is None or not self.helper.wait(seconds):
            return
        self._tell(self.helper.said())
        code, self.helper = self.helper.code or 0, None
        self.active = code in (0, EXIT_INTERRUPTED) or code < 0
        if code < 0:
            self._tell(f"hub: the upload was ended by signal {-code}. {self.later}")

    def _tell(self, lines: str) -> None:
        for line in lines.splitlines():
            self.console.log(line)
            self.last_line = line
