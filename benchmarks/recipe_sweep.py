"""Changes of the recipe on proxies: small GPT-2s that train on books through recipes/train.py, in pairs of one seed.

A pair has the same initial weights and tokens; its difference is of the change alone, its standard error over seeds. A
change is kept that wins by two standard errors at every size. Runs are lines of recipe_sweep.jsonl beside this file,
and no run that has a line is made again; --table prints what they say. A run takes minutes on one core.

The proxies train a vocabulary of 4,096 entries on the text given with --text: .parquet files with a column `text`. The
lines that are kept are of 639 books in the public domain (mlschmitt/classic-books-markdown on the Hub, revision
944882722e9a, cut at paragraphs). Their losses say nothing of FineWeb-Edu's; differences are what is looked at.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from overnight.run_dir.layout import finished_in
from overnight.run_dir.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]
LINES = Path(__file__).with_suffix(".jsonl")
TODAY = "today"

# Layers x width, iterations of 8,192 tokens; tokens for each parameter of the blocks: 33, 133 and 10 (at 40M
# a night's 3B tokens are 141, 20,000 iterations 494).
SHAPES: dict[str, dict[str, Any]] = {
    "4x64": {"model.n_embd": 64, "model.n_head": 2, "schedule.max_iters": 800},
    "4x64-long": {"model.n_embd": 64, "model.n_head": 2, "schedule.max_iters": 3200},
    "4x128": {"model.n_embd": 128, "model.n_head": 4, "schedule.max_iters": 1000},
}
# What fineweb_edu_40m.yaml has, but for the rate, which is the quickstart's, of this size and length.
RECIPE: dict[str, Any] = {
    "threads": 1,
    "data.source": "files",
    "data.tokenizer": "trained",
    "data.val_tokens": 131_072,
    "data.train_tokens": 28_000_000,
    "data.reserved_fraction": 0.02,
    "model.n_layer": 4,
    "model.n_positions": 256,
    "model.vocab_size": 4096,
    "model.bias": "false",
    "batch.tokens_per_iter": 8192,
    "batch.sequence_length": 256,
    "optim.lr": 8e-3,
    "optim.weight_decay": 0.1,
    "schedule.warmup_iters": 40,
    "schedule.decay_fraction": 0.2,
    "validation.every": 10_000,
    "validation.prompts": "[]",
    "validation.ngram_baselines": "false",
    "checkpoint.every": 10_000,
}
# Each change by its overrides; those that begin with dashes are this script's own: `--batch N` makes an iteration of N
# times the tokens, N times fewer of them. By D^0.38 (arXiv 2505.13738) a batch of six times, 49,152, is to the
# shortest proxy's 6.6M tokens what 524,288 is to a night's 3B.
CHANGES: dict[str, dict[str, Any]] = {
    TODAY: {},
    "lr-half": {"optim.lr": 4e-3},
    "lr-double": {"optim.lr": 16e-3},
    "embedding-lr-2": {"optim.embedding_lr": 16e-3},
    "embedding-no-decay": {"optim.embedding_weight_decay": 0.0},
    "vector-lr-4": {"optim.vector_lr": 32e-3},
    "weight-decay-third": {"optim.weight_decay": 0.033},
    "weight-decay-triple": {"optim.weight_decay": 0.3},
    "decay-40": {"schedule.decay_fraction": 0.4},
    "decay-65": {"schedule.decay_fraction": 0.65},
    "sqrt-decay": {"--decay": "sqrt"},
    "sqrt-decay-40": {"--decay": "sqrt", "schedule.decay_fraction": 0.4},
    "normuon": {"--muon": "normuon"},
    "batch-6": {"--batch": 6},
    "batch-6-lr-double": {"--batch": 6, "optim.lr": 16e-3},
    "together": {"optim.vector_lr": 32e-3, "optim.embedding_weight_decay": 0.0, "schedule.decay_fraction": 0.4},
}


def train(arguments: list[str]) -> None:
    """recipes/train.py in this process, with a decay or a Muon of this script's own."""
    from overnight.model import optim
    from overnight.recipe import schedule

    own = {key: arguments[arguments.index(key) + 1] for key in ("--decay", "--muon") if key in arguments}
    for key in own:
        del arguments[arguments.index(key) : arguments.index(key) + 2]
    if own.get("--decay") == "sqrt":
        schedule.decay_share = lambda left: 1 - math.sqrt(1 - left)  # Hägele et al. 2024, arXiv 2405.18392
    if own.get("--muon") == "normuon":
        optim.Muon._directions = normalized(optim.Muon._directions)  # type: ignore[method-assign]
    script = ROOT / "recipes" / "train.py"
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def normalized(directions: Any, beta: float = 0.95) -> Any:
    """Muon's directions with each row divided by its running root mean square (NorMuon, arXiv 2510.05491).

    A row here is a neuron of the output: GPT-2's matrices are (inputs, outputs), so it is a column of the matrix. The
    norm of the whole direction stays as it was.
    """
    import torch

    seen: dict[int, torch.Tensor] = {}

    def of_this_step(self: Any, work: list) -> torch.Tensor:
        made = directions(self, work)  # (blocks, rows, columns)
        square = made.square().mean(dim=1, keepdim=True)
        key = id(work[0][0])
        seen[key] = square if key not in seen else seen[key].lerp(square, 1 - beta)
        scaled = made / (seen[key].sqrt() + 1e-8)
        return scaled * (made.norm(dim=(1, 2), keepdim=True) / scaled.norm(dim=(1, 2), keepdim=True))

    return of_this_step


