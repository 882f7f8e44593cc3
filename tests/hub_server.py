"""A small Hugging Face Hub on 127.0.0.1, for huggingface_hub itself to talk to: the calls that ORION's use needs.

Download: repository info, tree, HEAD with ETag, range requests, a redirect for large files. Upload: create,
preupload, LFS batch, PUT, commit. One branch `main`, whole commits in memory. Errors carry the Hub's own codes.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
LARGE = (".safetensors", ".gguf", ".png")  # what the Hub keeps as LFS objects


@dataclass
class Repository:
    """Its commits, oldest first: commit id -> {path: bytes}."""

    kind: str = "models"
    gated: bool = False
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        listing = json.dumps(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items()))
        name = hashlib.sha1(f"{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[name] = files
        return name

    def resolve(self, revision: str) -> str | None:
        if revision == "main":
            return next(reversed(self.commits), None)
        return revision if revision in self.commits else None


class Hub:
    """The server's content and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # uploaded LFS objects by sha256
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.cut_after = 0  # bytes after which the next large answer breaks off
        self.url = ""
        self.storage_url = ""  # another host, as the Hub's storage is: no token is sent there

    def add(self, name: str, folder: Path, **options: Any) -> str:
        """A repository with the files of `folder`; returns its commit."""
        repository = self.repositories.setdefault(name, Repository(**options))
        return repository.commit(
            {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits up to 40 ms for the acknowledgement of its header
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def _reply(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("Content_Length", str(len(data))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self._reply(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)

    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, kind: str, name: str) -> Repository | None:
        """The repository, or None after the refusal that the Hub would give."""
        authorization = self.headers.get("Authorization")
        if authorization and not self._signed_in():
            self._reply(401, {"error": "bad token"}, X_Error_Message="Invalid credentials in Authorization header")
            return None
        repository = self.hub.repositories.get(name)
        if repository is None or repository.kind != kind or (repository.private and not authorization):
            self._refuse(404 if authorization else 401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "lfs":
            self._send(self.hub.objects[parts[1]])
        elif "resolve" in parts:
            self._resolve()
        elif parts[:1] != ["api"] or len(parts) < 4:
            self._reply(404, {"error": "no such call"})
        elif (repository := self._repository(parts[1], "/".join(parts[2:4]))) is not None:
            verb, revision = (parts[4], "/".join(parts[5:])) if len(parts) > 5 else ("revision", "main")
            commit = repository.resolve(revision)
            if commit is None:
                self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            elif verb == "tree":
                self._reply(200, [_entry(path, data) for path, data in sorted(repository.commits[commit].items())])
            else:
                siblings = [{"rfilename": path} for path in repository.commits[commit]]
                name = "/".join(parts[2:4])
                self._reply(
                    200,
                    {"_id": "1", "id": name, "sha": commit, "private": repository.private, "siblings": siblings},
                )

    def _resolve(self) -> None:
        """HEAD and GET of /owner/name/resolve/revision/path; a large file is behind a redirect, as on the Hub."""
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        kind = "datasets" if parts[0] == "datasets" else "models"
        owner, name, _, revision, *path = parts[1:] if kind == "datasets" else parts
        repository = self._repository(kind, f"{owner}/{name}")
        if repository is None:
            return
        if repository.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
            return
        commit = repository.resolve(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound")
            return
        data = repository.commits[commit].get("/".join(path))
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        if "/".join(path).endswith(LARGE):
            oid = hashlib.sha256(data).hexdigest()
            self.hub.objects[oid] = data
            self._reply(
                302,
                Location=f"{self.hub.storage_url}/lfs/{oid}",
                X_Repo_Commit=commit,
                X_Linked_Size=str(len(data)),
                X_Linked_ETag=f'"{oid}"',
                ETag=f'"{_blob_id(data)}"',
            )
        else:
            self._send(data, X_Repo_Commit=commit, ETag=f'"{_blob_id(data)}"')

    def _send(self, data: bytes, **headers: str) -> None:
        asked = self.headers.get("Range", "")
        first = asked.removeprefix("bytes=").split("-")[0]
        if asked:
            self.hub.ranges.append(asked)
        if self.command == "GET" and 0 < self.hub.cut_after < len(data):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: self.hub.cut_after])
            self.hub.cut_after = 0
            self.close_connection = True
        elif first and self.command == "GET":
            span = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self._reply(206, data[int(first) :], Content_Range=span, **headers)
        else:
            self._reply(200, data, Content_Length=str(len(data)), **headers)

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if not self._signed_in():
            self._reply(401, {"error": "no token"}, X_Error_Message="Invalid credentials in Authorization header")
        elif path == "/api/validate-yaml":
            self._reply(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name.startswith("someone-else/"):
                self._refuse(403, "Forbidden", "You don't have the rights to create a model under this namespace")
            elif name in self.hub.repositories:
                self._reply(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            else:
                kind = "datasets" if asked.get("type") == "dataset" else "models"
                self.hub.repositories[name] = Repository(kind, private=asked.get("visibility") == "private")
                self.hub.repositories[name].commit({})
                address = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
                self._reply(200, {"url": address, "id": name})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self._reply(200, {"transfer": "basic", "objects": objects})
        elif "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._reply(200, {"files": files})
        elif "/commit/" in path:
            self._commit("/".join(path.split("/")[3:5]), [json.loads(line) for line in body.splitlines()])
        else:
            self._reply(404, {"error": "no such call"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self.hub.repositories[name]
        files = dict(repository.commits[repository.resolve("main") or ""])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = repository.commit(files)
        self._reply(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(data).hexdigest() != oid:
            self._reply(400, {"error": "other bytes than announced"})
            return
        self.hub.objects[oid] = data
        self._reply(200)


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
    if path.endswith(LARGE):
        oid = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
    return entry


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.storage_url = f"http://localhost:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
