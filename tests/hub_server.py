"""A Hugging Face Hub on the loopback interface, in memory and with faults: what pushing and fetching a model asks for.

The formats are those that huggingface_hub 2.4 reads (https://huggingface.co/docs/hub/api) and, for large files,
https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md. Model repositories only, which their owner alone reads;
no Xet, no ranges of files, and whatever a card says is taken.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WRITE, READ, OTHER = "hf_alice_write", "hf_alice_read", "hf_bob_write"
TOKENS = {WRITE: ("alice", "write"), READ: ("alice", "read"), OTHER: ("bob", "write")}
LARGE_NAMES = (".png", ".safetensors")
GIT_ATTRIBUTES = "".join(f"*{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE_NAMES).encode()


@dataclass
class Answer:
    """What goes back: bytes as they are, anything else as JSON."""

    content: object
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that is an error, with the Hub's X-Error-Code where it gives one."""

    def __init__(self, status: int, message: str, code: str = "", **content: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message} | content, status, headers)


@dataclass
class Fault:
    """What goes wrong in the next `times` requests whose "METHOD path" has a `match` (None: in all until `Hub.heal`).

    "status" answers with `code`; 502, 503 and 504 with a page of HTML, as what stands before the real Hub does. "drop"
    closes the connection instead of doing anything; "lose" does what was asked and then closes it without an answer.
    "hang" holds the request until `Hub.heal`, and then does it, whether or not the client still waits. "bytes" flips a
    bit: of the LFS object that comes in, of the file of a commit, or of the file that goes out. "forget" reports a
    commit as made that lacks its `file`.
    """

    kind: str
    match: str = ""
    times: int | None = None
    code: int = 503
    file: str = ""
    healed: threading.Event = field(default_factory=threading.Event)


@dataclass
class Call:
    """A request, read to its end."""

    method: str
    path: str  # as sent, so that a slash within a revision is still %2F
    token: str
    body: bytes
    fault: Fault | None

    def json(self) -> dict:
        """The body as JSON."""
        return json.loads(self.body)

    def meets(self, kind: str) -> bool:
        """Whether the request meets a fault of this kind."""
        return self.fault is not None and self.fault.kind == kind


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the content, which is an LFS file's id."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        """Git's SHA-1 of the file, which of an LFS file keeps a pointer alone (git-lfs/docs/spec.md)."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        raw = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()

    @property
    def etag(self) -> str:
        """The id by which clients tell whether they have the file."""
        return self.sha256 if self.lfs else self.blob_id

    def facts(self, path: str) -> dict[str, Any]:
        """What the listings tell of the file, under the names of both of them."""
        size = len(self.content)
        lfs = {"lfs": {"sha256": self.sha256, "oid": self.sha256, "size": size, "pointerSize": 130}}
        names = {"rfilename": path, "path": path, "type": "file", "blobId": self.blob_id, "oid": self.blob_id}
        return names | {"size": size} | (lfs if self.lfs else {})


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    files: dict[str, File]
    parent: Commit | None

    @cached_property
    def id(self) -> str:
        """40 hexadecimal digits that depend on the files and on the history, as git's do."""
        files = sorted((path, file.blob_id) for path, file in self.files.items())
        return hashlib.sha1(json.dumps([files, self.parent and self.parent.id]).encode()).hexdigest()