def lines() -> list[dict[str, Any]]:
    """The runs that were made."""
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def run(size: str, change: str, seed: int, folder: Path, text: str) -> None:
    """One run; its line is added where it ends."""
    name = f"{size}-{change}-seed{seed}"
    chosen = RECIPE | SHAPES[size] | CHANGES[change] | {"name": name, "seed": seed}
    chosen |= {"data.path": text, "data.dir": str(folder / "data")}
    times = chosen.pop("--batch", 1)
    chosen["batch.tokens_per_iter"] *= times
    for key in ("schedule.max_iters", "schedule.warmup_iters"):
        chosen[key] = round(chosen[key] / times)
    overrides = [word for key, value in chosen.items() for word in (key if key[0] == "-" else f"--{key}", str(value))]
    command = [sys.executable, str(Path(__file__).resolve()), "--train", str(ROOT / "recipes" / "own_text.yaml")]
    start = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run([*command, *overrides], cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=True)
    (end,) = finished_in(Metrics(folder / "runs" / name / "metrics.jsonl").records()).values()
    line = {"size": size, "change": change, "seed": seed, "val_loss": end["val_loss"]}
    with LINES.open("a") as file:
        file.write(json.dumps(line | {"seconds": round(time.monotonic() - start)}) + "\n")
    print(line, flush=True)


def table() -> None:
    """Each change at each size, paired with today's recipe by seed."""
    made = {(line["size"], line["change"], line["seed"]): line["val_loss"] for line in lines()}
    print("size       change               n  difference  standard error")
    for size in SHAPES:
        for change in CHANGES:
            seeds = [seed for s, c, seed in made if (s, c) == (size, change) and (size, TODAY, seed) in made]
            if not seeds:
                continue
            losses = [made[size, change, seed] for seed in seeds]
            apart = [made[size, change, seed] - made[size, TODAY, seed] for seed in seeds]
            error = f"{statistics.stdev(apart) / math.sqrt(len(apart)):.4f}" if len(apart) > 1 else "-"
            mean = f"{statistics.mean(apart):+.4f}" if change != TODAY else f"{statistics.mean(losses):.4f}"
            print(f"{size:10} {change:20} {len(seeds)}  {mean:>10}  {error if change != TODAY else '':>14}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print what the lines say, and train nothing")
    parser.add_argument("--text", metavar="GLOB", help="the books, .parquet")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, metavar="DIR", default=Path("build/recipe_sweep"), help="kept there")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs at a time, one core each")
    chosen = parser.parse_args()
    if chosen.table:
        return table()
    if not chosen.text:
        parser.error("--text is needed to train: .parquet files with a column `text`")
    folder = chosen.runs.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    made = {(line["size"], line["change"], line["seed"]) for line in lines()}
    names = list(dict.fromkeys([TODAY, *chosen.changes]))
    wanted = [(z, c, s) for s in chosen.seeds for z in chosen.sizes for c in names if (z, c, s) not in made]
    with ThreadPoolExecutor(chosen.at_once) as pool:
        for _ in pool.map(lambda one: run(*one, folder, chosen.text), wanted):
            pass
    table()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2:])
    else:
        main()
