"""A Hub on the loopback: the routes, headers and errors of huggingface.co that huggingface_hub meets, and its bad days.

    with HubServer() as hub:
        hub.add("owner/name", {"config.json": b"{}"})
        hub.fault("HEAD", "config.json", status=503, times=2)
        ... the real client with endpoint=hub.endpoint ...
        hub.log  # what was asked: method, path, headers, status, bytes sent

As on the Hub: a file in git is answered by a 307 to /api/resolve-cache on the same host, one in LFS by a 302 to a CDN
on another (here ``localhost`` for ``127.0.0.1``), both with X-Repo-Commit and the file's etag and size; a renamed
repository by a 307 to its new name; one that is private or missing by 401 to nobody in particular and 404 to a user.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, STRANGER = "hf_member", "hf_stranger"
"""Tokens that the server knows: of one who may read every repository, and of one who may not."""


class Sparse:
    """A file of ``size`` bytes that begins with ``head``: gigabytes that exist only where they are read."""

    def __init__(self, head: bytes, size: int):
        self.head, self.size = head, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        head = self.head[start:stop]
        return head + bytes(stop - start - len(head))


@dataclass
class Repo:
    id: str
    files: dict
    commit: str
    refs: dict
    lfs: frozenset = frozenset()
    gated: bool = False
    private: bool = False
    disabled: bool = False

    def etag(self, name: str) -> str:
        data = self.files[name]
        start = data[: 1 << 16] + str(len(data)).encode()
        return (hashlib.sha256 if name in self.lfs else hashlib.sha1)(start).hexdigest()


@dataclass
class Fault:
    """What goes wrong with the requests of ``method`` whose path holds ``part``, ``times`` times.

    ``status``: that answer. ``cut``: so many bytes of the body, then a closed connection. ``stall``: seconds of silence
    before the answer (``at`` "head") or after the first byte of the body (``at`` "body"). ``trickle``: seconds between
    bytes. ``length``: what Content-Length says; None: nothing, the body ends with the connection. ``body``: what
    is sent instead; ``endless``: without end.
    """

    method: str
    part: str
    times: int = 1 << 30
    status: int = 0
    headers: dict = field(default_factory=dict)
    cut: int = -1
    stall: float = 0.0
    at: str = "head"
    trickle: float = 0.0
    length: int | str | None = "true"
    body: bytes | None = None
    endless: bool = False


@dataclass
class Asked:
    method: str
    path: str
    headers: dict
    status: int = 0
    sent: int = 0


class HubServer:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.log: list[Asked] = []
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.port = self.http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}/cdn"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()

    def add(self, id: str, files: dict, *, lfs=(), refs=None, **access) -> Repo:
        commit = hashlib.sha1(id.encode()).hexdigest()
        repo = Repo(id, files, commit, {"main": commit, **(refs or {})}, frozenset(lfs), **access)
        self.repos[id] = repo
        return repo

    def fault(self, method: str, part: str, **how) -> Fault:
        self.faults.append(Fault(method, part, **how))
        return self.faults[-1]

    def asked(self, method: str = "", part: str = "") -> list[Asked]:
        with self.lock:
            return [one for one in self.log if one.method.startswith(method) and part in one.path]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fault: Fault | None = None

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked = Asked(self.command, self.path, {key.lower(): value for key, value in self.headers.items()})
        with self.hub.lock:
            self.hub.log.append(self.asked)
            self.fault = next(
                (f for f in self.hub.faults if f.times and f.method == self.command and f.part in self.path), None
            )
            if self.fault:
                self.fault.times -= 1
        with contextlib.suppress(ConnectionError):
            if self.fault and self.fault.stall and self.fault.at == "head":
                self.hub.over.wait(self.fault.stall)
            if self.fault and self.fault.status:
                self.answer(self.fault.status, b'{"error": "a bad day"}', self.fault.headers)
            else:
                self.route()

    def route(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path == "/api/models":
            self.search(parse_qs(url.query))
        elif found := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            self.model(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            self.file(found[1], found[2], found[3], direct=True)
        elif found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self.send_file(self.hub.repos[found[1]], found[2], {})
        elif found := re.fullmatch(r"/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", path):
            if found[1] in self.hub.renamed:
                self.answer(307, headers={"Location": self.path.replace(found[1], self.hub.renamed[found[1]], 1)})
            else:
                self.file(found[1], found[2], found[3])
        else:
            self.answer(404, b'{"error": "no such route"}')

    # Who asks, and for what

    def repo(self, id: str, files: bool) -> Repo | None:
        """The repository, or None where the refusal was sent. A gated one's description is open to everyone."""
        token = self.asked.headers.get("authorization", "").removeprefix("Bearer ")
        repo = self.hub.repos.get(id)
        if token not in ("", TOKEN, STRANGER):
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and token != TOKEN):
            if token:
                self.refuse(404, "RepoNotFound", "Repository not found")
            else:
                self.refuse(401, "", "Invalid username or password.")
        elif repo.disabled:
            self.refuse(403, "", "Access to this resource is disabled.")
        elif repo.gated and files and token != TOKEN:
            self.refuse(403 if token else 401, "GatedRepo", f"Access to model {id} is restricted.")
        else:
            return repo
        return None

    def commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.refs.get(revision) or (revision if revision in repo.refs.values() else None)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def model(self, id: str, revision: str) -> None:
        repo = self.repo(id, files=False)
        commit = repo and self.commit(repo, revision)
        if commit:
            about = {"_id": repo.commit[:24], "id": id, "modelId": id, "sha": commit, "private": repo.private}
            about |= {
                "gated": "auto" if repo.gated else False,
                "siblings": [{"rfilename": name} for name in repo.files],
            }
            self.answer(200, json.dumps(about).encode())

    def search(self, query: dict) -> None:
        words = query["search"][0].lower()
        hits = [
            {"_id": r.commit[:24], "id": r.id, "modelId": r.id}
            for r in self.hub.repos.values()
            if words in r.id.lower()
        ]
        self.answer(200, json.dumps(hits[: int(query.get("limit", ["1000"])[0])]).encode())

    def file(self, id: str, revision: str, name: str, direct: bool = False) -> None:
        repo = self.repo(id, files=True)
        commit = repo and self.commit(repo, revision)
        if not commit:
            return
        headers = {"X-Repo-Commit": commit}
        if name not in repo.files:
            self.refuse(404, "EntryNotFound", "Entry not found", headers)
        elif name in repo.lfs:
            headers |= {"X-Linked-ETag": f'"{repo.etag(name)}"', "X-Linked-Size": str(len(repo.files[name]))}
            self.answer(302, headers={**headers, "Location": f"{self.hub.cdn}/{id}/{name}?Signature=s"})
        elif not direct:
            headers |= {"ETag": f'"{repo.etag(name)}"'}
            self.answer(
                307,
                headers={
                    **headers,
                    "Location": f"/api/resolve-cache/models/{id}/{commit}/{name}?etag={repo.etag(name)}",
                },
            )
        else:
            self.send_file(repo, name, headers)

    def send_file(self, repo: Repo, name: str, headers: dict) -> None:
        data = repo.files[name]
        headers = {**headers, "ETag": f'"{repo.etag(name)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.asked.headers.get("range", ""))
        if not asked:
            return self.answer(200, data, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        if start >= len(data):
            return self.answer(416, headers={"Content-Range": f"bytes */{len(data)}"})
        return self.answer(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    # What is sent

    def refuse(self, status: int, code: str, message: str, headers: dict | None = None) -> None:
        headers = {**(headers or {}), "X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer(status, json.dumps({"error": message}).encode(), headers)

    def answer(self, status: int, body=b"", headers: dict | None = None) -> None:
        fault = self.fault or Fault("", "")
        if 300 <= status < 400 and not fault.status:  # a redirect of the Hub's own
            fault = Fault("", "")
        if fault.body is not None:
            body = fault.body
        length = len(body) if fault.length == "true" else fault.length
        self.asked.status = status
        self.send_response(status)
        for key, value in {**(headers or {}), **({} if fault.status else fault.headers)}.items():
            self.send_header(key, value)
        if length is None:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.flush()
        if self.command == "HEAD":
            return
        whole = len(body)
        if fault.cut >= 0:
            whole = fault.cut
        if fault.cut >= 0 or length != len(body):
            self.close_connection = True
        if fault.stall and fault.at == "body":
            self.send(body[:1])
            self.hub.over.wait(fault.stall)
            self.send(body[1:whole])
        elif fault.trickle:
            for at in range(whole):
                self.send(body[at : at + 1])
                if self.hub.over.wait(fault.trickle):
                    return
        else:
            for at in range(0, whole, 1 << 16):
                self.send(body[at : min(at + (1 << 16), whole)])
        while fault.endless:
            self.send(b" " * (1 << 16))

    def send(self, part: bytes) -> None:
        self.wfile.write(part)
        self.wfile.flush()
        self.asked.sent += len(part)
