"""Tokens that our recipe needs to reach the loss of the practitioner's settings, and of AdamW under our own schedule.

Every arm trains the quickstart's model on the embedded corpus through recipes/train.py: the same shape, tokens, split
and batch. An arm's learning rate is the best of a sweep on the tuning seed, widened while the best lies at its edge;
ours keeps the recipe's. Then every arm trains on other seeds. Ours does so at several budgets, each a whole run with
its own decay; the budget that reaches another arm's final loss is read off between them, linear in the log of tokens.
All of it is some thirty runs of ten minutes on one core. What a run came to is added to tokens_to_loss.jsonl beside
this script, with the commit and the machine; a run that stands there is not trained again, unless --record names
another file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ITERATIONS, WARMUP = 320, 16  # the quickstart's
TUNING_SEED = 1337  # on which the recipe's own learning rate was found too (docs/log.md)
BUDGETS = (0.375, 0.5, 0.75, 1.0)  # of those iterations, for ours

PRACTITIONER = {  # recipes/practitioner_40m.yaml, on the quickstart's shape; its warmup is a tenth of the run there too
    "model.dropout": 0.1,
    "optim.name": "adamw",
    "optim.betas": [0.9, 0.99],
    "schedule.kind": "cosine",
    "schedule.warmup_iters": ITERATIONS // 10,
    "schedule.final_lr_fraction": 0.1,
}
SWEEPS = {"practitioner": (1e-3, 2e-3, 4e-3, 8e-3), "adamw": (2e-3, 4e-3, 8e-3, 1.6e-2)}
SETTINGS = {"ours": {}, "adamw": {"optim.name": "adamw"}, "practitioner": PRACTITIONER}
TARGETS = {"practitioner": 0.5, "adamw": 0.75}  # of the other's tokens, at most


class Job(NamedTuple):
    """One run."""

    arm: str
    seed: int
    lr: float | None = None  # the recipe's
    iterations: int = ITERATIONS

    @property
    def name(self) -> str:
        rate = "recipe" if self.lr is None else f"{self.lr:g}"
        return f"{self.arm}-seed{self.seed}-lr{rate}-iters{self.iterations}"

    @property
    def overrides(self) -> dict[str, object]:
        """What differs from recipes/quickstart.yaml."""
        warmup = max(1, round(WARMUP * self.iterations / ITERATIONS))
        chosen = {"seed": self.seed, "schedule.max_iters": self.iterations, "schedule.warmup_iters": warmup}
        chosen |= {"validation.every": 80, "validation.prompts": [], "validation.ngram_baselines": False}
        chosen |= {"checkpoint.every": self.iterations, "threads": 1}
        return chosen | SETTINGS[self.arm] | ({} if self.lr is None else {"optim.lr": self.lr})


class Results(NamedTuple):
    """What a run came to."""

    curve: dict[int, float]  # validation loss by iteration
    tokens_per_second: float

    @property
    def loss(self) -> float:
        return self.curve[max(self.curve)]


def read_record(record: Path) -> dict[str, dict]:
    """What runs came to before, by their names."""
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    return {each["name"]: each for each in map(json.loads, lines)}


def outcome_of(job: Job, folder: Path, record: Path) -> Results:
    """What `job` came to: from the record, or else by running it and adding it there."""
    known = read_record(record).get(job.name)
    if known is None:
        outcome = run(job, folder)
        environment = json.loads((folder / "runs" / job.name / "environment.json").read_text(encoding="utf-8"))
        about = {"name": job.name, "overrides": job.overrides}
        about |= {name: environment[name] for name in ("commit", "device", "data")}
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(about | outcome._asdict()) + "\n")
        return outcome
    if known["overrides"] != job.overrides:
        sys.exit(f"{record} has {job.name} with other settings; name another --record, or remove the line")
    return Results({int(mark): loss for mark, loss in known["curve"].items()}, known["tokens_per_second"])


def run(job: Job, folder: Path) -> Results:
    """Train `job` in `folder`, one thread, and read its metrics."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "recipes" / "train.py")]
    command += [str(ROOT / "recipes" / "quickstart.yaml"), "--name", job.name]
    for key, value in job.overrides.items():
        command += [f"--{key}", json.dumps(value)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{job.name} failed:\n{done.stdout[-2000:]}{done.stderr}")
    lines = (folder / "runs" / job.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    curve = {record["iteration"]: record["loss"] for record in records if record["kind"] == "val"}
    rates = [r["tokens_per_second"] for r in records if r.get("event") == "finished"]
    outcome = Results(curve, rates[-1])
    print(f"{job.name}: {outcome.loss:.4f}", file=sys.stderr, flush=True)
    return outcome


def run_all(jobs: list[Job], args: argparse.Namespace) -> dict[Job, Results]:
    """All jobs, `args.at_once` of them side by side."""
    with ThreadPoolExecutor(args.at_once) as pool:
        return dict(zip(jobs, pool.map(lambda job: outcome_of(job, args.folder, args.record), jobs), strict=True))


def sweep(arm: str, args: argparse.Namespace) -> tuple[float, dict[float, float]]:
    """The best learning rate of an arm on the tuning seed, and the final loss of each that was tried."""
    tried: dict[float, float] = {}
    wanted = list(SWEEPS[arm])
    while wanted:
        found = run_all([Job(arm, TUNING_SEED, lr) for lr in wanted], args)
        tried |= {job.lr: outcome.loss for job, outcome in found.items() if job.lr is not None}
        best = min(tried, key=lambda lr: tried[lr])
        wanted = [best / 2] if best == min(tried) else [best * 2] if best == max(tried) else []
    return best, dict(sorted(tried.items()))


def tokens_to_reach(target: float, losses: dict[float, float]) -> float | None:
    """The share of the whole budget at which `losses` (by share) come down to `target`, linear in the log of the share.

    Below the smallest share tried the smallest share itself, an upper bound; None when even the largest stays above.
    """
    shares = sorted(losses)
    if losses[shares[0]] <= target:
        return shares[0]
    for before, after in pairwise(shares):
        if losses[after] <= target:
            way = (losses[before] - target) / (losses[before] - losses[after])
            return math.exp(math.log(before) + way * (math.log(after) - math.log(before)))
    return None


def mean_and_range(values: list[float]) -> str:
    """'mean (least to most)'."""
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="other than the tuning seed")
    parser.add_argument("--folder", type=Path, default=Path("runs/tokens_to_loss"), help="where the runs are kept")
    parser.add_argument("--record", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="what runs came to")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs side by side, one thread each")
    args = parser.parse_args()
    if TUNING_SEED in args.seeds:
        parser.error(f"--seeds: {TUNING_SEED} is the tuning seed; any other would work")
    args.folder.mkdir(parents=True, exist_ok=True)

    ours = [Job("ours", seed, None, round(share * ITERATIONS)) for seed in args.seeds for share in BUDGETS]
    before = len(read_record(args.record))
    results = run_all(ours[:1], args)  # alone: it prepares the data that all others open
    results |= run_all(ours[1:], args)
    print(f"the quickstart's model and data, {ITERATIONS * 4096:,} tokens a run, seeds {args.seeds}")
    print(f"{before} runs were read from {args.record.name}, the others trained now")
    print(f"ours: the recipe as it is; others: learning rate swept on seed {TUNING_SEED}\n")
    print("learning rates tried, with the validation loss at the end")
    for arm in SWEEPS:
        best, tried = sweep(arm, args)
        print(f"  {arm:13}" + "  ".join(f"{lr:g}: {loss:.4f}{'*' if lr == best else ''}" for lr, loss in tried.items()))
        results |= run_all([Job(arm, seed, best) for seed in args.seeds], args)

    whole = {
        arm: [o for job, o in results.items() if (job.arm, job.iterations) == (arm, ITERATIONS)] for arm in SETTINGS
    }
    print("\nvalidation loss along the whole run, mean over the seeds")
    for arm, outcomes in whole.items():
        marks = sorted(outcomes[0].curve)
        curve = "  ".join(f"{mark}: {statistics.mean(o.curve[mark] for o in outcomes):.4f}" for mark in marks)
        print(f"  {arm:13}{curve}")
    print("\nvalidation loss at the end, mean and range over the seeds")
    for share in BUDGETS:
        losses = [o.loss for job, o in results.items() if (job.arm, job.iterations) == ("ours", share * ITERATIONS)]
        print(f"  ours, {share:5.1%} of the tokens  {mean_and_range(losses)}")
    for arm in SWEEPS:
        print(f"  {arm + ', all tokens':24}  {mean_and_range([outcome.loss for outcome in whole[arm]])}")
    print("\ntokens a second on one core, and hence seconds of the whole budget, validation left out; medians")
    rates = {arm: statistics.median(o.tokens_per_second for o in outcomes) for arm, outcomes in whole.items()}
    for arm, rate in rates.items():
        print(f"  {arm:13}{rate:8,.0f}  {ITERATIONS * 4096 / rate:6,.0f} s")
    for arm, most in TARGETS.items():
        shares = []
        for seed in args.seeds:
            losses = {s: results[Job("ours", seed, None, round(s * ITERATIONS))].loss for s in BUDGETS}
            target = next(o.loss for job, o in results.items() if (job.arm, job.seed) == (arm, seed))
            shares.append(tokens_to_reach(target, losses) or math.inf)
        seconds = [share * rates[arm] / rates["ours"] for share in shares]
        bound = "at most " if min(BUDGETS) in shares else ""  # it was reached before the smallest budget ended
        print(
            f"\nto reach {arm}'s final loss of the same seed, ours needs of its tokens {bound}{mean_and_range(shares)},"
        )
        print(f"  of its seconds {bound}{mean_and_range(seconds)}; the aim was at most {most} of the tokens")


if __name__ == "__main__":
    main()
