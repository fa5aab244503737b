"""Is a data root what its manifest, its settings and its examples say it must be?

The rows that a head's file must hold follow from the settings and the examples table alone, so a row
that is lost, repeated or out of order is found without the model.
"""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import DatasetCard

from qk_sniffer.capture import (
    SAMPLERS,
    AttentionLayer,
    CapturedHeads,
    CapturedStream,
    Listed,
    Selection,
    captured_streams,
    heads_to_capture,
)
from qk_sniffer.errors import UserError, first_line
from qk_sniffer.kinds import SOFTMAX_COLUMNS, kinds_of
from qk_sniffer.storage import (
    CARD_FILE,
    DATA_FILE,
    EXAMPLES_DIRECTORY,
    MANIFEST_FILE,
    FileFacts,
    StoredRows,
    configs_of,
    damaged,
    examples_schema,
    has_softmax,
    head_files,
    head_name,
    head_schema,
    joined_checksum,
    keeps_rows,
    owner_of,
    parse_head_name,
    require_manifest,
    waiting_rows,
)
from qk_sniffer.verify.files import UNREADABLE, check_file
from qk_sniffer.verify.moments import check_moments

_TOKENS_AT_ONCE = 2**20


def verify(data_root: Path, *, trust_code: bool = False) -> list[str]:
    """Check every file of a data root.

    Args:
        data_root: The data root.
        trust_code: Whether a sampler may be imported that is none of ours.

    Returns:
        One line for each fault, beginning with the file; none if all is well.

    Raises:
        UserError: There is no manifest, it is damaged, or it names code that is not trusted.
    """
    manifest = require_manifest(data_root)
    selection = _selection_of(data_root, manifest, trust_code)
    # What a run at work has captured is for that run to merge.
    waiting = [] if owner_of(data_root) is not None else waiting_rows(data_root)
    faults = [
        f"{directory.name}: rows are waiting to be merged; run predict again, or "
        f"`qk-sniffer finalize {data_root}`"
        for directory in waiting
    ]
    try:
        kinds = kinds_of(manifest["settings"]["capture"])
        streams = captured_streams(captured_heads(manifest), kinds)
    except UserError as error:
        fault = f"its settings and its layers don't agree ({error})"
        raise damaged(data_root / MANIFEST_FILE, fault) from error
    names = [name for stream in streams for name in _names(stream)] if keeps_rows(manifest) else []
    faults += _check_names(data_root, manifest, names)
    faults += _check_card(data_root, manifest)
    examples, found = _check_examples(data_root, manifest)
    faults += found
    listed = None
    if selection.needs_lists and examples is not None:
        listed = _stored_positions(data_root, manifest, examples)
    faults += check_moments(data_root, manifest, streams, selection.sampler, examples)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(
            lambda s: _check_stream(data_root, manifest, s, selection, examples, listed), streams
        ):
            faults += found
    return faults


def _selection_of(data_root: Path, manifest: Mapping[str, Any], trust_code: bool) -> Selection:
    capture = manifest["settings"]["capture"]
    sampler_type = capture["sampler"]["type"]
    if not trust_code and sampler_type not in SAMPLERS:
        raise untrusted(data_root, "sniffer.capture.sampler.type", sampler_type)
    return Selection.of(capture)


def untrusted(data_root: Path, field: str, value: Any) -> UserError:
    """The error for a setting of a manifest, perhaps somebody else's, that lets code run.

    Args:
        data_root: The manifest's.
        field: The setting.
        value: What it is.
    """
    return UserError(
        f"{data_root / MANIFEST_FILE}: {field} is {json.dumps(value)}, so code that comes with the run "
        "would run; if you trust it, add --trust-code"
    )


def captured_heads(manifest: Mapping[str, Any]) -> dict[int, CapturedHeads]:
    """The heads that the settings of a manifest capture, by layer."""
    layers = [AttentionLayer.of(layer) for layer in manifest["layers"]]
    return heads_to_capture(manifest["settings"]["capture"], layers)


def _names(stream: CapturedStream) -> list[str]:
    """Directories of its heads."""
    return [head_name(stream.layer.layer_idx, head, stream.kind) for head in stream.heads]


def _check_names(data_root: Path, manifest: Mapping[str, Any], expected: Sequence[str]) -> list[str]:
    """The heads of settings, manifest and directories must be the same."""
    listed = set(manifest["heads"])
    there = {path.name for path in data_root.iterdir() if parse_head_name(path.name)}
    faults = [f"manifest.json: the head {name} is missing" for name in expected if name not in listed]
    faults += [
        f"{path}: in the manifest, but the settings don't capture this head"
        for name in sorted(listed - set(expected))
        for path in head_files(name, manifest["heads"][name])
    ]
    faults += [f"{name}: not in the manifest" for name in sorted(there - listed)]
    return faults + _unknown_files(data_root, {n: manifest["heads"][n] for n in sorted(listed & there)})


