"""The scaling law: the validation loss to expect of a GPT-2, and how far to trust it (facts/scaling_law.json).

    loss = factor * (E + A * (N / 1e7)^-alpha + B * (D_eff / 1e9)^-beta)    nats per GPT-2 token, after annealing

N are the parameters of the blocks' matrices. D_eff are the tokens seen, each further pass over the unique ones worth
less (Muennighoff et al. 2023, arXiv 2305.16264), and all of them less in larger batches. The factor is the training
recipe's, measured at 124M parameters and about half a million tokens an update.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from overnight.errors import InputError, listed
from overnight.planning.gpus import rows_of
from overnight.recipe.schema import Model, Recipe

REUSE = 15.387756  # R of Muennighoff et al.: passes after which a repeated token has lost most of its worth
MANY_EPOCHS = 4  # up to which repeated tokens are nearly worth fresh ones (the same paper)
MOST_EPOCHS = 40  # from which it found no gain: nothing is expected of more
REPEATED = f"from {MANY_EPOCHS} on, text that is read again teaches less and less, and may be learnt by heart"
INTERVAL = 0.9
DATASETS = {"HuggingFaceFW/fineweb-edu": "fineweb-edu", "HuggingFaceFW/fineweb": "fineweb"}
FACTORS = {
    ("muon", "wsd"): "muon_wsd",
    ("muon", "cosine"): "muon_wsd",
    ("adamw", "wsd"): "adamw_tuned_linear_to_0",
    ("adamw", "cosine"): "adamw_6e-4_cosine_to_10_percent",
}
GPT2_VOCABULARY = 50_257
USUAL_BATCH = 524_288  # tokens of an update in the runs that the factors were measured in
SMALLER = 4  # what the plan compares with: a batch of that part


@cache
def constants() -> dict[str, Any]:
    """facts/scaling_law.json."""
    return json.loads((resources.files("overnight") / "facts" / "scaling_law.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Expected:
    """A loss in nats per token, normally distributed."""

    loss: float
    sigma: float

    def interval(self) -> tuple[float, float]:
        """The 90 % interval."""
        reach = NormalDist().inv_cdf(0.5 + INTERVAL / 2) * self.sigma
        return self.loss - reach, self.loss + reach

    def chance_below(self, loss: float) -> float:
        """The probability that it is below `loss`."""
        return NormalDist(self.loss, self.sigma).cdf(loss)


def block_parameters(model: Model) -> int:
    """N: parameters of the blocks' matrices, without embeddings, biases and norms."""
    return 12 * model.n_layer * model.n_embd**2


def effective_tokens(tokens: float, unique: float | None) -> float:
    """Tokens seen once that are worth as much as `tokens` over `unique` ones; all different while these are unknown."""
    if unique is None or tokens <= unique:
        return tokens
    return unique * (1 + REUSE * (1 - math.exp(-(tokens / unique - 1) / REUSE)))


def batch_worth(optimizer: str, tokens_per_iter: int, tokens: float) -> float:
    """The share of `tokens` that is left in updates of this size, beside what is left in those of USUAL_BATCH.

    Above a critical size, which grows with the tokens, more tokens in an update teach hardly more.
    """
    law = constants()["batch"]
    critical = law["of"][optimizer]["critical_tokens"] * (tokens / law["at_tokens"]) ** law["growth"]
    lost = [(batch / critical) ** law["of"][optimizer]["power"] for batch in (tokens_per_iter, USUAL_BATCH)]
    return (1 + lost[1]) / (1 + lost[0])


def annealed_loss(
    parameters: float, tokens: float, unique: float | None, dataset: str, factor: float = 1.0, worth: float = 1.0
) -> float:
    """The law itself, `worth` being the batch's; KeyError for a dataset that it has no constants of."""
    law = constants()
    of_data = law["datasets"][dataset]
    size = of_data["A"] * (parameters / 1e7) ** -law["alpha"]
    data = of_data["B"] * (worth * effective_tokens(tokens, unique) / 1e9) ** -law["beta"]
    return factor * (of_data["E"] + size + data)


