"""Promises of the text sources: what a document is, and that every local format gives the same ones."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from overnight.corpus import documents, is_reserved, rows, text_hash
from overnight.recipe import Data, InputError

TEXTS = ["The first document.\nIt has two lines.", "Naïve café: 日本語 and\ttabs", "", "third"]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "id": 1}) + "\n" for text in texts))
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path)
    return path


def files(path: Path | str, **more) -> Data:
    return Data(source="files", path=str(path), **more)


def test_texts_that_differ_in_whitespace_or_unicode_form_are_one_document():
    assert text_hash("a b") == text_hash("  a\n\t b ")
    assert text_hash("caf\u00e9") == text_hash("cafe\u0301")
    assert text_hash("a b") != text_hash("ab")


def test_the_reserved_share_is_the_fraction_asked_for():
    digests = [text_hash(str(number)) for number in range(20_000)]
    assert sum(is_reserved(digest, 0.1) for digest in digests) == pytest.approx(2000, abs=150)
    assert not any(is_reserved(digest, 0.0) for digest in digests)
    assert all(is_reserved(digest, 1.0) for digest in digests)


def test_jsonl_parquet_and_a_hub_style_folder_give_the_same_documents(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "a.parquet", TEXTS)
    assert list(documents(files(tmp_path / "a.jsonl"))) == TEXTS
    assert list(documents(files(tmp_path / "set" / "*.parquet"))) == TEXTS
    assert list(documents(Data(source="datasets", path=str(tmp_path / "set"), files="*.parquet"))) == TEXTS


def test_rows_carry_the_number_of_their_file_in_sorted_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ["two"])
    write_parquet(tmp_path / "a.parquet", ["one"])
    (tmp_path / "README.md").write_text("not text of the corpus")
    assert [(row.file, row.text) for row in rows(files(tmp_path))] == [(0, "one"), (1, "two")]
    write_parquet(tmp_path / "c.parquet", ["three"])
    found = rows(Data(source="datasets", path=str(tmp_path), files="*.parquet"))
    assert [(row.file, row.text) for row in found] == [(0, "one"), (1, "three")]


def test_a_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraphs = [f"Paragraph {number} " + "word " * 200 for number in range(30)]
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(paragraphs).encode())
    found = list(documents(files(tmp_path / "book.txt")))
    assert "\n\n".join(found) == "\n\n".join(paragraphs)
    assert len(found) == 8
    assert all(len(text) >= 4000 for text in found[:-1])


def test_rows_that_are_no_text_are_named_and_the_others_still_read(tmp_path):
    lines = [b'{"text": "good"}', b'{"text": "\xff"}', b'{"text": null}', b"not json", b'{"text": "good too\\u0000"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = list(rows(files(tmp_path / "a.jsonl")))
    assert [row.text for row in found] == ["good", None, None, None, "good too\0"]
    assert found[1].place == f"{tmp_path / 'a.jsonl'}:1"
    column = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert [row.text for row in rows(files(tmp_path / "a.parquet"))] == ["good", None]


@pytest.mark.parametrize("source", ["files", "datasets"])
def test_what_cannot_be_found_is_refused_with_its_key_and_value(tmp_path, source):
    with pytest.raises(InputError, match=r"`data\.path` is .*nowhere"):
        list(documents(Data(source=source, path=str(tmp_path / "nowhere"))))
    write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(InputError, match=r"`data\.text_column` is content, but .* has id, text"):
        list(documents(Data(source=source, path=str(tmp_path), text_column="content")))


def test_unknown_and_broken_files_are_refused_by_name(tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    with pytest.raises(InputError, match=r"a\.csv; files end in \.txt, \.jsonl, \.parquet"):
        list(documents(files(tmp_path / "a.csv")))
    raw = write_parquet(tmp_path / "a.parquet", TEXTS).read_bytes()
    (tmp_path / "a.parquet").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError, match=r"a\.parquet cannot be read"):
        list(documents(files(tmp_path / "a.parquet")))


def test_the_embedded_corpus_is_10_mb_of_unique_documents_and_survives_a_damaged_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = list(documents(Data(source="embedded")))
    assert 8e6 < sum(len(text.encode()) for text in first) < 13e6
    assert len({text_hash(text) for text in first}) == len(first) > 3000
    assert any("The ``if`` statement" in text or 'The "if" statement' in text for text in first)
    assert list(documents(Data(source="embedded"))) == first
    [cache] = (tmp_path / "overnight").iterdir()
    damaged = bytearray(cache.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    cache.write_bytes(damaged)
    assert list(documents(Data(source="embedded"))) == first


def test_the_embedded_corpus_needs_no_writable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("overnight.corpus._read_packages", lambda roots: ["text"])
    assert list(documents(Data(source="embedded"))) == ["text"]
