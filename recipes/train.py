"""Train a recipe: accelerate launch recipes/train.py [RECIPE] [--section.key VALUE ...]

The same command again resumes; a finished run prints its results and the next command. Without a recipe, a machine with
a CUDA device trains fineweb_edu_40m.yaml and any other the quickstart.
"""

import sys
from pathlib import Path

from overnight.cli import recipe_command

RECIPES = Path(__file__).resolve().parent


def default_recipe() -> Path:
    """The recipe for the device at hand; says which and why."""
    import torch

    cuda = torch.cuda.is_available()
    name = "fineweb_edu_40m.yaml" if cuda else "quickstart.yaml"
    found = f"a CUDA device, {torch.cuda.get_device_name()}" if cuda else "no CUDA device"
    print(f"no recipe was named and there is {found}: recipes/{name} runs", flush=True)
    return RECIPES / name


def run(recipe, options) -> int:
    from overnight.train import (
        train,  # torch and transformers take seconds to import: --help and bad input need neither
    )

    return train(recipe, dry_run=options.dry_run)


if __name__ == "__main__":
    sys.exit(recipe_command(__doc__, run, default=default_recipe))