def _unknown_files(data_root: Path, heads: Mapping[str, FileFacts]) -> list[str]:
    """Files of rows that the manifest does not name, and that a pattern of names would find."""
    faults = []
    for name, facts in heads.items():
        there = (f"{name}/{path.name}" for path in (data_root / name).glob("*.parquet"))
        faults += [
            f"{path}: not in the manifest" for path in sorted({*there} - {*head_files(name, facts)})
        ]
    return faults


def _check_card(data_root: Path, manifest: Mapping[str, Any]) -> list[str]:
    path = data_root / CARD_FILE
    if not path.exists():
        return [f"{CARD_FILE}: missing, so load_dataset can't find heads by name"]
    try:
        configs = DatasetCard.load(path).data.to_dict().get("configs") or []
        listed = {config["config_name"]: config.get("description", "") for config in configs}
    except Exception as error:
        return [f"{CARD_FILE}: its front matter can't be read ({first_line(error)})"]
    return [
        f"{CARD_FILE}: {config['config_name']} is not listed with its checksum, so load_dataset may "
        "not find it or serve other rows from its cache"
        for config in configs_of(manifest)
        if config["config_name"] != EXAMPLES_DIRECTORY
        and config["description"] not in listed.get(config["config_name"], "")
    ]


def _check_files(
    data_root: Path, name: str, facts: FileFacts, schema: pa.Schema
) -> tuple[list[Path], list[str]]:
    """The files of a head whose rows can be trusted to be what was written, and their faults."""
    paths, faults = [], []
    files = head_files(name, facts)
    for label, about in files.items():
        path, found = check_file(data_root, label, about, schema)
        paths += [] if path is None else [path]
        faults += found
    if len(files) > 1 and facts["xxh3_128"] != joined_checksum(f["xxh3_128"] for f in files.values()):
        faults.append(f"{name}: its checksum is not that of its files together")
    return paths, faults


def _check_examples(data_root: Path, manifest: Mapping[str, Any]) -> tuple[pa.Table | None, list[str]]:
    schema = examples_schema(manifest["settings"])
    label = f"{EXAMPLES_DIRECTORY}/{DATA_FILE}"
    path, faults = check_file(data_root, label, manifest["examples"], schema)
    if path is None:
        return None, [*faults, "heads: their rows can't be checked without the examples"]
    table = pq.read_table(path, columns=["example_id", "n_tokens"])
    if (np.diff(table["example_id"].to_numpy().astype(np.int64)) <= 0).any():
        faults.append(f"{label}: not sorted by example_id, or an id is repeated")
        return None, faults
    return table, faults


def _stored_positions(data_root: Path, manifest: Mapping[str, Any], examples: pa.Table) -> Listed:
    """The positions that were kept of each text, where the dataset has listed them and nobody else.

    All heads hold the same, so those of one are what the others must have: of the one with the most
    rows, so that a row that is lost is missed where it is lost.
    """
    ids = examples["example_id"].to_numpy()
    heads: dict[str, FileFacts] = manifest["heads"]
    for name in sorted(heads, key=lambda name: -heads[name]["rows"]):
        try:
            paths = [str(data_root / path) for path in head_files(name, heads[name])]
            table = pq.read_table(paths, columns=["example_id", "position"])
            texts, positions = (column.to_numpy().astype(np.int64) for column in table.columns)
        except (*UNREADABLE, ValueError):
            # Named as a fault where the heads are checked.
            continue
        rows = np.unique((texts << 32) + positions)
        rows = rows[np.isin(rows >> 32, ids)]
        first, stop = (np.searchsorted(rows >> 32, ids, side) for side in ("left", "right"))
        return Listed(stop - first, rows & 0xFFFFFFFF)
    return Listed.of([np.empty(0, np.int64)] * ids.size)


def _check_stream(
    data_root: Path,
    manifest: Mapping[str, Any],
    stream: CapturedStream,
    selection: Selection,
    examples: pa.Table | None,
    listed: Listed | None,
) -> list[str]:
    """The files of one layer and kind against the rows that they must hold."""
    faults: list[str] = []
    heads: list[_Head] = []
    tokens = manifest["settings"]["capture"]["capture_token_strings"]
    for name in _names(stream):
        if name in manifest["heads"]:
            schema = head_schema(stream.width, softmax=stream.kind == "q" and has_softmax(manifest))
            facts, window = manifest["heads"][name], stream.layer.sliding_window
            paths, found = _check_files(data_root, name, facts, schema)
            faults += found
            if not found:
                label = next(iter(head_files(name, facts))) if len(paths) == 1 else name
                heads.append(_Head(paths, label, window, tokens, "lse" in schema.names))
    if examples is not None and heads:
        try:
            for expected in _expected_rows(stream, selection, examples, listed):
                for head in heads:
                    head.compare(expected)
            for head in heads:
                faults += head.end()
        except UserError as error:
            faults.append(str(error))
    return faults


