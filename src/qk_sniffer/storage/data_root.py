"""A data root as a whole: is it free for a run, and how a journal becomes its finished files."""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa

from qk_sniffer.errors import UserError
from qk_sniffer.storage.card import render_card
from qk_sniffer.storage.files import write_text
from qk_sniffer.storage.journal import JournalReader
from qk_sniffer.storage.manifest import build_manifest, write_manifest
from qk_sniffer.storage.parquet import FileFacts, Tokens, sorted_runs, write_head, write_table
from qk_sniffer.storage.schema import (
    CARD_FILE,
    CONFIG_FILE,
    DATA_FILE,
    EXAMPLES_DIRECTORY,
    EXAMPLES_SCHEMA,
    JOURNAL_DIRECTORY,
    MANIFEST_FILE,
    head_name,
)

_HEAD_DIRECTORY = re.compile(r"l\d{2,}h\d{2,}[qk]")
_OWN_NAMES = {EXAMPLES_DIRECTORY, JOURNAL_DIRECTORY, MANIFEST_FILE, CARD_FILE, CONFIG_FILE}

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


def check_data_root(data_root: Path, overwrite: bool) -> None:
    """Make the directory if it is missing, and see that a run may write into it.

    Raises:
        UserError: It is not writable, or it holds something and ``overwrite`` is false.
    """
    try:
        data_root.mkdir(parents=True, exist_ok=True)
        probe = data_root / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"sniffer.output.data_root: {data_root} is not writable ({error.strerror}); name another "
            "directory or change its permissions"
        ) from error
    if overwrite or not any(data_root.iterdir()):
        return
    if (data_root / JOURNAL_DIRECTORY).exists():
        raise UserError(
            f"sniffer.output.data_root: {data_root} holds an interrupted run; write what it captured "
            f"with `qk-sniffer finalize {data_root}`, or set "
            "sniffer.output.overwrite to true to replace it"
        )
    raise UserError(
        f"sniffer.output.data_root: {data_root} is not empty; name a new directory, or set "
        "sniffer.output.overwrite to true to replace the run that it holds"
    )


def clear_data_root(data_root: Path) -> None:
    """Remove what a run writes; files of any other name stay."""
    for entry in data_root.iterdir():
        if entry.name not in _OWN_NAMES and not _HEAD_DIRECTORY.fullmatch(entry.name):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def finalize(data_root: Path, progress: Progress) -> dict[str, Any]:
    """Turn the journal of a data root into its Parquet files, card and manifest.

    Args:
        data_root: Has a journal whose writer is closed.
        progress: Wraps the iteration over the finished head files, given their number.

    Returns:
        The manifest. The journal is gone.

    Raises:
        UserError: There is no journal.
    """
    journal_directory = data_root / JOURNAL_DIRECTORY
    if not journal_directory.is_dir():
        raise UserError(f"{data_root}: no interrupted run is here; name the data root of one")
    journal = JournalReader(journal_directory)
    examples = write_table(
        data_root / EXAMPLES_DIRECTORY / DATA_FILE,
        pa.concat_tables([EXAMPLES_SCHEMA.empty_table(), *_examples(journal)]).sort_by("example_id"),
    )
    n_files = sum(len(stream["heads"]) for stream in journal.header["streams"])
    heads = dict(progress(_write_heads(data_root, journal), n_files))
    manifest = build_manifest(journal.header, examples, heads, complete=journal.complete)
    write_text(data_root / CARD_FILE, render_card(manifest))
    write_manifest(data_root, manifest)
    del journal
    shutil.rmtree(journal_directory)
    return manifest


def _examples(journal: JournalReader) -> Iterable[pa.Table]:
    return (batch.select(EXAMPLES_SCHEMA.names) for batch in journal.examples())


def _tokens(journal: JournalReader) -> Tokens | None:
    """The token strings of each example as views of the journal; None where none were captured."""
    if not journal.header["settings"]["capture"]["capture_token_strings"]:
        return None
    return {
        example_id.as_py(): tokens.values
        for batch in journal.examples()
        for example_id, tokens in zip(batch["example_id"], batch["tokens"], strict=True)
    }


def _write_heads(data_root: Path, journal: JournalReader) -> Iterable[tuple[str, FileFacts]]:
    """Write every head's file and describe it, the heads of a layer and kind in parallel."""
    tokens = _tokens(journal)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for stream in journal.header["streams"]:
            layer_idx, kind = stream["layer_idx"], stream["kind"]
            blocks = journal.blocks(layer_idx, kind)
            runs = sorted_runs(blocks)
            names = [head_name(layer_idx, head, kind) for head in stream["heads"]]
            paths = [data_root / name / DATA_FILE for name in names]
            write = partial(write_head, blocks, runs, stream["head_dim"], tokens)
            yield from zip(names, pool.map(write, paths, count()), strict=True)
