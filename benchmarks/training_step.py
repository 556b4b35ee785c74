"""Times a training step of ours against transformers' Trainer and nanoGPT, in alternating pairs of fresh processes.

Every side trains a GPT-2 of the same shape on the same micro-batch of random tokens with fused AdamW, dropout 0,
gradients cut to norm 1, and whatever allocator this script is started under. On the CPU that is in float32, CPU-seconds
are those of the whole process during its measured steps, and peak memory is the largest resident set of the whole
process. With --device cuda it is in bf16 with both models compiled, and seconds and the allocator's peak count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

SIDES = ("ours", "trainer", "nanogpt")
SPEED_SHAPES = ((2, 1024), (4, 256))  # rows x tokens of one step
MEMORY_SHAPES = ((2, 1024), (4, 1024))
CUDA_SHAPE = (8, 1024)
VOCABULARY = 50_257


def arguments() -> argparse.Namespace:
    """The command line, for the parent and for its children."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="pairs of fresh processes at each shape; 6 or more")
    parser.add_argument("--shape", action="append", metavar="ROWSxTOKENS", help="only this; may be given repeatedly")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process, after one that is not")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of karpathy/nanoGPT to time as well")
    parser.add_argument("--child", choices=(*SIDES, "muon", "gemm", "profile", "iteration"), help=argparse.SUPPRESS)
    return parser.parse_args()


def shape_of(text: str) -> tuple[int, int]:
    """'2x1024' as (rows, tokens of a row)."""
    rows, length = text.split("x")
    return int(rows), int(length)


# --- the children: each prints one JSON object as its last line ---


class Meter:
    """CPU and wall seconds between the end of the first step and the end of the last."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        """Call after every step."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        self.marks.append((time.process_time(), time.monotonic()))

    def result(self) -> dict[str, float]:
        """Seconds of one step, and the process's peak memory in MiB."""
        steps = len(self.marks) - 1
        (cpu_0, wall_0), (cpu_1, wall_1) = self.marks[0], self.marks[-1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)
        if self.cuda:
            import torch

            peak = torch.cuda.max_memory_reserved() / 2**20
        return {"cpu_seconds": (cpu_1 - cpu_0) / steps, "seconds": (wall_1 - wall_0) / steps, "peak_mib": peak}