def _expected_rows(
    stream: CapturedStream, selection: Selection, examples: pa.Table, listed: Listed | None
) -> Iterator[npt.NDArray[np.int64]]:
    """(3, K) example id, position and bucket of the rows that a stream keeps, some texts at a time."""
    ids = torch.from_numpy(examples["example_id"].to_numpy().astype(np.int64))
    lengths = torch.from_numpy(examples["n_tokens"].to_numpy().astype(np.int64))
    borders = (lengths.cumsum(0) // _TOKENS_AT_ONCE).diff().nonzero().flatten() + 1
    groups = [0, *borders.tolist(), len(ids)]
    for start, stop in itertools.pairwise(groups):
        some_ids = ids[start:stop]
        numbers = torch.full_like(some_ids, selection.random_stream(*stream.key))
        texts, positions = selection.draw(
            numbers,
            some_ids,
            lengths[start:stop],
            None if listed is None else listed.part(start, stop),
        )
        buckets = selection.sampler.buckets(positions)
        yield torch.stack([some_ids[texts], positions, buckets]).numpy()


class _Head:
    """One head's files while they are compared; the first fault is kept."""

    def __init__(
        self, paths: Sequence[Path], label: str, window: int | None, has_tokens: bool, has_softmax: bool
    ) -> None:
        columns = ["example_id", "position", "bucket", "sliding_window", "token_str"]
        self._rows = StoredRows(paths, [*columns, *(SOFTMAX_COLUMNS if has_softmax else ())])
        self._has_softmax = has_softmax
        self._label = label
        self._window = window
        self._has_tokens = has_tokens
        self._row = 0
        self._fault: str | None = None

    def compare(self, expected: npt.NDArray[np.int64]) -> None:
        """See that the next rows are these."""
        if self._fault is not None:
            return
        size = expected.shape[1]
        table = self._rows.take(size)
        stored = np.stack([table[i].to_numpy().astype(np.int64) for i in range(3)])
        differing = (stored != expected[:, : stored.shape[1]]).any(axis=0)
        if differing.any():
            at = int(differing.argmax())
            self._fault = (
                f"row {self._row + at} has (example_id, position, bucket) {_row(stored, at)} where "
                f"{_row(expected, at)} must follow: a row is lost, repeated or out of order"
            )
        elif stored.shape[1] < size:
            self._fault = f"it ends before {_row(expected, stored.shape[1])}: rows are lost"
        elif table["sliding_window"].unique().to_pylist() not in ([], [self._window]):
            self._fault = f"sliding_window is not that of the layer, {self._window}"
        elif table["token_str"].null_count != (0 if self._has_tokens else size):
            self._fault = "token_str is null where it should not be, or the other way round"
        elif self._has_softmax and (fault := fault_of_statistics(table)):
            self._fault = fault
        self._row += size

    def end(self) -> list[str]:
        """The fault, if there is one."""
        if self._fault is None and self._rows.take(1).num_rows:
            self._fault = f"it goes on after row {self._row - 1}, the last that the examples give it"
        return [] if self._fault is None else [f"{self._label}: {self._fault}"]


def fault_of_statistics(rows: pa.Table) -> str | None:
    """Which statistics of some queries no softmax has; None where all may be one's.

    Those of a vector that is not finite may be anything.

    Args:
        rows: The columns of the statistics, and position.
    """
    values = {name: rows[name].to_numpy() for name in ("position", *SOFTMAX_COLUMNS)}
    is_finite = np.isfinite(values["lse"])
    rounding = 1e-3
    is_wrong = {
        name: (values[name] < -rounding) | (values[name] > 1 + rounding)
        for name in ("max_prob", "sink_prob", "local_prob")
    }
    is_wrong["entropy"] = values["entropy"] < -rounding
    # Where a learned sink leaves the keys a mass m below 1, -m ln m comes on top, at most 1/e.
    most = np.log(values["position"] + 1.0) + 1 / np.e
    is_wrong["entropy"] |= values["entropy"] > most + rounding
    is_wrong["argmax_position"] = values["argmax_position"] > values["position"]
    is_wrong["argmax_position"] |= values["argmax_position"] < 0
    wrong = [name for name, rows in is_wrong.items() if (rows & is_finite).any()]
    return f"{wrong[0]} is what no softmax gives" if wrong else None


def _row(rows: npt.NDArray[np.int64], at: int) -> tuple[int, ...]:
    return tuple(rows[:, at].tolist())
