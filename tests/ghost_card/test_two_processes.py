"""Two processes on two cards: the losses of one, one micro-batch for both, and one answer to what befalls one of them.

The processes are really two, under torchrun, and what torch hands to NCCL goes through shared memory (nccl.c).
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from ghost import ON_CARD, ROOT, settings, train_on, train_on_cpu
from runs import losses, records, train, two_processes

from overnight.core.lock import hold

# In float32 and not compiled the values are the CPU's, at a rate at which AdamW does not magnify the order of a sum.
SAME = ("tiny.yaml", "--precision", "fp32", "--compile", "false", "--optim.name", "adamw", "--optim.lr", "1e-3")
ONE_THREAD = ("--threads", "1")
CLOSE = 1e-5  # nats

# Does what on_card.py does, with a fault that is armed in the second process alone.
ON_TWO_CARDS = f"""
import os, runpy, sys
if os.environ.get("RANK") == "1" and "SECOND_FAULT" in os.environ:
    os.environ["GHOST_FAULT"] = os.environ["SECOND_FAULT"]
sys.argv[0] = {ON_CARD!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def on_two_cards(folder: Path, *arguments: str, computes: str = "all", **changes: str) -> subprocess.CompletedProcess:
    """recipes/train.py in two processes, each on a card of its own, to their end."""
    script = folder / "on_two_cards.py"
    script.write_text(ON_TWO_CARDS)
    command = (str(ROOT / "recipes" / "train.py"), *arguments)
    cards = settings(computes=computes, GHOST_COUNT="2", GHOST_REPORT="1") | changes
    return train(folder, *command, launcher=two_processes(), script=str(script), **cards)


@pytest.fixture(scope="module")
def alone(workplace: Path) -> dict[int, float]:
    """The losses of one process on the CPU."""
    done = train_on_cpu(workplace, *SAME, "--name", "alone")
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(workplace, "alone")


def farthest(folder: Path, name: str, expected: dict[int, float]) -> float:
    """The largest difference between the losses of a run and those expected, in nats."""
    found = losses(folder, name)
    assert found.keys() == expected.keys()
    return max(abs(found[iteration] - loss) for iteration, loss in expected.items())


def reductions(done: subprocess.CompletedProcess) -> set[str]:
    """How often the processes added something up; both did so equally often."""
    return set(re.findall(r"ghost card: (\d+) reductions over the processes", done.stderr))


def test_two_cards_have_the_losses_of_one_process_and_exchange_gradients_once_an_iteration(workplace, alone):
    counts = []
    for rows, accumulated in ((8, 1), (2, 4)):
        name = f"two-cards-{rows}"
        done = on_two_cards(workplace, *SAME, *ONE_THREAD, "--name", name, "--batch.micro_batch", str(rows))
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"x {accumulated} accumulated x 2 processes" in done.stdout
        assert 0 < farthest(workplace, name, alone) < CLOSE
        validations = [[r["loss"] for r in records(workplace, each, "val")] for each in ("alone", name)]
        assert validations[1] == pytest.approx(validations[0], abs=CLOSE)
        counts.append(reductions(done))
    assert len(counts[0]) == 1
    assert counts[0] == counts[1]  # not more for four micro-batches than for one


@pytest.mark.slow
def test_the_number_of_cards_may_change_across_resumes(workplace, alone):
    command = (*SAME, *ONE_THREAD, "--name", "changing", "--checkpoint.every", "10")
    sessions = [train_on(workplace, *command, fault="killed@iteration:16")]
    sessions.append(on_two_cards(workplace, *command, "--batch.micro_batch", "4", SECOND_FAULT="killed@iteration:15"))
    sessions.append(train_on(workplace, *command))
    assert [done.returncode != 0 for done in sessions] == [True, True, False], sessions[-1].stderr
    assert "resumes at iteration 10" in sessions[1].stdout and "resumes at iteration 20" in sessions[2].stdout
    assert farthest(workplace, "changing", alone) < CLOSE


def test_a_size_that_does_not_fit_one_card_is_taken_by_neither(workplace, alone):
    command = (*SAME, *ONE_THREAD, "--name", "agreed", "--batch.micro_batch", "8")
    done = on_two_cards(workplace, *command, SECOND_FAULT="full@trial:1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^  8 rows .* tok/s", done.stdout, re.MULTILINE)  # they fit the first card
    assert re.search(r"micro-batch +4 rows", done.stdout)
    assert farthest(workplace, "agreed", alone) < CLOSE


def test_memory_that_runs_out_on_one_card_halves_the_micro_batch_of_both(workplace, alone):
    command = (*SAME, *ONE_THREAD, "--name", "halved", "--batch.micro_batch", "4")
    done = on_two_cards(workplace, *command, SECOND_FAULT="full@iteration:7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "iteration 7: out of memory with 4 rows at once; its tokens again with 2 rows at once" in done.stdout
    assert farthest(workplace, "halved", alone) < CLOSE


@pytest.mark.slow
def test_memory_that_runs_out_while_gradients_are_exchanged_ends_both_with_advice(workplace):
    command = (*SAME, *ONE_THREAD, "--name", "too-late", "--batch.micro_batch", "8")
    done = on_two_cards(workplace, *command, SECOND_FAULT="full@iteration:7")  # its only micro-batch exchanges them
    assert done.returncode != 0
    assert "process 1 ran out of memory while the processes exchanged gradients; `--batch.micro_batch 4`" in done.stderr
    again = on_two_cards(workplace, *command[:-1], "4")
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lost", "killed"])
def test_a_card_or_a_process_that_is_gone_ends_both_and_the_same_command_goes_on(workplace, alone, kind):
    command = (*SAME, *ONE_THREAD, "--name", f"one-{kind}")
    done = on_two_cards(workplace, *command, SECOND_FAULT=f"{kind}@iteration:25")
    assert done.returncode != 0
    again = on_two_cards(workplace, *command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumes at iteration 20" in again.stdout
    assert farthest(workplace, f"one-{kind}", alone) < CLOSE


def test_a_signal_that_one_process_gets_stops_both_after_the_iteration_and_the_same_command_goes_on(workplace, alone):
    command = (*SAME, *ONE_THREAD, "--name", "signalled", "--batch.micro_batch", "4")
    done = on_two_cards(workplace, *command, SECOND_FAULT="signalled@iteration:17")
    assert "interrupted after iteration 17 and saved" in done.stdout, done.stdout + done.stderr
    assert "75" in re.findall(r"exitcode +: (\d+)", done.stderr)
    again = on_two_cards(workplace, *command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumes at iteration 17" in again.stdout
    assert farthest(workplace, "signalled", alone) < CLOSE


def assert_refused_once(done: subprocess.CompletedProcess, line: str) -> None:
    """The processes ended with code 2, and one of them said why."""
    assert done.returncode != 0
    assert done.stderr.count(line) == 1, done.stderr
    assert set(re.findall(r"exitcode +: (\d+)", done.stderr)) == {"2"}  # the launcher may end the second one itself


def test_what_only_the_main_process_sees_ends_both_and_is_said_once(workplace):
    (workplace / "runs" / "busy").mkdir(parents=True, exist_ok=True)
    holder = hold(workplace / "runs" / "busy", "wait")
    done = on_two_cards(workplace, *SAME, *ONE_THREAD, "--name", "busy")
    holder.release()
    assert_refused_once(done, f"runs/busy is in use by process {os.getpid()}")


@pytest.mark.slow
def test_what_every_process_sees_is_said_once(workplace):
    rows_that_two_cannot_share = ("--batch.tokens_per_iter", "1536")  # 24, of which each would take 8 at once
    done = on_two_cards(workplace, *SAME, *ONE_THREAD, "--name", "odd", *rows_that_two_cannot_share)
    assert_refused_once(done, "`batch.tokens_per_iter` 1536 (24 rows) does not divide over 2 processes")


@pytest.mark.slow
def test_the_compiled_body_runs_under_ddp_in_one_graph_and_is_compiled_once(workplace):
    logged = {"TORCH_LOGS": "graph_breaks,recompiles"}
    command = ("tiny.yaml", "--name", "compiled", *ONE_THREAD, "--precision", "bf16", "--batch.micro_batch", "4")
    done = on_two_cards(workplace, *command, "--compile", "true", computes="small", **logged)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bf16 autocast, compiled" in done.stdout
    assert "Graph break" not in done.stderr
    recompiled = set(re.findall(r"Recompiling function (\S+) in", done.stderr))
    assert recompiled == {"softmax_to_compile_"}  # the loss's kernel alone, for another number of rows
