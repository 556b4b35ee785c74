"""A Hugging Face Hub on the loopback interface, in memory and with faults: what pushing and fetching a model asks for.

The formats are those that huggingface_hub 2.4 reads (https://huggingface.co/docs/hub/api) and, for large files,
https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md. Model repositories only; no pull requests, no Xet, and
every listing is one page. By hand: `python tests/hub_server.py --port 8000`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE, READ, OTHER = "hf_alice_write", "hf_alice_read", "hf_bob_write"
TOKENS = {WRITE: ("alice", "write"), READ: ("alice", "read"), OTHER: ("bob", "write")}
LARGE_BYTES = 10_000_000  # a larger file is an LFS file whatever its name
LARGE_NAMES = (".bin", ".gz", ".h5", ".jpg", ".npy", ".npz", ".onnx", ".pkl", ".png", ".pt", ".safetensors", ".zip")
GIT_ATTRIBUTES = "".join(f"*{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE_NAMES).encode()
LICENSES = ("apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "mit", "odc-by", "other")
RESULT = {"task": {"type": str}, "dataset": {"name": str, "type": str}, "metrics": [{"type": str, "value": object}]}
MODEL_INDEX = [{"name": str, "results": [RESULT]}]
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

    "status" answers with `code`, and with `retry_after` seconds as Retry-After; 502, 503 and 504 with a page of HTML,
    as what stands before the real Hub does. "drop" closes the connection instead of doing anything; "lose" does what
    was asked and then closes it without an answer. "hang" holds the request for `seconds` or until `Hub.heal`, and
    then does it, whether or not the client still waits. "bytes" flips a bit: of the LFS object that comes in, of a
    file of a commit, or of the file that goes out. "forget" reports a commit as made that lacks one of its files. Of a
    commit, `file` is meant, or else the last file.
    """

    kind: str
    match: str = ""
    times: int | None = None
    code: int = 503
    retry_after: int | None = None
    seconds: float | None = None
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
    query: dict[str, list[str]]
    headers: dict[str, str]  # by names in lower case
    body: bytes
    fault: Fault | None

    def json(self) -> dict:
        """The body as JSON."""
        return json.loads(self.body)

    def asks(self, name: str) -> bool:
        """Whether a switch is set in the query."""
        return self.query.get(name, [""])[0] in ("1", "true")

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

    def lfs_facts(self, id_name: str) -> dict:
        """What a listing tells of an LFS file beside the rest; the listings have two names for the SHA-256."""
        return {"lfs": {id_name: self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}}


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    files: dict[str, File]
    parent: Commit | None
    title: str
    message: str
    author: str
    date: str

    @cached_property
    def id(self) -> str:
        """40 hexadecimal digits that depend on the files and on the history, as git's do."""
        files = sorted((path, file.blob_id) for path, file in self.files.items())
        described = [files, self.parent and self.parent.id, self.title, self.message, self.author, self.date]
        return hashlib.sha1(json.dumps(described).encode()).hexdigest()

    def entry(self, path: str) -> dict | None:
        """What listings tell of a file or a folder; None where there is neither."""
        if file := self.files.get(path):
            facts = {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.content)}
            return facts | (file.lfs_facts("oid") if file.lfs else {})
        inside = sorted((name, file.blob_id) for name, file in self.files.items() if name.startswith(f"{path}/"))
        oid = hashlib.sha1(json.dumps(inside).encode()).hexdigest()
        return {"type": "directory", "path": path, "oid": oid, "size": 0} if inside else None

    def entries(self, paths: list[str], expand: bool) -> list[dict]:
        """What listings tell of those paths that are there; with `expand`, the last commit of each too."""
        found = [entry for path in paths if (entry := self.entry(path))]
        for entry in found if expand else []:
            last = self
            while last.parent and last.parent.entry(entry["path"]) == last.entry(entry["path"]):
                last = last.parent
            entry["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
        return found


class Repo:
    """A model repository: commits by id, branches and tags by name, and the LFS objects that were uploaded to it."""

    def __init__(self, id: str, private: bool) -> None:
        self.id, self.owner, self.private, self.created = id, id.split("/")[0], private, now()
        first = Commit({".gitattributes": File(GIT_ATTRIBUTES)}, None, "initial commit", "", "system", self.created)
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
    """A Hub that answers from `with` to its end; `tokens` gives each token a user and a role, "write" or "read"."""

    def __init__(self, port: int = 0, tokens: dict[str, tuple[str, str]] = TOKENS) -> None:
        self.tokens = dict(tokens)
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []  # "METHOD path" of each in order, unquoted and without the query
        self.faults: list[Fault] = []
        self.tickets: dict[str, Repo] = {}  # to upload with: an object comes without a token
        self.lock = threading.RLock()
        self.open = True
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("HandlerOfThisHub", (Handler,), {"hub": self}))
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
        if token and token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

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
    token = {"displayName": f"{user}-{role}", "role": role, "createdAt": "2026-01-01T00:00:00.000Z"}
    auth = {"type": "access_token", "accessToken": token}
    return Answer({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})


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
    warnings, errors = card_problems(call.json()["content"])
    content = {"warnings": [{"message": text} for text in warnings], "errors": [{"message": text} for text in errors]}
    return Answer(content, 400 if errors else 200)


