"""What a person sees during a run: a table of facts, one line per logging step, a box at the end.

On a terminal a progress bar lives under the lines; in a log file there are only the lines.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

SECONDS_BETWEEN_LINES = 10
KEPT_WIDTH = 120  # columns of a box in a log file

# ANSI/OSC sequences, then every other control character but newline and tab, and marks that turn the direction of text:
# sampled text must not drive the terminal.
_CONTROL = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    r"|[\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def plain(text: str) -> str:
    """`text` without escape sequences, control characters and direction overrides."""
    return _CONTROL.sub("", text)


def duration(seconds: float) -> str:
    """`95` as `1m35s`, `81720` as `22h42m`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def estimated_end(seconds: float, at: datetime | None = None) -> str:
    """`in 22h42m, on Tue 07:12`; the time follows from the seconds where it is not given."""
    return f"in {duration(seconds)}, on {at or datetime.now() + timedelta(seconds=seconds):%a %H:%M}"


def count(number: float) -> str:
    """`121_340` as `121k`, with three digits."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def byte_count(size: float) -> str:
    """`12_900_000_000` as `12.9 GB`, and what is less than a tenth of one in MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def step_line(record: dict, max_iters: int) -> str:
    """One training record as a line of columns; what a device does not tell is left out, what is not yet is a dash."""
    val = f"{record['val'][1]:.4f}@{record['val'][0]}" if record.get("val") else "-"
    mfu = f" | mfu {record['mfu']:3.0%}" if record.get("mfu") else ""
    watts = f" | {record['watts']:.0f} W" if record.get("watts") else ""
    gib = f"{record['gib']:.1f}" if record.get("gib") is not None else "-"
    rate = count(record["tokens_per_second"]) if record.get("tokens_per_second") else "-"
    eta = duration(record["eta_seconds"]) if record.get("eta_seconds") is not None else "-"
    whole = f", of all {duration(record['whole_seconds'])}" if record.get("whole_seconds") is not None else ""
    return (
        f"iter {record['iteration']:>{len(str(max_iters))}}/{max_iters} {record['iteration'] / max_iters:6.1%}"
        f" | loss {record['loss']:.4f} | val {val:>11} | lr {record['lr']:.2e} | gnorm {record['grad_norm']:.2f}"
        f" | {rate:>5} tok/s{mfu}"
        f" | {gib}/{record['gib_total']:.1f} GiB{watts} | eta {eta}{whole}"
    )


class Outlet(io.TextIOWrapper):
    """An output that only informs: a letter that it does not know becomes a question mark, and no write fails.

    Where nobody takes what is written, as when the reader of a pipe has left, a terminal was closed or a disk is full,
    it goes nowhere from then on.
    """

    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(stream.buffer, stream.encoding, errors="replace", line_buffering=stream.line_buffering)
        self._replaced = stream  # which would close the buffer with its own end

    def write(self, text: str) -> int:
        """Write, or write nowhere."""
        try:
            return super().write(text)
        except OSError:
            self._go_nowhere()
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what was to be flushed."""
        try:
            super().flush()
        except OSError:
            self._go_nowhere()

    def _go_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # what is still in Python's buffer goes there too
        os.close(nowhere)


def outlets() -> None:
    """Make outlets of this process's output and errors, for a script whose work does not end with its readers.

    One that was closed leads nowhere: the next file would get its number, and what libraries say would go into it.
    """
    with suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest that is free
            pass
        os.close(number)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115  # as long as the process
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not what a test reads
            setattr(sys, name, Outlet(stream))


class Progress:
    """How far a piece of work is: a bar with words beside it on a terminal, in a log the words every ten seconds."""

    def __init__(self, rich: RichConsole, log: Callable[[str], None] | None = None, done: float = 0.0):
        """`log` takes the lines, where there are to be any; `done` is the share that was done before."""
        self.log, self.done = log, done
        self.started = self._logged = time.monotonic()
        self._bar = RichProgress(BarColumn(), TextColumn("{task.description}"), console=rich, transient=True)
        self._task = self._bar.add_task("", total=1)

    def update(self, share: float, words: str) -> None:
        """Show how much is done, and the words."""
        if self._bar.console.is_terminal:
            self._bar.start()
            self._bar.update(self._task, completed=share, description=words)
        elif self.log and time.monotonic() - self._logged > SECONDS_BETWEEN_LINES:
            self._logged = time.monotonic()
            self.log(words)

    def seconds(self) -> float:
        """Since the beginning, and never 0."""
        return max(time.monotonic() - self.started, 1e-3)

    def left(self, share: float) -> str:
        """The time that is left at the pace so far."""
        gained = share - self.done
        return duration((1 - share) / gained * self.seconds()) if gained > 0 else "-"

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar.console.is_terminal:
            self._bar.stop()


class Console:
    """Prints for one process; the other processes of a run get one that is `quiet`."""

    def __init__(self, *, quiet: bool = False):
        self.rich = RichConsole(quiet=quiet, highlight=False, soft_wrap=True)
        self._kept = RichConsole(quiet=quiet, highlight=False, soft_wrap=True, width=KEPT_WIDTH, file=io.StringIO())
        self._progress: Progress | None = None

    def keep(self, path: Path) -> None:
        """From now on write everything into `path` as well, what was printed before first; an older file is renamed.

        Its names are path-1, path-2 and so on before the suffix.
        """
        if self._kept.quiet or not isinstance(self._kept.file, io.StringIO):  # another process's, or kept already
            return
        said = self._kept.file.getvalue()
        try:
            if path.exists():
                names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
                path.rename(next(name for name in names if not name.exists()))
            self._kept.file = path.open("x", encoding="utf-8", errors="replace", buffering=1)
            self._kept.file.write(said)
        except OSError:
            self._kept.quiet = True

    def log(self, text: str = "") -> None:
        """One line, as it is."""
        self._print(Text(plain(text)))

    def _print(self, what: RenderableType, **how: Any) -> None:
        """Print, and keep; a log that takes no more is left as it is."""
        try:
            self._kept.print(what, **how)
        except OSError:
            self._kept.quiet = True
        self.rich.print(what, **how)

    def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """Facts under each other: what, and its value."""
        rows = list(rows)
        width = max(len(name) for name, _ in rows)
        self.log(title)
        for name, value in rows:
            self.log(f"  {name:<{width}}  {value}")

    def box(self, title: str, lines: list[str]) -> None:
        """The end of a run."""
        self.stop()
        self._print(Panel(Text(plain("\n".join(lines))), title=Text(plain(title)), expand=False), soft_wrap=False)

    def progress(self, iteration: int, max_iters: int) -> None:
        """Move the bar, where there is a terminal; in a log the iterations have lines of their own."""
        self._progress = self._progress or Progress(self.rich)
        self._progress.update(iteration / max_iters, f"{iteration}/{max_iters} iterations")

    def stop(self) -> None:
        """Take the bar away."""
        if self._progress:
            self._progress.stop()
            self._progress = None
