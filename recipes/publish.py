"""Send a run's finished models to the Hub: python recipes/publish.py runs/NAME [--repo-id OWNER/NAME]

A branch for each finished model, `main` for the one with the lowest validation loss. What is there already is not sent
again, and every file is verified by the Hub's own listing. A recipe with `hub.repo_id` does this by itself while it
trains.
"""

import argparse
import sys
from pathlib import Path

from overnight.cli import exit_code
from overnight.errors import InputError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, runs/NAME")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="default: the recipe's `hub.repo_id`")
    parser.add_argument("--public", action="store_true", help="a repository that is made can be seen by everybody")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent; send nothing")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    try:
        from overnight.hub.upload import publish

        return publish(options.run, options.repo_id, public=options.public, dry_run=options.dry_run)
    except InputError as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
