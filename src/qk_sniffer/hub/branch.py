"""One branch of a Hub dataset, through the Hub's own client."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)
from tqdm.auto import tqdm

from qk_sniffer.errors import UserError
from qk_sniffer.hub.requests import HTTP_ERROR, retried, status_of
from qk_sniffer.storage import CARD_FILE, MANIFEST_FILE, manifest_fault, parse_json, read_card

Operation = CommitOperationAdd | CommitOperationDelete

MAIN = "main"
_LIBRARY = "qk-sniffer"
_CONFLICT = (409, 412)
_STAGING = re.compile(r"(.+)\.staging-[0-9a-f]{16}")
"""A branch on which a push is prepared, and the name of the one that it is for."""
_DOWNLOADS_AT_ONCE = 8
_FILES_AT_ONCE, _BYTES_AT_ONCE = 256, 2**30
"""What is uploaded between two steps of the progress bar."""


class StoredFile(NamedTuple):
    """A file of a commit: its size in bytes, and the git id of its content or of its LFS pointer."""

    size: int | None
    git_id: str | None


class Moved(Exception):
    """Someone else has committed to the branch."""


class Branch:
    """A branch that may not be there yet, nor its repository.

    All methods try again while the Hub fails for a moment, and raise what the client raises.

    Args:
        repo_id: The dataset.
        name: The branch.
    """

    def __init__(self, repo_id: str, name: str) -> None:
        self.repo_id = repo_id
        self.name = name
        self._api = HfApi(library_name=_LIBRARY)

    def heads(self) -> dict[str, str]:
        """The commit at the end of every branch but those on which a push is prepared.

        There are none where there is no repository.
        """
        return {name: end for name, end in self._all_heads().items() if not _STAGING.fullmatch(name)}

    def _all_heads(self) -> dict[str, str]:
        try:
            refs = retried(lambda: self._api.list_repo_refs(self.repo_id, repo_type="dataset"))
        except RepositoryNotFoundError:
            return {}
        return {ref.name: ref.target_commit for ref in refs.branches}

    def head(self) -> str | None:
        """The commit at its end; None where there is no such branch."""
        return self._all_heads().get(self.name)

    def create(self, *, private: bool) -> str:
        """Make the repository and the branch where they are missing, and give the branch's end.

        A new branch begins at the first commit of the repository, before any file of anyone.
        """
        heads = self._all_heads()
        if not heads:
            retried(
                lambda: self._api.create_repo(
                    self.repo_id, repo_type="dataset", private=private, exist_ok=True
                )
            )
        if self.name not in heads:
            return self.begin(self._commits_of_main()[-1])
        return heads[self.name]

    def begin(self, commit: str) -> str:
        """Make the branch at a commit where it is missing, and give its end."""
        retried(
            lambda: self._api.create_branch(
                self.repo_id, branch=self.name, revision=commit, repo_type="dataset", exist_ok=True
            )
        )
        return self._all_heads()[self.name]

    def move(self, head: str, commit: str) -> None:
        """Let the branch end at another commit, in one step.

        The Hub does not compare its end while it moves: a commit that arrives between the question for
        its end and the move, two requests that follow each other, is on no branch any more.

        Args:
            head: The end of the branch as it is known.
            commit: The new one.

        Raises:
            Moved: The branch has another end by now.
        """
        name = quote(self.name, safe="")
        url = f"{self._api.endpoint}/api/datasets/{self.repo_id}/branch/{name}"

        def overwrite() -> None:
            end = self.head()
            # The answer to an earlier try may be lost.
            if end == commit:
                return
            if end != head:
                raise Moved
            headers = build_hf_headers(library_name=_LIBRARY)
            wanted = {"startingPoint": commit, "overwrite": True}
            hf_raise_for_status(get_session().post(url, headers=headers, json=wanted))

        retried(overwrite)

    def remove_staging(self) -> None:
        """Remove the branches on which pushes to this one were prepared."""
        for name in self._all_heads():
            match = _STAGING.fullmatch(name)
            if match is None or match[1] != self.name:
                continue
            try:
                retried(
                    partial(self._api.delete_branch, self.repo_id, branch=name, repo_type="dataset")
                )
            except HTTP_ERROR as error:
                # The push that prepared it may have removed it just now.
                if status_of(error) != 404:
                    raise

    def has_commits(self, head: str) -> bool:
        """Whether anyone has committed to it, so that its files are not only those of main."""
        return head not in self._commits_of_main()

    def _commits_of_main(self) -> list[str]:
        commits = retried(lambda: self._api.list_repo_commits(self.repo_id, repo_type="dataset"))
        return [commit.commit_id for commit in commits]

    @property
    def url(self) -> str:
        """Its page."""
        return f"{self._api.endpoint}/datasets/{self.repo_id}/tree/{quote(self.name, safe='')}"

    def files(self, commit: str) -> dict[str, StoredFile]:
        """The files of a commit, by their paths."""
        info = retried(
            lambda: self._api.dataset_info(self.repo_id, revision=commit, files_metadata=True)
        )
        return {file.rfilename: StoredFile(file.size, file.blob_id) for file in info.siblings or ()}

    def card(self, commit: str) -> str | None:
        """The card of a commit; None where there is none.

        Raises:
            UserError: It is no text.
        """
        path = self._file(commit, CARD_FILE)
        try:
            return None if path is None else read_card(path)
        except UserError as error:
            raise UserError(f"{self.repo_id}, branch {self.name}: {error}") from error

    def manifest(self, commit: str) -> dict[str, Any] | None:
        """The manifest of a commit; None where its files are no capture."""
        path = self._file(commit, MANIFEST_FILE)
        try:
            manifest = None if path is None else parse_json(path.read_bytes())
        except ValueError:
            return None
        return manifest if manifest_fault(manifest) is None else None

    def _file(self, commit: str, path: str) -> Path | None:
        """A file of a commit in the client's cache; None where there is none."""
        ask = partial(
            self._api.hf_hub_download, self.repo_id, path, repo_type="dataset", revision=commit
        )
        try:
            return Path(retried(ask))
        except RemoteEntryNotFoundError:
            return None

    def download(self, commit: str, paths: Sequence[str], directory: Path) -> None:
        """Bring files of a commit into a directory; those that are there already stay.

        Raises:
            UserError: One is not there.
        """

        def fetch(path: str) -> None:
            ask = partial(
                self._api.hf_hub_download,
                self.repo_id,
                path,
                repo_type="dataset",
                revision=commit,
                local_dir=directory,
            )
            try:
                retried(ask)
            except RemoteEntryNotFoundError as error:
                raise UserError(
                    f"sniffer.output.hf_branch: {self.repo_id}, branch {self.name}: {path} is missing, "
                    "which its manifest names; restore it there, or name another branch"
                ) from error

        # Its threads, unlike those of an executor, keep no one who interrupts a long wait.
        with _bars_of_the_client_off(), ThreadPool(_DOWNLOADS_AT_ONCE) as pool:
            done = pool.imap_unordered(fetch, paths)
            for _ in tqdm(done, desc="Downloading", total=len(paths), unit="file"):
                pass

    def upload(self, operations: Sequence[Operation]) -> None:
        """Send the contents of large files, which a commit then names; what the Hub has is not sent."""
        files = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        total = sum(file.upload_info.size for file in files)
        with (
            _bars_of_the_client_off(),
            tqdm(desc="Uploading", total=total, unit="B", unit_scale=True) as bar,
        ):
            for some in _portions(files):
                send = partial(
                    self._api.preupload_lfs_files,
                    self.repo_id,
                    additions=some,
                    repo_type="dataset",
                    revision=self.name,
                    free_memory=False,
                )
                retried(send)
                bar.update(sum(file.upload_info.size for file in some))

    def commit(self, operations: Sequence[Operation], message: str, text: str, parent: str) -> str:
        """Add one commit to the branch, and give its end.

        Files that have not changed are left out, and where none has there is no commit.

        Args:
            operations: What changes.
            message: Its title.
            text: Its description.
            parent: The end of the branch as it is known.

        Raises:
            Moved: The branch has another end by now; or this commit's own, whose answer was lost.
            UserError: The Hub does not take the card's YAML.
        """
        send = partial(
            self._api.create_commit,
            self.repo_id,
            operations,
            commit_message=message,
            commit_description=text,
            repo_type="dataset",
            revision=self.name,
            parent_commit=parent,
        )
        try:
            return str(retried(send).oid)
        except HTTP_ERROR as error:
            if status_of(error) in _CONFLICT:
                raise Moved from error
            raise
        except ValueError as error:
            if "metadata" not in str(error):
                raise
            reason = " ".join(str(error).split())
            raise UserError(
                f"{CARD_FILE}: the Hub does not take its YAML ({reason}); mend it"
            ) from error


@contextmanager
def _bars_of_the_client_off() -> Iterator[None]:
    """The client shows a bar for each file, and there are hundreds."""
    was_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not was_off:
            enable_progress_bars()


def _portions(files: Sequence[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    some: list[CommitOperationAdd] = []
    for file in files:
        some.append(file)
        if len(some) == _FILES_AT_ONCE or sum(f.upload_info.size for f in some) >= _BYTES_AT_ONCE:
            yield some
            some = []
    if some:
        yield some
