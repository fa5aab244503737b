"""How the moments of a journal and of finished runs become the files of a data root.

All of them are made inside the journal, and only then moved to their places one by one. From then on
they are the truth, since files of the finished run may be replaced already.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qk_sniffer.kinds import Kind
from qk_sniffer.moments import MomentTable, joined
from qk_sniffer.storage.file_facts import FileFacts, describe_file, moment_file
from qk_sniffer.storage.files import sync_directory, sync_file
from qk_sniffer.storage.moment_files import (
    count_tokens,
    describe_moment_file,
    moment_schemas,
    write_moments,
)
from qk_sniffer.storage.moment_sources import Moments, moments_there, together
from qk_sniffer.storage.parquet import write_table
from qk_sniffer.storage.schema import (
    JOURNAL_DIRECTORY,
    MOMENT_TEXTS,
    MOMENT_TEXTS_SCHEMA,
    MOMENTS_DIRECTORY,
    temporary_name,
)


def adds_moments(data_root: Path, header: Mapping[str, Any]) -> bool:
    """Whether finalizing changes the moments of a data root.

    Raises:
        UserError: Moments that are to be brought together are damaged, or share some texts.
    """
    if "moments" not in header["settings"]:
        return False
    if _staged(data_root).exists():
        return True
    moments, own = together(moments_there(data_root)), str(data_root / MOMENTS_DIRECTORY)
    if all(some.place == own for some in moments):
        return False
    for some in moments:
        some.require_intact(moment_schemas(header))
    return True


def stage_moments(data_root: Path, header: Mapping[str, Any]) -> None:
    """Make the files of all moments in the journal, unless an attempt that was cut off has done so.

    Args:
        data_root: Has a journal whose writers are closed.
        header: The journal's.

    Raises:
        UserError: As ``adds_moments``, which finds most of it before.
    """
    staged = _staged(data_root)
    if "moments" not in header["settings"] or staged.exists():
        return
    making = staged.with_name(temporary_name(staged.name))
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        _make(making, together(moments_there(data_root)), header)
    except BaseException:
        shutil.rmtree(making)
        raise
    making.rename(staged)
    sync_directory(staged.parent)


def _make(directory: Path, moments: Sequence[Moments], header: Mapping[str, Any]) -> None:
    """Write the files of some moments into a directory, and sync them."""
    schemas = moment_schemas(header)
    for some in moments:
        some.require_intact(schemas)
    for kind, schema in schemas.items():
        path = directory / Path(moment_file(kind)).name
        write_moments(path, schema, _layers(moments, kind, header["streams"]))
        sync_file(path)
    ids = np.sort(np.concatenate([np.empty(0, np.int32), *(some.example_ids for some in moments)]))
    texts = pa.table([ids], schema=MOMENT_TEXTS_SCHEMA)
    write_table(directory / Path(moment_file(MOMENT_TEXTS)).name, texts)


def _layers(
    moments: Sequence[Moments], kind: Kind, streams: Sequence[Mapping[str, Any]]
) -> Iterator[list[MomentTable]]:
    """The moments of a kind brought together, layer by layer, so that memory holds one layer's."""
    for layer_idx in sorted(stream["layer_idx"] for stream in streams if stream["kind"] == kind):
        tables = [table for some in moments for table in some.tables(kind, layer_idx)]
        yield [joined(tables)] if tables else []


def place_moments(data_root: Path, header: Mapping[str, Any]) -> dict[str, FileFacts]:
    """Move the files of moments to their places, and give what a manifest says of them by their names.

    There are none where no moments are summed.
    """
    if "moments" not in header["settings"]:
        return {}
    staged, directory = _staged(data_root), data_root / MOMENTS_DIRECTORY
    directory.mkdir(exist_ok=True)
    names = [*moment_schemas(header), MOMENT_TEXTS]
    for path in (data_root / moment_file(name) for name in names):
        if (staged / path.name).exists():
            (staged / path.name).replace(path)
    sync_directory(directory)
    sync_directory(staged)
    facts = {name: describe_moment_file(data_root / moment_file(name)) for name in names[:-1]}
    texts = data_root / moment_file(MOMENT_TEXTS)
    tokens = count_tokens(data_root / moment_file(names[0]))
    return facts | {MOMENT_TEXTS: describe_file(texts) | {"tokens": tokens}}


def _staged(data_root: Path) -> Path:
    return data_root / JOURNAL_DIRECTORY / MOMENTS_DIRECTORY
