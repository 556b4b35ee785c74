"""Show a run: python recipes/report.py runs/NAME [runs/OTHER ...] --curve

Draws training and validation loss, the forecasts as they were made, the finished models, and the published loss of
GPT-2 124M where the data is one that it is known on; several runs over each other. Nothing but files is read, so it can
be done while the run goes on.
"""

import argparse
import sys
from pathlib import Path

from overnight.cli import exit_code
from overnight.recipe import InputError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, runs/NAME")
    parser.add_argument("--curve", action="store_true", required=True, help="draw the curve")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report/curve.png in the first run")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    file = options.out or options.runs[0] / "report" / "curve.png"
    try:
        from overnight.curve import draw

        draw(options.runs, file)
    except InputError as error:
        return exit_code(error)
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
