"""Log-likelihoods of continuations, with what requests have in common computed once.

The choices of one question share its context. Their token sequences are merged at equal beginnings into a tree, and a
tree goes through the model as one row: each token attends to its ancestors and has the position that it would have in
its own sequence. Logits are made only where a continuation is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from overnight.device.faults import lost, out_of_memory, until_memory_runs_out

BATCH_TOKENS = {"cpu": 512, "cuda": 16384}  # of a forward
HEAD_ROWS = {"cpu": 128, "cuda": 2048}  # of logits that exist at once
LARGEST_TREE = 256  # tokens, or twice a sequence: attention is dense, so a large tree pays for pairs without a use
LEAST_SHARED = 0.25  # of a sequence, for it to join a tree
TREE_TOLERANCE = 1e-3  # of log-probabilities, for a model to be taken for one that reads trees


class Request(NamedTuple):
    """The tokens of a context, at least one, and of the continuation whose log-likelihood is asked for."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Answer(NamedTuple):
    """The continuation's log-likelihood in nats, and whether it is what greedy decoding would have written."""

    loglikelihood: float
    greedy: bool


class Tree:
    """Sequences merged at equal beginnings; its nodes are numbered so that a parent stands before its children."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.branches = False
        self.requests: list[Request] = []
        self.numbers: list[int] = []  # of the requests, among all
        self.scored: list[np.ndarray] = []  # of each request, the nodes that predict its continuation
        self._grown: list[tuple[np.ndarray, int]] = []  # path of each sequence, and where its own nodes begin in it
        self._last: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def shared(self, inputs: tuple[int, ...]) -> int:
        """Tokens at the beginning of `inputs` that the sequence added last begins with, too."""
        pairs = zip(self._last, inputs, strict=False)
        return next((at for at, (old, new) in enumerate(pairs) if old != new), min(len(self._last), len(inputs)))

    def add(self, number: int, request: Request, inputs: tuple[int, ...], start: int) -> None:
        """Grow by one request; `inputs` are its tokens without the last, which is only predicted.

        The first `start` of them are `shared` with the sequence added last.
        """
        self.branches |= start < len(self._last)
        before = self._grown[-1][0][:start] if start else np.empty(0, np.int64)
        path = np.concatenate([before, np.arange(len(self.tokens), len(self.tokens) + len(inputs) - start)])
        self.tokens += inputs[start:]
        self.positions += range(start, len(inputs))
        self._grown.append((path, start))
        self._last = inputs
        self.requests.append(request)
        self.numbers.append(number)
        self.scored.append(path[len(path) - len(request.continuation) :])

    def attends(self, size: int) -> np.ndarray:
        """Which node sees which, bool (size, size): its ancestors and itself; what is added to fill up, itself."""
        mask = np.eye(size, dtype=bool)
        for path, start in self._grown:
            own = path[start:]
            mask[np.ix_(own, path[:start])] = True
            mask[np.ix_(own, own)] = np.tri(len(own), dtype=bool)
        return mask


def batches_of(
    requests: Sequence[Request], context: int, budget: int, *, share: bool = True
) -> tuple[list[list[Tree]], int]:
    """Trees over all requests, in batches of about `budget` tokens, and how many requests were cut to the context.

    Without `share` each request is a tree of its own. Of one that is too long for `context` tokens the last are kept,
    as lm-eval does. The result depends on the requests alone. Raises ValueError for a continuation that is longer than
    the context.
    """
    cut, sequences = 0, []
    for number, request in enumerate(requests):
        whole = request.context + request.continuation
        if len(request.continuation) > context:
            raise ValueError(f"a continuation of {len(request.continuation)} tokens in a context of {context}")
        cut += len(whole) > context + 1
        sequences.append((whole[-(context + 1) :][:-1], number, request))
    trees: list[Tree] = []
    for inputs, number, request in sorted(sequences):  # equal beginnings come together
        shared = trees[-1].shared(inputs) if trees else 0
        size = len(trees[-1]) + len(inputs) - shared if trees else 0
        if not share or shared < max(1.0, LEAST_SHARED * len(inputs)) or size > max(LARGEST_TREE, 2 * len(inputs)):
            trees.append(Tree())
            shared = 0
        trees[-1].add(number, request, inputs, shared)
    trees.sort(key=len, reverse=True)  # stable; the largest first, so that memory runs out at once or never
    batches: list[list[Tree]] = []
    for tree in trees:
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > budget:
            batches.append([])
        batches[-1].append(tree)
    return batches, cut


class Scorer:
    """A causal language model, in evaluation mode on its device, that answers batches of trees.

    `reads_trees` was found out by comparing a small tree with its sequences one by one: an architecture that takes no
    mask of our own, or changes its logits after the head, does not, and is given trees without branches.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval()
        self.device = model.device
        self.head = model.get_output_embeddings()
        self.budget = BATCH_TOKENS[self.device.type]
        self.reads_trees = False
        self.reads_trees = self._reads_trees()

    def score(self, trees: list[Tree]) -> list[Answer]:
        """The answers to the requests of `trees`, in their order; in halves where the memory is short."""
        with until_memory_runs_out():
            return self._score(trees)
        if len(trees) == 1:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory with a single row of {len(trees[0])} tokens")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(trees) // 2
        return self.score(trees[:middle]) + self.score(trees[middle:])

    @torch.inference_mode()
    def _score(self, trees: list[Tree]) -> list[Answer]:
        hidden = self._hidden(trees)
        longest = len(trees[0])
        places = [row * longest + nodes for row, tree in enumerate(trees) for nodes in tree.scored]
        targets = [request.continuation for tree in trees for request in tree.requests]
        flat, place = np.unique(np.concatenate(places), return_inverse=True)
        target = torch.as_tensor(np.concatenate([np.asarray(each) for each in targets]), device=self.device)
        losses, hits = self._predict(hidden[torch.as_tensor(flat, device=self.device)], place, target)
        ends = np.cumsum([len(each) for each in targets])[:-1]
        return [
            Answer(-float(loss.sum()), bool(hit.all()))
            for loss, hit in zip(np.split(losses, ends), np.split(hits, ends), strict=True)
        ]

    def _hidden(self, trees: list[Tree]) -> Tensor:
        """What the head reads, (rows * longest, n_embd); the logits themselves of a model that reads no trees."""
        longest = len(trees[0])
        ids = np.zeros((len(trees), longest), np.int64)
        positions = np.zeros_like(ids)
        for row, tree in enumerate(trees):
            ids[row, : len(tree)], positions[row, : len(tree)] = tree.tokens, tree.positions
        if not self.reads_trees:
            return self.model(torch.as_tensor(ids, device=self.device), use_cache=False).logits.flatten(0, 1)
        how = {}
        if any(tree.branches for tree in trees):
            mask = np.stack([tree.attends(longest) for tree in trees])[:, None]  # (rows, 1, longest, longest)
            how["attention_mask"] = torch.as_tensor(mask, device=self.device)
            how["position_ids"] = torch.as_tensor(positions, device=self.device)
        # Without branches a row is a sequence and its filling, which stands behind it, and is seen by no token of it.
        body = self.model.base_model(torch.as_tensor(ids, device=self.device), use_cache=False, **how)
        return body.last_hidden_state.flatten(0, 1)

    def _predict(self, hidden: Tensor, place: np.ndarray, target: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Loss of each `target` under the logits of the row `place` of `hidden`, float64, and whether it is the best.

        A row may be asked for several targets. The logits exist for a few rows at a time.
        """
        at_once = HEAD_ROWS[self.device.type]
        order = np.argsort(place, kind="stable")
        borders = [*range(0, len(hidden), at_once), len(hidden)]
        starts = np.searchsorted(place[order], borders)
        losses = torch.empty(len(place), dtype=torch.float64, device=self.device)
        hits = torch.empty(len(place), dtype=torch.bool, device=self.device)
        for number, start in enumerate(borders[:-1]):
            asked = torch.as_tensor(order[starts[number] : starts[number + 1]], device=self.device)
            row = torch.as_tensor(place, device=self.device)[asked] - start
            rows = hidden[start : start + at_once]
            logits = (self.head(rows) if self.reads_trees else rows).float()
            wanted = target[asked]
            losses[asked] = (torch.logsumexp(logits, 1)[row] - logits[row, wanted]).double()
            hits[asked] = logits.argmax(1)[row] == wanted
        return losses.cpu().numpy(), hits.cpu().numpy()

    def _reads_trees(self) -> bool:
        vocabulary = self.model.config.get_text_config().vocab_size
        tokens = np.random.default_rng(0).integers(0, vocabulary, 9).tolist()
        context, left, right = tuple(tokens[:3]), tuple(tokens[3:5]), tuple(tokens[5:9])
        requests = [Request(context, left), Request(context, right), Request(context[:2], right[:2])]
        try:
            apart = self._likelihoods(requests)
            self.reads_trees = True
            return bool(np.abs(self._likelihoods(requests) - apart).max() <= TREE_TOLERANCE)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # no such arguments or parts
            if out_of_memory(error) or lost(error):
                raise
            return False

    def _likelihoods(self, requests: list[Request]) -> np.ndarray:
        """Log-likelihoods of a few short requests, float64 (requests,)."""
        [trees], _ = batches_of(requests, 64, self.budget, share=self.reads_trees)
        numbers = [number for tree in trees for number in tree.numbers]
        return np.array([answer.loglikelihood for answer in self.score(trees)])[np.argsort(numbers)]
