"""Where a capture is: a directory, or a branch of a Hub dataset whose files come as they are read."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from huggingface_hub import HfFileSystem, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

from qk_sniffer.errors import UserError
from qk_sniffer.hub.branch import MAIN, Branch
from qk_sniffer.hub.requests import explained, retried
from qk_sniffer.reading.rows import FileRows, HeadRows
from qk_sniffer.storage import (
    DATA_FILE,
    EXAMPLES_DIRECTORY,
    MANIFEST_FILE,
    examples_schema,
    existing_data_root,
    head_files,
    note_owner,
    read_examples,
    read_manifest,
    require_manifest,
)

_READ_WHOLE = 32 * 2**20
"""Bytes of a file that is downloaded as a whole, since its parts would take as many requests."""
_READ_AHEAD = 2**20
"""Bytes that come with each part of another one."""


class CapturePlace(ABC):
    """Gives what one capture holds."""

    @property
    @abstractmethod
    def manifest(self) -> Mapping[str, Any]:
        """Settings, versions, layers, notes, rows and checksums."""

    @abstractmethod
    def examples(self) -> pa.Table:
        """The texts."""

    @abstractmethod
    def rows(self, name: str, schema: pa.Schema) -> HeadRows:
        """The rows of a head, by its name and with its columns."""

    def start_of(self, example_id: int) -> int:
        """The first position of a text that its tokens can attend to."""
        return 0

    def table(self, path: str, n_bytes: int) -> ds.Dataset:
        """A table in a file, of which parts are read.

        Args:
            path: The file.
            n_bytes: Its size, as the manifest has it.
        """
        # A place without files has none in its manifest.
        raise NotImplementedError

    def reading(self) -> AbstractContextManager[None]:
        """Tell what the Hub's client raises while such a part is read."""
        return nullcontext()


class _Files(CapturePlace):
    """A capture in files."""

    _manifest: Mapping[str, Any]

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What the file of this name says."""
        return self._manifest

    def examples(self) -> pa.Table:
        """The table of texts."""
        schema = examples_schema(self.manifest["settings"])
        return read_examples(self.file(f"{EXAMPLES_DIRECTORY}/{DATA_FILE}"), schema=schema)

    def rows(self, name: str, schema: pa.Schema) -> HeadRows:
        """Those of a head's files, which are opened when they are read."""
        # No lambda: a process that is spawned gets a pickled copy.
        return FileRows(partial(self._files_of, name), schema)

    def _files_of(self, name: str) -> list[Path]:
        return [self.file(path) for path in head_files(name, self.manifest["heads"][name])]

    def table(self, path: str, n_bytes: int) -> ds.Dataset:
        """A table in a file on this machine."""
        return ds.dataset(str(self.file(path)), format="parquet")

    @abstractmethod
    def file(self, path: str) -> Path:
        """Where a file is on this machine; it may have to come here first."""


class LocalPlace(_Files):
    """A data root on this machine.

    Raises:
        UserError: No run has finished there.
    """

    def __init__(self, data_root: Path) -> None:
        self._data_root = data_root
        self._manifest = require_manifest(data_root)
        note_owner(data_root)

    def __str__(self) -> str:
        return str(self._data_root)

    def file(self, path: str) -> Path:
        """The file, where it is.

        Raises:
            UserError: It is missing.
        """
        file = self._data_root / path
        if not file.exists():
            raise UserError(
                f"{file}: missing, though the manifest has it; `qk-sniffer verify {self._data_root}` "
                "tells what else is, and a copy or a new run brings it back"
            )
        return file


class HubPlace(_Files):
    """One commit of a branch of a Hub dataset; files stay in the client's cache.

    Args:
        repo_id: The dataset.
        revision: Its branch, tag or commit.

    Raises:
        UserError: It holds no capture, or the Hub fails.
    """

    def __init__(self, repo_id: str, revision: str) -> None:
        self._repo_id = repo_id
        self._revision = revision
        self._name = f"{repo_id}, revision {revision}"
        path = self._download(MANIFEST_FILE, revision)
        if path is None:
            raise self._no_capture()
        # Cached files are in a directory with the name of their commit: all come from the same one.
        self._commit = path.parent.name
        manifest = read_manifest(path.parent)
        assert manifest is not None
        self._manifest = manifest

    def __str__(self) -> str:
        return self._name

    def file(self, path: str) -> Path:
        """The file in the cache, downloaded if it is not there.

        Raises:
            UserError: It can't be had.
        """
        file = self._download(path, self._commit)
        if file is None:
            raise UserError(
                f"{self._name}: {path} is missing, though the manifest has it; publish the run anew "
                "with `qk-sniffer push`"
            )
        return file

    def table(self, path: str, n_bytes: int) -> ds.Dataset:
        """A table in the cache; or where it is large, on the Hub, of which ranges come here."""
        name = dict(repo_id=self._repo_id, repo_type="dataset", filename=path)
        is_here = isinstance(try_to_load_from_cache(**name, revision=self._commit), str)
        if is_here or n_bytes <= _READ_WHOLE:
            return super().table(path, n_bytes)
        place = f"datasets/{self._repo_id}@{self._commit}/{path}"
        hub = HfFileSystem(block_size=_READ_AHEAD)
        return retried(lambda: ds.dataset(place, filesystem=hub, format="parquet"))

    def reading(self) -> AbstractContextManager[None]:
        """Tell what the Hub's client raises while a part of a table is read."""
        return explained(self._name, "read it again")

    def _download(self, path: str, revision: str) -> Path | None:
        """A file of a revision; None where there is none."""
        with explained(f"{self._name}: {path}", "read it again"):
            try:
                return Path(
                    retried(
                        lambda: hf_hub_download(
                            self._repo_id, path, repo_type="dataset", revision=revision
                        )
                    )
                )
            except (RemoteEntryNotFoundError, RevisionNotFoundError):
                return None

    def _no_capture(self) -> UserError:
        with explained(self._name, "read it again"):
            heads = Branch(self._repo_id, MAIN).heads()
        others = ", ".join(name for name in sorted(heads) if name not in (MAIN, self._revision))
        remedy = f"name one of its branches as revision: {others}" if others else "name another dataset"
        return UserError(f"{self._name}: no capture is there; {remedy}")


def place_of(path_or_repo: str | Path, revision: str | None) -> CapturePlace:
    """The directory of this name, or else the Hub dataset.

    Raises:
        UserError: There is no capture.
    """
    path = Path(path_or_repo).expanduser()
    name = str(path_or_repo)
    is_repo = not isinstance(path_or_repo, Path) and name.count("/") == 1 and name[0] not in "./~"
    if path.exists() or not is_repo:
        if revision is not None:
            raise UserError(f"{path}: a directory has no revision {revision}; leave it out")
        return LocalPlace(existing_data_root(path_or_repo))
    try:
        return HubPlace(name, revision or MAIN)
    except UserError as error:
        if revision is not None:
            raise
        raise UserError(f"{error}. No directory here is called {name} either") from error
