"""A loopback server that speaks the wire protocol of the Hugging Face Hub to its unmodified clients.

It knows repositories of datasets, and keeps real bytes in real commits.
``python tests/loopback.py --user NAME --token TOKEN`` prints its endpoint and serves until killed.
"""

import argparse
import base64
import hashlib
import importlib
import json
import os
import re
import secrets
import socket
import socketserver
import sys
import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlencode

import yaml

LARGEST_REGULAR = 10 * 1024**2
"""Bytes above which a file becomes an LFS object whatever its name is."""


@dataclass
class Request:
    """A request as it was received.

    Attributes:
        path: As sent, with revisions quoted, without the query; a whole URL if meant for another host.
        n_bytes: How much of its body was read.
        headers: By their names in lower case.
        status: Of the answer; None where there was none, or not yet.
    """

    method: str
    path: str
    query: str
    n_bytes: int
    authorization: str | None
    headers: dict[str, str] = field(repr=False)
    status: int | None = None


@dataclass
class Fault:
    """What goes wrong with some requests.

    Attributes:
        method: A pattern of their whole method.
        path: A pattern that is searched in their path, as sent and without the query.
        status: Of an error that is the answer.
        headers: Added to the answer.
        message: Of the error.
        error_code: The Hub's, such as ``RepoNotFound``.
        drop: Closes the connection: ``"before"`` anything is done, with half of the body read;
            ``"halfway"`` through the body of the answer; ``"after"`` it was done, without an answer.
        delay: Seconds before the answer, or before the connection closes.
        times: How often it strikes; None for ever.
        after: How many such requests pass first.
        done: Whether the error is told although what was asked for has been done.
    """

    method: str
    path: str
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = ""
    error_code: str | None = None
    drop: Literal["before", "halfway", "after"] | None = None
    delay: float = 0.0
    times: int | None = None
    after: int = 0
    done: bool = False
    _met: int = field(default=0, init=False)

    def strikes(self, method: str, path: str) -> bool:
        """Whether it strikes this request, which is counted if it is such a one."""
        if not (re.fullmatch(self.method, method) and re.search(self.path, path)):
            return False
        self._met += 1
        return self._met > self.after and (self.times is None or self._met <= self.after + self.times)


@dataclass(frozen=True)
class Blob:
    """A file: its git id, its size, and the sha256 of its LFS object if it is one."""

    oid: str
    size: int
    lfs: str | None = None

    def lfs_info(self, key: str) -> dict[str, Any]:
        """What lists of files say of its LFS object, with the sha256 under a key."""
        if self.lfs is None:
            return {}
        pointer_size = len(_pointer(self.lfs, self.size))
        return {"lfs": {key: self.lfs, "size": self.size, "pointerSize": pointer_size}}


@dataclass(frozen=True)
class Commit:
    """A commit; its tree has files by path, its directories have ids by path, the root an empty one."""

    id: str
    parent: str | None
    title: str
    description: str
    author: str
    date: datetime
    tree: Mapping[str, Blob] = field(repr=False)
    directories: Mapping[str, str] = field(repr=False)

    def oid(self, path: str) -> str | None:
        """The id of a file or a directory."""
        return self.tree[path].oid if path in self.tree else self.directories.get(path)

    def info(self) -> dict[str, Any]:
        date, authors = _iso(self.date), [{"user": self.author}]
        named = {"id": self.id, "title": self.title, "message": self.description}
        return {**named, "date": date, "authors": authors}


