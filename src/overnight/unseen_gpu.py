"""A CPU that trains beside a GPU which PyTorch does not see: said, and refused where it would go on for days."""

from __future__ import annotations

import platform

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from overnight.console import Console
from overnight.doctor import check_torch, is_wsl
from overnight.machine import driver, gpus_hidden
from overnight.plan import derive
from overnight.recipe import InputError, Recipe

CPU_FLOPS = 1e11  # a second, about: two cores reach 7e10, sixteen three times that
ALL_THE_SAME = "`CUDA_VISIBLE_DEVICES=` before the command trains on the CPU all the same"


def mind_unseen_gpu(recipe: Recipe, accelerator: Accelerator, console: Console) -> None:
    """Say that PyTorch does not see a GPU that is there, and why; nothing where the user asked for the CPU.

    Raises `InputError` where a PyTorch that was built for GPUs would train on the CPU for longer than a day.
    """
    if accelerator.device.type == "cuda" or gpus_hidden() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return
    found = driver()
    if found is None or not found.gpus:
        return
    check = check_torch(torch.__version__, torch.version.cuda, found, is_wsl(platform.release()), hidden=False)
    why = f"PyTorch does not see the {found.gpus[0].name} of this machine: {check.text}"
    mend = f"mend: {check.mend or 'make doctor'}"
    days = days_on_a_cpu(recipe) / accelerator.num_processes
    if torch.version.cuda is not None and days > 1:
        raise InputError(f"{why}; on the CPU this recipe takes about {days:,.0f} days; {mend}; {ALL_THE_SAME}")
    console.say(f"{why}; this trains on the CPU; {mend}")


def days_on_a_cpu(recipe: Recipe) -> float:
    """Days of training by the recipe's FLOPs."""
    derived = derive(recipe, "cpu", 1, None)
    return derived.flops_per_token * derived.tokens / CPU_FLOPS / 86400
