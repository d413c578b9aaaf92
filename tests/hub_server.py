"""
A Hub on this machine: as much of its HTTP API as huggingface_hub's real client asks for, with faults to order.

Large files go by the LFS batch and basic transfers (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md);
the storage that replaces them, Xet, is turned off in the client.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


USER = "me"
TOKEN = "hf_" + "secretsecret" * 3  # nothing may ever show this

ROUTES = {
    "whoami": r"GET /api/whoami-v2",
    "create": r"POST /api/repos/create",
    "validate": r"POST /api/validate-yaml",
    "preupload": r"POST /api/(?P<type>models|datasets)/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)",
    "batch": r"POST /(?:datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
    "put": r"PUT /lfs/(?P<oid>[0-9a-f]{64})",
    "verify": r"POST /lfs/verify",
    "commit": r"POST /api/(?P<type>models|datasets)/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)",
    "tree": r"GET /api/(?P<type>models|datasets)/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)",
    "info": r"GET /api/(?P<type>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?",
    "resolve": r"(?:GET|HEAD) /(?:datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
}
OPEN = ("info", "tree", "resolve", "put")  # what needs no login; the storage's addresses are signed


@dataclass
class Repository:
    """Files by path, and the messages of the commits."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        cache: where clients keep what they have downloaded.
        repositories: by their name.
        stored: large files by their sha256.
        asked: names of the routes, in the order of the requests.
        faults: route -> what each of the next requests gets: a status, or "cut" to end the connection half-way. A
            last `...` repeats the one before it for ever.
    """

    daemon_threads = True

    def __init__(self, cache: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.cache = cache
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.faults: dict[str, list[Any]] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, route: str) -> Any:
        with self.lock:
            self.asked.append(route)
            faults = self.faults.get(route, [])
            if len(faults) == 2 and faults[1] is ...:
                return faults[0]
            return faults.pop(0) if faults else None


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        matches = ((name, re.fullmatch(route, f"{self.command} {path}")) for name, route in ROUTES.items())
        name, match = next(((name, match) for name, match in matches if match), (None, None))
        if name is None:
            return self._answer(404, {"error": f"no route {self.command} {path}"})
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.server.next_fault(name)
        if fault == "cut":
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        body = self.rfile.read(length) if length else self._chunks()
        if fault is not None:
            return self._answer(fault, {"error": f"fault {fault}"})
        if name not in OPEN and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        return getattr(self, f"_{name}")(body, **match.groupdict())

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _chunks(self) -> bytes:
        """A body of unknown length."""
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def _whoami(self, body: bytes) -> None:
        self._answer(200, {"type": "user", "name": USER, "orgs": []})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization'] or USER}/{asked['name']}"
        if not repo.startswith(f"{USER}/"):
            return self._answer(403, {"error": "You don't have the rights to create a repository there"})
        url = f"{self.server.url}/{'datasets/' if asked.get('type') == 'dataset' else ''}{repo}"
        if repo in self.server.repositories:
            return self._answer(409, {"error": "You already created this repo", "url": url})
        self.server.repositories[repo] = Repository(private=asked.get("visibility") == "private")
        return self._answer(200, {"url": url, "name": repo})

    def _validate(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _preupload(self, body: bytes, type: str, repo: str, revision: str) -> None:
        if repo not in self.server.repositories:
            return self._answer(404, {"error": "Repository not found"})
        have = self.server.repositories[repo].files
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".parquet", ".png")) else "regular",
                "shouldIgnore": False,
                "oid": _oid(file["path"], have[file["path"]]) if file["path"] in have else None,
            }
            for file in json.loads(body)["files"]
        ]
        return self._answer(200, {"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.stored:
                entry["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.server.url}/lfs/verify"},
                }
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "not what was announced"})
        self.server.stored[oid] = body
        return self._answer(200, {})

    def _verify(self, body: bytes) -> None:
        self._answer(200 if json.loads(body)["oid"] in self.server.stored else 404, {})

    def _commit(self, body: bytes, type: str, repo: str, revision: str) -> None:
        repository = self.server.repositories[repo]
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.stored[value["oid"]]
            else:
                del repository.files[value["path"]]
        repository.commits.append(lines[0]["value"]["summary"])
        prefix = "datasets/" if type == "datasets" else ""
        commit_url = f"{self.server.url}/{prefix}{repo}/commit/{repository.sha}"
        self._answer(200, {"success": True, "commitOid": repository.sha, "commitUrl": commit_url})

    def _tree(self, body: bytes, type: str, repo: str, revision: str) -> None:
        files = self.server.repositories[repo].files.items()
        self._answer(
            200, [{"type": "file", "path": path, "size": len(data), "oid": _oid(path, data)} for path, data in files]
        )

    def _info(self, body: bytes, type: str, repo: str, revision: str | None) -> None:
        if repo not in self.server.repositories:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        repository = self.server.repositories[repo]
        siblings = [{"rfilename": path} for path in repository.files]
        info = {"id": repo, "sha": repository.sha, "private": repository.private, "siblings": siblings, "tags": []}
        if "README.md" in repository.files:
            from huggingface_hub import ModelCard

            card = ModelCard(repository.files["README.md"].decode(), ignore_metadata_errors=True)
            info["cardData"] = card.data.to_dict()
        return self._answer(200, info)

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        repository = self.server.repositories.get(repo, Repository())
        if path not in repository.files:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = repository.files[path]
        headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{_oid(path, data)}"'}
        return self._answer(200, data, headers)

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def _oid(path: str, data: bytes) -> str:
    """As the client computes it to see whether a file has changed: git's hash, or the sha256 of a large file."""
    if path.endswith((".safetensors", ".parquet", ".png")):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A Hub that this process's clients talk to, logged in, with a cache of their own and without waits."""
    import huggingface_hub.hf_api
    import huggingface_hub.utils._http as http
    import transformers.utils.hub
    from huggingface_hub import constants

    from trl_diffusion_rank.hub import cards, upload

    hub = Hub(cache)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(upload, "WAIT", 0)
    cards.license_of.cache_clear()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
