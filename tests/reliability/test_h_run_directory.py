"""Group H of docs/reliability.md: what a run directory holds is what it says, and an error of reading is no damage."""

import errno
import itertools
import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from dataclasses import asdict
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
from overnight.hub.contents import exact_state, finished_models
from overnight.model import checkpoint
from overnight.model.generate import Writer
from overnight.report.curve import draw_curve
from overnight.report.model_card import card, report
from overnight.run_dir.directory import RunDirectory
from overnight.run_dir.layout import finished, origin_of, read_run, recipe_of
from overnight.training import train as train_module
from overnight.training.state import KeptLimit
from overnight.training.time_limit import tonight

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
    assert "mount that disk" in said if loss.endswith("mounted") else "`--name NEW`, or moving" in said


def test_h1_a_run_without_its_recipe_goes_on_as_what_its_checkpoints_say(in_process, half, capsys):
    run = half()
    (run / "recipe.yaml").unlink()
    assert trained(in_process, run, "--seed", "7") == 2
    assert "`seed` was 1337, now 7" in capsys.readouterr().err
    assert trained(in_process, run) == 0
    assert "resumes at iteration 32" in capsys.readouterr().out


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
    with pytest.raises(DamagedData, match="tokenizer_config"):
        Writer.load(str(tmp_path / "model"))


def test_h3_an_answer_with_another_digit_is_asked_for_again(tmp_path):
    ResponseCache(tmp_path).add("key", [Answer(-12.5, True)])
    assert ResponseCache(tmp_path).known == {"key": [Answer(-12.5, True)]}
    (tmp_path / "rank0.jsonl").write_text((tmp_path / "rank0.jsonl").read_text().replace("-12.5", "-13.5"))
    assert ResponseCache(tmp_path).known == {}


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[1]\n", b"meaning: {\n", b'{"asked": "1 ho', b'{"meaning": 5}']
)
@pytest.mark.parametrize("file", ["recipe.yaml", "night.json", "environment.json"])
def test_h4_a_damaged_small_file_is_one_message_with_its_name_and_the_way_on(in_process, half, capsys, file, content):
    run = half()
    (run / file).write_bytes(content)
    if file == "environment.json":
        shutil.copytree("runs/tiny/models", run / "models", dirs_exist_ok=True)
        code = exit_code(lambda: report(run, 40) and 0)
    else:
        code = trained(in_process, run, *(["--schedule.hours", "1"] if file == "night.json" else []))
    said = capsys.readouterr().err
    assert code == 3
    assert f"{run / file} is damaged" in said and ("move it away" in said or "remove it" in said)


def test_h4_no_flipped_bit_of_a_small_file_is_a_traceback(in_process, half, capsys):
    run, draw = half(), random.Random(1)
    shutil.copytree("runs/tiny/models", run / "models", dirs_exist_ok=True)
    (run / "night.json").write_text(json.dumps(asdict(KeptLimit("1 hours", "2030-01-01T00:00:00+00:00", 3600.0, 40))))
    recipe = tiny(in_process, "--name", run.name, "--schedule.hours", "1")
    for file in ("recipe.yaml", "night.json", "environment.json", "metrics.jsonl"):
        whole = (run / file).read_bytes()
        for _ in range(40):
            harmed = bytearray(whole)
            harmed[draw.randrange(len(whole))] ^= 1 << draw.randrange(7)
            (run / file).write_bytes(harmed)
            directory = RunDirectory(recipe)
            assert exit_code(lambda: origin_of(str(run / "models" / "iter-000040")) and 0) in (0, 3)
            assert exit_code(lambda directory=directory: directory.refuse_another_run({}) or 0) in (0, 2, 3)
            assert exit_code(lambda directory=directory: tonight(recipe, directory, None) and 0) in (0, 3)
            assert exit_code(lambda: all(card(run, *read_run(run), e, None) for e in finished(run).values()) - 1) in (
                0,
                3,
            )
        (run / file).write_bytes(whole)


def test_h4_records_without_their_keys_are_skipped_and_counted_and_a_run_goes_on_without_any(in_process, half, capsys):
    run = half()
    log = run / "metrics.jsonl"
    text = log.read_text().replace('"kind": "val"', '"kind": "vaL"', 1)
    log.write_text(text.replace('"loss"', '"lost"', 4))
    assert trained(in_process, run) == 0
    assert "metrics.jsonl: 4 lines were no whole records" in capsys.readouterr().out
    shutil.rmtree(run / "models")
    log.unlink()
    assert trained(in_process, run) == 0
    assert final_sums(in_process, run.name) == final_sums(in_process, "tiny")


def test_h5_a_checkpoint_on_another_disk_with_a_link_in_its_place_is_pruned_by_its_link(in_process, half, tmp_path):
    run = half()
    for number, name in enumerate((".iter-000012.discarded", ".iter-000040.partial", "iter-000020")):
        if number == 2:
            (run / "checkpoints" / name).rename(tmp_path / name)
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "kept").touch()
        (run / "checkpoints" / name).symlink_to(tmp_path / name)
    assert trained(in_process, run, "--schedule.max_iters", "80", "--checkpoint.keep", "2") == 0
    assert not [path for path in (run / "checkpoints").rglob("*") if path.is_symlink()]
    assert names(tmp_path) == [".iter-000012.discarded", ".iter-000040.partial", "iter-000020"]
    assert all(names(path) for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "file", [".lock", ".environment.json.partial", ".recipe.yaml.partial", "metrics.jsonl", ".hub"]
)
def test_h5_nothing_is_written_through_a_link(in_process, half, tmp_path, file):
    run = half()
    victim = tmp_path / "victim"
    if file == ".hub":
        (victim / "state").mkdir(parents=True)
        (victim / "state" / "precious").touch()
    else:
        victim.write_text("precious")
        (run / file).unlink(missing_ok=True)
    (run / file).symlink_to(victim)
    if file == ".hub":
        assert exact_state(run).files
        assert names(victim / "state") == ["precious"]
        return
    assert trained(in_process, run) == (2 if file == ".lock" else 0)
    assert victim.read_text() == "precious"


def test_h5_a_figure_is_not_drawn_through_a_link(in_process, undisturbed, tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "curve.png").symlink_to(tmp_path / "victim")
    draw_curve([Path("runs/tiny")], tmp_path / "curve.png")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_h5_links_are_never_sent(in_process, half, tmp_path):
    run = half()
    (tmp_path / "config.json").write_text("{}")
    (run / "night.json").symlink_to(tmp_path / "config.json")
    (run / "models" / "iter-000040").symlink_to(tmp_path)
    (run / "evaluation").symlink_to(tmp_path)
    state = run / "checkpoints" / "iter-000030" / "state.json"
    state.rename(tmp_path / "state.json")
    state.symlink_to(tmp_path / "state.json")
    (run / "checkpoints" / "iter-000032").rename(tmp_path / "iter-000032")
    (run / "checkpoints" / "iter-000032").symlink_to(tmp_path / "iter-000032")
    assert finished_models(run, recipe_of(run), "a/b") == []
    with pytest.raises(DamagedData, match="is damaged: state"):  # it is not there: behind a link
        exact_state(run)
    state.unlink()
    (tmp_path / "state.json").rename(state)
    sent = exact_state(run).files
    assert "checkpoints/iter-000030/state.json" in sent
    assert not [name for name in sent if "night" in name or "32" in name]
