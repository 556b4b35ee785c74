"""The loopback Hub as the real client finds it, in processes of its own: this one is offline."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import OTHER, READ, WRITE, Hub, Repo

FILES = {"README.md": b"---\nlicense: mit\n---\n# A model\n", "config/a.json": b"{}", "model.safetensors": bytes(99999)}
CARD = """---
license: {}
model-index:
- name: m
  results: [{{task: {{type: t}}, dataset: {{name: d, type: d}}, metrics: [{{type: loss, value: 1}}]}}]
---
"""
PRELUDE = """
import json, os, time
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_url, snapshot_download
from huggingface_hub.utils import get_session

api, told = HfApi(), {}

def push(files, message="a model", **how):
    adds = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit("alice/m", adds, commit_message=message, **how).oid

def raised(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
    return None
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub without repositories."""
    with Hub() as hub:
        yield hub


@pytest.fixture
def filled(hub: Hub) -> Hub:
    """A Hub with alice's private and still empty model."""
    hub.repos["alice/m"] = Repo("alice/m", private=True)
    return hub


def client(hub: Hub, home: Path, steps: str, token: str | None = WRITE) -> dict:
    """What a process with the real client tells after these steps."""
    script = f"{PRELUDE}\nFILES = {FILES!r}\n{textwrap.dedent(steps)}\nprint(json.dumps(told))"
    environment = hub.environment(token=token, home=home)
    command = [sys.executable, "-"]
    result = subprocess.run(command, input=script, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_what_was_pushed_comes_back_bit_for_bit(hub, tmp_path):
    pushed = client(
        hub,
        tmp_path / "one",
        """
        told["repo"] = api.create_repo("alice/m", private=True).repo_id
        api.create_branch("alice/m", branch="runs/a")
        told["commit"] = push(FILES | {"large.txt": bytes(10_000_001)}, revision="runs/a")
        files = api.list_repo_tree("alice/m", recursive=True, revision="runs/a", expand=True)
        told["tree"] = {file.path: [file.size, file.lfs and file.lfs.sha256] for file in files if hasattr(file, "lfs")}
        api.create_tag("alice/m", tag="v1", revision="runs/a")
        told["info"] = api.model_info("alice/m", revision="v1", files_metadata=True).siblings[-1].lfs.sha256
        told["private"] = api.model_info("alice/m", expand=["private"]).private
        told["folder"] = [file.path for file in api.list_repo_tree("alice/m", "config", revision="runs/a")]
        told["paths"] = [file.path for file in api.get_paths_info("alice/m", ["config", "none"], revision="v1")]
        told["titles"] = [commit.title for commit in api.list_repo_commits("alice/m", revision="runs/a")]
        """,
    )
    weights = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert pushed["repo"] == "alice/m" and pushed["private"]
    assert pushed["tree"].pop(".gitattributes")[1] is None
    assert pushed["tree"].pop("large.txt") == [10_000_001, hashlib.sha256(bytes(10_000_001)).hexdigest()]
    assert pushed["tree"] == {
        "README.md": [len(FILES["README.md"]), None],
        "config/a.json": [2, None],
        "model.safetensors": [99999, weights],
    }
    assert pushed["info"] == weights and pushed["folder"] == ["config/a.json"] and pushed["paths"] == ["config"]
    assert pushed["titles"] == ["a model", "initial commit"]
    for revision in ("runs/a", "v1", pushed["commit"]):
        fetched = client(
            hub, tmp_path / "two" / revision, f'told["to"] = snapshot_download("alice/m", revision="{revision}")'
        )
        assert Path(fetched["to"]).name == pushed["commit"]
        assert {path: (Path(fetched["to"]) / path).read_bytes() for path in FILES} == FILES


@pytest.mark.slow
def test_what_is_there_is_neither_committed_nor_uploaded_again(filled, tmp_path):
    told = client(
        filled,
        tmp_path,
        """
        told["commits"] = [push(FILES), push(FILES), push({"copy.bin": FILES["model.safetensors"]})]
        """,
    )
    first, second, third = told["commits"]
    assert first == second != third
    assert sum(request.startswith("PUT ") for request in filled.requests) == 1
    assert filled.requests.count("POST /api/models/alice/m/commit/main") == 2


@pytest.mark.slow
def test_names_that_are_taken_and_commits_that_do_not_fit_are_refused(filled, tmp_path):
    told = client(
        filled,
        tmp_path,
        """
        told["repo"] = raised(api.create_repo, "alice/m")
        told["repo exist_ok"] = api.create_repo("alice/m", exist_ok=True).repo_id
        told["branch"] = raised(api.create_branch, "alice/m", branch="main")
        api.create_tag("alice/m", tag="v1")
        told["tag"] = raised(api.create_tag, "alice/m", tag="v1")
        old = push({"a.txt": b"a"})
        told["no branch"] = raised(push, {"b.txt": b"b"}, revision="none")
        told["old parent"] = raised(push, {"b.txt": b"b"}, parent_commit="0" * 40)
        told["delete"] = raised(
            api.create_commit, "alice/m", [CommitOperationDelete("no.txt")], commit_message="less"
        )
        api.create_commit("alice/m", [CommitOperationDelete("a.txt")], commit_message="less", parent_commit=old)
        told["files"] = api.list_repo_files("alice/m")
        api.create_branch("alice/m", branch="b", revision=old)
        api.delete_branch("alice/m", branch="b")
        told["refs"] = [ref.name for ref in api.list_repo_refs("alice/m").branches]
        lines = [{"key": "header", "value": {"summary": "x"}}]
        lines.append({"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}})
        commit = lambda branch: get_session().post(
            f"{api.endpoint}/api/models/alice/m/commit/{branch}",
            content="".join(json.dumps(line) + "\\n" for line in lines),
            headers={"Authorization": f"Bearer {os.environ['HF_TOKEN']}"},
        )
        told["not uploaded"] = commit("main").status_code
        told["not there"] = commit("none").headers["X-Error-Code"]
        """,
    )
    assert told == {
        "repo": ["HfHubHTTPError", 409],
        "repo exist_ok": "alice/m",
        "branch": ["HfHubHTTPError", 409],
        "tag": ["HfHubHTTPError", 409],
        "no branch": ["RevisionNotFoundError", 404],
        "old parent": ["HfHubHTTPError", 412],
        "delete": ["RemoteEntryNotFoundError", 404],
        "files": [".gitattributes"],
        "refs": ["main"],
        "not uploaded": 400,
        "not there": "RevisionNotFound",
    }


@pytest.mark.parametrize(
    ("token", "read", "write", "create"),
    [
        (None, ["RepositoryNotFoundError", 401], ["RepositoryNotFoundError", 401], ["HfHubHTTPError", 401]),
        ("hf_unknown", ["HfHubHTTPError", 401], ["HfHubHTTPError", 401], ["HfHubHTTPError", 401]),
        (READ, None, ["HfHubHTTPError", 403], ["HfHubHTTPError", 403]),
        (OTHER, ["RepositoryNotFoundError", 404], ["HfHubHTTPError", 403], ["HfHubHTTPError", 403]),
        (WRITE, None, None, None),
    ],
)
@pytest.mark.slow
def test_only_the_owner_s_tokens_read_and_only_a_write_token_writes(filled, tmp_path, token, read, write, create):
    told = client(
        filled,
        tmp_path,
        """
        told["read"] = raised(snapshot_download, "alice/m")
        told["write"] = raised(push, FILES)
        told["create"] = raised(api.create_repo, "alice/n")
        """,
        token,
    )
    assert told == {"read": read, "write": write, "create": create}
    assert (len(filled.repos["alice/m"].commits) == 2) == (write is None)


@pytest.mark.slow
def test_whoami_tells_the_user_and_what_the_token_may_do(hub, tmp_path):
    steps = 'told |= api.whoami() if raised(api.whoami) is None else {"error": raised(api.whoami)}'
    told = client(hub, tmp_path, steps, READ)
    assert told["name"] == "alice" and told["auth"]["accessToken"]["role"] == "read"
    assert client(hub, tmp_path, steps, "hf_unknown") == {"error": ["HfHubHTTPError", 401]}


@pytest.mark.slow
def test_a_range_of_a_file_is_that_range(filled, tmp_path):
    told = client(
        filled,
        tmp_path,
        """
        push({"a.bin": bytes(range(100)), "b.txt": b"0123456789"})
        def part(path, wanted):
            headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}", "Range": f"bytes={wanted}"}
            answer = get_session().get(hf_hub_url("alice/m", path), headers=headers)
            return [answer.status_code, answer.headers["Content-Range"], answer.content.hex()]
        told["parts"] = [part("a.bin", "10-12"), part("b.txt", "8-"), part("b.txt", "-1"), part("b.txt", "10-")]
        told["none"] = raised(api.hf_hub_download, "alice/m", "none.txt")
        """,
    )
    assert told["parts"] == [
        [206, "bytes 10-12/100", "0a0b0c"],
        [206, "bytes 8-9/10", b"89".hex()],
        [206, "bytes 9-9/10", b"9".hex()],
        [416, "bytes */10", ""],
    ]
    assert told["none"] == ["RemoteEntryNotFoundError", 404]


def test_a_model_card_is_checked_as_the_hub_does(filled, tmp_path):
    told = client(
        filled,
        tmp_path,
        f"""
        cards = [{CARD!r}.format("odc-by"), {CARD!r}.format("mine"), "---\\na: [\\n---\\n"]
        cards.append("---\\nmodel-index:\\n- results: 1\\n---\\n")
        for name, card in zip(("good", "license", "yaml", "index"), cards):
            told[name] = raised(push, {{"README.md": card.encode()}})
        told["none"] = raised(push, {{"README.md": b"only text"}})
        """,
    )
    wrong = ["ValueError", None]
    assert told == {"good": None, "license": wrong, "yaml": wrong, "index": wrong, "none": None}


@pytest.mark.slow
def test_a_status_is_answered_as_often_as_wanted_and_after_the_wait_that_it_asks_for(filled, tmp_path):
    filled.fault("status", "POST .*/branch/", times=1, code=500)
    filled.fault("status", "POST .*/preupload/", times=1, code=429, retry_after=1)
    filled.fault("status", "validate-yaml", code=503)
    told = client(
        filled,
        tmp_path,
        """
        told["branch"] = [raised(api.create_branch, "alice/m", branch="a") for _ in range(2)]
        start = time.monotonic()
        push({"a.txt": b"a"})
        told["seconds"] = time.monotonic() - start
        told["page"] = raised(push, FILES)
        """,
    )
    assert told["branch"] == [["HfHubHTTPError", 500], None]
    assert 2 <= told["seconds"] < 4  # the client adds a second
    assert told["page"] == ["JSONDecodeError", None]  # it expects JSON even of a gateway
    assert filled.requests.count("POST /api/models/alice/m/preupload/main") == 2


@pytest.mark.slow
def test_a_dropped_request_has_no_effect_and_a_lost_answer_has_all(filled, tmp_path):
    repo = filled.repos["alice/m"]
    filled.fault("drop", "/commit/main")
    filled.fault("lose", "/commit/b")
    repo.branches["b"] = repo.branches["main"]
    told = client(
        filled,
        tmp_path,
        """
        told["main"] = raised(push, FILES)
        told["b"] = raised(push, FILES, revision="b")
        """,
    )
    assert told == {"main": ["RemoteProtocolError", None], "b": ["RemoteProtocolError", None]}
    assert list(repo.at("main").files) == [".gitattributes"] and set(FILES) < set(repo.at("b").files)


@pytest.mark.slow
def test_a_held_request_is_answered_when_the_hub_is_healed(filled, tmp_path):
    filled.fault("hang", "whoami")
    filled.fault("hang", "/refs", seconds=0.3)

    def heal() -> None:
        while not any("whoami" in request for request in filled.requests):
            time.sleep(0.01)
        time.sleep(0.3)
        filled.heal()

    threading.Thread(target=heal, daemon=True).start()
    told = client(
        filled,
        tmp_path,
        """
        def seconds(call, *arguments):
            start = time.monotonic()
            call(*arguments)
            return time.monotonic() - start
        told["refs"], told["whoami"] = seconds(api.list_repo_refs, "alice/m"), seconds(api.whoami)
        """,
    )
    assert 0.3 <= told["refs"] < 3 and 0.3 <= told["whoami"] < 3


@pytest.mark.slow
def test_wrong_bytes_show_in_the_listing_or_in_the_download(filled, tmp_path):
    filled.fault("bytes", "PUT", times=1)
    filled.fault("bytes", "/commit/", times=1, file="config/a.json")
    filled.fault("bytes", "GET .*/resolve/.*/README.md")
    told = client(
        filled,
        tmp_path,
        """
        def listed():
            files = api.get_paths_info("alice/m", list(FILES))
            return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}
        push(FILES)
        told["damaged"] = listed()
        push(FILES)
        told["repaired"] = listed()
        told["to"] = snapshot_download("alice/m")
        """,
    )
    damaged, repaired = told["damaged"], told["repaired"]
    assert repaired["model.safetensors"] == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert {path for path in repaired if damaged[path] != repaired[path]} == {
        "config/a.json",
        "model.safetensors",
    }
    fetched = {path: (Path(told["to"]) / path).read_bytes() for path in FILES}
    assert {path for path in FILES if fetched[path] != FILES[path]} == {"README.md"}
    assert sum((a ^ b).bit_count() for a, b in zip(fetched["README.md"], FILES["README.md"], strict=True)) == 1


@pytest.mark.slow
def test_a_forgotten_file_is_missing_from_a_commit_that_was_reported_as_made(filled, tmp_path):
    filled.fault("forget", times=1, file="model.safetensors")
    told = client(
        filled,
        tmp_path,
        """
        told["commit"], told["files"] = push(FILES), api.list_repo_files("alice/m")
        push(FILES)
        told["then"] = api.list_repo_files("alice/m")
        """,
    )
    assert told["commit"] in filled.repos["alice/m"].commits
    assert set(told["then"]) - set(told["files"]) == {"model.safetensors"}


def test_a_request_that_was_cut_off_has_no_effect(hub):
    with socket.create_connection(hub.server.server_address) as connection:
        body = json.dumps({"name": "m"}).encode()
        header = f"POST /api/repos/create HTTP/1.1\r\nAuthorization: Bearer {WRITE}\r\nContent-Length: {len(body) + 1}"
        connection.sendall(header.encode() + b"\r\n\r\n" + body)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert hub.repos == {} and hub.requests == []


def test_a_fault_that_does_not_exist_is_refused_by_name(hub):
    with pytest.raises(ValueError, match="'dorp'"):
        hub.fault("dorp")


@pytest.mark.slow
def test_by_hand_it_says_how_to_reach_it(root, hub, tmp_path):
    command = [sys.executable, str(root / "tests" / "hub_server.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            hub.url = server.stdout.readline().split('"')[1]
            assert client(hub, tmp_path, 'told["name"] = api.whoami()["name"]') == {"name": "alice"}
        finally:
            server.terminate()
