"""Group C of docs/reliability.md: what a run continues from, and what it refuses to continue from."""

import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from runs import (
    ROOT,
    checkpoint_of,
    final_sums,
    losses,
    records,
    start,
    tiny,
    train,
    train_in_a_fresh_process,
    two_processes,
)

from overnight.core.lock import hold
from overnight.core.sums import write_sums
from overnight.errors import InputError
from overnight.model import checkpoint, optim
from overnight.model.gpt2 import LanguageModel
from overnight.recipe.schema import Model, Optim
from overnight.run_dir import layout
from overnight.training import train as train_module


@pytest.fixture
def half(in_process, undisturbed):
    """Makes copies of the tiny run as it was at its iteration 32, with the checkpoints of 20, 30 and 32."""
    names = itertools.count()

    def make() -> str:
        name = f"half-{next(names)}"
        shutil.rmtree(in_process / "runs" / name, ignore_errors=True)
        shutil.copytree(in_process / "runs" / "tiny", in_process / "runs" / name)
        shutil.rmtree(in_process / "runs" / name / "models" / "iter-000040")
        shutil.rmtree(in_process / "runs" / name / "checkpoints" / "cooldown-000040")
        return name

    return make


def same_as_undisturbed(folder: Path, name: str) -> None:
    assert losses(folder, name) == losses(folder, "tiny")
    assert final_sums(folder, name) == final_sums(folder, "tiny")


@pytest.mark.parametrize("harm", ["flipped", "missing"])
def test_c1_c2_a_run_goes_back_to_the_checkpoint_before_a_damaged_one(in_process, half, capsys, harm):
    name = half()
    file = checkpoint_of(in_process, name, 32) / "optimizer.safetensors"
    content = file.read_bytes()
    file.unlink()
    if harm == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert train_module.train(tiny(in_process, "--name", name)) == 0
    said = capsys.readouterr().out
    assert re.search(r"iter-000032: optimizer.safetensors.*; set aside as damaged-iter-000032, going back", said)
    assert "resumes at iteration 30 from" in said
    same_as_undisturbed(in_process, name)


def test_c3_a_state_that_was_edited_is_damage_and_the_state_of_another_run_is_refused(in_process, half, capsys):
    name = half()
    folder = checkpoint_of(in_process, name, 32)
    state = json.loads((folder / "state.json").read_text())
    state["meaning"]["seed"] = 99
    (folder / "state.json").write_text(json.dumps(state))
    assert "state.json differs" in checkpoint.damage(folder)
    write_sums(folder)
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"(?s)iter-000032 is of another run:.*`seed` was 99, now 1337"):
        train_module.train(tiny(in_process, "--name", name))
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before


CHANGES = [
    (["--optim.lr", "1e-3"], "`optim.lr` was 0.005, now 0.001"),
    (["--schedule.max_iters", "36"], "`schedule.max_iters` was 40, now 36"),
    (["--schedule.kind", "cosine"], "`schedule.kind` was 'wsd', now 'cosine'"),
    (["--seed", "7"], "`seed` was 1337, now 7"),
    (["--schedule.decay_fraction", "0.5", "--schedule.max_iters", "80"], "`schedule.decay_fraction` was 0.2, now 0.5"),
]


@pytest.mark.parametrize(("overrides", "said"), CHANGES, ids=[options[0] for options, _ in CHANGES])
def test_c4_another_identity_is_refused_with_both_values_and_the_ways_on(in_process, half, overrides, said):
    name = half()
    with pytest.raises(InputError) as caught:
        train_module.train(tiny(in_process, "--name", name, *overrides))
    assert said in str(caught.value)
    assert f"`--name {name}-2` starts a new one; `--allow-change" in str(caught.value)


def test_c4_an_allowed_change_is_written_down_and_asked_for_once(in_process, half, capsys):
    name = half()
    recipe = tiny(in_process, "--name", name, "--optim.lr", "1e-3")
    assert train_module.train(recipe, allowed=["optim.lr"]) == 0
    assert "`optim.lr` was 0.005 and is 0.001 from here on" in capsys.readouterr().out
    change = {"key": "optim.lr", "before": 0.005, "now": 0.001}
    state = checkpoint.read_state(checkpoint_of(in_process, name, 40))
    assert state["changes"] == [change] and state["meaning"]["optim.lr"] == 0.001
    assert yaml.safe_load((in_process / "runs" / name / "recipe.yaml").read_text())["changes"] == [change]
    (event,) = [record for record in records(in_process, name, "event") if record["event"] == "changed"]
    assert event["iteration"] == 32 and event["key"] == "optim.lr"
    shutil.rmtree(in_process / "runs" / name / "models" / "iter-000040")
    shutil.rmtree(in_process / "runs" / name / "checkpoints" / "cooldown-000040")  # the next is of the old meaning
    assert train_module.train(recipe) == 0
    with pytest.raises(InputError, match="nothing to allow"):
        train_module.train(recipe, allowed=["seed"])


