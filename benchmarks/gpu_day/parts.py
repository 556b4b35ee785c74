"""Where the time of a micro-batch goes on this device, part by part, beside what its matrix units and memory can do.

Each part of the night's model runs alone, under bf16: the matrix products by their shapes, attention by its kernels,
the body, the whole micro-batch, clipping, the optimizers. The loss has a benchmark of its own. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from overnight.core.files import atomic_write
from overnight.model import optim
from overnight.model.gpt2 import LanguageModel
from overnight.planning.model_size import flops_per_token
from overnight.recipe.schema import Model, Optim

REPEATS, WARM = {"cuda": 20, "cpu": 1}, {"cuda": 3, "cpu": 1}
KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class Part(NamedTuple):
    """Something to time; `work` is in FLOP, or in bytes where `copies`, and 0 where neither says much."""

    name: str
    call: Callable[[], Any]
    work: float = 0.0
    copies: bool = False


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of one call, by the device's own clock on CUDA."""
    for _ in range(WARM[device.type]):
        call()
    if device.type == "cpu":
        started = time.monotonic()
        call()
        return time.monotonic() - started
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS["cuda"])
    ]
    for before, after in marks:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in marks) / 1000


def measured(part: Part, device: torch.device) -> dict[str, Any]:
    """Milliseconds, TFLOP/s or TB/s, and peak memory; of a part that this device cannot run, why."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = seconds_of(part.call, device)
    except (RuntimeError, NotImplementedError) as error:  # a kernel that it lacks, or memory
        return {"failed": str(error).partition("\n")[0][:200]}
    found = {"ms": 1000 * seconds}
    if part.work:
        found["tb_s" if part.copies else "tflops"] = part.work / seconds / 1e12
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def ceilings(side: int, device: torch.device) -> Iterator[Part]:
    """What the device reaches at best: a large product, and a copy of 16 bytes for each element of its sides."""
    size = 16 * side**2
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    yield Part(f"product of {side:,} x {side:,}", lambda: left @ right, 2 * side**3)
    here = torch.randint(255, (size,), device=device, dtype=torch.uint8)
    there = torch.empty_like(here)
    yield Part("copy", lambda: there.copy_(here), 2 * size, copies=True)


def products(shape: Model, tokens: int, device: torch.device) -> Iterator[Part]:
    """The matrix products of a block: forward, and the gradients of input and weight."""
    width = shape.n_embd
    sides = {
        "qkv": (width, 3 * width),
        "projection": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    for name, (fan_in, fan_out) in sides.items():
        x, w, y = (
            torch.randn(size, device=device, dtype=torch.bfloat16)
            for size in ((tokens, fan_in), (fan_in, fan_out), (tokens, fan_out))
        )
        flops = 2 * tokens * fan_in * fan_out
        yield Part(f"{name}, forward", lambda x=x, w=w: x @ w, flops)
        yield Part(f"{name}, gradient of the input", lambda y=y, w=w: y @ w.T, flops)
        yield Part(f"{name}, gradient of the weight", lambda x=x, y=y: x.T @ y, flops)


def attentions(shape: Model, rows: int, length: int, device: torch.device) -> Iterator[Part]:
    """Causal attention of one block, forward and backward, by each kernel and by SDPA's own choice."""
    size = shape.n_embd // shape.n_head

    def of_all_heads() -> Tensor:
        made = torch.randn(rows, length, shape.n_head, size, device=device, dtype=torch.bfloat16)
        return made.transpose(1, 2)  # (rows, heads, time, size)

    query, key, value = (of_all_heads().requires_grad_() for _ in range(3))
    above = of_all_heads()

    def attend() -> None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (query, key, value), above)

    def attend_by(kernel: SDPBackend) -> None:
        with sdpa_kernel(kernel):
            attend()

    flops = 7 * rows * shape.n_head * length**2 * size  # two products forward, five backward, half of each masked
    yield Part("as SDPA chooses", attend, flops)
    for kernel in KERNELS if device.type == "cuda" else ():
        yield Part(kernel.name, lambda kernel=kernel: attend_by(kernel), flops)


def training(shape: Model, rows: int, length: int, device: torch.device) -> Iterator[Part]:
    """The body, the micro-batch with its loss, and what an update takes once for all of them."""
    model = LanguageModel(shape, 0, compile=device.type == "cuda").to(device)
    tokens = torch.randint(shape.vocab_size, (rows, length + 1), device=device)
    above = torch.randn(rows, length, shape.n_embd, device=device)

    def body() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            out = model.training_body(tokens[:, :-1])
        out.backward(above.to(out.dtype))

    def micro_batch() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()

    yield Part("body", body)
    yield Part("micro-batch", micro_batch, rows * length * flops_per_token(shape, length))
    yield Part("clipping", lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    for optimizer in optim.build(model, Optim()):
        yield Part(f"update, {type(optimizer).__name__}", optimizer.step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--side", type=int, default=8192, help="of the largest matrix product")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    chosen = parser.parse_args()
    device, rows, length = torch.device(chosen.device), chosen.rows, chosen.length
    shape = Model(n_layer=chosen.layers, n_positions=length)
    groups = {
        "ceilings": ceilings(chosen.side, device),
        "matrix products of a block": products(shape, rows * length, device),
        "attention of a block": attentions(shape, rows, length, device),
        "training": training(shape, rows, length, device),
    }
    found: dict[str, dict[str, Any]] = {name: {} for name in groups}
    for group, parts in groups.items():
        for part in parts:
            found[group][part.name] = measured(part, device)
            print(f"{part.name:<34} {found[group][part.name]}", flush=True)
            atomic_write(chosen.json, json.dumps({"rows": rows, "length": length, "groups": found}, indent=1))


if __name__ == "__main__":
    main()
