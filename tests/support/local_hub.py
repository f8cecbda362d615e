"""A stand-in for the HTTP API of the Hugging Face Hub on the loopback address, for model repositories.

It answers what the client of `huggingface_hub` asks for when it creates repositories, commits, uploads large files (in
one piece and in parts), tags, and downloads. What it does not know is a 404 error. Nothing is written to disk.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

USER = "user"
TOKEN = "hf_local"
#: Files that the Hub stores outside git, as in the `.gitattributes` of a new repository.
LARGE_FILES = ("*.safetensors", "*.bin", "*.pt", "*.arrow", "*.parquet")
#: Files above this size are uploaded in parts of it; 16 MB or more on the Hub.
PART_SIZE = 2**16


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit; its content is addressed as in git, or by SHA-256 if it is large."""

    content: bytes
    is_large: bool = False

    @property
    def oid(self) -> str:
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits (name -> files by path, newest last), branches and tags."""

    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    is_private: bool = False

    def commit(self, branch: str, files: dict[str, StoredFile]) -> str:
        description = json.dumps([len(self.commits), branch, {path: file.oid for path, file in files.items()}])
        name = hashlib.sha1(description.encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def find(self, revision: str) -> str:
        """Return the name of a commit for a branch, a tag or the name itself."""
        name = self.branches.get(revision) or self.tags.get(revision) or revision
        if name not in self.commits:
            raise HubError(404, "RevisionNotFound", revision)
        return name

    def files(self, revision: str = "main") -> dict[str, StoredFile]:
        return self.commits[self.find(revision)]


class HubError(Exception):
    """An answer with an error.

    Args:
        status: HTTP status.
        code: the code by which the client recognises the error, or "".
        message: the message.
        **content: further fields of the answer.
    """

    def __init__(self, status: int, code: str, message: str, **content: Any):
        super().__init__(message)
        self.status, self.code, self.content = status, code, {"error": message, **content}


@dataclass
class LocalHub:
    """The state of the stand-in.

    Attributes:
        endpoint: its address, for `HF_ENDPOINT`.
        repositories: repositories by name.
        objects: large files by SHA-256.
        requests: method and path of every request, in order.
    """

    endpoint: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a client: this address, a token, and an empty cache in `home`."""
        # The Xet protocol for large files has a client of its own; without it, the client uses Git LFS.
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
        }

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise HubError(404, "RepoNotFound", name)
        return self.repositories[name]

    def text(self, name: str, path: str, revision: str = "main") -> str:
        return self.repository(name).files(revision)[path].content.decode()


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Run the stand-in in a thread of this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = LocalHub(endpoint=f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- answers ---

_ANSWERS: list[tuple[str, re.Pattern, Callable]] = []
_REPO, _REVISION, _PATH = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)", r"(?P<path>.+)"


def _answers(methods: str, pattern: str) -> Callable:
    def register(function: Callable) -> Callable:
        _ANSWERS.extend((method, re.compile(pattern), function) for method in methods.split())
        return function

    return register


@_answers("GET", "/api/whoami-v2")
def _whoami(hub: LocalHub, request: _Handler) -> Any:
    return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}


@_answers("POST", "/api/validate-yaml")
def _validate_card(hub: LocalHub, request: _Handler) -> Any:
    try:
        metadata = _metadata(request.json()["content"])
        errors = [] if isinstance(metadata, dict) else ["metadata: must be a mapping"]
        if not errors and "model-index" in metadata:
            errors = [f"model-index[{i}]: no name" for i, m in enumerate(metadata["model-index"]) if "name" not in m]
    except yaml.YAMLError as error:
        errors = [str(error)]
    if errors:
        raise HubError(400, "", "", errors=[{"message": message} for message in errors], warnings=[])
    return {"errors": [], "warnings": []}


@_answers("POST", "/api/repos/create")
def _create(hub: LocalHub, request: _Handler) -> Any:
    wanted = request.json()
    name = f"{wanted.get('organization') or USER}/{wanted['name']}"
    if name in hub.repositories:
        raise HubError(409, "", "You already created this model repo", url=f"{hub.endpoint}/{name}")
    # The client sent `private` before version 1.9, and `visibility` since.
    is_private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
    hub.repositories[name] = Repository(is_private=is_private)
    hub.repositories[name].commit("main", {".gitattributes": StoredFile(b"*.safetensors filter=lfs\n")})
    return {"url": f"{hub.endpoint}/{name}", "name": name}


