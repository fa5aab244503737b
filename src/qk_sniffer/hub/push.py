"""Publish a data root: one step that switches its branch, and the index on main."""

import hashlib
import logging
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from qk_sniffer.errors import UserError
from qk_sniffer.hub.branch import MAIN, Branch, Moved, StoredFile
from qk_sniffer.hub.index import render_index
from qk_sniffer.hub.publication import Publication
from qk_sniffer.hub.pull import bring, require_ours
from qk_sniffer.hub.requests import explained
from qk_sniffer.hub.staging import Changes, commit_changes
from qk_sniffer.storage import (
    CARD_ASIDE_FILE,
    CARD_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    MOMENT_FILE,
    REPORT_DIRECTORY,
    REPORT_FILE,
    Place,
    captured_names,
    checksum,
    describe_run,
    file_progress,
    is_described,
    merge_pulled,
    own_part,
    parquet_files,
    parse_head_name,
    read_card,
    render_card,
    report_files,
    require_manifest,
    shown_names,
    waiting_rows,
    write_text,
)

log = logging.getLogger(__name__)

_ATTEMPTS = 6
_REMEDY = "Name another branch with --hf_branch"
_FIRST_FILE = ".gitattributes"
"""What a repository begins with."""


def push(data_root: Path, publication: Publication) -> None:
    """Publish a data root on its branch, and list the branch on main.

    Uploads come first; one step then replaces all that has changed. What another writer has added to
    the branch meanwhile is merged into the data root and published with it. A push that failed is
    repeated without sending again what arrived.

    Args:
        data_root: A finished data root; nothing in it is lost, whatever happens.
        publication: Where it goes.

    Raises:
        UserError: The data root is not finished, the branch holds something else, or the Hub fails.
    """
    require_manifest(data_root)
    _require_merged(data_root)
    again = f"`qk-sniffer push {shlex.quote(str(data_root))}`"
    what = f"sniffer.output.hf_repo_id: {publication.repo_id}"
    try:
        with explained(what, f"publish {data_root} with {again}", data_root):
            publication.write(data_root)
            _until_unmoved(lambda: _push_branch(data_root, publication), what, again)
            _until_unmoved(lambda: _push_index(publication), what, again)
            Branch(publication.repo_id, publication.branch).remove_staging()
    except UserError as error:
        told = "" if again in str(error) else f"; then publish with {again}"
        raise UserError(f"{error}{told}; nothing in {data_root} is lost") from error
    except BaseException:
        log.warning("%s is not published, nothing in it is lost; publish it with: %s", data_root, again)
        raise


def _require_merged(data_root: Path) -> None:
    for directory in waiting_rows(data_root):
        raise UserError(
            f"{directory}: rows are waiting to be merged; run predict again, or "
            f"`qk-sniffer finalize {data_root}`, then push"
        )


def _until_unmoved(task: Callable[[], None], what: str, again: str) -> None:
    """Do something again while other writers are faster."""
    for _ in range(_ATTEMPTS):
        try:
            return task()
        except Moved:
            continue
    raise UserError(f"{what}: others commit to it all the time; wait for them, then {again}")


def _push_branch(data_root: Path, publication: Publication) -> None:
    """Replace what the branch holds by the data root, joined with what others have added.

    Raises:
        Moved: Someone was faster; nothing has changed.
    """
    branch = Branch(publication.repo_id, publication.branch)
    head = branch.create(private=publication.private)
    manifest, theirs = require_manifest(data_root), branch.manifest(head)
    if head != publication.replaces:
        theirs = require_ours(branch, head, manifest["fingerprint"], _REMEDY)
        if theirs is not None and bring(data_root, branch, head, theirs):
            manifest = merge_pulled(data_root, file_progress)
    is_new = theirs is None and not branch.has_commits(head)
    card = None if is_new else branch.card(head)
    there = branch.files(head)
    if (
        theirs is not None
        and parquet_files(theirs) == parquet_files(manifest)
        and not report_files(data_root)
    ):
        # A report that another machine has made of these very rows.
        kept = [path for path in there if _is_of_a_report(path)]
    else:
        kept = []
    _join_cards(data_root, publication, manifest, card, kept)
    gone = [path for path in _gone(data_root, manifest, there, theirs, is_new) if path not in kept]
    added = {path: data_root / path for path in _changed(data_root, manifest, there, theirs)}
    digest = checksum(data_root / MANIFEST_FILE)
    changes = Changes(gone, added, digest, _title(manifest), describe_run(manifest))
    commit_changes(branch, head, there, changes)
    publication.replaces = None
    publication.card = own_part(read_card(data_root / CARD_FILE))
    publication.write(data_root)


