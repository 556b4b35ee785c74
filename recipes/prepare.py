"""Turn a recipe's text into verified token shards: python recipes/prepare.py RECIPE [--section.key VALUE ...]"""

import sys

from overnight.cli import recipe_command


def run(recipe, options) -> int:
    from overnight.prepare import expected_cost, prepare

    print(f"{recipe.data.dir}: {expected_cost(recipe.data)}", flush=True)
    if not options.dry_run:
        prepare(recipe.data, recipe.model.vocab_size)
    return 0


if __name__ == "__main__":
    sys.exit(recipe_command(__doc__, run))
