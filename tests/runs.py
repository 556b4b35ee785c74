"""Small real runs for the tests: text, shards, a recipe, and the trainer as a user starts it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml
from started import Started

from overnight.device.launch import launch
from overnight.prepare.prepare import prepare
from overnight.recipe.load import load
from overnight.recipe.schedule import goals
from overnight.recipe.schema import Recipe
from overnight.run_dir.directory import RunDirectory
from overnight.training import setup
from overnight.training.state import Run

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "recipes" / "train.py")

TINY = {
    "threads": 2,
    "data": {"source": "files", "tokenizer": "trained", "val_tokens": 2500, "reserved_fraction": 0.1},
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64, "vocab_size": 500},
    "batch": {"tokens_per_iter": 1024, "sequence_length": 64, "micro_batch": 8},
    "optim": {"lr": 5e-3},
    "schedule": {"max_iters": 40, "warmup_iters": 5},
    "validation": {"every": 20, "prompts": ["The"], "sample_tokens": 4},
    "checkpoint": {"every": 10},
    "logging": {"every": 1},
}


def slow(*values):
    """A case that `make test-all` alone runs: another of the same kind stands beside it."""
    return pytest.param(*values, marks=pytest.mark.slow)


def make_workplace(folder: Path) -> Path:
    """A folder with text, its prepared shards and `tiny.yaml`; runs started there need nothing else."""
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for text in topics.values():
            file.write(json.dumps({"text": text}) + "\n")
    recipe = TINY | {"data": TINY["data"] | {"path": str(folder / "text.jsonl"), "dir": str(folder / "data")}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    prepare(tiny(folder).data, tiny(folder).model.vocab_size, report=lambda line: None)
    return folder


def tiny(folder: Path, *overrides: str) -> Recipe:
    """The tiny recipe with overrides."""
    return load(folder / "tiny.yaml", overrides)


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child process."""
    return os.environ | {"PYTHONUNBUFFERED": "1"} | changes


def train(
    folder: Path, *arguments: str, launcher: tuple[str, ...] = (), script: str = TRAIN, **changes: str
) -> subprocess.CompletedProcess:
    """Run `recipes/train.py`, or a script in its place, in `folder` to its end, under a launcher if one is named."""
    if not launcher:
        started = Started([script, *arguments], folder, environment(**changes), merged=False)
        errors: list[str] = []
        reading = threading.Thread(target=lambda: errors.append(started.stderr.read()))
        reading.start()
        said = started.stdout.read()
        reading.join()
        return subprocess.CompletedProcess(arguments, started.wait(300), said, errors[0])
    return train_in_a_fresh_process(folder, *arguments, launcher=launcher, script=script, **changes)


def train_in_a_fresh_process(
    folder: Path, *arguments: str, launcher: tuple[str, ...] = (), script: str = TRAIN, **changes: str
) -> subprocess.CompletedProcess:
    """As a user does it: Python starts, and imports everything."""
    command = [sys.executable, *launcher, script, *arguments]
    return subprocess.run(command, cwd=folder, env=environment(**changes), capture_output=True, text=True, timeout=900)


def two_processes() -> tuple[str, ...]:
    """The launcher of two processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))


def start(folder: Path, *arguments: str, script: str = TRAIN, **changes: str) -> Started:
    """Start `recipes/train.py`, or a script in its place, in `folder`; its lines can be read from `stdout`."""
    return Started([script, *arguments], folder, environment(**changes))


def records(folder: Path, name: str, kind: str) -> list[dict]:
    """The records of one kind in a run's metrics.jsonl."""
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def model_sums(name: str, iteration: int) -> str:
    """The checksums of a finished model's files."""
    return Path(f"runs/{name}/models/iter-{iteration:06d}/SHA256SUMS").read_text()


def finished(folder: Path, name: str) -> list[int]:
    """The budgets that a run has finished, in their order."""
    return [record["iteration"] for record in records(folder, name, "event") if record["event"] == "finished"]


def losses(folder: Path, name: str) -> dict[int, float]:
    """Training loss by iteration; every iteration must be there once."""
    found = losses_by_decay(folder, name)
    by_iteration = {iteration: loss for (_, iteration), loss in found.items()}
    assert len(by_iteration) == len(found)
    return by_iteration


def losses_by_decay(folder: Path, name: str, kind: str = "train") -> dict[tuple[int | None, int], float]:
    """Losses by budget of the decay (None on the trunk) and iteration; each must be there once."""
    found = [((r.get("cooldown"), r["iteration"]), r["loss"]) for r in records(folder, name, kind)]
    assert len(found) == len(dict(found))
    return dict(found)


def checkpoint_of(folder: Path, name: str, iteration: int) -> Path:
    """A run's checkpoint of an iteration: that of the decay which ends there, or the only one."""
    checkpoints = folder / "runs" / name / "checkpoints"
    last = checkpoints / f"cooldown-{iteration:06d}" / f"iter-{iteration:06d}"
    if last.exists():
        return last
    (found,) = checkpoints.glob(f"**/iter-{iteration:06d}")
    return found


def final_sums(folder: Path, name: str, iteration: int = 40) -> list[str]:
    """The checksums of weights and optimizer state in a run's last checkpoint."""
    sums = (checkpoint_of(folder, name, iteration) / "SHA256SUMS").read_text()
    return [line for line in sums.splitlines() if line.endswith(".safetensors")]


def set_up(recipe: Recipe) -> Run:
    """A run as the trainer sets it up, in this process, before its first iteration."""
    accelerator, console = launch(recipe)
    shards = setup.open_data(recipe, accelerator, console)
    return setup.set_up(recipe, accelerator, console, RunDirectory(recipe), shards, goals(recipe.schedule))
