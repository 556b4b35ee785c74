"""What a run has seen of its own losses, and what that says: pure functions over a history that checkpoints keep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

WINDOW = 64  # training losses that a new one is compared with
FEWEST = 16  # losses below which nothing is called a spike
SPIKE = 8.0  # standard deviations above the median, the deviation taken from the median of the distances to it
LEAST = 0.05  # nats; a smaller rise is never worth a word


@dataclass
class History:
    """The losses of a run so far. All of it is JSON, so that a resumed run sees what an undisturbed one would see."""

    losses: list[float] = field(default_factory=list)  # of the last WINDOW iterations that were finite, in nats a token
    validations: list[tuple[int, float]] = field(default_factory=list)  # (iteration, nats a token), all of them
    spiking: bool = False  # the last iteration was part of a spike
    skipped: int = 0  # updates left out because they were not finite
    skipped_in_a_row: int = 0

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> History:
        """What `as_json` gave."""
        return cls(**stored | {"validations": [(iteration, loss) for iteration, loss in stored["validations"]]})

    def as_json(self) -> dict[str, Any]:
        """Everything, for `state.json`."""
        return asdict(self)

    def add(self, loss: float, *, finite: bool) -> float | None:
        """Count an iteration; returns by how many nats it rose above the usual where a spike begins with it."""
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped += not finite
        if not finite:
            return None
        rise = spike(self.losses, loss)
        begins, self.spiking = rise is not None and not self.spiking, rise is not None
        self.losses = [*self.losses[1 - WINDOW :], loss]
        return rise if begins else None

    @property
    def last_val(self) -> tuple[int, float] | None:
        """(iteration, nats a token) of the last validation."""
        return self.validations[-1] if self.validations else None

    @property
    def best_val(self) -> float | None:
        """The lowest validation loss so far, nats a token."""
        return min((loss for _, loss in self.validations), default=None)


def spike(before: Sequence[float], loss: float) -> float | None:
    """The rise of `loss` above the median of the losses `before` it, in nats, where that is a spike; otherwise None.

    A spike is SPIKE robust standard deviations (1.4826 times the median absolute deviation) and LEAST nats or more.
    """
    if len(before) < FEWEST or not math.isfinite(loss):
        return None
    usual = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(each - usual) for each in before)
    rise = loss - usual
    return rise if rise > max(SPIKE * deviation, LEAST) else None