@route("GET", "/api/models/{id}(?:/revision/{rev})?")
def model_info(hub: Hub, call: Call, repo: Repo, rev: str = "main") -> Answer:
    """The facts of a revision; `expand` picks some of them, `blobs` adds sizes and ids of the files."""
    commit, siblings = repo.at(rev), []
    for path, file in sorted(commit.files.items()):
        blob = {"size": len(file.content), "blobId": file.blob_id} | (file.lfs_facts("sha256") if file.lfs else {})
        siblings.append({"rfilename": path} | (blob if call.asks("blobs") else {}))
    info = {"id": repo.id, "modelId": repo.id, "author": repo.owner, "sha": commit.id, "private": repo.private}
    info |= {"gated": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
    info |= {"createdAt": repo.created, "lastModified": commit.date}
    wanted = call.query.get("expand", list(info))
    return Answer({name: fact for name, fact in info.items() if name in ("id", *wanted)})


@route("GET", "/api/models/{id}/refs")
def list_refs(hub: Hub, call: Call, repo: Repo) -> Answer:
    """The branches and tags."""
    refs: dict[str, list] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for kind, folder, names in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags)):
        refs[kind] = [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": names[name]} for name in names]
    return Answer(refs)


@route("GET", "/api/models/{id}/commits/{rev}")
def list_commits(hub: Hub, call: Call, repo: Repo, rev: str) -> Answer:
    """The commits of a revision, the last one first."""
    commit: Commit | None = repo.at(rev)
    listed = []
    while commit:
        described = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
        listed.append(described | {"authors": [{"user": commit.author}]})
        commit = commit.parent
    return Answer(listed)


@route("GET", "/api/models/{id}/tree/{rev}(?:/{path})?")
def list_tree(hub: Hub, call: Call, repo: Repo, rev: str, path: str = "") -> Answer:
    """The files and folders of a folder; `recursive`: all that lies under it."""
    commit, prefix, found = repo.at(rev), f"{path}/" if path else "", set()
    for name in commit.files:
        if name.startswith(prefix):
            parts = name.removeprefix(prefix).split("/")
            deepest = len(parts) if call.asks("recursive") else 1
            found |= {prefix + "/".join(parts[:depth]) for depth in range(1, deepest + 1)}
    if path and not found:
        raise Refusal(404, f'{path} does not exist on "{rev}"', "EntryNotFound")
    return Answer(commit.entries(sorted(found), call.asks("expand")))


@route("POST", "/api/models/{id}/paths-info/{rev}")
def paths_info(hub: Hub, call: Call, repo: Repo, rev: str) -> Answer:
    """The facts of those paths of a form that are there."""
    asked = parse_qs(call.body.decode())
    return Answer(repo.at(rev).entries(asked.get("paths", []), asked.get("expand") == ["true"]))


@route("POST", "/api/models/{id}/branch/{name}", writes=True)
def create_branch(hub: Hub, call: Call, repo: Repo, name: str) -> Answer:
    """A new branch."""
    if name.startswith("refs/"):
        raise Refusal(400, f"Invalid reference for a branch: {name}")
    if name in repo.branches:
        raise Refusal(409, f"Reference already exists: refs/heads/{name}")
    repo.branches[name] = repo.at(call.json().get("startingPoint", "main")).id
    return Answer({"success": True})


@route("DELETE", "/api/models/{id}/branch/{name}", writes=True)
def delete_branch(hub: Hub, call: Call, repo: Repo, name: str) -> Answer:
    """A branch less."""
    if name == "main":
        raise Refusal(403, "The branch main cannot be deleted")
    if repo.branches.pop(name, None) is None:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
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
        mode = "lfs" if asked["size"] > LARGE_BYTES or path.endswith(LARGE_NAMES) else "regular"
        known = {"oid": there.etag} if there else {}
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
    return Answer({"files": files, "commitOid": commit.id})


@route("POST", r"/{id}\.git/info/lfs/objects/batch", writes=True)
def lfs_batch(hub: Hub, call: Call, repo: Repo) -> Answer:
    """Where to upload LFS objects; no action for those that are there."""
    objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in call.json()["objects"]]
    for wanted in objects:
        if not repo.holds(**wanted):
            ticket = secrets.token_hex(16)
            hub.tickets[ticket] = repo
            upload = {"href": f"{hub.url}/lfs/{wanted['oid']}?ticket={ticket}"}
            wanted["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/{repo.id}.git/info/lfs/verify"}}
    return Answer({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})


