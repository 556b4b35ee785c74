"""What the device at hand is, how much of it is in use, and what it could do at best."""

from __future__ import annotations

import platform
from collections.abc import MutableMapping
from pathlib import Path

import psutil
import torch

from overnight.core.nvml import PowerMeter
from overnight.errors import InputError
from overnight.planning.gpus import match_gpu
from overnight.recipe.schema import Recipe

GIB = 2**30
WHOLE_BLOCK_MIB = 180  # below any chunk of logits of GPT-2's vocabulary: not compiled it is 197
MEMORY_SHARE = 0.9  # of a card's free memory; the rest is for NCCL, cuBLAS and the desktop's windows


class Device:
    """The torch device of this process, with its memory, power and peak speed."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        # accelerate leaves the number out where there is one process, and some functions of torch ask for it
        self.torch = torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
        if self.cuda:
            self.name = torch.cuda.get_device_name(self.torch)
            self.total_gib = torch.cuda.get_device_properties(self.torch).total_memory / GIB
            known = match_gpu(self.name, self.total_gib)
            self.peak_flops = known.tflops * 1e12 if known else None
        else:
            self.name = f"CPU, {processor_name()}"
            self.total_gib = psutil.virtual_memory().total / GIB
            self.peak_flops = None
        self.limit_gib = self.total_gib  # that this process may use
        self.power = PowerMeter(torch.cuda.get_device_properties(self.torch).uuid if self.cuda else None)

    def used_gib(self) -> float:
        """Memory that this process holds on the device: CUDA's reserved peak, on a CPU the resident set."""
        return (torch.cuda.max_memory_reserved(self.torch) if self.cuda else psutil.Process().memory_info().rss) / GIB

    def cap_memory(self) -> float:
        """Keep this process below the card's free memory, and return how many GiB torch may use, `limit_gib`.

        WSL 2 would continue in the host's memory, many times slower, where this cap makes a request fail.
        """
        free, total = torch.cuda.mem_get_info(self.torch)
        limit = MEMORY_SHARE * free + torch.cuda.memory_reserved(self.torch)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), self.torch)
        self.limit_gib = limit / GIB
        return self.limit_gib

    def release(self) -> None:
        """Give memory that holds nothing back to the card, and forget the peak."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, so that a clock tells the truth."""
        if self.cuda:
            torch.cuda.synchronize(self.torch)


def keep_large_blocks_whole(environ: MutableMapping[str, str]) -> None:
    """Have CUDA's allocator cut no block above `WHOLE_BLOCK_MIB` for a smaller request, unless the user has set it up.

    The loss's chunk of logits is by far the largest block. Cut for a tensor that lives longer, such as a gradient, it
    would be made once more by the next micro-batch. To be called before anything lies on the device.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environ.keys():
        environ["PYTORCH_ALLOC_CONF"] = f"max_split_size_mb:{WHOLE_BLOCK_MIB}"


def allow_tf32() -> None:
    """Let CUDA's tensor cores multiply what stays in float32.

    torch.set_float32_matmul_precision would change the CPU's products as well.
    """
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def processor_name() -> str:
    """The CPU's model name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resolve_precision(recipe: Recipe, *, cuda: bool, bf16: bool) -> str:
    """Return "bf16" or "fp32" for the device at hand.

    Raises `InputError` where the recipe asks by name for what the device does not have.
    """
    problems = []
    if recipe.precision == "bf16" and not bf16:
        where = "this CUDA device has no bf16" if cuda else "this machine has no CUDA device"
        problems.append(f"`precision` is 'bf16', but {where}; 'auto' would work here")
    if recipe.compile is True and not cuda:
        problems.append("`compile` is True, but this machine has no CUDA device; 'auto' would work here")
    if problems:
        raise InputError(problems)
    return ("bf16" if bf16 else "fp32") if recipe.precision == "auto" else recipe.precision
