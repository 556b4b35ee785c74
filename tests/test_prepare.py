"""Promises of preparing data: no leak, no duplicate, no forged end of text, exact budgets, always the same bytes."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from texts import SILENT, digests, documents_of, gpt2
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from overnight.core.lock import hold
from overnight.data import tokenizer as tokenizer_module
from overnight.data.encoder import Encoder
from overnight.data.manifest import InputRecord
from overnight.data.shards import open_shards
from overnight.data.tokenizer import fingerprint, load_tokenizer, train_tokenizer
from overnight.errors import DamagedData, InputError, Unreachable
from overnight.prepare import dedup_split
from overnight.prepare.cost import cost_of, expected_cost
from overnight.prepare.documents import is_reserved, normalised_text, text_hash
from overnight.prepare.prepare import prepare
from overnight.prepare.sources import find
from overnight.recipe.schema import Data

WORDS = [line.strip() for line in Path(__file__).read_text().split() if line.strip().isalpha()]
VOCAB = 300


def texts_of(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(count)]


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def data(tmp_path) -> Data:
    write(tmp_path / "text" / "a.jsonl", texts_of(1, 600))
    write(tmp_path / "text" / "b.jsonl", texts_of(2, 600))
    return Data(
        source="files",
        path=str(tmp_path / "text"),
        tokenizer="trained",
        dir=str(tmp_path / "data"),
        val_tokens=1000,
        reserved_fraction=0.1,
    )


def test_d10_equal_texts_are_written_once_and_never_on_both_sides(data):
    first, second = texts_of(1, 600), texts_of(2, 600)
    planted = [text.replace(" ", "\n \t", 3) + "  " for text in first[:200]]
    write(Path(data.path or "") / "b.jsonl", second + planted + second[:50])
    manifest = prepare(data, VOCAB, **SILENT)
    assert manifest.counts.duplicates == 250
    train, val = ([normalised_text(text) for text in documents_of(data.dir, side)] for side in ("train", "val"))
    assert len(set(train)) == len(train)
    expected = [text for text in first + second if not is_reserved(text_hash(text), data.reserved_fraction)]
    assert train == expected  # in order, the first occurrence surviving
    assert all(is_reserved(text_hash(text), data.reserved_fraction) for text in val[:-1])
    assert not set(train) & set(val)


def test_validation_has_exactly_the_tokens_asked_for_in_hash_order(data):
    manifest = prepare(data, VOCAB, **SILENT)
    assert open_shards(data.dir).val.tokens == 1000
    val = documents_of(data.dir, "val")
    reserved = [text for text in texts_of(1, 600) if is_reserved(text_hash(text), data.reserved_fraction)]
    expected = sorted(reserved, key=text_hash)[: len(val)]
    assert val[:-1] == expected[:-1]
    assert expected[-1].startswith(val[-1])
    assert manifest.counts.reserved_unused > 0


def test_training_tokens_are_cut_at_the_budget_and_are_a_prefix(data, tmp_path):
    prepare(data, VOCAB, **SILENT)
    cut = data.model_copy(update={"dir": str(tmp_path / "cut"), "train_tokens": 5000})
    manifest = prepare(cut, VOCAB, **SILENT)
    whole = open_shards(data.dir).train.read(0, 0, 5000)
    assert open_shards(cut.dir).train.read_all().tolist() == whole.tolist()
    assert manifest.counts.after_budget > 0


def test_a_text_that_falls_short_is_refused_with_both_shortfalls(data):
    greedy = data.model_copy(update={"val_tokens": 10**6, "train_tokens": 10**7})
    with pytest.raises(InputError) as error:
        prepare(greedy, VOCAB, **SILENT)
    [val, train] = error.value.problems
    assert "`data.val_tokens` is 1,000,000" in val
    assert "`data.train_tokens` is 10,000,000" in train
    works = int(val.split("use at most ")[1].split(",")[0])
    assert not Path(data.dir).exists()
    prepare(data.model_copy(update={"val_tokens": works}), VOCAB, **SILENT)


KILLED = """
import os, signal, sys
from pathlib import Path
from overnight.data import shards
from overnight.prepare.prepare import prepare
from overnight.prepare.sources import find
from overnight.recipe.schema import Data

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "writing":
    shards.SplitWriter.write = die
else:
    rename = Path.rename
    def renamed(self, target):
        if self.name != "whole":
            return rename(self, target)
        if sys.argv[1] == "named":
            rename(self, target)
        die()
    Path.rename = renamed
