"""The GPU day's figures beside their predictions: python benchmarks/gpu_day/report.py FILE ... [--page docs/gpu.md]

Reads the JSON files of one device and prints a table. With --page the table takes the place of what stands between the
two marks of that page.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from figures import Row, Where, rows_of  # the script beside this one

from overnight.cli import exit_code
from overnight.errors import InputError
from overnight.planning.gpus import match_gpu
from overnight.recipe.load import load

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """The steps; `InputError` for a file that is none, and for steps of different devices."""
    steps = []
    for path in paths:
        try:
            steps.append(json.loads(path.read_text(encoding="utf-8")))
            steps[-1]["tasks"]["here"]["result"]["device"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not what a step of the GPU day writes: {error!r}") from None
    devices = {here_of(step)["device"] for step in steps}
    if len(devices) > 1:
        raise InputError(
            f"these steps ran on different devices: {', '.join(sorted(devices))}; one at a time would work"
        )
    return steps


def here_of(step: dict[str, Any]) -> dict[str, Any]:
    """What a step found at its start."""
    return step["tasks"]["here"]["result"]


def where_of(step: dict[str, Any]) -> Where:
    """What its predictions depend on."""
    here = here_of(step)
    gpu = match_gpu(here["device"], here["total_gib"]) if "total_gib" in here else None
    return Where(load(RECIPES / step["recipe"]), gpu)


def rows(steps: list[dict[str, Any]]) -> list[Row]:
    """The rows of all steps in their order."""
    return [
        row for step in steps for name, task in step["tasks"].items() for row in rows_of(name, task, where_of(step))
    ]


def head(steps: list[dict[str, Any]]) -> str:
    """Device, driver, versions, dates, in a sentence."""
    here = here_of(steps[0])
    driver = here.get("driver")
    parts = [here["device"]]
    parts += [f"driver {driver['version']}, {driver['power_limit_watts']:.0f} W"] if isinstance(driver, dict) else []
    parts += [f"{name} {here['packages'][name]}" for name in ("torch", "transformers", "accelerate")]
    parts += [f"Python {here['python']}", " and ".join(sorted({here_of(step)["date"] for step in steps}))]
    recipes = " and ".join(sorted({step["recipe"] for step in steps}))
    return ", ".join([*parts, f"commit {(here['commit'] or 'unknown')[:12]}", recipes])


def losses(steps: list[dict[str, Any]]) -> str:
    """The table of losses as its benchmark printed it."""
    tasks = [step["tasks"]["losses"] for step in steps if "losses" in step["tasks"]]
    return "\n\n".join(task["output"].strip() for task in tasks if task["exit"] == 0)


def table(found: list[Row]) -> str:
    """For a terminal."""
    columns = [("figure", "predicted", "measured"), *found]
    wide = [max(len(row[column]) for row in columns) for column in (0, 1)]
    return "\n".join(f"{row[0]:<{wide[0]}}  {row[1]:<{wide[1]}}  {row[2]}" for row in columns)


def page(steps: list[dict[str, Any]]) -> str:
    """For the page, as Markdown."""
    lines = [head(steps) + ".", "", "| figure | predicted | measured |", "|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows(steps)]
    said = losses(steps)
    return "\n".join([*lines, *(["", "The loss, made in several ways:", "", "```text", said, "```"] if said else [])])


def put_into(path: Path, text: str) -> None:
    """Replace what stands between the marks of a page."""
    content = path.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise InputError(f"`--page {path}`: it has no {BEGIN} and {END}, each once; docs/gpu.md would work")
    before, _, rest = content.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def run(chosen: argparse.Namespace) -> int:
    """Read the steps, and write the page or print it."""
    steps = read(chosen.steps)
    if chosen.page:
        put_into(chosen.page, page(steps))
    said = losses(steps)
    print(head(steps), table(rows(steps)), *([said] if said else []), sep="\n\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", type=Path, metavar="FILE", help="step-1.json, and further ones")
    parser.add_argument("--page", type=Path, help="the page whose measured part is written anew")
    chosen = parser.parse_args()
    return exit_code(lambda: run(chosen))


if __name__ == "__main__":
    sys.exit(main())
