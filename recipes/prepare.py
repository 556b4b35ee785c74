"""Turn a recipe's text into verified token shards: python recipes/prepare.py RECIPE [--section.key VALUE ...]"""

import argparse
import os
import sys
from pathlib import Path

from overnight.cli import recipe_command, user_path
from overnight.core.extras import require
from overnight.core.processes import handled
from overnight.data.manifest import is_prepared
from overnight.errors import EXIT_INTERRUPTED, InputError
from overnight.recipe.text import pairs, typed

TOLD = ("data.path", "data.files", "data.revision", "data.license")  # on the command line, of tokens that are adopted


def add_options(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="files that are worked on at once (default: cores)")
    parser.add_argument("--executor", choices=("local", "slurm", "ray"), default="local", help="datatrove's")
    parser.add_argument(
        "--executor-options", default="{}", help="options of that executor: '{partition: cpu, time: \"02:00:00\"}'"
    )
    parser.add_argument(
        "--adopt",
        type=user_path,
        metavar="DIR",
        help="use the token files in DIR (datatrove's, nanoGPT's); their text is described by"
        " --data.path, .files, .revision and .license of this command line, not by the recipe",
    )
    parser.add_argument("--verify", type=user_path, metavar="DIR", help="check a prepared folder; needs no RECIPE")


def cost(recipe) -> str:
    """What preparing takes; refused where the text is on this machine, and is not there."""
    from overnight.prepare.cost import cost_of, expected_cost

    places = [recipe.data.path] if isinstance(recipe.data.path, str) else recipe.data.path or []
    known = is_prepared(Path(recipe.data.dir)) or any("://" in place for place in places)
    if known or recipe.data.source != "files":
        return expected_cost(recipe.data)
    from overnight.prepare.sources import find

    return cost_of(find(recipe.data, None), recipe.data, recipe.model.vocab_size)


def run(recipe, options) -> int:
    given = typed(options.executor_options)
    if not isinstance(given, dict):
        raise InputError(f"`--executor-options` is {options.executor_options!r}; '{{partition: cpu}}' would work")
    if options.workers < 1:
        raise InputError(f"`--workers` is {options.workers}; 1 would work")
    if options.adopt:
        from overnight.prepare.adopt import adopt

        given = dict(pairs(options.arguments[1:], []))
        if recipe.data.source != "files" and "data.dir" not in given:
            raise InputError(
                f"`--adopt` would fill {recipe.data.dir}, the folder of the recipe's own text;"
                " `--data.dir data/adopted` would work"
            )
        said = {key.removeprefix("data."): str(given[key]) for key in TOLD if key in given}
        adopt(options.adopt, recipe.data, recipe.model.vocab_size, said=said, dry_run=options.dry_run)
        if not options.dry_run:
            named = "" if "name" in given else f" --name {Path(recipe.data.dir).name}"
            print(f"next: {recipe.command('train.py')}{named}")
        return 0
    print(f"{recipe.data.dir}: {cost(recipe)}", flush=True)
    if not options.dry_run:
        require("prepare", "preparing data")
        from overnight.prepare.prepare import Workers, prepare

        prepare(recipe.data, recipe.model.vocab_size, workers=Workers(options.executor, options.workers, given))
    return 0


def verify(options) -> int | None:
    if options.verify is None:
        return None
    from overnight.data.shards import verify

    manifest = verify(options.verify)
    print(
        f"{options.verify}: {len(manifest.train) + len(manifest.val)} shards and the tokenizer are as its manifest says"
    )
    return 0


def interrupt(number, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        with handled(interrupt):
            sys.exit(recipe_command(__doc__, run, options=add_options, alone=verify))
    except KeyboardInterrupt:
        print("interrupted; what is staged is kept, and the same command continues from there", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