def level_and_slope(recipe: Recipe, tokens: float) -> tuple[float, float]:
    """The annealed loss after `tokens` that count, and its fall for each e-fold of them, nats per token."""
    of_data = constants()["datasets"][dataset_of(recipe)]
    beta, factor = constants()["beta"], factor_of(recipe)
    level = annealed_loss(block_parameters(recipe.model), tokens, None, dataset_of(recipe), factor)
    return level, factor * of_data["B"] * (tokens / 1e9) ** -beta * beta


def cosine_offset(progress: float) -> float:
    """Nats that a cosine run at a share of its schedule lies above an annealed one of the same tokens, at 124M."""
    shares, offsets = zip(*constants()["cosine_offset_nats"], strict=True)
    slope = (offsets[1] - offsets[0]) / (shares[1] - shares[0])  # before the first point as behind it
    return float(np.interp(progress, [0, *shares], [offsets[0] - slope * shares[0], *offsets]))


def wsd_offset() -> float:
    """Nats that a run at its peak learning rate lies above an annealed one of the same tokens, at 124M."""
    low, high = constants()["wsd_offset_nats"]
    return (low + high) / 2


def dataset_of(recipe: Recipe) -> str:
    """Which of the law's datasets a recipe trains on; FineWeb-Edu stands in for any other (see `caveats`)."""
    return DATASETS.get(str(recipe.data.path), "fineweb-edu")


def gpt2_dataset(recipe: Recipe) -> str | None:
    """The data set whose published GPT-2 losses are in the same nats as the recipe's; None where there is none."""
    return DATASETS.get(str(recipe.data.path)) if recipe.model.vocab_size == GPT2_VOCABULARY else None


def factor_of(recipe: Recipe) -> float:
    """What the recipe's optimizer and schedule multiply the loss by."""
    return constants()["recipe_factor_on_loss"][FACTORS[recipe.optim.name, recipe.schedule.kind]]


def expected(recipe: Recipe, max_iters: int, unique: int | None, offset: float | None = None) -> Expected:
    """The last validation loss of `recipe` when it ends after `max_iters`; `offset` is what runs were measured to add.

    Without one, the standard error is the law's own, otherwise that of a law that was set right on this set.
    """
    tokens = max_iters * recipe.batch.tokens_per_iter
    worth = batch_worth(recipe.optim.name, recipe.batch.tokens_per_iter, tokens)
    loss = annealed_loss(block_parameters(recipe.model), tokens, unique, dataset_of(recipe), factor_of(recipe), worth)
    sigma = constants()["sigma_nats"]
    if offset is None:
        return Expected(loss, sigma["uncalibrated"])
    return Expected(loss + offset, sigma["after_one_point_on_the_same_validation_set"])