prepare(Data.model_validate_json(sys.argv[2]), 300)
"""


@pytest.mark.parametrize("moment", ["writing", *(pytest.param(m, marks=pytest.mark.slow) for m in ("naming", "named"))])
def test_a_killed_preparation_leaves_no_half_folder_and_the_next_one_gives_the_same_bytes(data, tmp_path, moment):
    killed = subprocess.run([sys.executable, "-c", KILLED, moment, data.model_dump_json()], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert Path(data.dir).exists() == (moment == "named")
    assert Path(data.dir + ".partial").exists()
    prepare(data, VOCAB, **SILENT)
    prepare(data.model_copy(update={"dir": str(tmp_path / "undisturbed")}), VOCAB, **SILENT)
    assert digests(data.dir) == digests(tmp_path / "undisturbed")
    assert not Path(data.dir + ".partial").exists()


def test_a_prepared_folder_is_reused_and_never_overwritten(data):
    manifest = prepare(data, VOCAB, **SILENT)
    before = digests(data.dir)
    said: list[str] = []
    assert prepare(data, VOCAB, report=said.append) == manifest
    assert "already prepared" in said[0]
    with pytest.raises(InputError, match=r"`data\.val_tokens` is 900, but .* prepared with 1,000"):
        prepare(data.model_copy(update={"val_tokens": 900}), VOCAB, **SILENT)
    assert digests(data.dir) == before
    Path(data.dir, "train", "00000.ds").write_bytes(b"")
    with pytest.raises(DamagedData, match=r"train/00000\.ds"):
        prepare(data, VOCAB, **SILENT)


@pytest.mark.parametrize("change", ["same size", "longer", "new", "gone"])
def test_text_that_is_not_what_was_prepared_is_refused_by_name(data, change):
    prepare(data, VOCAB, **SILENT)
    folder = Path(data.path or "")
    one, other = folder / "a.jsonl", folder / "b.jsonl"
    before = one.stat()
    if change == "same size":
        one.write_text(one.read_text().replace("assert", "tressa"))
        os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "longer":
        write(one, texts_of(3, 700))
    elif change == "new":
        write(folder / "c.jsonl", texts_of(3, 10))
    else:
        one.unlink()
    named = {"new": r"c\.jsonl is new", "gone": r"a\.jsonl is gone"}.get(change, r"a\.jsonl has changed")
    with pytest.raises(InputError, match=named):
        prepare(data, VOCAB, **SILENT)
    one.unlink(missing_ok=True)
    other.unlink()
    (folder / "c.jsonl").unlink(missing_ok=True)
    prepare(data, VOCAB, **SILENT)  # where the text is not, its shards are what there is


def test_a_folder_of_other_files_is_left_alone(data):
    write(Path(data.dir) / "thesis.jsonl", ["mine"])
    with pytest.raises(InputError, match=r"`data\.dir` is .* holds other files"):
        prepare(data, VOCAB, **SILENT)
    assert os.listdir(data.dir) == ["thesis.jsonl"]


def test_a_link_to_another_disk_is_filled_and_one_to_a_disk_that_is_not_there_refused(data, tmp_path):
    (tmp_path / "disk").mkdir()
    Path(data.dir).symlink_to("disk")
    prepare(data, VOCAB, **SILENT)
    assert (tmp_path / "disk" / "manifest.json").exists()
    (tmp_path / "other").symlink_to("not-mounted")
    with pytest.raises(Unreachable, match="mount that disk"):
        prepare(data.model_copy(update={"dir": str(tmp_path / "other")}), VOCAB, **SILENT)


@pytest.mark.parametrize("row", ['[{"text": "a"}]', '{"text": null}', "<html>", ""])
def test_text_without_a_text_is_said_to_be_that_and_not_a_small_vocabulary(data, tmp_path, row):
    for path in (tmp_path / "text").iterdir():
        path.write_text(f"{row}\n" * 200)
    with pytest.raises(InputError, match=r"no row has a text: (400 times|no row)|200 of 200 rows .* row 0: no JSON"):
        prepare(data, VOCAB, **SILENT)


def test_a_file_whose_name_no_manifest_takes_is_refused_before_it_is_read(data, tmp_path):
    (tmp_path / "text" / "a.jsonl").rename(os.fsdecode(os.fsencode(tmp_path / "text") + b"/\xff.jsonl"))
    with pytest.raises(InputError, match="no name in UTF-8"):
        prepare(data, VOCAB, **SILENT)


def test_two_preparations_of_one_folder_are_not_mixed(data):
    partial = Path(data.dir + ".partial")
    partial.mkdir()
    lock = hold(partial, "wait")
    with pytest.raises(InputError, match=rf"is in use by process {os.getpid()} on .*or name another `data\.dir`"):
        prepare(data, VOCAB, **SILENT)
    lock.release()
    prepare(data, VOCAB, **SILENT)


def test_the_manifest_records_every_input_file(data):
    manifest = prepare(data, VOCAB, **SILENT)
    found = [(record.name, record.sha256, record.rows, record.documents) for record in manifest.inputs]
    paths = sorted(Path(data.path or "").iterdir())
    assert found == [(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), 600, 600) for path in paths]
    texts = texts_of(1, 600)
    assert manifest.inputs[0].text_bytes == sum(len(text.encode()) for text in texts)


def test_a_trained_vocabulary_is_exactly_the_size_asked_for(tmp_path):
    texts = texts_of(1, 600)
    tokenizer = train_tokenizer(texts, VOCAB)
    assert len(tokenizer) == VOCAB
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|endoftext|>" == tokenizer.bos_token
    assert fingerprint(train_tokenizer(texts, VOCAB)) == fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(str(tmp_path))) == fingerprint(tokenizer)
    for size, works in ((100_000, "at most"), (200, "at least 257")):
        with pytest.raises(InputError, match=rf"`model\.vocab_size` is {size}, .* use {works}"):
            train_tokenizer(texts, size)


def test_a_tokenizer_is_trained_on_a_word_as_long_as_a_book_in_pieces():
    long = "".join(random.Random(1).choices("abcd", k=2_000_000))  # minutes, as one word
    assert len(train_tokenizer([*texts_of(1, 50), long], VOCAB)) == VOCAB


def test_a_vocabulary_that_does_not_fit_the_model_is_refused(data, tmp_path):
    train_tokenizer(texts_of(1, 600), VOCAB).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(InputError, match=r"`model\.vocab_size` is 512, but .* has 300 entries: use 300"):
        prepare(data.model_copy(update={"tokenizer": str(tmp_path / "tokenizer")}), 512, **SILENT)


def saved(tokenizer, folder: Path, change=lambda content: None) -> str:
    """A tokenizer in a folder, its tokenizer.json changed."""
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("far", [65_541, 400])
def test_a_tokenizer_whose_ids_have_holes_is_refused(tmp_path, far):
    def tear(content):
        content["model"]["vocab"]["a"] = far

    folder = saved(train_tokenizer(texts_of(1, 50), VOCAB), tmp_path / "tokenizer", tear)
    with pytest.raises(InputError, match=rf"`data\.tokenizer` is .* the largest {far}; .* 0 to {VOCAB - 1} would work"):
        load_tokenizer(folder)


def test_a_tokenizer_that_gives_other_ids_each_time_is_refused(tmp_path):
    def drop(content):
        content["model"]["dropout"] = 0.1

    backend = train_tokenizer(texts_of(1, 50), VOCAB).backend_tokenizer
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    folder = saved(plain, tmp_path / "tokenizer", drop)
    with pytest.raises(InputError, match=r"has `dropout` 0\.1"):
        load_tokenizer(folder)


def test_a_tokenizer_that_fastokens_does_not_know_serves_without_it(data, tmp_path):
    backend = Tokenizer(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, show_progress=False, special_tokens=special, unk_token="<unk>")
    backend.train_from_iterator(texts_of(1, 600), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "unigram")
    data = data.model_copy(update={"tokenizer": str(tmp_path / "unigram")})
    manifest = prepare(data, len(tokenizer), **SILENT)
    assert manifest.counts.unreadable == 0 and documents_of(data.dir, "train")


def test_of_many_files_each_is_read_a_few_times_whatever_their_number(data, tmp_path, monkeypatch):
    read, real = [], dedup_split.read_stage
    monkeypatch.setattr(dedup_split, "read_stage", lambda path: read.append(path) or real(path))
    budgets = dedup_split.Budgets(data.model_copy(update={"train_tokens": 10**9}), lambda rank: tmp_path / str(rank))
    for rank in range(200):
        (tmp_path / str(rank)).mkdir()
        record = InputRecord(name="", bytes=1, sha256="", rows=1, documents=1, characters=1, text_bytes=1, rejected=[])
        (tmp_path / str(rank) / "stage.json").write_text(json.dumps({"record": record.model_dump(), "counts": {}}))
        np.array([(2**63, rank, 10**7), (1, rank, 10)], dedup_split.DOCUMENT).tofile(
            tmp_path / str(rank) / "documents.bin"
        )
        assert budgets.met_before(rank) == (rank >= 100)
    assert len(read) <= 3 * 100


def test_a_tokenizer_of_the_hub_is_asked_for_once_and_a_path_never(tmp_path, monkeypatch):
    asked = []

    def away(name, **how):
        asked.append(name)
        raise LocalEntryNotFoundError("no answer")

    monkeypatch.setattr(tokenizer_module, "snapshot_download", away)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(Unreachable, match="the Hub cannot be reached"):
        load_tokenizer("someone/tokenizer")
    (tmp_path / "file").write_text("")
    for path in (str(tmp_path / "nowhere"), "runs/nowhere", "./nowhere", "runs/a/models/b", str(tmp_path / "file")):
        with pytest.raises(InputError, match="is no folder"):
            load_tokenizer(path)
    assert asked == ["someone/tokenizer"]


def test_a_source_with_many_unreadable_rows_is_damaged_and_a_first_file_that_is_leaves_nothing(data):
    with Path(data.path or "", "a.jsonl").open("ab") as file:
        file.write(b'{"text": "\xff"}\n' * 50)
    with pytest.raises(DamagedData, match=r"a\.jsonl: 50 of 650 rows cannot be used, first row 600: no UTF-8 text"):
        prepare(data, VOCAB, **SILENT)
    assert not Path(data.dir + ".partial").exists()


def test_text_in_another_encoding_is_refused_with_the_command_that_converts_it_by_whichever_pass_reads_it(
    data, tmp_path
):
    train_tokenizer(texts_of(1, 600), VOCAB).save_pretrained(tmp_path / "own")
    text = tmp_path / "text" / "b.txt"
    text.write_bytes("Über die Straße gehen.\n\n".encode("latin-1") * 2_000)
    for tokenizer in ("trained", str(tmp_path / "own")):
        with pytest.raises(InputError, match=r"`iconv -f WINDOWS-1252 -t UTF-8 .*/b\.txt > utf8\.txt` makes that"):
            prepare(data.model_copy(update={"tokenizer": tokenizer}), VOCAB, **SILENT)


def test_a_literal_end_of_text_is_plain_text(tmp_path):
    gpt2().save_pretrained(tmp_path / "gpt2")
    train_tokenizer(texts_of(1, 600), VOCAB).save_pretrained(tmp_path / "own")
    for name in ("gpt2", "own"):
        tokenizer, encoder = load_tokenizer(str(tmp_path / name)), Encoder(tmp_path / name)
        texts = ["before<|endoftext|>after", "<|endoftext|>", "Hello world", "<|endoftext|>".join("abc")]
        for ids, ends in (encoder(texts), encoder.reference_ids(texts)):
            assert tokenizer.eos_token_id not in ids
            pieces = [ids[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
            assert [tokenizer.decode(piece) for piece in pieces] == texts
        assert name == "own" or (len(tokenizer), ids[ends[1] : ends[2]].tolist()) == (50_257, [15496, 995])


def test_the_cost_is_said_before_it_is_paid():
    data = Data(source="datasets", path="HuggingFaceFW/fineweb-edu", download_gb=12.5, train_tokens=3_680_000_000)
    assert "12.5 GB to download, 7.4 GB of shards" in expected_cost(data)
    assert "a download of unknown size" in expected_cost(Data(source="files", path="https://a.example/a.txt"))
    for here in ({"source": "embedded"}, {"source": "files", "path": "a.txt"}, {"source": "adopted"}):
        assert "nothing to download" in expected_cost(Data(**here, download_gb=12.5, train_tokens=1000))


def test_the_cost_of_files_follows_from_their_sizes_and_a_wrong_path_is_refused(data):
    said = cost_of(find(data, None), data, VOCAB)
    assert re.match(r"2 files of 0\.[1-9] MB, nothing to download, up to 0\.[1-9] MB of disk", said), said
    recipe = str(Path(__file__).parents[1] / "recipes" / "quickstart.yaml")
    asked = ["--dry-run", "--data.source", "files", "--data.path", f"{data.path}/nowhere.txt"]
    script = Path(recipe).with_name("prepare.py")
    how = {"capture_output": True, "text": True, "cwd": Path(data.dir).parent}  # not where a quickstart may have run
    done = subprocess.run([sys.executable, script, recipe, *asked], check=False, **how)
    assert done.returncode == 2 and "no file found there" in done.stderr
    prepare(data, VOCAB, **SILENT)
    for path in Path(data.path or "").iterdir():
        path.unlink()
    shape = ["--data.tokenizer", "trained", "--data.val_tokens", "1000", "--data.reserved_fraction", "0.1"]
    asked = [*asked[1:4], data.path, "--data.dir", data.dir, "--model.vocab_size", str(VOCAB), *shape]
    done = subprocess.run([sys.executable, script, recipe, *asked], check=False, **how)
    assert done.returncode == 0 and "already prepared" in done.stdout, done.stderr
