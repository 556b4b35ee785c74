"""Cross-entropy over fixed text, of any model: nats per token, perplexity, bits per byte, as an `evaluate.Metric`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from overnight.core.files import errno_of
from overnight.data.batches import Split, validation_batches
from overnight.errors import InputError, Unreachable, first_line, network_away
from overnight.evaluation.cache import ResponseCache, answer
from overnight.evaluation.models import EvalModel
from overnight.evaluation.progress import Meter
from overnight.evaluation.scoring import Request, batches_of
from overnight.prepare.documents import FORMATS, format_of, rows


class TokenLoss(evaluate.Metric):
    """From the summed loss of each row of tokens, in nats, with the number and the bytes of its targets.

    `bytes` is the UTF-8 length of the targets' text, an end-of-text token being none of it; where the tokenizer is not
    byte-level it is 0, and there are no bits per byte.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Cross-entropy of a language model in nats per token, perplexity, bits per byte.",
            citation="",
            inputs_description="nats: summed loss of a row; tokens: its targets; bytes: their UTF-8 bytes.",
            features=datasets.Features(
                {"nats": datasets.Value("float64"), "tokens": datasets.Value("int64"), "bytes": datasets.Value("int64")}
            ),
        )

    def _compute(self, nats: Any, tokens: Any, bytes: Any) -> dict[str, float | int | None]:
        total, count, size = float(np.sum(nats, dtype=np.float64)), int(np.sum(tokens)), int(np.sum(bytes))
        return {
            "loss": total / count,
            "perplexity": math.exp(min(total / count, 700.0)),
            "bits_per_byte": total / math.log(2) / size if size else None,
            "tokens": count,
        }


@dataclass
class RowLosses:
    """What a model reached on a text, and its rows, in an order that is the same for every model."""

    summary: dict[str, float | int | None]
    nats: np.ndarray  # (rows,) float64, summed over the row
    tokens: np.ndarray  # (rows,) int64


def losses_over(
    batches: Iterable[list[Request]], of: EvalModel, kept: ResponseCache, accelerator: Accelerator, meter: Meter
) -> RowLosses:
    """Score every continuation on one of the processes; all of them return the same."""
    sizes = bytes_of_tokens(of.tokenizer)
    mine: list[tuple[float, int, int]] = []
    for requests in batches:
        trees, _ = batches_of(requests, of.context, of.scorer.budget, share=of.scorer.reads_trees)
        answers = answer(trees, of.scorer, kept, meter)
        for number, (_, targets) in enumerate(requests):
            mine.append((-answers[number].loglikelihood, len(targets), int(sizes[list(targets)].sum())))
    nats, tokens, size = (np.array(column) for column in zip(*gather_object(mine), strict=True))
    metric = TokenLoss(keep_in_memory=True)
    metric.add_batch(nats=nats, tokens=tokens, bytes=size)
    return RowLosses(metric.compute() or {}, nats, tokens)


def bytes_of_tokens(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """UTF-8 bytes of every token, int64 (vocabulary,), special tokens having none; zeros if it is not byte-level.

    A byte-level BPE writes each byte as one character.
    """
    backend = tokenizer.backend_tokenizer
    sizes = np.zeros(max(backend.get_vocab().values()) + 1, np.int64)
    if isinstance(backend.decoder, ByteLevel):
        special = set(tokenizer.all_special_ids)
        for token, number in backend.get_vocab().items():
            sizes[number] = 0 if number in special else len(token)
    return sizes


def validation_rows(
    val: Split, length: int, of: EvalModel, accelerator: Accelerator, meter: Meter
) -> Iterator[list[Request]]:
    """The whole validation set in the trainer's rows, strided over the processes without filling up."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    at_once, host = max(1, of.scorer.budget // length), torch.device("cpu")
    meter.expect(val.tokens // processes)
    for ids, targets in validation_batches(val, length, at_once, host, rank=rank, num_processes=processes):
        yield [Request((row[0],), tuple(after)) for row, after in zip(ids.tolist(), targets.tolist(), strict=True)]


def text_rows(
    documents: list[str], of: EvalModel, context: int, accelerator: Accelerator, meter: Meter
) -> list[Request]:
    """Documents in windows of `context` tokens that overlap by half, each token scored once.

    A document begins after the token that the model's texts begin with, or without one after the end of text, as in
    lm-eval; that is no target. Every token but those of the first window has at least half a context before it.
    """
    bos, eos = of.tokenizer.bos_token_id, of.tokenizer.eos_token_id
    first, stride = int(eos if bos is None else bos), max(1, context // 2)
    encoded = of.tokenizer(documents, add_special_tokens=False, verbose=False).input_ids
    windows = [window for ids in encoded for window in windows_of([first, *ids], context, stride)]
    mine = windows[accelerator.process_index :: accelerator.num_processes]
    meter.expect(sum(len(tokens) - 1 for tokens, _ in mine))
    return [Request(tuple(tokens[: counted + 1]), tuple(tokens[counted + 1 :])) for tokens, counted in mine]


def windows_of(tokens: list[int], context: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Windows of at most `context` + 1 tokens, and from which target on each counts: every target does in one."""
    if len(tokens) < 2:
        return
    yield tokens[: context + 1], 0
    for end in range(context + 1, len(tokens), stride):
        last = min(end + stride, len(tokens))
        window = tokens[max(0, last - context - 1) : last]
        yield window, len(window) - 1 - (last - end)


def read_texts(spec: str) -> list[str]:
    """The documents of a plain text set: a file (.txt, .jsonl, .parquet) or `NAME[:CONFIG[:SPLIT[:COLUMN]]]`.

    NAME is a dataset's on the Hub; SPLIT is test and COLUMN text unless said otherwise. Raises InputError.
    """
    path = Path(spec)
    if form := format_of(spec):
        if not path.is_file():
            raise InputError(f"`--texts`: there is no file {spec}")
        found = [row.text for row in rows(path, form, "text", spec) if row.text and row.text.strip()]
    else:
        name, config, split, column = [*spec.split(":"), "", "", "", ""][:4]
        try:
            documents = datasets.load_dataset(name, config or None, split=split or "test")[column or "text"]
            found = [document for document in documents if document.strip()]
        except Exception as error:  # the Hub client, its transport and the builders share no base class
            if errno_of(error) is not None:
                raise
            if network_away(error):
                raise Unreachable(
                    f"`--texts`: {spec}: the Hub cannot be reached ({first_line(error)}); the same command continues"
                    " when it can, and `--texts none` needs no network"
                ) from error
            raise InputError(
                f"`--texts`: {spec} is neither a {FORMATS} file nor a dataset that can be read "
                f"({first_line(error)}); `--texts none` leaves it out"
            ) from error
    if not found:
        raise InputError(f"`--texts`: {spec} holds no text")
    return found
