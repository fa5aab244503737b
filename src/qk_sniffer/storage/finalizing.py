"""How a journal becomes the finished files of a data root."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from qk_sniffer.errors import UserError
from qk_sniffer.kinds import KINDS
from qk_sniffer.processes import ALONE, Dealer, Ranks
from qk_sniffer.storage.card import write_card
from qk_sniffer.storage.checked import require_own_files
from qk_sniffer.storage.commits import (
    COMMITS_FILE,
    HEADER_FILE,
    Commit,
    CommitLog,
    append_records,
    drop_broken,
    is_intact,
    locked_journal,
    read_commits,
    read_journal,
    write_commits,
)
from qk_sniffer.storage.examples import read_examples
from qk_sniffer.storage.file_facts import FileFacts, head_files
from qk_sniffer.storage.files import explained_writing, sync_directory
from qk_sniffer.storage.finalizing_moments import adds_moments, place_moments, stage_moments
from qk_sniffer.storage.finished import FinishedRun, finished_runs
from qk_sniffer.storage.journal import JournalWriter
from qk_sniffer.storage.manifest import (
    build_manifest,
    count_beyond,
    header_of,
    read_manifest,
    stream_names,
    write_manifest,
)
from qk_sniffer.storage.non_finite import NonFinite, non_finite_field
from qk_sniffer.storage.parquet import EarlierFiles, HeadFiles, write_heads, write_table
from qk_sniffer.storage.reader import JournalReader
from qk_sniffer.storage.reports import remove_report
from qk_sniffer.storage.schema import (
    DATA_FILE,
    EXAMPLES_DIRECTORY,
    FINISHED_JOURNAL_DIRECTORY,
    JOURNAL_DIRECTORY,
    MANIFEST_FILE,
    PULLED_DIRECTORY,
    examples_schema,
    keeps_rows,
)
from qk_sniffer.storage.shards import part_directories

_MOST_THREADS = 16
_HEADS_AT_ONCE = 16
"""Files that one thread has open; the heads of a layer and kind share their numbers in such groups."""

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
_Group = tuple[int, list[HeadFiles]]
"""Some heads of one layer and kind that lie in the same parts: the stream's number, and their files."""
_Share = tuple[dict[str, FileFacts], npt.NDArray[np.int32]]
"""What a process has written: its heads, and the texts with rows that are not finite."""


