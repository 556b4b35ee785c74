"""Which micro-batch fits a card, by the formula of model_size.py, and what it takes of the card's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from overnight.errors import InputError
from overnight.planning.gpus import Gpu
from overnight.planning.model_size import Derived, derive, memory_gib, next_divisor
from overnight.recipe.schema import Recipe


@dataclass(frozen=True)
class Memory:
    """What a micro-batch takes of the card, and where that is known from."""

    micro_batch: int  # rows
    peak_gib: float
    source: str


def by_formula(recipe: Recipe, gpu: Gpu) -> Memory:
    """The largest micro-batch that fits 90 % of a card by the formula, and its peak; `InputError` if none does."""
    bf16 = gpu.bf16 and recipe.precision != "fp32"
    gib_of = partial(memory_gib, recipe, compiled=recipe.compile is not False, bf16=bf16)
    rows = largest_fitting(derive(recipe, "cuda", 1, None), 0.9 * gpu.vram_gib, gib_of)
    if not rows:
        raise InputError(
            f"`model`: not one row fits the {gpu.vram_gib:g} GiB of {gpu.name}; a smaller `model.n_embd` would"
        )
    return Memory(rows, gib_of(rows), "by the formula; not measured")


def largest_fitting(derived: Derived, limit_gib: float, gib_of: Callable[[int], float]) -> int:
    """The largest divisor of a process's rows, from the first micro-batch down, that takes no more; 0 if none does."""
    size = derived.first_micro_batch
    while size and gib_of(size) > limit_gib:
        size = next_divisor(derived.rows_per_process, size - 1)
    return size
