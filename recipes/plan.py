"""Plan a run: python recipes/plan.py RECIPE [--gpu NAME] [--section.key VALUE ...]

What each budget costs on a card and what loss to expect of it, before anything runs. Without --gpu it is the card
of this machine, and there are no hours without one. With --probe, 20 iterations of random tokens are trained on
the device at hand, so that neither data nor a run is needed, and the hours follow from what they reached.
"""

import argparse
import sys
from typing import Any

from overnight.cli import recipe_command, user_path
from overnight.errors import InputError
from overnight.recipe.schema import Recipe


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", metavar="NAME", help="a card of facts/gpus.csv, for instance rtx-4070; or `all`")
    parser.add_argument("--milestones", metavar="N,N", help="budgets in iterations (default: 6000,10000,15000,20000)")
    parser.add_argument("--throughput", type=float, metavar="TOK_S", help="tokens per second, if you know better")
    parser.add_argument("--probe", action="store_true", help="train 20 iterations on this device and measure them")
    parser.add_argument(
        "--probe-file", type=user_path, metavar="FILE", help="with --probe: write the result there; without: read it"
    )
    parser.add_argument(
        "--calibrate",
        type=user_path,
        metavar="CSV|RUN",
        help="a table of measured runs that shift the law, or a run folder",
    )
    parser.add_argument("--hours-per-night", type=float, default=10.0, metavar="H", help="default 10")
    parser.add_argument("--price-kwh", type=float, default=0.30, metavar="P", help="default 0.30")
    parser.add_argument("--json", action="store_true", help="print the same for programs")
    parser.add_argument("--plot", type=user_path, metavar="FILE", help="draw loss against hours into a .png or .svg")


def probe(recipe: Recipe) -> dict[str, Any]:
    """What this device reaches with the recipe."""
    from overnight.training.probe import probe  # torch and transformers take seconds to import

    return probe(recipe)


def run(recipe: Recipe, chosen: argparse.Namespace) -> int:
    from overnight.planning.plan import plan

    if chosen.json and chosen.probe:
        raise InputError(
            "`--json` prints the plan alone; `--probe --probe-file FILE` first, then `--probe-file FILE --json`"
        )
    if chosen.dry_run:
        from overnight.device.launch import launch
        from overnight.training.setup import print_plan  # torch takes seconds to import: a plan needs none

        print_plan(recipe, *launch(recipe))
        return 0
    return plan(recipe, chosen, probe)


if __name__ == "__main__":
    sys.exit(recipe_command(__doc__, run, options=add_options))
