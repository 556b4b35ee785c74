"""How a YAML file and dotted overrides become a recipe, and how everything wrong with them is said at once.

`load` reports every problem it finds in one `InputError`, each with its key, the value found and a value that would
work; nothing is written before a recipe is whole.
"""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from overnight.errors import InputError, listed
from overnight.recipe.identity import flat, nested
from overnight.recipe.schedule import decay_iters, fits
from overnight.recipe.schema import Recipe, Section
from overnight.recipe.text import objections, pairs, read_yaml, shown

# What other tools call the same thing, by the key, or the habit, that takes its place here.
WORDS_OF_OTHERS = {
    "batch.micro_batch": "batch_size per_device_train_batch_size",
    "batch.micro_batch: auto": "auto_find_batch_size",
    "batch.tokens_per_iter (the accumulation follows from it)": "gradient_accumulation_steps",
    "batch.sequence_length": "block_size",
    "schedule.max_iters": "max_iters lr_decay_iters max_steps",
    "schedule.max_iters (the table at the start says how many epochs that is)": "num_train_epochs",
    "schedule.warmup_iters": "warmup_iters warmup_steps",
    "schedule.kind": "lr_scheduler_type",
    "schedule.final_lr_fraction": "min_lr",
    "optim.lr": "learning_rate lr",
    "optim.weight_decay": "weight_decay",
    "optim.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optim.grad_clip": "grad_clip max_grad_norm",
    "validation.every": "eval_interval eval_steps",
    "data.val_tokens (the whole fixed set is read every time)": "eval_iters",
    "logging.every": "log_interval logging_steps",
    "logging.trackers": "report_to",
    "logging.trackers: [wandb]": "wandb_log",
    "checkpoint.every": "save_steps",
    "checkpoint.keep": "save_total_limit",
    "name (the run is runs/NAME)": "out_dir output_dir",
    "name": "run_name",
    "data.license": "licence",
    "data.path": "dataset dataset_name",
    "precision": "dtype mixed_precision",
    "precision: bf16": "bf16",
    "precision (bf16 or fp32; fp16 is not offered)": "fp16",
    "compile": "torch_compile",
    "model.n_layer": "n_layers num_hidden_layers",
    "model.n_embd": "hidden_size",
    "model.n_head": "num_attention_heads",
    "nothing: the same command again resumes": "resume_from_checkpoint init_from",
    "nothing: another --name starts another run": "overwrite_output_dir",
    "nothing: `hf auth login`, or HF_TOKEN in the environment": "hub_token token",
    "hub.repo_id": "push_to_hub hub_model_id",
    "hub.private": "hub_private_repo",
    "hub.every_hours, and hub.push_state for the exact state": "hub_strategy",
}
OPTIONS = {
    "train.py": ["allow-change", "cooldown", "until", "resume"],
    "prepare.py": ["adopt", "verify", "workers", "executor", "executor-options"],
    "plan.py": [
        "gpu",
        "probe",
        "probe-file",
        "throughput",
        "calibrate",
        "hours-per-night",
        "price-kwh",
        "json",
        "plot",
    ],
}
"""What the scripts that read a recipe take beside its keys: words that a user may have given to another of them."""
DIALECTS = {word: ours for ours, words in WORDS_OF_OTHERS.items() for word in words.split()}
CREDENTIALS = re.compile(r"://[^/\s@]*@")
UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # in no file of UTF-8, and in no name of a file


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path` with dotted `overrides` (`["--optim.lr", "2e-3"]`) on top.

    Raises `InputError` with every problem found: unreadable YAML, unknown keys, wrong types or ranges, and settings
    that do not fit together.
    """
    data = read_yaml(path)
    if "compute_environment" in data or "distributed_type" in data:
        raise InputError(
            f"{path}: this is a configuration of accelerate, not a recipe;"
            f" `accelerate launch --config_file {shlex.quote(str(path))} recipes/train.py RECIPE` would work"
        )
    problems = [f"`{key}`: dots are for the command line; in a file its section holds it" for key in data if "." in key]
    file = {"name": path.stem} | flat(data)
    given = file | flat(dict(pairs(overrides, problems)))
    for key, value in given.items():
        _refuse_unwritable(f"{path}: `{key}`", value)
    refused = {key: problem for key, value in given.items() if (problem := _problem(key, value, file.get(key)))}
    recipe = Recipe.model_validate(nested({key: value for key, value in given.items() if key not in refused}))
    problems += refused.values()
    problems += [text for text in conflicts(recipe) if refused.keys().isdisjoint(re.findall(r"`([\w.]+)", text))]
    if problems:
        raise InputError([f"{path}: {problem}" for problem in problems])
    recipe._file, recipe._overrides = path, tuple(overrides)
    return recipe


