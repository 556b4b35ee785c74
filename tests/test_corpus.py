"""Promises of the text sources: what a document is, and that every local format gives the same ones."""

import hashlib
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from overnight.errors import DamagedData, InputError
from overnight.prepare.docstrings import embedded_documents
from overnight.prepare.documents import (
    LONGEST_ROW,
    NOT_TEXT,
    TOO_LONG,
    SourceRow,
    is_reserved,
    normalised_text,
    rows,
    text_hash,
)
from overnight.prepare.sources import find
from overnight.recipe.schema import Data

TEXTS = ["The first document.\nIt has two lines.", "Naïve café: 日本語 and\ttabs", "", "third"]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "id": 1}) + "\n" for text in texts))
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path)
    return path


def read(path: Path) -> list[SourceRow]:
    return list(rows(path, path.suffix, "text", path.name))


def documents(path: Path) -> list[str | None]:
    return [row.text for row in read(path)]


def found(path: Path | str | list[str]) -> list[str]:
    return [file.name for file in find(Data(source="files", path=path if isinstance(path, list) else str(path)), None)]


def test_texts_that_differ_in_whitespace_or_unicode_form_are_one_document():
    assert text_hash("a b") == text_hash("  a\n\t b ")
    assert text_hash("caf\u00e9") == text_hash("cafe\u0301")
    assert text_hash("a b") != text_hash("ab")


def test_the_reserved_share_is_the_fraction_asked_for():
    digests = [text_hash(str(number)) for number in range(20_000)]
    assert sum(is_reserved(digest, 0.1) for digest in digests) == pytest.approx(2000, abs=150)
    assert not any(is_reserved(digest, 0.0) for digest in digests)
    assert all(is_reserved(digest, 1.0) for digest in digests)


def test_the_key_of_a_text_is_the_hash_of_its_normal_form(monkeypatch):
    draw = random.Random(1)
    for _ in range(2000):
        text = "".join(draw.choices("ab \t\n\r\v\f\x1c\x1f\x00\x7f\xa0\u2003\u0301e", k=draw.randint(0, 12)))
        assert text_hash(text) == hashlib.sha256(normalised_text(text).encode()).digest()[:16], repr(text)


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    assert documents(write_jsonl(tmp_path / "a.jsonl", TEXTS)) == TEXTS
    assert documents(write_parquet(tmp_path / "a.parquet", TEXTS)) == TEXTS


def test_files_are_found_in_sorted_order_whatever_order_they_are_named_in(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ["two"])
    write_parquet(tmp_path / "a.parquet", ["one"])
    (tmp_path / "README.md").write_text("not text of the corpus")
    both = [str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")]
    assert found(tmp_path) == found(both[::-1]) == found([both[1], str(tmp_path)]) == both
    assert found(tmp_path / "*.parquet") == both[:1]


def test_a_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraphs = [f"Paragraph {number} " + "word " * 200 for number in range(30)]
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(paragraphs).encode())
    texts = documents(tmp_path / "book.txt")
    assert "\n\n".join(texts) == "\n\n".join(paragraphs)
    assert len(texts) == 8
    assert all(len(text) >= 4000 for text in texts[:-1])


def test_rows_that_are_no_text_are_marked_and_the_others_still_read(tmp_path):
    lines = [b'{"text": "good"}', b'{"text": "\xff"}', b'{"text": null}', b"not json", b'{"text": "\\ud800"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "good too\\u0000"}']))
    marked = [(row.text, row.rejected) for row in read(tmp_path / "a.jsonl")]
    assert marked == [("good", ""), *[(None, NOT_TEXT)] * 4, ("good too\0", "")]
    column = pyarrow.array([b"good", b"\xff\xfe", None], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert [(row.text, row.rejected) for row in read(tmp_path / "a.parquet")] == [("good", ""), *[(None, NOT_TEXT)] * 2]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_row_that_is_too_long_is_marked_and_the_others_still_read(tmp_path, suffix):
    path, texts = tmp_path / f"a{suffix}", ["before", "x" * (LONGEST_ROW + 10), "after"]
    if suffix == ".parquet":
        write_parquet(path, texts)
    elif suffix == ".jsonl":
        write_jsonl(path, texts)
    else:
        path.write_text(f"{'before ' * 1000}\n\n{texts[1]}\n\nafter")
    marked = read(path)
    assert [row.rejected for row in marked if row.rejected] == [TOO_LONG]
    assert (marked[0].text or "").startswith("before")
    assert (marked[-1].text or "").endswith("after")
    assert [row.share for row in marked] == sorted(row.share for row in marked)
    assert marked[-1].share == 1


def test_what_cannot_be_found_is_refused_with_its_key_and_value(tmp_path):
    with pytest.raises(InputError, match=r"`data\.path` is .*nowhere"):
        found(tmp_path / "nowhere")
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(InputError, match=r"`data\.text_column` is content, but a\.parquet has id, text"):
        list(rows(path, ".parquet", "content", path.name))
    with pytest.raises(InputError, match=r"`data\.text_column` is id, but a\.parquet has int64 there"):
        list(rows(path, ".parquet", "id", path.name))


def test_unknown_and_broken_files_are_refused_by_name(tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    with pytest.raises(InputError, match=r"a\.csv; files end in \.txt, \.jsonl, \.parquet"):
        found(tmp_path / "a.csv")
    raw = write_parquet(tmp_path / "a.parquet", TEXTS).read_bytes()
    (tmp_path / "a.parquet").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DamagedData, match=r"a\.parquet cannot be read"):
        read(tmp_path / "a.parquet")


@pytest.mark.slow
def test_the_embedded_corpus_is_10_mb_of_unique_documents_and_survives_a_damaged_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = embedded_documents()
    assert 8e6 < sum(len(text.encode()) for text in first) < 13e6
    assert len({text_hash(text) for text in first}) == len(first) > 3000
    assert any("The ``if`` statement" in text or 'The "if" statement' in text for text in first)
    assert embedded_documents() == first
    [cache] = (tmp_path / "overnight").iterdir()
    damaged = bytearray(cache.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    cache.write_bytes(damaged)
    assert embedded_documents() == first


def test_the_embedded_corpus_needs_no_writable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("overnight.prepare.docstrings._read_packages", lambda roots: ["text"])
    assert embedded_documents() == ["text"]
