"""How far an evaluation is, in tokens, and how fast."""

from __future__ import annotations

from overnight.core.console import Console, Progress, count


class Meter:
    """Counts tokens, to which time is proportional, and requests, of one model on one task."""

    def __init__(self, console: Console):
        self.console = console
        self.begin("")

    def begin(self, name: str, unit: str = "requests", parts: int = 1) -> None:
        """Start counting from zero under another name; what there is to do is said in so many parts."""
        self.name, self.unit, self.parts = name, unit, parts
        self.total = self.done = self.requests = self.begun = 0
        self.progress = Progress(self.console.rich, self.console.log)

    def expect(self, tokens: int) -> None:
        """Add to what there is to do; parts that are still to come are taken to be like those that were."""
        self.total += tokens
        self.begun += 1

    def advance(self, tokens: int, requests: int) -> None:
        """Add to what is done."""
        self.done += tokens
        self.requests += requests
        share = self.done * self.begun / max(self.total * max(self.parts, self.begun), 1)
        requests_a_second, tokens_a_second = (n / self.progress.seconds() for n in (self.requests, self.done))
        speed = f"{requests_a_second:.1f} {self.unit} a second, {count(tokens_a_second)} tokens a second"
        self.progress.update(share, f"{self.name}: {share:.0%}, {speed}, {self.progress.left(share)} left")

    def end(self) -> float:
        """Take the bar away; returns the seconds since `begin`."""
        self.progress.stop()
        return self.progress.seconds()
