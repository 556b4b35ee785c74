"""Group H of docs/reliability.md: what a run directory holds is what it says, and an error of reading is no damage."""

import errno
import itertools
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import final_sums, tiny
from transformers import GPT2Config, GPT2LMHeadModel

from overnight.cli import exit_code
from overnight.core import sums
from overnight.errors import DamagedData
from overnight.evaluation.cache import ResponseCache
from overnight.evaluation.models import load_model
from overnight.evaluation.scoring import Answer
from overnight.hub.contents import finished_models
from overnight.model import checkpoint
from overnight.model.generate import Writer
from overnight.run_dir.layout import recipe_of
from overnight.training import train as train_module

BRANCHED = ("--schedule.branches", "[20, 25]", "--schedule.max_iters", "60")


@pytest.fixture
def half(in_process, undisturbed) -> Callable[[], Path]:
    """Makes copies of the tiny run as it was at its iteration 32, with the checkpoints of 20, 30 and 32."""
    names = itertools.count()

    def make() -> Path:
        run = Path("runs") / f"copy-{next(names)}"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree("runs/tiny", run)
        shutil.rmtree(run / "models" / "iter-000040")
        shutil.rmtree(run / "checkpoints" / "cooldown-000040")
        return run

    return make


def trained(folder: Path, run: Path, *overrides: str, **how) -> int:
    """The exit code of the trainer in a run directory."""
    return exit_code(lambda: train_module.train(tiny(folder, "--name", run.name, *overrides), **how))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(file: Path, at: int = -100) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_h1_a_process_without_descriptors_takes_no_checkpoint_for_damaged(half):
    run = half()
    newest_first = sorted((run / "checkpoints").glob("iter-*"), reverse=True)
    before, limits = names(run / "checkpoints"), resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 1, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            checkpoint.newest_whole(newest_first)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(held[0])
    assert names(run / "checkpoints") == before


def test_h1_an_error_of_the_disk_ends_with_75_and_the_same_command_goes_on(in_process, half, monkeypatch, capsys):
    run = half()
    before = names(run / "checkpoints")

    def broken(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(sums, "sha256", broken)
        assert trained(in_process, run) == 75
    assert "Input/output error" in capsys.readouterr().err
    assert names(run / "checkpoints") == before
    assert trained(in_process, run) == 0
    assert final_sums(in_process, run.name) == final_sums(in_process, "tiny")


@pytest.mark.parametrize("loss", ["damaged", "gone", "on a disk that is not mounted"])
def test_h1_where_nothing_is_left_a_run_begins_anew_only_when_it_is_told_to(in_process, half, capsys, loss):
    run = half()
    checkpoints = run / "checkpoints"
    if loss == "damaged":
        for path in checkpoints.glob("iter-*"):
            flip(path / "model.safetensors")
    else:
        checkpoints.rename(run / "elsewhere")
    if loss.endswith("mounted"):
        checkpoints.symlink_to("not-mounted")
    before = names(run), names(checkpoints) if checkpoints.exists() else []
    for _ in range(2):
        assert trained(in_process, run) == (75 if loss.endswith("mounted") else 3)
        assert (names(run), names(checkpoints) if checkpoints.exists() else []) == before
    said = capsys.readouterr().err
    assert "mount that disk" in said if loss.endswith("mounted") else "`--name NEW` begins anew" in said


def test_h1_a_run_without_its_recipe_goes_on_as_what_its_checkpoints_say(in_process, half, capsys):
    run = half()
    (run / "recipe.yaml").unlink()
    assert trained(in_process, run, "--seed", "7") == 2
    assert "`seed` was 1337, now 7" in capsys.readouterr().err
    assert trained(in_process, run) == 0
    assert "goes on at iteration 32" in capsys.readouterr().out


@pytest.fixture(scope="module")
def branched(prepared_workplace, undisturbed) -> Callable[[Path], str]:
    """Trains a run that finishes 20 on its way, with a branch point for 25; what it is called."""

    def make(folder: Path) -> str:
        if not Path("runs/branched/models/iter-000060").exists():
            assert trained(folder, Path("runs/branched"), *BRANCHED, "--schedule.milestones", "[20]") == 0
        return "branched"

    return make


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ("iter-000016", "iter-000020"),
        ("cooldown-000020/iter-000020", "iter-000020"),
        ("cooldown-000020", "cooldown-000025"),
    ],
)
def test_h2_a_checkpoint_in_a_place_that_is_not_its_own_is_refused(in_process, branched, capsys, wrong, place):
    run = Path("runs/misplaced")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(f"runs/{branched(in_process)}", run)
    shutil.rmtree(run / "checkpoints" / place, ignore_errors=True)
    shutil.copytree(run / "checkpoints" / wrong, run / "checkpoints" / place)
    assert trained(in_process, run, *BRANCHED, "--schedule.milestones", "[20]", cooldown=25) == 2
    assert f"{place}" in (said := capsys.readouterr().err) and "holds what belongs to" in said
    assert not (run / "models" / "iter-000025").exists()


