"""lm-eval's tasks, prompts and metrics over our own log-likelihoods: the numbers of its `hf` model in less time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from overnight.errors import InputError, first_line
from overnight.evaluation.cache import ResponseCache, answer
from overnight.evaluation.models import EvalModel
from overnight.evaluation.progress import Meter
from overnight.evaluation.scoring import Request, batches_of
from overnight.recipe.text import shown

SAME = 1e-6  # of a log-likelihood: equal sums of float32 in another order differ by less


class SharedContextLM(HFLM):
    """lm-eval's own `hf` model but for one method, which shares contexts and remembers what was answered before."""

    def __init__(self, eval_model: EvalModel, response_cache: ResponseCache, accelerator: Accelerator, meter: Meter):
        super().__init__(pretrained=eval_model.model, tokenizer=eval_model.tokenizer, truncation=True)
        self.name, self.scorer = eval_model.name, eval_model.scorer
        self.response_cache, self.meter = response_cache, meter
        self.cut = 0  # requests that did not fit into the model's context
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if self._world_size > 1:
            self.accelerator = accelerator

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As upstream, under our own progress."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """As upstream, under our own progress."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        for texts, _, continuation in requests:
            if not continuation:
                raise InputError(
                    f"{self.meter.name}: {self.name} cannot be asked for {texts[1]!r} after {texts[0][-40:]!r}: its"
                    " tokenizer has no token of the continuation's own there; leave one of them out"
                )
        asked = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        share = self.scorer.reads_trees
        try:
            batches, cut = batches_of(asked, self.max_length, self.scorer.budget, share=share)
        except ValueError as error:
            raise InputError(
                f"{self.meter.name}: {self.name} cannot be asked: {error}; leave one of them out"
            ) from None
        self.cut += cut
        self.meter.expect(sum(len(tree) for trees in batches for tree in trees))
        answers = answer(batches, self.scorer, self.response_cache, self.meter)
        return [(answers[number].loglikelihood, answers[number].greedy) for number in range(len(asked))]


def answer_items(lm: SharedContextLM, task: Task, limit: int | None) -> list[dict[str, Any]] | None:
    """Every item of a task with the model's log-likelihoods and lm-eval's metrics; None but on the main process.

    In the order of the task's documents, the first `limit` of them.
    """
    name = str(task.task_name)
    try:
        found: Any = evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    except (InputError, RuntimeError, KeyboardInterrupt):  # what is told already, or of the device
        raise
    except Exception as error:  # a task's templates and metrics raise whatever they meet
        said = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"`--tasks`: {name}{failing_item(task, limit)} cannot be scored ({said})") from error
    if found is None:
        return None
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [item_of(task, sample) for sample in samples]


def failing_item(task: Task, limit: int | None) -> str:
    """The first document of a task that its templates cannot be filled with, in words; nothing when there is none."""
    for number, document in zip(range(limit or sys.maxsize), task.eval_docs, strict=False):
        try:
            task.doc_to_text(document), task.doc_to_target(document)
        except Exception:
            return f", item {number},"
    return ""


def item_of(task: Task, sample: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an item: which it was, the choices' log-likelihoods, and the metrics."""
    answers = [answer if isinstance(answer, tuple | list) else (answer, None) for answer in sample["filtered_resps"]]
    lm_eval = {metric: sample[metric] for metric in sample["metrics"]}
    tied = ties_as_chance(task, sample["doc"], [answer[0] for answer in answers], lm_eval)
    return {
        "task": str(task.task_name),
        "id": sample["doc_id"],
        "doc": sample["doc_hash"][:16],
        "target": sample["target"],
        "loglikelihoods": [answer[0] for answer in answers],
        "greedy": [answer[1] for answer in answers],
        "metrics": lm_eval | tied,
        "lm-eval": lm_eval,
        "tied": bool(tied),
    }


def ties_as_chance(
    task: Any, doc: dict[str, Any], likelihoods: list[float], metrics: dict[str, Any]
) -> dict[str, float]:
    """Of the metrics of an item those in which the best choices are equally likely: the share of them that is right.

    lm-eval takes the first of them, and in some tasks the first is always the right one.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return {}
    choices = task.doc_to_choice(doc)
    lengths = {
        "acc": np.ones(len(choices)),
        "acc_norm": np.array([len(choice) for choice in choices]),
        "acc_bytes": np.array([len(choice.encode()) for choice in choices]),
    }
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    right = {choices.index(g) if g in choices else g for g in (gold if isinstance(gold, list) else [gold])}
    if right - {*range(len(choices))}:  # which lm-eval counts as wrong, whatever was answered
        raise InputError(f"`--tasks`: {task.task_name}: {gold!r} is none of the {len(choices)} choices of {shown(doc)}")
    found = {}
    for metric in lengths.keys() & metrics.keys():
        scores = np.array(likelihoods[: len(choices)]) / np.maximum(lengths[metric], 1)
        best = np.flatnonzero(scores >= scores.max() - SAME * abs(scores.max()))
        if len(best) > 1:
            found[metric] = float(np.mean([each in right for each in best]))
    return found
