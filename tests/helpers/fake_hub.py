"""A hub on this machine that refuses, breaks off and lies, and the environment in which a program meets it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_" + "secretsecret" * 3
"""Stands in the environment of the programs and must never show up."""
COMMIT = "1" * 40


@dataclass
class Hub:
    """What the hub holds and how it misbehaves.

    Attributes:
        repositories: repository -> file name -> content.
        statuses: repository -> the status that every request for it is answered with.
        drops: repository -> beginning of a file's name; its first download breaks off at 90 %.
        damages: the same; the last byte of the file arrives changed.
        fails: the same; the file's download is answered with 503.
        log: (command, path, range asked for) of every request.
    """

    repositories: Mapping[str, Mapping[str, bytes]]
    statuses: Mapping[str, int] = field(default_factory=dict)
    drops: Mapping[str, str] = field(default_factory=dict)
    damages: Mapping[str, str] = field(default_factory=dict)
    fails: Mapping[str, str] = field(default_factory=dict)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The hub's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """For a program that knows this hub and no other, with caches of its own."""
    values = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "LORA_SCRIPTS_CACHE": str(home / "ours"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "PYTHONIOENCODING": "utf-8",
        "NO_PROXY": "*",
    }
    for unwanted in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        values.pop(unwanted, None)
    return values


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.hub.log.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        repo, rest = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
        if repo in self.hub.statuses:
            self.reply(self.hub.statuses[repo], json.dumps({"error": "no"}).encode())
        elif rest.startswith("resolve/"):
            self.send_file(repo, rest.split("/", 2)[2], body)
        else:
            siblings = [
                {
                    "rfilename": name,
                    "size": len(content),
                    "blobId": hashlib.sha1(content).hexdigest(),
                    **lfs(name, content),
                }
                for name, content in self.hub.repositories[repo].items()
            ]
            self.reply(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def concerns(self, misbehaviour: Mapping[str, str], repo: str, name: str) -> bool:
        return repo in misbehaviour and name.startswith(misbehaviour[repo])

    def send_file(self, repo: str, name: str, body: bool) -> None:
        content = self.hub.repositories[repo][name]
        if body and self.concerns(self.hub.fails, repo, name):
            self.reply(503, b"")
            return
        etag = lfs(name, content)["lfs"]["sha256"] if lfs(name, content) else hashlib.sha1(content).hexdigest()
        if self.concerns(self.hub.damages, repo, name):
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = 0
        if body and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        drop = body and self.concerns(self.hub.drops, repo, name) and name not in self.hub.dropped
        stop = len(content) * 9 // 10 if drop else len(content)
        self.reply(206 if start else 200, content[start:], headers, body=body, send=stop - start)
        if drop:
            self.hub.dropped.add(name)
            self.close_connection = True

    def reply(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        body: bool = True,
        send: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:send])


def lfs(name: str, content: bytes) -> dict[str, dict]:
    if not name.endswith((".safetensors", ".bin")):
        return {}
    return {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}
