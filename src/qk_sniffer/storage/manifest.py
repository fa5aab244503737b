"""The manifest: what a data root holds, with which settings it was made, and the files' checksums."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.errors import UserError
from qk_sniffer.kinds import Part, part_width
from qk_sniffer.storage.checked import manifest_fault, require_own_files, require_schema_version
from qk_sniffer.storage.file_facts import FileFacts
from qk_sniffer.storage.files import damaged, read_json, write_text
from qk_sniffer.storage.ownership import owner_of
from qk_sniffer.storage.schema import (
    MANIFEST_FILE,
    MOMENT_TEXTS,
    SCHEMA_VERSION,
    has_softmax,
    head_name,
    keeps_rows,
    parse_head_name,
)

_OF_THE_HEADER = ("fingerprint", "versions", "settings", "layers", "notes")


def build_manifest(
    header: Mapping[str, Any],
    examples: FileFacts,
    heads: Mapping[str, FileFacts],
    buckets: Mapping[int, int],
    *,
    complete: bool,
    beyond_positions: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The manifest of a data root.

    Args:
        header: The journal's header: fingerprint, versions, settings, layers and notes, and streams,
            which are kept where no names of heads tell them.
        examples: Rows, bytes and checksum of the examples table.
        heads: The same of each head's file, by its name.
        buckets: Rows of all heads in each bucket.
        complete: Whether the run read every text.
        beyond_positions: What ``count_beyond`` found.
    """
    beyond = {} if beyond_positions is None else {"beyond_positions": beyond_positions}
    return {
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        **{name: header[name] for name in _OF_THE_HEADER},
        **beyond,
        "examples": examples,
        "buckets": {str(bucket): rows for bucket, rows in buckets.items()},
        "heads": heads,
        **({} if keeps_rows(header) else {"streams": header["streams"]}),
    }


def count_beyond(n_tokens: npt.NDArray[np.int32], n_positions: int | None) -> dict[str, int] | None:
    """How many texts are longer than the positions that the model covers; None where none is.

    Args:
        n_tokens: (N,) tokens in each text of a data root.
        n_positions: Positions that the model covers; None where that is not known, or any number.
    """
    n_texts = 0 if n_positions is None else int((n_tokens > n_positions).sum())
    if n_positions is None or n_texts == 0:
        return None
    return {"positions": n_positions, "texts": n_texts, "longest": int(n_tokens.max())}


def describe_beyond(manifest: Mapping[str, Any]) -> str | None:
    """What a reader is told of texts beyond the model's positions; None where there are none."""
    beyond = manifest.get("beyond_positions")
    if beyond is None:
        return None
    return (
        f"{beyond['texts']:,} of {manifest['examples']['rows']:,} texts are longer than the "
        f"{beyond['positions']:,} positions that the model's config covers, the longest has "
        f"{beyond['longest']:,} tokens"
    )


def describe_moments(manifest: Mapping[str, Any]) -> str | None:
    """What the moments of a run count; None where it has none."""
    if "moments" not in manifest:
        return None
    texts = manifest["moments"][MOMENT_TEXTS]
    return f"{texts['tokens']:,} tokens of {texts['rows']:,} texts"


def count_rows(manifest: Mapping[str, Any]) -> int:
    """Rows of all heads."""
    return sum(head["rows"] for head in manifest["heads"].values())


def captured_names(manifest: Mapping[str, Any]) -> list[str]:
    """The names of all captured heads, also of those that have moments and no files."""
    streams = manifest.get("streams", ())
    return [*manifest["heads"], *(name for stream in streams for name in stream_names(stream))]


def stream_names(stream: Mapping[str, Any]) -> list[str]:
    """The names of the heads of a stream."""
    return [head_name(stream["layer_idx"], head, stream["kind"]) for head in stream["heads"]]


def header_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a journal whose rows go into the files of a manifest."""
    layers = {layer["layer_idx"]: layer for layer in manifest["layers"]}
    streams: dict[tuple[int, str], dict[str, Any]] = {}
    for name in manifest["heads"]:
        parsed = parse_head_name(name)
        assert parsed is not None
        layer_idx, head, kind = parsed
        parts: list[Part] = [kind, "softmax"] if kind == "q" and has_softmax(manifest) else [kind]
        for part in parts:
            new = _stream(layers[layer_idx], part)
            streams.setdefault((layer_idx, part), new)["heads"].append(head)
    return {name: manifest[name] for name in _OF_THE_HEADER} | {
        "streams": manifest.get("streams") or list(streams.values()),
        "n_positions": manifest.get("beyond_positions", {}).get("positions"),
    }


def _stream(layer: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """A stream of a layer, without heads."""
    return {
        "layer_idx": layer["layer_idx"],
        "kind": part,
        "heads": [],
        "head_dim": part_width(part, layer["head_dim"], layer.get("value_head_dim")),
    }


def write_manifest(data_root: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, the mark of a finished data root."""
    write_text(data_root / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def read_manifest(data_root: Path) -> dict[str, Any] | None:
    """The manifest of a data root, None where it is not finished.

    Raises:
        UserError: It is damaged, or of a newer version.
    """
    path = data_root / MANIFEST_FILE
    if not path.exists():
        return None
    manifest: dict[str, Any] = read_json(path)
    require_schema_version(path, manifest)
    if fault := manifest_fault(manifest):
        raise damaged(path, f"it is no manifest of a run ({fault})")
    return manifest


def require_manifest(data_root: Path) -> dict[str, Any]:
    """The manifest of a finished data root.

    Raises:
        UserError: There is none, or it is damaged.
    """
    if os.path.lexists(data_root / MANIFEST_FILE):
        require_own_files(data_root)
    manifest = read_manifest(data_root)
    if manifest is None:
        if (owner := owner_of(data_root)) is not None:
            raise UserError(
                f"{data_root} belongs to {owner}, which has not written its files yet; wait for its end"
            )
        raise UserError(
            f"{data_root}: no manifest.json is here, so no run has finished; name a data root, or "
            f"write what an interrupted run captured with `qk-sniffer finalize {data_root}`"
        )
    return manifest
