"""How a journal becomes the finished files of a data root."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from qk_sniffer.errors import UserError
from qk_sniffer.storage.card import render_card
from qk_sniffer.storage.commits import (
    COMMITS_FILE,
    HEADER_FILE,
    append_records,
    is_intact,
    locked_journal,
    segment_path,
    write_commits,
)
from qk_sniffer.storage.files import explained_writing, sync_directory, write_text
from qk_sniffer.storage.manifest import build_manifest, read_manifest, write_manifest
from qk_sniffer.storage.parquet import FileFacts, HeadFile, write_heads, write_table
from qk_sniffer.storage.reader import JournalReader
from qk_sniffer.storage.schema import (
    CARD_FILE,
    DATA_FILE,
    EXAMPLES_DIRECTORY,
    EXAMPLES_SCHEMA,
    FINISHED_JOURNAL_DIRECTORY,
    JOURNAL_DIRECTORY,
    head_name,
)

_MOST_THREADS = 16
_HEADS_AT_ONCE = 16
"""Files that one thread has open; the heads of a layer and kind share their numbers in such groups."""

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


def finalize(data_root: Path, progress: Progress, *, complete: bool = False) -> dict[str, Any]:
    """Turn the journal of a data root into Parquet files, card and manifest.

    Rows of a finished run that is there already are merged. An attempt that was cut off is continued.

    Args:
        data_root: Has a journal whose writer is closed.
        progress: Wraps the iteration over the finished head files, given their number.
        complete: Whether every text has been read.

    Returns:
        The manifest. The journal is gone.

    Raises:
        UserError: There is no journal, it is damaged or in use, or the disk refuses; what the journal
            holds stays there.
    """
    directory = data_root / JOURNAL_DIRECTORY
    if not (directory / HEADER_FILE).exists():
        if (ended := _end_removal(data_root)) is not None:
            return ended
        raise UserError(f"{data_root}: no interrupted run is here; name the data root of one")
    again = f"qk-sniffer finalize {data_root}"
    remedy = f"make room or mend the disk, then go on with `{again}`; nothing is lost"
    with explained_writing(data_root, remedy):
        with locked_journal(directory):
            manifest = _finalize(data_root, JournalReader(directory), progress, complete)
            directory.rename(data_root / FINISHED_JOURNAL_DIRECTORY)
            sync_directory(data_root)
        shutil.rmtree(data_root / FINISHED_JOURNAL_DIRECTORY)
    return manifest


def _finalize(
    data_root: Path, journal: JournalReader, progress: Progress, complete: bool
) -> dict[str, Any]:
    earlier = read_manifest(data_root) or {"heads": {}, "examples": None}
    if journal.log.n_broken:
        journal.log.warn(journal.directory, "what they stood for is not in the files")
        complete = False
        # No record may be appended to a torn line.
        write_commits(journal.directory, journal.log.records())
    if journal.log.finalizing is None:
        _drop_damaged(journal)
        with (journal.directory / COMMITS_FILE).open("ab", buffering=0) as log:
            append_records(log, [complete])
        journal.log.finalizing = complete
    examples = _all_examples(data_root, journal, merge=earlier["examples"] is not None)
    digest = _digest(journal.header, examples["example_id"].to_numpy())
    heads = dict(
        progress(_write_heads(data_root, journal, earlier["heads"], digest), _n_heads(journal))
    )
    facts = write_table(data_root / EXAMPLES_DIRECTORY / DATA_FILE, examples)
    manifest = build_manifest(journal.header, facts, heads, complete=journal.log.finalizing)
    write_text(data_root / CARD_FILE, render_card(manifest))
    write_manifest(data_root, manifest)
    return manifest


def _end_removal(data_root: Path) -> dict[str, Any] | None:
    """Remove the rest of a journal whose files are all written, and give the manifest."""
    if not (data_root / FINISHED_JOURNAL_DIRECTORY).exists():
        return None
    shutil.rmtree(data_root / FINISHED_JOURNAL_DIRECTORY)
    return read_manifest(data_root)


def _drop_damaged(journal: JournalReader) -> None:
    """Compare every batch with its digest; those that a disk has damaged leave the journal."""
    commits = journal.log.commits
    with ThreadPoolExecutor(_n_threads()) as pool:
        intact = list(pool.map(lambda commit: is_intact(journal.directory, commit), commits))
    damaged = [commit for commit, good in zip(commits, intact, strict=True) if not good]
    if not damaged:
        return
    write_commits(journal.directory, [c for c, good in zip(commits, intact, strict=True) if good])
    files = {str(segment_path(journal.directory, commit.segment)) for commit in damaged}
    n_examples = sum(commit.example_ids.size for commit in damaged)
    raise UserError(
        f"{', '.join(sorted(files))}: damaged, the rows of {n_examples} texts are not what was written "
        "and were dropped; run predict again to capture them anew, or `qk-sniffer finalize "
        f"{journal.directory.parent}` to do without them"
    )


def _all_examples(data_root: Path, journal: JournalReader, *, merge: bool) -> pa.Table:
    """The examples table: those of the journal, and of the finished run that is merged."""
    tables = [EXAMPLES_SCHEMA.empty_table()]
    tables += [batch.select(EXAMPLES_SCHEMA.names) for batch in journal.examples()]
    if merge:
        stored = pq.read_table(data_root / EXAMPLES_DIRECTORY / DATA_FILE).cast(EXAMPLES_SCHEMA)
        # An attempt that was cut off may have written the table already.
        is_new = np.isin(stored["example_id"].to_numpy(), journal.log.example_ids())
        tables.append(stored.filter(pa.array(~is_new)))
    return pa.concat_tables(tables).sort_by("example_id")


def _digest(header: Mapping[str, Any], example_ids: npt.NDArray[np.int32]) -> str:
    """Names what the files hold: settings and examples, however they were captured."""
    digest = xxhash.xxh3_64(json.dumps(header["fingerprint"], sort_keys=True).encode())
    digest.update(example_ids.tobytes())
    return digest.hexdigest()


def _n_heads(journal: JournalReader) -> int:
    return sum(len(stream["heads"]) for stream in journal.header["streams"])


def _n_threads() -> int:
    # One more than there are cores, since a thread waits for the disk now and then.
    return min(_MOST_THREADS, (os.cpu_count() or 1) + 1)


def _write_heads(
    data_root: Path, journal: JournalReader, earlier: Mapping[str, FileFacts], digest: str
) -> Iterator[tuple[str, FileFacts]]:
    """Write every head's file and describe it, several layers and kinds at once."""
    tokens = journal.tokens if journal.header["settings"]["capture"]["capture_token_strings"] else None

    def write(number: int, files: list[HeadFile]) -> list[FileFacts]:
        with journal.stream(number) as stream:
            return write_heads(stream, files, tokens, digest)

    groups = [
        (number, files[first : first + _HEADS_AT_ONCE])
        for number, stream in enumerate(journal.header["streams"])
        for files in [_head_files(data_root, stream, earlier)]
        for first in range(0, len(files), _HEADS_AT_ONCE)
    ]
    with ThreadPoolExecutor(_n_threads()) as pool:
        try:
            for (_, files), facts in zip(
                groups, pool.map(write, *zip(*groups, strict=True)), strict=True
            ):
                yield from zip((file.path.parent.name for file in files), facts, strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _head_files(
    data_root: Path, stream: Mapping[str, Any], earlier: Mapping[str, FileFacts]
) -> list[HeadFile]:
    names = [head_name(stream["layer_idx"], head, stream["kind"]) for head in stream["heads"]]
    return [
        HeadFile(data_root / name / DATA_FILE, number, earlier.get(name))
        for number, name in enumerate(names)
    ]


def mark_complete(data_root: Path) -> dict[str, Any]:
    """Note in a finished data root that every text has been read, and give its manifest."""
    manifest = (read_manifest(data_root) or {}) | {"complete": True}
    write_text(data_root / CARD_FILE, render_card(manifest))
    write_manifest(data_root, manifest)
    return manifest
