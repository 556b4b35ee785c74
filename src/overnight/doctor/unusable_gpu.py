"""A GPU that this PyTorch does not see, or has no kernels for: said before anything is computed."""

from __future__ import annotations

import platform

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from overnight.core.console import Console
from overnight.core.nvml import DetectedGpu, driver
from overnight.device.device import GIB
from overnight.doctor.checks import check_gpu, check_torch, is_wsl
from overnight.doctor.machine import gpus_hidden, torch_build
from overnight.errors import InputError
from overnight.planning.model_size import derive
from overnight.recipe.schema import Recipe

CPU_FLOPS = 1e11  # a second, about: two cores reach 7e10, sixteen three times that
ALL_THE_SAME = "`CUDA_VISIBLE_DEVICES=` before the command trains on the CPU"


def mind_unusable_gpu(recipe: Recipe, accelerator: Accelerator, console: Console) -> None:
    """Say what keeps PyTorch from the GPU that is here; nothing where the user asked for the CPU.

    Raises `InputError` for a GPU without kernels, and where a PyTorch that was built for GPUs would train on the CPU
    for longer than a day.
    """
    if accelerator.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        gpu = DetectedGpu(torch.cuda.get_device_name(), free / GIB, total / GIB, torch.cuda.get_device_capability())
        check = check_gpu(gpu, tuple(torch.cuda.get_arch_list()))
        if check.status == "fail":
            raise InputError(f"{check.text}; mend: {check.mend}; {ALL_THE_SAME}")
        return
    found = driver()
    if found is None or gpus_hidden() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return
    check = check_torch(torch_build(), found, is_wsl(platform.release()), hidden=False)
    why = f"PyTorch does not see the {found.gpus[0].name} of this machine: {check.text}"
    mend = f"mend: {check.mend or 'make doctor'}"
    derived = derive(recipe, "cpu", 1, None)
    days = derived.flops_per_token * derived.tokens / CPU_FLOPS / accelerator.num_processes / 86400
    if torch.version.cuda is not None and days > 1:
        raise InputError(f"{why}; on the CPU this recipe takes about {days:,.0f} days; {mend}; {ALL_THE_SAME}")
    console.log(f"{why}; this trains on the CPU; {mend}")
