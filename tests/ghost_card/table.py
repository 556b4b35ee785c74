"""What the tests on the ghost card saw, as Markdown: `python tests/ghost_card/table.py cards` (or `faults`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SEEN = Path(__file__).resolve().parents[2] / "build" / "ghost"


def rows(table: str) -> list[dict]:
    """The newest row of each first column, in the order in which these were first seen."""
    lines = (SEEN / f"{table}.jsonl").read_text(encoding="utf-8").splitlines()
    newest = {}
    for row in map(json.loads, lines):
        newest[next(iter(row.values()))] = row
    return list(newest.values())


def line(cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def cards() -> list[dict]:
    return rows("cards")


def faults() -> list[dict]:
    """One row a phase, one column a fault."""
    outcomes: dict[str, dict] = {}
    for row in rows("faults"):
        phase, fault = row["case"].split(" x ")
        outcomes.setdefault(phase, {"phase": phase})[fault] = row["outcome"]
    return list(outcomes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=("cards", "faults"))
    found = {"cards": cards, "faults": faults}[parser.parse_args().table]()
    columns = list(found[0])
    print(line(columns))
    print(line("---" for _ in columns))
    for row in found:
        print(line(row.get(column, "") for column in columns))


if __name__ == "__main__":
    main()
