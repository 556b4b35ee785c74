"""Where a run stands, in a few lines, from its files alone."""

from __future__ import annotations

import time
from pathlib import Path

from overnight.core.console import count, duration
from overnight.core.lock import holder_of
from overnight.recipe.schedule import branch_point, goals, towards
from overnight.run_dir.layout import CHECKPOINTS, LOG, continuing, finished, folder_name, recipe_of, saved_iterations
from overnight.run_dir.metrics import Metrics, Record


def status_lines(run: Path) -> list[str]:
    """Whether a process works on it, its last iteration and validation, its checkpoints and finished models.

    Raises `InputError` for a folder that is no run.
    """
    recipe, records = recipe_of(run), Metrics(run / "metrics.jsonl").records()
    last = {record["kind"]: record for record in records}
    at = max((record["iteration"] for record in records), default=0)
    done = finished(run)
    left = [goal for goal in goals(recipe.schedule) if goal not in done]
    lines = [f"{run}: {activity(run, finished_all=not left)}"]
    if left:
        target = last.get("train", {}).get("cooldown", left[0])
        falling = at > branch_point(towards(recipe.schedule, target))
        lines.append(f"  iteration   {at:,} of {target:,}" + (", the learning rate falls" if falling else ""))
        lines += [f"  to come     {', '.join(f'{goal:,}' for goal in left)} iterations"] if len(left) > 1 else []
    if "train" in last:
        lines.append(f"  training    {train_words(last['train'])}")
    if "val" in last:
        val = last["val"]
        lines.append(f"  validation  {val['loss']:.4f} nats per token at iteration {val['iteration']:,}")
    if saved := saved_iterations(run / CHECKPOINTS):
        newest = max(saved.items())[1]
        ago = duration(time.time() - newest.stat().st_mtime)
        lines.append(f"  checkpoint  {newest.name}, {ago} ago")
    for target, end in done.items():
        lines.append(f"  finished    {run / 'models' / folder_name(target)}, {end['val_loss']:.4f} nats per token")
    return lines


def activity(run: Path, *, finished_all: bool) -> str:
    """Who works on it, or whether it has ended."""
    holder = holder_of(run)
    if holder:
        log = run / LOG
        silent = f", last line {duration(time.time() - log.stat().st_mtime)} ago" if log.exists() else ""
        return f"{holder} works on it{silent}"
    return "finished" if finished_all else f"stopped; {continuing(run)}"


def train_words(record: Record) -> str:
    """The last line of the training."""
    rate = f", {count(record['tokens_per_second'])} tokens a second" if record["tokens_per_second"] else ""
    watts = f", {record['watts']:.0f} W" if record["watts"] else ""
    return f"loss {record['loss']:.4f} at iteration {record['iteration']:,}{rate}{watts}"
