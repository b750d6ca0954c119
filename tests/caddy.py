"""Caddy with the configuration of a bundle, as a process on this machine, and servers behind it."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PROGRAM = shutil.which("caddy", path=str(Path(sys.executable).parent)) or shutil.which("caddy")
needs_caddy = pytest.mark.skipif(PROGRAM is None, reason="needs caddy")
KEY = "secret"
FIRST, SECOND = b"data: one\n\n", b"data: two\n\n"


@dataclass(frozen=True)
class Proxy:
    """A running Caddy. Called with a path, a key and a body, it asks for the path and returns the status."""

    port: int
    trusted: ssl.SSLContext
    process: subprocess.Popen[bytes]

    def __call__(self, path: str, key: str | None = None, body: bytes | None = None) -> int:
        try:
            with self.open(path, key, body) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def open(self, path: str, key: str | None = None, body: bytes | None = None) -> Any:
        """The answer; HTTPError for another status than 200."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"https://localhost:{self.port}{path}", data=body, headers=headers)
        return urllib.request.urlopen(request, context=self.trusted, timeout=20)


@contextmanager
def caddy(configuration: str, folder: Path, **environment: str) -> Iterator[Proxy]:
    """Start it on a port of its own with a certificate for localhost, both in `folder`."""
    port = free_port()
    certificate(folder)
    text = configuration.replace("/tls/", f"{folder}/").replace(":8443 {", f":{port} {{\n\tbind 127.0.0.1")
    (folder / "Caddyfile").write_text(text)
    assert PROGRAM
    command = [PROGRAM, "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "API_KEY": KEY} | environment
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(port)
            yield Proxy(port, ssl.create_default_context(cafile=str(folder / "tls.crt")), process)
        finally:
            process.terminate()


@contextmanager
def backend(pause: float = 0) -> Iterator[tuple[str, list[str]]]:
    """A server that answers every path in two parts, with `pause` seconds between them; its address, and the requests
    that it got, apart from health checks."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path != "/health":
                asked.append(f"{self.command} {self.path}")
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Content-Length", str(len(FIRST + SECOND)))
            self.end_headers()
            self.wfile.write(FIRST)
            self.wfile.flush()
            time.sleep(pause)
            self.wfile.write(SECOND)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def certificate(folder: Path) -> None:
    """A certificate for localhost: tls.crt and tls.key."""
    who = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "1"]
    files = ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *who, *files]
    subprocess.run(command, check=True, capture_output=True)


def wait_for(port: int, seconds: float = 20) -> None:
    """Return when something listens on the port; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on {port}")
