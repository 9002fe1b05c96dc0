"""
A small Hub on 127.0.0.1 that the real `huggingface_hub` client can be pointed at with `HF_ENDPOINT`.

Keeps repositories in memory: accounts, private repositories, commits, branches, tags, pull requests, regular and LFS
files (behind a redirect, as on the Hub). Any request can be made to fail, see [`HubServer.fail`]. To look around by hand:

    python tests/hub_server.py
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "other"}  # some of those that the Hub knows
LFS_SUFFIXES = (".safetensors", ".png", ".bin")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Repository:
    type: str
    id: str
    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # commit -> path -> id of the content
    messages: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, str], message: str) -> str:
        parent = self.branches.get(branch)
        sha = hashlib.sha1(json.dumps([self.id, parent, files, message]).encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.branches[branch] = files, message, sha
        self.parents[sha] = parent
        return sha

    def history(self, branch: str) -> list[str]:
        """The messages of the commits of a branch, the newest first."""
        sha, found = self.branches[branch], []
        while sha is not None:
            found.append(self.messages[sha])
            sha = self.parents[sha]
        return found

    def resolve(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.branches.get(revision.removeprefix("refs/heads/")) or self.tags.get(revision)


@dataclass
class Fault:
    method: str
    pattern: re.Pattern
    status: int | None  # None: cut the connection in the middle
    times: int
    headers: dict[str, str]


class HubServer:
    """
    Attributes:
        url: For `HF_ENDPOINT`.
        tokens: Token to account. A token may write to its account's repositories alone.
        private_by_default: Accounts whose new repositories are private unless the request says otherwise.
        requests: `(method, path, status)` of everything that was asked.
    """

    def __init__(self):
        self.tokens = {"hf_writer": "writer", "hf_other": "other"}
        self.private_by_default: set[str] = set()
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int | None]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        server = self

        class Handler(_Handler):
            hub = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home, token: str | None = "hf_writer") -> dict[str, str]:
        """Variables that make a fresh process use this Hub, with its own cache and no token of this machine."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": token or "",
        }
        return variables

    def fail(self, method: str, pattern: str, status: int | None, *, times: int = 10**9, **headers: str) -> None:
        """Answers requests whose path holds `pattern` with `status`; `None` cuts the connection in the middle."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(method, re.compile(pattern), status, times, headers))

    @contextmanager
    def failing(self, method: str, pattern: str, status: int | None, **kwargs) -> Iterator[None]:
        self.fail(method, pattern, status, **kwargs)
        try:
            yield
        finally:
            self.faults.clear()

    def files(self, repo_id: str, *, type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Path to content."""
        repository = self.repositories[type, repo_id]
        return {path: self.contents[key] for path, key in repository.commits[repository.resolve(revision)].items()}

    def store(self, content: bytes, lfs: bool) -> str:
        key = (
            hashlib.sha256(content).hexdigest()
            if lfs
            else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        )
        self.contents[key] = content
        return key

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.pattern.search(path) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


