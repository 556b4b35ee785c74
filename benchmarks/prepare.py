"""Preparing text beside two others: parquet in, ids on disk out, on the same files, in one run.

ours: what recipes/prepare.py does, deduplication, split, checks and checksums included. nanogpt: `datasets.map` with
`tokenizers` and then a memmap, as nanoGPT's data/openwebtext/prepare.py does it. datatrove: its ParquetReader and its
DocumentTokenizer, under its local executor. The arms alternate in fresh processes, ours before and after the others;
the CPU-seconds of all their processes count, from when the first has imported its libraries. The text is Python's and
the installed packages': every source file, code and English, is a document.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
from gpt2_tokenizer import write_tokenizer  # the script beside this one

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h: whoever loses its parent becomes our child, and its CPU time ours
ARMS = ("ours", "nanogpt", "datatrove")
ROUND = ("ours", "nanogpt", "ours", "datatrove", "ours")
AIMS = {"nanogpt": 10, "datatrove": 8}
FILES = 4
SUFFIXES = {".py", ".pyi", ".pyx", ".h", ".hpp", ".c", ".md", ".rst", ".txt", ".yaml"}
VOCABULARY, END = 50_257, 50_256


def write_text(folder: Path, megabytes: int) -> float:
    """Write `megabytes` of different documents into parquet files of `folder`; returns what there really is."""
    import pyarrow
    import pyarrow.parquet

    from overnight.prepare.documents import text_hash

    texts, size, seen = [], 0, set()
    for path in source_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        if not 500 < len(text) < 500_000 or (key := text_hash(text)) in seen or "\ufffd" in text:
            continue
        if "<|endoftext|>" in text:  # in datatrove's hands a document forges its own end with it
            continue
        seen.add(key)
        texts.append(text)
        size += len(text.encode())
        if size > megabytes * 1e6:
            break
    folder.mkdir()
    for number in range(FILES):
        part = texts[len(texts) * number // FILES : len(texts) * (number + 1) // FILES]
        table = pyarrow.table({"text": part, "id": [f"{number}-{at}" for at in range(len(part))]})
        pyarrow.parquet.write_table(table, folder / f"{number:03d}_00000.parquet")
    return size / 1e6


def source_files() -> list[Path]:
    """What there is to read on every machine that has the project installed."""
    installed, standard = (Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib"))
    found = [path for path in installed.rglob("*") if path.suffix in SUFFIXES]
    found += [path for path in standard.rglob("*.py") if "site-packages" not in path.parts]
    return sorted(path for path in found if path.is_file())


def ours(text: Path, tokenizer: Path, out: Path, workers: int) -> None:
    from overnight.prepare.prepare import Workers, prepare
    from overnight.recipe.schema import Data

    data = Data(
        source="files",
        path=str(text),
        tokenizer=str(tokenizer),
        dir=str(out / "data"),
        val_tokens=100_000,
        reserved_fraction=0.02,
    )
    timed(lambda: prepare(data, VOCABULARY, report=lambda line: None, workers=Workers("local", workers)))


def nanogpt(text: Path, tokenizer: Path, out: Path, workers: int) -> None:
    import datasets
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    datasets.disable_progress_bars()

    def process(row: dict) -> dict:
        ids = encode(row["text"], add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return {"ids": [*ids, END], "len": len(ids) + 1}

    def prepare() -> None:
        files = sorted(str(path) for path in text.iterdir())
        dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(out / "cache"))
        tokenized = dataset.map(process, remove_columns=dataset.column_names, num_proc=workers if workers > 1 else None)
        total = int(np.sum(tokenized["len"], dtype=np.uint64))
        array = np.memmap(out / "train.bin", np.uint16, mode="w+", shape=(total,))
        at, shards = 0, min(1024, len(tokenized))
        for index in range(shards):
            batch = tokenized.shard(num_shards=shards, index=index, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            array[at : at + len(ids)] = ids
            at += len(ids)
        array.flush()

    timed(prepare)


def datatrove(text: Path, tokenizer: Path, out: Path, workers: int) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    logger.remove()
    steps = [
        ParquetReader(str(text), read_metadata=False),
        DocumentTokenizer(
            output_folder=str(out / "tokens"),
            tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
            eos_token="<|endoftext|>",
            shuffle_documents=False,
        ),
    ]
    executor = LocalPipelineExecutor(steps, tasks=FILES, workers=workers, logging_dir=str(out / "logs"))
    timed(executor.run)


def timed(action) -> None:
    """Run `action`, print its wall seconds and the CPU-seconds that went before it, and end at once."""
    before, started = cpu_seconds(resource.RUSAGE_SELF), time.monotonic()
    action()
    print(json.dumps({"before": before, "wall": time.monotonic() - started}), flush=True)
    os._exit(0)


def cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def documents(arm: str, out: Path) -> list[str]:
    """The SHA-256 of each document's ids, sorted; of ours those that train."""
    paths = {
        "ours": sorted(out.glob("data/train/*.ds")),
        "nanogpt": [out / "train.bin"],
        "datatrove": sorted(out.glob("tokens/*.ds")),
    }[arm]
    found = []
    for path in paths:
        tokens = np.fromfile(path, np.uint16)
        ends = np.flatnonzero(tokens == END) + 1
        found += [hashlib.sha256(piece.tobytes()).hexdigest() for piece in np.split(tokens, ends)[:-1]]
    return sorted(found)


