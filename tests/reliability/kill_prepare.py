"""A preparation that is killed again and again: python tests/reliability/kill_prepare.py --kills 20 --seed 1

Every kill is a SIGKILL of `recipes/prepare.py` with two workers, at a random time of its work, followed by the same
command. The folder must be byte-identical to that of a preparation that nobody disturbed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from texts import digests, gpt2, write_files  # noqa: E402

from overnight.prepare.docstrings import embedded_documents  # noqa: E402

FILES = 12


def make_recipe(folder: Path) -> Path:
    """A recipe of twelve parquet files, 31 MB of text with planted duplicates, and GPT-2's tokenizer."""
    texts = embedded_documents()
    copies = [f"Edition {number}. {text}" for number in range(3) for text in texts]
    write_files(folder / "text", FILES, copies + texts[::20] * 2)
    gpt2().save_pretrained(folder / "gpt2")
    data = {"source": "files", "path": str(folder / "text"), "tokenizer": str(folder / "gpt2"), "val_tokens": 50_000}
    recipe = folder / "killed.yaml"
    recipe.write_text(yaml.safe_dump({"data": data | {"dir": str(folder / "data"), "reserved_fraction": 0.05}}))
    return recipe


def start(recipe: Path, folder: Path, *more: str) -> subprocess.Popen:
    """The command of a user."""
    command = [sys.executable, str(ROOT / "recipes" / "prepare.py"), str(recipe), "--data.dir", str(folder)]
    command += ["--workers", "2", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_work(partial: Path, since: float, process: subprocess.Popen) -> None:
    """Until the command has claimed the folder of its work, or has ended."""
    progress = partial / "progress"
    while process.poll() is None and not (progress.exists() and progress.stat().st_mtime > since):
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        recipe = make_recipe(place)
        undisturbed = start(recipe, place / "undisturbed")
        wait_for_work(place / "undisturbed.partial", time.time(), undisturbed)
        began = time.monotonic()
        assert undisturbed.wait() == 0, undisturbed.communicate()[0]
        whole = time.monotonic() - began
        killed, staged = 0, []
        while killed < args.kills:
            since = time.time()
            process = start(recipe, place / "data")
            wait_for_work(place / "data.partial", since, process)
            time.sleep(draw.uniform(0, whole))
            if process.poll() is not None:  # it was done before
                assert process.returncode == 0, process.communicate()[0]
                assert digests(place / "data") == digests(place / "undisturbed"), "the folders differ"
                shutil.rmtree(place / "data")
                continue
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            stage = place / "data.partial" / "stage"
            staged.append(len([path for path in stage.glob("*") if path.suffix != ".partial"]) if stage.exists() else 0)
        last = start(recipe, place / "data")
        assert last.wait() == 0, last.communicate()[0]
        assert digests(place / "data") == digests(place / "undisturbed"), "the folders differ"
        assert not (place / "data.partial").exists()
        between = sum(0 < count < FILES for count in staged)
        assert between or args.kills < 10, f"no kill fell between two files: {staged}"
    print(f"{killed} kills in preparations of {whole:.1f} s, seed {args.seed}; files staged at each: {staged}")
    print("the folder is byte-identical to the undisturbed one")


if __name__ == "__main__":
    main()
