"""Train a recipe: accelerate launch recipes/train.py [RECIPE] [--section.key VALUE ...]

The same command again resumes; a finished run prints its results and the next command. Without a recipe, a machine with
a CUDA device trains fineweb_edu_40m.yaml and any other the quickstart.
"""

import argparse
import sys

from overnight.cli import default_recipe, recipe_command
from overnight.recipe import Recipe


def run(recipe: Recipe, options: argparse.Namespace) -> int:
    from overnight.train import train  # torch and transformers take seconds to import: bad input needs neither

    return train(recipe, dry_run=options.dry_run)


if __name__ == "__main__":
    sys.exit(recipe_command(__doc__, run, default=default_recipe))
