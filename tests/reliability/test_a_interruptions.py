"""Group A of docs/reliability.md: a run that is killed, signalled, or out of disk ends as one that nobody disturbed."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from faulty import STAGES
from runs import ROOT, TRAIN, environment, final_sums, losses, records, slow, start, tiny

from overnight.errors import InputError
from overnight.model.checkpoint import damage
from overnight.run_dir.metrics import Metrics
from overnight.training import train as train_module
from overnight.training import validation

FAULTY = str(ROOT / "tests" / "reliability" / "faulty.py")
KILL_LOOP = str(ROOT / "tests" / "reliability" / "kill_loop.py")


def read_until(process, beginning: str) -> None:
    """Read the lines of a process until one begins like that."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"no line began with {beginning!r}")


def goes_on_to_the_same_bits(workplace: Path, name: str) -> None:
    """The same command again ends the run, with the losses and the state of the undisturbed one."""
    assert train_module.train(tiny(workplace, "--name", name)) == 0
    assert losses(workplace, name) == losses(workplace, "tiny")
    assert final_sums(workplace, name) == final_sums(workplace, "tiny")


@pytest.mark.slow
def test_a1_killed_at_random_times_a_run_ends_with_the_same_bits():
    command = [sys.executable, KILL_LOOP, "--kills", "2", "--iterations", "56", "--dropout", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills, seed 1" in done.stdout


@pytest.mark.parametrize("stage", [s if s == "the-name" else slow(s) for s in STAGES])
def test_a2_killed_at_a_stage_of_a_save_a_run_goes_on_from_the_checkpoint_before(
    in_process, undisturbed, capsys, stage
):
    name = f"killed-before-{stage}"
    saving = 30 if "pruning" in stage else 20  # the first save that prunes
    process = start(in_process, "tiny.yaml", "--name", name, script=FAULTY, FAULT=f"kill {stage} {saving}")
    said = process.stdout.read()
    assert process.wait() == -signal.SIGKILL, said
    checkpoints = in_process / "runs" / name / "checkpoints"
    assert [damage(path) for path in checkpoints.glob("iter-*")] == [None] * len(list(checkpoints.glob("iter-*")))
    goes_on_to_the_same_bits(in_process, name)
    named = stage in ("the-verification", "pruning", "the-end-of-pruning")  # it has its name by then
    assert f"resumes at iteration {saving if named else saving - 10} from" in capsys.readouterr().out
    assert not list(checkpoints.glob("**/.iter-*"))


def test_a3_a_signal_in_the_middle_of_a_validation_does_not_wait_for_its_end(in_process, undisturbed, monkeypatch):
    real, calls = validation.validation_batches, []

    def signalled(*arguments, **options):
        for batch in real(*arguments, **options):
            calls.append(1)
            if len(calls) == 8:  # after the first look, of five batches
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(validation, "validation_batches", signalled)
    assert train_module.train(tiny(in_process, "--name", "validating")) == 75
    assert len(calls) == 8
    assert [record["iteration"] for record in records(in_process, "validating", "val")] == [0]
    monkeypatch.setattr(validation, "validation_batches", real)
    goes_on_to_the_same_bits(in_process, "validating")
    validations = [[r["loss"] for r in records(in_process, name, "val")] for name in ("validating", "tiny")]
    assert validations[0] == validations[1]


@pytest.mark.slow
def test_a3_a_terminal_that_is_closed_saves_the_run(in_process, undisturbed):
    terminal, trainers_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, TRAIN, "tiny.yaml", "--name", "hung-up"],
        cwd=in_process,
        env=environment(),
        stdin=trainers_end,
        stdout=trainers_end,
        stderr=trainers_end,
        start_new_session=True,
    )
    os.close(trainers_end)
    seen = b""
    while b"iter 12/40" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)  # the kernel sends SIGHUP, and every later line of the trainer is an error
    assert process.wait(30) == 75
    at = records(in_process, "hung-up", "event")[-1]
    assert at["event"] == "interrupted" and at["iteration"] >= 12
    goes_on_to_the_same_bits(in_process, "hung-up")