@_answers("POST", rf"/api/models/{_REPO}/(?P<kind>branch|tag)/{_REVISION}")
def _create_reference(hub: LocalHub, request: _Handler, repo: str, kind: str, revision: str) -> Any:
    repository = hub.repository(repo)
    # Of a branch, the path has its name; of a tag, what it is put on.
    wanted = request.json()
    names = repository.branches if kind == "branch" else repository.tags
    name, start = (revision, wanted.get("startingPoint", "main")) if kind == "branch" else (wanted["tag"], revision)
    if name in names:
        raise HubError(409, "", f"Reference already exists: {name}")
    names[name] = repository.find(start)
    return {}


@_answers("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}")
def _preupload(hub: LocalHub, request: _Handler, repo: str, revision: str) -> Any:
    known = hub.repository(repo).files(revision)
    answers = []
    for file in request.json()["files"]:
        path = file["path"]
        is_large = any(fnmatch(path.rpartition("/")[2], pattern) for pattern in LARGE_FILES)
        answer = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        answers.append(answer | ({"oid": known[path].oid} if path in known else {}))
    return {"files": answers}


@_answers("POST", rf"/{_REPO}\.git/info/lfs/objects/batch")
def _start_upload(hub: LocalHub, request: _Handler, repo: str) -> Any:
    hub.repository(repo)
    objects = []
    for wanted in request.json()["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer = {"oid": oid, "size": size}
        if oid not in hub.objects:
            address = f"{hub.endpoint}/objects/{oid}"
            upload: dict = {"href": address}
            if size > PART_SIZE:
                numbers = range(1, -(-size // PART_SIZE) + 1)
                upload["header"] = {str(number): f"{address}/{number}" for number in numbers}
                upload["header"]["chunk_size"] = str(PART_SIZE)
            answer["actions"] = {"upload": upload, "verify": {"href": f"{address}/verify"}}
        objects.append(answer)
    return {"transfer": "basic", "objects": objects}


@_answers("PUT", "/objects/(?P<oid>[0-9a-f]{64})")
def _upload(hub: LocalHub, request: _Handler, oid: str) -> Any:
    _store(hub, oid, request.body)
    return {}


@_answers("PUT", "/objects/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)")
def _upload_part(hub: LocalHub, request: _Handler, oid: str, number: str) -> Any:
    hub.parts[oid, int(number)] = request.body
    request.headers_to_send["ETag"] = hashlib.md5(request.body).hexdigest()
    return {}


@_answers("POST", "/objects/(?P<oid>[0-9a-f]{64})")
def _join_parts(hub: LocalHub, request: _Handler, oid: str) -> Any:
    parts = request.json()["parts"]
    contents = [hub.parts.pop((oid, part["partNumber"])) for part in parts]
    wrong = [p["partNumber"] for p, c in zip(parts, contents, strict=True) if p["etag"] != hashlib.md5(c).hexdigest()]
    if wrong:
        raise HubError(400, "", f"wrong checksums of parts {wrong}")
    _store(hub, oid, b"".join(contents))
    return {}


@_answers("POST", "/objects/(?P<oid>[0-9a-f]{64})/verify")
def _verify(hub: LocalHub, request: _Handler, oid: str) -> Any:
    if len(hub.objects.get(oid, b"")) != request.json()["size"]:
        raise HubError(404, "", f"{oid} was not uploaded")
    return {}


def _store(hub: LocalHub, oid: str, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != oid:
        raise HubError(400, "", f"the content is not that of {oid}")
    hub.objects[oid] = content


@_answers("POST", rf"/api/models/{_REPO}/commit/{_REVISION}")
def _commit(hub: LocalHub, request: _Handler, repo: str, revision: str) -> Any:
    repository = hub.repository(repo)
    if revision not in repository.branches:
        raise HubError(404, "RevisionNotFound", revision)
    files = dict(repository.files(revision))
    for line in request.body.splitlines():
        key, value = (entry := json.loads(line))["key"], entry["value"]
        if key == "file":
            files[value["path"]] = StoredFile(b64decode(value["content"]))
        elif key == "lfsFile":
            files[value["path"]] = StoredFile(hub.objects[value["oid"]], is_large=True)
        elif key == "deletedFile":
            del files[value["path"]]
        elif key != "header":
            raise HubError(400, "", f"unknown operation {key!r}")
    name = repository.commit(revision, files)
    return {"commitUrl": f"{hub.endpoint}/{repo}/commit/{name}", "commitOid": name, "success": True}


@_answers("GET", rf"/api/models/{_REPO}(/revision/{_REVISION})?")
def _info(hub: LocalHub, request: _Handler, repo: str, revision: str | None) -> Any:
    repository = hub.repository(repo)
    commit = repository.find(revision or "main")
    files = repository.commits[commit]
    card = _metadata(files["README.md"].content.decode()) if "README.md" in files else {}
    tags = [*card.get("tags", []), *([f"license:{card['license']}"] if "license" in card else [])]
    return {
        "id": repo,
        "modelId": repo,
        "sha": commit,
        "private": repository.is_private,
        "tags": tags,
        "cardData": card,
    } | {"siblings": [{"rfilename": path} for path in sorted(files)]}


def _metadata(card: str) -> Any:
    block = REGEX_YAML_BLOCK.search(card)
    return yaml.safe_load(block[2]) if block else {}


@_answers("GET", rf"/api/models/{_REPO}/refs")
def _references(hub: LocalHub, request: _Handler, repo: str) -> Any:
    def listed(names: dict[str, str], kind: str) -> list[dict]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in names.items()]

    repository = hub.repository(repo)
    return {"branches": listed(repository.branches, "heads"), "tags": listed(repository.tags, "tags"), "converts": []}


@_answers("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(/{_PATH})?")
def _tree(hub: LocalHub, request: _Handler, repo: str, revision: str, path: str | None) -> Any:
    folder = f"{path}/" if path else ""
    files = {name: file for name, file in hub.repository(repo).files(revision).items() if name.startswith(folder)}
    if folder and not files:
        raise HubError(404, "EntryNotFound", folder)
    return [
        {"type": "file", "path": name, "size": len(file.content), "oid": file.oid}
        | ({"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 134}} if file.is_large else {})
        for name, file in files.items()
        if "recursive=true" in request.query.lower() or "/" not in name.removeprefix(folder)
    ]


@_answers("GET HEAD", rf"/{_REPO}/resolve/{_REVISION}/{_PATH}")
def _resolve(hub: LocalHub, request: _Handler, repo: str, revision: str, path: str) -> Any:
    commit = hub.repository(repo).find(revision)
    request.headers_to_send["X-Repo-Commit"] = commit
    file = hub.repository(repo).commits[commit].get(path)
    if file is None:
        raise HubError(404, "EntryNotFound", path)
    if file.is_large:
        request.headers_to_send |= {
            # On the Hub, large files come from another host, which the client does not ask for commits.
            "Location": f"{hub.endpoint}/objects/{file.oid}".replace("127.0.0.1", "localhost"),
            "X-Linked-ETag": f'"{file.oid}"',
            "X-Linked-Size": str(len(file.content)),
        }
        request.status = 302
        return b""
    request.headers_to_send["ETag"] = f'"{file.oid}"'
    return file.content


@_answers("GET HEAD", "/objects/(?P<oid>[0-9a-f]{64})")
def _download(hub: LocalHub, request: _Handler, oid: str) -> Any:
    return hub.objects[oid]


class _Handler(BaseHTTPRequestHandler):
    """Finds the function that answers a request, and sends what it returns: bytes, or an object as JSON."""

    protocol_version = "HTTP/1.1"
    # Answers are complete when they are sent; waiting for more would delay each by 40 ms.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        hub: LocalHub = self.server.hub  # type: ignore[attr-defined]
        address = urlsplit(self.path)
        self.query, self.body = address.query, self._read_body()
        self.status, self.headers_to_send = 200, {}
        hub.requests.append((self.command, unquote(address.path)))
        try:
            content = self._answer(hub, address.path)
        except HubError as error:
            self.status, content = error.status, error.content
            self.headers_to_send |= {"X-Error-Code": error.code, "X-Error-Message": str(error)}
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(self.status)
        for name, value in {"Content-Length": str(len(data)), **self.headers_to_send}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self, hub: LocalHub, path: str) -> Any:
        is_object = path.startswith("/objects/")
        needs_token = self.command in ("POST", "PUT") or path == "/api/whoami-v2"
        if needs_token and not is_object and self.headers["Authorization"] != f"Bearer {TOKEN}":
            raise HubError(401, "", "Invalid credentials in Authorization header")
        for method, pattern, function in _ANSWERS:
            if method == self.command and (match := pattern.fullmatch(path)):
                arguments = {name: value and unquote(value) for name, value in match.groupdict().items()}
                return function(hub, self, **arguments)
        raise HubError(404, "", f"no answer to {self.command} {path}")

    def json(self) -> Any:
        return json.loads(self.body)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *args: object) -> None:
        pass
