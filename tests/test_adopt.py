"""Promises of adopting token files of others: trained on where they lie, checked for what can be checked."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import yaml
from datatrove.data import Document
from datatrove.pipeline.tokens import DocumentTokenizer
from texts import GPT2_VOCABULARY, SILENT, gpt2, paragraphs

from overnight.data.manifest import with_prepared_data
from overnight.data.shards import open_shards, verify
from overnight.errors import DamagedData, InputError
from overnight.planning.scaling_law import gpt2_dataset, unknown
from overnight.prepare.adopt import adopt
from overnight.recipe.identity import stored_recipe
from overnight.recipe.load import load
from overnight.recipe.schema import Data
from overnight.report.model_card import corpus, metadata

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SCRIPT, NIGHT = str(RECIPES / "prepare.py"), RECIPES / "fineweb_edu_40m.yaml"
TEXTS = paragraphs()[:300]


def settings(tmp_path: Path, gpt2_folder: Path, **more) -> Data:
    return Data(
        source="files", tokenizer=str(gpt2_folder), dir=str(tmp_path / "data"), **({"val_tokens": 10**6} | more)
    )


def nanogpt(folder: Path) -> Path:
    """What nanoGPT's prepare.py writes: raw uint16 tokens, 50256 behind each document."""
    tokenizer = gpt2()
    folder.mkdir()
    for name, texts in (("train", TEXTS[:250]), ("val", TEXTS[250:])):
        ids = [token for text in texts for token in (*tokenizer.encode(text), 50_256)]
        numpy.array(ids, numpy.uint16).tofile(folder / f"{name}.bin")
    return folder


def datatrove(folder: Path, gpt2_folder: Path, tasks: int = 3) -> Path:
    """What datatrove's DocumentTokenizer writes."""
    step = DocumentTokenizer(
        output_folder=str(folder),
        tokenizer_name_or_path=str(gpt2_folder / "tokenizer.json"),
        eos_token="<|endoftext|>",
        shuffle_documents=False,
    )
    for rank in range(tasks):
        step.run((Document(text, str(at)) for at, text in enumerate(TEXTS[rank::tasks])), rank, tasks)
    return folder


def test_nanogpts_files_are_linked_and_their_documents_found(tmp_path, gpt2_folder):
    origin = nanogpt(tmp_path / "bins")
    before = {path.name: path.stat().st_mtime_ns for path in origin.iterdir()}
    manifest = adopt(origin, settings(tmp_path, gpt2_folder), GPT2_VOCABULARY, **SILENT)
    assert manifest is not None
    assert manifest.split.leakage == "not checked"
    assert str(tmp_path) not in manifest.source.model_dump_json()
    assert [record.documents for record in (*manifest.train, *manifest.val)] == [250, 50]
    shards = open_shards(tmp_path / "data")
    assert shards.train.read_all().tolist() == numpy.fromfile(origin / "train.bin", "<u2").tolist()
    assert (tmp_path / "data" / "train" / "00000.ds").is_symlink()
    assert {path.name: path.stat().st_mtime_ns for path in origin.iterdir()} == before


@pytest.mark.parametrize("said", [{}, {"path": "HuggingFaceFW/fineweb-edu", "revision": "0a1", "license": "odc-by"}])
def test_of_adopted_tokens_is_told_what_was_said_of_them_and_nothing_of_the_recipe(tmp_path, gpt2_folder, said):
    data = ["--data.dir", str(tmp_path / "data"), "--data.tokenizer", str(gpt2_folder), "--data.val_tokens", "5000"]
    recipe = load(NIGHT, data)
    manifest = adopt(nanogpt(tmp_path / "bins"), recipe.data, GPT2_VOCABULARY, **SILENT, said=said)
    assert manifest is not None
    taken, tokens = with_prepared_data(recipe)
    assert tokens == manifest.train[0].tokens
    assert (taken.data.source, taken.data.path, taken.data.revision, taken.data.license) == (
        "adopted", said.get("path"), said.get("revision"), said.get("license"),
    )  # fmt: skip
    assert stored_recipe(taken.model_dump()).data == taken.data
    card = metadata(taken, {"val_loss": 3.3}, None)
    assert (card.datasets, card.license, card.language) == (
        (["HuggingFaceFW/fineweb-edu"], "apache-2.0", "en") if said else (None, None, None)
    )
    assert gpt2_dataset(taken) == ("fineweb-edu" if said else None) and (unknown(taken) is None) == bool(said)
    assert corpus(taken).startswith("token files that were adopted")


@pytest.mark.parametrize("layout", ["sides", "together"])
def test_datatroves_files_are_adopted_with_their_own_index(tmp_path, gpt2_folder, layout):
    origin = datatrove(tmp_path / "tokens", gpt2_folder)
    if layout == "sides":
        for side, names in (("train", ("00000", "00001")), ("val", ("00002",))):
            (origin / side).mkdir()
            for name in names:
                for path in origin.glob(f"{name}*"):
                    path.rename(origin / side / path.name)
    manifest = adopt(origin, settings(tmp_path, gpt2_folder), GPT2_VOCABULARY, **SILENT)
    assert manifest is not None
    assert [record.documents for record in (*manifest.train, *manifest.val)] == [100, 100, 100]
    tokenizer = gpt2()
    assert tokenizer.decode(open_shards(tmp_path / "data").val.read_all()).count("<|endoftext|>") == 100


