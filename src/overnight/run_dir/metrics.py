"""metrics.jsonl: one JSON object a line, appended while the run goes on; no line is ever half there for its readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from overnight.core.files import atomic_write, strict_json

Record = dict[str, Any]


class Metrics:
    """Appends records; what the disk refuses waits in memory, and is written with a later one."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[bytes] = []
        self.trouble: str | None = None  # why they wait

    def append(self, record: Record) -> None:
        """Write one record behind those that wait, all of them or none."""
        self.waiting.append(_line(record).encode())
        try:
            with self.path.open("ab", buffering=0) as file:
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
        """The records so far, those that wait included; a line that a crash left unfinished is no record."""
        written = self.path.read_bytes() if self.path.exists() else b""
        lines = b"".join([written, *self.waiting]).decode(errors="replace").splitlines()
        return [record for record in map(_parsed, lines) if isinstance(record, dict)]

    def keep(self, wanted: Callable[[Record], bool]) -> None:
        """Drop the records that are not `wanted`, and unfinished lines."""
        atomic_write(self.path, "".join(_line(record) for record in self.records() if wanted(record)))


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