class Repo:
    """A repository, which begins with a commit on ``main``."""

    def __init__(self, repo_id: str, private: bool, directory: Path | None) -> None:
        self.id = repo_id
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self._contents: dict[str, bytes | Path] = {}
        self._directory = directory and directory / repo_id
        attributes = self.add(".gitattributes", b"*.parquet filter=lfs diff=lfs merge=lfs -text\n")
        self.commit("main", {".gitattributes": attributes}, "initial commit", "", "system")

    def add(self, path: str, data: bytes) -> Blob:
        """Keep a file."""
        if upload_mode(path, len(data)) == "lfs":
            return self.pointer(self.store(data))
        blob = Blob(_git_id("blob", data), len(data))
        self._contents[blob.oid] = data
        return blob

    def store(self, data: bytes) -> str:
        """Keep an LFS object; gives its sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        self._contents[sha256] = data
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._contents[sha256] = path = self._directory / sha256
            path.write_bytes(data)
        return sha256

    def stores(self, sha256: str) -> bool:
        return sha256 in self._contents

    def pointer(self, sha256: str) -> Blob:
        """The file that an LFS object is."""
        size = len(self.read(sha256))
        return Blob(_git_id("blob", _pointer(sha256, size)), size, sha256)

    def read(self, key: str) -> bytes:
        """The content of a git id or of an LFS object."""
        data = self._contents[key]
        return data if isinstance(data, bytes) else data.read_bytes()

    def find(self, revision: str) -> Commit:
        """The commit of a branch or of an id."""
        commit_id = self.branches.get(revision, revision)
        if commit_id not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit_id]

    def commit(
        self, branch: str, tree: Mapping[str, Blob], title: str, description: str, author: str
    ) -> Commit:
        parent, date = self.branches.get(branch), datetime.now(UTC)
        directories = _directories(tree)
        named = f"{directories['']} {parent} {branch} {author} {date} {title}\n{description}"
        commit_id = _git_id("commit", named.encode())
        made = Commit(commit_id, parent, title, description, author, date, tree, directories)
        self.commits[commit_id] = made
        self.branches[branch] = commit_id
        return made

    def history(self, commit: Commit) -> Iterator[Commit]:
        """A commit and those before it, newest first."""
        yield commit
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            yield commit

    def entry(self, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
        """What a list of a tree says of a file or directory."""
        blob = commit.tree.get(path)
        entry: dict[str, Any] = {"path": path, "oid": commit.oid(path), "type": "directory", "size": 0}
        if blob is not None:
            entry |= {"type": "file", "size": blob.size, **blob.lfs_info("oid")}
        if expand:
            same = takewhile(lambda older: older.oid(path) == entry["oid"], self.history(commit))
            *_, entry["lastCommit"] = (older.info() for older in same)
        return entry


def upload_mode(path: str, size: int) -> str:
    """How a file has to be sent: as an LFS object, or within the commit."""
    return "lfs" if path.endswith((".parquet", ".png")) or size > LARGEST_REGULAR else "regular"


def _git_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _directories(tree: Mapping[str, Blob]) -> dict[str, str]:
    """An id of the content of each directory."""
    below: dict[str, list[str]] = defaultdict(list, {"": []})
    for path, blob in sorted(tree.items()):
        directory = path
        while directory:
            directory = directory.rpartition("/")[0]
            below[directory].append(f"{blob.oid} {path}")
    return {directory: _git_id("tree", "\n".join(files).encode()) for directory, files in below.items()}


def _iso(date: datetime) -> str:
    return date.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class User:
    """A token and its user; organizations have the user's role."""

    name: str
    role: str
    orgs: Mapping[str, str]
    fine_grained: Mapping[str, Any]

    def may(self, action: Literal["read", "write"], repo_id: str) -> bool:
        """Whether the token lets its user see or change a private repository."""
        namespace = repo_id.partition("/")[0]
        role = "write" if namespace == self.name else self.orgs.get(namespace)
        if self.role != "fineGrained":
            return role is not None and (action == "read" or self.role == role == "write")
        needed = {"repo.write"} if action == "write" else {"repo.write", "repo.content.read"}
        return any(
            needed.intersection(scope["permissions"])
            for scope in self.fine_grained.get("scoped", ())
            if scope["entity"]["name"] in (namespace, repo_id)
        )

    def whoami(self) -> dict[str, Any]:
        token: dict[str, Any] = {
            "displayName": "loopback",
            "role": self.role,
            "createdAt": _iso(datetime.now(UTC)),
        }
        token |= {"fineGrained": self.fine_grained} if self.role == "fineGrained" else {}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.orgs.items()]
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": self.name, "fullname": self.name, "orgs": orgs, "auth": auth}


@dataclass
class Answer:
    """What is sent back."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An error, with the headers from which the Hub's clients choose an exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.answer = _json({"error": message, **body}, status)
        # A header is one line of few characters.
        line = " ".join(message.split()).encode("ascii", "replace").decode()
        self.answer.headers |= {"X-Error-Message": line} | ({"X-Error-Code": code} if code else {})


def _json(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


@dataclass(frozen=True)
class Call:
    """A request on its way to an endpoint."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def asks(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("true", "1")


