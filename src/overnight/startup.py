"""Everything before the first step: the environment, the data, the model on its device, the directory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, parse_flag_from_env, set_seed
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from overnight import checkpoint, micro_batch, optim
from overnight.batches import TrainingBatches
from overnight.console import Console, estimated_end
from overnight.deadline import Night
from overnight.device import Device, allow_tf32, keep_large_blocks_whole, resolve_precision
from overnight.extras import require
from overnight.files import room_in
from overnight.inform import informs
from overnight.manifest import Manifest, is_prepared, require_same_request
from overnight.model import LanguageModel
from overnight.plan import Derived, derive, derived_rows, iterations_in_all
from overnight.prepare_cost import expected_cost
from overnight.recipe import InputError, Recipe, Schedule
from overnight.rundir import RunDirectory
from overnight.shards import Shards, open_shards
from overnight.tokenizer import load_tokenizer
from overnight.warm_up import device_facts
from overnight.watch import History


@dataclass
class Run:
    """What the loop touches."""

    recipe: Recipe
    derived: Derived
    accelerator: Accelerator
    device: Device
    console: Console
    directory: RunDirectory
    shards: Shards
    batches: TrainingBatches
    prepared: nn.Module  # what accelerate made of the model: autocast and DDP happen in its forward
    model: LanguageModel
    compiled: bool  # the model's body, in training
    optimizers: list[torch.optim.Optimizer]
    micro_batch: int  # rows at once, now: it changes when memory runs out
    saver: checkpoint.Saver
    iteration: int = 0  # updates done
    history: History = field(default_factory=History)
    joules: float | None = None  # of the sessions before this one, where the device measures energy
    saved_at: float = field(default_factory=time.monotonic)  # when the last save began, or the session
    signalled: bool = False  # this process was asked to stop
    stopping: bool = False  # all processes know of it
    cannot_log: bool = False  # metrics.jsonl refuses records, which the user knows
    overdue: bool = False  # all processes know that `checkpoint.every_minutes` are over
    night: Night | None = None  # what the run was given to end in
    failed: set[str] = field(default_factory=set)  # of what only informs: told, and gone on without

    @property
    def schedule(self) -> Schedule:
        """The recipe's, ending with the budget that is being finished."""
        return self.directory.schedule

    @property
    def grad_accum(self) -> int:
        """Micro-batches of one iteration on each process."""
        return self.derived.rows_per_process // self.micro_batch

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that lies beside the shards."""
        return load_tokenizer(str(self.shards.folder / "tokenizer"))


def launch(recipe: Recipe) -> tuple[Accelerator, Console]:
    """The Accelerator in the recipe's precision, on whatever topology it was launched with, and the process's console.

    Raises `InputError` when the recipe asks by name for what the device does not have.
    """
    disable_progress_bar()  # transformers' own, which break the lines of a log
    overruled = take_over_environment(os.environ)
    keep_large_blocks_whole(os.environ)
    require_what_is_asked_for(recipe)
    cuda = cuda_wanted()
    precision = resolve_precision(
        recipe, cuda=cuda, bf16=cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    accelerator = Accelerator(
        cpu=not cuda,  # without it two CPU processes each believe they are alone
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(recipe.logging.trackers) or None,
        project_dir=str(RunDirectory(recipe).path),
    )
    refuse_lone_processes(accelerator)
    set_threads(recipe.threads)
    console = Console(quiet=not accelerator.is_main_process)
    for line in overruled:
        console.say(line)
    return accelerator, console


def cuda_wanted() -> bool:
    """Whether there is a CUDA device and accelerate's configuration does not say `use_cpu: true`."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def refuse_lone_processes(accelerator: Accelerator) -> None:
    """Make sure that the processes that were launched know of each other."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    assert accelerator.num_processes == world, f"accelerate sees {accelerator.num_processes} of {world} processes"


def take_over_environment(environ: MutableMapping[str, str]) -> list[str]:
    """Remove what an accelerate configuration says about precision, compilation, accumulation: the recipe owns these.

    Returns one line that names what was overruled, or none.
    """
    harmless = {"no", "false", "0", "1", "default"}
    owned = [k for k in environ if k.startswith(("ACCELERATE_DYNAMO_", "ACCELERATE_GRADIENT_ACCUMULATION"))]
    owned += [
        k for k in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED") if k in environ
    ]
    values = {key: environ.pop(key) for key in owned}
    said = [f"{k.removeprefix('ACCELERATE_').lower()} {v}" for k, v in values.items() if v.lower() not in harmless]
    return [f"accelerate's configuration asks for {', '.join(said)}; the recipe decides that, and wins"] if said else []


def require_what_is_asked_for(recipe: Recipe) -> None:
    """Raise `InputError` for what the recipe asks for and is not installed, before a night is spent towards it."""
    for tracker in recipe.logging.trackers:
        require(tracker, "`logging.trackers`")  # accelerate would only warn, and log nothing
    if recipe.hub.repo_id:
        require("figures", "`hub.repo_id`, for the curve on its card,")
    if recipe.evaluation.at_milestones:
        require("eval", "`evaluation.at_milestones`")


def set_threads(threads: int | Literal["auto"]) -> None:
    """Give each process of this machine its share of the cores; accelerate's launcher would leave it one thread."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = max(1, len(os.sched_getaffinity(0)) // here) if threads == "auto" else threads
    torch.set_num_threads(count)


