"""One evaluation from beginning to end: one model after the other, each on every text and task, then the verdict."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from overnight.core.console import Console, count, duration
from overnight.core.scripts import no_command
from overnight.data.manifest import as_prepared
from overnight.data.shards import Shards, open_shards
from overnight.data.tokenizer import load_tokenizer
from overnight.device.launch import cuda_wanted, refuse_lone_processes, set_threads, take_over_environment
from overnight.errors import InputError, all_of
from overnight.evaluation import models, results
from overnight.evaluation.cache import ResponseCache, cache_folder
from overnight.evaluation.lm import SharedContextLM, answer_items
from overnight.evaluation.loss import RowLosses, losses_over, read_texts, text_rows, validation_rows
from overnight.evaluation.models import UNIGRAM, UNTRAINED, EvalModel
from overnight.evaluation.progress import Meter
from overnight.evaluation.statistics import SEED, Paired, bootstrap_interval, metric_of, verdicts
from overnight.evaluation.tasks import (
    ENGLISH_CHARACTERS_PER_TOKEN,
    Benchmark,
    download_bytes,
    index_of,
    load_benchmarks,
    summary,
    tokens_of,
)
from overnight.recipe.schema import QUICK, Evaluation, Recipe
from overnight.report.model_card import corpus
from overnight.run_dir.layout import MEASURED, Origin

LONG = 1800  # seconds, after which a CPU is told of --quick
Item = dict[str, Any]
ANSWERED = ("loglikelihoods", "greedy", "metrics")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Measured:
    """What one model reached: `validation` and `texts` as TokenLoss gives them, `tasks` and their `items` by benchmark.

    The last two are there on the main process alone.
    """

    facts: dict[str, Any]
    validation: dict[str, Any] | None = None
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    losses: RowLosses | None = None  # of the rows of the validation set
    items: dict[str, list[Item]] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, Any]:
        """What results.json tells of it."""
        return {"facts": self.facts, "validation": self.validation, "texts": self.texts, "tasks": self.tasks}


@dataclass
class Plan:
    """What the command asks for, resolved."""

    model: str
    config: Evaluation
    shards_dir: Path | None  # no validation loss without it
    data_dir: Path | None
    trust_tasks: bool
    dtype: str
    out: Path
    origin: Origin | None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result, for results.json."""
        return self.config.model_dump(include=MEASURED) | {
            "dtype": self.dtype,
            "seed": SEED,
            "lm_eval": lm_eval.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


class Session:
    """The models, texts and tasks of one command."""

    def __init__(self, plan: Plan, accelerator: Accelerator):
        self.plan, self.accelerator = plan, accelerator
        self.console = Console(quiet=not accelerator.is_main_process)
        self.meter = Meter(self.console)
        self.shards = self._open_shards()
        self.texts: dict[str, list[str]] = {}
        self.benchmarks: list[Benchmark] = []
        self.length = 0  # of a validation row, the same for every model

    def run(self) -> None:
        """Measure every model, compare, write, and print the answer."""
        # All are opened before any is measured, so that all that cannot be used is told at once.
        opened = [partial(self.eval_model, name) for name in (self.plan.model, *self.plan.config.against)]
        *eval_models, self.texts, self.benchmarks = all_of(*opened, self._read_texts, self._load_benchmarks)
        self._refuse_other_tokens(eval_models)
        contexts = [each.context for each in eval_models]
        recipe_length = self.plan.origin.recipe.batch.sequence_length if self.plan.origin else max(contexts)
        self.length = min(recipe_length, *contexts)
        measured = [self.measure(each) for each in eval_models]
        if self.accelerator.is_main_process:
            self.finalize(measured)
        self.accelerator.wait_for_everyone()

    def eval_model(self, name: str) -> EvalModel:
        """The model of a name, on the device."""
        device, dtype = self.accelerator.device, DTYPES[self.plan.dtype]
        if name not in (UNTRAINED, UNIGRAM):
            return models.load_model(name, device, dtype)
        if self.plan.origin is None or self.shards is None:
            raise InputError(f"`--against {name}` needs a model of a run, as runs/NAME/models/iter-...")
        origin, shards = self.plan.origin, self.shards
        make = partial(models.unigram_model, iterations=origin.iterations) if name == UNIGRAM else models.untrained
        tokenizer = load_tokenizer(str(shards.folder / "tokenizer"))
        return models.eval_model(name, make(origin.recipe, shards), tokenizer, device, dtype)

    def measure(self, eval_model: EvalModel) -> Measured:
        """One model on every text and task: scores, the rows' losses, and the items by benchmark."""
        found = Measured(eval_model.facts)
        self.console.log(f"{eval_model.name}: {found.facts['parameters']:,} parameters, context {eval_model.context}")
        if not eval_model.scorer.reads_trees:
            self.console.log("  its architecture takes no mask of our own: it is asked choice by choice")
        self._expect(eval_model)
        kept = ResponseCache(cache_folder() / eval_model.fingerprint, self.accelerator.process_index)
        if self.shards is not None:
            self.meter.begin("validation set", "rows")
            rows = validation_rows(self.shards.val, self.length, eval_model, self.accelerator, self.meter)
            found.losses = losses_over(rows, eval_model, kept, self.accelerator, self.meter)
            found.validation = found.losses.summary
            self._tell("validation set", f"{found.validation['loss']:.4f} nats per token")
        for spec, documents in self.texts.items():
            self.meter.begin(spec, "windows")
            text = text_rows(documents, eval_model, eval_model.context, self.accelerator, self.meter)
            found.texts[spec] = losses_over([text], eval_model, kept, self.accelerator, self.meter).summary
            self._tell(spec, f"{found.texts[spec]['loss']:.4f} nats per token")
        for benchmark in self.benchmarks:
            self._ask(benchmark, eval_model, kept, found)
        return found

    def _ask(self, benchmark: Benchmark, eval_model: EvalModel, kept: ResponseCache, found: Measured) -> None:
        """Ask a model the items of a benchmark; what it answered goes into `found`."""
        lm = SharedContextLM(eval_model, kept, self.accelerator, self.meter)
        self.meter.begin(benchmark.name, parts=len(benchmark.tasks))
        answered = [answer_items(lm, task, self.plan.config.limit) for task in benchmark.tasks]
        cut = self.accelerator.reduce(torch.tensor(lm.cut, device=self.accelerator.device), "sum").item()
        if not self.accelerator.is_main_process:
            return
        items = found.items[benchmark.name] = [item for each in answered for item in each or []]
        scores = found.tasks[benchmark.name] = summary(benchmark, items, int(cut))
        shown = ", ".join(f"{key} {value:.4f}" for key, value in scores["metrics"].items())
        self._tell(
            benchmark.name, shown + results.tie_note(scores) + (f"; {cut} requests cut to the context" if cut else "")
        )

    def finalize(self, measured: list[Measured]) -> None:
        """Compare the first model with each other one, write the folder, and print the answer."""
        ours, *others = measured
        comparisons = []
        for theirs in others:
            pairs = [pair for b in self.benchmarks if (pair := paired(b.name, ours, theirs)) is not None]
            loss = difference(ours.losses, theirs.losses)
            comparisons.append(results.compared(theirs.facts["name"], verdicts(pairs), loss))
        settings = self.plan.settings
        home = corpus(as_prepared(Recipe(), self.shards.manifest)) if self.shards is not None else None
        outcome = {
            "settings": settings,
            "models": [each.scores for each in measured],
            "comparisons": comparisons,
            "notes": results.notes(settings, home),
        }
        results.write_results(outcome, by_item(measured), self.plan.out)
        for line in results.console_lines(outcome):
            self.console.log(line)
        self.console.log(f"\nwritten: {self.plan.out}/comparison.md")

    def _open_shards(self) -> Shards | None:
        origin, folder = self.plan.origin, self.plan.shards_dir
        if folder is None:
            self.console.log("the validation loss is not measured; `--shards DIR` names prepared data to measure it on")
            return None
        shards = open_shards(folder, verify=self.accelerator.is_local_main_process)
        if origin is not None and shards.manifest.fingerprint != origin.data_fingerprint:
            raise InputError(
                f"{folder} holds other data (fingerprint {shards.manifest.fingerprint[:16]}) than {origin.folder} was "
                f"trained on ({origin.data_fingerprint[:16]}); `--shards DIR` names the folder that it was"
            )
        return shards

    def _refuse_other_tokens(self, eval_models: list[EvalModel]) -> None:
        """The validation set is ids: they mean the same to a model only if its vocabulary is that of the shards."""
        if self.shards is None:
            return
        expected = load_tokenizer(str(self.shards.folder / "tokenizer")).get_vocab()
        for each in eval_models:
            if each.tokenizer.get_vocab() != expected:
                raise InputError(
                    f"{each.name}: its vocabulary is not that of {self.shards.folder}, so the losses on its tokens "
                    "do not compare; `--shards none` leaves the validation set out, and benchmarks compare any models"
                )

    def _read_texts(self) -> dict[str, list[str]]:
        return {spec: read_texts(spec) for spec in self.plan.config.texts}

    def _load_benchmarks(self) -> list[Benchmark]:
        config = self.plan.config
        tasks_dir = Path(config.tasks_dir) if config.tasks_dir else None
        if not config.tasks:
            return []
        index = index_of(config.tasks, tasks_dir, trust=self.plan.trust_tasks)
        if self.plan.data_dir is None:
            for name, size in download_bytes(config.tasks, index).items():
                known = f"{size / 1e6:.0f} MB" if size else "size not known"
                self.console.log(f"  {name}: {known}, downloaded unless it was before")
        with self.accelerator.main_process_first():
            return load_benchmarks(config.tasks, index, self.plan.data_dir)

    def _expect(self, eval_model: EvalModel) -> None:
        """Say how long it will take, from the rate of one batch and the tokens of a few items of each task."""
        tokens = sum(tokens_of(benchmark, self.plan.config.limit) for benchmark in self.benchmarks)
        tokens += self.shards.val.tokens if self.shards else 0  # and twice the texts, whose windows overlap by half
        tokens += sum(2 * len(t) / ENGLISH_CHARACTERS_PER_TOKEN for documents in self.texts.values() for t in documents)
        rate = models.tokens_per_second(eval_model)
        seconds = tokens / rate / self.accelerator.num_processes
        self.console.log(
            f"  about {count(tokens)} tokens at {count(rate)} a second: {duration(seconds)}, less for kept answers"
        )
        if self.accelerator.device.type == "cpu" and self.plan.config.limit is None and seconds > LONG:
            self.console.log(f"  on a CPU `--quick`, {QUICK} items a task, gives an answer sooner")

    def _tell(self, what: str, found: str) -> None:
        self.console.log(f"  {what}: {found} ({duration(self.meter.end())})")


def launch_evaluation() -> Accelerator:
    """The Accelerator of an evaluation, on whatever topology it was launched with."""
    disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    take_over_environment(os.environ)
    accelerator = Accelerator(cpu=not cuda_wanted())
    refuse_lone_processes(accelerator)
    set_threads("auto")
    return accelerator


def paired(benchmark: str, ours: Measured, theirs: Measured) -> Paired | None:
    """The items of a benchmark as both models answered them; None for one whose metric is not right or wrong."""
    metric, both = metric_of(benchmark), (ours.items[benchmark], theirs.items[benchmark])
    if metric not in both[0][0]["metrics"]:
        return None
    assert [i["doc"] for i in both[0]] == [i["doc"] for i in both[1]], f"{benchmark}: the models saw other items"
    right = [np.array([item["metrics"][metric] for item in items], float) for items in both]
    return Paired(benchmark, metric, ours.tasks[benchmark]["chance"], *right)


def difference(ours: RowLosses | None, theirs: RowLosses | None) -> dict[str, float] | None:
    """Our loss on the validation set minus theirs, in nats per token, with its interval over resampled rows."""
    if ours is None or theirs is None:
        return None
    low, high = bootstrap_interval(ours.nats - theirs.nats, ours.tokens)
    return {"difference": float((ours.nats - theirs.nats).sum() / ours.tokens.sum()), "low": low, "high": high}


def by_item(measured: list[Measured]) -> dict[str, list[Item]]:
    """The lines of items/<benchmark>.jsonl: an item, and what every model answered."""
    lines: dict[str, list[Item]] = {}
    for benchmark, items in measured[0].items.items():
        each = [(one.facts["name"], one.items[benchmark]) for one in measured]
        lines[benchmark] = [
            {key: item[key] for key in ("task", "id", "doc", "target")}
            | {"models": {name: {key: answers[at][key] for key in ANSWERED} for name, answers in each}}
            for at, item in enumerate(items)
        ]
    return lines


if __name__ == "__main__":
    sys.exit(no_command("eval"))
