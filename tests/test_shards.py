"""Promises of the token-shard format: exact bytes, whole or absent, and no damaged file is ever trained on."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy
import pytest

from overnight.data.manifest import Manifest
from overnight.data.shards import SplitWriter, open_shards, verify
from overnight.errors import DamagedData, InputError
from overnight.prepare.prepare import prepare
from overnight.recipe.schema import Data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    paragraphs = [f"Paragraph {n} speaks of {n * n} things. " * 40 + "\n\n" for n in range(300)]
    (folder / "book.txt").write_text("".join(paragraphs))
    data = Data(source="files", path=str(folder / "book.txt"), tokenizer="trained", dir=str(folder / "data"))
    prepare(data.model_copy(update={"val_tokens": 500, "reserved_fraction": 0.2}), 280)
    return folder / "data"


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_a_shard_is_raw_little_endian_tokens_and_an_index_of_ends(tmp_path, vocab_size, dtype):
    writer = SplitWriter(tmp_path / "train", vocab_size, None)
    writer.write([1, 65_535, 0])
    writer.write([7, 0])
    writer.close()
    raw = (tmp_path / "train" / "00000.ds").read_bytes()
    assert numpy.frombuffer(raw, dtype).tolist() == [1, 65_535, 0, 7, 0]
    assert numpy.frombuffer((tmp_path / "train" / "00000.ds.index").read_bytes(), "<u8").tolist() == [3, 5]
    [record] = writer.records
    assert (record.path, record.tokens, record.documents, record.bytes) == ("train/00000.ds", 5, 2, len(raw))
    assert record.sha256 == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("wrong", [300, -1, 65_541])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, wrong):
    writer = SplitWriter(tmp_path, 300, None)
    with pytest.raises(ValueError, match="outside"):
        writer.write([299, wrong])


def test_a_side_is_cut_at_its_limit_and_split_into_bounded_files(tmp_path, monkeypatch):
    monkeypatch.setattr("overnight.data.shards.TOKENS_PER_FILE", 10)
    writer = SplitWriter(tmp_path / "train", 300, limit=25)
    while not writer.full:
        writer.write([1, 2, 3, 0])
    writer.close()
    assert [(record.path, record.tokens) for record in writer.records] == [
        ("train/00000.ds", 12),
        ("train/00001.ds", 12),
        ("train/00002.ds", 1),
    ]


def test_tokens_are_read_by_position(folder):
    shards = open_shards(folder)
    everything = numpy.concatenate([numpy.fromfile(folder / file.path, "<u2") for file in shards.train.files])
    assert shards.train.tokens == len(everything)
    assert shards.train.read(0, 100, 33).tolist() == everything[100:133].tolist()
    assert shards.train.read_all().tolist() == everything.tolist()
    ends = numpy.fromfile(folder / "train" / "00000.ds.index", "<u8").astype(int)
    assert set(everything[ends - 1]) == {shards.manifest.eos_id}
    assert (everything == shards.manifest.eos_id).sum() == len(ends)


FILES = ["train/00000.ds", "train/00000.ds.index", "val/00000.ds", "val/00000.ds.index"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cut", [1, 2, None])
def test_a_truncated_or_missing_file_is_refused_by_name(folder, name, cut):
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[:-cut]) if cut else (folder / name).unlink()
    for hashed in (True, False):
        with pytest.raises(DamagedData, match=name):
            open_shards(folder, verify=hashed)


@pytest.mark.parametrize(
    "name", [*FILES, "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "manifest.json"]
)
def test_a_flipped_bit_is_refused_by_name(folder, name):
    raw = bytearray((folder / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(DamagedData, match=name):
        verify(folder)
    with pytest.raises(DamagedData, match=name):
        open_shards(folder)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"eos_id": 0', '"eos_id": 1'),
        ('"dtype": "uint16"', '"dtype": "uint32"'),
        ('"tokens": 500', '"tokens": 499'),
        ('"licence": null', '"licence": "mit"'),
    ],
)
def test_a_manifest_that_was_changed_is_refused(folder, before, after):
    text = (folder / "manifest.json").read_text()
    assert before in text
    (folder / "manifest.json").write_text(text.replace(before, after))
    with pytest.raises(DamagedData, match=r"manifest\.json"):
        verify(folder)


def test_a_manifest_of_an_older_version_is_read_and_its_counts_are_checked(folder):
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"], content["tokenizer"]["files"]
    (folder / "manifest.json").write_text(json.dumps(content))
    assert verify(folder).fingerprint == Manifest.model_validate_json(json.dumps(content)).fingerprint
    content["train"][0]["tokens"] -= 1
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DamagedData, match="cannot hold"):
        verify(folder)


def test_a_manifest_that_names_a_file_outside_of_its_folder_is_refused(folder):
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"]
    shutil.copytree(folder, folder.parent / "other")
    content["train"][0]["path"] = f"../other/{content['train'][0]['path']}"
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DamagedData, match=r"manifest\.json names '\.\./other/.*, which leads out of its folder"):
        verify(folder)


def test_a_file_that_shrinks_while_it_is_open_is_a_named_error(folder):
    shards = open_shards(folder)
    with (folder / "train/00000.ds").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DamagedData, match=r"train/00000\.ds"):
        shards.train.read(0, 40, 20)


def test_a_folder_without_a_manifest_is_bad_input_and_a_broken_manifest_is_damage(folder, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no manifest\.json there"):
        open_shards(tmp_path / "nowhere")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DamagedData, match=r"manifest\.json"):
        open_shards(folder)


def test_the_fingerprint_says_whether_the_data_is_the_same(folder):
    manifest = verify(folder)
    record = manifest.train[0].model_copy(update={"sha256": "0" * 64})
    assert manifest.model_copy(update={"train": [record]}).fingerprint != manifest.fingerprint
    licensed = manifest.source.model_copy(update={"licence": "cc0-1.0"})
    assert manifest.model_copy(update={"source": licensed}).fingerprint == manifest.fingerprint