def print_plan(recipe: Recipe, accelerator: Accelerator, console: Console) -> None:
    """`--dry-run`: the resolved recipe and everything that follows from it; nothing is built or written."""
    derived = derive(recipe, accelerator.device.type, accelerator.num_processes, recipe.data.train_tokens)
    console.say(yaml.safe_dump(recipe.model_dump(), sort_keys=False))
    console.table("derived", derived_rows(recipe, derived))


def open_data(recipe: Recipe, accelerator: Accelerator, console: Console) -> Shards:
    """The verified shards of the recipe; the embedded corpus is prepared on the way, any other must be there."""
    folder = Path(recipe.data.dir)
    if recipe.data.source == "embedded":
        on_main(accelerator, lambda: prepare_embedded(recipe, console))
    elif not is_prepared(folder):
        raise InputError(
            f"`data.dir`: {folder} holds no prepared data. `python recipes/prepare.py {recipe.file}` makes it:"
            f" {expected_cost(recipe.data)}"
        )
    shards = open_shards(folder, verify=accelerator.is_local_main_process)
    if shards.manifest.vocab_size != recipe.model.vocab_size:
        raise InputError(
            f"`model.vocab_size` is {recipe.model.vocab_size}, but the tokens in {folder} were made with a vocabulary"
            f" of {shards.manifest.vocab_size}; {shards.manifest.vocab_size} would work"
        )
    return shards


def prepare_embedded(recipe: Recipe, console: Console) -> None:
    """Make the embedded corpus's shards where they are not made yet; only then are the packages needed that do it."""
    if is_prepared(Path(recipe.data.dir)):
        require_same_request(Path(recipe.data.dir), recipe.data, recipe.model.vocab_size)
        return
    require("prepare", f"`data.dir`: {recipe.data.dir} holds no prepared data; preparing it")
    from overnight.prepare import prepare

    prepare(recipe.data, recipe.model.vocab_size, report=console.say)


def identity(accelerator: Accelerator, shards: Shards) -> dict[str, str]:
    """What decides a run beside its recipe: another of these, and it is another run."""
    return {"data fingerprint": shards.manifest.fingerprint, "precision": accelerator.mixed_precision}