class Repo:
    """A model repository: commits by id, branches and tags by name, and the LFS objects that were uploaded to it."""

    def __init__(self, endpoint: str, id: str, private: bool) -> None:
        self.endpoint, self.id, self.private = endpoint, id, private
        first = Commit({".gitattributes": File(GIT_ATTRIBUTES)}, None)
        self.commits: dict[str, Commit] = {first.id: first}
        self.branches: dict[str, str] = {"main": first.id}
        self.tags: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}  # by the SHA-256 under which each was uploaded

    def at(self, revision: str) -> Commit:
        """The commit of a branch, of a tag, or of an id."""
        commit = self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def refer(self, names: dict[str, str], name: str, revision: str) -> Answer:
        """A new branch or tag on a revision."""
        if name in names:
            raise Refusal(409, f"Reference already exists: {name}")
        names[name] = self.at(revision).id
        return Answer({"success": True})

    def delete_tag(self, name: str) -> Answer:
        """A tag goes; its commit stays."""
        if self.tags.pop(name, None) is None:
            raise Refusal(404, "Reference does not exist", "RevisionNotFound")
        return Answer({"success": True})

    def info(self, revision: str) -> Answer:
        """The facts of a revision and of its files."""
        commit = self.at(revision)
        siblings = [file.facts(path) for path, file in sorted(commit.files.items())]
        return Answer({"id": self.id, "sha": commit.id, "private": self.private, "tags": [], "siblings": siblings})

    def tree(self, revision: str) -> Answer:
        """All files of a revision, in one page."""
        return Answer([file.facts(path) for path, file in sorted(self.at(revision).files.items())])

    def preupload(self, revision: str, asked: list[dict]) -> Answer:
        """How each file is to be sent, and the id of what is there, by which clients leave out what is the same."""
        commit, files = self.at(revision), []
        for path in (each["path"] for each in asked):
            mode = "lfs" if path.endswith(LARGE_NAMES) else "regular"
            known = {"oid": commit.files[path].etag} if path in commit.files else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
        return Answer({"files": files, "commitOid": commit.id})

    def batch(self, asked: list[dict]) -> Answer:
        """Where to upload LFS objects; no action for those that are there, and right."""
        objects = [{"oid": each["oid"], "size": each["size"]} for each in asked]
        for wanted in objects:
            there = self.objects.get(wanted["oid"])
            if there is None or File(there).sha256 != wanted["oid"]:
                wanted["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{self.id}/{wanted['oid']}"}}
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        return Answer({"transfer": "basic", "objects": objects}, headers=headers)

    def upload(self, call: Call, oid: str) -> Answer:
        """The bytes of an LFS object, which come without a token."""
        if File(call.body).sha256 != oid:
            raise Refusal(400, "The content does not have the SHA-256 that was announced")
        self.objects[oid] = flipped(call.body) if call.meets("bytes") else call.body
        return Answer(b"", headers={"ETag": f'"{oid}"'})

    def commit(self, call: Call, branch: str) -> Answer:
        """A new commit on a branch: one line of JSON is its header, each of the others a file to add or delete."""
        if branch not in self.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = self.at(branch)
        files = dict(head.files)
        for line in map(json.loads, call.body.splitlines()):
            self.apply(files, line["key"], line["value"])
        if call.fault and call.fault.file:
            spoilt = files.pop(call.fault.file)
            if call.meets("bytes"):
                files[call.fault.file] = File(flipped(spoilt.content), spoilt.lfs)
        commit = Commit(files, head)
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        url = f"{self.endpoint}/{self.id}/commit/{commit.id}"
        return Answer({"success": True, "commitOid": commit.id, "commitUrl": url})

    def apply(self, files: dict[str, File], key: str, value: dict) -> None:
        """Add or delete what a line of a commit says."""
        if key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]))
        if key == "lfsFile":
            if value["oid"] not in self.objects:
                raise Refusal(400, f"Your push was rejected because the LFS object {value['oid']} was not uploaded")
            files[value["path"]] = File(self.objects[value["oid"]], lfs=True)
        if key == "deletedFile" and files.pop(value["path"], None) is None:
            raise Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")

    def resolve(self, call: Call, revision: str, path: str) -> Answer:
        """A file."""
        commit = self.at(revision)
        if path not in commit.files:
            raise Refusal(404, f"Entry not found: {path}", "EntryNotFound")
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.id, "Content-Type": "application/octet-stream", "ETag": f'"{file.etag}"'}
        return Answer(flipped(file.content) if call.meets("bytes") else file.content, headers=headers)


