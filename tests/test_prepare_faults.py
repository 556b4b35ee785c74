"""The faults of group D, data: each row's outcome, by the public functions and the trainer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from runs import tiny, train
from texts import GPT2_VOCABULARY, SILENT, digests, documents_of, paragraphs, sample_data, write_files, write_parquet

from overnight.data import encoder
from overnight.data.shards import open_shards
from overnight.errors import DamagedData, InputError
from overnight.prepare.prepare import prepare
from overnight.recipe.schema import Data

TRAINER_REFUSES = [
    ("d1_truncated_by_an_even_number_of_bytes", lambda raw: raw[:-2]),
    ("d1_truncated_by_an_odd_number_of_bytes", lambda raw: raw[:-1]),
    ("d2_one_bit_flipped", lambda raw: raw[:100] + bytes([raw[100] ^ 4]) + raw[101:]),
]


@pytest.fixture
def data(tmp_path, gpt2_folder) -> Data:
    write_files(tmp_path / "text", 2)
    return sample_data(str(tmp_path / "text"), tmp_path / "data", gpt2_folder)


@pytest.mark.parametrize("damage", [case[1] for case in TRAINER_REFUSES], ids=[case[0] for case in TRAINER_REFUSES])
def test_d1_d2_training_on_a_damaged_shard_is_refused_with_the_file_named(workplace, tmp_path, damage):
    path = Path(tiny(workplace).data.dir) / "train" / "00000.ds"
    raw = path.read_bytes()
    try:
        path.write_bytes(damage(raw))
        done = train(workplace, "tiny.yaml", "--name", "damaged")
    finally:
        path.write_bytes(raw)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "train/00000.ds" in done.stderr
    assert not (workplace / "runs" / "damaged").exists()


def test_d3_training_on_shards_of_another_tokenizer_or_vocabulary_is_refused(workplace, tmp_path, gpt2_folder):
    folder = Path(tiny(workplace).data.dir)
    own = (folder / "tokenizer" / "tokenizer.json").read_text()
    try:
        (folder / "tokenizer" / "tokenizer.json").write_text((gpt2_folder / "tokenizer.json").read_text())
        done = train(workplace, "tiny.yaml", "--name", "foreign")
    finally:
        (folder / "tokenizer" / "tokenizer.json").write_text(own)
    assert done.returncode == 3
    assert "tokenizer/tokenizer.json: SHA-256" in done.stderr
    done = train(workplace, "tiny.yaml", "--name", "foreign", "--model.vocab_size", "600")
    assert done.returncode == 2
    assert "`model.vocab_size` is 600" in done.stderr


def test_d4_a_token_outside_the_vocabulary_is_never_written(data, monkeypatch):
    class Broken(encoder.Encoder):
        def __call__(self, texts):
            ids, ends = super().__call__(texts)
            return ids + 50_000, ends

    monkeypatch.setattr("overnight.prepare.tokenize_files.encoder_of", Broken)
    monkeypatch.setattr(encoder.Encoder, "check", lambda *arguments: None)
    with pytest.raises(ValueError, match="has an id outside"):
        prepare(data, GPT2_VOCABULARY, **SILENT)
    assert not Path(data.dir).exists()


def test_fastokens_and_tokenizers_that_differ_stop_the_run_and_either_alone_gives_the_same_bytes(
    data, monkeypatch, tmp_path
):
    prepare(data, GPT2_VOCABULARY, **SILENT)
    encoder.encoder_of.cache_clear()
    monkeypatch.setattr(encoder, "FastTokenizer", None)
    slow = data.model_copy(update={"dir": str(tmp_path / "slow")})
    prepare(slow, GPT2_VOCABULARY, **SILENT)
    assert digests(slow.dir) == digests(data.dir)
    monkeypatch.undo()
    encoder.encoder_of.cache_clear()
    monkeypatch.setattr(encoder.Encoder, "reference_ids", lambda self, texts: (self(texts)[0] + 1, self(texts)[1]))
    with pytest.raises(InputError, match=r"000_00000\.parquet: fastokens and tokenizers give different ids"):
        prepare(data.model_copy(update={"dir": str(tmp_path / "other")}), GPT2_VOCABULARY, **SILENT)


def test_d5_d6_d7_odd_rows_are_counted_and_listed_and_the_others_come_through(data, tmp_path):
    texts = [f"{text} <|endoftext|> and on" for text in paragraphs()]
    odd = ["", " \n\t ", "\x00NUL stays\x00", "\ufeffBOM stays", "x" * (9 * 2**20), "\u00a0"]
    write_files(tmp_path / "odd", 1, [*texts[:200], *odd, *texts[200:]])
    path = tmp_path / "odd" / "000_00000.parquet"
    table = pyarrow.parquet.read_table(path)
    raw = [text.encode() for text in table["text"].to_pylist()]
    raw[7] = b"half a character \xe2\x82"
    column = pyarrow.array([*raw[:9], None, *raw[9:-1]], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(table.set_column(0, "text", column), path)
    manifest = prepare(data.model_copy(update={"path": str(path)}), GPT2_VOCABULARY, **SILENT)
    assert manifest is not None
    counts = manifest.counts
    assert (counts.empty, counts.unreadable, counts.missing, counts.too_long) == (3, 1, 1, 1)
    assert manifest.inputs[0].rejected == ["row 7: no UTF-8 text", "row 9: no text there", "row 205: over 8 MiB"]
    assert len(manifest.model_dump_json()) < 3000
    tokens = open_shards(data.dir).train.read_all()
    ends = tokens == manifest.eos_id
    assert ends.sum() == sum(file.documents for file in manifest.train)  # no document forged its own end
    assert not (ends[1:] & ends[:-1]).any()  # never two ends in a row
    assert {"\x00NUL stays\x00", "\ufeffBOM stays"} <= {
        *documents_of(data.dir, "train"),
        *documents_of(data.dir, "val"),
    }


def test_d6_a_file_with_many_rows_that_cannot_be_used_is_damage(data, tmp_path):
    raw = [text.encode() for text in paragraphs()[:200]]
    raw[50:53] = [b"\xff"] * 3
    column = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "text" / "001_00000.parquet")
    with pytest.raises(DamagedData, match=r"001_00000\.parquet: 3 of 200 rows cannot be used, first row 50"):
        prepare(data, GPT2_VOCABULARY, **SILENT)
    assert not Path(data.dir).exists()


def damaged(name: str, path: Path) -> None:
    """Make the parquet file what the name says."""
    raw = path.read_bytes()
    if name == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "flipped in a page with a checksum":
        write_parquet(path, paragraphs()[:300], write_page_checksum=True, compression="none")
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 3] ^= 1
        path.write_bytes(raw)
    else:
        pyarrow.parquet.write_table(pyarrow.table({"content": ["text"] * 3}), path)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("truncated", DamagedData),
        ("empty", DamagedData),
        ("flipped in a page with a checksum", DamagedData),
        ("of another schema", InputError),
    ],
)
def test_d8_a_parquet_file_that_is_not_whole_is_refused_by_name_and_earlier_work_is_kept(data, tmp_path, name, error):
    path = tmp_path / "text" / "001_00000.parquet"
    whole = path.read_bytes()
    damaged(name, path)
    with pytest.raises(error, match=r"001_00000\.parquet") as caught:
        prepare(data, GPT2_VOCABULARY, **SILENT)
    assert type(caught.value) is error
    assert len(caught.value.problems) == 1
    assert not Path(data.dir).exists()
    stage = Path(data.dir + ".partial") / "stage"
    kept = digests(stage)
    assert len({key.split("/")[0] for key in kept}) == 1  # the first file's
    path.write_bytes(whole)
    prepare(data, GPT2_VOCABULARY, **SILENT)
    assert Path(data.dir).exists()


def test_d9_a_run_does_not_go_on_with_reordered_shards(workplace, undisturbed):
    folder = Path(tiny(workplace).data.dir)
    path = folder / "manifest.json"
    text = path.read_text()
    manifest = json.loads(text)
    manifest["train"] = [{**manifest["train"][0], "documents": manifest["train"][0]["documents"]}, *manifest["val"]]
    del manifest["sha256"]  # of itself: another manifest, not a damaged one
    try:
        path.write_text(json.dumps(manifest))
        done = train(workplace, "tiny.yaml")
    finally:
        path.write_text(text)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "data fingerprint" in done.stderr


FULL = """
import resource, sys
from overnight.prepare.prepare import prepare
from overnight.errors import InputError
from overnight.recipe.schema import Data
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    prepare(Data.model_validate_json(sys.argv[1]), 500, report=lambda line: None)
except InputError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize(
    "limit", [pytest.param(100_000, marks=pytest.mark.slow), 350_000], ids=["staging", "the shards"]
)
def test_a_full_disk_ends_with_one_message_and_no_file_that_is_not_whole(data, limit):
    """The limit of a file's size stands for the disk: writing beyond fails in the same way."""
    data = data.model_copy(update={"tokenizer": "trained"})
    command = [sys.executable, "-c", FULL, data.model_dump_json(), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "is full (File too large); earlier work is kept" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert not Path(data.dir).exists()
    assert not list(Path(data.dir + ".partial").rglob("*.partial"))
    prepare(data, 500, **SILENT)


def test_a_disk_without_room_is_refused_before_the_start(data, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(InputError, match=r"has 0\.0 GB free, and preparing needs about"):
        prepare(data, GPT2_VOCABULARY, **SILENT)
    assert not list(Path(data.dir + ".partial").glob("stage/*"))


def test_d13_more_iterations_than_tokens_are_said_up_front(workplace):
    done = train(workplace, "tiny.yaml", "--dry-run", "--schedule.max_iters", "4000")
    assert "29.08 epochs" in done.stdout, done.stdout