def set_up(
    recipe: Recipe,
    accelerator: Accelerator,
    console: Console,
    directory: RunDirectory,
    shards: Shards,
    night: Night | None = None,
) -> Run:
    """Model, optimizers and data on the device, the facts on the screen, and the run directory ours."""
    run = assemble(recipe, accelerator, console, directory, shards)
    run.night = night
    console.table(f"{directory.path} on {run.device.name}", derived_rows(recipe, run.derived))
    facts, seconds = device_facts(run)
    end = estimated_end(seconds * run.grad_accum * iterations_in_all(recipe.schedule))
    facts |= {
        "data": f"{shards.folder}, {shards.train.tokens:,} training + {shards.val.tokens:,} validation tokens",
        **text_facts(shards.manifest),
        "free disk": f"{free_gib(Path()):.0f} GiB",
        "estimated end": (
            night.kept.until if night else f"{end}, from the time of one micro-batch; the lines below measure it"
        ),
    }
    console.table("this machine", list(facts.items()))
    lock(accelerator, directory, create=True)
    if accelerator.is_main_process:
        with room_in(directory.path, "name"):
            counted = {"unique_tokens": shards.train.tokens, "validation_tokens": shards.val.tokens}
            counted["parameters"] = run.derived.parameters
            directory.claim(identity(accelerator, shards), facts | counted | {"measured": micro_batch.measured(run)})
    accelerator.wait_for_everyone()
    if recipe.logging.trackers:
        begin_tracking(run)
    return run


@informs("trackers")
def begin_tracking(run: Run) -> None:
    """Let the trackers that the recipe names begin."""
    run.accelerator.init_trackers(run.recipe.name)


def text_facts(manifest: Manifest) -> dict[str, str]:
    """The text behind the tokens: how much of it, and what identifies it."""
    if manifest.split.leakage == "not checked":
        return {"text": f"adopted from {manifest.source.path}; leakage between the sides: not checked"}
    documents = sum(record.documents for record in manifest.inputs)
    files = Path(manifest.inputs[0].name).name if len(manifest.inputs) == 1 else f"{len(manifest.inputs)} files"
    return {"text": f"{documents:,} documents of {files}", "text SHA-256": manifest.text_sha256}


def assemble(
    recipe: Recipe, accelerator: Accelerator, console: Console, directory: RunDirectory, shards: Shards
) -> Run:
    """Model, optimizers and data on the device, as they are before the first iteration; nothing is written."""
    device = Device(accelerator.device)
    derived = derive(recipe, accelerator.device.type, accelerator.num_processes, shards.train.tokens)
    batches = TrainingBatches(
        shards.train, recipe.batch, recipe.seed, rank=accelerator.process_index, num_processes=accelerator.num_processes
    )
    if device.cuda:
        allow_tf32()
    set_seed(recipe.seed)
    compiled = device.cuda if recipe.compile == "auto" else recipe.compile
    model = LanguageModel(recipe.model, shards.manifest.eos_id, compile=compiled)
    return Run(
        recipe=recipe,
        derived=derived,
        accelerator=accelerator,
        device=device,
        console=console,
        directory=directory,
        shards=shards,
        batches=batches,
        prepared=accelerator.prepare(model),
        model=model,
        compiled=compiled,
        optimizers=optim.build(model, recipe.optim),
        micro_batch=derived.first_micro_batch,
        saver=checkpoint.Saver(recipe.checkpoint.keep),
    )


def free_gib(path: Path) -> float:
    """Free space of the file system of `path`, in GiB."""
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize / 2**30


def lock(accelerator: Accelerator, directory: RunDirectory, *, create: bool) -> None:
    """Lock the run directory, on the main process."""
    on_main(accelerator, lambda: directory.lock(create=create))


def on_main(accelerator: Accelerator, act: Callable[[], None]) -> None:
    """Do `act` on the main process; all processes wait for it, and raise its `InputError`."""
    problem: list[InputError | None] = [None]
    if accelerator.is_main_process:
        try:
            act()
        except InputError as error:
            problem = [error]
    (refusal,) = broadcast_object_list(problem)
    if refusal:
        raise refusal
