"""A checkpoint gives back the same bits, and a damaged one is found before anything is changed."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from runs import ROOT
from safetensors.torch import load_file

from overnight.model import checkpoint, optim
from overnight.model.gpt2 import LanguageModel
from overnight.recipe.load import load
from overnight.recipe.schema import Model, Optim
from overnight.run_dir import layout
from overnight.run_dir.directory import RunDirectory

SHAPE = Model(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=50)
FILES = ["SHA256SUMS", "model.safetensors", "optimizer.safetensors", "state.json"]


def trained(name: str = "muon", steps: int = 2):
    torch.manual_seed(steps)
    model = LanguageModel(SHAPE, 0, compile=False)
    optimizers = optim.build(model, Optim(name=name))
    for _ in range(steps):
        ids = torch.randint(0, 50, (2, 8))
        model(ids, ids).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return model, optimizers


def bits(model, optimizers) -> dict:
    return {name: t for named in checkpoint.state_tensors(model, optimizers).values() for name, t in named.items()}


def save(folder: Path, iteration: int, model, optimizers, **state) -> Path:
    final = folder / layout.folder_name(iteration)
    tensors = checkpoint.state_tensors(model, optimizers)
    assert checkpoint.write_checkpoint(final, tensors, json.dumps({"iteration": iteration, **state})) is None
    return final


def newest_first(folder: Path) -> list[Path]:
    return list(reversed(layout.saved_iterations(folder).values()))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_loading_gives_back_every_bit_of_weights_and_optimizers(tmp_path, name):
    model, optimizers = trained(name)
    path = save(tmp_path, 2, model, optimizers, joules=1.5)
    assert sorted(file.name for file in path.iterdir()) == FILES
    other, other_optimizers = trained(name, steps=0)
    assert checkpoint.read_state(path) == {"iteration": 2, "joules": 1.5}
    checkpoint.load_checkpoint(path, other, other_optimizers)
    before, after = bits(model, optimizers), bits(other, other_optimizers)
    assert before.keys() == after.keys() and len(before) > 2 * len(list(model.parameters()))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_tensors_of_another_model_are_refused_before_any_is_copied(tmp_path):
    path = save(tmp_path, 2, *trained())
    with torch.no_grad():
        other = LanguageModel(SHAPE.model_copy(update={"n_layer": 2}), 0, compile=False)
    before = {name: parameter.clone() for name, parameter in other.named_parameters()}
    with pytest.raises(KeyError, match="other parameters"):
        checkpoint.load_checkpoint(path, other, optim.build(other, Optim()))
    assert all(torch.equal(before[name], parameter) for name, parameter in other.named_parameters())


@pytest.mark.parametrize("harm", ["flipped", "truncated", "emptied", "missing"])
@pytest.mark.parametrize("file", FILES)
def test_c1_c2_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(tmp_path, file, harm):
    model, optimizers = trained()
    good = save(tmp_path, 10, model, optimizers)
    bad = save(tmp_path, 20, model, optimizers)
    assert sorted(path.name for path in bad.iterdir()) == FILES  # so that no file of a checkpoint escapes this test
    damage(bad / file, harm)
    found, said = checkpoint.newest_whole(newest_first(tmp_path))
    assert found == good
    assert len(said) == 1
    assert file in said[0] or file == "SHA256SUMS"  # damaged sums accuse one of the files that they list
    assert (tmp_path / "damaged-iter-000020").is_dir()


def damage(file: Path, harm: str) -> None:
    """One bit of the middle flipped, the end cut off, nothing left in it, or no file."""
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    file.unlink()
    if harm != "missing":
        file.write_bytes({"flipped": flipped, "truncated": content[:-2], "emptied": b""}[harm])


def test_what_a_crash_left_half_written_is_no_checkpoint(tmp_path):
    model, optimizers = trained()
    directory = RunDirectory(load(ROOT / "recipes" / "quickstart.yaml"), tmp_path)
    folder = directory.checkpoints
    folder.mkdir(parents=True)
    good = save(folder, 10, model, optimizers)
    for name in (".iter-000020.partial", ".iter-000001.discarded", "iter-abc"):
        (folder / name).mkdir()
    (folder / ".DS_Store").touch()
    os.symlink(folder, folder / "iter-loop")
    assert checkpoint.newest_whole(newest_first(folder)) == (good, [])
    directory.clear_leftovers()
    assert sorted(path.name for path in folder.iterdir()) == [".DS_Store", "iter-000010", "iter-abc", "iter-loop"]
    assert save(folder, 20, model, optimizers) == folder / "iter-000020"


def test_pruning_keeps_the_newest_and_the_branch_point(tmp_path):
    for iteration in (5, 10, 15, 20, 25):
        (tmp_path / layout.folder_name(iteration)).mkdir()
    checkpoint.prune(tmp_path, 2, {10})
    assert list(layout.saved_iterations(tmp_path)) == [10, 20, 25]


def test_c8_older_checkpoints_go_only_when_the_new_one_reads_back_as_it_was_written(tmp_path, monkeypatch):
    model, optimizers = trained()
    older = [save(tmp_path, iteration, model, optimizers) for iteration in (10, 20, 30)]
    real = checkpoint.put_in_place

    def rotten(aside, final):
        real(aside, final)
        damage(final / "optimizer.safetensors", "flipped")

    monkeypatch.setattr(checkpoint, "put_in_place", rotten)
    saver = checkpoint.Saver(keep=2)
    tensors = checkpoint.state_tensors(model, optimizers)
    saver.start(tmp_path / "iter-000040", tensors, {"iteration": 40}, kept_for_ever=set())
    saved = saver.outcome(wait=True)
    assert "optimizer.safetensors differs" in saved.problem
    assert newest_first(tmp_path) == older[::-1]
    assert (tmp_path / "damaged-iter-000040").is_dir()


def test_a_slow_writer_saves_the_bits_of_its_own_iteration_while_training_goes_on(tmp_path, monkeypatch):
    model, optimizers = trained()
    expected = {name: tensor.clone() for name, tensor in bits(model, optimizers).items()}
    real, gate = checkpoint.save_file, threading.Event()

    def slow(tensors, path):
        assert gate.wait(60)
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    saver = checkpoint.Saver(keep=2)
    saver.start(tmp_path / "iter-000002", checkpoint.state_tensors(model, optimizers), {"iteration": 2}, set())
    for _ in range(3):
        ids = torch.randint(0, 50, (2, 8))
        model(ids, ids).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    assert saver.outcome(wait=False) is None  # still underway
    gate.set()
    saved = saver.outcome(wait=True)
    assert saved.problem is None and saver.outcome(wait=True) is None
    stored = load_file(saved.path / "model.safetensors") | load_file(saved.path / "optimizer.safetensors")
    now = bits(model, optimizers)
    assert stored.keys() == expected.keys() == now.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert not all(torch.equal(stored[name], now[name]) for name in expected)


def test_a_second_save_uses_the_buffers_of_the_first_and_waits_for_it(tmp_path):
    model, optimizers = trained()
    saver = checkpoint.Saver(keep=2)
    saver.start(tmp_path / "iter-000001", checkpoint.state_tensors(model, optimizers), {}, set())
    first = {name: buffer.data_ptr() for name, buffer in saver._buffers["model.safetensors"].items()}
    saver.start(tmp_path / "iter-000002", checkpoint.state_tensors(model, optimizers), {}, set())
    assert first == {name: buffer.data_ptr() for name, buffer in saver._buffers["model.safetensors"].items()}
    assert saver.outcome(wait=True).problem is None
    assert [checkpoint.damage(path) for path in newest_first(tmp_path)] == [None, None]


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    path: Path = save(tmp_path, 1, *trained())
    for file in path.iterdir():
        assert file.suffix in (".safetensors", ".json", "")
        assert not file.read_bytes().startswith((b"\x80", b"PK"))
