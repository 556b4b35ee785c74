"""Plan a run: python recipes/plan.py RECIPE [--probe] [--section.key VALUE ...]

Prints what follows from the recipe. With --probe, trains 20 iterations of random tokens on the device at hand, so that
neither data nor a run is needed, and prints tokens a second, MFU, peak memory, and the attention kernel that ran.
"""

import argparse
import json
import sys
from pathlib import Path

from overnight.cli import recipe_command
from overnight.recipe import Recipe


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--probe", action="store_true", help="train 20 iterations on this device and measure them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --probe, write the measurements there as well")


def run(recipe: Recipe, chosen: argparse.Namespace) -> int:
    from overnight.probe import probe  # torch and transformers take seconds to import: --help needs neither
    from overnight.startup import launch, print_plan

    if chosen.dry_run or not chosen.probe:
        print_plan(recipe, *launch(recipe))
        return 0
    measured = probe(recipe)
    if chosen.json:
        chosen.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(recipe_command(__doc__, run, options=add_options))
