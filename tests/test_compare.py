"""Verdicts on cases whose truth is known, and the statistics against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from overnight.evaluation.results import implausible, page, published_scores
from overnight.evaluation.statistics import (
    ALPHA,
    Paired,
    bootstrap_interval,
    headline,
    holm,
    mcnemar,
    metric_of,
    verdicts,
)

ITEMS = (10_042, 2_376, 1_172, 1_838, 1_267, 500, 1_000, 5_153, 67_000)  # of the default tasks


def answers(random: np.random.Generator, items: int, ours: float, theirs: float, together: float = 0.6):
    """Two models' answers with these accuracies; a share `together` of the items they answer alike by chance."""
    alike = random.random(items) < together
    draws = random.random((2, items))
    draws[1, alike] = draws[0, alike]
    return (draws[0] < ours).astype(float), (draws[1] < theirs).astype(float)


def table(random: np.random.Generator, items, ours: float, theirs: float) -> list[Paired]:
    return [
        Paired(f"task{number}", "acc", 0.25, *answers(random, each, ours, theirs)) for number, each in enumerate(items)
    ]


def p_values_of(tasks: list[Paired]) -> list[float]:
    return [mcnemar(int((t.ours > t.theirs).sum()), int((t.ours < t.theirs).sum())) for t in tasks]


@pytest.mark.slow
def test_equal_models_get_a_verdict_on_any_of_nine_tasks_in_at_most_one_table_of_twenty():
    random = np.random.default_rng(0)
    sizes = [min(each, 2_000) for each in ITEMS]
    tables = [holm(p_values_of(table(random, sizes, 0.35, 0.35))) for _ in range(1_000)]
    assert 0.01 < np.mean([min(p_values) < ALPHA for p_values in tables]) <= 0.065


def test_two_points_on_hellaswag_are_found_four_times_in_five():
    """2.0 points on 10,042 items among eight tasks without a difference, 60 % of the items answered alike."""
    random, found = np.random.default_rng(1), 0
    for _ in range(200):
        tasks = [Paired("hellaswag", "acc_norm", 0.25, *answers(random, ITEMS[0], 0.32, 0.30))]
        tasks += table(random, [1_000] * 8, 0.35, 0.35)
        adjusted = holm(p_values_of(tasks))
        found += adjusted[0] < ALPHA
    assert found / 200 >= 0.8


def test_a_verdict_names_the_better_model_and_counts_the_items_only_one_has_right():
    random = np.random.default_rng(2)
    ours, theirs = answers(random, 5_000, 0.40, 0.33)
    pairs = ((ours, theirs), (theirs, ours), (ours, ours))
    better, worse, same = verdicts([Paired("a", "acc", 0.25, *pair) for pair in pairs])
    assert (better.word, worse.word, same.word) == ("better", "worse", "no difference shown")
    assert (better.only_ours, better.only_theirs) == (worse.only_theirs, worse.only_ours)
    assert better.low < better.difference < better.high and 0 < better.low
    assert same.p == 1 and (same.low, same.high) == (0, 0)
    assert headline([better, better, worse, same]) == 1


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (0, 6), (11, 3), (40, 60), (500, 420)])
def test_mcnemar_is_the_exact_two_sided_binomial_test(won: int, lost: int):
    tail = scipy.stats.binom.cdf(min(won, lost), won + lost, 0.5)
    assert mcnemar(won, lost) == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize("kind", ["answers", "losses"])
def test_the_interval_is_that_of_scipy(kind: str):
    random = np.random.default_rng(3)
    ours, theirs = answers(random, 800, 0.4, 0.36)
    values = ours - theirs if kind == "answers" else random.normal(0.05, 0.4, 800)
    mine = bootstrap_interval(values)
    other = scipy.stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=4)
    interval = (other.confidence_interval.low, other.confidence_interval.high)
    assert mine == pytest.approx(interval, abs=0.003)  # a fourteenth of the width, noise of the resamples
    assert mine == bootstrap_interval(values) != bootstrap_interval(values, seed=5)


def test_a_weighted_interval_is_that_of_the_ratio_of_the_sums():
    random = np.random.default_rng(6)
    weights = random.integers(1, 100, 400).astype(float)
    sums = weights * random.normal(3.0, 0.5, 400)
    drawn = random.integers(0, 400, (4_000, 400))
    expected = np.quantile(sums[drawn].sum(1) / weights[drawn].sum(1), [0.025, 0.975])
    assert bootstrap_interval(sums, weights) == pytest.approx(tuple(expected), abs=0.01)


def test_holm_gives_the_values_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_the_metric_of_each_task_is_fixed():
    normalised = {"hellaswag", "arc_challenge", "openbookqa"}
    tasks = normalised | {"arc_easy", "piqa", "winogrande", "sciq", "lambada_openai", "blimp"}
    assert {task for task in tasks if metric_of(task) == "acc_norm"} == normalised
    assert {metric_of(task) for task in tasks - normalised} == {"acc"}


def test_a_measurement_of_gpt2_far_from_the_published_one_is_warned_about():
    def measured(share: float):
        right = (np.arange(10_042) < 10_042 * share).astype(float)
        [verdict] = verdicts([Paired("hellaswag", "acc_norm", 0.25, right, right)])
        return verdict

    assert published_scores("openai-community/gpt2", measured(0.31)) == 0.3114
    assert implausible("openai-community/gpt2", measured(0.315)) is None
    assert "3.4 standard errors" in str(implausible("openai-community/gpt2", measured(0.2955)))  # the other protocol
    assert implausible("someone/else", measured(0.5)) is None


def test_the_page_says_for_what_reason_nothing_is_compared():
    """A task whose metric is not right or wrong was asked for all the same, and a run's model may be read without."""
    ours = {"facts": {"name": "ours", "parameters": 1, "context": 8}, "validation": None, "texts": {}, "tasks": {}}
    none = {"opponent": "theirs", "tasks": [], "validation": None, "warnings": [], "wins minus losses": 0}

    def said(comparisons: list, tasks: list[str]) -> str:
        settings = {"dtype": "float32", "tasks": tasks}
        return page().render(models=[ours], comparisons=comparisons, settings=settings, notes=[], shown=str)

    assert "No verdict: it needs items that are right or wrong, and wikitext has none.\n" in said([none], ["wikitext"])
    assert "No benchmark was asked for.\n" in said([none], []) and "belongs to no run" not in said([none], [])
    assert "No loss is compared: there was no prepared data (`--shards`)" in said([none], [])
    assert "same items.\nNo opponent was asked for, so nothing is compared.\n" in said([], [])
