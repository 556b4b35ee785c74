"""Forecasts of a run's end: what the public curve came to, what a decay teaches, and when a curve says nothing yet."""

import csv
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from overnight.errors import InputError
from overnight.planning.forecast import Point, brownian, forecast, twice_brownian, usable, validations
from overnight.planning.scaling_law import annealed_loss, block_parameters, cosine_offset
from overnight.recipe.load import load
from overnight.recipe.schedule import branch_point, decay_iters, ending_now, goals, towards
from overnight.training.stopping import Outlook

UNIQUE = 3_680_000_000


@pytest.fixture(scope="module")
def night():
    return load(Path(__file__).resolve().parents[1] / "recipes" / "fineweb_edu_40m.yaml")


def by_the_law(recipe, iteration: int, *, lack: float = 0.0, gain: float = 0.12) -> float:
    """A run that lies 0.03 nats above the law, `gain` of which a decay would take."""
    tokens = iteration * recipe.batch.tokens_per_iter
    law = annealed_loss(block_parameters(recipe.model), tokens, UNIQUE, "fineweb-edu", 0.961)
    return law + 0.03 + gain * lack


def trunk(recipe, upto: int, noise: float = 0.004) -> list[tuple[Point, float]]:
    random = np.random.default_rng(upto)
    return [
        (Point(i, recipe.schedule), by_the_law(recipe, i, lack=1.0) + noise * random.standard_normal())
        for i in range(500, upto + 1, 500)
    ]


def ends(recipe, *budgets: int) -> list[Point]:
    return [Point(budget, towards(recipe.schedule, budget)) for budget in budgets]


@pytest.mark.parametrize(("upto", "error"), [(5_000, 0.03), (7_500, 0.02), (10_000, 0.02)])
def test_the_public_124m_run_ends_where_its_beginning_says(root, upto, error):
    overrides = ["--optim.name", "adamw", "--schedule.kind", "cosine", "--schedule.max_iters", "19073"]
    recipe = load(root / "recipes" / "gpt2_124m.yaml", [*overrides, "--schedule.warmup_iters", "715"])
    file = resources.files("overnight") / "facts" / "curve_practitioner_124m_rtx4070.csv"
    rows = csv.DictReader(line for line in file.read_text().splitlines() if line[0] != "#")
    curve = [(Point(int(row["iteration"]), recipe.schedule), float(row["val_loss"])) for row in rows]
    late = [(point, loss) for point, loss in curve if point.iteration >= 13_000]
    seen = [(point, loss) for point, loss in curve if point.iteration <= upto]
    found = forecast(recipe, 10**11, seen, [point for point, _ in late]).mix(dict.fromkeys(range(5), 0.2))
    came = np.mean([loss for _, loss in late])
    assert len(late) == 5 and found.loss == pytest.approx(came, abs=error)
    low, high = found.interval()
    assert low < came < high


def test_a_run_that_follows_the_law_is_forecast_within_its_interval_which_shrinks(night):
    budgets, widths = (6_000, 10_000, 15_000, 20_000), []
    for upto in (4_000, 8_000, 16_000):
        found = forecast(night, UNIQUE, trunk(night, upto), ends(night, *budgets))
        for number, budget in enumerate(budgets):
            low, high = found.at(number).interval()
            assert low < by_the_law(night, budget) < high
        low, high = found.at(3).interval()
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_a_finished_budget_teaches_what_a_decay_takes_off(night):
    schedule = towards(night.schedule, 6_000)
    gain = 0.19  # more than the prior knows of
    seen = [(point, by_the_law(night, point.iteration, lack=1.0, gain=gain)) for point, _ in trunk(night, 8_000)]
    before = forecast(night, UNIQUE, seen, ends(night, 20_000)).at(0)
    after = forecast(night, UNIQUE, [*seen, (Point(6_000, schedule), by_the_law(night, 6_000))], ends(night, 20_000))
    true = by_the_law(night, 20_000)
    assert after.at(0).sigma < before.sigma and abs(after.at(0).loss - true) < abs(before.loss - true)


# The quickstart with `--schedule.milestones "[80, 160, 240]" --validation.every 10`, from iteration 40 on.
TRUNK = [5.549, 5.352, 5.236, 5.119, 5.037, 4.969, 4.920, 4.848, 4.789, 4.744, 4.702, 4.638, 4.604, 4.565, 4.514, 4.460]
DECAYS = {80: [5.352, 5.222, 5.103, 5.049], 160: [4.919, 4.836, 4.758, 4.686, 4.633, 4.579, 4.553]}


@pytest.mark.parametrize(("upto", "decays"), [(90, [80]), (140, [80, 160]), (190, [80, 160])])
def test_a_curve_that_becomes_steeper_before_it_is_a_power_law_ends_inside_the_interval(root, upto, decays):
    recipe = load(root / "recipes" / "quickstart.yaml")
    seen = [(Point(10 * i, recipe.schedule), loss) for i, loss in enumerate(TRUNK, 4) if 10 * i <= upto]
    for budget in decays:
        losses = DECAYS[budget]
        first = budget - 10 * (len(losses) - 1)
        seen += [(Point(first + 10 * i, towards(recipe.schedule, budget)), loss) for i, loss in enumerate(losses)]
    low, high = forecast(recipe, 2_922_822, seen, ends(recipe, 320)).at(0).interval()
    assert low < 3.992 < high < low + 1.0