def model_shape(args: argparse.Namespace):
    """Our model's shape, with heads of 64."""
    from overnight.recipe import Model

    return Model(n_layer=args.layers, n_head=args.width // 64, n_embd=args.width, vocab_size=VOCABULARY)


def our_step(args: argparse.Namespace, optimizer: str) -> Callable[[], None]:
    """One micro-batch through forward, backward, clipping and update, as `overnight.train.train_step` does it."""
    import torch
    from accelerate import Accelerator
    from torch import nn

    from overnight import optim
    from overnight.model import LanguageModel
    from overnight.recipe import Optim

    cuda = args.device == "cuda"
    accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")
    model = LanguageModel(model_shape(args), VOCABULARY - 1, compile=cuda)
    prepared = accelerator.prepare(model)
    optimizers = optim.build(model, Optim(name=optimizer, lr=1e-4))
    rows, length = shape_of(args.shape[0])
    tokens = torch.randint(VOCABULARY, (rows, length + 1), device=args.device)

    def step() -> None:
        loss = prepared(tokens[:, :-1], tokens[:, 1:]) * (1 / (rows * length))
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        started = time.process_time(), time.monotonic()
        for each in optimizers:
            each.step()
        step.update = time.process_time() - started[0], time.monotonic() - started[1]  # type: ignore[attr-defined]
        model.zero_grad(set_to_none=True)

    return step


def ours(args: argparse.Namespace, optimizer: str = "adamw") -> dict[str, float]:
    """Our step; the update's own seconds are the last step's."""
    step, meter = our_step(args, optimizer), Meter(args.device)
    for _ in range(args.steps + 1):
        step()
        meter.mark()
    cpu, wall = step.update  # type: ignore[attr-defined]
    return meter.result() | {"update_cpu_seconds": cpu, "update_seconds": wall}


def trainer(args: argparse.Namespace) -> dict[str, float]:
    """`transformers.Trainer` with the stock model and its own default AdamW."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    meter = Meter(args.device)

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            meter.mark()

    rows, length = shape_of(args.shape[0])
    config = GPT2Config(
        n_layer=args.layers, n_head=args.width // 64, n_embd=args.width, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    tokens = torch.randint(VOCABULARY, ((args.steps + 1) * rows, length))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps + 1,
            per_device_train_batch_size=rows,
            learning_rate=1e-4,
            max_grad_norm=1.0,
            use_cpu=args.device == "cpu",
            bf16=args.device == "cuda",
            torch_compile=args.device == "cuda",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} for row in tokens]
        Trainer(model=GPT2LMHeadModel(config), args=settings, train_dataset=data, callbacks=[AfterStep()]).train()
    return meter.result()


def nanogpt(args: argparse.Namespace) -> dict[str, float]:
    """nanoGPT's model and optimizer as its `train.py` uses them; compiled on CUDA alone."""
    import torch

    sys.path.insert(0, str(args.nanogpt))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]  # the checkout's

    heads = args.width // 64
    config = GPTConfig(
        n_layer=args.layers, n_head=heads, n_embd=args.width, vocab_size=50_304, block_size=1024, dropout=0.0, bias=True
    )
    model, meter = GPT(config).to(args.device), Meter(args.device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), args.device)
    run = torch.compile(model) if args.device == "cuda" else model
    rows, length = shape_of(args.shape[0])
    tokens = torch.randint(VOCABULARY, (rows, length + 1), device=args.device)
    for _ in range(args.steps + 1):
        with torch.autocast("cuda", torch.bfloat16, enabled=args.device == "cuda"):
            _, loss = run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.mark()
    return meter.result()