@pytest.mark.parametrize("override", [("--model.n_layer", "3"), ("--optim.name", "adamw")])
def test_c4_what_does_not_fit_the_tensors_is_refused_even_when_allowed(in_process, half, override):
    name = half()
    with pytest.raises(InputError, match=f"`{override[0][2:]}` can never change"):
        train_module.train(tiny(in_process, "--name", name, *override), allowed=[override[0][2:]])


def test_c4_keys_that_a_run_did_not_have_yet_mean_their_default(in_process, half, tmp_path):
    name = half()
    shutil.copytree(ROOT / "src", tmp_path / "newer")
    schema = tmp_path / "newer" / "overnight" / "recipe" / "schema.py"
    text, added = schema.read_text(), '    added: float = 0.5\n    """A key of a newer version."""\n'
    for section in ("Model", "Batch", "Optim", "Schedule"):
        text = text.replace(f"class {section}(Section):\n", f"class {section}(Section):\n{added}")
    schema.write_text(text)
    newer = {"PYTHONPATH": f"{tmp_path / 'newer'}:{os.environ['PYTHONPATH']}"}
    another = train_in_a_fresh_process(in_process, "tiny.yaml", "--name", name, "--optim.added", "0.25", **newer)
    assert another.returncode == 2 and "`optim.added` was 0.5, now 0.25" in another.stderr
    done = train_in_a_fresh_process(in_process, "tiny.yaml", "--name", name, **newer)
    assert done.returncode == 0, done.stderr
    assert "resumes at iteration 32 from" in done.stdout
    same_as_undisturbed(in_process, name)


def test_c4_a_finished_run_may_become_longer_from_its_trunk_and_keeps_what_it_finished(in_process, half, capsys):
    longer = ("--schedule.max_iters", "60")
    assert train_module.train(tiny(in_process, "--name", "at-once", *longer)) == 0
    shutil.copytree("runs/tiny", "runs/longer")
    capsys.readouterr()
    assert train_module.train(tiny(in_process, "--name", "longer", *longer)) == 0
    assert "resumes at iteration 32 from" in capsys.readouterr().out
    assert final_sums(in_process, "longer", 60) == final_sums(in_process, "at-once", 60)
    trunk = {r["iteration"]: r["loss"] for r in records(in_process, "longer", "train") if r.get("cooldown") != 40}
    assert trunk == losses(in_process, "at-once")
    assert {path.name for path in Path("runs/longer/models").iterdir()} == {"iter-000040", "iter-000060"}
    ends = [r["iteration"] for r in records(in_process, "longer", "event") if r["event"] == "finished"]
    assert ends == [40, 60]
    assert {"iter-000032", "iter-000048"} <= {path.name for path in Path("runs/longer/checkpoints").glob("iter-*")}


def after_session(folder: Path, name: str, last: int) -> None:
    """Take away what a finished run saved after `last`: it is as if a session had ended there."""
    run = folder / "runs" / name
    shutil.rmtree(run / "models" / "iter-000040")
    shutil.rmtree(run / "checkpoints" / "cooldown-000040")
    for iteration, path in layout.saved_iterations(run / "checkpoints").items():
        if iteration > last:
            shutil.rmtree(path)


def largest_difference(folder: Path, name: str) -> float:
    found, expected = losses(folder, name), losses(folder, "tiny")
    assert found.keys() == expected.keys()
    return max(abs(found[iteration] - expected[iteration]) for iteration in expected)


def test_c5_the_micro_batch_may_change_across_resumes(in_process, undisturbed, capsys):
    for size, last in ((4, 15), (2, 30), (8, None)):
        options = ("--name", "micro-batches", "--checkpoint.every", "15", "--batch.micro_batch", str(size))
        assert train_module.train(tiny(in_process, *options)) == 0
        if last:
            after_session(in_process, "micro-batches", last)
    said = capsys.readouterr().out
    assert "resumes at iteration 15 from" in said and "resumes at iteration 30 from" in said
    assert 0 < largest_difference(in_process, "micro-batches") <= 1e-5


@pytest.mark.slow
def test_c6_the_number_of_processes_may_change_across_resumes(workplace, undisturbed):
    two = ("--threads", "1", "--batch.micro_batch", "4")
    for launcher, options, last in (((), (), 15), (two_processes(), two, 30), ((), (), None)):
        command = ("tiny.yaml", "--name", "processes", "--checkpoint.every", "15", *options)
        result = train(workplace, *command, launcher=launcher)
        assert result.returncode == 0, result.stdout + result.stderr
        if last:
            after_session(workplace, "processes", last)
    assert 0 < largest_difference(workplace, "processes") <= 1e-5
    rates = {r["iteration"]: r["lr"] for r in records(workplace, "processes", "train")}
    assert rates == {r["iteration"]: r["lr"] for r in records(workplace, "tiny", "train")}


