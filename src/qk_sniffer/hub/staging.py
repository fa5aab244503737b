"""Commit what a push changes: at once, or in portions on a branch to which the other one then moves."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import RevisionNotFoundError

from qk_sniffer.hub.branch import Branch, Moved, Operation, StoredFile

MOST_CHANGES = 900
"""Files of one commit; with some thousands the Hub answers 403 or 504."""


@dataclass(frozen=True)
class Changes:
    """What a push changes on its branch.

    Attributes:
        gone: Paths of files that are removed.
        added: Files on this machine that are added or replaced, by their paths there.
        digest: Names what the Parquet files among them hold.
        message: Title of the commit.
        text: Its description.
    """

    gone: Sequence[str]
    added: Mapping[str, Path]
    digest: str
    message: str
    text: str


def commit_changes(
    branch: Branch, head: str, there: Mapping[str, StoredFile], changes: Changes
) -> None:
    """Bring changes to a branch; whoever reads it sees all of them or none.

    Args:
        branch: The branch.
        head: Its end as it is known.
        there: The files of that commit.
        changes: What changes.

    Raises:
        Moved: Someone else has committed to the branch; it has not changed.
    """
    operations = [*changes.gone, *changes.added]
    if len(operations) <= MOST_CHANGES:
        _commit(branch, head, changes, operations)
        return
    staging = Branch(branch.repo_id, _staging_name(branch.name, head, changes.digest))
    try:
        end = staging.begin(head)
        left = _left(changes, there, staging.files(end))
        for first in range(0, len(left), MOST_CHANGES):
            end = _commit(staging, end, changes, left[first : first + MOST_CHANGES])
    except RevisionNotFoundError as error:
        # Whoever has published on the branch meanwhile removes what was prepared for its old end.
        raise Moved from error
    branch.move(head, end)


def _staging_name(branch: str, head: str, digest: str) -> str:
    """That of the branch on which a push is prepared: the same when it is repeated, and no other's."""
    named = hashlib.blake2b(f"{head} {digest}".encode(), digest_size=8)
    return f"{branch}.staging-{named.hexdigest()}"


def _left(
    changes: Changes, there: Mapping[str, StoredFile], staged: Mapping[str, StoredFile]
) -> list[str]:
    """The paths that an earlier attempt has not committed yet.

    A Parquet file that is another one than before is what is to be there, by the name of the branch.
    Of the other files, which are few, the client leaves out those that have not changed.
    """
    unwanted = set(changes.gone)
    gone = [
        path for path in staged if path in unwanted or (path not in there and path not in changes.added)
    ]
    return gone + [
        path
        for path in changes.added
        if not path.endswith(".parquet") or path not in staged or staged[path] == there.get(path)
    ]


def _commit(branch: Branch, head: str, changes: Changes, paths: Sequence[str]) -> str:
    """Change some paths in one commit, and give the end of the branch."""
    operations: list[Operation] = [
        CommitOperationAdd(path, changes.added[path])
        if path in changes.added
        else CommitOperationDelete(path, is_folder=False)
        for path in paths
    ]
    if not operations:
        return head
    branch.upload(operations)
    return branch.commit(operations, changes.message, changes.text, head)
