"""The sides that training_step.py compares: a training step of ours, of transformers' Trainer, of nanoGPT.

Each is a process that waits for a line on standard input before a round of steps, and prints one JSON object after it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

VOCABULARY = 50_257


def shape_of(text: str) -> tuple[int, int]:
    """'2x1024' as (rows, tokens of a row)."""
    rows, length = text.split("x")
    return int(rows), int(length)


def now(cuda: bool) -> tuple[float, float]:
    """CPU and wall seconds, when the device has done what it was given."""
    if cuda:
        torch.cuda.synchronize()
    return time.process_time(), time.monotonic()


class Meter:
    """CPU and wall seconds between the end of a round's first step and the end of its last, and the peak memory."""

    def __init__(self, args: argparse.Namespace):
        self.cuda, self.steps = args.device == "cuda", args.steps
        self.begin_round()

    def begin_round(self) -> None:
        """Wait for the parent's word."""
        self.done, self.started = 0, (0.0, 0.0)
        if self.cuda:
            torch.cuda.empty_cache()  # the other sides need the memory
            torch.cuda.reset_peak_memory_stats()
        if not sys.stdin.readline():
            raise SystemExit

    def mark(self) -> None:
        """Call after every step. The clock is read twice a round."""
        self.done += 1
        if self.done == 1:
            self.started = now(self.cuda)
        if self.done == 1 + self.steps:
            cpu, wall = (after - before for before, after in zip(self.started, now(self.cuda), strict=True))
            figures = {"cpu_seconds": cpu / self.steps, "seconds": wall / self.steps, "peak_mib": self.peak_mib()}
            print(json.dumps(figures), file=sys.__stdout__, flush=True)  # the parent reads it
            self.begin_round()

    def peak_mib(self) -> float:
        """On CUDA what the allocator held, otherwise the process's largest resident set."""
        if self.cuda:
            return torch.cuda.max_memory_reserved() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)


def model_shape(args: argparse.Namespace):
    """Our model's shape, with heads of 64."""
    from overnight.recipe.schema import Model

    return Model(n_layer=args.layers, n_head=args.width // 64, n_embd=args.width, vocab_size=VOCABULARY)


class OurStep:
    """One micro-batch and its update, as `overnight.training.train.train_step` does them."""

    def __init__(self, args: argparse.Namespace, optimizer: str):
        from accelerate import Accelerator

        from overnight.device.device import keep_large_blocks_whole
        from overnight.model import optim
        from overnight.model.gpt2 import LanguageModel
        from overnight.recipe.schema import Optim

        cuda = args.device == "cuda"
        keep_large_blocks_whole(os.environ)
        self.accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")
        self.model = LanguageModel(model_shape(args), VOCABULARY - 1, compile=cuda)
        self.prepared = self.accelerator.prepare(self.model)
        self.optimizers = optim.build(self.model, Optim(name=optimizer, lr=1e-4))
        rows, length = shape_of(args.shape[0])
        self.tokens = torch.randint(VOCABULARY, (rows, length + 1), device=args.device)

    def gradients(self) -> None:
        """Forward, backward, clipping."""
        ids, targets = self.tokens[:, :-1], self.tokens[:, 1:]
        self.accelerator.backward(self.prepared(ids, targets) * (1 / targets.numel()))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def update(self) -> None:
        """The optimizers' step."""
        for optimizer in self.optimizers:
            optimizer.step()

    def __call__(self) -> None:
        self.gradients()
        self.update()
        self.model.zero_grad(set_to_none=True)


def ours(args: argparse.Namespace) -> None:
    """Our step with AdamW."""
    step, meter = OurStep(args, "adamw"), Meter(args)
    while True:
        step()
        meter.mark()


def trainer(args: argparse.Namespace) -> None:
    """`transformers.Trainer` with the stock model and its own default AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    meter = Meter(args)

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
            max_steps=args.pairs * (args.steps + 1),
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


def nanogpt(args: argparse.Namespace) -> None:
    """nanoGPT's model and optimizer as its `train.py` uses them; compiled on CUDA alone."""
    sys.path.insert(0, str(args.nanogpt))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]  # the checkout's

    heads = args.width // 64
    config = GPTConfig(
        n_layer=args.layers, n_head=heads, n_embd=args.width, vocab_size=50_304, block_size=1024, dropout=0.0, bias=True
    )
    model = GPT(config).to(args.device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), args.device)
    run, meter = torch.compile(model) if args.device == "cuda" else model, Meter(args)
    rows, length = shape_of(args.shape[0])
    tokens = torch.randint(VOCABULARY, (rows, length + 1), device=args.device)
    while True:
        with torch.autocast("cuda", torch.bfloat16, enabled=args.device == "cuda"):
            _, loss = run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.mark()


SIDES: dict[str, Callable[[argparse.Namespace], None]] = {"ours": ours, "trainer": trainer, "nanogpt": nanogpt}