def test_h2_a_checkpoint_of_another_run_of_the_same_recipe_is_refused_and_a_moved_run_goes_on(in_process, half, capsys):
    run, other = half(), half()
    state = json.loads((other / "checkpoints" / "iter-000032" / "state.json").read_text())
    (other / "checkpoints" / "iter-000032" / "state.json").write_text(json.dumps(state | {"run": "another"}))
    sums.write_sums(other / "checkpoints" / "iter-000032")
    shutil.rmtree(run / "checkpoints" / "iter-000032")
    (other / "checkpoints" / "iter-000032").rename(run / "checkpoints" / "iter-000032")
    assert trained(in_process, run) == 2
    assert "`run` was 'another', now" in capsys.readouterr().err
    moved = other.rename("runs/moved")
    assert trained(in_process, moved) == 0


FINISHED = ("config.json", "tokenizer_config.json", "model.safetensors", "SHA256SUMS")


@pytest.mark.parametrize("file", [*FINISHED, "no sums", "another's place"])
def test_h3_a_finished_model_that_is_not_as_it_was_written_is_used_for_nothing(in_process, undisturbed, capsys, file):
    run = Path("runs/harmed")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree("runs/tiny", run)
    model = run / "models" / "iter-000040"
    if file == "no sums":
        (model / "SHA256SUMS").unlink()
    elif file == "another's place":
        GPT2LMHeadModel(GPT2Config(vocab_size=500, n_positions=64, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
            model
        )
        sums.write_sums(model)
    else:
        flip(model / file, -20)
    uses = [
        lambda: Writer.load(str(model)),
        lambda: load_model(str(model), torch.device("cpu"), torch.float32),
        lambda: finished_models(run, recipe_of(run), "a/b"),
        lambda: train_module.train(tiny(in_process, "--name", "harmed")),
    ]
    for use in uses:
        with pytest.raises(DamagedData, match="iter-000040 is damaged"):
            use()


def test_h3_a_model_copied_out_of_its_run_brings_its_sums(in_process, undisturbed, tmp_path):
    shutil.copytree("runs/tiny/models/iter-000040", tmp_path / "model")
    Writer.load(str(tmp_path / "model"))
    flip(tmp_path / "model" / "tokenizer_config.json")
    with pytest.raises(DamagedData, match="tokenizer_config.json differs"):
        Writer.load(str(tmp_path / "model"))


def test_h3_an_answer_with_another_digit_is_asked_for_again(tmp_path):
    ResponseCache(tmp_path).add("key", [Answer(-12.5, True)])
    assert ResponseCache(tmp_path).known == {"key": [Answer(-12.5, True)]}
    (tmp_path / "rank0.jsonl").write_text((tmp_path / "rank0.jsonl").read_text().replace("-12.5", "-13.5"))
    assert ResponseCache(tmp_path).known == {}