def finalize(
    data_root: Path, progress: Progress, *, complete: bool = False, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Turn the journal of a data root into Parquet files, card and manifest.

    Rows of a finished run that is there already, and of one that was pulled, are merged. An attempt
    that was cut off is continued.

    Args:
        data_root: Has a journal whose writers are closed.
        progress: Wraps the iteration over the head files that this process has finished, given their
            number.
        complete: Whether every text has been read.
        ranks: The processes that share the work; each of them calls this.

    Returns:
        The manifest. The journal is gone.

    Raises:
        UserError: There is no journal, it is damaged or in use, its moments and those of finished runs
            can't be added, or the disk refuses; what the journal holds stays there.
    """
    directory = data_root / JOURNAL_DIRECTORY
    if data_root.is_dir():
        ranks.first(lambda: require_own_files(data_root))
    if not ranks.first((directory / HEADER_FILE).exists):
        return ranks.first(lambda: _end_removal(data_root))
    again = f"qk-sniffer finalize {data_root}"
    explained = explained_writing(
        data_root, f"make room or mend the disk, then go on with `{again}`; nothing is lost"
    )
    with ExitStack() as locks:

        @explained
        def lock() -> None:
            locks.enter_context(locked_journal(directory))

        @explained
        def read() -> tuple[JournalReader, list[FinishedRun]]:
            reader = JournalReader(directory)
            return reader, finished_runs(data_root, reader.log.example_ids())

        @explained
        def begin(damaged: Iterable[Sequence[Commit]], complete: bool) -> None:
            _drop_damaged(directory, list(chain.from_iterable(damaged)))
            with (part_directories(directory)[0] / COMMITS_FILE).open("ab", buffering=0) as log:
                append_records(log, [complete])

        ranks.first(lock)
        journal, earlier = ranks.run(read)
        if ranks.first(lambda: journal.log.n_broken > 0):
            ranks.first(explained(lambda: _drop_broken(directory)))
            complete = False
        adds_moments_too = ranks.first(explained(lambda: adds_moments(data_root, journal.header)))
        adds_nothing = (
            not journal.log.commits
            and [run.directory for run in earlier] == [data_root]
            and not adds_moments_too
        )
        # An attempt that was cut off may have joined the examples already, but not the manifest.
        if ranks.first(lambda: adds_nothing and journal.log.finalizing is None):
            return ranks.first(explained(lambda: _discard(data_root, earlier[0].manifest, complete)))
        if journal.log.finalizing is None:
            own = journal.log.commits[ranks.rank :: ranks.size]
            damaged = ranks.gather(ranks.run(explained(lambda: _damaged(own, ranks))))
            ranks.first(lambda: begin(damaged, complete))
            journal.log.finalizing = complete
        ranks.first(explained(lambda: stage_moments(data_root, journal.header)))
        examples = ranks.run(
            explained(lambda: _all_examples(journal, earlier) if ranks.is_first else None)
        )
        digest = ranks.first(explained(lambda: _digest(journal.header, examples)))
        groups = _groups(data_root, journal, earlier)
        shares = ranks.gather(
            ranks.run(explained(lambda: _write_share(journal, groups, digest, progress, ranks)))
        )
        manifest = ranks.first(explained(lambda: _end(data_root, journal, examples, shares)))
    ranks.first(explained(lambda: shutil.rmtree(data_root / FINISHED_JOURNAL_DIRECTORY)))
    return manifest


def merge_pulled(data_root: Path, progress: Progress) -> dict[str, Any]:
    """Make a run that was pulled, what the journal holds, and the finished run that is there one.

    Args:
        data_root: Holds a pulled run, and perhaps the others.
        progress: As in ``finalize``.

    Returns:
        The manifest.

    Raises:
        UserError: As in ``finalize``.
    """
    journal, runs = data_root / JOURNAL_DIRECTORY, finished_runs(data_root)
    if not runs:
        raise UserError(f"{data_root / PULLED_DIRECTORY}: damaged, it has no manifest; remove it")
    if not (journal / HEADER_FILE).exists():
        headers = [header_of(run.manifest) for run in runs]
        # A run without texts beyond the model's positions does not say how many those are.
        n_positions = next((h["n_positions"] for h in headers if h["n_positions"]), None)
        JournalWriter(journal, headers[0] | {"n_positions": n_positions}).close()
    is_whole = not read_journal(journal).commits and all(run.manifest["complete"] for run in runs)
    return finalize(data_root, progress, complete=is_whole)


def _end_removal(data_root: Path) -> dict[str, Any]:
    """Remove the rest of a journal whose files are all written, and give the manifest."""
    manifest = read_manifest(data_root)
    if manifest is None or not (data_root / FINISHED_JOURNAL_DIRECTORY).exists():
        raise UserError(f"{data_root}: no interrupted run is here; name the data root of one")
    shutil.rmtree(data_root / FINISHED_JOURNAL_DIRECTORY)
    return manifest


def _discard(data_root: Path, manifest: dict[str, Any], complete: bool) -> dict[str, Any]:
    """Remove a journal that adds nothing, and give the manifest, which may be complete now."""
    if complete and not manifest["complete"]:
        manifest = manifest | {"complete": True}
        write_card(data_root, manifest)
        write_manifest(data_root, manifest)
    shutil.rmtree(data_root / PULLED_DIRECTORY, ignore_errors=True)
    shutil.rmtree(data_root / JOURNAL_DIRECTORY)
    return manifest


def _drop_broken(journal: Path) -> None:
    """Drop torn and damaged lines of the logs, to which nothing may be appended."""
    for part in part_directories(journal):
        drop_broken(part, read_commits(part), "what they stood for is not in the files")


def _damaged(commits: Sequence[Commit], ranks: Ranks) -> list[Commit]:
    """The batches that are not what was written."""
    with ThreadPoolExecutor(n_threads(ranks)) as pool:
        intact = list(pool.map(is_intact, commits))
    return [commit for commit, good in zip(commits, intact, strict=True) if not good]


def _drop_damaged(journal: Path, damaged: Sequence[Commit]) -> None:
    """Drop the batches that a disk has damaged, and stop where there are any."""
    files = sorted({commit.segment for commit in damaged})
    places = {(commit.segment, commit.start) for commit in damaged}
    for part in {file.parent for file in files}:
        kept = [c for c in read_commits(part).commits if (c.segment, c.start) not in places]
        write_commits(part, kept)
    if damaged:
        n_examples = CommitLog([*damaged]).example_ids().size
        raise UserError(
            f"{', '.join(map(str, files))}: damaged, the rows of {n_examples} texts are not what was "
            "written and were dropped; run predict again to capture them anew, or `qk-sniffer finalize "
            f"{journal.parent}` to do without them"
        )


def _all_examples(journal: JournalReader, earlier: Sequence[FinishedRun]) -> pa.Table:
    """The examples table: those of the finished runs that are merged, and the others of the journal."""
    schema = examples_schema(journal.header["settings"])
    tables = [schema.empty_table()]
    for run in earlier:
        stored = read_examples(run.directory / EXAMPLES_DIRECTORY / DATA_FILE, schema=schema)
        tables.append(stored.filter(pa.array(run.selects(stored["example_id"].to_numpy()))))
    stored_ids = pa.concat_tables(tables)["example_id"].to_numpy()
    for batch in journal.examples():
        is_new = ~np.isin(batch["example_id"].to_numpy(), stored_ids)
        tables.append(batch.select(schema.names).filter(pa.array(is_new)))
    return pa.concat_tables(tables).sort_by("example_id")


def _digest(header: Mapping[str, Any], examples: Any) -> str:
    """Names what the files hold: settings and examples, however they were captured."""
    digest = xxhash.xxh3_64(json.dumps(header["fingerprint"], sort_keys=True).encode())
    digest.update(examples["example_id"].to_numpy().tobytes())
    return digest.hexdigest()


def n_threads(ranks: Ranks = ALONE) -> int:
    """Threads of each process that write files."""
    # One more than there are cores, since a thread waits for the disk now and then.
    return min(_MOST_THREADS, (os.cpu_count() or 1) // ranks.local_size + 1)


def _write_share(
    journal: JournalReader, groups: Sequence[_Group], digest: str, progress: Progress, ranks: Ranks
) -> _Share:
    """Write the head files that fall to this process, and describe them."""
    dealer = Dealer(ranks.size)
    own = [group for group in groups if dealer.deal(len(group[1])) == ranks.rank]
    finished = _write_heads(journal, own, digest, ranks)
    heads: dict[str, FileFacts] = {}
    example_ids = np.empty(0, np.int32)
    for name, (facts, non_finite) in progress(finished, sum(len(files) for _, files in own)):
        heads[name] = facts
        example_ids = np.union1d(example_ids, non_finite.example_ids)
    return heads, example_ids


def _groups(data_root: Path, journal: JournalReader, earlier: Sequence[FinishedRun]) -> list[_Group]:
    """The heads of every layer and kind, some at a time."""
    groups = []
    for number, stream in enumerate(journal.header["streams"]):
        if not _has_files(journal.header, stream):
            continue
        files = [
            HeadFiles(data_root / name, head, _earlier_files(name, earlier))
            for head, name in enumerate(stream_names(stream))
        ]
        groups += [
            (number, [files[head] for head in heads[first : first + _HEADS_AT_ONCE]])
            for heads in journal.together(number)
            for first in range(0, len(heads), _HEADS_AT_ONCE)
        ]
    return groups


def _has_files(header: Mapping[str, Any], stream: Mapping[str, Any]) -> bool:
    """Whether the heads of a stream have files of their own."""
    return keeps_rows(header) and stream["kind"] in KINDS


def _earlier_files(name: str, earlier: Sequence[FinishedRun]) -> tuple[EarlierFiles, ...]:
    for run in earlier:
        if name not in run.manifest["heads"]:
            raise UserError(
                f"{run.directory / MANIFEST_FILE}: damaged, it does not name the head {name}; restore "
                "it from a copy, or set sniffer.output.overwrite to true to start anew"
            )
    return tuple(
        EarlierFiles(
            run.directory / name,
            {
                run.directory / path: facts
                for path, facts in head_files(name, run.manifest["heads"][name]).items()
            },
            run.selects,
        )
        for run in earlier
    )


def _write_heads(
    journal: JournalReader, groups: Sequence[_Group], digest: str, ranks: Ranks
) -> Iterator[tuple[str, tuple[FileFacts, NonFinite]]]:
    """Write every head's file and describe it, several layers and kinds at once."""
    tokens = journal.tokens if journal.header["settings"]["capture"]["capture_token_strings"] else None

    def write(group: _Group) -> list[tuple[FileFacts, NonFinite]]:
        number, files = group
        with ExitStack() as stack:
            head = files[0].number
            stream = stack.enter_context(journal.stream(number, head))
            beside = _statistics_beside(journal.header["streams"], number)
            statistics = None if beside is None else stack.enter_context(journal.stream(beside, head))
            return write_heads(stream, files, tokens, digest, statistics)

    with ThreadPoolExecutor(n_threads(ranks)) as pool:
        try:
            for (_, files), written in zip(groups, pool.map(write, groups), strict=True):
                yield from zip((head.directory.name for head in files), written, strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _statistics_beside(streams: Sequence[Mapping[str, Any]], number: int) -> int | None:
    """The number of the stream with the statistics of a stream of queries; None where there is none."""
    layer_idx, kind = streams[number]["layer_idx"], streams[number]["kind"]
    return next(
        (
            other
            for other, stream in enumerate(streams)
            if kind == "q" and (stream["layer_idx"], stream["kind"]) == (layer_idx, "softmax")
        ),
        None,
    )


def _end(
    data_root: Path, journal: JournalReader, examples: Any, shares: Sequence[_Share]
) -> dict[str, Any]:
    """Write what describes the files, and put the journal away."""
    facts = write_table(data_root / EXAMPLES_DIRECTORY / DATA_FILE, examples)
    found = {name: facts for heads, _ in shares for name, facts in heads.items()}
    streams = [s for s in journal.header["streams"] if _has_files(journal.header, s)]
    ordered = {name: found[name] for stream in streams for name in stream_names(stream)}
    complete = journal.log.finalizing is True
    buckets = _rows_by_bucket(data_root, streams, ordered)
    manifest = build_manifest(
        journal.header,
        facts,
        ordered,
        buckets,
        complete=complete,
        beyond_positions=count_beyond(
            examples["n_tokens"].to_numpy(), journal.header.get("n_positions")
        ),
    )
    if moments := place_moments(data_root, journal.header):
        manifest["moments"] = moments
    manifest |= non_finite_field(ordered, [example_ids for _, example_ids in shares])
    # Its pictures are of fewer texts.
    remove_report(data_root)
    write_card(data_root, manifest)
    write_manifest(data_root, manifest)
    shutil.rmtree(data_root / PULLED_DIRECTORY, ignore_errors=True)
    journal.directory.rename(data_root / FINISHED_JOURNAL_DIRECTORY)
    sync_directory(data_root)
    return manifest


def _rows_by_bucket(
    data_root: Path, streams: Sequence[Mapping[str, Any]], heads: Mapping[str, FileFacts]
) -> dict[int, int]:
    """Rows of all heads in each bucket; the heads of a layer and kind share theirs."""

    def count(stream: Mapping[str, Any]) -> Counter[int]:
        counts: Counter[int] = Counter()
        name = stream_names(stream)[0]
        for path in head_files(name, heads[name]):
            with pq.ParquetFile(data_root / path) as file:
                for number in range(file.num_row_groups):
                    buckets = file.read_row_group(number, ["bucket"])["bucket"]
                    for bucket in buckets.value_counts().to_pylist():
                        counts[bucket["values"]] += bucket["counts"] * len(stream["heads"])
        return counts

    with ThreadPoolExecutor(n_threads()) as pool:
        return dict(sorted(sum(pool.map(count, streams), Counter[int]()).items()))
