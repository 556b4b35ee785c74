"""A loopback file server with faults: byte ranges, drops in mid-body, refusals, and a Hub's dataset endpoints.

Only what fsspec's http and hf file systems ask for: HEAD and GET with Range on files, and of the Hub's API the commit
of a revision, the tree of a folder and the facts of paths (https://huggingface.co/docs/hub/api).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class FileServer:
    """Serves the files of `folder`; what a test sets here is what the next requests meet."""

    folder: Path
    port: int = 0
    drops: int = 0  # so many of the next GETs end in the middle of the body; -1: all of them
    statuses: list[int] = field(default_factory=list)  # of the next GETs, before anything else
    wrong_bytes: bool = False
    ranges: bool = True  # whether it answers with a part of a file
    requested: list[tuple[str, str]] = field(default_factory=list)  # (path, Range) of every GET

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serve(folder: Path) -> Iterator[FileServer]:
    """A server of `folder` on a free port of the loopback interface, until the block ends."""
    state = FileServer(folder)
    handler = type("Handler", (Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield state
        server.shutdown()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    state: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """The size of a file."""
        self.answer(body=False)

    def do_GET(self) -> None:
        """A file, a range of it, or an answer of the Hub's API."""
        self.state.requested.append((self.path, self.headers.get("Range", "")))
        self.answer(body=True)

    def do_POST(self) -> None:
        """The Hub's facts about paths."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        match = re.match(r"/api/datasets/[^/]+/[^/]+/paths-info/(.+)", self.path)
        if match is None:
            self.fail(404)
            return
        paths = [self.state.folder / path for path in asked["paths"]]
        self.json([self.facts(path) for path in paths if path.exists()])

    def answer(self, *, body: bool) -> None:
        """Answer HEAD or GET."""
        if body and self.state.statuses:
            self.fail(self.state.statuses.pop(0))
            return
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/datasets/"):
            self.api(path)
            return
        path = re.sub(r"^/datasets/[^/]+/[^/]+/resolve/[^/]+", "", path)
        file = self.state.folder / path.lstrip("/")
        if not file.is_file():
            self.fail(404)
            return
        raw = file.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "") if self.state.ranges else "")
        start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(raw))
        part = raw[start:stop]
        if self.state.wrong_bytes:
            part = bytes(byte ^ 1 for byte in part)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(raw)}")
        self.end_headers()
        if not body:
            return
        if self.state.drops:
            self.state.drops -= 1
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True
            return
        self.wfile.write(part)

    def api(self, path: str) -> None:
        """The Hub's commit of a revision, or the tree of a folder."""
        parts = path.removeprefix("/api/datasets/").split("/")
        if len(parts) > 3 and parts[2] == "tree":
            folder = self.state.folder.joinpath(*parts[4:])
            self.json([self.facts(found) for found in sorted(folder.iterdir())]) if folder.is_dir() else self.fail(404)
            return
        if len(parts) > 3 and parts[3] not in ("main", COMMIT):
            self.fail(404, "RevisionNotFound")
            return
        self.json({"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": [], "private": False, "tags": []})

    def facts(self, path: Path) -> dict:
        """What the Hub tells of a file or folder."""
        name = str(path.relative_to(self.state.folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        sha256, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
        lfs = {"oid": sha256, "size": size, "pointerSize": 130}
        return {"type": "file", "path": name, "oid": sha256[:40], "size": size, "lfs": lfs}

    def json(self, content: object) -> None:
        """Answer with JSON."""
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def fail(self, status: int, code: str = "EntryNotFound") -> None:
        """Answer with an error."""
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
