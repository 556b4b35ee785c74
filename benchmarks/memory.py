"""Prints the memory that a training step needs by micro-batch, ours beside the stock one, without a GPU.

One iteration of two accumulated micro-batches and one update is traced with fake tensors: every allocation of the
operators is seen, nothing is computed. What fake tensors cannot see is added by formula, and said apart.

With --device cuda our own step runs, eager and compiled, and the formula stands beside what PyTorch's allocator says.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import GPT2Config, GPT2LMHeadModel

from overnight.device.device import GIB, keep_large_blocks_whole
from overnight.model import optim
from overnight.model.gpt2 import LanguageModel
from overnight.planning.model_size import LOSS_CHUNK, beside_the_tensors, peak_memory
from overnight.recipe.schema import Model, Optim

LIMIT_GIB = 11.0  # what a 12 GB card has left beside a desktop
MIB = 2**20
SHAPES = {
    "40M": Model(),
    "124M": Model(n_head=12, n_embd=768),
    "quickstart": Model(n_layer=4, n_head=4, n_embd=128, n_positions=256, vocab_size=4096),
}


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


def iteration(
    step: Step,
    rows: int,
    length: int,
    precision: torch.dtype,
    tracker: MemTracker | None = None,
    *,
    device: str = "cpu",
) -> None:
    """Two micro-batches accumulated, then clipping and an update, as training does it."""
    for _ in range(2):
        if tracker:
            tracker.reset_mod_stats()  # it takes one forward of a module only; the peak is kept
        tokens = torch.zeros(rows, length + 1, dtype=torch.int64, device=device)
        with torch.autocast(device, dtype=precision, enabled=precision != torch.float32):
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
    chunk: int = LOSS_CHUNK["cuda", False],
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
    before = LOSS_CHUNK["cpu", False]
    LOSS_CHUNK["cpu", False] = rows
    try:
        yield
    finally:
        LOSS_CHUNK["cpu", False] = before


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


class Case(NamedTuple):
    """What is trained on CUDA, and how."""

    shape: str
    optimizer: str
    compiled: bool
    bf16: bool = True

    def __str__(self) -> str:
        precision = "" if self.bf16 else ", float32"
        return f"{self.shape}, {self.optimizer}, {'compiled' if self.compiled else 'eager'}{precision}"


CASES = [Case(*case) for case in itertools.product(SHAPES, ("muon", "adamw"), (False, True))]
CASES += [Case("40M", "muon", compiled, bf16=False) for compiled in (False, True)]


def on_cuda(case: Case, sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    """(rows, bytes of tensors, bytes reserved) at the peak of an iteration, by PyTorch's own allocator."""
    torch._dynamo.reset()
    shape, precision = SHAPES[case.shape], torch.bfloat16 if case.bf16 else torch.float32
    model = LanguageModel(shape, 0, compile=case.compiled).to("cuda").train()
    step = Step(model, optim.build(model, Optim(name=case.optimizer)), model)  # type: ignore[arg-type]
    for rows in sizes:
        iteration(step, rows, shape.n_positions, precision, device="cuda")
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            iteration(step, rows, shape.n_positions, precision, device="cuda")
        yield rows, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def by_formula(case: Case, rows: int) -> tuple[int, int]:
    """(bytes of tensors, bytes reserved): of the formula only the context is left out, which no allocator knows."""
    shape = SHAPES[case.shape]
    tensors = peak_memory(
        shape,
        rows,
        sequence_length=shape.n_positions,
        optimizer=case.optimizer,
        compiled=case.compiled,
        bf16=case.bf16,
    )
    _context, *beside = beside_the_tensors(tensors, compiled=case.compiled).values()
    return tensors, tensors + sum(beside)


def compare_on_cuda(cases: list[Case], asked: list[int]) -> None:
    """The table of --device cuda."""
    keep_large_blocks_whole(os.environ)
    print("the formula, and how far it is from what PyTorch's allocator holds; the CUDA context left out; MiB\n")
    print(f"{'':32} {'rows':>5} {'tensors':>8} {'formula':>16} {'reserved':>9} {'formula':>16}")
    for case in cases:
        sizes = [rows * 1024 // SHAPES[case.shape].n_positions for rows in asked]
        for rows, tensors, reserved in on_cuda(case, sizes):
            formula, whole = by_formula(case, rows)
            print(
                f"{case!s:32} {rows:5} {tensors / MIB:8,.0f} {formula / MIB:7,.0f} ({formula / tensors - 1:+.1%})"
                f" {reserved / MIB:9,.0f} {whole / MIB:7,.0f} ({whole / reserved - 1:+.1%})",
                flush=True,
            )


def compare_with_stock(asked: list[int]) -> None:
    """The table of fake tensors, and which micro-batches fit a 12 GB card."""
    shape = SHAPES["40M"]
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
        for rows in asked:
            traced = traced_peak(build, rows, 1024)
            added = beside_the_tensors(traced, compiled=False)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 64], help="micro-batches of 1,024 tokens")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=(names := list(map(str, CASES))), default=names, help="on CUDA")
    chosen = parser.parse_args()
    if chosen.device == "cuda":
        compare_on_cuda([case for case in CASES if str(case) in chosen.cases], chosen.rows)
        return
    compare_with_stock(chosen.rows)


if __name__ == "__main__":
    main()
