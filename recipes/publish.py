"""Send a run's finished models to the Hub: python recipes/publish.py runs/NAME [--repo-id OWNER/NAME]

A branch for each finished model, `main` for the one with the lowest validation loss. What is there already is not sent
again, and every file is verified by the Hub's own listing. A recipe with `hub.repo_id` does this by itself while it
trains.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from overnight.cli import exit_code, user_path
from overnight.core.console import outlets
from overnight.core.extras import require
from overnight.errors import InputError
from overnight.recipe.schema import Hub, Recipe
from overnight.run_dir.layout import recipe_of, reported


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=user_path, metavar="RUN", help="a run directory, runs/NAME")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="default: the recipe's `hub.repo_id`")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent; send nothing")


def with_repository(recipe: Recipe, repo_id: str | None, *, public: bool) -> Recipe:
    """The recipe of a run with the repository that was named; `InputError` where it is none."""
    chosen = recipe.hub.model_dump() | {"repo_id": repo_id or recipe.hub.repo_id}
    chosen["private"] = recipe.hub.private and not public
    try:
        recipe = recipe.model_copy(update={"hub": Hub.model_validate(chosen)})
    except ValidationError as error:
        raise InputError(f"`--repo-id {repo_id}`: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if recipe.hub.repo_id is None:
        raise InputError("no repository: neither `--repo-id OWNER/NAME` nor the recipe's `hub.repo_id` names one")
    return recipe


def list_files(run: Path, recipe: Recipe) -> None:
    """Print what would be sent where; send nothing."""
    from overnight.hub.contents import finished_models

    for commit in finished_models(run, recipe, recipe.hub.repo_id or ""):
        print(f"{recipe.hub.repo_id}, {commit.branch}: {commit.message}")
        for name, path in sorted((commit.files | commit.report()).items()):
            print(f"  {name:<32}{path.stat().st_size:>13,} bytes")
    print(f"nothing was sent; a new repository would be {'private' if recipe.hub.private else 'public'}")


def run(options: argparse.Namespace) -> int:
    recipe = with_repository(recipe_of(options.run), options.repo_id, public=options.public)
    from overnight.hub.upload import publish

    reported(options.run)  # or raise
    require("figures", "the curve on a card")
    if options.dry_run:
        list_files(options.run, recipe)
    else:
        publish(options.run, recipe, partial(print, flush=True))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    outlets()
    add_options(parser)
    options = parser.parse_args()
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
