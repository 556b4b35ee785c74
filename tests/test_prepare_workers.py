"""Promises of preparing on several workers and clusters: the same bytes, whoever did the work and in what order."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from texts import GPT2_VOCABULARY, SILENT, digests, paragraphs, sample_data, write_files

from overnight.data.manifest import read_manifest
from overnight.prepare.prepare import prepare
from overnight.recipe.schema import Data

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "recipes" / "prepare.py")
KILL_LOOP = str(ROOT / "tests" / "reliability" / "kill_prepare.py")


@pytest.fixture
def data(tmp_path, gpt2_folder) -> Data:
    write_files(tmp_path / "text", 4)
    return sample_data(str(tmp_path / "text"), tmp_path / "one", gpt2_folder)


def running(data: Data, *more: str, **environment: str) -> subprocess.Popen:
    """`recipes/prepare.py` as a user types it."""
    recipe = Path(data.dir).parent / "prepared.yaml"
    recipe.write_text(yaml.safe_dump({"data": data.model_dump()}))
    command, pipe = [sys.executable, SCRIPT, str(recipe), *more], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment)


def script(data: Data, *more: str, **environment: str) -> subprocess.CompletedProcess:
    """The same, to its end."""
    process = running(data, *more, **environment)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_two_workers_and_a_shuffled_list_of_files_give_the_bytes_of_one(data, tmp_path):
    names = sorted(str(path) for path in (tmp_path / "text").iterdir())
    one = data.model_copy(update={"path": names})
    prepare(one, GPT2_VOCABULARY, **SILENT)
    for number, order in enumerate([names, [names[2], names[0], names[3], names[1]]]):
        done = script(data, "--workers", "2", "--data.dir", str(tmp_path / f"two-{number}"), "--data.path", str(order))
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        assert "4/4 files" in done.stdout
        assert digests(tmp_path / f"two-{number}") == digests(one.dir)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_files_that_the_budget_makes_needless_are_not_in_the_result(data, tmp_path):
    cut = data.model_copy(update={"train_tokens": 30_000})
    manifest = prepare(cut, GPT2_VOCABULARY, **SILENT)
    assert manifest is not None
    assert len(manifest.inputs) == 2
    assert sum(file.tokens for file in manifest.train) == 30_000
    done = script(cut, "--workers", "4", "--data.dir", str(tmp_path / "four"))
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "four") == digests(cut.dir)


def test_duplicates_across_files_are_written_once_and_a_file_added_later_changes_no_side(data, tmp_path):
    texts = paragraphs()
    write_files(tmp_path / "more", 4, texts)
    write_files(tmp_path / "late", 1, [*texts[::7], *(f"Added later: {text}" for text in texts[:300])])
    (tmp_path / "late" / "000_00000.parquet").rename(tmp_path / "more" / "004_00000.parquet")
    before = prepare(data, GPT2_VOCABULARY, **SILENT)
    more = data.model_copy(update={"path": str(tmp_path / "more"), "dir": str(tmp_path / "after")})
    after = prepare(more, GPT2_VOCABULARY, **SILENT)
    assert before is not None and after is not None
    assert after.val == before.val
    assert after.counts.duplicates == len(texts[::7])
    assert before.counts.duplicates == 0
    old = (Path(data.dir) / "train" / "00000.ds").read_bytes()
    assert (Path(more.dir) / "train" / "00000.ds").read_bytes().startswith(old)


@pytest.mark.slow
def test_what_is_staged_is_kept_when_the_set_falls_short(data, tmp_path):
    done = script(data.model_copy(update={"train_tokens": 10**7}), "--workers", "2")
    assert done.returncode == 2
    assert "`data.train_tokens` is 10,000,000, but the training documents hold" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path(data.dir).exists()
    staged = digests(tmp_path / "one.partial" / "stage")
    assert len({name.split("/")[0] for name in staged}) == 4
    done = script(data, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "4/4 files" in done.stdout.splitlines()[1]


def test_the_script_verifies_a_folder_and_names_the_first_damaged_file(data):
    prepare(data, GPT2_VOCABULARY, **SILENT)
    verify = [sys.executable, SCRIPT, "--verify", data.dir]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{data.dir}: 2 shards and the tokenizer are as its manifest says\n")
    path = Path(data.dir) / "train" / "00000.ds"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert f"{path}: SHA-256" in done.stderr


def wait_for_worker(partial: Path, process: subprocess.Popen) -> int:
    """The process that works on a file."""
    while process.poll() is None:
        for path in partial.glob("progress/*.json"):
            try:
                return json.loads(path.read_text())["pid"]
            except FileNotFoundError:
                continue
        time.sleep(0.005)
    raise AssertionError(f"ended before a worker was seen: {process.communicate()}")


@pytest.fixture
def long_data(tmp_path, gpt2_folder) -> Data:
    """Two files that take long enough to be caught at it."""
    texts = [f"Edition {number}. {text}" for number in range(60) for text in paragraphs()]
    write_files(tmp_path / "text", 2, texts)
    return sample_data(str(tmp_path / "text"), tmp_path / "one", gpt2_folder)


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_command_with_75_and_a_word(long_data):
    process = running(long_data, "--workers", "2")
    os.kill(wait_for_worker(Path(long_data.dir + ".partial"), process), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert "was killed, perhaps for want of memory" in err
    assert script(long_data, "--workers", "2").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_command(long_data, number):
    process = running(long_data, "--workers", "2")
    wait_for_worker(Path(long_data.dir + ".partial"), process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 2
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert (process.returncode, err) == (
            75,
            "interrupted; what is staged is kept, and the same command continues from there\n",
        )
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_d11_a_preparation_that_is_killed_again_and_again_gives_the_same_bytes():
    done = subprocess.run([sys.executable, KILL_LOOP, "--kills", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "byte-identical" in done.stdout


# What Slurm's commands do, as far as datatrove uses them: an array job runs its tasks, a later job waits for it.
SBATCH = """#!/bin/bash
count=$(ls "$SLURM_CALLS"/*.sh 2> /dev/null | wc -l)
cp "${@: -1}" "$SLURM_CALLS/$count.sh"
echo "$@" > "$SLURM_CALLS/$count.args"
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$SLURM_CALLS/$count.sh")
if ! grep -q merge_stats "$SLURM_CALLS/$count.sh"; then
  for task in $(seq 0 "$tasks"); do
    SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=node1 RUN_OFFSET=0 bash "$SLURM_CALLS/$count.sh" >> "$SLURM_CALLS.log" 2>&1
  done
fi
echo "Submitted batch job $((100 + count))"
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "$3"\n'


@pytest.mark.slow
def test_slurm_is_handed_the_right_scripts_and_gives_the_same_bytes(data, tmp_path):
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    for folder in (programs, calls):
        folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755 | stat.S_IEXEC)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = "{partition: cpu, time: '02:00:00', mem_per_cpu_gb: 4, sbatch_args: {account: us}}"
    arguments = ["--executor", "slurm", "--workers", "2", "--executor-options", options]
    done = script(data, *arguments, PATH=path, SLURM_CALLS=str(calls))
    assert done.returncode == 0, done.stdout + done.stderr
    scripts = [text for call in sorted(calls.glob("*.sh")) if "merge_stats" not in (text := call.read_text())]
    lines = [
        [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#")] for text in scripts
    ]
    common = {"partition=cpu", "time=02:00:00", "mem-per-cpu=4G", "account=us", "cpus-per-task=1"}
    assert [common <= set(found) for found in lines] == [True, True]
    assert ["array=0-3%2" in lines[0], "array=0-0" in lines[1]] == [True, True]
    assert f"source {sys.prefix}/bin/activate" in scripts[0]
    assert "launch_pickled_pipeline" in scripts[0]
    waits = [call.read_text() for call in sorted(calls.glob("*.args"))]
    assert [word for text in waits for word in text.split() if "dependency" in word] == ["--dependency=afterok:100"]
    assert read_manifest(Path(data.dir)).counts.duplicates == 0
    one = data.model_copy(update={"dir": str(tmp_path / "here")})
    prepare(one, GPT2_VOCABULARY, **SILENT)
    assert digests(data.dir) == digests(one.dir)


@pytest.mark.slow
def test_options_that_an_executor_does_not_know_are_refused(data):
    done = script(data, "--executor", "slurm", "--executor-options", "{partitoin: cpu}")
    assert done.returncode == 2
    assert "`--executor-options`: SlurmPipelineExecutor says" in done.stderr
    assert "partitoin" in done.stderr
    assert script(data, "--executor-options", "cpu").returncode == 2
    assert script(data, "--workers", "0").returncode == 2
