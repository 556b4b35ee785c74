"""What a person sees during a run: a table of facts, one line per logging step, a box at the end.

On a terminal a progress bar lives under the lines; in a log file there are only the lines.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

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


def estimated_end(seconds: float) -> str:
    """`in 22h42m, on Tue 07:12`"""
    return f"in {duration(seconds)}, on {datetime.now() + timedelta(seconds=seconds):%a %H:%M}"


def count(number: float) -> str:
    """`121_340` as `121k`, with three digits."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def step_line(record: dict, max_iters: int) -> str:
    """One training record as a line of stable columns; what was not measured is a dash."""
    val = f"{record['val'][1]:.4f}@{record['val'][0]}" if record.get("val") else "-"
    mfu = f"{record['mfu']:.0%}" if record.get("mfu") else "-"
    watts = f"{record['watts']:.0f} W" if record.get("watts") else "- W"
    gib = f"{record['gib']:.1f}" if record.get("gib") is not None else "-"
    rate = count(record["tokens_per_second"]) if record.get("tokens_per_second") else "-"
    eta = duration(record["eta_seconds"]) if record.get("eta_seconds") is not None else "-"
    return (
        f"iter {record['iteration']:>{len(str(max_iters))}}/{max_iters} {record['iteration'] / max_iters:6.1%}"
        f" | loss {record['loss']:.4f} | val {val:>11} | lr {record['lr']:.2e} | gnorm {record['grad_norm']:.2f}"
        f" | {rate:>5} tok/s | mfu {mfu:>3}"
        f" | {gib}/{record['gib_total']:.1f} GiB | {watts} | eta {eta}"
    )


class Console:
    """Prints for one process; the other processes of a run get one that is `quiet`."""

    def __init__(self, *, quiet: bool = False):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # of a sample, what a terminal's encoding has no character for
        self.rich = RichConsole(quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None

    def log(self, text: str = "") -> None:
        """One line, as it is."""
        self._print(Text(plain(text)))

    def _print(self, what: RenderableType, **how: Any) -> None:
        """Print; where nobody takes it, as on a terminal that was closed or a full disk, be quiet from then on."""
        try:
            self.rich.print(what, **how)
        except OSError:
            self.rich.quiet = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)  # what is still in Python's buffer goes there at the end of the process
            os.close(nowhere)

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
        """Move the bar, where there is a terminal."""
        if not self.rich.is_terminal:
            return
        if self._bar is None:
            columns = (BarColumn(), TextColumn("{task.completed}/{task.total} iterations"))
            self._bar = Progress(*columns, console=self.rich, transient=True)
            self._bar.add_task("", total=max_iters)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=iteration, total=max_iters)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
