"""Repositories: real bytes in real commits."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from loopback.answers import Refusal, iso

LARGEST_REGULAR = 10 * 1024**2
"""Bytes above which a file becomes an LFS object whatever its name is."""


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
        date, authors = iso(self.date), [{"user": self.author}]
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