class _Answer(Exception):
    def __init__(self, status: int, body=None, **headers: str):
        self.status = status
        self.body = body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def _error(status: int, message: str, code: str | None = None) -> _Answer:
    headers = {"X_Error_Message": message, **({"X_Error_Code": code} if code else {})}
    return _Answer(status, {"error": message}, **headers)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_):
        pass

    # Each route: method, pattern, name of the method below. `{repo}` is an optional type prefix and an id.
    _API = r"/api/(?P<type>model|space|dataset)s/(?P<id>[^/]+/[^/]+)"
    _WEB = r"/(?:(?P<type>spaces|datasets)/)?(?P<id>[^/]+/[^/]+?)"
    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", _API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", _API + r"/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", _API + r"/refs", "refs"),
        ("GET", _API + r"/auth-check(?P<write>/write)?", "auth_check"),
        ("POST", _API + r"/restart", "restart"),
        ("POST", _API + r"/branch/(?P<branch>[^/]+)", "create_branch"),
        ("POST", _API + r"/super-squash/(?P<branch>[^/]+)", "super_squash"),
        ("POST", _API + r"/tag/(?P<revision>[^/]+)", "create_tag"),
        ("GET", _API + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", _WEB + r"\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<key>[0-9a-f]{64})", "lfs_put"),
        ("GET", r"/lfs/(?P<key>[0-9a-f]{64})", "lfs_get"),
        ("GET", _WEB + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def _serve(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        fault = self.hub.take_fault(self.command, url.path)
        body = self._read_body(stop_half_way=fault is not None and fault.status is None)
        try:
            if fault is not None and fault.status is not None:
                raise _Answer(fault.status, {"error": "made to fail"}, **fault.headers)
            if fault is not None and self.command not in ("GET", "HEAD"):
                raise ConnectionAbortedError
            method = "GET" if self.command == "HEAD" else self.command
            for wanted, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if wanted == method and match:
                    self.body = body
                    groups = {
                        key: None if value is None else unquote(value) for key, value in match.groupdict().items()
                    }
                    with self.hub.lock:
                        getattr(self, name)(**groups)
            raise _error(404, f"nothing at {self.command} {url.path}")
        except _Answer as answer:
            self.hub.requests.append((self.command, url.path, answer.status))
            self._send(answer, cut=fault is not None and fault.status is None)
        except ConnectionAbortedError:
            self.hub.requests.append((self.command, url.path, None))
            self.close_connection = True
            self.connection.close()

    def _read_body(self, stop_half_way: bool) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length // 2 if stop_half_way else length)

    def _send(self, answer: _Answer, cut: bool):
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range") or ""):
            start = int(match[1])
            if answer.status == 200 and start:
                answer.status = 206
                answer.headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                body = body[start:]
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cut:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(body)

    def _account(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if token and token not in self.hub.tokens:
            raise _error(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repository(self, type: str | None, id: str, *, write: bool = False) -> Repository:
        type = (type or "model").removesuffix("s")
        account, owner = self._account(), id.split("/")[0]
        repository = self.hub.repositories.get((type, id))
        if repository is None or (repository.private and account != owner):
            raise _error(401 if account is None else 404, "Repository not found", "RepoNotFound")
        if write and account != owner:
            raise _error(401 if account is None else 403, "You don't have the required permissions")
        return repository

    def _commit(self, repository: Repository, revision: str | None) -> str:
        commit = repository.resolve(revision or "main")
        if commit is None:
            raise _error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _file(self, path: str, key: str) -> dict:
        content = self.hub.contents[key]
        entry = {"type": "file", "path": path, "size": len(content), "oid": key}
        if len(key) == 64:
            entry["oid"] = hashlib.sha1(key.encode()).hexdigest()
            entry["lfs"] = {"oid": key, "size": len(content), "pointerSize": 134}
        return entry

    def whoami(self):
        account = self._account()
        if account is None:
            raise _error(401, "Invalid username or password.")
        raise _Answer(200, {"type": "user", "name": account, "orgs": [], "auth": {"type": "access_token"}})

    def create(self):
        request = json.loads(self.body)
        account, type = self._account(), request.get("type") or "model"
        if account is None:
            raise _error(401, "Invalid username or password.")
        owner = request.get("organization") or account
        id = f"{owner}/{request['name']}"
        if owner != account:
            raise _error(403, f"You don't have the rights to create a {type} under the namespace {owner!r}")
        url = f"{self.hub.url}/{'' if type == 'model' else type + 's/'}{id}"
        if (type, id) in self.hub.repositories:
            raise _Answer(409, {"error": f"You already created this {type} repo", "url": url})
        if type == "space" and "sdk" not in request:
            raise _error(400, "sdk is required")
        default = "private" if owner in self.hub.private_by_default else "public"
        private = request.get("visibility", default) == "private"
        self.hub.repositories[type, id] = Repository(type, id, private)
        raise _Answer(200, {"url": url, "id": id, "name": id})

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            raise _Answer(400, {"errors": [{"message": str(error)}], "warnings": []}) from None
        if metadata and metadata.get("license", "mit") not in LICENSES:
            raise _Answer(400, {"errors": [{"message": '"license" must be one of the known ones'}], "warnings": []})
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        raise _Answer(200, {"errors": [], "warnings": warnings})

    def preupload(self, type: str, id: str, revision: str):
        repository = self._repository(type, id, write=True)
        files = repository.commits[self._commit(repository, revision)]
        raise _Answer(
            200,
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                        "oid": files.get(file["path"]),
                    }
                    for file in json.loads(self.body)["files"]
                ]
            },
        )

    def lfs_batch(self, type: str | None, id: str):
        self._repository(type, id, write=True)
        objects = json.loads(self.body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.contents:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, key: str):
        if hashlib.sha256(self.body).hexdigest() != key:
            raise _error(400, "content does not match its hash")
        self.hub.contents[key] = self.body
        raise _Answer(200, {})

    def lfs_get(self, key: str):
        raise _Answer(200, self.hub.contents[key], ETag=f'"{key}"')

    def commit(self, type: str, id: str, revision: str):
        repository = self._repository(type, id, write=True)
        files, header = dict(repository.commits[self._commit(repository, revision)]), {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.contents:
                    raise _error(400, f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _error(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise _error(400, f"unknown operation {key}")
        answer = {"success": True}
        branch = revision.removeprefix("refs/heads/")
        if self.query.get("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
            repository.branches[f"refs/pr/{number}"] = repository.branches[branch]
            branch = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{id}/discussions/{number}"
        answer["commitOid"] = repository.commit(branch, files, header["summary"])
        answer["commitUrl"] = f"{self.hub.url}/{id}/commit/{answer['commitOid']}"
        raise _Answer(200, answer)

    def info(self, type: str, id: str, revision: str | None):
        repository = self._repository(type, id)
        sha = self._commit(repository, revision)
        files = repository.commits[sha]
        answer = {
            "_id": "0", "id": id, "modelId": id, "sha": sha, "private": repository.private, "gated": False,
            "disabled": False, "lastModified": DATE, "createdAt": DATE, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": path} for path in files],
        }  # fmt: skip
        if "README.md" in files:
            match = re.match(r"---\n(.*?)\n---\n", self.hub.contents[files["README.md"]].decode(), re.DOTALL)
            metadata = yaml.safe_load(match[1]) if match else {}
            answer |= {"cardData": metadata, "library_name": metadata.get("library_name")}
        raise _Answer(200, answer)

    def tree(self, type: str, id: str, revision: str, path: str | None):
        repository = self._repository(type, id)
        files = repository.commits[self._commit(repository, revision)]
        prefix = f"{path}/" if path else ""
        raise _Answer(200, [self._file(name, key) for name, key in files.items() if name.startswith(prefix)])

    def paths_info(self, type: str, id: str, revision: str):
        repository = self._repository(type, id)
        files = repository.commits[self._commit(repository, revision)]
        try:
            paths = json.loads(self.body)["paths"]
        except json.JSONDecodeError:
            paths = parse_qs(self.body.decode())["paths"]
        raise _Answer(200, [self._file(path, files[path]) for path in paths if path in files])

    def refs(self, type: str, id: str):
        repository = self._repository(type, id)
        pull_requests = {name: sha for name, sha in repository.branches.items() if name.startswith("refs/pr/")}
        branches = {name: sha for name, sha in repository.branches.items() if name not in pull_requests}

        def as_list(refs, prefix):
            return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]

        answer = {"branches": as_list(branches, "refs/heads/"), "tags": as_list(repository.tags, "refs/tags/")}
        raise _Answer(200, {**answer, "converts": [], "pullRequests": as_list(pull_requests, "")})

    def auth_check(self, type: str, id: str, write: str | None):
        self._repository(type, id, write=write is not None)
        raise _Answer(200, {})

    def create_branch(self, type: str, id: str, branch: str):
        repository = self._repository(type, id, write=True)
        start = json.loads(self.body or b"{}").get("startingPoint")
        if branch in repository.branches:
            raise _error(409, f"Reference already exists: refs/heads/{branch}")
        repository.branches[branch] = self._commit(repository, start)
        raise _Answer(200, {})

    def super_squash(self, type: str, id: str, branch: str):
        repository = self._repository(type, id, write=True)
        files = repository.commits[self._commit(repository, branch)]
        del repository.branches[branch]
        repository.commit(branch, files, json.loads(self.body)["message"])
        raise _Answer(200, {})

    def restart(self, type: str, id: str):
        self._repository(type, id, write=True)
        raise _Answer(200, {"stage": "RUNNING_BUILDING"})

    def create_tag(self, type: str, id: str, revision: str):
        repository = self._repository(type, id, write=True)
        tag = json.loads(self.body)["tag"]
        if tag in repository.tags:
            raise _error(409, f"Tag reference exists already: {tag}")
        repository.tags[tag] = self._commit(repository, revision)
        raise _Answer(200, {})

    def resolve(self, type: str | None, id: str, revision: str, path: str):
        repository = self._repository(type, id)
        commit = self._commit(repository, revision)
        key = repository.commits[commit].get(path)
        if key is None:
            raise _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if len(key) == 64:
            raise _Answer(
                302,
                {},
                Location=f"{self.hub.url.replace('127.0.0.1', 'localhost')}/lfs/{key}",  # another host, as on the Hub
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{key}"',
                X_Linked_Size=str(len(self.hub.contents[key])),
            )
        raise _Answer(200, self.hub.contents[key], ETag=f'"{key}"', X_Repo_Commit=commit)


if __name__ == "__main__":
    with HubServer() as hub:
        print(
            f"export HF_ENDPOINT={hub.url} HF_TOKEN=hf_writer HF_HUB_DISABLE_XET=1   # account: writer; Ctrl-C ends it"
        )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
