"""A Hugging Face Hub on the loopback interface, in memory and with faults: what pushing and fetching a model asks for.

The formats are those that huggingface_hub 2.4 reads (https://huggingface.co/docs/hub/api) and, for large files,
https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md. Model repositories only; no Xet, no ranges of files, and
of a card's metadata nothing but YAML and license are checked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITE, READ, OTHER = "hf_alice_write", "hf_alice_read", "hf_bob_write"
TOKENS = {WRITE: ("alice", "write"), READ: ("alice", "read"), OTHER: ("bob", "write")}
LARGE_NAMES = (".png", ".safetensors")
GIT_ATTRIBUTES = "".join(f"*{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE_NAMES).encode()
LICENSES = ("apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "mit", "odc-by", "other")
KINDS = ("status", "drop", "lose", "hang", "bytes", "forget")
# These two can do something only here, so one of `times=1` waits for such a request.
PLACES = {"bytes": "^PUT |^POST .*/commit/|^GET .*/resolve/", "forget": "^POST .*/commit/"}


@dataclass
class Answer:
    """What goes back: bytes as they are, anything else as JSON."""

    content: object
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that is an error, with the Hub's X-Error-Code where it gives one."""

    def __init__(self, status: int, message: str, code: str = "", **content: str) -> None:
        headers = {"X-Error-Message": message.encode("unicode_escape").decode()}
        self.answer = Answer({"error": message} | content, status, headers | ({"X-Error-Code": code} if code else {}))


@dataclass
class Fault:
    """What goes wrong in the next `times` requests whose "METHOD path" has a `match` (None: in all until `Hub.heal`).

    "status" answers with `code`; 502, 503 and 504 with a page of HTML, as what stands before the real Hub does. "drop"
    closes the connection instead of doing anything; "lose" does what was asked and then closes it without an answer.
    "hang" holds the request until `Hub.heal`, and then does it, whether or not the client still waits. "bytes" flips a
    bit: of the LFS object that comes in, of a file of a commit, or of the file that goes out. "forget" reports a commit
    as made that lacks one of its files. Of a commit, `file` is meant, or else the last file.
    """

    kind: str
    match: str = ""
    times: int | None = None
    code: int = 503
    file: str | None = None
    healed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no fault is called {self.kind!r}; there are {', '.join(KINDS)}")

    def strikes(self, request: str) -> bool:
        """Whether the fault has times left, and the request is one for it."""
        place = PLACES.get(self.kind, "")
        return self.times != 0 and bool(re.search(place, request) and re.search(self.match, request))


@dataclass
class Call:
    """A request, read to its end."""

    method: str
    path: str  # as sent, so that a slash within a revision is still %2F
    headers: dict[str, str]  # by names in lower case
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
    def pointer(self) -> bytes:
        """What git itself keeps of an LFS file (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        """Git's SHA-1 of the file, of the pointer where it is an LFS file."""
        raw = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()

    @property
    def etag(self) -> str:
        """The id by which clients tell whether they have the file."""
        return self.sha256 if self.lfs else self.blob_id


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

    def __init__(self, id: str, private: bool) -> None:
        self.id, self.owner, self.private = id, id.split("/")[0], private
        first = Commit({".gitattributes": File(GIT_ATTRIBUTES)}, None)
        self.commits: dict[str, Commit] = {first.id: first}
        self.branches: dict[str, str] = {"main": first.id}
        self.tags: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}  # by the SHA-256 under which each was uploaded

    def at(self, revision: str) -> Commit:
        """The commit of a branch, of a tag, or of at least seven digits of an id."""
        wanted = self.branches.get(revision) or self.tags.get(revision) or revision
        for id, commit in self.commits.items():
            if len(wanted) >= 7 and id.startswith(wanted):
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def holds(self, oid: str, size: int) -> bool:
        """Whether an LFS object is there; one that was stored wrong is not, so that it can be uploaded again."""
        content = self.objects.get(oid)
        return content is not None and len(content) == size and File(content).sha256 == oid


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
                if fault.strikes(request):
                    fault.times = fault.times and fault.times - 1
                    return fault
        return None

    def answer(self, call: Call) -> Answer:
        """Do what was asked; one request at a time."""
        try:
            with self.lock:
                for method, pattern, writes, function in ROUTES:
                    found = pattern.fullmatch(call.path) if method == call.method else None
                    if found:
                        parts = {name: unquote(part) for name, part in found.groupdict().items() if part}
                        repo = [self.repo(call, parts.pop("id"), writes)] if "id" in parts else []
                        return function(self, call, *repo, **parts)
            raise Refusal(404, f"this Hub does not know {call.method} {call.path}")
        except Refusal as refusal:
            return refusal.answer

    def caller(self, call: Call) -> tuple[str, str] | None:
        """The user and the role of the token; None where there is none."""
        token = call.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def writer(self, call: Call, namespace: str | None = None) -> str:
        """The user, who must be allowed to write to the namespace (None: the user's own)."""
        caller = self.caller(call)
        if caller is None:
            raise Refusal(401, "Invalid username or password.")
        if caller[1] != "write":
            raise Refusal(403, "Forbidden: you must use a write token to do this.")
        if namespace not in (None, caller[0]):
            raise Refusal(403, f'You don\'t have the rights to write to the namespace "{namespace}"')
        return caller[0]

    def repo(self, call: Call, id: str, writes: bool) -> Repo:
        """The repository, if the caller may read it, or write to it."""
        repo, caller = self.repos.get(id), self.caller(call)
        hidden = repo is None or (repo.private and (caller is None or caller[0] != repo.owner))
        if caller is None and (hidden or writes):  # whether it is there is nobody's business
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if writes:
            self.writer(call, id.split("/")[0])
        if repo is None or hidden:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo


