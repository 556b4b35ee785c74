"""The GPU day: python benchmarks/gpu_day/day.py STEP ... with the steps 1, 2, 3, or `check` for a short look.

Each step runs its tasks one after the other, each a process of its own with its own time limit, and ends within
--minutes. What a task found is in step-STEP.json as soon as it has ended; its output is in step-STEP.log. The failure
of one task costs no other, and the death of this script nothing that was written. A table comes last. Only the
standard library is needed here, so that --wheels can bring what the tasks need to a machine without a network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from steps import DAY, ROOT, STEPS, Settings, Task

TAIL = 4_000  # characters of a task's output that are kept where it failed or leaves no file
TABLE_SECONDS = 15  # kept for the table
RECORDS = {"records": "metrics", "before_kill": "before_kill"}  # of a run folder
SLOWNESS = {"cuda": 1, "cpu": 6}  # of a device that the limits were not made for


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="+", choices=STEPS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="the quickstart's shape; always so with --device cpu")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="parquet files to train on")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a folder with nanoGPT's model.py, to be timed too")
    parser.add_argument("--iterations", type=int, help="of the run in step 2 (350; with --small 12)")
    parser.add_argument("--minutes", type=float, help="after which a step ends, whatever is left (9; on a CPU 54)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="packages that this machine lacks")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-day", metavar="DIR", help="for the results")
    return parser


def main() -> int:
    parser = arguments()
    chosen = parser.parse_args()
    small, slowness = chosen.small or chosen.device == "cpu", SLOWNESS[chosen.device]
    minutes = chosen.minutes or 9 * slowness
    missing = [path for path in (*chosen.text, chosen.nanogpt, chosen.wheels) if path and not path.exists()]
    if missing:
        parser.error(f"there is no {missing[0]}")
    if not small and not chosen.text and {"2", "3"} & {*chosen.step}:
        parser.error("steps 2 and 3 need --text FILE ...: parquet files with a column `text`, 15M tokens or more")
    settings = Settings(chosen.device, small, tuple(chosen.text), chosen.nanogpt, chosen.iterations)
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="overnight-gpu-day-") as scratch:
        environment = environment_of(chosen.device, Path(scratch), chosen.wheels)
        codes = []
        for step in chosen.step:
            work = Path(scratch) / f"step-{step}"
            work.mkdir()
            report = chosen.out / f"step-{step}.json"
            tasks = [task._replace(seconds=task.seconds * slowness) for task in STEPS[step](settings)]
            print(
                f"step {step}, at most {minutes:g} minutes; what its tasks say: {report.with_suffix('.log')}",
                flush=True,
            )
            codes.append(run_step(settings.recipe.name, tasks, report, work, environment, 60 * minutes))
            print_table(report, environment)
    return max(codes)


def environment_of(device: str, scratch: Path, wheels: Path | None) -> dict[str, str]:
    """The environment of every task: this checkout, the wheels unpacked, no network, and on the CPU no card."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    if wheels:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target"]
        subprocess.run([*install, str(scratch / "site"), *map(str, sorted(wheels.glob("*.whl")))], check=True)
        paths.insert(0, str(scratch / "site"))
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | ours | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def run_step(
    recipe: str, tasks: list[Task], report: Path, work: Path, environment: dict[str, str], seconds: float
) -> int:
    """Run `tasks` in the folder `work` within `seconds`; 2 when the device is missing, 1 when a task failed."""
    ends, found = time.monotonic() + seconds - TABLE_SECONDS, {}
    with report.with_suffix(".log").open("w+", encoding="utf-8", errors="replace") as log:
        for task in tasks:
            print(f"{task.name:<22}", end="", flush=True)
            found[task.name] = run_task(task, work, log, environment, ends - time.monotonic())
            write(report, {"recipe": recipe, "arguments": sys.argv[1:], "tasks": found})
            print("{exit:>6}  {seconds:5.0f} s".format(**found[task.name]), flush=True)
            if task.name == "here" and found[task.name]["exit"]:
                print(found[task.name]["output"])
                return 2
    return int(any(each["exit"] for each in found.values()))


def run_task(task: Task, work: Path, log: IO[str], environment: dict[str, str], left: float) -> dict[str, Any]:
    """One task to its end or limit, its output behind what is in `log`: what is known of it."""
    log.write(f"== {task.name}: {' '.join(task.words)}\n")
    log.flush()
    before, started = log.tell(), time.monotonic()
    code = ended(task.words, work, log, environment, min(task.seconds, left)) if left > 0 else "unrun"
    known: dict[str, Any] = {"words": task.words, "exit": code, "seconds": time.monotonic() - started}
    result = result_of(work / task.result) if task.result else None
    if result is not None:
        known["result"] = result
    if code or not task.result:
        log.seek(before)
        known["output"] = log.read()[-TAIL:]
    log.seek(0, os.SEEK_END)
    return known


def ended(words: list[str], work: Path, log: IO[str], environment: dict[str, str], limit: float) -> int | str:
    """The exit code of `python WORDS`, or "late"; whatever it has started is gone afterwards."""
    how: dict[str, Any] = {"cwd": work, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([sys.executable, *words], stdin=subprocess.DEVNULL, start_new_session=True, **how)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return "late"
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def result_of(path: Path) -> Any:
    """The content of a JSON file, or what a run folder tells; None while it is not there."""
    if path.is_dir():
        return told_by_run(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def told_by_run(folder: Path) -> dict[str, Any] | None:
    """Environment and records of a run, as they stand, and what was recorded before a kill; None before the first."""
    environment = folder / "environment.json"
    if not environment.exists():
        return None
    records = {name: lines_of(folder / f"{file}.jsonl") for name, file in RECORDS.items()}
    return {"environment": json.loads(environment.read_text(encoding="utf-8"))} | records


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The records of a file that may not be there; a kill may have cut the last line."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def write(path: Path, found: dict[str, Any]) -> None:
    """Replace `path` in one go."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def print_table(report: Path, environment: dict[str, str]) -> None:
    """Each figure beside its prediction, by a process that has the project's packages."""
    command = [sys.executable, str(DAY / "report.py"), str(report)]
    subprocess.run(command, env=environment, check=False)


if __name__ == "__main__":
    sys.exit(main())
