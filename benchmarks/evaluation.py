"""Benchmarks scored by us and by lm-eval's own `hf` model: the same weights, the same items, in one run, alternating.

Every measurement is a fresh process. lm-eval has the batch size that is fastest for it among those tried. CPU-seconds
count from when model and items are loaded, tokenising included; tokens are counted where they enter the transformer's
body and its head, filling included; memory is the process's peak, beyond what it held before the first request too. The
model is GPT-2 124M's shape with random weights, on which speed does not depend. The items are real
(`make verify-evaluation` fetches them).
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ARMS = ("ours", "hf")
TASKS = {"hellaswag": 2.0, "sciq": 3.0}  # and how many times the items a CPU-second we aim at
BATCH_SIZES = (2, 4, 8, 16)
SHAPES = {"124m": {}, "40m": {"n_embd": 384, "n_layer": 12, "n_head": 6}}


def score(arm: str, folder: Path, task_name: str, items: int, batch_size: int) -> dict[str, Any]:
    """One arm in this process."""
    import torch
    from accelerate import Accelerator
    from lm_eval.models.huggingface import HFLM

    from overnight.core.console import Console
    from overnight.evaluation import models
    from overnight.evaluation.cache import ResponseCache
    from overnight.evaluation.lm import SharedContextLM, answer_items
    from overnight.evaluation.progress import Meter
    from overnight.evaluation.tasks import index_of, load_benchmarks

    logging.disable(logging.WARNING)
    eval_model = models.load_model(str(folder / "model"), torch.device("cpu"), torch.float32)
    [benchmark] = load_benchmarks([task_name], index_of([task_name]), folder / "items")
    [task] = benchmark.tasks
    if arm == "ours":
        meter = Meter(Console(quiet=True))
        lm = SharedContextLM(
            eval_model, ResponseCache(Path(tempfile.mkdtemp(dir=folder))), Accelerator(cpu=True), meter
        )
    else:
        lm = HFLM(pretrained=eval_model.model, tokenizer=eval_model.tokenizer, batch_size=batch_size)
    tokens = {"body": 0, "head": 0}

    def count(part: str):
        def hook(module, args, kwargs, output) -> None:
            entered = args[0] if args else kwargs["input_ids"]
            tokens[part] += entered.shape[:-1].numel() if part == "head" else entered.numel()

        return hook

    eval_model.model.base_model.register_forward_hook(count("body"), with_kwargs=True)
    eval_model.model.get_output_embeddings().register_forward_hook(count("head"), with_kwargs=True)
    held, used = peak_mib(), time.process_time()
    answered = answer_items(lm, task, items) or []
    cpu = time.process_time() - used
    return {
        "cpu": cpu,
        "peak": peak_mib(),
        "beyond": peak_mib() - held,
        "items": len(answered),
        "acc": sum(item["metrics"]["acc"] for item in answered) / len(answered),
        **tokens,
    }


def peak_mib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(arm: str, folder: Path, task: str, items: int, batch_size: int) -> dict[str, Any]:
    """One arm in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, "--arm", arm, str(folder), task, str(items), str(batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{arm} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(path: Path, items: int) -> None:
    """Keep so many items of a file, evenly spaced and then shuffled: its beginning is not like the rest."""
    import numpy as np
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    chosen = np.random.default_rng(0).permutation(np.linspace(0, len(table) - 1, items).astype(int))
    pyarrow.parquet.write_table(table.take(chosen), path)


def write_model(folder: Path, shape: str) -> None:
    """GPT-2's shape and vocabulary, random weights."""
    import torch
    from prepare import write_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**SHAPES[shape])).save_pretrained(folder)  # type: ignore[arg-type]
    write_tokenizer(folder)


def main() -> None:
    if sys.argv[1:2] == ["--arm"]:
        arm, folder, task, items, batch_size = sys.argv[2:]
        print(json.dumps(score(arm, Path(folder), task, int(items), int(batch_size))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=24, help="of each task, evenly over all there are")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=2, help="of ours, hf")
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    args = parser.parse_args()
    from pretrained import benchmark_items

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_model(place / "model", args.shape)
        for path in benchmark_items(place).rglob("*.parquet"):
            spread(path, args.items)
        print(
            f"GPT-2 {args.shape}, float32, {args.items} items of each task, {args.rounds} x {', '.join(ARMS)}; medians"
        )
        for task in args.tasks:
            compare(place, task, TASKS[task], args)


def compare(place: Path, task: str, aim: float, args: argparse.Namespace) -> None:
    """One task by both, lm-eval with its best batch size."""
    few = max(6, args.items // 4)
    tried = {size: run("hf", place, task, few, size) for size in BATCH_SIZES}
    rates = {size: found["items"] / found["cpu"] for size, found in tried.items()}
    best = max(rates, key=lambda size: rates[size])
    shown = ", ".join(f"{size}: {rate:.2f}{'*' if size == best else ''}" for size, rate in rates.items())
    print(f"\n{task}; lm-eval's items a CPU-second by batch size, {few} items each: {shown}")
    found: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in ARMS:
            found[arm].append(run(arm, place, task, args.items, best))
    middle = {arm: {key: statistics.median(each[key] for each in found[arm]) for key in found[arm][0]} for arm in ARMS}
    print("       CPU-seconds  items/CPU-s  tokens in body  in head  peak MiB  beyond the loaded model   acc")
    for arm, m in middle.items():
        print(
            f"{arm:5} {m['cpu']:12.1f} {m['items'] / m['cpu']:12.2f} {m['body']:15,.0f} {m['head']:8,.0f} "
            f"{m['peak']:9,.0f} {m['beyond']:24,.0f} {m['acc']:5.3f}"
        )
    ours, hf = middle["ours"], middle["hf"]
    print(
        f"ours: {hf['cpu'] / ours['cpu']:.2f} times the items a CPU-second (aim {aim:g}); peak memory "
        f"{ours['peak'] / hf['peak']:.2f} of lm-eval's, beyond the loaded model {ours['beyond'] / hf['beyond']:.2f}"
        " (aim 0.5)"
    )


if __name__ == "__main__":
    main()