ROUTES: list[tuple[str, re.Pattern[str], bool, Callable[..., Answer]]] = []


def route(method: str, path: str, *, writes: bool = False) -> Callable:
    """Makes a function the answer to a path; `{id}` in it is a repository, which the function gets."""
    forms = {"id": "[^/]+/[^/]+?", "path": ".+"}
    pattern = re.compile(re.sub(r"\{(\w+)}", lambda part: f"(?P<{part[1]}>{forms.get(part[1], '[^/]+')})", path))

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, pattern, writes, function))
        return function

    return register


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, call: Call) -> Answer:
    """Who holds the token."""
    user, role = hub.caller(call) or (None, None)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    return Answer({"name": user, "orgs": [], "auth": {"type": "access_token", "accessToken": {"role": role}}})


@route("POST", "/api/repos/create")
def create_repo(hub: Hub, call: Call) -> Answer:
    """A new model repository, the user's own where no namespace is named."""
    asked = call.json()
    id = f"{hub.writer(call, asked.get('organization'))}/{asked['name']}"
    if id in hub.repos:
        raise Refusal(409, f"You already created this model repo: {id}", url=f"{hub.url}/{id}")
    hub.repos[id] = Repo(id, asked.get("visibility") == "private")
    return Answer({"url": f"{hub.url}/{id}", "name": id, "id": id})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, call: Call) -> Answer:
    """What is wrong with the metadata of a model card."""
    errors = card_problems(call.json()["content"])
    return Answer({"warnings": [], "errors": [{"message": text} for text in errors]}, 400 if errors else 200)


@route("GET", "/api/models/{id}(?:/revision/{rev})?")
def model_info(hub: Hub, call: Call, repo: Repo, rev: str = "main") -> Answer:
    """The facts of a revision, with sizes and ids of its files."""
    commit, siblings = repo.at(rev), []
    for path, file in sorted(commit.files.items()):
        lfs = {"lfs": {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}}
        facts = {"rfilename": path, "size": len(file.content), "blobId": file.blob_id}
        siblings.append(facts | (lfs if file.lfs else {}))
    return Answer({"id": repo.id, "sha": commit.id, "private": repo.private, "tags": [], "siblings": siblings})


@route("GET", "/api/models/{id}/tree/{rev}")
def list_tree(hub: Hub, call: Call, repo: Repo, rev: str) -> Answer:
    """All files of a revision, in one page."""
    files = sorted(repo.at(rev).files.items())
    return Answer([{"type": "file", "path": p, "oid": f.blob_id, "size": len(f.content)} for p, f in files])


@route("POST", "/api/models/{id}/branch/{name}", writes=True)
def create_branch(hub: Hub, call: Call, repo: Repo, name: str) -> Answer:
    """A new branch."""
    if name in repo.branches:
        raise Refusal(409, f"Reference already exists: refs/heads/{name}")
    repo.branches[name] = repo.at(call.json().get("startingPoint", "main")).id
    return Answer({"success": True})


@route("DELETE", "/api/models/{id}/tag/{name}", writes=True)
def delete_tag(hub: Hub, call: Call, repo: Repo, name: str) -> Answer:
    """A tag goes; its commit stays."""
    if name not in repo.tags:
        raise Refusal(404, "Reference does not exist", "RevisionNotFound")
    del repo.tags[name]
    return Answer({"success": True})


@route("POST", "/api/models/{id}/tag/{rev}", writes=True)
def create_tag(hub: Hub, call: Call, repo: Repo, rev: str) -> Answer:
    """A new tag on a revision."""
    tag = call.json()["tag"]
    if tag in repo.tags:
        raise Refusal(409, f"Reference already exists: refs/tags/{tag}")
    repo.tags[tag] = repo.at(rev).id
    return Answer({"success": True})


