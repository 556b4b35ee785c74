"""The learning rate of every iteration, and the arithmetic of a trunk: where budgets branch off, and which can."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from overnight.recipe.schema import Schedule

CELLS = 128  # of the trapezoidal rule, which is exact for a linear decay


def lr_at(iteration: int, schedule: Schedule) -> float:
    """The learning rate of an iteration, counted from 0, as a share of the peak.

    Linear warmup, then for `wsd` constant and `decay_share`, for `cosine` half a cosine down to `final_lr_fraction`.
    """
    if iteration < schedule.warmup_iters:
        return (iteration + 1) / schedule.warmup_iters
    if schedule.kind == "wsd":
        return decay_share(min(1.0, (schedule.max_iters - iteration) / max(1, decay_iters(schedule))))
    progress = (iteration - schedule.warmup_iters) / max(1, schedule.max_iters - schedule.warmup_iters)
    floor = schedule.final_lr_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def decay_share(left: float) -> float:
    """The shape of a WSD decay: the learning rate's share of its peak while `left`, 1 to 0, of it is still to come.

    Linear (Hägele et al. 2024, arXiv 2405.18392). Forecasts and plans take the shape from here.
    """
    return left


def decay_area(over: float) -> float:
    """The integral of `decay_share`, whatever its shape, over the part `over`, 0 to 1, of a decay that is done."""
    shares = [decay_share(1 - over * cell / CELLS) for cell in range(CELLS + 1)]
    return over / CELLS * (sum(shares) - (shares[0] + shares[-1]) / 2)


def decay_iters(schedule: Schedule) -> int:
    """Iterations at the end of a WSD run in which the learning rate falls; 0 under cosine."""
    return round(schedule.max_iters * schedule.decay_fraction) if schedule.kind == "wsd" else 0


def branch_point(schedule: Schedule) -> int:
    """The iteration after which the learning rate falls: where a WSD run leaves the trunk. Under cosine the last."""
    return schedule.max_iters - decay_iters(schedule)


def decaying(schedule: Schedule, iteration: int) -> bool:
    """Whether the update that gave this iteration was made at a learning rate on its way to zero."""
    return iteration > branch_point(schedule)


def towards(schedule: Schedule, milestone: int) -> Schedule:
    """The same schedule of a run that ends at `milestone`: up to its branch point it is the one of any longer run."""
    return schedule.model_copy(update={"max_iters": milestone})


def goals(schedule: Schedule) -> list[int]:
    """The budgets that a run finishes, ascending; the last is its length."""
    return sorted({*schedule.milestones, schedule.max_iters})


def iterations_left(schedule: Schedule, iteration: int, targets: Sequence[int]) -> int:
    """Updates from here to the last of `targets`, ascending: after each the run goes back to where its decay began."""
    back = (later - branch_point(towards(schedule, before)) for before, later in itertools.pairwise(targets))
    return targets[0] - iteration + sum(back)


def ending_now(schedule: Schedule, iteration: int) -> int | None:
    """The shortest budget that begins to decay after `iteration`; None where there is no trunk to end."""
    if schedule.kind != "wsd" or schedule.decay_fraction == 1:
        return None
    first = int(iteration / (1 - schedule.decay_fraction))
    return next(m for m in range(max(1, first - 1), first + 3) if branch_point(towards(schedule, m)) >= iteration)


def branch_points(schedule: Schedule) -> set[int]:
    """The iterations whose checkpoint on the trunk some budget begins to decay from."""
    budgets = [*goals(schedule), *(m for m in schedule.branches if fits(schedule, m))]
    return {branch_point(towards(schedule, m)) for m in budgets}


def fits(schedule: Schedule, milestone: int) -> bool:
    """Whether a budget can branch off: it is shorter than a run with a trunk, and decays after the warmup."""
    after_warmup = schedule.warmup_iters <= branch_point(towards(schedule, milestone))
    return schedule.kind == "wsd" and after_warmup and milestone < schedule.max_iters
