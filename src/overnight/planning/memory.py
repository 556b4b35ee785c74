"""Which micro-batch fits a card, by the formula of plan.py, and what it takes of the card's memory."""

from __future__ import annotations

from dataclasses import dataclass

from overnight.errors import InputError
from overnight.planning.gpus import Gpu
from overnight.planning.model_size import derive, memory_gib, next_divisor
from overnight.recipe.schema import Recipe


@dataclass(frozen=True)
class Memory:
    """What a micro-batch takes of the card, and where that is known from."""

    micro_batch: int  # rows
    peak_gib: float
    source: str


def by_formula(recipe: Recipe, gpu: Gpu) -> Memory:
    """The largest micro-batch that the formula lets fit a card; `InputError` if none does."""
    return Memory(*fitting(recipe, gpu), "by the formula; not measured")


def fitting(recipe: Recipe, gpu: Gpu) -> tuple[int, float]:
    """The largest micro-batch that fits 90 % of a card by the formula, and its peak in GiB; InputError if none does."""
    rows, length = derive(recipe, "cuda", 1, None).rows_per_process, recipe.batch.sequence_length
    at_most = rows if recipe.batch.micro_batch == "auto" else recipe.batch.micro_batch
    bf16 = gpu.bf16 and recipe.precision != "fp32"
    size = next_divisor(rows, min(at_most, 64 * max(1, 1024 // length)))
    while size:
        gib = memory_gib(recipe, size, compiled=recipe.compile is not False, bf16=bf16)
        if gib <= 0.9 * gpu.vram_gib:
            return size, gib
        size = next_divisor(rows, size // 2)
    raise InputError(
        f"`model`: not one row fits the {gpu.vram_gib:g} GiB of {gpu.name}; a smaller `model.n_embd` would"
    )