def run(arm: str, text: Path, tokenizer: Path, out: Path, workers: int) -> dict:
    """One arm in a fresh process."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--arm",
        arm,
        str(text),
        str(tokenizer),
        str(out),
        str(workers),
    ]
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "DATATROVE_COLORIZE_LOGS": "0"}
    if workers == 1:
        quiet["RAYON_NUM_THREADS"] = "1"
    spent = cpu_seconds(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | quiet)
    if done.returncode:
        sys.exit(f"{arm} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    while True:  # workers whose parents have ended are ours to wait for
        try:
            os.wait()
        except ChildProcessError:
            break
    measured = json.loads(done.stdout.splitlines()[-1])
    return measured | {"cpu": cpu_seconds(resource.RUSAGE_CHILDREN) - spent - measured["before"]}


def main() -> None:
    if sys.argv[1:2] == ["--arm"]:
        arm, text, tokenizer, out, workers = sys.argv[2:]
        {"ours": ours, "nanogpt": nanogpt, "datatrove": datatrove}[arm](
            Path(text), Path(tokenizer), Path(out), int(workers)
        )
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="of text, at most what is installed")
    parser.add_argument("--rounds", type=int, default=1, help="of ours, nanogpt, ours, datatrove, ours")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker counts, one after the other")
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_tokenizer(place / "gpt2")
        size = write_text(place / "text", args.megabytes)
        print(f"{size:.0f} MB of text in {FILES} parquet files, GPT-2's vocabulary")
        print(f"{args.rounds} x {', '.join(ROUND)}; medians")
        for workers in args.workers:
            report(place, size, workers, args.rounds)


def report(place: Path, size: float, workers: int, rounds: int) -> None:
    """All arms with so many workers."""
    found: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    ids: dict[str, list[str]] = {}
    for number in range(rounds):
        for arm in ROUND:
            found[arm].append(run(arm, place / "text", place / "gpt2", place / arm, workers))
            if number == 0:
                ids[arm] = documents(arm, place / arm)
    print(f"\n{workers} worker{'s' if workers > 1 else ''}  CPU-seconds  MB per CPU-second  ours / this  MB per second")
    rate = {arm: size / statistics.median(each["cpu"] for each in found[arm]) for arm in ARMS}
    for arm in ARMS:
        wall = size / statistics.median(each["wall"] for each in found[arm])
        ratio = f"{rate['ours'] / rate[arm]:.1f}" + (f" (aim {AIMS[arm]})" if arm in AIMS else "")
        print(f"{arm:10} {size / rate[arm]:11.1f} {rate[arm]:18.1f} {ratio:>20} {wall:10.1f}")
    manifest = json.loads((place / "ours" / "data" / "manifest.json").read_text())
    reserved = manifest["counts"]["reserved_unused"] + sum(file["documents"] for file in manifest["val"])
    assert ids["datatrove"] == ids["nanogpt"], "the others differ"
    assert set(ids["ours"]) <= set(ids["nanogpt"]), "ours has a document that the others have not"
    assert len(ids["ours"]) + reserved == len(ids["nanogpt"]), "ours has lost a document"
    print(f"the ids of all {len(ids['nanogpt']):,} documents are equal; ours reserves {reserved:,} of them")


if __name__ == "__main__":
    main()
