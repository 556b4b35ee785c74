"""Prints the seconds that the plan's hours are made of, beside what public runs reached: no GPU, nothing is timed."""

from __future__ import annotations

import argparse

from overnight.planning.roofline import Parts, power_bound, public_runs, training

COLUMNS = f"{'':<44}{'products':>9}{'attention':>10}{'memory':>8}{'estimate':>11}{'public':>9}{'off':>8}"


def line(name: str, parts: Parts, measured: float) -> str:
    """Parts in microseconds a token, rates in tokens a second."""
    microseconds = "".join(f"{1e6 * part:{width}.2f}" for part, width in zip(parts, (9, 10, 8), strict=True))
    rate = parts.tokens_per_second
    return f"{name:<44}{microseconds}{rate:11,.0f}{measured:9,.0f}{rate / measured - 1:+8.1%}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"microseconds and tokens a second\n\n{COLUMNS}")
    for run in public_runs():
        model = run.work.model
        eager = ", eager" if run.compiled == "no" else ""
        limit = ", power" if power_bound(run.gpu) else ""
        name = f"{run.gpu.name}{limit}: {run.code}{eager} {model.n_layer} x {model.n_embd}"
        print(line(name, training(run.work, run.gpu), run.tokens_per_second))


if __name__ == "__main__":
    main()