def gemm(args: argparse.Namespace) -> dict[str, float]:
    """CPU-seconds that this machine's GEMM needs for the matrix products of one step, attention's own left out.

    Each weight takes part in three products: forward, and the gradients of its input and of itself.
    """
    import torch

    rows, length = shape_of(args.shape[0])
    n, width = rows * length, args.width
    block = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    weights = [(side, args.layers) for side in block] + [((width, VOCABULARY // 64 * 64 + 64), 1)]
    total = flops = 0.0
    for (fan_in, fan_out), count in weights:
        x, w, y = torch.randn(n, fan_in), torch.randn(fan_in, fan_out), torch.randn(n, fan_out)
        out_x, out_w = torch.empty_like(x), torch.empty_like(w)
        if fan_out > 50_000:  # the head's weight lies the other way round
            w, out_w = torch.randn(fan_out, fan_in).T, torch.empty(fan_out, fan_in).T
        products = [(x, w, torch.empty_like(y)), (y, w.T, out_x), (x.T, y, out_w)]
        for left, right, out in products:
            torch.mm(left, right, out=out)
            seconds = []
            for _ in range(5):
                started = time.process_time()
                torch.mm(left, right, out=out)
                seconds.append(time.process_time() - started)
            total += min(seconds) * count
            flops += 2 * n * fan_in * fan_out * count
    return {"cpu_seconds": total, "gflop": flops / 1e9}


GROUPS = {  # the first whose words occur in an operator's name
    "attention": ("scaled_dot_product",),
    "GEMM": ("aten::mm", "aten::addmm"),
    "softmax and loss": ("softmax", "aten::max", "scatter", "gather", "aten::log", "aten::sum", "fill_"),
    "AdamW": ("adam",),
    "gelu": ("gelu",),
    "layer norm": ("layer_norm",),
    "embedding": ("embedding",),
    "clipping": ("norm", "foreach"),
    "copies, additions": ("copy", "add", "mul", "cat", "zero"),
}


def profile(args: argparse.Namespace) -> dict[str, float]:
    """Share of each group of operators in the CPU time of one step of ours."""
    import torch

    step = our_step(args, "adamw")
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        group = next((name for name, words in GROUPS.items() if any(w in event.key for w in words)), "the rest")
        spent[group] += event.self_cpu_time_total
    return {name: time / sum(spent.values()) for name, time in sorted(spent.items(), key=lambda item: -item[1])}


def iteration(args: argparse.Namespace) -> dict[str, float]:
    """One whole iteration of the product with Muon, four micro-batches, and the share of each part of it."""
    from overnight.probe import random_shards
    from overnight.recipe import Batch, Recipe, Schedule
    from overnight.rundir import RunDirectory
    from overnight.startup import assemble, launch
    from overnight.train import train_step

    rows, length = shape_of(args.shape[0])
    recipe = Recipe(
        model=model_shape(args),
        batch=Batch(tokens_per_iter=4 * rows * length, sequence_length=length, micro_batch=rows),
        schedule=Schedule(max_iters=100, warmup_iters=10),
        threads=args.threads,
    )
    spent: dict[str, float] = defaultdict(float)

    def timed(part: str, function: Callable) -> Callable:
        def call(*given, **named):
            started = time.monotonic()
            result = function(*given, **named)
            spent[part] += time.monotonic() - started
            return result

        return call

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        accelerator, console = launch(recipe)
        shards = random_shards(Path(folder), recipe)
        run = assemble(recipe, accelerator, console, RunDirectory(recipe, Path(folder)), shards)
        run.model.forward = timed("forward", run.model.forward)  # type: ignore[method-assign]
        accelerator.backward = timed("backward", accelerator.backward)  # type: ignore[method-assign]
        for optimizer in run.optimizers:
            optimizer.step = timed("optimizer", optimizer.step)  # type: ignore[method-assign]
        train_step(run)
        spent.clear()
        started = time.monotonic()
        for _ in range(args.steps):
            train_step(run)
        total = time.monotonic() - started
    return {"seconds": total / args.steps} | {part: seconds / total for part, seconds in spent.items()}


# --- the parent ---


def run_child(args: argparse.Namespace, child: str, shape: tuple[int, int], steps: int) -> dict[str, float]:
    """One fresh process of this script."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", child, "--shape", f"{shape[0]}x{shape[1]}"]
    command += ["--steps", str(steps), "--threads", str(args.threads), "--device", args.device]
    command += ["--layers", str(args.layers), "--width", str(args.width)]
    command += ["--nanogpt", str(args.nanogpt)] if args.nanogpt else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the process of '{child}' failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


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


def compare(args: argparse.Namespace, shape: tuple[int, int], sides: tuple[str, ...]) -> None:
    """The pairs at one shape, and what they say."""
    rows, length = shape
    results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for pair in range(args.pairs):
        for side in sides if pair % 2 == 0 else sides[::-1]:
            results[side].append(run_child(args, side, shape, args.steps))
            print(f"{rows}x{length} pair {pair + 1}: {side} {results[side][-1]}", file=sys.stderr, flush=True)
    cuda = args.device == "cuda"
    limit = None if cuda else run_child(args, "gemm", shape, 1)
    print(f"\n{rows} x {length} tokens a step, {args.pairs} pairs, {args.steps} steps each after a first, not counted")
    print(f"{'':8} {'CPU-s a step':>12} {'tokens/CPU-s':>13} {'tokens/s':>9} {'of GEMM limit':>14} {'peak MiB':>9}")
    for side in sides:
        cpu, seconds, peak = (
            statistics.median(each[key] for each in results[side]) for key in ("cpu_seconds", "seconds", "peak_mib")
        )
        tokens = rows * length
        share = f"{limit['cpu_seconds'] / cpu:.0%}" if limit else "-"
        print(f"{side:8} {cpu:12.2f} {tokens / cpu:13.1f} {tokens / seconds:9.1f} {share:>14} {peak:9,.0f}")
    if limit:
        print(
            f"GEMM limit at these shapes: {limit['gflop']:.0f} GFLOP in {limit['cpu_seconds']:.2f} CPU-s,"
            f" {limit['gflop'] / limit['cpu_seconds']:.1f} GFLOP a CPU-s (attention's own products not counted)"
        )
    key, unit = ("seconds", "second") if cuda else ("cpu_seconds", "CPU-second")
    for side in sides[1:]:
        ratios = [b[key] / a[key] for a, b in zip(results["ours"], results[side], strict=True)]
        interval = median_interval(ratios)
        said = "no 95 % interval below 6 pairs"
        if interval:
            low, high, coverage = interval
            said = f"95 % interval {low:.3f} to {high:.3f} (order statistics, coverage {coverage:.1%})"
        print(f"tokens per {unit}, ours / {side}: median paired ratio {statistics.median(ratios):.3f}, {said}")
        print("  pairs: " + " ".join(f"{ratio:.3f}" for ratio in ratios))
        print(f"peak memory, ours / {side}: {memory_ratio(results['ours'], results[side]):.3f}")
    sys.stdout.flush()


def memory_ratio(left: list[dict[str, float]], right: list[dict[str, float]]) -> float:
    """Median peak of one side over that of the other."""
    return statistics.median(a["peak_mib"] for a in left) / statistics.median(b["peak_mib"] for b in right)


def main() -> None:
    args = arguments()
    if args.child:
        import torch

        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        children = {each.__name__: each for each in (ours, trainer, nanogpt, gemm, profile, iteration)}
        print(json.dumps(ours(args, "muon") if args.child == "muon" else children[args.child](args)))
        return
    if args.device == "cuda":
        print(f"{args.layers} x {args.width}, vocabulary {VOCABULARY:,}, bf16, both compiled")
        compare(args, shape_of(args.shape[0]) if args.shape else CUDA_SHAPE, SIDES if args.nanogpt else SIDES[:2])
        return
    allocator = {name: value for name, value in os.environ.items() if name == "LD_PRELOAD" or name.startswith("MALLOC")}
    print(f"{args.layers} x {args.width}, vocabulary {VOCABULARY:,}, float32, {args.threads} threads of {cpu_name()}")
    print(f"allocator on all sides: {allocator or platform.libc_ver()[0] + ' as it comes'}")
    sides = SIDES if args.nanogpt else SIDES[:2]
    shapes = [shape_of(text) for text in args.shape] if args.shape else list(SPEED_SHAPES)
    for shape in shapes:
        compare(args, shape, sides)
    if not args.shape:
        for shape in (shape for shape in MEMORY_SHAPES if shape not in shapes):
            peaks = {side: run_child(args, side, shape, 1)["peak_mib"] for side in sides}
            said = ", ".join(f"{side} {peak:,.0f} MiB" for side, peak in peaks.items())
            ratios = ", ".join(f"ours / {side} {peaks['ours'] / peaks[side]:.3f}" for side in sides[1:])
            print(f"\npeak memory at {shape[0]} x {shape[1]}, one process each: {said}; {ratios}")
    muon = run_child(args, "muon", shapes[-1], 1)
    print(
        f"\nan update with Muon: {muon['update_cpu_seconds']:.2f} CPU-s, {muon['update_seconds']:.2f} s;"
        " once for every iteration, however many micro-batches"
    )
    parts = run_child(args, "iteration", shapes[0], 2)
    seconds = parts.pop("seconds")
    said = ", ".join(f"{part} {share:.2%}" for part, share in parts.items())
    print(
        f"an iteration of four micro-batches of {shapes[0][0]} x {shapes[0][1]} with Muon: {seconds:.1f} s; {said};"
        f" everything else {1 - sum(parts.values()):.2%}"
    )
    shares = ", ".join(f"{name} {share:.1%}" for name, share in run_child(args, "profile", shapes[-1], 1).items())
    print(f"where our step of {shapes[-1][0]} x {shapes[-1][1]} spends its time: {shares}")


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
