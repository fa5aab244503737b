"""Bring what a branch holds beyond a data root, to be merged with what is there."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qk_sniffer.errors import UserError
from qk_sniffer.hub.branch import Branch
from qk_sniffer.hub.publication import Publication
from qk_sniffer.hub.requests import explained
from qk_sniffer.storage import (
    DATA_FILE,
    EXAMPLES_DIRECTORY,
    MANIFEST_FILE,
    MOMENT_TEXTS,
    PULLED_DIRECTORY,
    PULLING_DIRECTORY,
    EarlierRun,
    FileFacts,
    differing_settings,
    earlier_run,
    file_progress,
    is_described,
    merge_pulled,
    moment_file,
    parquet_files,
    require_joinable,
    stored_counted_ids,
    stored_example_ids,
    sync_directory,
    sync_file,
    write_text,
)

_FIELD = "sniffer.output.hf_branch"
_REMEDY = (
    "Name another branch, use those settings, or set sniffer.output.overwrite to true to replace it"
)


def pull(
    data_root: Path, publication: Publication, fingerprint: Mapping[str, Any], *, overwrite: bool
) -> None:
    """Bring the examples of a publication's branch that a data root does not have.

    They wait there as a finished run of its own, which finalizing merges. Nothing that was captured
    here is removed or replaced.

    Args:
        data_root: The data root.
        publication: Where it is published.
        fingerprint: The settings of the run; fields that are not known yet are left out.
        overwrite: Whether what the branch holds now is to be replaced, and nothing is brought.

    Raises:
        UserError: The branch holds something else, it is damaged, or the Hub fails.
    """
    branch = Branch(publication.repo_id, publication.branch)
    with explained(f"{_FIELD}: {_name(branch)}", "run the same command again", data_root):
        head = branch.head()
        if overwrite or publication.replaces != head:
            # A run that begins to replace it may go on without overwrite.
            publication.replaces = head if overwrite else None
        if head is not None and publication.replaces is None:
            manifest = require_ours(branch, head, fingerprint, _REMEDY)
            if manifest is not None:
                bring(data_root, branch, head, manifest)


def require_ours(
    branch: Branch, head: str, fingerprint: Mapping[str, Any], remedy: str
) -> dict[str, Any] | None:
    """The manifest at the end of a branch; None where nothing was ever pushed there.

    Args:
        branch: The branch.
        head: Its end.
        fingerprint: The settings that it must have; fields that are not known yet are left out.
        remedy: What to do where it has others.

    Raises:
        UserError: It holds a run with other settings, or files of someone.
    """
    manifest = branch.manifest(head)
    if manifest is None:
        if branch.has_commits(head):
            raise UserError(
                f"{_FIELD}: {_name(branch)} holds files that are no capture; name another branch"
            )
        return None
    if differing := differing_settings(manifest["fingerprint"], fingerprint):
        raise UserError(
            f"{_FIELD}: {_name(branch)} holds a run with other settings: {differing}. {remedy}"
        )
    return manifest


def bring(data_root: Path, branch: Branch, head: str, manifest: dict[str, Any]) -> bool:
    """Download a run if it has examples that a data root does not have.

    Args:
        data_root: The data root.
        branch: Holds the run.
        head: At this commit.
        manifest: The run's manifest.

    Returns:
        Whether it has.

    Raises:
        UserError: Moments count texts that those there count too, and others.
    """
    pulling = data_root / PULLING_DIRECTORY
    earlier = earlier_run(data_root)
    texts = _tables_of_texts(manifest)
    adds_nothing = all(is_described(data_root / path, facts) for path, facts in texts.items())
    if not adds_nothing:
        _download(branch, head, texts, pulling)
        adds_nothing = not _adds(pulling, earlier)
    if adds_nothing:
        shutil.rmtree(pulling, ignore_errors=True)
        return False
    if (earlier is not None and earlier.finalizing) or (data_root / PULLED_DIRECTORY).exists():
        # What is being merged must stay as it is until that is done.
        merge_pulled(data_root, file_progress)
    require_joinable(data_root, pulling, f"{_FIELD}: {_name(branch)}")
    files = parquet_files(manifest)
    _download(branch, head, {path: files[path] for path in files if path not in texts}, pulling)
    write_text(pulling / MANIFEST_FILE, json.dumps(manifest))
    pulling.replace(data_root / PULLED_DIRECTORY)
    sync_directory(data_root)
    return True


def _tables_of_texts(manifest: Mapping[str, Any]) -> dict[str, FileFacts]:
    """The files that tell which texts a run has captured, and which its moments count."""
    counted = moment_file(MOMENT_TEXTS)
    tables = {f"{EXAMPLES_DIRECTORY}/{DATA_FILE}", counted}
    return {path: facts for path, facts in parquet_files(manifest).items() if path in tables}


def _adds(pulling: Path, earlier: EarlierRun | None) -> bool:
    """Whether a run whose tables of texts are here has captured or counted other texts."""
    captured, counted = stored_example_ids(pulling), stored_counted_ids(pulling)
    if earlier is None:
        return bool(captured.size or counted.size)
    new = np.setdiff1d(captured, earlier.example_ids), np.setdiff1d(counted, earlier.counted_ids)
    return any(ids.size for ids in new)


def _download(branch: Branch, head: str, paths: Mapping[str, FileFacts], directory: Path) -> None:
    """Bring some Parquet files, compare them with a manifest, and sync them.

    Raises:
        UserError: One is missing or something else.
    """
    branch.download(head, [*paths], directory)
    # One that an earlier attempt left may be that of another commit, when the Hub was not asked.
    wrong = [path for path, facts in paths.items() if not is_described(directory / path, facts)]
    for path in wrong:
        (directory / path).unlink()
    if wrong:
        branch.download(head, wrong, directory)
    for path in wrong:
        if not is_described(directory / path, paths[path]):
            raise UserError(
                f"{_FIELD}: {_name(branch)}: {path} is not what its manifest describes; restore it "
                "there, or name another branch"
            )
    for path in paths:
        sync_file(directory / path)
        sync_directory((directory / path).parent)


def _name(branch: Branch) -> str:
    return f"{branch.repo_id}, branch {branch.name}"
