"""Train a recipe: python recipes/train.py [RECIPE] [--section.key VALUE ...]

The same command again resumes; a finished run prints its results and the next command. Without a recipe, a machine with
a CUDA device trains fineweb_edu_40m.yaml and any other the quickstart.
"""

import argparse
import sys

from overnight.cli import default_recipe, recipe_command, starting
from overnight.core.processes import end_with_launcher
from overnight.recipe.schema import Recipe


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the trainer takes beside a recipe and its overrides."""
    says = "allow KEY to differ from its value when the run began, and record that; may be given several times"
    parser.add_argument("--allow-change", metavar="KEY", action="append", default=[], help=says)
    says = "finish the budget of N iterations from the trunk's checkpoint at which its decay begins"
    parser.add_argument("--cooldown", metavar="N", type=int, help=says)
    says = "finish by this time of day (`--schedule.hours H` finishes within H hours)"
    parser.add_argument("--until", metavar="HH:MM", help=says)
    says = "hub:OWNER/NAME, where a run with `hub.push_state` pushed its state: continue it on this machine"
    parser.add_argument("--resume", metavar="SOURCE", help=says)


def run(recipe: Recipe, options: argparse.Namespace) -> int:
    if not options.dry_run:
        from overnight.prepare.cost import require_data

        require_data(recipe)
        starting(f"the training of {recipe.name}")
    from overnight.training.train import train  # with torch and transformers

    return train(
        recipe,
        dry_run=options.dry_run,
        allowed=options.allow_change,
        cooldown=options.cooldown,
        until=options.until,
        resume_from=options.resume,
    )


if __name__ == "__main__":
    end_with_launcher()
    sys.exit(recipe_command(__doc__, run, default=default_recipe, options=add_options))
