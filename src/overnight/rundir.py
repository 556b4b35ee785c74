"""The run directory: its resolved recipe, its environment, and metrics.jsonl, one object a line."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from overnight.checkpoint import folder_name
from overnight.files import write_whole
from overnight.recipe import InputError, Recipe, meaning

RUNS = Path("runs")
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy", "pydantic")


class RunDirectory:
    """`runs/<name>`; nothing is created before `claim`."""

    def __init__(self, recipe: Recipe, runs: Path = RUNS):
        self.path = runs / recipe.name
        self.recipe = recipe
        self.checkpoints = self.path / "checkpoints"
        self.models = self.path / "models"
        self.metrics = self.path / "metrics.jsonl"

    def refuse_another_run(self, found: dict[str, Any]) -> None:
        """Raise `InputError` with every difference when this directory holds a run of another meaning.

        `found` is what decides the run beside its recipe: the data's fingerprint and the precision of this device.
        """
        stored = self.path / "recipe.yaml"
        if not stored.exists():
            return
        before = yaml.safe_load(stored.read_text(encoding="utf-8"))
        now = meaning(self.recipe) | found
        differing = [key for key in now | before["meaning"] if now.get(key) != before["meaning"].get(key)]
        if differing:
            lines = [f"  `{key}` was {before['meaning'].get(key)!r}, now {now.get(key)!r}" for key in differing]
            raise InputError(
                f"{self.path} holds another run:\n"
                + "\n".join(lines)
                + f"\n`--name {self._free_name()}` starts a new one"
            )

    def _free_name(self) -> str:
        number = 2
        while (RUNS / f"{self.recipe.name}-{number}").exists():
            number += 1
        return f"{self.recipe.name}-{number}"

    def claim(self, found: dict[str, Any], facts: dict[str, Any]) -> None:
        """Create the directory and write what runs here; a resumed run gets a new environment.json alone."""
        self.models.mkdir(parents=True, exist_ok=True)
        recipe = {"meaning": meaning(self.recipe) | found, "recipe": self.recipe.model_dump()}
        if not (self.path / "recipe.yaml").exists():
            write_whole(self.path / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
        write_whole(self.path / "environment.json", json.dumps(environment() | facts, indent=1))

    def append(self, kind: str, iteration: int, **values: Any) -> dict[str, Any]:
        """Add one record to metrics.jsonl and return it."""
        tokens = iteration * self.recipe.batch.tokens_per_iter
        record = {"kind": kind, "iteration": iteration, "tokens": tokens, **values}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The records so far; a line that a crash left unfinished is no record."""
        if not self.metrics.exists():
            return []
        found = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [record for record in found if kind in (None, record["kind"])]

    def finished(self) -> dict[str, Any] | None:
        """The record that ends a run of this recipe, written last; None while its verified model is not there."""
        if not (self.models / folder_name(self.recipe.schedule.max_iters)).is_dir():
            return None
        ends = [record for record in self.records("event") if record["event"] == "finished"]
        ends = [record for record in ends if record["iteration"] == self.recipe.schedule.max_iters]
        return ends[-1] if ends else None

    def forget_after(self, iteration: int) -> None:
        """Drop what was measured after `iteration`: a resumed run measures it again."""
        kept = [record for record in self.records() if record["iteration"] <= iteration]
        write_whole(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def environment() -> dict[str, Any]:
    """Versions, commit, command line and threads, for environment.json."""
    source = Path(__file__).parent
    return {
        "command": sys.argv,
        "commit": _output("git", "-C", str(source), "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


def _output(*command: str) -> str | None:
    """What a command prints, or None where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