def gain_of_smaller_batch(recipe: Recipe, max_iters: int, unique: int | None) -> float | None:
    """Nats by which the same tokens would end lower in updates of a quarter of the size; None outside of the sweep."""
    batch, (least, most) = recipe.batch, constants()["batch"]["range"]
    if not in_fit_range(recipe) or not least <= batch.tokens_per_iter // SMALLER < batch.tokens_per_iter <= most:
        return None
    smaller = batch.model_copy(update={"tokens_per_iter": batch.tokens_per_iter // SMALLER})
    other = recipe.model_copy(update={"batch": smaller})
    return expected(recipe, max_iters, unique).loss - expected(other, SMALLER * max_iters, unique).loss


def unknown(recipe: Recipe) -> str | None:
    """Why the law has nothing to say of a recipe's loss, in plain words; None where it has."""
    parameters, (low, high) = block_parameters(recipe.model), constants()["valid_range"]["N"]
    if str(recipe.data.path) not in DATASETS:
        where = recipe.data.path or f"the {recipe.data.source} text"
        return f"the scaling law covers FineWeb-Edu and FineWeb alone, not {listed(where)}"
    if recipe.model.vocab_size != GPT2_VOCABULARY:
        return f"its nats are per GPT-2 token; a vocabulary of {recipe.model.vocab_size:,} cuts text differently"
    if not low <= parameters <= high:
        return f"the law was fitted to {low:.0e} to {high:.0e} block parameters; this model has {parameters:.1e}"
    return None


def in_fit_range(recipe: Recipe) -> bool:
    """Whether the law was fitted to models and text like these."""
    return unknown(recipe) is None


def epochs(recipe: Recipe, max_iters: int, unique: int | None) -> float | None:
    """How often a run of `max_iters` reads each of its unique tokens."""
    return max_iters * recipe.batch.tokens_per_iter / unique if unique else None


def caveats(recipe: Recipe, iterations: list[int], unique: int | None = None) -> list[str]:
    """What to mind of a plan: repeated text, and where a forecast is outside the data that the law was fitted to."""
    most, known = epochs(recipe, max(iterations), unique) or 0, in_fit_range(recipe)
    low, high = constants()["valid_range"]["D"]
    least, longest = (iteration * recipe.batch.tokens_per_iter for iteration in (min(iterations), max(iterations)))
    muon, cosine = recipe.optim.name == "muon", recipe.schedule.kind == "cosine"
    holds = {
        "how many tokens the text has is not known until it is prepared: the losses are of text that no run reads"
        " twice": known and unique is None,
        f"{max(iterations):,} iterations are {most:,.1f} epochs: {REPEATED}": most >= MANY_EPOCHS,
        f"the law was fitted to {low:.0e} to {high:.1e} tokens; here are {least:.1e} to {longest:.1e}": known
        and not low <= least <= longest <= high,
        "the factor of Muon was measured at 124M parameters on FineWeb and is carried over": known and muon,
        "Muon under a cosine was not measured; the factor is the one of a linear decay": known and muon and cosine,
        f"updates of {recipe.batch.tokens_per_iter:,} tokens are outside of the sweep behind the law": known
        and not constants()["batch"]["range"][0] <= recipe.batch.tokens_per_iter <= constants()["batch"]["range"][1],
        "no run behind the law had dropout, which costs a model that sees few epochs": known and recipe.model.dropout,
    }
    return [caveat for caveat, true in holds.items() if true]


NUMBERS = ("params_nonembedding_millions", "unique_tokens_billions", "tokens_billions", "val_loss")
CALIBRATION = ("dataset", "annealed", *NUMBERS)


def offset_of(file: Path, recipe: Recipe) -> float:
    """Nats by which the measured runs of a CSV on the recipe's dataset lie above the law, their mean.

    The file has the columns CALIBRATION, as facts/measured_runs.csv; annealed rows count, trained as `recipe` trains.
    Raises `InputError` for missing columns, values that are no numbers, and when no row fits.
    """
    name, dataset, factor = f"`--calibrate {file}`", dataset_of(recipe), factor_of(recipe)
    try:
        runs = rows_of(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None
    if missing := set(CALIBRATION) - set(runs[0] if runs else {}):
        needed = ", ".join(CALIBRATION)
        raise InputError(f"{name}: no column {', '.join(sorted(missing))}; {needed} are needed")
    above = []
    for row in runs:
        if row["dataset"] == dataset and row["annealed"] == "yes":
            try:
                parameters, unique, tokens, loss = (float(row[key]) for key in NUMBERS)
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None
            above.append(loss - annealed_loss(1e6 * parameters, 1e9 * tokens, 1e9 * unique, dataset, factor))
    if not above:
        raise InputError(f"{name}: no row with `dataset` {dataset} and `annealed` yes")
    return sum(above) / len(above)