def _join_cards(
    data_root: Path,
    publication: Publication,
    manifest: Mapping[str, Any],
    theirs: str | None,
    kept: list[str],
) -> None:
    """Write the data root's card as it will be on the branch, with what a person added there.

    Args:
        data_root: The data root.
        publication: Where it goes.
        manifest: Its manifest.
        theirs: The card of the branch.
        kept: The branch's report, where that stays.
    """
    path = data_root / CARD_FILE
    ours = read_card(path) if path.exists() else None
    existing = ours
    their_part = "" if theirs is None else _own_part_of_branch(theirs, publication.place)
    if theirs is not None and their_part != publication.card:
        existing = theirs
        if ours is not None and own_part(ours) not in ("", publication.card, their_part):
            aside = data_root / CARD_ASIDE_FILE
            write_text(aside, ours)
            log.warning("%s: edited here and on the Hub; the Hub's text is kept, see %s", path, aside)
    report = kept or report_files(data_root)
    write_text(path, render_card(manifest, existing, publication.place, report))


def _own_part_of_branch(card: str, place: Place) -> str:
    """What a person has added to the card of a branch."""
    try:
        return own_part(card)
    except UserError as error:
        raise UserError(f"{place.repo_id}, branch {place.branch}: {error}") from error


def _gone(
    data_root: Path,
    manifest: Mapping[str, Any],
    there: Iterable[str],
    theirs: Mapping[str, Any] | None,
    is_new: bool,
) -> list[str]:
    """The files of a branch that are not to be there any more.

    Other people's files stay, but on a new branch, which has only what its first commit had.

    Args:
        data_root: The data root.
        manifest: Its manifest.
        there: The files of the branch.
        theirs: The manifest of the branch, if it holds a run.
        is_new: Whether nobody has committed to the branch.
    """
    ours = {*parquet_files(manifest), *_other_files(data_root)}
    return [
        path
        for path in there
        if path not in ours
        and path != _FIRST_FILE
        and (is_new or (theirs is not None and _is_replaced(path)) or _holds_vectors(path))
    ]


def _is_replaced(path: str) -> bool:
    return path == CONFIG_FILE or _is_of_a_report(path)


def _is_of_a_report(path: str) -> bool:
    directory, _, name = path.partition("/")
    return directory == REPORT_DIRECTORY and REPORT_FILE.fullmatch(name) is not None


def _holds_vectors(path: str) -> bool:
    is_of_a_head = parse_head_name(path.partition("/")[0]) is not None
    return is_of_a_head or MOMENT_FILE.fullmatch(path) is not None


def _changed(
    data_root: Path,
    manifest: Mapping[str, Any],
    there: Mapping[str, StoredFile],
    theirs: Mapping[str, Any] | None,
) -> list[str]:
    """The files of a data root that a branch does not have as they are.

    Args:
        data_root: The data root.
        manifest: Its manifest.
        there: The files of the branch.
        theirs: The manifest of the branch, if it holds a run.

    Raises:
        UserError: One of them is damaged.
    """
    held = {} if theirs is None else parquet_files(theirs)
    changed = [
        path
        for path in _other_files(data_root)
        if path not in there or there[path].git_id not in _git_ids(data_root / path)
    ]
    for path, facts in parquet_files(manifest).items():
        if path not in there or held.get(path) != facts or there[path].size != facts["bytes"]:
            if not is_described(data_root / path, facts):
                raise UserError(
                    f"{data_root / path}: damaged, it is not what the manifest describes; "
                    f"`qk-sniffer verify {data_root}` tells what else is; restore it from a copy"
                )
            changed.append(path)
    return changed


def _other_files(data_root: Path) -> list[str]:
    """What is published beside the Parquet files."""
    texts = [path for path in (CARD_FILE, MANIFEST_FILE, CONFIG_FILE) if (data_root / path).exists()]
    return texts + report_files(data_root)


def _git_ids(path: Path) -> tuple[str, str]:
    """The id of a file's content in git, and the id that it has where the Hub keeps it in LFS.

    Sources: <https://git-scm.com/book/en/v2/Git-Internals-Git-Objects>,
    <https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>.
    """
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
    return _git_id(content), _git_id(pointer.encode())


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _title(manifest: Mapping[str, Any]) -> str:
    model, text = shown_names(manifest["settings"])
    heads, examples = len(captured_names(manifest)), manifest["examples"]["rows"]
    return f"{model} on {text}: {heads:,} heads, {examples:,} examples"


def _push_index(publication: Publication) -> None:
    """Let the card of main list all branches.

    Raises:
        Moved: Someone was faster; nothing has changed.
    """
    main = Branch(publication.repo_id, MAIN)
    heads = main.heads()
    manifests = [
        (Branch(publication.repo_id, name), main.manifest(commit))
        for name, commit in sorted(heads.items())
        if name != MAIN
    ]
    existing = main.card(heads[MAIN])
    _own_part_of_branch(existing or "", Place(publication.repo_id, MAIN))
    card = render_index([(branch, m) for branch, m in manifests if m is not None], existing)
    if card != existing:
        file = CommitOperationAdd(CARD_FILE, card.encode())
        main.commit([file], "List the branches", "", heads[MAIN])
