"""The cards that are not there, and the project's scripts on one of them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from runs import ROOT, train, train_in_a_fresh_process

LIBRARY = ROOT / "build" / "ghost" / "libghost.so"
ON_CARD = str(Path(__file__).resolve().parent / "on_card.py")
PRELOADED = {
    "LD_PRELOAD": str(LIBRARY),
    "LD_LIBRARY_PATH": str(LIBRARY.parent),
    "TRITON_LIBCUDA_PATH": str(LIBRARY.parent),
}


@dataclass(frozen=True)
class Card:
    """What the host sees of a card: its CUDA name, compute capability, multiprocessors, and memory in MiB."""

    name: str
    capability: int
    multiprocessors: int
    mib: int


CARDS = {
    "rtx-3060-12gb": Card("NVIDIA GeForce RTX 3060", 86, 28, 12_288),
    "rtx-3090": Card("NVIDIA GeForce RTX 3090", 86, 82, 24_576),
    "rtx-4060-ti-16gb": Card("NVIDIA GeForce RTX 4060 Ti", 89, 34, 16_380),
    "rtx-4070": Card("NVIDIA GeForce RTX 4070", 89, 46, 12_282),
    "rtx-4070-laptop": Card("NVIDIA GeForce RTX 4070 Laptop GPU", 89, 36, 8_188),
    "rtx-4090": Card("NVIDIA GeForce RTX 4090", 89, 128, 24_564),
    "rtx-5080": Card("NVIDIA GeForce RTX 5080", 120, 84, 16_303),
    "a100-80gb": Card("NVIDIA A100-SXM4-80GB", 80, 108, 81_920),
    "h100-sxm": Card("NVIDIA H100 80GB HBM3", 90, 132, 81_559),
    "b200": Card("NVIDIA B200", 100, 148, 183_359),
    "t4": Card("Tesla T4", 75, 40, 15_360),
    "l4": Card("NVIDIA L4", 89, 58, 23_034),
}
USUAL = CARDS["rtx-4070"]


def settings(card: Card = USUAL, *, computes: str = "all", fault: str | None = None, **more: str) -> dict[str, str]:
    """Environment variables that put a process on `card`; `computes` and `fault` are on_card.py's."""
    chosen = {
        "GHOST_NAME": card.name,
        "GHOST_CAPABILITY": str(card.capability),
        "GHOST_MULTIPROCESSORS": str(card.multiprocessors),
        "GHOST_MIB": str(card.mib),
        "GHOST_COMPUTES": computes,
    }
    return PRELOADED | chosen | ({"GHOST_FAULT": fault} if fault else {}) | more


def run_on(
    card: Card, folder: Path, script: str, *arguments: str, fresh: bool = False, **options
) -> subprocess.CompletedProcess[str]:
    """Run a script of recipes/ in `folder` on `card` to its end; `options` are those of `settings`.

    A `fresh` process imports everything itself: what Triton reads when it is imported can be set for it.
    """
    start = train_in_a_fresh_process if fresh else train
    path = str(ROOT / "recipes" / script)
    return start(folder, path, *arguments, script=ON_CARD, **settings(card, **options))


def train_on(folder: Path, *arguments: str, card: Card = USUAL, **options) -> subprocess.CompletedProcess[str]:
    """Run recipes/train.py on a card."""
    return run_on(card, folder, "train.py", *arguments, **options)


def train_on_cpu(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run recipes/train.py beside it, by the same torch on the CPU."""
    return train(folder, *arguments, CUDA_VISIBLE_DEVICES="")


def note(table: str, **row: object) -> None:
    """Keep a row of a table for table.py."""
    with (LIBRARY.parent / f"{table}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
