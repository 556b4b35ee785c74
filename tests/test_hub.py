"""Finished models reach the Hub whole, whatever it does meanwhile; a run continues from there on another machine."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hub_server import OTHER, READ, WRITE, Hub
from runs import ROOT, final_sums, start, tiny, train, train_in_a_fresh_process

from overnight.core.console import Console
from overnight.core.published import allowed_files
from overnight.hub.background import Uploader
from overnight.hub.contents import MODEL_FILES, commits
from overnight.run_dir.directory import RunDirectory
from overnight.run_dir.layout import recipe_of

LADDER = ("--schedule.milestones", "[20, 30]", "--validation.prompts", "[]")
MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
REPORT = {"README.md", "curve.png", "metrics.jsonl", "recipe.yaml"}
# recipes/publish.py without the pauses that a real Hub is given.
PUBLISH = [sys.executable, "-c", (
    "import runpy, sys, overnight.hub.upload as upload; upload.FIRST_WAIT, upload.LONGEST_WAIT = 0.05, 0.1;"
    f"sys.argv[0] = {str(ROOT / 'recipes' / 'publish.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
)]  # fmt: skip


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def pushed(
    folder: Path, hub: Hub, home: Path, *arguments: str, token: str | None = WRITE
) -> subprocess.CompletedProcess:
    """recipes/publish.py with these arguments, to its end."""
    how = {"cwd": folder, "env": hub.environment(token=token, home=home), "timeout": 120}
    return subprocess.run([*PUBLISH, *arguments], capture_output=True, text=True, check=False, **how)


def send(folder: Path, hub: Hub, home: Path, repo: str) -> str:
    """What it prints when it sends the copied run to `repo`, which must end well."""
    sent = pushed(folder, hub, home, "runs/copied", "--repo-id", repo)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    return sent.stdout + sent.stderr


def files_of(hub: Hub, repo: str, revision: str) -> dict[str, bytes]:
    """What a branch holds."""
    return {path: file.content for path, file in hub.repos[repo].at(revision).files.items() if path != ".gitattributes"}


def holds(hub: Hub, repo: str, revision: str, model: Path) -> bool:
    """Whether a branch holds a finished model, byte for byte, and its report."""
    there = files_of(hub, repo, revision)
    local = {name: path.read_bytes() for name, path in allowed_files(model, MODEL_FILES).items()}
    return there.keys() >= MODEL | REPORT and all(there[name] == content for name, content in local.items())


@pytest.fixture(scope="module")
def finished(workplace):
    """A run of two budgets that was never pushed; copied by the tests that push it."""
    done = train(
        workplace, "tiny.yaml", "--name", "unpushed", "--schedule.max_iters", "20", "--validation.prompts", "[]"
    )
    assert done.returncode == 0, done.stderr
    return workplace / "runs" / "unpushed"


@pytest.fixture
def copy(finished, workplace):
    """A copy of that run, with files beside that nobody may get."""
    folder = workplace / "runs" / "copied"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder)
    for place in (folder, folder / "models" / "iter-000020"):
        for name in (".env", "notes.pkl", ".hf_token", "model.bin", "id_rsa"):
            (place / name).write_text("CANARY")
    (folder / "models" / "iter-000020" / "vocab.json").symlink_to("/etc/hostname")
    return folder


def test_a_run_with_three_budgets_is_on_the_hub_when_it_ends(workplace, hub, tmp_path):
    run = workplace / "runs" / "pushed"
    run.mkdir(parents=True)
    for name in (".env", "secret.pkl", ".hf_token"):
        (run / name).write_text("CANARY")
    command = ("tiny.yaml", "--name", "pushed", *LADDER, "--hub.repo_id", "alice/ladder")
    done = train(workplace, *command, **hub.settings(WRITE, tmp_path))
    assert done.returncode == 0, done.stderr
    repo = hub.repos["alice/ladder"]
    assert repo.private and set(repo.branches) == {"main", "iter-000020", "iter-000030", "iter-000040"}
    assert set(repo.tags) == {"final-000040"}
    for budget in (20, 30, 40):
        assert holds(hub, "alice/ladder", f"iter-0000{budget}", run / "models" / f"iter-0000{budget}")
        assert f"iter-0000{budget}: {budget} iterations, validation loss" in done.stdout
    assert holds(hub, "alice/ladder", "main", run / "models" / "iter-000040")
    assert set(files_of(hub, "alice/ladder", "main")) == MODEL | REPORT
    assert "missing" not in done.stdout


@pytest.mark.slow
def test_e1_a_hub_that_hangs_stops_no_iteration_and_what_is_missing_is_sent_later(workplace, hub, tmp_path):
    hub.fault("hang")
    options = ("--schedule.max_iters", "20", "--hub.repo_id", "alice/later", "--hub.patience_minutes", "0.02")
    done = train(workplace, "tiny.yaml", "--name", "later", *options, **hub.settings(WRITE, tmp_path))
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert said.index("runs/later is finished") < said.index("What is still missing, this sends")
    assert "python recipes/publish.py runs/later" in said
    hub.heal()
    sent = pushed(workplace, hub, tmp_path, "runs/later")
    assert sent.returncode == 0, sent.stderr
    assert holds(hub, "alice/later", "main", workplace / "runs" / "later" / "models" / "iter-000020")


def test_e1_whatever_may_pass_is_tried_again(workplace, copy, hub, tmp_path):
    for code in (409, 412, 429, 500, 503):
        hub.fault("status", "/commit/", times=1, code=code)
    hub.fault("status", "repos/create", times=1, code=502)
    hub.fault("drop", "repos/create", times=1)
    hub.fault("drop", "/commit/", times=2)
    hub.fault("status", "^GET .*/revision/", times=2, code=504)
    hub.fault("lose", "/commit/", times=1)
    assert "trying again" in send(workplace, hub, tmp_path, "alice/copied")
    assert not any(fault.times for fault in hub.faults)  # all of them were met
    assert holds(hub, "alice/copied", "iter-000020", copy / "models" / "iter-000020")
    assert holds(hub, "alice/copied", "main", copy / "models" / "iter-000020")


@pytest.mark.slow
def test_e2_killed_in_an_upload_nothing_half_is_seen_and_the_next_start_sends_it(workplace, copy, hub, tmp_path):
    hub.fault("hang", "^PUT ")
    environment = hub.environment(home=tmp_path)
    process = subprocess.Popen([*PUBLISH, "runs/copied", "--repo-id", "alice/killed"], cwd=workplace, env=environment)
    deadline = time.monotonic() + 120
    while not any(request.startswith("PUT ") for request in hub.requests) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert files_of(hub, "alice/killed", "iter-000020") == files_of(hub, "alice/killed", "main") == {}
    hub.heal()
    send(workplace, hub, tmp_path, "alice/killed")
    assert holds(hub, "alice/killed", "main", copy / "models" / "iter-000020")


def test_e3_a_wrong_byte_and_a_missing_file_are_noticed_and_sent_again(workplace, copy, hub, tmp_path):
    hub.fault("bytes", "^PUT ", times=1)
    hub.fault("forget", "/commit/", times=1, file="config.json")
    hub.fault("bytes", "/commit/", times=1, file="recipe.yaml")
    assert "did not arrive as sent" in send(workplace, hub, tmp_path, "alice/wrong")
    assert not any(fault.times for fault in hub.faults)  # all of them were met
    for revision in ("iter-000020", "main"):
        assert holds(hub, "alice/wrong", revision, copy / "models" / "iter-000020")


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        (None, "alice/x", "no token is set"),
        ("hf_unknown", "alice/x", "the Hub refuses (401)"),
        (READ, "alice/x", "you must use a write token"),
        (OTHER, "alice/x", 'rights to write to the namespace "alice"'),
    ],
)
def test_e1_what_the_hub_refuses_is_said_in_one_line(workplace, copy, hub, tmp_path, token, repo, said):
    refused = pushed(workplace, hub, tmp_path, "runs/copied", "--repo-id", repo, token=token)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert said in refused.stderr and "Traceback" not in refused.stderr
    assert repo not in hub.repos


@pytest.mark.slow
def test_e4_without_a_token_or_offline_a_run_says_so_and_is_trained(workplace, hub, tmp_path):
    options = ("--schedule.max_iters", "10", "--hub.repo_id", "alice/none")
    done = train(workplace, "tiny.yaml", "--name", "no-token", *options, **hub.settings(None, tmp_path))
    before, _, after = done.stdout.partition("\niter ")
    for said in (before, after):  # before the first iteration, and at the end, when that is long ago
        assert done.returncode == 0 and said.count("no token is set, so nothing is sent") == 1
    offline = hub.settings(WRITE, tmp_path) | {"HF_HUB_OFFLINE": "1"}
    done = train(workplace, "tiny.yaml", "--name", "offline", *options, **offline)
    assert done.returncode == 0 and "HF_HUB_OFFLINE is set, so nothing is sent" in done.stdout
    assert hub.requests == []


def test_e5_e6_only_what_is_allowed_is_sent_and_no_secret_is_anywhere(workplace, copy, hub, tmp_path):
    dry = pushed(workplace, hub, tmp_path, "runs/copied", "--repo-id", "alice/clean", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert hub.requests == [] and "alice/clean, main: 20 iterations" in dry.stdout
    said = send(workplace, hub, tmp_path, "alice/clean")
    there = files_of(hub, "alice/clean", "main")
    assert set(there) == MODEL | REPORT
    assert set(re.findall(r"^  (\S+) ", dry.stdout, re.MULTILINE)) == set(there)
    hostname = Path("/etc/hostname").read_bytes().strip() or b"nothing"
    for content in [*there.values(), said.encode()]:
        assert b"CANARY" not in content and WRITE.encode() not in content
    assert not any(hostname in content for name, content in there.items() if name.startswith("vocab"))
    for path in copy.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert WRITE.encode() not in path.read_bytes()


def test_nothing_that_is_sent_has_a_path_or_a_home_of_this_machine(workplace, copy, monkeypatch):
    home = "/export/Juan Pérez"
    monkeypatch.setenv("HOME", home)
    (copy / "recipe.yaml").write_text(
        (copy / "recipe.yaml").read_text().replace("push_state: false", "push_state: true")
    )
    recipe = recipe_of(copy)  # before its files say that its data lies in that home
    scored = copy / "evaluation" / "iter-000020"
    scored.mkdir(parents=True)
    facts = {
        "name": f"{home}/models/mine",
        "note": "texts\nof ~juan/a.txt, file:///export/juan/b.txt (/export/juan/c.txt)",
    }
    results = {"settings": {"limit": None}, "models": [{"tasks": {}, "facts": facts}], "comparisons": []}
    (scored / "results.json").write_text(json.dumps(results, ensure_ascii=False))
    (scored / "comparison.md").write_text(
        f"# {home}/models/mine\n\n`/export/juan/x y`, https://hub.example/home/page\n"
    )
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl"):
        (copy / name).write_text((copy / name).read_text().replace(str(workplace), f"{home}/texts"))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "sample", "iteration": 20, "text": "so\n/export/juan/a"}) + "\n")
    sent = commits(copy, recipe, "alice/clean", checkpoints=True)
    assert {commit.branch for commit in sent} == {"iter-000020", "main", "checkpoints", "state"}
    for commit in sent:
        for name, path in (commit.files | commit.report()).items():
            content = path.read_bytes()
            assert not re.search(rb"(?i)/export/|juan|rez/|file:/", content), name
            assert str(workplace).encode() not in content, name
    (main,) = (commit for commit in sent if commit.branch == "main")
    assert main.files["evaluation/comparison.md"].read_text() == "# mine\n\n`x y`, https://hub.example/home/page\n"
    assert yaml.safe_load(main.report()["recipe.yaml"].read_text())["data"]["path"] == ["text.jsonl"]


def test_e1_an_upload_that_a_signal_ends_is_reported_with_what_sends_the_rest(
    workplace, copy, hub, monkeypatch, capsys
):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    recipe = tiny(workplace, "--name", "copied", "--hub.repo_id", "alice/ended")
    uploader = Uploader(RunDirectory(recipe), Console(), active=True)
    uploader.poll()
    uploader.helper.process.send_signal(signal.SIGTERM)
    uploader.helper.process.wait()
    uploader.poll()
    said = capsys.readouterr().out
    assert "ended by signal 15. What is still missing, this sends: python recipes/publish.py runs/copied" in said
    assert uploader.helper is None and uploader.active


@pytest.mark.slow
def test_a_tag_that_means_another_model_is_moved(workplace, copy, hub, tmp_path):
    send(workplace, hub, tmp_path, "alice/tagged")
    repo = hub.repos["alice/tagged"]
    (tag,) = repo.tags
    repo.tags[tag] = next(iter(repo.commits))  # as another run's model would have left it
    assert "model.safetensors" not in repo.at(tag).files
    send(workplace, hub, tmp_path, "alice/tagged")
    assert repo.at(tag).files["model.safetensors"] == repo.at("main").files["model.safetensors"]


@pytest.mark.slow
def test_an_evaluation_that_came_later_is_added(workplace, copy, hub, tmp_path):
    send(workplace, hub, tmp_path, "alice/scored")
    scored = copy / "evaluation" / "iter-000020"
    scored.mkdir(parents=True)
    (scored / "comparison.md").write_text("# compared\n")
    (scored / "results.json").write_text('{"settings": {"limit": null}, "models": [{"tasks": {}}], "comparisons": []}')
    send(workplace, hub, tmp_path, "alice/scored")
    commits = len(hub.repos["alice/scored"].commits)
    send(workplace, hub, tmp_path, "alice/scored")
    assert len(hub.repos["alice/scored"].commits) == commits  # everything is there: nothing is missing
    there = files_of(hub, "alice/scored", "main")
    assert there["evaluation/comparison.md"] == b"# compared\n"
    assert b"evaluation/comparison.md" in there["README.md"]


@pytest.mark.slow
def test_models_weights_and_state_are_sent_while_the_run_goes_on(workplace, hub, tmp_path):
    options = ("--name", "goes-on", "--schedule.max_iters", "20000", "--schedule.milestones", "[20]")
    options += ("--hub.repo_id", "alice/goes-on", "--hub.push_state", "true", "--hub.every_hours", "0.0001")
    options += ("--threads", "1")  # a core for what sends, which has low priority: the run must not end before it
    trainer = start(workplace, "tiny.yaml", *options, **hub.settings(WRITE, tmp_path))
    awaited = {"iter-000020", "main", "checkpoints", "state"}
    for line in trainer.stdout:
        if found := re.match(r"hub: alice/goes-on, ([\w-]+): .*, verified", line):
            awaited.discard(found[1])
        if not awaited:
            break
    trainer.kill()
    trainer.wait()
    assert awaited == set()
    assert holds(hub, "alice/goes-on", "main", workplace / "runs" / "goes-on" / "models" / "iter-000020")


@pytest.mark.slow
def test_killed_here_and_resumed_from_the_hub_elsewhere_to_the_same_bits(workplace, undisturbed, hub, tmp_path):
    """Machine A is killed in the decay; machine B has the data, an empty folder, and the Hub."""
    options = ("--schedule.max_iters", "200", "--schedule.milestones", "[40]", "--validation.prompts", "[]")
    options += ("--hub.repo_id", "alice/moved", "--hub.push_state", "true", "--hub.every_hours", "0.0001")
    whole = train(workplace, "tiny.yaml", "--name", "stays", *options[:6])
    assert whole.returncode == 0, whole.stderr
    process = start(workplace, "tiny.yaml", "--name", "moved", *options, **hub.settings(WRITE, tmp_path))
    for line in process.stdout:
        if line.startswith("iter ") and int(line.split()[1].split("/")[0]) > 60:
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    upload = [sys.executable, "-m", "overnight.hub.upload", "runs/moved", "--checkpoints"]  # as the trainer may have
    how = {"cwd": workplace, "env": hub.environment(home=tmp_path), "capture_output": True, "text": True}
    sent = subprocess.run(upload, **how)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(workplace / "tiny.yaml", elsewhere)

    def resumed(name: str) -> subprocess.CompletedProcess:
        command = ("tiny.yaml", "--name", name, *options[:6], "--resume", f"hub:alice/{name}")
        return train_in_a_fresh_process(elsewhere, *command, **hub.settings(WRITE, tmp_path / "b"))

    hub.fault("bytes", "GET .*/resolve/.*/model.safetensors", times=1)
    damaged = resumed("moved")
    assert damaged.returncode == 3 and "did not arrive as sent" in damaged.stderr
    done = resumed("moved")
    assert done.returncode == 0, done.stderr
    assert "resumes at iteration" in done.stdout
    assert final_sums(elsewhere, "moved", 200) == final_sums(workplace, "stays", 200)
    model = "models/iter-000200/model.safetensors"
    there, here = (workplace / "runs/stays" / model, elsewhere / "runs/moved" / model)
    assert there.read_bytes() == here.read_bytes()
    card = files_of(hub, "alice/moved", "checkpoints")["README.md"].decode()
    assert "Not annealed, and not a finished model" in card
    again, gone = resumed("moved"), resumed("gone")
    assert again.returncode == 2 and "holds a run already" in again.stderr
    assert gone.returncode == 2 and "no state to be seen there" in gone.stderr
    assert not (elsewhere / "runs" / "gone" / "checkpoints").exists()
