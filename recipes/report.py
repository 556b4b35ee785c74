"""Show a run: python recipes/report.py runs/NAME [runs/OTHER ...] [--curve | --status]

A folder for each finished model, `report/iter-NNNNNN`, to look at without a network: its card as the Hub would show it,
its curve, its recipe and what was measured of it. With --curve the figure alone: training and validation loss, the
forecasts as they were made, the finished models, GPT-2's published loss where the data is one that it is known on;
several runs over each other. With --status a few lines: where each run stands. Nothing but files is read, so it can be
done from another terminal while the run trains.
"""

import argparse
import sys

from overnight.cli import exit_code, user_path
from overnight.core.console import outlets


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="a run directory, runs/NAME")
    parser.add_argument("--curve", action="store_true", help="draw the curve alone, of all runs in one figure")
    parser.add_argument("--status", action="store_true", help="say where each run stands, and write nothing")
    parser.add_argument(
        "--out", type=user_path, metavar="FILE", help="of the curve; default: report/curve.png in the first run"
    )


def run(options: argparse.Namespace) -> int:
    if options.status:
        from overnight.report.status import status_lines

        print("\n".join(line for folder in options.runs for line in status_lines(folder)))
        return 0
    from overnight.report.curve import draw_curve
    from overnight.report.model_card import report
    from overnight.run_dir.layout import reported
    from overnight.run_dir.metrics import Metrics

    if options.curve:
        file = options.out or options.runs[0] / "report" / "curve.png"
        draw_curve(options.runs, file)
        print(f"written: {file}")
        return 0
    for folder in options.runs:
        for budget in reported(folder):
            print(f"written: {report(folder, budget)}/README.md")
        log = Metrics(folder / "metrics.jsonl")
        log.records()
        if log.skipped:
            print(f"{log.path}: {log.skipped} lines are no whole records, and are left out")
    return 0


def main() -> int:
    outlets()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
