"""Prints the seconds that the plan's hours are made of, beside what public runs reached: no GPU, nothing is timed.

The estimate knows no caches. The two public runs that are not compiled have 2 and 4 rows at once, so the tensors of
their blocks, 4 to 25 MB, fit into the 36 MB of the RTX 4070's L2 cache. A second line says what is left of the estimate
when nothing of the body goes to the memory; the truth lies between the two.
"""

from __future__ import annotations

import argparse

from overnight.planning.roofline import Parts, moved, power_bound, public_runs, seconds, training

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
        parts = training(run.work, run.gpu)
        print(line(name, parts, run.tokens_per_second))
        if eager:
            cached = parts.memory - seconds(moved(run.work, "body"), run.gpu)
            print(line("  its body in the cache", parts._replace(memory=cached), run.tokens_per_second))


if __name__ == "__main__":
    main()