class Hub:
    """A Hub that answers from `with` to its end."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []  # "METHOD path" of each in order, unquoted and without the query
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.open = True
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfThisHub", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.open = False
        self.heal()
        self.server.shutdown()
        self.server.server_close()

    def settings(self, token: str | None, home: str | Path) -> dict[str, str]:
        """The environment variables that lead huggingface_hub here."""
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        place = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        return place | switches | ({"HF_TOKEN": token} if token else {})

    def environment(self, *, token: str | None = WRITE, home: str | Path) -> dict[str, str]:
        """The whole environment of a client's process: this one's, but for the Hub settings in it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return kept | self.settings(token, home)

    def fault(self, kind: str, match: str = "", times: int | None = None, **how: Any) -> None:
        """From now on, let requests fail as `Fault` says; one meets the first fault that is for it, and no other."""
        with self.lock:
            self.faults.append(Fault(kind, match, times, **how))

    def heal(self) -> None:
        """End every fault, and let go of the requests that are held."""
        with self.lock:
            for fault in self.faults:
                fault.healed.set()
            self.faults.clear()

    def met(self, request: str) -> Fault | None:
        """Note a request, and use up the fault that it meets."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times != 0 and re.search(fault.match, request):
                    fault.times = fault.times and fault.times - 1
                    return fault
        return None

    def answer(self, call: Call) -> Answer:
        """Do what was asked; one request at a time."""
        try:
            with self.lock:
                return self.act(call)
        except Refusal as refusal:
            return refusal.answer

    def act(self, call: Call) -> Answer:
        """What a request asks for, by its method and the parts of its path."""
        match [call.method, *map(unquote, call.path.strip("/").split("/"))]:
            case ["POST", "api", "repos", "create"]:
                return self.create_repo(call)
            case ["POST", "api", "validate-yaml"]:
                return Answer({"warnings": [], "errors": []})
            case ["PUT", "lfs", owner, name, oid]:
                return self.repos[f"{owner}/{name}"].upload(call, oid)
            case ["POST", owner, name, "info", "lfs", "objects", "batch"]:
                return self.repo(call, f"{owner}/{name.removesuffix('.git')}").batch(call.json()["objects"])
            case ["GET", owner, name, "resolve", revision, *path]:
                return self.repo(call, f"{owner}/{name}").resolve(call, revision, "/".join(path))
            case [_, "api", "models", owner, name, *what]:
                return self.act_on(self.repo(call, f"{owner}/{name}"), call, what)
        raise Refusal(404, f"this Hub does not know {call.method} {call.path}")

    def act_on(self, repo: Repo, call: Call, what: list[str]) -> Answer:
        """What a request asks for of a repository."""
        match [call.method, *what]:
            case ["GET"]:
                return repo.info("main")
            case ["GET", "revision", revision]:
                return repo.info(revision)
            case ["GET", "tree", revision]:
                return repo.tree(revision)
            case ["POST", "branch", name]:
                return repo.refer(repo.branches, name, call.json().get("startingPoint", "main"))
            case ["POST", "tag", revision]:
                return repo.refer(repo.tags, call.json()["tag"], revision)
            case ["DELETE", "tag", name]:
                return repo.delete_tag(name)
            case ["POST", "preupload", revision]:
                return repo.preupload(revision, call.json()["files"])
            case ["POST", "commit", branch]:
                return repo.commit(call, branch)
        raise Refusal(404, f"this Hub does not know {call.method} {call.path}")

    def create_repo(self, call: Call) -> Answer:
        """A new model repository, the user's own where no namespace is named."""
        asked = call.json()
        id = f"{asked.get('organization') or self.caller(call)[0]}/{asked['name']}"
        self.refuse_writing(call, id)
        if id in self.repos:
            raise Refusal(409, f"You already created this model repo: {id}", url=f"{self.url}/{id}")
        self.repos[id] = Repo(self.url, id, asked.get("visibility") == "private")
        return Answer({"url": f"{self.url}/{id}", "name": id, "id": id})

    def caller(self, call: Call) -> tuple[str, str]:
        """The user and the role of the token."""
        if call.token not in TOKENS:
            raise Refusal(401, "Invalid username or password.")
        return TOKENS[call.token]

    def refuse_writing(self, call: Call, id: str) -> None:
        """Refuse a token that may not write to the repository."""
        user, role = self.caller(call)
        if role != "write":
            raise Refusal(403, "Forbidden: you must use a write token to do this.")
        if user != id.split("/")[0]:
            raise Refusal(403, f'You don\'t have the rights to write to the namespace "{id.split("/")[0]}"')

    def repo(self, call: Call, id: str) -> Repo:
        """The repository, if the caller may read it, or write to it where the request does."""
        if id not in self.repos or self.caller(call)[0] != id.split("/")[0]:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if call.method != "GET":
            self.refuse_writing(call, id)
        return self.repos[id]


def failure(fault: Fault) -> Answer:
    """The answer of a fault of kind "status"."""
    if fault.code in (502, 503, 504):
        return Answer(b"<html>as a test wants it</html>", fault.code, {"Content-Type": "text/html"})
    return Answer({"error": "as a test wants it"}, fault.code)


def flipped(content: bytes) -> bytes:
    """The content with one bit of its middle byte flipped."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 1 for byte in content[middle : middle + 1]) + content[middle + 1 :]


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's acknowledgement of its header

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def handle(self) -> None:
        """Answer until the client is gone, which a killed one may be at any time."""
        with suppress(ConnectionError):
            super().handle()

    def respond(self) -> None:
        """Read a request, let it meet its fault, and answer."""
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length or not self.hub.open:
            raise ConnectionAbortedError("the client went away in the middle of its request, or the Hub has ended")
        path = urlsplit(self.path).path
        fault = self.hub.met(f"{self.command} {unquote(path)}")
        method = "GET" if self.command == "HEAD" else self.command
        call = Call(method, path, self.headers.get("Authorization", "").removeprefix("Bearer "), body, fault)
        if fault and fault.kind == "hang":
            fault.healed.wait()
        if call.meets("drop"):
            raise ConnectionAbortedError("as a test wants it")
        answer = failure(fault) if fault and fault.kind == "status" else self.hub.answer(call)
        if call.meets("lose"):
            raise ConnectionAbortedError("as a test wants it")
        self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond

    def send(self, answer: Answer) -> None:
        """Send the answer, with the length that keeps the connection usable."""
        raw = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
        self.send_response(answer.status)
        length = {"Content-Type": "application/json", "Content-Length": str(len(raw))}
        for name, value in (length | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)
