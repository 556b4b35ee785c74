"""Tokens, epochs, parameters and FLOPs of a recipe: everything that can be said before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from overnight.model import padded_vocabulary
from overnight.recipe import InputError, Model, Recipe, decay_iters

AUTO_MICRO_BATCH = {"cpu": 8, "cuda": 16}  # rows of 1,024 tokens; the largest divisor of the batch up to this is taken


def parameter_count(model: Model, vocabulary: int) -> int:
    """Parameters of a GPT-2 with tied embeddings of `vocabulary` rows."""
    block = 12 * model.n_embd**2 + 13 * model.n_embd  # qkv, projection and the MLP, with biases and two norms
    return (vocabulary + model.n_positions + 2) * model.n_embd + model.n_layer * block


def flops_per_token(model: Model, sequence_length: int) -> float:
    """Training FLOPs a token, forward and backward, as nanoGPT counts them (after PaLM, appendix B, arXiv 2204.02311).

    6 for every parameter but the positions, and attention over the whole row as if it were not causal.
    """
    matmuls = parameter_count(model, model.vocab_size) - model.n_positions * model.n_embd
    return 6 * matmuls + 12 * model.n_layer * model.n_embd * sequence_length


def micro_batch_for(recipe: Recipe, device: str, num_processes: int) -> int:
    """Rows of one micro-batch; raises `InputError` when the batch does not divide over the processes."""
    rows = recipe.batch.tokens_per_iter // recipe.batch.sequence_length
    asked = recipe.batch.micro_batch
    if rows % num_processes or (asked != "auto" and rows // num_processes % asked):
        unit = recipe.batch.sequence_length * num_processes * (1 if asked == "auto" else asked)
        works = max(1, round(recipe.batch.tokens_per_iter / unit)) * unit
        raise InputError(
            f"`batch.tokens_per_iter` {recipe.batch.tokens_per_iter} ({rows} rows) does not divide over {num_processes}"
            f" processes with `batch.micro_batch` {asked}; {works} would work"
        )
    if asked != "auto":
        return asked
    mine = rows // num_processes
    at_most = AUTO_MICRO_BATCH[device] * max(1, 1024 // recipe.batch.sequence_length)
    return max(size for size in range(1, min(at_most, mine) + 1) if mine % size == 0)


@dataclass(frozen=True)
class Derived:
    """What follows from a recipe on a given number of processes."""

    parameters: int
    parameters_padded: int
    micro_batch: int
    grad_accum: int
    num_processes: int
    tokens: int
    flops_per_token: float
    unique_tokens: int | None

    @property
    def epochs(self) -> float | None:
        """How often each unique token is seen; None while the unique tokens are not known."""
        return self.tokens / self.unique_tokens if self.unique_tokens else None


def derive(recipe: Recipe, device: str, num_processes: int, unique_tokens: int | None) -> Derived:
    """Everything that follows from `recipe` before it runs; `device` is "cpu" or "cuda"."""
    micro_batch = micro_batch_for(recipe, device, num_processes)
    return Derived(
        parameters=parameter_count(recipe.model, recipe.model.vocab_size),
        parameters_padded=parameter_count(recipe.model, padded_vocabulary(recipe.model.vocab_size)),
        micro_batch=micro_batch,
        grad_accum=recipe.batch.tokens_per_iter // recipe.batch.sequence_length // num_processes // micro_batch,
        num_processes=num_processes,
        tokens=recipe.schedule.max_iters * recipe.batch.tokens_per_iter,
        flops_per_token=flops_per_token(recipe.model, recipe.batch.sequence_length),
        unique_tokens=unique_tokens,
    )


def derived_rows(recipe: Recipe, derived: Derived) -> list[tuple[str, str]]:
    """The derived facts as (what, value), for the table at the start and for `--dry-run`."""
    batch, schedule = recipe.batch, recipe.schedule
    epochs = "unknown until the data is prepared" if derived.epochs is None else f"{derived.epochs:.2f} epochs"
    unique = "" if derived.unique_tokens is None else f" of {derived.unique_tokens:,} unique tokens"
    ending = f"linear to zero over the last {decay_iters(schedule):,}" if schedule.kind == "wsd" else "cosine"
    return [
        ("parameters", f"{derived.parameters:,} exported ({derived.parameters_padded:,} while padded)"),
        (
            "tokens per iteration",
            f"{batch.tokens_per_iter:,} = {derived.micro_batch} rows x {batch.sequence_length} tokens"
            f" x {derived.grad_accum} accumulated x {derived.num_processes} processes",
        ),
        (
            "the run",
            f"{schedule.max_iters:,} iterations = {derived.tokens:,} tokens = {epochs}{unique}",
        ),
        (
            "learning rate",
            f"{recipe.optim.lr:g} with {recipe.optim.name}, {schedule.warmup_iters:,} iterations of warmup, {ending}",
        ),
        (
            "compute",
            f"{derived.flops_per_token / 1e6:.1f} MFLOP a token, {derived.flops_per_token * derived.tokens:.3g} in all",
        ),
    ]
