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

from pydantic import ValidationError

from overnight.errors import InputError
from overnight.recipe.schedule import decay_iters, fits
from overnight.recipe.schema import Recipe, leaves
from overnight.recipe.text import kinds_of, pairs, read_yaml, shown

# What other tools call the same thing. The answer to an unknown key is the key, or the habit, that takes its place.
DIALECTS = {
    "batch_size": "batch.micro_batch",
    "per_device_train_batch_size": "batch.micro_batch",
    "auto_find_batch_size": "batch.micro_batch: auto",
    "gradient_accumulation_steps": "batch.tokens_per_iter (the accumulation follows from it)",
    "block_size": "batch.sequence_length",
    "max_iters": "schedule.max_iters",
    "lr_decay_iters": "schedule.max_iters",
    "max_steps": "schedule.max_iters",
    "num_train_epochs": "schedule.max_iters (the table at the start says how many epochs that is)",
    "warmup_iters": "schedule.warmup_iters",
    "warmup_steps": "schedule.warmup_iters",
    "lr_scheduler_type": "schedule.kind",
    "learning_rate": "optim.lr",
    "lr": "optim.lr",
    "min_lr": "schedule.final_lr_fraction",
    "weight_decay": "optim.weight_decay",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "grad_clip": "optim.grad_clip",
    "max_grad_norm": "optim.grad_clip",
    "eval_interval": "validation.every",
    "eval_steps": "validation.every",
    "eval_iters": "data.val_tokens (the whole fixed set is read every time)",
    "log_interval": "logging.every",
    "logging_steps": "logging.every",
    "report_to": "logging.trackers",
    "wandb_log": "logging.trackers: [wandb]",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "out_dir": "name (the run is runs/NAME)",
    "output_dir": "name (the run is runs/NAME)",
    "run_name": "name",
    "licence": "data.license",
    "dtype": "precision",
    "bf16": "precision: bf16",
    "fp16": "precision (bf16 or fp32; fp16 is not offered)",
    "mixed_precision": "precision",
    "torch_compile": "compile",
    "n_layers": "model.n_layer",
    "num_hidden_layers": "model.n_layer",
    "hidden_size": "model.n_embd",
    "num_attention_heads": "model.n_head",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "resume_from_checkpoint": "nothing: the same command again resumes",
    "init_from": "nothing: the same command again resumes",
    "overwrite_output_dir": "nothing: another --name starts another run",
    "push_to_hub": "hub.repo_id",
    "hub_model_id": "hub.repo_id",
    "hub_private_repo": "hub.private",
    "hub_token": "nothing: `hf auth login`, or HF_TOKEN in the environment",
    "token": "nothing: `hf auth login`, or HF_TOKEN in the environment",
    "hub_strategy": "hub.every_hours, and hub.push_state for the exact state",
}


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
    problems: list[str] = []
    data.setdefault("name", path.stem)
    for key, value in pairs(overrides, problems):
        _place(data, key.split("."), value, problems)
    _refuse_unwritable(path, data)
    recipe, broken = _validate(data, problems)
    problems += [text for keys, text in conflicts(recipe) if not broken.intersection(keys)]
    if problems:
        raise InputError([f"{path}: {problem}" for problem in problems])
    recipe._file, recipe._overrides = path, tuple(overrides)
    return recipe


def _refuse_unwritable(path: Path, data: Any, key: str = "") -> None:
    """Raise `InputError` for what no file takes, and credentials: a recipe is copied into run, card and manifest."""
    if isinstance(data, dict):
        for name, value in data.items():
            _refuse_unwritable(path, value, f"{key}.{name}".removeprefix("."))
    if isinstance(data, list):
        for value in data:
            _refuse_unwritable(path, value, key)
    if isinstance(data, str) and UNWRITABLE.search(data):
        raise InputError(f"{path}: `{key}` is {_quoted(data)}, which is no text in UTF-8; letters would work")
    if isinstance(data, str) and CREDENTIALS.search(data):
        raise InputError(
            f"{path}: `{key}`: a name and password in a URL would be written into everything that is made of it;"
            " fetch the file yourself and give its path"
        )


def _place(data: dict, keys: list[str], value: Any, problems: list[str]) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            problems.append(f"`{'.'.join(keys)}`: `{key}` holds {inner!r}, where a section is needed")
            return
        data = inner
    data[keys[-1]] = value


def _validate(data: dict, problems: list[str]) -> tuple[Recipe, set[str]]:
    """The recipe, with defaults where a value was refused, and the keys that were; adds to `problems`."""
    broken: set[str] = set()
    while True:
        try:
            return Recipe.model_validate(data), broken
        except ValidationError as error:
            found: dict[str, tuple[list[str], Any]] = {}
            for item in error.errors(include_url=False):
                keys = _path_in_recipe(data, item["loc"])
                reasons, _ = found.setdefault(".".join(keys), ([], item["input"]))
                reasons.append("unknown" if item["type"] == "extra_forbidden" else item["msg"])
            for key, (reasons, value) in found.items():
                broken.add(key)
                problems += _problems(key, reasons, value)
                _drop(data, key.split("."))


def _path_in_recipe(data: Any, location: tuple) -> list[str]:
    """The part of pydantic's location that names keys of the file (a union adds the names of its branches)."""
    keys: list[str] = []
    for part in location:
        if not isinstance(data, dict) or part not in data:
            break
        keys.append(str(part))
        data = data[part]
    return keys


def _drop(data: dict, keys: list[str]) -> None:
    for key in keys[:-1]:
        data = data[key]
    del data[keys[-1]]