def test_c6_another_number_of_threads_is_warned_about(in_process, half, capsys):
    name = half()
    threads = torch.get_num_threads()
    try:
        assert train_module.train(tiny(in_process, "--name", name, "--threads", "1")) == 0
    finally:
        torch.set_num_threads(threads)
    assert "this session computes with 1 threads, the one before with 2: losses agree to" in capsys.readouterr().out


def test_c7_a_second_run_in_one_directory_is_refused_and_a_dead_one_leaves_no_lock(in_process, undisturbed):
    process = start(in_process, "tiny.yaml", "--name", "busy", "--schedule.max_iters", "4000")
    for line in process.stdout:
        if line.startswith("iter    5/4000"):
            break
    refused = train(in_process, "tiny.yaml", "--name", "busy", "--schedule.max_iters", "4000")
    assert refused.returncode == 2
    assert re.search(rf"runs/busy is in use by process {process.pid} on \S+; wait for it, stop it", refused.stderr)
    process.kill()
    process.wait()
    holder = hold(in_process / "runs" / "busy", "wait")
    assert json.loads(Path(holder.lock_file).read_text())["pid"] == os.getpid()
    holder.release()


def test_c7_of_many_processes_that_take_a_lock_at_once_one_gets_it(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, results)) for _ in range(8)]
    for racer in racers:
        racer.start()
    got = [results.get(timeout=30) for _ in racers]
    for racer in racers:
        racer.terminate()
        racer.join()
    assert sorted(got) == ["got it"] + ["refused"] * 7


def _race(folder: Path, results) -> None:
    try:
        lock = hold(folder, "wait")
        results.put("got it")
        time.sleep(60)
        lock.release()
    except InputError:
        results.put("refused")


def test_c8_fewer_than_two_checkpoints_cannot_be_asked_for(in_process):
    with pytest.raises(InputError, match=r"`checkpoint\.keep` is 1"):
        tiny(in_process, "--checkpoint.keep", "1")


def test_c9_what_a_compiled_model_saved_a_plain_one_loads_and_the_other_way_round(tmp_path):
    shape = Model(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=50)
    models = [LanguageModel(shape, 0, compile=compiled) for compiled in (True, False)]
    for first, second in (models, models[::-1]):
        tensors = checkpoint.state_tensors(first, optim.build(first, Optim()))
        assert not [name for name in tensors[checkpoint.MODEL] if "_orig_mod" in name]
        path = tmp_path / f"iter-{first is models[0]:06d}"
        assert checkpoint.write_checkpoint(path, tensors, "{}") is None
        checkpoint.load_checkpoint(path, second, optim.build(second, Optim()))
        theirs = dict(second.named_parameters())
        assert all(torch.equal(theirs[name], tensor) for name, tensor in first.named_parameters())


def test_c11_stray_files_change_nothing(in_process, half, capsys):
    name = half()
    checkpoints = in_process / "runs" / name / "checkpoints"
    for stray in (".DS_Store", "iter-000099", "iter-abc", "notes.txt"):
        (checkpoints / stray).touch()
    (checkpoints / "iter-000098").symlink_to(checkpoints / "iter-000097")
    (checkpoints / "iter-000097").symlink_to(checkpoints / "iter-000098")
    (checkpoints / "cooldown-000040").write_text("")
    (checkpoints / "cooldown-000040").unlink()
    (in_process / "runs" / name / "metrics.jsonl").open("a").write("no json\n5\n")
    assert train_module.train(tiny(in_process, "--name", name)) == 0
    assert "resumes at iteration 32 from" in capsys.readouterr().out
    same_as_undisturbed(in_process, name)


@pytest.mark.parametrize("jump", [-86_400, 10 * 365 * 86_400], ids=["back a day", "forward ten years"])
def test_c12_a_clock_that_jumps_decides_nothing(in_process, half, monkeypatch, capsys, jump):
    name = half()
    real, jumped = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + (jump if next(jumped) % 2 else 0))
    for path in random.Random(1).sample(sorted((in_process / "runs" / name).rglob("*")), 12):
        os.utime(path, (real() + jump, real() + jump))
    newest = checkpoint_of(in_process, name, 32)
    os.utime(newest, (0, 0))
    assert train_module.train(tiny(in_process, "--name", name)) == 0
    assert "resumes at iteration 32 from" in capsys.readouterr().out
    same_as_undisturbed(in_process, name)
    kept = sorted(path.name for path in newest.parent.glob("iter-*"))
    assert kept == ["iter-000020", "iter-000030", "iter-000032"]
    assert all((r["tokens_per_second"] or 1) > 0 for r in records(in_process, name, "train"))
