"""Measure a model and its opponents: python recipes/eval.py MODEL [--against OPPONENT ...]

Losses on the validation set and on plain texts, lm-eval's benchmarks, and a paired verdict for each task. MODEL is
a run (its newest finished model), a model folder, or a Hub name; for a run's model the run's recipe says what is
measured unless an option does. Answers are kept: the same command continues after an interruption, and GPT-2 is
measured once.
"""

import argparse
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

from overnight.cli import exit_code, starting, user_path
from overnight.core.console import outlets
from overnight.core.extras import require
from overnight.core.files import file_name
from overnight.errors import EXIT_INTERRUPTED, InputError, all_of
from overnight.recipe.schema import QUICK, Evaluation
from overnight.run_dir.layout import model_at, origin_of

AGAINST = "opponents: Hub names, folders, `untrained`, `unigram` (a table of word-piece frequencies), or none"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run, a model folder or a Hub name")
    parser.add_argument("--against", nargs="+", help=AGAINST)
    parser.add_argument("--tasks", nargs="+", help="names of lm-eval's tasks and groups, or none")
    parser.add_argument("--limit", type=int, help="only the first N items of each task")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} items of each task")
    parser.add_argument("--tasks-dir", help="a folder of further task files in lm-eval's format")
    parser.add_argument("--trust-tasks", action="store_true", help="let the task files in --tasks-dir run code")
    parser.add_argument("--data-dir", type=user_path, help="read the items of the tasks below it, not from the Hub")
    parser.add_argument("--texts", nargs="+", help="text files or NAME[:CONFIG[:SPLIT[:COLUMN]]] on the Hub, or none")
    parser.add_argument("--shards", help="prepared data whose validation set is measured, or none (default: the run's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of every model")
    parser.add_argument(
        "--out", type=user_path, help="folder of the results (default: the run's evaluation/, or ./evaluation/)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured; change nothing")


def config_of(options: argparse.Namespace, defaults: Evaluation) -> Evaluation:
    """The recipe's config with those of the command line on top; `none` is an empty list."""
    given = {name: getattr(options, name) for name in ("against", "tasks", "texts", "limit", "tasks_dir")}
    given = {name: [] if value == ["none"] else value for name, value in given.items() if value is not None}
    if options.quick:
        given |= {"limit": QUICK}
    if given.get("limit", 1) < 1:
        raise InputError(f"`--limit` is {options.limit}; {QUICK} would work")
    return Evaluation.model_validate(defaults.model_dump() | given)


def folder_of(options: argparse.Namespace, home: Path, config: Evaluation, defaults: Evaluation) -> Path:
    """Where the results go: what others settings than the recipe's gave lies beside the answer of these."""
    others = [config != defaults, options.dtype != "float32", options.shards]
    settings = json.dumps([config.model_dump(), options.dtype, options.shards], sort_keys=True)
    beside = f"-with-{hashlib.sha256(settings.encode()).hexdigest()[:8]}" if any(others) else ""
    return home / "evaluation" / f"{file_name(Path(options.model).name)}{beside}"


def run(options: argparse.Namespace) -> int:
    require("eval", "an evaluation")
    options.model = model_at(options.model)
    origin = origin_of(options.model)
    defaults = origin.recipe.evaluation if origin else Evaluation()
    config = config_of(options, defaults)
    if options.dry_run or not options.tasks:  # else they are opened with these: all that is wrong is told at once
        all_of(*(partial(model_at, name) for name in config.against if name not in ("untrained", "unigram")))
    out = options.out or folder_of(options, origin.folder if origin else Path(), config, defaults)
    if options.dry_run:
        print(f"{options.model} against {', '.join(config.against) or 'nothing'}, into {out}")
        print(f"tasks: {', '.join(config.tasks) or 'none'}, {config.limit or 'all'} items of each")
        print(f"texts: {', '.join(config.texts) or 'none'}")
        return 0
    starting(f"the evaluation of {options.model}")
    from overnight.evaluation.evaluate import Plan, Session, launch_evaluation

    shards = options.shards or (origin.recipe.data.dir if origin else "none")
    plan = Plan(
        model=options.model,
        config=config,
        shards_dir=None if shards == "none" else Path(shards),
        data_dir=options.data_dir,
        trust_tasks=options.trust_tasks,
        dtype=options.dtype,
        out=out,
        origin=origin,
    )
    accelerator = launch_evaluation()
    Session(plan, accelerator).run()
    accelerator.end_training()  # takes leave of the other processes; left to the interpreter's end, that may abort it
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    outlets()
    add_options(parser)
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # lm-eval's bars; the evaluation has one of its own
    try:
        return exit_code(lambda: run(options))
    except KeyboardInterrupt:
        print("interrupted; what was answered is kept, and the same command continues from there", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