def _refuse_unwritable(place: str, value: Any) -> None:
    """Raise `InputError` for what no file takes, and credentials: a recipe is copied into run, card and manifest."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _refuse_unwritable(place, each)
    elif isinstance(value, str) and UNWRITABLE.search(value):
        raise InputError(f"{place} is {_quoted(value)}, which is no text in UTF-8; letters would work")
    elif isinstance(value, str) and CREDENTIALS.search(value):
        raise InputError(
            f"{place}: a name and password in a URL would be written into everything that is made of it;"
            " fetch the file yourself and give its path"
        )


def _problem(key: str, value: Any, written: Any) -> str | None:
    """What is wrong with a dotted key or its value by itself, and what would work; None where nothing is.

    `written` is what the recipe's file has in its place.
    """
    known, items = dict(leaves()), objections(key, value)
    if not items:
        return None
    if items[0]["type"] == "extra_forbidden":
        meant = _option(key) or (
            f"here that is `{ours}`" if (ours := _meant(key, list(known))) else "--help lists them"
        )
        return f"`{key}` is not a key of a recipe; {meant}"
    wanted = " or ".join(dict.fromkeys(item["msg"][0].lower() + item["msg"][1:] for item in items))
    found = items[0]["input"]  # the value, or what is wrong in a list
    return f"`{key}` is {_quoted(found)}: {wanted}; {_works(known.get(key), key, found, written, wanted)}"


def conflicts(recipe: Recipe) -> Iterator[str]:
    """Settings that do not fit together, each in a sentence that names all their keys, with what to write instead."""
    model, batch = recipe.model, recipe.batch
    if model.n_embd % model.n_head:
        works = max(h for h in range(1, model.n_head + 1) if model.n_embd % h == 0)
        yield f"`model.n_embd` {model.n_embd} is no multiple of `model.n_head` {model.n_head}; {works} heads would work"
    rows, length = batch.tokens_per_iter // batch.sequence_length, f"`batch.sequence_length` {batch.sequence_length}"
    if batch.sequence_length > model.n_positions:
        longest = model.n_positions
        yield f"{length} is longer than `model.n_positions` {longest}; {longest} would work"
    if batch.tokens_per_iter % batch.sequence_length:
        works = max(1, round(batch.tokens_per_iter / batch.sequence_length)) * batch.sequence_length
        tokens = f"`batch.tokens_per_iter` {batch.tokens_per_iter}"
        yield f"{tokens} does not divide into rows of {length}; {works} would work"
    elif batch.micro_batch != "auto" and rows % batch.micro_batch:
        works = math.gcd(rows, batch.micro_batch)
        yield (
            f"`batch.micro_batch` {batch.micro_batch} does not divide an iteration of {rows} rows"
            f" (`batch.tokens_per_iter` over `batch.sequence_length`); {works} would work"
        )
    yield from _conflicts_of_schedule(recipe)
    if not re.fullmatch("[a-z0-9][a-z0-9.-]*", recipe.hub.license):  # as the Hub's identifiers are
        yield f"`hub.license` is {recipe.hub.license!r}: an identifier such as apache-2.0 would work"
    source, path = recipe.data.source, recipe.data.path
    if source != "adopted" and (source == "embedded") == bool(path):
        needed = "has no use" if path else "is needed"
        yield f"`data.path` is {listed(path or 'empty')}: it {needed} with `data.source: {source}`"


def _conflicts_of_schedule(recipe: Recipe) -> Iterator[str]:
    schedule = recipe.schedule
    warmup, end = f"`schedule.warmup_iters` {schedule.warmup_iters}", f"`schedule.max_iters` {schedule.max_iters}"
    if schedule.warmup_iters + decay_iters(schedule) > schedule.max_iters:
        decay = f"the decay of {decay_iters(schedule)} iterations (`schedule.decay_fraction`)"
        works = schedule.max_iters - decay_iters(schedule)
        yield f"{warmup} and {decay} do not fit into {end}; at most {works} would work"
    chosen = {"schedule.milestones": schedule.milestones, "schedule.hours": schedule.hours}
    chosen |= {"stop.when_flat": recipe.stop.when_flat}
    if schedule.kind != "wsd" and (key := next((key for key, value in chosen.items() if value), None)):
        yield f"`{key}` needs `schedule.kind: wsd`, whose trunk it branches off"
    elif schedule.milestones and schedule.hours:
        yield f"`schedule.hours` {schedule.hours:g} finds the one budget that fits; `schedule.milestones` [] would work"
    elif wrong := [m for m in schedule.milestones if not fits(schedule, m)]:
        decay = "whose decay (`schedule.decay_fraction`) begins after"
        yield f"`schedule.milestones` holds {wrong[0]}; one below {end}, {decay} {warmup}, would work"


def _meant(key: str, known: list[str]) -> str | None:
    """The key that somebody had in mind: another tool's, one that is spelled nearly so, one of another section."""
    last = key.split(".")[-1]
    close = difflib.get_close_matches(key, known, 1, cutoff=0.8) or [k for k in known if k.split(".")[-1] == last]
    if not close and (names := difflib.get_close_matches(last, {k.split(".")[-1] for k in known}, 1, cutoff=0.8)):
        close = [k for k in known if k.split(".")[-1] == names[0]]
    ours = [DIALECTS[last]] if last in DIALECTS else close
    return f"here that is `{ours[0]}`" if ours else None


def _option(key: str) -> str | None:
    """The option of a script that somebody had in mind."""
    scripts = {option: script for script, options in OPTIONS.items() for option in options}
    near = difflib.get_close_matches(key, scripts, 1, cutoff=0.75)
    return f"`--{near[0]}` is an option of {scripts[near[0]]}" if near else None


def _works(field: Any, key: str, value: Any, written: Any, wanted: str) -> str:
    """What could stand in place of a value that was refused: the file's own where that is another, or a bound."""
    if field and isinstance(field.default, list) and isinstance(value, str):
        if value.startswith("["):
            return "quotes around the whole list would work"
        return f"`[{shown(value)}]` would work"
    if value is not None and "valid string" in wanted and not isinstance(value, dict):
        return "what looks like something else is text in quotes"
    if not field:
        return "key: value lines would work"
    if written is not None and not objections(key, written):
        return f"{written!r}, as the file has it, would work"
    bound = re.search(r"(?:greater|less) than or equal to (\S+)", wanted)
    return f"{bound[1] if bound else repr(field.default)} would work"


def _quoted(value: Any) -> str:
    return shown(repr(value))


def leaves(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a recipe with its pydantic FieldInfo, dotted, in the order of the file."""
    for name, field in section.model_fields.items():
        if isinstance(field.default, Section):
            yield from leaves(type(field.default), f"{prefix}{name}.")
        else:
            yield prefix + name, field