def test_a_validation_side_that_is_larger_is_cut_to_the_tokens_asked_for(tmp_path, gpt2_folder):
    origin = nanogpt(tmp_path / "bins")
    manifest = adopt(origin, settings(tmp_path, gpt2_folder, val_tokens=700), GPT2_VOCABULARY, **SILENT)
    assert manifest is not None
    head = numpy.fromfile(origin / "val.bin", "<u2")[:700].tolist()
    assert open_shards(tmp_path / "data").val.read_all().tolist() == head
    assert manifest.split.val_tokens == 700


def test_what_does_not_fit_is_refused_and_nothing_is_left(tmp_path, gpt2_folder):
    data, origin = settings(tmp_path, gpt2_folder), nanogpt(tmp_path / "bins")
    for name, raw, problem in (
        ("odd.bin", b"\0" * 7, "7 bytes are not a whole number of uint16 tokens"),
        ("other.bin", numpy.array([1, 50_300, 50_256], "<u2").tobytes(), "holds token 50300"),
    ):
        path = tmp_path / name
        path.write_bytes(raw)
        (tmp_path / f"from-{name}").mkdir()
        for side in ("train", "val"):
            os.link(path, tmp_path / f"from-{name}" / f"{side}.bin")
        with pytest.raises(InputError, match=problem):
            adopt(tmp_path / f"from-{name}", data, GPT2_VOCABULARY, **SILENT)
    with pytest.raises(InputError, match=r"`--adopt` is .*no such folder; train\.bin and val\.bin"):
        adopt(tmp_path / "nowhere", data, GPT2_VOCABULARY, **SILENT)
    numpy.array([5, 3], "<u8").tofile(origin / "train.bin.index")
    with pytest.raises(DamagedData, match=r"train\.bin\.index: does not rise to"):
        adopt(origin, data, GPT2_VOCABULARY, **SILENT)
    assert not list(tmp_path.glob("data*"))


def test_adopting_again_verifies_and_is_no_error(tmp_path, gpt2_folder):
    data, origin = settings(tmp_path, gpt2_folder), nanogpt(tmp_path / "bins")
    assert adopt(origin, data, GPT2_VOCABULARY, **SILENT) == adopt(origin, data, GPT2_VOCABULARY, **SILENT)
    with pytest.raises(InputError, match="is not empty: name a new folder"):
        adopt(nanogpt(tmp_path / "other"), data, GPT2_VOCABULARY, **SILENT)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (numpy.array([20240520, 1, 9, *range(300)], "<i4").tobytes(), r"begins with the header .*`tail -c \+1025`"),
        (numpy.arange(100, dtype="<u4").tobytes(), "every second token is 0: these are wider than uint16"),
    ],
)
def test_tokens_of_another_form_are_named(tmp_path, gpt2_folder, raw, problem):
    (tmp_path / "bins").mkdir()
    for side in ("train", "val"):
        (tmp_path / "bins" / f"{side}.bin").write_bytes(raw)
    with pytest.raises(InputError, match=problem):
        adopt(tmp_path / "bins", settings(tmp_path, gpt2_folder), GPT2_VOCABULARY, dry_run=True, **SILENT)


def test_what_is_adopted_is_shown_as_text_and_doubts_are_said(tmp_path, gpt2_folder):
    (tmp_path / "bins").mkdir()
    for side in ("train", "val"):
        numpy.array(gpt2().encode("Once upon a time, " * 9), numpy.uint16).tofile(tmp_path / "bins" / f"{side}.bin")
    told: list[str] = []
    adopt(tmp_path / "bins", settings(tmp_path, gpt2_folder), GPT2_VOCABULARY, told.append)
    assert [line.split("begins ")[1][:17] for line in told[:2]] == ["'Once upon a time"] * 2
    assert "training tokens of 1 documents" in told[2]
    assert told[3].startswith("WARNING: no end of text (<|endoftext|>)") and "is noisy" in told[4]


def test_adopting_again_under_other_words_is_refused(tmp_path, gpt2_folder):
    data, origin = settings(tmp_path, gpt2_folder), nanogpt(tmp_path / "bins")
    adopt(origin, data, GPT2_VOCABULARY, **SILENT)
    with pytest.raises(InputError, match=r"(?s)`data\.path` is books, but .* says None.*remove") as refused:
        adopt(origin, data.model_copy(update={"val_tokens": 500}), GPT2_VOCABULARY, **SILENT, said={"path": "books"})
    assert "`data.val_tokens` is 500" in str(refused.value)


@pytest.mark.slow
def test_the_script_adopts_and_a_later_change_of_the_files_is_noticed(tmp_path, gpt2_folder):
    origin = nanogpt(tmp_path / "bins")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"data": settings(tmp_path, gpt2_folder, path="elsewhere").model_dump()}))
    command = [sys.executable, SCRIPT, str(recipe), "--adopt", str(origin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "leakage between the sides: not checked" in done.stdout
    assert f"next: python recipes/train.py {recipe} --name data" in done.stdout
    raw = bytearray((origin / "train.bin").read_bytes())
    raw[100] ^= 1
    (origin / "train.bin").write_bytes(raw)
    with pytest.raises(DamagedData, match=r"train/00000\.ds: SHA-256"):
        verify(tmp_path / "data")
