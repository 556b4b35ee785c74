"""Times a training step of ours against transformers' Trainer and nanoGPT, taking turns.

Every side trains a GPT-2 of the same shape on the same micro-batch of random tokens with fused AdamW, dropout 0,
gradients cut to norm 1, and whatever allocator this script is started under. On the CPU that is in float32, each round
is a fresh process, CPU-seconds are those of the whole process during its measured steps, and peak memory is the largest
resident set of the whole process. With --device cuda it is in bf16 with all models compiled, each side is one process
that waits while it is not its turn, so that it compiles once, and seconds and the allocator's peak count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from training_parts import PARTS, Figures  # the scripts beside this one
from training_sides import SIDES, VOCABULARY, shape_of

from overnight.core.files import atomic_write

SPEED_SHAPES = ("2x1024", "4x256")  # rows x tokens of one step
MEMORY_SHAPES = ("2x1024", "4x1024")
CUDA_SHAPES = ("32x1024",)
OUT_OF_MEMORY = 12  # the exit code of a side; ENOMEM
PAIRS, STEPS = {"cpu": 7, "cuda": 3}, {"cpu": 3, "cuda": 60}  # of a step of seconds, and of one of milliseconds


def arguments() -> argparse.Namespace:
    """The command line, for the parent and for its children."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, help="rounds of each side; 6 or more give an interval (7, on CUDA 3)")
    parser.add_argument("--shape", action="append", metavar="ROWSxTOKENS", help="only this; may be given repeatedly")
    parser.add_argument("--steps", type=int, help="measured steps of a round, after one that is not (3, on CUDA 60)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of karpathy/nanoGPT to time as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what each round took, too")
    parser.add_argument("--child", choices=(*SIDES, *PARTS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.pairs, chosen.steps = chosen.pairs or PAIRS[chosen.device], chosen.steps or STEPS[chosen.device]
    return chosen


def child(args: argparse.Namespace, name: str, shape: str, steps: int | None = None) -> subprocess.Popen[str]:
    """A fresh process of this script that is one side or part."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", name, "--shape", shape]
    command += ["--steps", str(steps or args.steps), "--pairs", str(args.pairs), "--threads", str(args.threads)]
    command += ["--device", args.device, "--layers", str(args.layers), "--width", str(args.width)]
    command += ["--nanogpt", str(args.nanogpt)] if args.nanogpt else []
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> Figures | None:
    """What a side's next round took, or what a part found; None when the process has ended without a word."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("go\n")
        process.stdin.flush()
    line = process.stdout.readline()
    return json.loads(line) if line else None


def part(args: argparse.Namespace, name: str, shape: str, steps: int | None = None) -> Figures:
    """What one of training_parts.py found."""
    with child(args, name, shape, steps) as process:
        found = answer(process)
    if found is None:
        sys.exit(f"the process of '{name}' failed")
    return found


def rounds(args: argparse.Namespace, shape: str) -> dict[str, list[Figures]]:
    """The figures of every side's rounds, `tokens` of a step among them.

    A side that a card's memory does not hold continues with half of the rows; one that fails otherwise is left out.
    """
    sides, (rows, length) = [side for side in SIDES if args.nanogpt or side != "nanogpt"], shape_of(shape)
    found: dict[str, list[Figures]] = {side: [] for side in sides}
    sizes = dict.fromkeys(sides, rows)
    with contextlib.ExitStack() as stack:
        waiting: dict[str, subprocess.Popen[str]] = {}
        for pair, side in in_turns(args.pairs, sides):
            if side not in found:
                continue
            if side not in waiting:
                waiting[side] = stack.enter_context(child(args, side, shape))
            figures = answer(waiting[side])
            while figures is None and waiting[side].wait() == OUT_OF_MEMORY and sizes[side] > 1:
                sizes[side] //= 2
                waiting[side] = stack.enter_context(child(args, side, f"{sizes[side]}x{length}"))
                figures = answer(waiting[side])
            print(f"{shape} pair {pair + 1}: {side} {figures or 'failed'}", file=sys.stderr, flush=True)
            if args.device == "cpu":
                waiting.pop(side).communicate()  # its memory is the next one's
            if figures is None:
                del found[side]
            else:
                found[side].append(figures | {"tokens": sizes[side] * length})
    return found


def in_turns(pairs: int, sides: list[str]) -> Iterator[tuple[int, str]]:
    """Who comes next, the order reversed in every other pair."""
    for pair in range(pairs):
        yield from ((pair, side) for side in (sides if pair % 2 == 0 else sides[::-1]))


def median_interval(values: list[float]) -> tuple[float, float, float] | None:
    """The order-statistic interval of a median: (low, high, its exact coverage), the narrowest of at least 95 %.

    None below six values, which cannot give 95 %.
    """
    ordered, n, found = sorted(values), len(values), None
    for cut in range(n // 2):
        coverage = 1 - 2 * sum(math.comb(n, k) for k in range(cut + 1)) / 2**n
        if coverage >= 0.95:
            found = ordered[cut], ordered[n - 1 - cut], coverage
    return found


def compare(args: argparse.Namespace, shape: str) -> dict[str, list[Figures]]:
    """The pairs at one shape, and what they say."""
    found = rounds(args, shape)
    if "ours" not in found:
        sys.exit(f"our own step failed at {shape}")
    limit = part(args, "gemm", shape) if args.device == "cpu" else None
    said = " x ".join(shape.split("x"))
    print(f"\n{said} tokens a step, {args.pairs} pairs, {args.steps} steps each after a first, not counted")
    print(
        f"{'':8} {'tokens a step':>13} {'CPU-s a step':>12} {'tokens/CPU-s':>13} {'tokens/s':>9} {'of GEMM limit':>14}"
        f" {'peak MiB':>9}"
    )
    for side, each in found.items():
        tokens, cpu, seconds, peak = (
            statistics.median(figures[key] for figures in each)
            for key in ("tokens", "cpu_seconds", "seconds", "peak_mib")
        )
        share = f"{limit['cpu_seconds'] / cpu:.0%}" if limit else "-"
        rates = f"{tokens / cpu:13.1f} {tokens / seconds:9.1f}"
        print(f"{side:8} {tokens:13,.0f} {cpu:12.2f} {rates} {share:>14} {peak:9,.0f}")
    if limit:
        print(
            f"GEMM limit at these shapes: {limit['gflop']:.0f} GFLOP in {limit['cpu_seconds']:.2f} CPU-s,"
            f" {limit['gflop'] / limit['cpu_seconds']:.1f} GFLOP a CPU-s (attention's own products not counted)"
        )
    for side in [side for side in found if side != "ours"]:
        print_ratio(found["ours"], side, found[side], "seconds" if args.device == "cuda" else "cpu_seconds")
    sys.stdout.flush()
    return found


def print_ratio(ours: list[Figures], side: str, theirs: list[Figures], key: str) -> None:
    """How many tokens ours makes in the time of another, and in what memory."""
    ratios = [a["tokens"] / a[key] / (b["tokens"] / b[key]) for a, b in zip(ours, theirs, strict=True)]
    interval, said = median_interval(ratios), "no 95 % interval below 6 pairs"
    if interval:
        low, high, coverage = interval
        said = f"95 % interval {low:.3f} to {high:.3f} (order statistics, coverage {coverage:.1%})"
    unit = "second" if key == "seconds" else "CPU-second"
    print(f"tokens per {unit}, ours / {side}: median paired ratio {statistics.median(ratios):.3f}, {said}")
    print("  pairs: " + " ".join(f"{ratio:.3f}" for ratio in ratios))
    print(f"peak memory, ours / {side}: {memory_ratio(ours, theirs):.3f}")


def memory_ratio(left: list[Figures], right: list[Figures]) -> float:
    """Median peak of one side over that of the other."""
    return statistics.median(a["peak_mib"] for a in left) / statistics.median(b["peak_mib"] for b in right)


def compare_memory(args: argparse.Namespace, shape: str) -> None:
    """Peaks alone, one process and one step of each side."""
    alone = argparse.Namespace(**vars(args) | {"pairs": 1, "steps": 1})
    found = rounds(alone, shape)
    said = ", ".join(f"{side} {each[0]['peak_mib']:,.0f} MiB" for side, each in found.items())
    ratios = ", ".join(
        f"ours / {side} {memory_ratio(found['ours'], each):.3f}" for side, each in found.items() if side != "ours"
    )
    print(f"\npeak memory at {' x '.join(shape.split('x'))}, one process each: {said}; {ratios}")


def print_parts(args: argparse.Namespace, first: str, last: str) -> None:
    """Where the time of our step and of a whole iteration goes, on a CPU."""
    parts = part(args, "iteration", first, 2)
    seconds = parts.pop("seconds")
    said = ", ".join(f"{name} {share:.2%}" for name, share in parts.items())
    print(
        f"an iteration of four micro-batches of {' x '.join(first.split('x'))} with Muon: {seconds:.1f} s; {said};"
        f" everything else {1 - sum(parts.values()):.2%}"
    )
    shares = ", ".join(f"{name} {share:.1%}" for name, share in part(args, "profile", last).items())
    print(f"where our step of {' x '.join(last.split('x'))} spends its time: {shares}")


def print_conditions(args: argparse.Namespace) -> None:
    """What the figures depend on."""
    shape = f"{args.layers} x {args.width}, vocabulary {VOCABULARY:,}"
    if args.device == "cuda":
        print(f"{shape}, bf16, all compiled")
        return
    allocator = {name: value for name, value in os.environ.items() if name == "LD_PRELOAD" or name.startswith("MALLOC")}
    print(f"{shape}, float32, {args.threads} threads of {cpu_name()}")
    print(f"allocator on all sides: {allocator or platform.libc_ver()[0] + ' as it comes'}")


def main() -> None:
    args = arguments()
    if args.child:
        serve(args)
        return
    print_conditions(args)
    shapes = args.shape or (CUDA_SHAPES if args.device == "cuda" else SPEED_SHAPES)
    found: dict[str, Any] = {"shapes": {}}
    for shape in shapes:
        found["shapes"][shape] = compare(args, shape)
    if args.device == "cpu" and not args.shape:
        for shape in (shape for shape in MEMORY_SHAPES if shape not in shapes):
            compare_memory(args, shape)
    found["update"] = muon = part(args, "muon", shapes[-1])
    print(
        f"\nan update with Muon: {muon['update_cpu_seconds']:.2f} CPU-s, {muon['update_seconds']:.4f} s;"
        " once for every iteration, however many micro-batches"
    )
    if args.device == "cpu":
        print_parts(args, shapes[0], shapes[-1])
    if args.json:
        atomic_write(args.json, json.dumps(found, indent=1))


def serve(args: argparse.Namespace) -> None:
    """What a child does; whatever else its libraries print goes to standard error."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):
        if args.child in PARTS:
            print(json.dumps(PARTS[args.child](args)), file=sys.__stdout__, flush=True)
            return
        try:
            SIDES[args.child](args)
        except torch.cuda.OutOfMemoryError:
            sys.exit(OUT_OF_MEMORY)


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
