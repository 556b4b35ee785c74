"""After each validation of a run: what its budgets will reach, what more of it costs, and whether the curve is flat."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from accelerate.utils import broadcast_object_list

from overnight.core.console import duration
from overnight.planning.forecast import FEWEST, Forecast, Point, forecast, usable, validations
from overnight.planning.scaling_law import INTERVAL, Expected
from overnight.recipe.schedule import branch_point, ending_now, fits, goals, towards
from overnight.recipe.schema import Recipe, Schedule
from overnight.run_dir.layout import finished
from overnight.training.log import informs, track, watts
from overnight.training.state import Run


@dataclass(frozen=True)
class Outlook:
    """Budgets that can still be had, ascending; the first begins to decay right now, where that is possible."""

    budgets: list[int]
    ending_now: bool  # whether the first is the run that would end now
    forecast: Forecast

    def loss(self, budget: int) -> Expected:
        """The last validation's loss of a budget."""
        return self.forecast.at(self.budgets.index(budget))

    def gain(self, shorter: int, longer: int) -> Expected:
        """Nats by which the longer budget ends below the shorter one."""
        return self.forecast.gain(self.budgets.index(shorter), self.budgets.index(longer))

    def flat(self, goals: list[int], least: float) -> int | None:
        """The next goal, where training on to it is not worth it with 90 % certainty; None otherwise.

        `least` is what the way from one goal to the next has to gain, in nats, and a part of the way its part: just
        before a goal little is left to gain, and little to pay.
        """
        now, *later = self.budgets
        longer = next((goal for goal in goals if goal in later), None)
        if not self.ending_now or longer is None:
            return None
        before = max((goal for goal in goals if goal < longer), default=0)
        part = (longer - now) / (longer - before)
        return longer if self.gain(now, longer).chance_below(least * part) >= INTERVAL else None


def target_of_flat_curve(run: Run) -> int | None:
    """Early stopping: tell and record the forecast that the validations so far allow.

    Returns the target to end with where the recipe wants that and the curve is flat.
    """
    end = forecast_ends(run) if run.accelerator.is_main_process else None
    if not run.recipe.stop.when_flat:
        return None
    (end,) = broadcast_object_list([end])
    if end is None:
        return None
    target, longer = end
    tell_flat(run, target, longer)
    return target


@informs("the forecast")
def forecast_ends(run: Run) -> tuple[int, int] | None:
    """Tell and record the forecast; of a flat curve, the budget to end with, and the one that is not worth it."""
    started = time.monotonic()
    outlook = outlook_of(run)
    if outlook is None:
        return None
    longer = outlook.flat(goals(run.recipe.schedule), run.recipe.stop.min_gain_nats)
    tell_forecast(run, outlook, longer, started)
    return None if longer is None else (outlook.budgets[0], longer)


def outlook_of(run: Run) -> Outlook | None:
    """The forecast from the run's validations so far; None while they are too few, and when nothing is to come."""
    schedule, directory = run.recipe.schedule, run.directory
    seen = validations(schedule, directory.records())
    now = None if run.decaying else ending_now(schedule, run.iteration)
    if now is not None and branch_point(towards(schedule, now)) < schedule.warmup_iters:
        now = None
    budgets = to_come(run.recipe, run.schedule, run.iteration) - finished(directory.path).keys()
    ascending = sorted(budgets | ({now} if now else set()))
    if not budgets or len(usable(run.recipe, seen)) < FEWEST:
        return None
    wanted = [Point(budget, towards(schedule, budget)) for budget in ascending]
    found = forecast(run.recipe, run.shards.train.tokens, seen, wanted)
    return Outlook(ascending, now is not None, found)


def to_come(recipe: Recipe, aimed: Schedule, iteration: int) -> set[int]:
    """The budgets that a run at `iteration`, on its way to the end of `aimed`, ends with there or branches off to."""
    schedule, trunk = recipe.schedule, min(iteration, branch_point(aimed))
    known = {*goals(schedule), *(branch for branch in schedule.branches if fits(schedule, branch))}
    ahead = {budget for budget in known if branch_point(towards(schedule, budget)) >= trunk} | {aimed.max_iters}
    return {budget for budget in ahead if budget > iteration}


def tell_forecast(run: Run, outlook: Outlook, flat: int | None, started: float) -> None:
    """A row for each budget on the screen, one record in metrics.jsonl, the losses to the trackers."""
    seconds, power = run.throughput.per_iteration(), watts(run)
    if seconds:
        seconds += run.throughput.validation_seconds / run.recipe.validation.every
    table: list[tuple[str, str]] = []
    record: list[dict[str, Any]] = []
    for at, budget in enumerate(outlook.budgets):
        loss = outlook.loss(budget)
        low, high = loss.interval()
        row = {"max_iters": budget, "loss": loss.loss, "loss_low": low, "loss_high": high}
        words = f"{loss.loss:.3f} ± {(high - low) / 2:.3f}"
        if at:
            before = outlook.budgets[at - 1]
            gain = outlook.gain(before, budget)
            low, high = gain.interval()
            row |= {"gain": gain.loss, "gain_low": low, "gain_high": high}
            price = f"-{gain.loss:.3f} ± {(high - low) / 2:.3f}".replace("--", "+")
            if seconds:
                row["hours"] = (budget - before) * seconds / 3600
                price += f", {duration(3600 * row['hours'])}"
            if seconds and power:
                row["kwh"] = row["hours"] * power / 1000
                price += f", {row['kwh']:.1f} kWh"
            words += f"  ({price})"
        record.append(row)
        table.append((f"{'ending now, ' * (outlook.ending_now and not at)}{budget:,}", words))
    run.record("forecast", budgets=record, flat=flat is not None, seconds=time.monotonic() - started)
    run.console.table("forecast of the last validation loss, ± half of a 90 % interval (change, cost)", table)
    if flat and not run.recipe.stop.when_flat:
        run.console.log(f"flat, {INTERVAL:.0%} sure: training on to {flat:,} iterations is not worth it")
    known = record[outlook.ending_now :]  # of the budget that would end now, each validation has another
    track(run, {f"forecast/{row['max_iters']}": row["loss"] for row in known})


def tell_flat(run: Run, target: int, longer: int) -> None:
    """Say and record that the learning rate falls from here on, to end with a finished model at `target`."""
    if run.accelerator.is_main_process:
        least = run.recipe.stop.min_gain_nats
        run.record("event", event="flat", budget=target, longer=longer, min_gain_nats=least)
        run.console.log(
            f"flat, {INTERVAL:.0%} sure: the rest of the way to {longer:,} iterations would gain less than its share of"
            f" `stop.min_gain_nats` {least:g}; the learning rate falls from here to the end at iteration {target:,}"
        )
