"""Publish a data root: one commit that switches its branch, and the index on main."""

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from qk_sniffer.errors import UserError
from qk_sniffer.hub.branch import MAIN, Branch, Moved, Operation
from qk_sniffer.hub.index import render_index
from qk_sniffer.hub.publication import Publication
from qk_sniffer.hub.pull import bring, require_ours
from qk_sniffer.hub.requests import explained
from qk_sniffer.storage import (
    CARD_FILE,
    CONFIG_FILE,
    DATA_FILE,
    EXAMPLES_DIRECTORY,
    HEAD_DIRECTORY,
    JOURNAL_DIRECTORY,
    MANIFEST_FILE,
    PULLED_DIRECTORY,
    describe_run,
    merge_pulled,
    own_part,
    render_card,
    require_manifest,
    write_text,
)
from qk_sniffer.summary import file_progress

log = logging.getLogger(__name__)

_ATTEMPTS = 6
_FIRST_FILE = ".gitattributes"
"""What a repository begins with."""


def push(data_root: Path, publication: Publication) -> None:
    """Publish a data root on its branch, and list the branch on main.

    Uploads come first; one commit then replaces all that has changed. What another writer has added to
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
    publication.write(data_root)
    again = f"`qk-sniffer push {shlex.quote(str(data_root))}`"
    what = f"sniffer.output.hf_repo_id: {publication.repo_id}"
    try:
        with explained(what, f"publish {data_root} with {again}"):
            _until_unmoved(lambda: _push_branch(data_root, publication), what, again)
            _until_unmoved(lambda: _push_index(publication), what, again)
    except UserError as error:
        told = "" if again in str(error) else f"; then publish with {again}"
        raise UserError(f"{error}{told}; nothing in {data_root} is lost") from error
    except BaseException:
        log.warning("%s is not published, nothing in it is lost; publish it with: %s", data_root, again)
        raise


def _require_merged(data_root: Path) -> None:
    for name in (JOURNAL_DIRECTORY, PULLED_DIRECTORY):
        if (data_root / name).exists():
            raise UserError(
                f"{data_root / name}: rows are waiting to be merged; run predict again, or "
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
        theirs = require_ours(branch, head, manifest["fingerprint"])
        if theirs is not None and bring(data_root, branch, head, theirs):
            manifest = merge_pulled(data_root, file_progress)
    _join_cards(data_root, publication, manifest, branch.text(head, CARD_FILE) if theirs else None)
    operations = _operations(data_root, manifest, branch.paths(head), is_ours=theirs is not None)
    branch.upload(operations)
    branch.commit(operations, _title(manifest), describe_run(manifest), head)
    publication.replaces = None
    publication.card = own_part((data_root / CARD_FILE).read_text(encoding="utf-8"))
    publication.write(data_root)


def _join_cards(
    data_root: Path, publication: Publication, manifest: Mapping[str, Any], theirs: str | None
) -> None:
    """Write the data root's card as it will be on the branch, with what a person added there."""
    path = data_root / CARD_FILE
    ours = path.read_text(encoding="utf-8")
    existing = ours
    if theirs is not None and own_part(theirs) not in ("", publication.card):
        existing = theirs
        if own_part(ours) not in ("", publication.card, own_part(theirs)):
            aside = path.with_suffix(".local.md")
            write_text(aside, ours)
            log.warning("%s: edited here and on the Hub; the Hub's text is kept, see %s", path, aside)
    write_text(path, render_card(manifest, existing, publication.place))


def _operations(
    data_root: Path, manifest: Mapping[str, Any], there: Sequence[str], *, is_ours: bool
) -> list[Operation]:
    """What makes a branch with some files hold the data root.

    Of a branch that is ours other people's files stay; one that was only begun is emptied.
    """
    names = [CARD_FILE, MANIFEST_FILE]
    names += [CONFIG_FILE] if (data_root / CONFIG_FILE).exists() else []
    names += [f"{name}/{DATA_FILE}" for name in (EXAMPLES_DIRECTORY, *manifest["heads"])]
    gone = [
        path
        for path in there
        if path not in names
        and path != _FIRST_FILE
        and (not is_ours or HEAD_DIRECTORY.fullmatch(path.partition("/")[0]))
    ]
    return [
        *(CommitOperationDelete(path, is_folder=False) for path in gone),
        *(CommitOperationAdd(name, data_root / name) for name in names),
    ]


def _title(manifest: Mapping[str, Any]) -> str:
    settings, heads = manifest["settings"], manifest["heads"]
    rows = sum(head["rows"] for head in heads.values())
    name = settings["model"].get("name", "a causal language model")
    return f"{name}: {len(heads):,} heads, {manifest['examples']['rows']:,} examples, {rows:,} rows"


def _push_index(publication: Publication) -> None:
    """Let the card of main list all branches.

    Raises:
        Moved: Someone was faster; nothing has changed.
    """
    main = Branch(publication.repo_id, MAIN)
    heads = main.heads()
    manifests = {name: main.manifest(commit) for name, commit in heads.items() if name != MAIN}
    runs = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    existing = main.text(heads[MAIN], CARD_FILE)
    card = render_index(publication.repo_id, runs, existing)
    if card != existing:
        file = CommitOperationAdd(CARD_FILE, card.encode())
        main.commit([file], "List the branches", "", heads[MAIN])