@route("PUT", "/lfs/{oid}")
def lfs_upload(hub: Hub, call: Call, oid: str) -> Answer:
    """The bytes of an LFS object."""
    repo = hub.tickets.get(call.query.get("ticket", [""])[0])
    if repo is None:
        raise Refusal(403, "Access denied")
    if File(call.body).sha256 != oid:
        raise Refusal(400, "The content does not have the SHA-256 that was announced")
    repo.objects[oid] = flipped(call.body) if call.meets("bytes") else call.body
    return Answer(b"", headers={"ETag": f'"{oid}"'})


@route("POST", r"/{id}\.git/info/lfs/verify", writes=True)
def lfs_verify(hub: Hub, call: Call, repo: Repo) -> Answer:
    """Whether an LFS object has arrived, by its size."""
    asked = call.json()
    if len(repo.objects.get(asked["oid"], b"")) != asked["size"]:
        raise Refusal(404, "LFS object not found")
    return Answer({"success": True})


@route("POST", "/api/models/{id}/commit/{rev}", writes=True)
def create_commit(hub: Hub, call: Call, repo: Repo, rev: str) -> Answer:
    """A new commit on a branch: one line of JSON is its header, each of the others a file to add or delete."""
    if rev not in repo.branches:
        raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
    head, lines = repo.at(rev), [json.loads(line) for line in call.body.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    if not head.id.startswith(header.get("parentCommit", "")):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
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
    commit = Commit(files, head, header["summary"], header.get("description", ""), hub.writer(call), now())
    repo.commits[commit.id] = commit
    repo.branches[rev] = commit.id
    url = f"{hub.url}/{repo.id}/commit/{commit.id}"
    return Answer({"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""})


def apply(repo: Repo, files: dict[str, File], key: str, value: dict) -> None:
    """Add or delete what a line of a commit says."""
    path = value.get("path", "").rstrip("/")
    if key != "header" and re.search(r"(^|/)(\.{0,2}|\.git)(/|$)", path):
        raise Refusal(400, f"Invalid path: {path!r}")
    if key == "file":
        files[path] = File(base64.b64decode(value["content"]))
    if key == "lfsFile":
        if value["oid"] not in repo.objects:
            raise Refusal(400, f"Your push was rejected because the LFS object {value['oid']} was not uploaded")
        files[path] = File(repo.objects[value["oid"]], lfs=True)
    if key in ("deletedFile", "deletedFolder"):
        gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(f"{path}/"))]
        if not gone:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]


