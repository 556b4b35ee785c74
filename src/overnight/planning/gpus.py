"""Known graphics cards, and which of them is at hand. Nothing here needs torch."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from pydantic import BaseModel

from overnight.errors import InputError

USUAL = "rtx-4070"  # the card that the recipes are written for


class Gpu(BaseModel, frozen=True):
    """A row of facts/gpus.csv: vendor figures, with their provenance in the file."""

    name: str
    cuda_name: str  # as CUDA and NVML say it, without "NVIDIA "
    compute_capability: float
    tflops: float  # dense bf16 with float32 accumulation; float32 where there is no bf16
    fp32_tflops: float  # outside of the matrix units
    memory_bandwidth_gb_s: float
    vram_gib: float
    tdp_watts: float

    @property
    def bf16(self) -> bool:
        """Whether the card has matrix units for bf16; otherwise a recipe trains in float32."""
        return self.compute_capability >= 8.0


@dataclass(frozen=True)
class Speed:
    """What a card does with a model, and where that is known from."""

    tokens_per_second: float
    source: str
    at_most: bool = False  # launches, which no estimate counts, may take longer than the work


@cache
def known_gpus() -> dict[str, Gpu]:
    """The GPUs of facts/gpus.csv by name."""
    return {row["name"]: Gpu.model_validate(row) for row in facts("gpus.csv")}


@cache
def facts(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file of the package."""
    return rows_of((resources.files("overnight") / "facts" / name).read_text(encoding="utf-8"))


def rows_of(table: str) -> list[dict[str, str]]:
    """The rows of a CSV file's text; lines that begin with `#` are its provenance."""
    return list(csv.DictReader(line for line in table.splitlines() if not line.startswith("#")))


def gpu_named(name: str) -> Gpu:
    """A known GPU, as people call it: `rtx-4070`, `RTX 4070`, `4070`; `InputError` lists them."""
    known = known_gpus()
    called = "-".join(word for word in re.split(r"[\s_-]+", name.lower()) if word not in ("nvidia", "geforce"))
    name = next((each for each in (called, f"rtx-{called}") if each in known), name)
    if name not in known:
        raise InputError(
            f"`--gpu {name}` is not known; a plan is for one of {', '.join(known)}, and --probe measures any other"
        )
    return known[name]


def match_gpu(cuda_name: str, total_gib: float) -> Gpu | None:
    """The known GPU of exactly this CUDA name ("NVIDIA GeForce RTX 4070") and memory, or None.

    A "4070 Laptop GPU" or a "4070 Ti SUPER" is another card than a 4070, and so is a 4060 Ti of twice the memory. CUDA
    counts up to a tenth less than the vendor where a part holds error correction.
    """
    same_name = [gpu for gpu in known_gpus().values() if gpu.cuda_name == cuda_name.removeprefix("NVIDIA ")]
    return next((gpu for gpu in same_name if abs(gpu.vram_gib - total_gib) < 0.1 * gpu.vram_gib), None)
