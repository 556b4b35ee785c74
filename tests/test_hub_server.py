"""The loopback Hub as the real client finds it, in processes of its own: this one is offline."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import OTHER, READ, WRITE, Hub, Repo

FILES = {"README.md": b"---\nlicense: mit\n---\n# A model\n", "config/a.json": b"{}", "model.safetensors": bytes(99999)}
PRELUDE = """
import json
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download

api, told = HfApi(), {}

def push(files, **how):
    adds = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit("alice/m", adds, commit_message="a model", **how).oid

def raised(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
    return None

def listed():
    files = api.model_info("alice/m", files_metadata=True).siblings
    return {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in files}
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub with alice's private and still empty model."""
    with Hub() as hub:
        hub.repos["alice/m"] = Repo("alice/m", private=True)
        yield hub


def client(hub: Hub, home: Path, steps: str, token: str | None = WRITE) -> dict:
    """What a process with the real client tells after these steps."""
    script = f"{PRELUDE}\nFILES = {FILES!r}\n{textwrap.dedent(steps)}\nprint(json.dumps(told))"
    environment = hub.environment(token=token, home=home)
    command = [sys.executable, "-"]
    result = subprocess.run(command, input=script, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_what_was_pushed_comes_back_bit_for_bit_and_is_not_sent_again(hub, tmp_path):
    told = client(
        hub,
        tmp_path,
        """
        told["private"] = api.model_info(api.create_repo("alice/n", private=True).repo_id).private
        api.create_branch("alice/m", branch="runs/a")
        told["commits"] = [push(FILES, revision="runs/a"), push(FILES, revision="runs/a")]
        push({"copy.safetensors": FILES["model.safetensors"]})
        api.create_tag("alice/m", tag="v1", revision="runs/a")
        told["to"] = [snapshot_download("alice/m", revision=revision) for revision in ("runs/a", "v1")]
        """,
    )
    first, second = told["commits"]
    assert told["private"] and first == second
    assert sum(request.startswith("PUT ") for request in hub.requests) == 1
    assert [Path(folder).name for folder in told["to"]] == [first, first]
    assert {path: (Path(told["to"][0]) / path).read_bytes() for path in FILES} == FILES


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
def test_only_the_owner_s_tokens_read_and_only_a_write_token_writes(hub, tmp_path, token, read, write, create):
    told = client(
        hub,
        tmp_path,
        """
        told["read"] = raised(snapshot_download, "alice/m")
        told["write"] = raised(push, FILES)
        told["create"] = raised(api.create_repo, "alice/n")
        """,
        token,
    )
    assert told == {"read": read, "write": write, "create": create}
    assert (len(hub.repos["alice/m"].commits) == 2) == (write is None)


def test_what_does_not_fit_is_refused_as_the_hub_does(hub, tmp_path):
    told = client(
        hub,
        tmp_path,
        """
        told["repo"] = raised(api.create_repo, "alice/m")
        told["branch"] = raised(api.create_branch, "alice/m", branch="main")
        told["no branch"] = raised(push, {"b.txt": b"b"}, revision="none")
        told["license"] = raised(push, {"README.md": b"---\\nlicense: mine\\n---\\n"})
        told["yaml"] = raised(push, {"README.md": b"---\\na: [\\n---\\n"})
        """,
    )
    assert told == {
        "repo": ["HfHubHTTPError", 409],
        "branch": ["HfHubHTTPError", 409],
        "no branch": ["RevisionNotFoundError", 404],
        "license": ["ValueError", None],
        "yaml": ["ValueError", None],
    }


@pytest.mark.slow
def test_a_dropped_request_has_no_effect_and_a_lost_answer_has_all(hub, tmp_path):
    repo = hub.repos["alice/m"]
    repo.branches["b"] = repo.branches["main"]
    hub.fault("drop", "/commit/main")
    hub.fault("lose", "/commit/b")
    hub.fault("status", "whoami", times=1, code=500)
    told = client(
        hub,
        tmp_path,
        """
        told["whoami"] = [raised(api.whoami), raised(api.whoami)]
        told["main"], told["b"] = raised(push, FILES), raised(push, FILES, revision="b")
        """,
    )
    lost = ["RemoteProtocolError", None]
    assert told == {"whoami": [["HfHubHTTPError", 500], None], "main": lost, "b": lost}
    assert list(repo.at("main").files) == [".gitattributes"] and set(FILES) < set(repo.at("b").files)


@pytest.mark.slow
def test_wrong_bytes_and_forgotten_files_show_in_the_listing_or_in_the_download(hub, tmp_path):
    hub.fault("bytes", "PUT", times=1)
    hub.fault("bytes", "/commit/", times=1, file="config/a.json")
    hub.fault("forget", "/commit/", times=1, file="model.safetensors")
    hub.fault("bytes", "GET .*/resolve/.*/README.md")
    told = client(
        hub,
        tmp_path,
        """
        told["listings"] = [(push(FILES), listed())[1] for _ in range(3)]
        told["to"] = snapshot_download("alice/m")
        """,
    )
    first, second, last = told["listings"]
    assert {path for path in last if first[path] != last[path]} == {"config/a.json", "model.safetensors"}
    assert {path for path in last if second[path] != last[path]} == {"model.safetensors"}
    assert {path for path in FILES if (Path(told["to"]) / path).read_bytes() != FILES[path]} == {"README.md"}


def test_a_request_that_was_cut_off_has_no_effect(hub):
    with socket.create_connection(hub.server.server_address) as connection:
        body = json.dumps({"name": "n"}).encode()
        header = f"POST /api/repos/create HTTP/1.1\r\nAuthorization: Bearer {WRITE}\r\nContent-Length: {len(body) + 1}"
        connection.sendall(header.encode() + b"\r\n\r\n" + body)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert list(hub.repos) == ["alice/m"] and hub.requests == []