@route("POST", "/api/models/{id}/preupload/{rev}", writes=True)
def preupload(hub: Hub, call: Call, repo: Repo, rev: str) -> Answer:
    """How each file is to be sent, and the id of the file that is there, by which clients leave out what is same."""
    commit, files = repo.at(rev), []
    for asked in call.json()["files"]:
        path, there = asked["path"], commit.files.get(asked["path"])
        mode = "lfs" if path.endswith(LARGE_NAMES) else "regular"
        known = {"oid": there.etag} if there else {}
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
    return Answer({"files": files, "commitOid": commit.id})


@route("POST", r"/{id}\.git/info/lfs/objects/batch", writes=True)
def lfs_batch(hub: Hub, call: Call, repo: Repo) -> Answer:
    """Where to upload LFS objects; no action for those that are there."""
    objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in call.json()["objects"]]
    for wanted in objects:
        if not repo.holds(**wanted):
            wanted["actions"] = {"upload": {"href": f"{hub.url}/lfs/{repo.id}/{wanted['oid']}"}}
    return Answer({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})


@route("PUT", "/lfs/{owner}/{name}/{oid}")
def lfs_upload(hub: Hub, call: Call, owner: str, name: str, oid: str) -> Answer:
    """The bytes of an LFS object, which come without a token."""
    if File(call.body).sha256 != oid:
        raise Refusal(400, "The content does not have the SHA-256 that was announced")
    hub.repos[f"{owner}/{name}"].objects[oid] = flipped(call.body) if call.meets("bytes") else call.body
    return Answer(b"", headers={"ETag": f'"{oid}"'})


@route("POST", "/api/models/{id}/commit/{rev}", writes=True)
def create_commit(hub: Hub, call: Call, repo: Repo, rev: str) -> Answer:
    """A new commit on a branch: one line of JSON is its header, each of the others a file to add or delete."""
    if rev not in repo.branches:
        raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
    head, lines = repo.at(rev), [json.loads(line) for line in call.body.splitlines()]
    files = dict(head.files)
    for line in lines:
        apply(repo, files, line["key"], line["value"])
    added = [line["value"]["path"] for line in lines if line["key"] in ("file", "lfsFile")]
    spoilt = (call.fault and call.fault.file) or (added or [""])[-1]
    if spoilt in added and call.meets("bytes"):
        files[spoilt] = File(flipped(files[spoilt].content), files[spoilt].lfs)
    if spoilt in added and call.meets("forget"):
        del files[spoilt]
        files |= {path: file for path, file in head.files.items() if path == spoilt}
    commit = Commit(files, head)
    repo.commits[commit.id] = commit
    repo.branches[rev] = commit.id
    url = f"{hub.url}/{repo.id}/commit/{commit.id}"
    return Answer({"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""})


def apply(repo: Repo, files: dict[str, File], key: str, value: dict) -> None:
    """Add or delete what a line of a commit says."""
    if key == "file":
        files[value["path"]] = File(base64.b64decode(value["content"]))
    if key == "lfsFile":
        if value["oid"] not in repo.objects:
            raise Refusal(400, f"Your push was rejected because the LFS object {value['oid']} was not uploaded")
        files[value["path"]] = File(repo.objects[value["oid"]], lfs=True)
    if key == "deletedFile" and files.pop(value["path"], None) is None:
        raise Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")


@route("GET", "/{id}/resolve/{rev}/{path}")
def resolve(hub: Hub, call: Call, repo: Repo, rev: str, path: str) -> Answer:
    """A file."""
    commit = repo.at(rev)
    headers = {"X-Repo-Commit": commit.id, "Content-Type": "application/octet-stream"}
    file = commit.files.get(path)
    if file is None:
        missing = Refusal(404, f"Entry not found: {path}", "EntryNotFound")
        missing.answer.headers |= {"X-Repo-Commit": commit.id}
        raise missing
    content, size = flipped(file.content) if call.meets("bytes") else file.content, len(file.content)
    headers |= {"ETag": f'"{file.etag}"'}
    headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{file.etag}"'} if file.lfs else {}
    return Answer(content, headers=headers)


def card_problems(card: str) -> list[str]:
    """Errors of the YAML block at the top of a model card."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"]
    right = isinstance(metadata, dict) and metadata.get("license", "other") in LICENSES
    return [] if right else [f'"license" must be one of {", ".join(LICENSES)}']


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
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = self.hub.met(f"{self.command} {unquote(url.path)}")
        method = "GET" if self.command == "HEAD" else self.command
        call = Call(method, url.path, headers, body, fault)
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
