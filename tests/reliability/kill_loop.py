"""A training run that is killed again and again: python tests/reliability/kill_loop.py --kills 30 --seed 1

The quickstart's model with Muon, validation and a milestone that is finished on the way, on smaller iterations so that
a save takes a good part of one. Each kill is a SIGKILL 0 to 3 seconds after the first new line of metrics, followed by
the same command; every third one is aimed: it waits for the next save and falls inside it. Every other one falls on all
that the trainer has started, too, and none of that may outlive it. With --evaluated the run is given hours in place of
the milestone, and its model is scored. In the end weights, optimizer state, the finished models and every loss must be
those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import psutil  # noqa: E402
from runs import final_sums, losses_by_decay, records, start  # noqa: E402
from started import Started  # noqa: E402

QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
EVERY = 1  # iterations between two checkpoints
ITERATIONS = 320


def shape(iterations: int, dropout: float, *, evaluated: bool) -> list[str]:
    """The overrides that both runs have."""
    options = ["--batch.tokens_per_iter", "1024", "--logging.every", "1", "--checkpoint.every", str(EVERY)]
    options += ["--schedule.max_iters", str(iterations)]
    if evaluated:
        options += ["--schedule.hours", "1000", "--evaluation.at_milestones", "20"]
    else:
        options += ["--schedule.milestones", f"[{iterations // 2}]"]
    options += ["--validation.every", str(iterations // 4)]
    options += ["--validation.ngram_baselines", "false", "--data.val_tokens", "8192", "--data.dir", "data/killed"]
    return options + (["--model.dropout", str(dropout)] if dropout else [])


@dataclass
class Kill:
    """What was there when the process was dead."""

    records: int  # of training in metrics.jsonl
    last: int  # the iteration of the last
    underway: int | None  # the iteration whose save was cut off

    def lost_at_most(self) -> int:
        """One interval, and the iterations that were made while the save that was cut off was being written."""
        return EVERY + (self.last - self.underway if self.underway is not None else 0)


def trained(folder: Path) -> list[dict]:
    """The records of training that stand in metrics.jsonl."""
    return records(folder, "killed", "train")


def unfinished_saves(run: Path) -> list[str]:
    """The names of the checkpoints that are being written, or were when the trainer was killed."""
    folders = (name for _, names, _ in os.walk(run / "checkpoints") for name in names)  # which may vanish meanwhile
    return [name for name in folders if name.startswith(".iter-") and name.endswith(".partial")]


def stop_inside_a_save(process: Started, run: Path, draw: random.Random) -> None:
    """Hold the trainer at a random moment of its next save; return at once when it has ended."""
    while process.poll() is None:
        if unfinished_saves(run):
            time.sleep(draw.uniform(0, 0.03))
            os.kill(process.pid, signal.SIGSTOP)
            if unfinished_saves(run):
                return
            os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.001)


def kill(process: Started, folder: Path, before: Kill | None, draw: random.Random, number: int) -> Kill | None:
    """Kill the trainer 0 to 3 seconds after its first new record; None when it ended before.

    Every third time inside a save, every other time with all that it started. Where it went on it must have lost no
    more than `before` allows.
    """
    delay = draw.uniform(0, 3)
    metrics = folder / "runs" / "killed" / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    for line in process.stdout:
        if line.startswith("resumes at iteration") and before is not None:  # what came after it is forgotten by now
            lost = before.records - len(trained(folder))
            assert lost <= before.lost_at_most(), f"{lost} iterations were lost by {before}"
            size, before = metrics.stat().st_size, None
        if line.startswith("iter ") and metrics.exists() and metrics.stat().st_size != size:
            break
    time.sleep(delay)
    if number % 3 == 0:
        stop_inside_a_save(process, metrics.parent, draw)
    if process.poll() is not None:
        return None
    started = psutil.Process(process.pid).children(recursive=True)
    for child in started if number % 2 else []:
        child.kill()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert psutil.wait_procs(started, timeout=10)[1] == [], "something outlives its trainer"
    cut_off, found = unfinished_saves(metrics.parent), trained(folder)
    underway = int(cut_off[0].split("-")[1].split(".")[0]) if cut_off else None
    return Kill(len(found), found[-1]["iteration"], underway)


def finish(process: Started) -> str:
    """Let a run end, and return what it printed."""
    said = process.stdout.read()
    assert process.wait() == 0, said
    return said


def kill_again_and_again(folder: Path, options: list[str], kills: int, draw: random.Random) -> list[Kill]:
    """Kill the run `killed` that often and let it end."""
    fallen: list[Kill] = []
    while len(fallen) < kills:
        process = start(folder, QUICKSTART, "--name", "killed", *options)
        fell = kill(process, folder, fallen[-1] if fallen else None, draw, len(fallen))
        if fell is None:
            raise SystemExit(f"the run was over after {len(fallen)} kills; more iterations would work")
        fallen.append(fell)
        print(f"kill {len(fallen)}: {fell}", flush=True)
    finish(start(folder, QUICKSTART, "--name", "killed", *options))
    return fallen


def compare(folder: Path, ends: list[int]) -> None:
    """The killed run is the undisturbed one: losses, validations, state, and the finished models."""
    for kind in ("train", "val"):
        expected = losses_by_decay(folder, "undisturbed", kind)
        assert losses_by_decay(folder, "killed", kind) == expected and len(expected) >= 5
    for end in ends:
        assert final_sums(folder, "killed", end) == final_sums(folder, "undisturbed", end)
        sums = [folder / "runs" / name / f"models/iter-{end:06d}/SHA256SUMS" for name in ("killed", "undisturbed")]
        assert sums[0].read_text() == sums[1].read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--evaluated", action="store_true", help="with hours given, and an evaluation at the end")
    args = parser.parse_args()
    draw, options = random.Random(args.seed), shape(args.iterations, args.dropout, evaluated=args.evaluated)
    ends = [args.iterations] if args.evaluated else [args.iterations // 2, args.iterations]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finish(start(folder, QUICKSTART, "--name", "undisturbed", *options))
        fallen = kill_again_and_again(folder, options, args.kills, draw)
        compare(folder, ends)
        inside = sum(fell.underway is not None for fell in fallen)
        assert inside >= (args.kills + 2) // 3, f"only {inside} of {args.kills} kills fell inside a save"
        sums = "\n".join(final_sums(folder, "killed", args.iterations))
    print(f"{args.kills} kills, seed {args.seed}, dropout {args.dropout:g}; {inside} fell inside a save")
    print(f"losses, validations, state and models are those of the undisturbed run:\n{sums}")


if __name__ == "__main__":
    main()