def test_a_changed_rate_begins_another_curve_and_a_longer_run_does_not(night):
    before = [{"kind": "val", "iteration": i, "loss": 4.0} for i in (500, 1_000)]
    before.append({"kind": "val", "iteration": 1_200, "loss": 3.9, "cooldown": 1_200})  # its decay went on further
    after = {"kind": "val", "iteration": 1_500, "loss": 4.0}
    for key, left in (("optim.lr", [1_500]), ("schedule.max_iters", [500, 1_000, 1_200, 1_500])):
        changed = {"kind": "event", "event": "changed", "key": key, "iteration": 1_000}
        told = validations(night.schedule, [*before, changed, after])
        assert [point.iteration for point, _ in told] == left


# Two runs of benchmarks/forecast.py, a validation each ten iterations: they rest at the loss of the word frequencies.
RESTED = {
    "embedding": ([6.877, 6.865, 6.834, 6.811, 6.774, 6.597], 160, 5.494),
    "vocabulary": ([7.031, 6.992, 6.955, 6.911, 6.847, 6.693], 160, 5.577),
}


@pytest.mark.parametrize("name", RESTED)
def test_a_curve_that_has_rested_may_fall_again(root, name):
    losses, budget, came = RESTED[name]
    options = ["--batch.tokens_per_iter", "2048", "--batch.sequence_length", "128", "--schedule.warmup_iters", "8"]
    options += ["--model.n_layer", "2", "--model.n_embd", "32", "--schedule.max_iters", "240"]
    recipe = load(root / "recipes" / "quickstart.yaml", [*options, "--schedule.decay_fraction", "0.3"])
    seen = [(Point(10 * i, recipe.schedule), loss) for i, loss in enumerate(losses, 2)]
    low, high = forecast(recipe, 2_922_822, seen, ends(recipe, budget)).at(0).interval()
    assert low < came < high < low + 1.3


def test_a_slope_that_wanders_is_a_brownian_motion_integrated():
    fine = np.linspace(-1, 1, 401)
    step = fine[1] - fine[0]
    sums = np.array([step * np.where((fine > 0) & (fine <= x), 1.0, 0.0) for x in fine])
    sums -= np.array([step * np.where((fine < 0) & (fine >= x), 1.0, 0.0) for x in fine])
    assert twice_brownian(fine) == pytest.approx(sums @ brownian(fine) @ sums.T, abs=0.01)


def test_what_going_on_gains_is_surer_than_either_end(night):
    found = forecast(night, UNIQUE, trunk(night, 10_000), ends(night, 15_000, 20_000))
    gain = found.gain(0, 1)
    assert gain.loss == pytest.approx(by_the_law(night, 15_000) - by_the_law(night, 20_000), abs=0.01)
    assert gain.sigma < found.at(0).sigma / 2


def test_a_curve_is_flat_when_the_next_goal_surely_gains_too_little(night):
    found = forecast(night, UNIQUE, trunk(night, 12_000), ends(night, 15_000, 20_000))
    outlook = Outlook([15_000, 20_000], True, found)
    gain = outlook.gain(15_000, 20_000)
    surely = gain.loss + 2 * gain.sigma
    assert outlook.flat([15_000, 20_000], surely) == 20_000
    assert outlook.flat([20_000], surely) is None  # a quarter of the way has to gain a quarter of it
    assert outlook.flat([20_000], 4 * surely) == 20_000
    assert outlook.flat([15_000, 20_000], gain.loss) is None  # as likely as not is not sure
    assert Outlook([15_000, 20_000], False, found).flat([20_000], 10.0) is None  # nothing can be ended here
    assert outlook.flat([15_000], 10.0) is None  # no longer budget


def test_a_curve_that_falls_as_the_law_says_is_not_flat_just_before_a_goal(root):
    ladder = load(root / "recipes" / "fineweb_edu_40m_ladder.yaml")
    budgets = goals(ladder.schedule)
    for upto in range(7_500, 16_000, 500):
        now = ending_now(ladder.schedule, upto)
        ahead = [now, *(goal for goal in budgets if goal > now)]
        outlook = Outlook(ahead, True, forecast(ladder, UNIQUE, trunk(ladder, upto), ends(ladder, *ahead)))
        assert outlook.flat(budgets, ladder.stop.min_gain_nats) is None, upto


def test_a_curve_that_is_too_short_says_what_it_needs(night):
    with pytest.raises(InputError, match=r"3 validations after iteration 500 .* 5 are needed, .* at iteration 2500"):
        forecast(night, UNIQUE, trunk(night, 1_500), ends(night, 20_000))
    assert len(usable(night, [(Point(0, night.schedule), 10.8), *trunk(night, 2_500)])) == 5


def test_a_short_decay_gets_its_share_of_the_longest_ones_gain(night):
    memory = np.array([1.0, 1_000.0])
    long, short = ends(night, 20_000, 1_000)
    assert long.lack(memory, 4_000).tolist() == [0, 0]
    assert short.lack(memory, 4_000) == pytest.approx([0.005, 0.876], abs=0.001)
    assert Point(10_000, night.schedule).lack(memory, 4_000).tolist() == [1, 1]
    assert Point(18_000, night.schedule).to_come == 0.5
    offsets = [cosine_offset(share) for share in (0.15, 0.31, 0.5, 0.75, 1.0)]
    assert offsets == pytest.approx([0.1, 0.06, 0.03, 0, 0])


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.4, 0.5, 0.9])
def test_wherever_a_trunk_is_some_budget_begins_to_decay_there(night, fraction):
    schedule = night.schedule.model_copy(update={"decay_fraction": fraction})
    for iteration in (1, 2, 3, 10, 137, 999, 6_400):
        budget = ending_now(schedule, iteration)
        assert budget is not None and branch_point(towards(schedule, budget)) == iteration
        assert budget - decay_iters(towards(schedule, budget)) == iteration
