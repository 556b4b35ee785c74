"""A checkpoint gives back the same bits, and a damaged one is found before anything is changed."""

import os
from pathlib import Path

import pytest
import torch

from overnight import checkpoint, optim
from overnight.model import LanguageModel
from overnight.recipe import Model, Optim

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
    return {**dict(model.named_parameters()), **checkpoint.optimizer_tensors(model, optimizers)}


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_loading_gives_back_every_bit_of_weights_and_optimizers(tmp_path, name):
    model, optimizers = trained(name)
    path = checkpoint.save(tmp_path, 2, model, optimizers, {"best_val": 1.5})
    assert sorted(file.name for file in path.iterdir()) == FILES
    other, other_optimizers = trained(name, steps=0)
    assert checkpoint.load(path, other, other_optimizers) == {"iteration": 2, "best_val": 1.5}
    before, after = bits(model, optimizers), bits(other, other_optimizers)
    assert before.keys() == after.keys() and len(before) > 2 * len(list(model.parameters()))
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["flipped", "truncated", "emptied", "missing"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(tmp_path, file, harm):
    model, optimizers = trained()
    good = checkpoint.save(tmp_path, 10, model, optimizers, {})
    bad = checkpoint.save(tmp_path, 20, model, optimizers, {}) / file
    content = bad.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    bad.unlink()
    if harm != "missing":
        bad.write_bytes({"flipped": flipped, "truncated": content[:-2], "emptied": b""}[harm])
    found, said = checkpoint.newest_whole(tmp_path)
    assert found == good
    assert len(said) == 1
    assert file in said[0] or file == "SHA256SUMS"  # damaged sums accuse one of the files that they list
    assert (tmp_path / "damaged-iter-000020").is_dir()


def test_what_a_crash_left_half_written_is_no_checkpoint(tmp_path):
    model, optimizers = trained()
    good = checkpoint.save(tmp_path, 10, model, optimizers, {})
    (tmp_path / ".iter-000020.partial").mkdir()
    (tmp_path / "iter-abc").mkdir()
    (tmp_path / ".DS_Store").touch()
    os.symlink(tmp_path, tmp_path / "iter-loop")
    assert checkpoint.newest_whole(tmp_path) == (good, [])
    assert checkpoint.save(tmp_path, 20, model, optimizers, {}) == tmp_path / "iter-000020"


def test_pruning_keeps_the_newest_and_the_branch_point(tmp_path):
    for iteration in (5, 10, 15, 20, 25):
        (tmp_path / checkpoint.folder_name(iteration)).mkdir()
    checkpoint.prune(tmp_path, 2, {10})
    assert list(checkpoint.saved_iterations(tmp_path)) == [10, 20, 25]


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    path: Path = checkpoint.save(tmp_path, 1, *trained(), {})
    for file in path.iterdir():
        assert file.suffix in (".safetensors", ".json", "")
        assert not file.read_bytes().startswith((b"\x80", b"PK"))
