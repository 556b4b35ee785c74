"""Which kernel attention runs: a fused one, without a mask, where the device has one.

A fused kernel never holds the (time, time) scores: flash, cuDNN's, and on a CPU its own flash. The others of PyTorch's
SDPA (efficient, math) serve where there is none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.errors import InputError
from overnight.recipe.schema import Recipe

KERNEL = r"aten::_scaled_dot_product_(?!.*backward).*"
FUSED = r"_scaled_dot_product_(flash|cudnn)_attention(_for_cpu)?"


@dataclass(frozen=True)
class AttentionReport:
    """What SDPA was given and what it ran, seen in one profiled forward and backward."""

    kernels: tuple[str, ...]
    masks: int
    calls: int

    @property
    def fused(self) -> bool:
        """Whether every call ran a fused kernel, and without a mask."""
        return bool(self.kernels) and not self.masks and all(re.fullmatch(FUSED, name) for name in self.kernels)

    def __str__(self) -> str:
        mask = "no mask" if self.masks == 0 else f"a mask in {self.masks} of {self.calls} calls"
        return f"{', '.join(self.kernels)} ({self.calls} calls, {mask})"


def attention_report(forward: Callable[[], Tensor]) -> AttentionReport:
    """Profile `forward`, whose result is a scalar, and its backward; gradients are left behind.

    The profiler sees the operators that were really dispatched, in eager and in compiled code alike.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no start and stop lines on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    # Without `acc_events` torch 2.11 warns on the screen.
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
        forward().backward()
    calls = [event for event in profile.events() if re.fullmatch(KERNEL, event.name)]
    masked = [event for event in calls if any(event.input_shapes[3:])]  # after query, key and value
    return AttentionReport(
        tuple(sorted({event.name.removeprefix("aten::") for event in calls})), len(masked), len(calls)
    )


def kernel_of_device(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> AttentionReport:
    """What SDPA runs on this device for a row of the recipe, asked before anything is compiled.

    Raises `InputError` when the recipe asks for a fused kernel by name and the device has none for it.
    """
    model = recipe.model
    shape = (1, model.n_head, recipe.batch.sequence_length, model.n_embd // model.n_head)
    query = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    report = attention_report(
        lambda: F.scaled_dot_product_attention(query, query, query, dropout_p=model.dropout, is_causal=True).sum()
    )
    if model.attention == "flash" and not report.fused:
        raise InputError(
            f"`model.attention` is 'flash', but this device runs {report.kernels[0]}: a fused kernel on CUDA needs bf16"
            " and compute capability 8.0 or newer, on a CPU no dropout; 'auto' would work"
        )
    return report


def refuse_another(report: AttentionReport, of_device: AttentionReport) -> None:
    """Raise `InputError` when the model did not run fused attention without a mask on a device that can."""
    if of_device.fused and not report.fused:
        raise InputError(
            f"`model.attention`: this device runs {of_device.kernels[0]}, but under the model it ran {report}: slower,"
            " with the scores or a mask in memory; other versions of torch and transformers would work"
            " (constraints.txt)"
        )
