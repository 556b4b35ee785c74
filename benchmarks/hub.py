"""What a Hub that never answers costs an iteration: runs with one and without, alternating.

Small models on the embedded corpus, through recipes/train.py. The Hub is tests/hub_server.py on the loopback interface;
it takes every request and answers none, so that the process that sends waits for the whole of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import WRITE, Hub  # noqa: E402

RUN = {
    "schedule.max_iters": "80",
    "logging.every": "5",
    "validation.every": "80",
    "validation.ngram_baselines": "false",
    "validation.prompts": "[]",
    "model.n_layer": "2",
    "model.n_embd": "64",
    "model.n_head": "2",
    "hub.patience_minutes": "0.02",
}


def seconds(runs: Path, name: str, hub: Hub | None) -> float:
    """Median seconds of a warm iteration of one run."""
    options = RUN | {"name": name} | ({"hub.repo_id": "alice/hangs"} if hub else {})
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), str(ROOT / "recipes" / "quickstart.yaml"), *words]
    environment = os.environ | (hub.settings(WRITE, runs / "hf") if hub else {})
    subprocess.run(command, cwd=runs, env=environment, stdout=subprocess.DEVNULL, check=True)
    lines = (runs / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [r["tokens_per_second"] for r in map(json.loads, lines) if r["kind"] == "train"][1:]
    return statistics.median(4096 / rate for rate in rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        runs = Path(folder)
        seconds(runs, "warm", None)  # prepares the data
        hub.fault("hang")
        found = [(seconds(runs, f"with-{n}", hub), seconds(runs, f"without-{n}", None)) for n in range(pairs)]
        asked = len(hub.requests)
    print("median seconds of an iteration, beside a Hub that never answers and without one")
    for beside, alone in found:
        print(f"{beside:>8.4f}{alone:>8.4f}  ratio {beside / alone:.3f}")
    ratio = statistics.median(beside / alone for beside, alone in found)
    print(f"median ratio {ratio:.3f}; the Hub was asked {asked} times in {pairs} runs")


if __name__ == "__main__":
    main()
