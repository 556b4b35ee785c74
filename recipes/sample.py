"""Let a finished model write: python recipes/sample.py MODEL [--prompt TEXT]; without --prompt it asks for prompts."""

import argparse
import sys

from overnight.cli import exit_code
from overnight.core.console import outlets
from overnight.run_dir.layout import model_at


def run(options: argparse.Namespace) -> int:
    options.model = model_at(options.model)
    from overnight.model.generate import Writer

    writer = Writer.load(options.model)
    how = {"tokens": options.tokens, "temperature": options.temperature}
    how |= {"top_k": options.top_k, "seed": options.seed}
    if options.prompt is not None:
        print(options.prompt + writer.after(options.prompt, **how))
        return 0
    while prompt := input("> "):
        print(prompt + writer.after(prompt, **how))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", help="a run, a model folder or checkpoint of it, or a Hub name")
    parser.add_argument(
        "--prompt", help="text to continue; without it, each line that you type is a prompt, and an empty one ends"
    )
    parser.add_argument("--tokens", type=int, default=128, help="the most tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token every time")
    parser.add_argument("--top-k", type=int, default=50, help="choose among this many tokens")
    parser.add_argument("--seed", type=int, default=1337, help="equal seeds write equal text")
    options = parser.parse_args()
    outlets()
    try:
        return exit_code(lambda: run(options))
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