def conflicts(recipe: Recipe) -> Iterator[tuple[set[str], str]]:
    """Settings that do not fit together: the keys involved, and what to write instead."""
    model, batch, schedule, data = recipe.model, recipe.batch, recipe.schedule, recipe.data
    if model.n_embd % model.n_head:
        works = max(h for h in range(1, model.n_head + 1) if model.n_embd % h == 0)
        yield (
            {"model.n_embd", "model.n_head"},
            f"`model.n_embd` {model.n_embd} is no multiple of `model.n_head` {model.n_head}; {works} heads would work",
        )
    if batch.sequence_length > model.n_positions:
        yield (
            {"batch.sequence_length", "model.n_positions"},
            f"`batch.sequence_length` {batch.sequence_length} is longer than `model.n_positions` {model.n_positions};"
            f" {model.n_positions} would work",
        )
    if batch.tokens_per_iter % batch.sequence_length:
        works = max(1, round(batch.tokens_per_iter / batch.sequence_length)) * batch.sequence_length
        yield (
            {"batch.tokens_per_iter", "batch.sequence_length"},
            f"`batch.tokens_per_iter` {batch.tokens_per_iter} does not divide into rows of `batch.sequence_length`"
            f" {batch.sequence_length}; {works} would work",
        )
    elif batch.micro_batch != "auto" and (rows := batch.tokens_per_iter // batch.sequence_length) % batch.micro_batch:
        works = math.gcd(rows, batch.micro_batch)
        yield (
            {"batch.tokens_per_iter", "batch.sequence_length", "batch.micro_batch"},
            f"`batch.micro_batch` {batch.micro_batch} does not divide an iteration of {rows} rows; {works} would work",
        )
    if schedule.warmup_iters + decay_iters(schedule) > schedule.max_iters:
        works = schedule.max_iters - decay_iters(schedule)
        yield (
            {"schedule.warmup_iters", "schedule.max_iters", "schedule.decay_fraction"},
            f"`schedule.warmup_iters` {schedule.warmup_iters} and the decay of {decay_iters(schedule)} iterations do"
            f" not fit into `schedule.max_iters` {schedule.max_iters}; at most {works} would work",
        )
    chosen = {"schedule.milestones": schedule.milestones, "schedule.hours": schedule.hours}
    chosen |= {"stop.when_flat": recipe.stop.when_flat}
    if schedule.kind != "wsd" and (trunk := [key for key, value in chosen.items() if value]):
        yield {trunk[0], "schedule.kind"}, f"`{trunk[0]}` needs `schedule.kind: wsd`, whose trunk it branches off"
    elif schedule.milestones and schedule.hours:
        yield (
            {"schedule.milestones", "schedule.hours"},
            f"`schedule.hours` {schedule.hours:g} finds the one budget that fits; `schedule.milestones` [] would work",
        )
    elif wrong := [m for m in schedule.milestones if not fits(schedule, m)]:
        yield (
            {"schedule.milestones", "schedule.max_iters", "schedule.warmup_iters", "schedule.decay_fraction"},
            f"`schedule.milestones` holds {wrong[0]}; one below `schedule.max_iters` {schedule.max_iters}, whose decay"
            " begins after the warmup, would work",
        )
    if not re.fullmatch("[a-z0-9][a-z0-9.-]*", recipe.hub.license):  # as the Hub's identifiers are
        yield {"hub.license"}, f"`hub.license` is {recipe.hub.license!r}: an identifier such as apache-2.0 would work"
    if data.source != "adopted" and (data.source == "embedded") == bool(data.path):
        needed = "has no use with" if data.path else "is needed with"
        yield {"data.source", "data.path"}, f"`data.path` is {data.path!r}: it {needed} `data.source: {data.source}`"


def _problems(key: str, reasons: list[str], value: Any) -> list[str]:
    """What is wrong with a key, and what would work; of an unknown section each key of it."""
    if "unknown" in reasons and isinstance(value, dict) and value:
        return [problem for name, inner in value.items() for problem in _problems(f"{key}.{name}", reasons, inner)]
    known = dict(leaves())
    if "unknown" in reasons:
        meant = _meant(key, list(known))
        return [f"`{key}` is not a key of a recipe" + (f"; here that is `{meant}`" if meant else "; --help lists them")]
    wanted = " or ".join(dict.fromkeys(reason[0].lower() + reason[1:] for reason in reasons))
    return [f"`{key}` is {_quoted(value)}: {wanted}; {_works(known.get(key), value, wanted)}"]


def _meant(key: str, known: list[str]) -> str | None:
    """The key that somebody had in mind: another tool's, one that is spelled nearly so, one of another section."""
    last = key.split(".")[-1]
    close = difflib.get_close_matches(key, known, 1, cutoff=0.8) or [k for k in known if k.split(".")[-1] == last]
    if not close and (names := difflib.get_close_matches(last, {k.split(".")[-1] for k in known}, 1)):
        close = [k for k in known if k.split(".")[-1] == names[0]]
    return DIALECTS.get(last) or (close[0] if close else None)


def _works(field: Any, value: Any, wanted: str) -> str:
    """What could stand in place of a value that was refused."""
    kinds = kinds_of(field) if field else set()
    if list in kinds and str not in kinds and isinstance(value, str):
        if value.startswith("["):
            return "quotes around the whole list would work"
        return f"`[{shown(value)}]` would work"
    if value is not None and "valid string" in wanted and not isinstance(value, dict):
        return "what looks like something else is text in quotes"
    return f"{field.default!r} would work" if field else "key: value lines would work"


def _quoted(value: Any) -> str:
    return shown(repr(value))
