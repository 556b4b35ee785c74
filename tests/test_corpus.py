"""Promises of the text sources: what a document is, and that every local format gives the same ones."""

import hashlib
import itertools
import json
import random
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from overnight.errors import DamagedData, InputError
from overnight.prepare import documents as documents_module
from overnight.prepare.docstrings import embedded_documents
from overnight.prepare.documents import (
    LONGEST_PIECE,
    LONGEST_ROW,
    NO_TEXT,
    NOT_JSON,
    NOT_UTF8,
    TOO_LONG,
    SourceRow,
    format_of,
    is_reserved,
    looks_like,
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
    return list(rows(path, format_of(path.name) or "", "text", path.name))


def documents(path: Path) -> list[str]:
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
    why = [NOT_UTF8, NO_TEXT, NOT_JSON, NOT_UTF8]
    assert marked == [("good", ""), *[("", each) for each in why], ("good too\0", "")]
    column = pyarrow.array([b"good", b"\xff\xfe", None], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    marked = [(row.text, row.rejected) for row in read(tmp_path / "a.parquet")]
    assert marked == [("good", ""), ("", NOT_UTF8), ("", NO_TEXT)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_row_that_is_too_long_is_marked_and_the_others_still_read(tmp_path, suffix):
    path, texts = tmp_path / f"a{suffix}", ["before", "x" * (LONGEST_ROW + 10), "after"]
    if suffix == ".parquet":
        write_parquet(path, texts)
    else:
        write_jsonl(path, texts)
    marked = read(path)
    assert [row.rejected for row in marked if row.rejected] == [TOO_LONG]
    assert marked[0].text.startswith("before")
    assert marked[-1].text.endswith("after")
    assert [row.share for row in marked] == sorted(row.share for row in marked)
    assert marked[-1].share == 1


@pytest.mark.parametrize("text", ["one sentence a line\n" * 20_000, "word " * 80_000, "ö" * 200_000])
def test_a_text_file_without_a_blank_line_is_cut_at_lines_words_or_letters_and_loses_nothing(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    pieces = [row.text for row in read(tmp_path / "a.txt")]
    assert len(pieces) == -(-len(text.encode()) // LONGEST_PIECE)
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")


def test_absent_texts_are_no_damage_and_are_told_from_it(tmp_path):
    lines = ['{"id": 1}', "", '{"text": null}', "   ", '{"text": 5}', '{"text": "good"}', "[1]", "", ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    marked = [row.text or row.rejected for row in read(tmp_path / "a.jsonl")]
    assert marked == [*[NO_TEXT] * 3, "good", NO_TEXT]
    with pytest.raises(InputError, match=r"`data\.text_column` is body, but a\.jsonl has id"):
        list(rows(tmp_path / "a.jsonl", ".jsonl", "body", "a.jsonl"))


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "large_string", "binary"])
def test_text_may_stand_in_any_of_arrows_types_for_it(tmp_path, kind):
    texts = ["one", None, "three"]
    types = {"string_view": pyarrow.string_view(), "large_string": pyarrow.large_string(), "binary": pyarrow.binary()}
    column = pyarrow.array(texts, types.get(kind, pyarrow.string()))
    column = column.dictionary_encode() if kind == "dictionary" else column
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert [row.text or row.rejected for row in read(tmp_path / "a.parquet")] == ["one", NO_TEXT, "three"]


def test_a_column_that_stands_twice_is_refused(tmp_path):
    column = pyarrow.array(["one"])
    twice = pyarrow.Table.from_arrays([column, column], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"`data\.text_column` is text, which a\.parquet has 2 times"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("packing", ["gz", "bz2", "zst"])
def test_packed_text_gives_the_same_documents_and_is_damaged_when_it_is_cut_off(tmp_path, packing):
    texts = [f"{text} {number}" for number in range(500) for text in TEXTS]
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    codec = {"gz": "gzip", "zst": "zstd"}.get(packing, packing)
    path = tmp_path / f"A.JSONL.{packing}"
    with pyarrow.CompressedOutputStream(str(path), codec) as file:
        file.write(plain.read_bytes())
    assert documents(path) == texts
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DamagedData, match=rf"A\.JSONL\.{packing} cannot be unpacked to its end"):
        read(path)


def test_the_encoding_of_text_that_is_no_utf_8_is_guessed(tmp_path):
    for encoding, said in (("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("latin-1", "WINDOWS-1252")):
        (tmp_path / "a.txt").write_bytes("Die Bäume blühen früh. ".encode(encoding))
        assert looks_like(tmp_path / "a.txt", ".txt") == said


def test_names_are_taken_as_people_have_them(tmp_path, monkeypatch):
    (tmp_path / "set[1]").mkdir()
    whole = write_jsonl(tmp_path / "set[1]" / "text[1].jsonl", TEXTS)
    write_jsonl(tmp_path / "set[1]" / "B.JSONL", TEXTS)
    assert found(whole) == [str(whole)]
    assert len(found(tmp_path / "set[1]" / "*.jsonl")) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(found("~/set[1]")) == len(found("~/**/*.[jJ]*")) == 2


def test_what_of_a_folder_is_not_read_is_said_by_name(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.jsonl", "c.csv", "sub/d.jsonl", ".hidden"):
        write_jsonl(tmp_path / name, TEXTS)
    said: list[str] = []
    assert len(find(Data(source="files", path=str(tmp_path)), None, said.append)) == 1
    assert "1 files are read: a.jsonl; not read: c.csv, sub/;" in said[0] and f"{tmp_path}/**/*.jsonl" in said[0]


@pytest.mark.parametrize(
    "line",
    [
        "{} *a.jsonl",
        "{}  ./a.jsonl",
        "SHA256 (a.jsonl) = {}",
        "{}  a.jsonl\0",
        "SHA2-256(a.jsonl)= {}",
        "\ufeff{}  a.jsonl\r",
    ],
)
def test_a_published_sum_is_read_in_every_form_that_sha256sum_writes(tmp_path, line):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "SHA256SUMS").write_text(line.format("AB" * 32) + "\n")
    assert find(Data(source="files", path=str(tmp_path)), None)[0].sha256 == "ab" * 32


@pytest.mark.parametrize("line", ["d41d8cd98f00b204e9800998ecf8427e  a.jsonl", "{0}  a.jsonl\n{1}  a.jsonl"])
def test_a_published_sum_that_cannot_be_read_is_refused_with_its_line(tmp_path, line):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "SHA256SUMS").write_text(line.format("ab" * 32, "cd" * 32))
    with pytest.raises(InputError, match=r"SHA256SUMS, line \d: "):
        found(tmp_path)


@pytest.mark.parametrize("instead", ["nothing", "a comment", "a folder", "a link to nothing"])
def test_a_published_sum_that_is_not_there_is_never_passed_over(tmp_path, instead):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    sums = tmp_path / "SHA256SUMS"
    made = {"nothing": sums.touch, "a folder": sums.mkdir, "a link to nothing": lambda: sums.symlink_to("x")}
    made.get(instead, lambda: sums.write_text("# sums\n"))()
    with pytest.raises((InputError, OSError), match="SHA256SUMS"):
        found(tmp_path)


def test_many_combining_marks_are_normalised_in_time_that_grows_with_them(monkeypatch):
    text = "caf\u00e9" + "\u0301\u0323\u0f73\u0344" * 200 + " \u0301\u0323 e" + "\u0301\u0323" * 200
    given: list[str] = []

    def normalize(form: str, text: str) -> str:
        given.append(text)
        return unicodedata.normalize(form, text)

    watched = SimpleNamespace(normalize=normalize, combining=unicodedata.combining)
    monkeypatch.setattr(documents_module, "unicodedata", watched)
    assert normalised_text(text) == unicodedata.normalize("NFC", text)
    classes = [unicodedata.combining(mark) for mark in given[-1]]
    steps_back = [one for one, other in itertools.pairwise(classes) if one > other > 0]
    assert len(steps_back) < 10  # each costs Python the length of its run


def test_what_cannot_be_found_is_refused_with_its_key_and_value(tmp_path):
    with pytest.raises(InputError, match=r"`data\.path` is .*nowhere"):
        found(tmp_path / "nowhere")
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(InputError, match=r"`data\.text_column` is content, but a\.parquet has id, text"):
        list(rows(path, ".parquet", "content", path.name))
    with pytest.raises(InputError, match=r"`data\.text_column` is id, but a\.parquet has int64 there"):
        list(rows(path, ".parquet", "id", path.name))


def test_a_file_of_another_format_is_refused_by_name(tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    with pytest.raises(InputError, match=r"a\.csv; files end in \.txt, \.jsonl .*\.parquet"):
        found(tmp_path / "a.csv")


@pytest.mark.slow
def test_the_embedded_corpus_is_10_mb_of_unique_documents_in_the_same_order_each_time():
    first = embedded_documents()
    assert 8e6 < sum(len(text.encode()) for text in first) < 13e6
    assert len({text_hash(text) for text in first}) == len(first) > 3000
    assert any("The ``if`` statement" in text or 'The "if" statement' in text for text in first)
    assert embedded_documents() == first
