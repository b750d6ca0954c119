"""A fake model hub: the parts of the Hugging Face Hub's HTTP API that downloads use, with failures on request.

As on the real hub, a request for a large file is redirected to another host, which must not receive the token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

_INFO = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
_FILE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_CDN = re.compile(r"/cdn/(?P<digest>[0-9a-f]{64})")


@dataclass
class Repository:
    """One repository with one commit; files named in `large` are LFS files."""

    files: dict[str, bytes]
    large: tuple[str, ...] = (".safetensors", ".gguf", ".bin", ".parquet")
    gated: bool = False
    licence: str | None = None
    wrong: dict[str, bytes] = field(default_factory=dict)  # bytes sent instead of a file

    @property
    def commit(self) -> str:
        """The commit of the branch main."""
        listing = sorted((name, _git(content)) for name, content in self.files.items())
        return hashlib.sha1(repr(listing).encode()).hexdigest()


@dataclass
class Request:
    """A request to the hub."""

    method: str
    host: str
    path: str
    headers: dict[str, str]


class FakeHub:
    """The hub: `repositories` by "org/name", or "datasets/org/name" for data sets.

    `token` grants access to the gated ones. The next responses with a large file end after the bytes in `break_after`,
    one entry per response; with `hang` they wait instead, and `hanging` is set. With a `status` every response has it.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.repositories: dict[str, Repository] = {}
        self.token = "hf_the_right_one"
        self.break_after: list[int] = []
        self.hang = False
        self.status: int | None = None
        self.hanging = threading.Event()
        self.requests: list[Request] = []

    def ranges(self) -> list[str]:
        """The Range headers of requests for large files so far."""
        return [r.headers["range"] for r in self.asked("/cdn/") if "range" in r.headers]

    def asked(self, part: str) -> list[Request]:
        """The requests for paths that contain `part`."""
        return [r for r in self.requests if part in r.path]


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """Run a hub for the duration of the block."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Handler.hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.hang = False
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        """Like GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer, or fail like the real hub."""
        path = unquote(urlsplit(self.path).path)
        host = self.headers.get("Host", "")
        self.hub.requests.append(Request(self.command, host, path, {k.lower(): v for k, v in self.headers.items()}))
        if self.hub.status:
            self._fail(self.hub.status, "")
        elif match := _CDN.fullmatch(path):
            self._large(match["digest"])
        elif match := _INFO.fullmatch(path):
            self._info(match["kind"], match["name"], match["revision"])
        elif match := _TREE.fullmatch(path):
            self._tree(match["kind"], match["name"], match["revision"], match["folder"])
        elif match := _FILE.fullmatch(path):
            self._file(match["kind"] or "", match["name"], match["revision"], match["file"])
        else:
            self._fail(404, "RepoNotFound")

    def _find(self, key: str, revision: str | None) -> Repository | None:
        repository = self.hub.repositories.get(key)
        if repository is None:
            # without access, the hub does not distinguish missing from private
            self._fail(404 if self._allowed() else 401, "RepoNotFound")
        elif revision not in (None, "main", "v1", repository.commit):
            self._fail(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _info(self, kind: str, name: str, revision: str | None) -> None:
        repository = self._find(name if kind == "models" else f"datasets/{name}", revision)
        if repository is None:
            return
        siblings = []
        for file, content in repository.files.items():
            entry: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": _git(content)}
            if file.endswith(repository.large):
                entry["lfs"] = {"sha256": _sha256(content), "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        card = {"license": repository.licence} if repository.licence else {}
        about = {
            "id": name,
            "sha": repository.commit,
            "siblings": siblings,
            "cardData": card,
            "private": False,
        }
        self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        """All files and folders below a folder."""
        repository = self._find(name if kind == "models" else f"datasets/{name}", revision)
        if repository is None:
            return
        files = {n: c for n, c in repository.files.items() if n.startswith(f"{folder}/" if folder else "")}
        listing = [{"type": "file", "path": n, "size": len(c), "oid": _git(c)} for n, c in files.items()]
        folders = {
            str(parent) for n in files for parent in PurePosixPath(n).parents if str(parent) not in (".", folder)
        }
        listing += [{"type": "directory", "path": n, "size": 0, "oid": _git(n.encode())} for n in sorted(folders)]
        self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        repository = self._find(kind + name, revision)
        if repository is None:
            return
        if repository.gated and not self._allowed():
            self._fail(403 if "Authorization" in self.headers else 401, "GatedRepo")
            return
        content = repository.files.get(file)
        if content is None:
            self._fail(404, "EntryNotFound")
            return
        commit = {"X-Repo-Commit": repository.commit}
        if not file.endswith(repository.large):
            self._send(200, repository.wrong.get(file, content), {**commit, "ETag": f'"{_git(content)}"'})
            return
        # another name of this machine counts as another host
        cdn = self.hub.endpoint.replace("127.0.0.1", "localhost") + f"/cdn/{_sha256(content)}"
        linked = {
            "Location": cdn,
            "X-Linked-Etag": f'"{_sha256(content)}"',
            "X-Linked-Size": str(len(content)),
        }
        self._send(302, b"", {**commit, **linked})

    def _large(self, digest: str) -> None:
        content, sent = next(
            (content, repository.wrong.get(file, content))
            for repository in self.hub.repositories.values()
            for file, content in repository.files.items()
            if _sha256(content) == digest
        )
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        limit = self.hub.break_after.pop(0) if self.hub.break_after and self.command == "GET" else None
        self._send(206 if start else 200, sent[start:], headers, limit)

    def _fail(self, status: int, code: str) -> None:
        self._send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str], limit: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(ConnectionError):  # the client was killed
            self.wfile.write(body[:limit])
            self.wfile.flush()
        if limit is not None:
            while self.hub.hang:
                self.hub.hanging.set()
                threading.Event().wait(0.05)
            self.close_connection = True


@cache
def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@cache
def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
