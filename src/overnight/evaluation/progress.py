"""How far an evaluation is: a bar on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import time

from rich.progress import BarColumn, Progress, TextColumn

from overnight.core.console import Console, count, duration

SECONDS_BETWEEN_LINES = 10


class Meter:
    """Counts tokens, to which time is proportional, and requests, of one model on one task."""

    def __init__(self, console: Console):
        self.console = console
        self._bar: Progress | None = None
        self._reset("", "requests", parts=1)

    def _reset(self, name: str, unit: str, parts: int) -> None:
        self.name, self.unit, self.parts = name, unit, parts
        self.total = self.done = self.requests = self.begun = 0
        self.started = self.told = time.monotonic()

    def begin(self, name: str, unit: str = "requests", parts: int = 1) -> None:
        """Start counting from zero under another name; what there is to do is said in so many parts."""
        self.end()
        self._reset(name, unit, parts)
        if self.console.rich.is_terminal:
            self._bar = Progress(
                BarColumn(), TextColumn("{task.description}"), console=self.console.rich, transient=True
            )
            self._bar.add_task("", total=1)
            self._bar.start()

    def expect(self, tokens: int) -> None:
        """Add to what there is to do; parts that are still to come are taken to be like those that were."""
        self.total += tokens
        self.begun += 1

    @property
    def share(self) -> float:
        """How much is done."""
        return self.done * self.begun / max(self.total * max(self.parts, self.begun), 1)

    def advance(self, tokens: int, requests: int) -> None:
        """Add to what is done."""
        self.done += tokens
        self.requests += requests
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.share, description=self.line())
        elif time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            self.console.log(self.line())

    def line(self) -> str:
        """Share done, speed and time left."""
        seconds = max(time.monotonic() - self.started, 1e-3)
        left = duration((1 / self.share - 1) * seconds) if self.done else "-"
        speed = f"{self.requests / seconds:.1f} {self.unit} a second, {count(self.done / seconds)} tokens a second"
        return f"{self.name}: {self.share:.0%}, {speed}, {left} left"

    def end(self) -> float:
        """Take the bar away; returns the seconds since `begin`."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        return time.monotonic() - self.started