# Takes its input as the terminal of its session, and becomes the script.
IN_A_TERMINAL = """
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a4_sigterm_to_the_launcher_alone_leaves_no_orphan_and_a_saved_run(in_process, undisturbed):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_config.yaml"),
    ]
    launcher = subprocess.Popen(
        [*command, TRAIN, "tiny.yaml", "--name", "orphan", "--schedule.max_iters", "4000"],
        cwd=in_process,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    read_until(launcher, "iter    5/4000")
    (trainer,) = psutil.Process(launcher.pid).children()
    launcher.terminate()
    launcher.wait(10)
    psutil.wait_procs([trainer], 10)
    assert not trainer.is_running()
    rest = launcher.stdout.read()
    assert "the launcher is gone: finishing what is underway" in rest
    at = int(re.search(r"interrupted after iteration (\d+) and saved", rest)[1])
    assert damage(in_process / f"runs/orphan/checkpoints/iter-{at:06d}") is None
    again = start(in_process, "tiny.yaml", "--name", "orphan", "--schedule.max_iters", "4000")
    read_until(again, f"resumes at iteration {at}")
    read_until(again, f"iter {at + 4:>4}/4000")
    again.kill()
    again.wait()
    found, expected = losses(in_process, "orphan"), losses(in_process, "tiny")
    compared = sorted(found.keys() & expected.keys() & set(range(32)))  # up to where the short run begins to decay
    assert len(compared) > 5
    assert [found[iteration] for iteration in compared] == [expected[iteration] for iteration in compared]


def test_a5_a_second_signal_ends_the_process_at_once_and_leaves_no_torn_checkpoint(in_process, undisturbed, capsys):
    process = start(in_process, "tiny.yaml", "--name", "twice", script=FAULTY, FAULT="slow 60 20")
    read_until(process, "iter 19/40")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.wait(20) == -signal.SIGINT
    assert time.monotonic() - began < 10  # the writer would have waited for a minute
    checkpoints = in_process / "runs" / "twice" / "checkpoints"
    assert all(damage(path) is None for path in checkpoints.glob("iter-*"))
    goes_on_to_the_same_bits(in_process, "twice")


def test_a6_a_disk_that_is_full_in_a_save_costs_that_checkpoint_alone(in_process, undisturbed):
    process = start(in_process, "tiny.yaml", "--name", "full", script=FAULTY, FAULT="full 100000 20")
    said = process.stdout.read()
    assert process.wait() == 0, said
    assert re.search(r"iter-000020 is not saved: .*File too large.*; older checkpoints stay", said)
    checkpoints = in_process / "runs" / "full" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("iter-*")) == ["iter-000010", "iter-000030", "iter-000032"]
    assert not list(checkpoints.glob("**/.iter-*"))
    (event,) = [r for r in records(in_process, "full", "event") if r["event"] == "not saved"]
    assert event["checkpoint"] == "iter-000020"
    assert final_sums(in_process, "full") == final_sums(in_process, "tiny")


def test_a6_a_disk_that_is_full_at_the_export_ends_with_75_and_the_same_command_finishes(in_process, undisturbed):
    process = start(in_process, "tiny.yaml", "--name", "unexported", script=FAULTY, FAULT="full 100000 export")
    said = process.stdout.read()
    assert process.wait() == 75, said
    assert "iter-000040 is not written" in said and "make room, and the same command writes it" in said
    assert list((in_process / "runs" / "unexported" / "models").iterdir()) == []
    goes_on_to_the_same_bits(in_process, "unexported")


def test_a6_a_signal_while_nothing_can_be_saved_says_where_the_run_goes_on(in_process, undisturbed):
    process = start(in_process, "tiny.yaml", "--name", "unsaved", script=FAULTY, FAULT="full 60000 always")
    read_until(process, "iter 15/40")
    process.send_signal(signal.SIGTERM)
    said = process.stdout.read()
    assert process.wait() == 75
    assert "with nothing saved; the same command starts from the beginning" in said
    goes_on_to_the_same_bits(in_process, "unsaved")


def test_a7_a_disk_that_is_full_in_the_log_keeps_the_records_until_there_is_room(tmp_path):
    code = (
        "import sys, resource; from pathlib import Path; from overnight.run_dir.metrics import Metrics\n"
        "log = Metrics(Path(sys.argv[1])); limit = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "log.append({'kind': 'train', 'iteration': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, limit[1]))\n"
        "log.append({'kind': 'train', 'iteration': 2}); log.append({'kind': 'train', 'iteration': 3})\n"
        "assert 'File too large' in log.trouble; assert len(log.path.read_text().splitlines()) == 1\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, limit); log.append({'kind': 'train', 'iteration': 4})\n"
        "assert log.trouble is None\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "log")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["iteration"] for line in (tmp_path / "log").read_text().splitlines()] == [1, 2, 3, 4]


def test_a7_a_run_goes_on_without_its_log_and_says_so(in_process, undisturbed):
    process = start(in_process, "tiny.yaml", "--name", "unlogged", script=FAULTY, FAULT="full 3000 always")
    said = process.stdout.read()
    assert process.wait() == 75, said  # the model cannot be written either
    assert said.count("records wait in memory until it takes them; the run continues") == 1
    whole = (in_process / "runs" / "unlogged" / "metrics.jsonl").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in whole)
    goes_on_to_the_same_bits(in_process, "unlogged")


def test_a7_a_line_that_a_crash_left_unfinished_is_never_merged_with_the_next(tmp_path):
    log = Metrics(tmp_path / "metrics.jsonl")
    log.append({"kind": "event", "event": "interrupted", "iteration": 1, "tokens": 1})
    with log.path.open("a") as file:
        file.write('{"kind": "event", "itera')
    assert [record["iteration"] for record in log.records()] == [1]
    log.keep(lambda record: True)
    log.append({"kind": "event", "event": "interrupted", "iteration": 2, "tokens": 2})
    assert [json.loads(line)["iteration"] for line in log.path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("in_the_way", ["the run", "its models", "a folder that may not be written to"])
def test_a8_a_directory_that_cannot_be_written_to_is_refused_before_the_first_step(in_process, in_the_way, monkeypatch):
    folder = in_process / "runs" / "unwritable"
    if in_the_way == "the run":
        folder.write_text("")
    else:
        folder.mkdir(exist_ok=True)
        (folder / "models").write_text("") if in_the_way == "its models" else folder.chmod(0o555)
    if in_the_way == "a folder that may not be written to" and os.access(folder, os.W_OK):  # root may everywhere
        real = os.open

        def denied(path, *arguments, **options):
            if str(path).endswith(".lock"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, "open", denied)
    try:
        with pytest.raises(InputError, match=r"runs/unwritable cannot be written to"):
            train_module.train(tiny(in_process, "--name", "unwritable"))
    finally:
        folder.chmod(0o755)
        for path in (folder / "models", folder):
            path.unlink() if path.is_file() else path.exists() and path.rmdir()


def test_the_clock_decides_on_a_checkpoint_beside_the_iterations(in_process, undisturbed, capsys):
    options = ("--checkpoint.every", "1000", "--checkpoint.every_minutes", "0.0001", "--schedule.max_iters", "10")
    assert train_module.train(tiny(in_process, "--name", "by-the-clock", *options)) == 0
    assert "checkpoints/iter-000001 in" in capsys.readouterr().out
