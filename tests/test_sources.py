"""Promises of fetching: every byte once, across drops and refusals, and nothing that is not what was published."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from file_server import COMMIT, serve
from texts import SILENT, digests, paragraphs, sample_data, write_files

from overnight.errors import DamagedData, InputError, Unreachable
from overnight.prepare import sources
from overnight.prepare.prepare import prepare
from overnight.prepare.sources import fetch, find

FILES = 2


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(sources, "BLOCK", 10_000)
    write_files(tmp_path / "served" / "sample", FILES, paragraphs()[:300])
    with serve(tmp_path / "served") as running:
        yield running


@pytest.fixture
def urls(server) -> list[str]:
    return [f"{server.url}/sample/{number:03d}_00000.parquet" for number in range(FILES)]


def test_a_remote_file_is_fetched_in_blocks_and_hashed(server, urls, tmp_path):
    [file] = find(sample_data(urls[0], tmp_path / "data", tmp_path), None)
    path, sha256 = fetch(file, tmp_path / "inputs")
    raw = (server.folder / "sample" / "000_00000.parquet").read_bytes()
    assert path.read_bytes() == raw
    assert (file.size, sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    before = len(server.requested)
    assert fetch(file, tmp_path / "inputs") == (path, sha256)
    assert len(server.requested) == before  # what was fetched is kept


@pytest.mark.parametrize("fault", ["one drop", "three drops", "503", "429"])
def test_d12_after_a_fault_of_the_network_the_rows_are_exact(server, urls, tmp_path, gpt2_folder, fault):
    data = sample_data(urls, tmp_path / "data", gpt2_folder, val_tokens=500)
    local = sample_data(str(server.folder / "sample"), tmp_path / "local", gpt2_folder, val_tokens=500)
    prepare(local, 50_257, **SILENT)
    server.drops = {"one drop": 1, "three drops": 3}.get(fault, 0)
    server.statuses = [int(fault)] * 2 if fault.isdigit() else []
    prepare(data, 50_257, **SILENT)
    shards = [
        {n: d for n, d in digests(folder).items() if n.endswith((".ds", ".index"))} for folder in (data.dir, local.dir)
    ]
    assert shards[0] == shards[1]


def test_d12_a_network_that_stays_away_ends_with_75_and_the_next_try_goes_on_at_the_byte(server, urls, tmp_path):
    [file] = find(sample_data(urls[0], tmp_path / "data", tmp_path), None)
    server.statuses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_block", fails_after(3))
        with pytest.raises(Unreachable, match=r"000_00000\.parquet cannot be reached .*continues from there"):
            fetch(file, tmp_path / "inputs")
    server.requested.clear()
    path, _ = fetch(file, tmp_path / "inputs")
    assert server.requested[0][1].startswith("bytes=30000-")
    assert path.read_bytes() == (server.folder / "sample" / "000_00000.parquet").read_bytes()


AWAY = """
import runpy, sys
from overnight.prepare import sources
sources.PAUSES = ()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_d12_the_script_ends_with_75_when_the_network_stays_away_and_with_2_when_it_is_refused(server, tmp_path, root):
    script = str(root / "recipes" / "prepare.py")
    for url, code in (("http://127.0.0.1:9/a.parquet", 75), (f"{server.url}/nowhere.parquet", 2)):
        arguments = [str(root / "recipes" / "quickstart.yaml"), "--data.source", "files", "--data.path", url]
        arguments += ["--data.dir", str(tmp_path / "data")]
        done = subprocess.run(
            [sys.executable, "-c", AWAY, script, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert url in done.stderr


def fails_after(count: int):
    """`sources._block` for so many blocks, and then a network that is gone."""
    real, given = sources._block, []

    def block(*arguments):
        if len(given) == count:
            raise ConnectionResetError("gone")
        given.append(real(*arguments))
        return given[-1]

    return block


def test_a_server_that_is_not_there_is_unreachable_and_a_file_that_is_not_there_is_refused(server, urls, tmp_path):
    for url, error in ((f"{server.url}/nowhere.parquet", InputError), ("http://127.0.0.1:9/a.parquet", Unreachable)):
        with pytest.raises(error, match=url) as caught:
            find(sample_data(url, tmp_path / "data", tmp_path), None)
        assert type(caught.value) is error
    server.statuses = [403]
    with pytest.raises(InputError, match="403"):
        fetch(find(sample_data(urls[0], tmp_path / "data", tmp_path), None)[0], tmp_path / "inputs")


HUB = """
import sys
from overnight.prepare import sources
from overnight.errors import InputError
from overnight.recipe.schema import Data
sources.BLOCK = 10_000
data = Data(source="datasets", path="someone/text", files="sample/*.parquet", revision=sys.argv[1] or None)
try:
    commit = sources.pinned_commit(data)
    for file in sources.find(data, commit):
        path, sha256 = sources.fetch(file, __import__("pathlib").Path("inputs"))
        print(file.name, file.sha256 == sha256, path)
except InputError as error:
    print(type(error).__name__, error)
"""


def hub(server, folder: Path, revision: str = "") -> str:
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, revision], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_server_without_ranges_serves_a_file_of_several_blocks_whole(server, urls, tmp_path):
    server.ranges, server.drops = False, 1
    [file] = find(sample_data(f"{urls[0]}?download=true", tmp_path / "data", tmp_path), None)
    path, _ = fetch(file, tmp_path / "inputs")
    assert path.read_bytes() == (server.folder / "sample" / "000_00000.parquet").read_bytes()


def test_a_hub_dataset_is_read_at_a_commit_and_against_its_published_sums(server, tmp_path):
    lines = hub(server, tmp_path).splitlines()
    assert [line.split()[1] for line in lines] == ["True"] * FILES, lines
    names = [f"hf://datasets/someone/text@{COMMIT}/sample/{number:03d}_00000.parquet" for number in range(FILES)]
    assert [line.split()[0] for line in lines] == names
    assert "cannot be had" in hub(server, tmp_path, "no-such-branch")


def test_d8_wrong_bytes_from_the_hub_are_refused_before_they_are_decoded(server, tmp_path):
    server.wrong_bytes = True
    assert hub(server, tmp_path).startswith("DamagedData hf://datasets/someone/text")
    assert not list((tmp_path / "inputs").glob("*.parquet"))


def test_a_hub_that_is_offline_is_refused_at_once(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, ""], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("InputError"), done.stdout + done.stderr


def test_d8_a_local_file_that_differs_from_the_sums_beside_it_is_refused(tmp_path, gpt2_folder):
    paths = write_files(tmp_path / "text", FILES)
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths)
    (tmp_path / "text" / "SHA256SUMS").write_text(sums)
    data = sample_data(str(tmp_path / "text"), tmp_path / "data", gpt2_folder)
    raw = bytearray(paths[1].read_bytes())
    raw[len(raw) // 2] ^= 1
    paths[1].write_bytes(raw)
    with pytest.raises(DamagedData, match=r"001_00000\.parquet: SHA-256 .* expected"):
        prepare(data, 50_257, **SILENT)
    raw[len(raw) // 2] ^= 1
    paths[1].write_bytes(raw)
    prepare(data, 50_257, **SILENT)
