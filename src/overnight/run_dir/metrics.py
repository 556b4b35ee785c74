"""metrics.jsonl: one JSON object a line, appended during the run; no line is ever half there for its readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from overnight.core.files import atomic_write, never_through_a_link, strict_json

Record = dict[str, Any]

NUMBER, PERHAPS = int | float, int | float | None
TAKEN: dict[str, dict[str, Any]] = {
    "train": {"loss": PERHAPS},
    "val": {"loss": NUMBER},
    "forecast": dict.fromkeys(("max_iters", "loss", "loss_low", "loss_high"), NUMBER),  # of each of its budgets
    "finished": dict.fromkeys(("val_loss", "best_val_loss", "export_seconds"), NUMBER)
    | dict.fromkeys(("tokens_per_second", "kwh", "mean_watts"), PERHAPS),
    "flat": dict.fromkeys(("budget", "longer", "min_gain_nats"), NUMBER),
    "ngram baselines": {"unigram": NUMBER, "bigram": NUMBER},
}
"""What readers take from a record beside its iteration and tokens, by its kind, and by what happened in an event."""


class Metrics:
    """Appends records; what the disk refuses waits in memory, and is written with a later one."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[bytes] = []
        self.trouble: str | None = None  # why they wait
        self.skipped = 0  # lines that were no whole records when they were last read

    def append(self, record: Record) -> None:
        """Write one record behind those that wait, all of them or none."""
        self.waiting.append(_line(record).encode())
        try:
            with open(self.path, "ab", buffering=0, opener=never_through_a_link) as file:
                whole = file.tell()
                try:
                    _write_all(file, b"".join(self.waiting))
                except OSError:
                    file.truncate(whole)
                    raise
        except OSError as error:
            self.trouble = str(error)
        else:
            self.waiting, self.trouble = [], None

    def records(self) -> list[Record]:
        """The records so far, those that wait included.

        A line that a crash left unfinished, or that lacks what is read from it, is no record, and counted as skipped.
        """
        written = self.path.read_bytes() if self.path.exists() else b""
        lines = b"".join([written, *self.waiting]).decode(errors="replace").splitlines()
        found = [record for record in map(_parsed, lines) if whole(record)]
        self.skipped = len(lines) - len(found)
        return found

    def keep(self, wanted: Callable[[Record], bool]) -> None:
        """Drop the records that are not `wanted`, and unfinished lines."""
        atomic_write(self.path, "".join(_line(record) for record in self.records() if wanted(record)))


def baselines_of(records: list[Record], budget: int) -> Record | None:
    """The losses of the n-gram models that saw the tokens of this budget, no others; None where none were made."""
    made = [r for r in records if r.get("event") == "ngram baselines" and r.get("max_iters") == budget]
    return made[-1] if made else None


def whole(record: Any) -> bool:
    """Whether a parsed line is a record with all that its readers take from it."""
    if not isinstance(record, dict) or record.get("kind") not in ("train", "val", "forecast", "event"):
        return False
    name = record.get("event") if record["kind"] == "event" else record["kind"]
    rows = record.get("budgets") if record["kind"] == "forecast" else [record]
    counts = [record.get("iteration"), record.get("tokens"), record.get("cooldown", 0)]
    if not (all(isinstance(count, int) for count in counts) and isinstance(name, str) and isinstance(rows, list)):
        return False
    taken = TAKEN.get(name, {}).items()
    return all(
        isinstance(row, dict) and all(isinstance(row.get(key, ...), kind) for key, kind in taken) for row in rows
    )


def _line(record: Record) -> str:
    return strict_json(record) + "\n"


def _write_all(file: Any, data: bytes) -> None:
    while data:  # a disk that is nearly full takes a part
        data = data[file.write(data) :]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
