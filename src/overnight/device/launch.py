"""How a process of accelerate begins: precision, threads, and what of its configuration the recipe overrules."""

from __future__ import annotations

import contextlib
import netrc
import os
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from transformers.utils.logging import disable_progress_bar

from overnight.core.console import Console
from overnight.core.extras import require
from overnight.core.processes import OF_THE_GROUP
from overnight.device.device import keep_large_blocks_whole, resolve_precision
from overnight.errors import InputError, refused_by_system
from overnight.recipe.schema import Recipe
from overnight.run_dir.directory import RunDirectory

T = TypeVar("T")
OWNED = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "XLA_DOWNCAST_BF16", "XLA_USE_BF16")
OF_THE_DEVICES = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_TORCH_DEVICE")
"""What accelerate's launcher, and the configuration behind it, tell in the environment: the second stays."""
HARMLESS = {"no", "none", "false", "0", "1", "default"}


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
        console.log(line)
    return accelerator, console


def cuda_wanted() -> bool:
    """Whether there is a CUDA device and accelerate's configuration does not say `use_cpu: true`."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def refuse_lone_processes(accelerator: Accelerator) -> None:
    """Make sure that the processes that were launched know of each other."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise InputError(
            f"WORLD_SIZE is {world} in the environment, and accelerate finds {accelerator.num_processes}:"
            " `accelerate launch`, or `unset WORLD_SIZE RANK LOCAL_RANK`, would work"
        )


def take_over_environment(environ: MutableMapping[str, str]) -> list[str]:
    """Remove what an accelerate configuration says beside the devices and their processes: the recipe owns the rest.

    Returns a line that names what was overruled, and one for names of a group of processes that is none.
    """
    owned = [key for key in environ if key.startswith(OWNED) and key not in OF_THE_DEVICES]
    values = {key: environ.pop(key) for key in owned}
    said = [
        f"{key.removeprefix('ACCELERATE_').lower()} {value}"
        for key, value in values.items()
        if key.startswith("ACCELERATE_") and value.lower() not in HARMLESS
    ]
    stray = [] if "WORLD_SIZE" in environ and "RANK" in environ else [key for key in OF_THE_GROUP[:4] if key in environ]
    for key in stray:
        del environ[key]
    lines = []
    if said:
        lines.append(f"accelerate's configuration asks for {', '.join(said)}; the recipe decides that, and wins")
    if stray:
        lines.append(f"{', '.join(stray)} in the environment is ignored: no launcher set it")
    return lines


def require_what_is_asked_for(recipe: Recipe) -> None:
    """Raise `InputError` for what the recipe asks for and is not installed, before a night is spent towards it."""
    for tracker in recipe.logging.trackers:
        require(tracker, "`logging.trackers`")  # accelerate would only warn, and log nothing
    if "wandb" in recipe.logging.trackers:
        require_wandb_key(os.environ)
    if recipe.hub.repo_id:
        require("figures", "`hub.repo_id`, for the curve on its card,")
    if recipe.evaluation.at_milestones:
        require("eval", "`evaluation.at_milestones`")


def require_wandb_key(environ: Mapping[str, str]) -> None:
    """Raise `InputError` where wandb would ask for a key, which nobody answers at night."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc().authenticators(host):
            return
    raise InputError(
        "`logging.trackers` has wandb, which knows no key here; `wandb login`, or WANDB_MODE=offline, would work"
    )


def set_threads(threads: int | Literal["auto"]) -> None:
    """Give each process of this machine its share of the cores; accelerate's launcher would leave it one thread."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = max(1, len(os.sched_getaffinity(0)) // here) if threads == "auto" else threads
    torch.set_num_threads(count)


def on_main(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """What `act` returns on the main process; all processes wait for it, and raise its `InputError`.

    So do they when the system refuses it a file, as `Unreachable`.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = act()
        except InputError as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = refused_by_system(error)
    result, refusal = broadcast_object_list(outcome)
    if refusal:
        raise refusal
    return result
