"""Prints the memory that a training step needs by micro-batch, ours beside the stock one, without a GPU.

One iteration of two accumulated micro-batches and one update is traced with fake tensors: every allocation of the
operators is seen, nothing is computed. What fake tensors cannot see is added by formula, and said apart.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import GPT2Config, GPT2LMHeadModel

from overnight import optim
from overnight.device import GIB
from overnight.model import LanguageModel
from overnight.plan import LOSS_CHUNK, beside_the_tensors, peak_memory
from overnight.recipe import Model, Optim

LIMIT_GIB = 11.0  # what a 12 GB card has left beside a desktop
MIB = 2**20


class Step(NamedTuple):
    """A model with its optimizers, and how it makes a loss of (ids, targets)."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss: Callable[[Tensor, Tensor], Tensor]


def our_step(shape: Model, optimizer: str) -> Step:
    """The model that is trained, with the recipe's optimizers."""
    model = on_the_cpu(lambda: LanguageModel(shape, 0, compile=False))
    return Step(model, optim.build(model, Optim(name=optimizer)), model)  # type: ignore[arg-type]


def stock_step(shape: Model) -> Step:
    """transformers' model as it comes, labels given to it, and AdamW. Dropout is off; no key-value cache is kept."""
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.n_positions,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = on_the_cpu(lambda: GPT2LMHeadModel(config))
    model.tie_weights()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return Step(model, [optimizer], lambda ids, targets: model(ids, labels=targets).loss)


def on_the_cpu(build: Callable[[], nn.Module]) -> nn.Module:
    """A model whose tensors are not initialised; the CPU stands for whatever device, and fake ones cost nothing."""
    with torch.device("meta"):
        model = build()
    made: dict[Tensor, Tensor] = {}  # tied parameters stay tied
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, old in kind.items():
                if old is not None and old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[old] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new
                if old is not None:
                    kind[name] = made[old]  # type: ignore[assignment]
    return model


def iteration(step: Step, rows: int, length: int, precision: torch.dtype, tracker: MemTracker | None = None) -> None:
    """Two micro-batches accumulated, then clipping and an update, as training does it."""
    for _ in range(2):
        if tracker:
            tracker.reset_mod_stats()  # it takes one forward of a module only; the peak is kept
        tokens = torch.zeros(rows, length + 1, dtype=torch.int64)
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            loss = step.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    nn.utils.clip_grad_norm_(step.model.parameters(), 1.0)
    for optimizer in step.optimizers:
        optimizer.step()
    step.model.zero_grad(set_to_none=True)


def traced_peak(
    build: Callable[[], Step],
    rows: int,
    length: int,
    *,
    precision: torch.dtype = torch.bfloat16,
    chunk: int = LOSS_CHUNK["cuda, eager"],
) -> int:
    """Bytes of all tensors at the peak of an iteration, the optimizers' state being there before it."""
    with FakeTensorMode(), loss_chunk(chunk):
        step = build()
        iteration(step, 1, length, precision)  # makes the optimizers' state
        tracker = MemTracker()
        tracker.track_external(step.model, *step.optimizers)
        with tracker:
            iteration(step, rows, length, precision, tracker)
        return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())


@contextlib.contextmanager
def loss_chunk(rows: int) -> Iterator[None]:
    """The chunk of another device on this one."""
    before = LOSS_CHUNK["cpu"]
    LOSS_CHUNK["cpu"] = rows
    try:
        yield
    finally:
        LOSS_CHUNK["cpu"] = before


def allocated_peak(run: Callable[[], object]) -> int:
    """Bytes that `run` had really allocated at once, beyond what was there, as the CPU allocator records it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 64], help="micro-batches of 1,024 tokens")
    rows_asked = parser.parse_args().rows
    shape = Model()
    print(f"{shape.n_layer} x {shape.n_embd}, {shape.n_head} heads, vocabulary {shape.vocab_size:,}, bf16 autocast,")
    print("eager, two micro-batches accumulated and an update; MiB\n")
    print(f"{'':14} {'rows':>5} {'traced':>8} {'added':>7} {'peak':>8} {'peak_memory() for traced':>25}")
    sides: dict[str, Callable[[], Step]] = {
        "ours, Muon": lambda: our_step(shape, "muon"),
        "ours, AdamW": lambda: our_step(shape, "adamw"),
        "stock, AdamW": lambda: stock_step(shape),
    }
    fitting: dict[str, int] = {}
    for name, build in sides.items():
        for rows in rows_asked:
            traced = traced_peak(build, rows, 1024)
            added = beside_the_tensors(shape, rows, traced)
            peak = traced + sum(added.values())
            formula = ""
            if name.startswith("ours"):
                optimizer = "muon" if "Muon" in name else "adamw"
                by_formula = peak_memory(shape, rows, optimizer=optimizer, compiled=False)
                formula = f"{by_formula / MIB:,.0f} ({by_formula / traced - 1:+.1%})"
            print(
                f"{name:14} {rows:5} {traced / MIB:8,.0f} {sum(added.values()) / MIB:7,.0f} {peak / MIB:8,.0f}"
                f" {formula:>25}",
                flush=True,
            )
            if peak <= LIMIT_GIB * GIB:
                fitting[name] = max(rows, fitting.get(name, 0))
    print(f"\nadded by formula at {rows} rows of the last line:")
    for what, size in added.items():
        print(f"  {size / MIB:6,.0f}  {what}")
    said = ", ".join(f"{name}: {fitting.get(name, 0)}" for name in sides)
    print(f"\nlargest of these micro-batches under {LIMIT_GIB:g} GiB: {said}")


if __name__ == "__main__":
    main()
