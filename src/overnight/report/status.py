"""Where a run, or its finished model, stands, in a few lines, from its files alone."""

from __future__ import annotations

import math
import time
from pathlib import Path

from overnight.core.console import Console, count, duration
from overnight.core.lock import holder_of
from overnight.errors import listed, script_command
from overnight.planning.scaling_law import gpt2_dataset
from overnight.planning.table import gpt2_loss
from overnight.recipe.schedule import branch_point, goals, towards
from overnight.recipe.schema import Recipe
from overnight.run_dir.directory import RunDirectory
from overnight.run_dir.layout import (
    CHECKPOINTS,
    LOG,
    continuing,
    cooldowns,
    finished,
    folder_name,
    recipe_of,
    saved_iterations,
)
from overnight.run_dir.metrics import Metrics, Record, baselines_of


def standing(recipe: Recipe, records: list[Record], end: Record) -> str:
    """Where a finished model's loss stands, in a sentence: beside models that count words of the tokens that it saw.

    Where none were made, beside a uniform guess, and with GPT-2's published loss where the text is one that it is of.
    """
    loss, baselines, guess = end["val_loss"], baselines_of(records, end["iteration"]), math.log(recipe.model.vocab_size)
    if baselines:
        tokens, pairs = (f"{baselines[name]:.2f} nats" for name in ("unigram", "bigram"))
        if loss >= baselines["unigram"]:
            return f"It predicts no better than the frequencies of single tokens ({tokens})."
        if loss >= baselines["bigram"]:
            return f"It predicts better than the frequencies of tokens ({tokens}), not than those of pairs ({pairs})."
        return f"It predicts better than the frequencies of tokens ({tokens}) and of pairs ({pairs})."
    among = f"a uniform guess among {recipe.model.vocab_size:,} tokens ({guess:.2f} nats)"
    said = f"It predicts no better than {among}." if loss >= guess else f"It is {guess - loss:.2f} nats below {among}."
    if dataset := gpt2_dataset(recipe):
        said += f" GPT-2 124M's published loss on {dataset}, of another validation split, is {gpt2_loss(dataset):.4f}."
    return said


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
        lines += [f"  to come     {listed(left)} iterations"] if len(left) > 1 else []
    if "train" in last:
        lines.append(f"  training    {train_words(last['train'])}")
    if "val" in last:
        val = last["val"]
        lines.append(f"  validation  {val['loss']:.4f} nats per token at iteration {val['iteration']:,}")
    folders = [run / CHECKPOINTS, *cooldowns(run / CHECKPOINTS).values()]
    if saved := {path: path.stat().st_mtime for folder in folders for path in saved_iterations(folder).values()}:
        newest = max(saved, key=lambda path: saved[path])
        lines.append(f"  checkpoint  {newest.relative_to(run)}, {duration(time.time() - saved[newest])} ago")
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


def baseline_line(losses: dict[str, float]) -> str:
    """The n-gram models' losses on the validation set, in words."""
    return f"unigram {losses['unigram']:.4f}, smoothed (Witten-Bell) bigram {losses['bigram']:.4f}"


def print_finished(directory: RunDirectory, console: Console, target: int) -> None:
    """The box at the end, from metrics.jsonl alone: a finished run prints it again."""
    records = directory.records()
    done, baselines = finished(directory.path)[target], baselines_of(records, target)
    rate, kwh, model = done["tokens_per_second"], done["kwh"], directory.models / folder_name(target)
    lines = [
        f"validation loss  {done['val_loss']:.4f} nats per token at the end, {done['best_val_loss']:.4f} at its best"
    ]
    if baselines:
        lines.append(f"for scale        {baseline_line(baselines)}, from the same training tokens")
    lines += [
        f"speed            {f'{count(rate)} tokens a second over the warm iterations' if rate else 'not measured'}",
        *([f"time             {time_words(done)}"] if done.get("resumed_at") else []),
        f"energy           {'not measured' if kwh is None else f'{kwh:.2f} kWh'}",
        f"model            {model}",
    ]
    budgets = goals(directory.recipe.schedule)
    of = f": budget {target:,} of {listed(budgets)}" if len(budgets) > 1 and target in budgets else ""
    console.box(f"{directory.path}{of} is finished", lines)
    console.log(standing(directory.recipe, records, done))
    prompts = directory.recipe.validation.prompts
    console.log(f"next: {script_command('eval.py', model)}")
    console.log(f"      {script_command('sample.py', model, *(f'--prompt={prompt}' for prompt in prompts[:1]))}")
    console.log(f"      {script_command('report.py', directory.path)}   # its card and curve")


def time_words(end: Record) -> str:
    """How long a finished model took, and which part of it its last session did: the speed is of that one."""
    last = f"the last session: from iteration {end['resumed_at']:,} to {end['iteration']:,}"
    return f"{duration(end['seconds'])} in all sessions; {last}"