@route("GET", "/{id}/resolve/{rev}/{path}")
def resolve(hub: Hub, call: Call, repo: Repo, rev: str, path: str) -> Answer:
    """A file, or the range of it that is asked for."""
    commit = repo.at(rev)
    headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    file = commit.files.get(path)
    if file is None:
        missing = Refusal(404, f"Entry not found: {path}", "EntryNotFound")
        missing.answer.headers |= {"X-Repo-Commit": commit.id}
        raise missing
    content, size = flipped(file.content) if call.meets("bytes") else file.content, len(file.content)
    headers |= {"ETag": f'"{file.etag}"'}
    headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{file.etag}"'} if file.lfs else {}
    asked = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", call.headers.get("range", ""))
    if asked is None:
        return Answer(content, headers=headers)
    start = int(asked[1]) if asked[1] else max(size - int(asked[3]), 0)
    stop = min(int(asked[2]) + 1, size) if asked[2] else size
    if start >= stop:
        return Answer(b"", 416, headers | {"Content-Range": f"bytes */{size}"})
    return Answer(content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def card_problems(card: str) -> tuple[list[str], list[str]]:
    """Warnings and errors on the YAML block at the top of a model card."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", card, re.DOTALL)
    if block is None:
        return ["empty or missing yaml metadata in repo card"], []
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [], [f"bad YAML: {error}"]
    if not isinstance(metadata, dict):
        return [], ["the metadata must be an object"]
    errors = [] if metadata.get("license", "other") in LICENSES else [f'"license" must be one of {", ".join(LICENSES)}']
    return [], errors + misfits(metadata.get("model-index", []), MODEL_INDEX, "model-index")


def misfits(value: object, form: object, where: str) -> list[str]:
    """Where a value is not of a form: a list of one form, a mapping with these keys at least, or a type."""
    if isinstance(form, list) and isinstance(value, list):
        return [text for place, item in enumerate(value) for text in misfits(item, form[0], f"{where}[{place}]")]
    if isinstance(form, dict) and isinstance(value, dict):
        return [text for key, part in form.items() for text in misfits(value.get(key), part, f"{where}.{key}")]
    fits = isinstance(form, type) and isinstance(value, form) and value is not None
    return [] if fits else [f'"{where}" is missing or malformed']


def failure(fault: Fault) -> Answer:
    """The answer of a fault of kind "status"."""
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    if fault.code in (502, 503, 504):
        return Answer(b"<html>as a test wants it</html>", fault.code, headers | {"Content-Type": "text/html"})
    return Answer({"error": "as a test wants it"}, fault.code, headers)


def flipped(content: bytes) -> bytes:
    """The content with one bit of its middle byte flipped."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 1 for byte in content[middle : middle + 1]) + content[middle + 1 :]


def now() -> str:
    """The time as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


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
        call = Call(method, url.path, parse_qs(url.query), headers, body, fault)
        if fault and fault.kind == "hang":
            fault.healed.wait(fault.seconds)
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


def main() -> None:
    """Serve until Ctrl-C, and say how to reach it."""
    parser = argparse.ArgumentParser(description="A Hugging Face Hub for trying things out, gone when it ends.")
    parser.add_argument("--port", type=int, default=8000)
    with Hub(parser.parse_args().port) as hub, suppress(KeyboardInterrupt):
        for name, value in hub.settings(WRITE, "$(mktemp -d)").items():
            print(f'export {name}="{value}"', flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