class LoopbackHub:
    """The server, which keeps what it was told when it stops and starts again.

    Args:
        directory: Where the bytes of LFS objects are kept; None keeps them in memory.
        port: Where it listens; 0 finds a free one, which it then keeps.

    Attributes:
        page_size: How many entries of a tree or commits of a history one answer holds.
        requests: Those received.
        before: Called with method and path before a request is looked at.
    """

    def __init__(self, directory: Path | None = None, port: int = 0) -> None:
        self.page_size = 1000
        self.requests: list[Request] = []
        self.before: Callable[[str, str], None] | None = None
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, User] = {}
        self.secret = secrets.token_hex()
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._directory = directory
        self._port = port
        self._faults: list[Fault] = []
        self._uploaded: Counter[str] = Counter()
        self._server: _Server | None = None

    @property
    def endpoint(self) -> str:
        """Its address, once it has started."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def storage(self) -> str:
        """Its address as another host, to which clients must not send their token."""
        return f"http://localhost:{self._port}"

    def start(self) -> None:
        self.stopping.clear()
        self._server = _Server(self, self._port)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop, and close the connections of clients."""
        if self._server is not None:
            self.stopping.set()
            self._server.shutdown()
            self._server.server_close()
            self._server.disconnect()
            self._server = None

    def __enter__(self) -> "LoopbackHub":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add_user(
        self,
        name: str,
        token: str,
        role: str = "write",
        orgs: Sequence[str] = (),
        fine_grained: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a token of a user.

        Args:
            name: Name of the user.
            token: The token.
            role: What it may do: read, write or fineGrained.
            orgs: The user's organizations, where the user may write, or only read as in ``acme:read``.
            fine_grained: What a fine-grained token may do, as whoami tells it.
        """
        roles = {org.partition(":")[0]: org.partition(":")[2] or "write" for org in orgs}
        self.users[token] = User(name, role, roles, fine_grained or {})

    def add_repo(self, repo_id: str, private: bool = False) -> None:
        self.repos[repo_id] = Repo(repo_id, private, self._directory)

    def add_branch(self, repo_id: str, branch: str) -> None:
        """A branch that begins at the end of main."""
        with self._lock:
            branches = self.repos[repo_id].branches
            branches[branch] = branches["main"]

    def commit(
        self, repo_id: str, branch: str, files: Mapping[str, bytes | None], message: str = "by hand"
    ) -> str:
        """Commit as another writer does; a file without bytes is deleted. Gives the commit's id."""
        with self._lock:
            repo = self.repos[repo_id]
            tree = dict(repo.find(branch).tree)
            for path, data in files.items():
                if data is None:
                    del tree[path]
                else:
                    tree[path] = repo.add(path, data)
            return repo.commit(branch, tree, message, "", "another").id

    def files(self, repo_id: str, revision: str) -> dict[str, bytes]:
        """The bytes of every file."""
        repo = self.repos[repo_id]
        tree = repo.find(revision).tree
        return {path: repo.read(tree[path].lfs or tree[path].oid) for path in sorted(tree)}

    def commits(self, repo_id: str, branch: str) -> list[Commit]:
        """The commits of a branch, newest first."""
        repo = self.repos[repo_id]
        return list(repo.history(repo.find(branch)))

    def branches(self, repo_id: str) -> dict[str, str]:
        """The ids of the newest commits, by branch."""
        return dict(self.repos[repo_id].branches)

    def is_private(self, repo_id: str) -> bool:
        return self.repos[repo_id].private

    def fail(self, fault: Fault) -> None:
        """Let something go wrong from now on."""
        with self._lock:
            self._faults.append(fault)

    def heal(self) -> None:
        """Let nothing go wrong any more."""
        with self._lock:
            self._faults.clear()

    def forget(self) -> None:
        """Clear the list of requests."""
        self.requests.clear()

    def uploaded(self) -> Counter[str]:
        """How often the bytes of each LFS object have arrived in whole, by sha256."""
        with self._lock:
            return Counter(self._uploaded)

    def fault(self, method: str, path: str) -> Fault:
        """The first fault that strikes a request, or one that changes nothing."""
        with self._lock:
            striking = [fault for fault in self._faults if fault.strikes(method, path)]
        return striking[0] if striking else Fault(method, path)

    def answer(self, call: Call, fault: Fault) -> Answer:
        """Do what is asked for, unless a fault has an answer of its own."""
        with self._lock:
            name = call.path.rpartition("/")[2]
            if call.method == "PUT" and hashlib.sha256(call.body).hexdigest() == name:
                self._uploaded[name] += 1
            if fault.status is None or fault.done:
                answer = _Endpoints(self).answer(call)
        if fault.status is not None:
            answer = Refusal(fault.status, fault.message, fault.error_code).answer
        return answer


_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []

_PARTS = {"repo": "[^/]+/[^/]+", "revision": "[^/]+", "path": ".+", "sha256": "[0-9a-f]{64}"}


def _route(method: str, path: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    path = path.replace("~", "/api/datasets/{repo}")
    pattern = re.sub(r"{(\w+)}", lambda part: f"(?P<{part[1]}>{_PARTS[part[1]]})", path)

    def register(endpoint: Callable[..., Answer]) -> Callable[..., Answer]:
        _ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


class _Endpoints:
    """What can be asked for, with the variable parts of its path."""

    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub

    def answer(self, call: Call) -> Answer:
        try:
            return self._find(call)()
        except Refusal as refusal:
            return refusal.answer
        except Exception:
            return _json({"error": traceback.format_exc()}, 500)

    def _find(self, call: Call) -> Callable[[], Answer]:
        method = "GET" if call.method == "HEAD" else call.method
        for wanted, pattern, endpoint in _ROUTES:
            if method == wanted and (match := pattern.fullmatch(call.path)):
                parts = {name: unquote(part or "") for name, part in match.groupdict().items()}
                return lambda: endpoint(self, call, **parts)
        if not call.path.startswith("/"):
            raise Refusal(502, f"Nothing but {self.hub.endpoint} can be reached: {call.path}")
        if re.match("/api/(datasets|models|spaces|kernels)/|/.*/resolve/", call.path):
            raise self._not_found(self._user(call))
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def _user(self, call: Call) -> User | None:
        header = call.headers.get("authorization")
        user = self.hub.users.get((header or "").removeprefix("Bearer "))
        if header is not None and user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _known(self, call: Call) -> User:
        user = self._user(call)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def _not_found(self, user: User | None) -> Refusal:
        # What is missing and what is private must look the same.
        if user is None:
            return Refusal(401, "Invalid username or password.", "RepoNotFound")
        return Refusal(404, "Repository not found", "RepoNotFound")

    def _repo(self, call: Call, repo_id: str) -> Repo:
        user, repo = self._user(call), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not (user and user.may("read", repo_id))):
            raise self._not_found(user)
        return repo

    def _writable(self, call: Call, repo_id: str) -> tuple[Repo, User]:
        repo, user = self._repo(call, repo_id), self._user(call)
        if user is None:
            raise self._not_found(None)
        if not user.may("write", repo_id):
            raise Refusal(403, "Forbidden: your token or your role does not allow to write here")
        return repo, user

    def _branch(self, repo: Repo, branch: str) -> Commit:
        if branch not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return repo.find(branch)

    def _signature(self, path: str) -> str:
        return hashlib.sha256((self.hub.secret + path).encode()).hexdigest()

    def _signed(self, path: str) -> str:
        return f"{self.hub.storage}{path}?signature={self._signature(path)}"

    def _check_signature(self, call: Call) -> None:
        if call.query.get("signature") != [self._signature(call.path)]:
            raise Refusal(403, "The signature does not match")

    def _page(self, call: Call, entries: list[Any], size: int, info: Callable[[Any], Any]) -> Answer:
        begin = int(call.query.get("cursor", ["0"])[0])
        answer = _json([info(entry) for entry in entries[begin : begin + size]])
        if begin + size < len(entries):
            query = urlencode({**call.query, "cursor": begin + size}, doseq=True)
            answer.headers["Link"] = f'<{self.hub.endpoint}{call.path}?{query}>; rel="next"'
        return answer

    @_route("GET", "/api/whoami-v2")
    def whoami(self, call: Call) -> Answer:
        return _json(self._known(call).whoami())

    @_route("GET", "~/auth-check(?:/{path})?")
    def auth_check(self, call: Call, repo: str, path: str) -> Answer:
        check = self._writable if path == "write" else self._repo
        check(call, repo)
        return _json({})

    @_route("POST", "/api/repos/create")
    def create_repo(self, call: Call) -> Answer:
        asked, user = call.json(), self._known(call)
        if asked.get("type") != "dataset":
            raise Refusal(400, "This server knows repositories of datasets only")
        namespace = asked["organization"] or user.name
        repo_id = f"{namespace}/{asked['name']}"
        url = f"{self.hub.endpoint}/datasets/{repo_id}"
        if not user.may("write", repo_id):
            message = f"You don't have the rights to create a dataset under the namespace {namespace}"
            raise Refusal(403, message)
        if repo_id in self.hub.repos:
            raise Refusal(409, "You already created this dataset repo", url=url)
        self.hub.add_repo(repo_id, asked.get("visibility") == "private")
        return _json({"url": url, "name": repo_id})

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self, call: Call) -> Answer:
        self._user(call)
        header = re.match(r"---\n(.*?)\n---(\n|$)", call.json()["content"], re.DOTALL)
        if header is None:
            return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        try:
            valid = isinstance(yaml.safe_load(header[1]), dict)
            errors = [] if valid else [{"message": "the metadata are not a mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        return _json({"errors": errors, "warnings": []}, 400 if errors else 200)

    @_route("POST", "~/branch/{revision}")
    def create_branch(self, call: Call, repo: str, revision: str) -> Answer:
        found, _ = self._writable(call, repo)
        if revision.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a branch: {revision}")
        if revision in found.branches:
            raise Refusal(409, f"Reference refs/heads/{revision} already exists")
        found.branches[revision] = found.find(call.json().get("startingPoint", "main")).id
        return _json({}, 201)

    @_route("DELETE", "~/branch/{revision}")
    def delete_branch(self, call: Call, repo: str, revision: str) -> Answer:
        found, _ = self._writable(call, repo)
        self._branch(found, revision)
        if revision == "main":
            raise Refusal(403, "The branch main is protected and cannot be deleted")
        del found.branches[revision]
        return _json({})

    @_route("POST", "~/preupload/{revision}")
    def preupload(self, call: Call, repo: str, revision: str) -> Answer:
        found, _ = self._writable(call, repo)
        tree = found.find(revision).tree
        files = []
        for file in call.json()["files"]:
            path, mode = file["path"], upload_mode(file["path"], file["size"])
            there = {"oid": tree[path].lfs or tree[path].oid} if path in tree else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **there})
        return _json({"files": files})

    @_route("POST", "/datasets/{repo}.git/info/lfs/objects/batch")
    def batch(self, call: Call, repo: str) -> Answer:
        found, _ = self._writable(call, repo)
        objects = []
        for wanted in call.json()["objects"]:
            upload = {"href": self._signed(f"/lfs/{repo}/{wanted['oid']}"), "header": {}}
            verify = {"href": f"{self.hub.endpoint}/datasets/{repo}.git/info/lfs/objects/verify"}
            stored = found.stores(wanted["oid"])
            actions = {} if stored else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        return _json({"transfer": "basic", "objects": objects})

    @_route("PUT", "/lfs/{repo}/{sha256}")
    def put(self, call: Call, repo: str, sha256: str) -> Answer:
        self._check_signature(call)
        if hashlib.sha256(call.body).hexdigest() != sha256:
            raise Refusal(400, "The content is not what its name says")
        self.hub.repos[repo].store(call.body)
        return Answer()

    @_route("POST", "/datasets/{repo}.git/info/lfs/objects/verify")
    def verify(self, call: Call, repo: str) -> Answer:
        (found, _), wanted = self._writable(call, repo), call.json()
        if not found.stores(wanted["oid"]) or len(found.read(wanted["oid"])) != wanted["size"]:
            raise Refusal(404, "Object not found")
        return _json({})

    @_route("POST", "~/commit/{revision}")
    def commit(self, call: Call, repo: str, revision: str) -> Answer:
        found, user = self._writable(call, repo)
        head = self._branch(found, revision)
        (_, header), *changes = (json.loads(line).values() for line in call.body.splitlines())
        if not head.id.startswith(header.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for kind, change in changes:
            _change(found, tree, kind, change)
        made = found.commit(revision, tree, header["summary"], header.get("description", ""), user.name)
        url = f"{self.hub.endpoint}/datasets/{repo}/commit/{made.id}"
        return _json({"success": True, "commitOid": made.id, "commitUrl": url})

    @_route("GET", "~(?:/revision/{revision})?")
    def info(self, call: Call, repo: str, revision: str) -> Answer:
        found = self._repo(call, repo)
        head = found.find(revision or "main")
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(head.tree.items()):
            siblings.append({"rfilename": path})
            if call.asks("blobs"):
                siblings[-1] |= {"size": blob.size, "blobId": blob.oid, **blob.lfs_info("sha256")}
        info = {"id": repo, "author": repo.partition("/")[0], "sha": head.id, "private": found.private}
        return _json({**info, "gated": False, "lastModified": _iso(head.date), "siblings": siblings})

    @_route("GET", "~/tree/{revision}(?:/{path})?")
    def tree(self, call: Call, repo: str, revision: str, path: str) -> Answer:
        found = self._repo(call, repo)
        head = found.find(revision)
        if path not in head.directories:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        prefix = path and path + "/"
        below = [p for p in sorted({*head.tree, *head.directories} - {path}) if p.startswith(prefix)]
        if not call.asks("recursive"):
            below = [p for p in below if "/" not in p[len(prefix) :]]
        expand = call.asks("expand")
        size = min(self.hub.page_size, 50) if expand else self.hub.page_size
        return self._page(call, below, size, lambda p: found.entry(head, p, expand))

    @_route("POST", "~/paths-info/{revision}")
    def paths_info(self, call: Call, repo: str, revision: str) -> Answer:
        found = self._repo(call, repo)
        head, form = found.find(revision), parse_qs(call.body.decode())
        paths = [path.rstrip("/") for path in form.get("paths", [])]
        expand = form.get("expand") == ["true"]
        return _json([found.entry(head, path, expand) for path in paths if head.oid(path)])

    @_route("GET", "~/refs")
    def refs(self, call: Call, repo: str) -> Answer:
        heads = self._repo(call, repo).branches.items()
        branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": i} for b, i in heads]
        return _json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    @_route("GET", "~/commits/{revision}")
    def commits(self, call: Call, repo: str, revision: str) -> Answer:
        found = self._repo(call, repo)
        history = list(found.history(found.find(revision)))
        return self._page(call, history, self.hub.page_size, Commit.info)

    @_route("GET", "/datasets/{repo}/resolve/{revision}/{path}")
    def resolve(self, call: Call, repo: str, revision: str, path: str) -> Answer:
        found = self._repo(call, repo)
        head = found.find(revision)
        blob = head.tree.get(path)
        if blob is None:
            answer = Refusal(404, "Entry not found", "EntryNotFound").answer
        elif blob.lfs is None:
            answer = _ranged(call, found.read(blob.oid), blob.oid)
        else:
            location = {"Location": self._signed(f"/cdn/{repo}/{blob.lfs}")}
            linked = {"X-Linked-Etag": f'"{blob.lfs}"', "X-Linked-Size": str(blob.size)}
            answer = Answer(302, headers={"ETag": f'"{blob.oid}"', **linked, **location})
        answer.headers["X-Repo-Commit"] = head.id
        return answer

    @_route("GET", "/cdn/{repo}/{sha256}")
    def cdn(self, call: Call, repo: str, sha256: str) -> Answer:
        self._check_signature(call)
        return _ranged(call, self.hub.repos[repo].read(sha256), sha256)


def _change(repo: Repo, tree: dict[str, Blob], kind: str, change: Mapping[str, Any]) -> None:
    """Change a tree by one line of what is asked to be committed."""
    path = change["path"]
    if kind == "file":
        tree[path] = repo.add(path, base64.b64decode(change["content"]))
    elif kind == "lfsFile":
        if not repo.stores(change["oid"]):
            raise Refusal(400, f"The LFS object {change['oid']} of {path} was not uploaded")
        tree[path] = repo.pointer(change["oid"])
    elif kind == "deletedFile":
        if path not in tree:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        del tree[path]
    elif kind == "deletedFolder":
        for below in [p for p in tree if p.startswith(path.rstrip("/") + "/")]:
            del tree[below]
    else:
        raise Refusal(400, f"Unknown change: {kind}")


def _ranged(call: Call, data: bytes, etag: str) -> Answer:
    """Some bytes, or the range of them that is asked for."""
    answer = Answer(200, data, {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"})
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
    if asked is None:
        return answer
    first, last = asked.groups()
    begin = int(first) if first else max(len(data) - int(last), 0)
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    if begin < end:
        answer.status, answer.body = 206, data[begin:end]
        answer.headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
    else:
        answer = Refusal(416, "The range is not satisfiable").answer
        answer.headers["Content-Range"] = f"bytes */{len(data)}"
    return answer


class _Server(ThreadingHTTPServer):
    """Listens, and knows its open connections."""

    request_queue_size = 128

    def __init__(self, hub: LoopbackHub, port: int) -> None:
        self.hub = hub
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        # That of HTTPServer would ask the name service for this machine's name.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def disconnect(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that was killed is nothing to report.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Receives the requests of one connection, and lets faults strike them."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def _serve(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        if before := hub.before:
            before(self.command, path)
        fault = hub.fault(self.command, path)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length // 2 if fault.drop == "before" else length)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, path, query, len(body), headers.get("authorization"), headers)
        hub.requests.append(request)
        answer = None
        # A client that was killed has sent a part.
        if fault.drop != "before" and len(body) == length:
            answer = hub.answer(Call(self.command, path, parse_qs(query), headers, body), fault)
        hub.stopping.wait(fault.delay)
        if answer is None or fault.drop == "after":
            self.close_connection = True
            return
        request.status = answer.status
        answer.headers |= fault.headers
        self._send(answer, half=fault.drop == "halfway")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = _serve

    def _send(self, answer: Answer, half: bool) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if half else answer.body)
        self.close_connection |= half

    def log_message(self, *_: Any) -> None:
        pass


def environment_of(hub: LoopbackHub | str, token: str | None, cache: Path) -> dict[str, str]:
    """The variables with which a new process has the server for its Hub, and reaches nothing else.

    Args:
        hub: The server, or its endpoint.
        token: What the process is logged in with; None for nothing.
        cache: Directory of all that it caches.
    """
    endpoint = hub if isinstance(hub, str) else hub.endpoint
    variables = {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token or "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_ASSETS_CACHE": str(cache / "assets"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    }
    # datasets looks for its viewer at another host, which nobody has to find if there is a proxy.
    proxies = {f"{scheme}_proxy": endpoint for scheme in ("http", "https", "all")}
    proxies["no_proxy"] = "127.0.0.1,localhost"
    return variables | proxies | {name.upper(): value for name, value in proxies.items()}


@contextmanager
def client_of(hub: LoopbackHub | str, token: str | None, cache: Path) -> Iterator[Any]:
    """Make the server the Hub of this process for a while; gives an ``HfApi`` of it.

    Args:
        hub: The server, or its endpoint.
        token: What this process is logged in with; None for nothing.
        cache: Directory of all that it caches.
    """
    # The server needs neither in a process of its own.
    import datasets
    from huggingface_hub import HfApi, HfFileSystem, close_session, constants, hf_api, hf_file_system

    variables = environment_of(hub, token, cache)
    made_at_import = (hf_api.api, hf_file_system.hffs)
    with ExitStack() as stack:
        for owner in (constants, datasets.config, *made_at_import):
            stack.callback(vars(owner).update, dict(vars(owner)))
        stack.callback(setattr, HfFileSystem, "_cache", HfFileSystem._cache)
        stack.callback(os.environ.update, dict(os.environ))
        stack.callback(os.environ.clear)
        stack.callback(close_session)
        close_session()
        os.environ.update(variables)
        # All these have read the environment, or each other, when they were imported.
        importlib.reload(constants)
        importlib.reload(datasets.config)
        HfFileSystem._cache = {}
        for made in made_at_import:
            made.__init__()
        yield HfApi(variables["HF_ENDPOINT"], token=token)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an empty Hub on the loopback until killed.")
    parser.add_argument("--port", type=int, default=0, help="where to listen; 0 finds a free one")
    parser.add_argument("--user", required=True, help="name of the user there is")
    parser.add_argument("--token", required=True, help="the user's token, which may write")
    parser.add_argument("--directory", type=Path, help="where to keep LFS objects; in memory if absent")
    arguments = parser.parse_args()
    hub = LoopbackHub(arguments.directory, arguments.port)
    hub.add_user(arguments.user, arguments.token)
    with hub:
        print(hub.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
