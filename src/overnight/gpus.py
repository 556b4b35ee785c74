"""Known graphics cards, and what public runs were measured to reach on them. Nothing here needs torch."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

from overnight.nvml import nvml
from overnight.recipe import InputError


@dataclass(frozen=True)
class Gpu:
    """A row of facts/gpus.csv: vendor figures, with their provenance in the file."""

    name: str
    tflops: float  # dense bf16 with float32 accumulation
    vram_gib: float
    tdp_watts: float


@dataclass(frozen=True)
class Speed:
    """What a card does with a model, and where that is known from."""

    tokens_per_second: float
    source: str


def known_gpus() -> dict[str, Gpu]:
    """The GPUs of facts/gpus.csv by name."""
    return {
        row["name"]: Gpu(
            row["name"],
            float(row["bf16_dense_tflops_fp32_accumulate"]),
            float(row["vram_gib"]),
            float(row["tdp_w"]),
        )
        for row in facts("gpus.csv")
    }


@cache
def facts(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file of the package; lines that begin with `#` are its provenance."""
    with (resources.files("overnight") / "facts" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def gpu_named(name: str) -> Gpu:
    """A known GPU; `InputError` lists them."""
    known = known_gpus()
    if name not in known:
        raise InputError(f"`--gpu {name}` is not known; there are {', '.join(known)}, and --probe measures any other")
    return known[name]


def match_gpu(cuda_name: str, total_gib: float) -> Gpu | None:
    """The known GPU of exactly this CUDA name and memory ("NVIDIA GeForce RTX 4070"), or None.

    Every word must fit: a "4070 Laptop GPU" or a "4070 Ti SUPER" is another card than a 4070.
    """
    words = set(re.findall(r"[a-z0-9]+", cuda_name.lower())) - {"nvidia", "geforce", "tesla", "pcie", "hbm3", "gb"}
    for gpu in known_gpus().values():
        known = {word for word in gpu.name.split("-") if not re.fullmatch(r"\d+gb", word)} - {"sxm"}
        if known == {word for word in words if not re.fullmatch(r"\d+gb|sxm\d?", word)}:
            return gpu if abs(gpu.vram_gib - total_gib) < 0.1 * gpu.vram_gib else None
    return None


def present() -> tuple[str, Gpu | None] | None:
    """The CUDA name of the first card here, from NVML, and the known card that it is; None without one."""
    pynvml = nvml()
    if pynvml is None:
        return None
    try:
        card = pynvml.nvmlDeviceGetHandleByIndex(0)
        name, total = pynvml.nvmlDeviceGetName(card), pynvml.nvmlDeviceGetMemoryInfo(card).total
    except pynvml.NVMLError:
        return None
    return name, match_gpu(name, total / 2**30)


def speed_of(gpu: Gpu, flops_per_token: float) -> Speed:
    """Tokens a second of training, from the measured run on that card whose FLOPs a token are nearest.

    A card without a measured run is taken to reach the share of its peak that an RTX 4070 reached.
    """
    here = list(_measured(gpu.name))
    if here:
        flops, achieved, code = min(here, key=lambda run: abs(math.log(run[0] / flops_per_token)))
        same = abs(flops / flops_per_token - 1) < 0.05
        how = "measured by public runs" if same else f"scaled by FLOPs from {flops / 1e6:.0f}M a token"
        return Speed(achieved / flops_per_token, f"{how}: {code}")
    flops, achieved, code = min(_measured("rtx-4070"), key=lambda run: abs(math.log(run[0] / flops_per_token)))
    share = achieved / (known_gpus()["rtx-4070"].tflops * 1e12)
    source = f"assumed: {share:.0%} of the card's peak, what an RTX 4070 was measured to reach ({code})"
    return Speed(share * gpu.tflops * 1e12 / flops_per_token, source)


def _measured(gpu: str) -> Iterator[tuple[float, float, str]]:
    """(FLOPs a token, FLOP/s, what ran) of every public run on a card."""
    for row in facts("measured_throughput.csv"):
        if row["gpu"] == gpu:
            flops = 1e6 * float(row["flops_per_token_millions"])
            yield flops, flops * float(row["tokens_per_second"]), f"{row['code']}, {row['model']}"
