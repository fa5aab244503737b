"""Files of a data root as somebody else may have made them: each is checked before it is believed.

A manifest comes from a branch of the Hub or a copied directory as often as from a run on this machine,
and its names become paths. JSON Schema says what each field may be; fields that are not named here are
those of a later version, and stay.
"""

import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import extend

from qk_sniffer.errors import UserError
from qk_sniffer.kinds import KINDS, PARTS, part_width
from qk_sniffer.storage.file_facts import MOST_FILES
from qk_sniffer.storage.schema import (
    DIRECTORIES,
    FILES,
    HEAD_DIRECTORY,
    MOMENT_TEXTS,
    SCHEMA_VERSION,
    keeps_rows,
    parse_head_name,
    temporary_name,
)

_MOST = 2**53
_MOST_INT32 = 2**31 - 1
_MOST_HEADS, _MOST_LAYERS, _LONGEST_VECTOR = 2**20, 2**20, 2**20
_SHOWN = 100


def _integer(least: int = 0, most: int = _MOST) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


def _object(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {"type": "object", "required": list(required), "properties": properties}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _array(items: Mapping[str, Any], least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


_TEXT, _FLAG, _NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "number"}
_NAME = _or_null(_TEXT)
_TEXTS = {"anyOf": [_TEXT, _array(_TEXT, 1)]}
_NUMBERS = _or_null(_array(_integer(0, _MOST_LAYERS), 1))
_LAYER_IDX = _integer(0, _MOST_LAYERS)
_FACTS: dict[str, Any] = {
    "rows": _integer(),
    "bytes": _integer(),
    "xxh3_128": {"type": "string", "pattern": r"^[0-9a-f]{32}\Z"},
}
_FILE = _object(_FACTS)
_HEAD = _object(
    _FACTS,
    {"non_finite": _integer(1), "files": _array(_FILE, 2) | {"maxItems": MOST_FILES}},
)
_CAPTURE = _object(
    {
        "capture_queries": _FLAG,
        "capture_keys": _FLAG,
        "layers": _NUMBERS,
        "heads": _NUMBERS,
        "head_sampling": _or_null(_object({"count": _integer(1), "seed": {"type": "integer"}})),
        "full_attention_only": _FLAG,
        "capture_pre_rope": _FLAG,
        "capture_token_strings": _FLAG,
        "min_bucket_size": _integer(1),
        "sampler": _object(
            {
                "type": _TEXT,
                "base_rate": {"type": "number", "minimum": 1e-30, "exclusiveMaximum": math.inf},
                "seed": {"type": "integer", "minimum": -(2**63), "exclusiveMaximum": 2**64},
            },
            {
                "keep_first": _integer(),
                "positions": _array(_integer(0, _MOST_INT32), 1),
                "shared": _FLAG,
            },
        ),
    },
    {
        "capture_values": _FLAG,
        "capture_outputs": _FLAG,
        "capture_softmax": _FLAG,
        "local_positions": _integer(1),
    },
)
_SETTINGS = _object(
    {
        "model": _object({}, {"name": _NAME, "revision": _NAME, "dtype": _NAME}),
        "data": _object(
            {},
            {
                "path": _or_null(_TEXTS),
                "data_files": {"anyOf": [_TEXTS, {"type": "object", "additionalProperties": _TEXTS}]},
                "split": _NAME,
                "positions_column": _NAME,
                "tokenizer": _object({}, {"max_length": _or_null(_integer(1))}),
            },
        ),
        "capture": _CAPTURE,
    },
    {"moments": _object(dict.fromkeys(("enabled", "by_bucket", "pre_rope", "cross"), _FLAG))},
)
_SLOPES = _or_null(_array(_NUMBER))
_LAYER = _object(
    {
        "layer_idx": _LAYER_IDX,
        "num_attention_heads": _integer(1, _MOST_HEADS),
        "num_key_value_heads": _integer(1, _MOST_HEADS),
        "head_dim": _integer(1, _LONGEST_VECTOR),
        "sliding_window": _or_null(_integer(1, _MOST_INT32)),
    },
    {
        "chunked": _FLAG,
        "value_head_dim": _or_null(_integer(1, _LONGEST_VECTOR)),
        "scores": _or_null(
            _object(
                {"scaling": _NUMBER},
                {"softcap": _or_null(_NUMBER), "alibi_slopes": _SLOPES, "sinks": _SLOPES},
            )
        ),
    },
)
_RUN: dict[str, Any] = {
    "fingerprint": {"type": "object"},
    "versions": {"type": "object", "additionalProperties": _TEXT},
    "settings": _SETTINGS,
    "layers": _array(_LAYER, 1),
    "notes": _array(_TEXT),
}
_STREAM = _object(
    {
        "layer_idx": _LAYER_IDX,
        "kind": {"enum": list(PARTS)},
        "heads": _array(_integer(0, _MOST_HEADS), 1),
        "head_dim": _integer(1, _LONGEST_VECTOR),
    }
)
_MANIFEST = _object(
    {
        "schema_version": _integer(1),
        "complete": _FLAG,
        **_RUN,
        "examples": _object(_FACTS, {"files": False}),
        "buckets": {
            "type": "object",
            "propertyNames": {"pattern": r"^[0-9]{1,10}\Z"},
            "additionalProperties": _integer(),
        },
        "heads": {
            "type": "object",
            "propertyNames": {"pattern": rf"^(?:{HEAD_DIRECTORY.pattern})\Z"},
            "additionalProperties": _HEAD,
        },
    },
    {
        "streams": _array(_STREAM, 1),
        "beyond_positions": _object(
            {"positions": _integer(1), "texts": _integer(1), "longest": _integer(1)}
        ),
        "moments": _object({MOMENT_TEXTS: _object({**_FACTS, "tokens": _integer()})})
        | {
            "propertyNames": {"enum": [*KINDS, MOMENT_TEXTS]},
            "additionalProperties": _object(_FACTS, {"non_finite": _integer(1)}),
        },
        "non_finite": _object(
            {"rows": _integer(1), "texts": _integer(1), "layers": _array(_LAYER_IDX, 1)}
        ),
    },
)
_HEADER = _object({**_RUN, "streams": _array(_STREAM, 1)}, {"n_positions": _or_null(_integer(1))})
_PUBLICATION = _object(
    {"repo_id": _TEXT, "branch": _TEXT},
    {"private": _FLAG, "replaces": _or_null({"pattern": r"^[0-9a-f]{40}\Z", **_TEXT}), "card": _TEXT},
)


_SEGMENT = re.compile(r"segment-[0-9]{5,9}\.arrow")


def _is_integer(_: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(_: Any, value: Any) -> bool:
    # JSON has no NaN; softcaps and sinks may be infinite, and integers larger than any float.
    is_integer = _is_integer(_, value) and abs(value) <= _MOST
    return is_integer or (isinstance(value, float) and not math.isnan(value))


_Validator = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine_many(
        {"integer": _is_integer, "number": _is_number}
    ),
)


def manifest_fault(content: Any) -> str | None:
    """What is wrong with the manifest of a run; None where nothing is."""
    return _fault(_MANIFEST, content) or _fault_of_heads(content)


def header_fault(content: Any) -> str | None:
    """What is wrong with the header of a journal; None where nothing is."""
    return _fault(_HEADER, content) or _fault_of_streams(content)


def is_commit(content: Any) -> bool:
    """Whether this is the record of a batch, or of finalizing, in the log of a journal.

    There may be a million of them, so no schema looks at each number.
    """
    if not isinstance(content, dict):
        return False
    if "finalizing" in content:
        return isinstance(content["finalizing"], bool)
    places: list[Any] = [content.get(name) for name in ("start", "examples", "index", "stop")]
    try:
        ids = np.asarray(content.get("example_ids"))
    except ValueError:
        return False
    return (
        content.keys() == {"segment", "start", "stop", "index", "examples", "digest", "example_ids"}
        and all(_is_integer(None, place) for place in places)
        and [0, *places] == sorted([0, *places])
        and isinstance(content["digest"], str)
        and isinstance(content["segment"], str)
        and _SEGMENT.fullmatch(content["segment"]) is not None
        and ids.ndim == 1
        and (ids.size == 0 or (ids.dtype.kind == "i" and abs(ids).max() <= 2**31))
    )


def publication_fault(content: Any) -> str | None:
    """What is wrong with the place of a run on the Hub; None where nothing is."""
    return _fault(_PUBLICATION, content)


def _fault(schema: dict[str, Any], content: Any) -> str | None:
    error = best_match(_Validator(schema).iter_errors(content))
    if error is None:
        return None
    place = ".".join(str(part)[:_SHOWN] for part in error.absolute_path)
    message = str(error.message)
    if len(message) > _SHOWN:
        message = f"{message[:_SHOWN]}…"
    return f"{place}: {message}" if place else message


def _fault_of_layers(layers: list[dict[str, Any]]) -> str | None:
    """Whether the numbers of the layers agree with each other."""
    seen: set[int] = set()
    for layer in layers:
        idx, n_heads = layer["layer_idx"], layer["num_attention_heads"]
        scores = layer.get("scores") or {}
        lists = [scores.get(name) for name in ("alibi_slopes", "sinks")]
        if idx in seen:
            return f"layers: layer {idx} is there twice"
        if layer["num_key_value_heads"] > n_heads:
            return f"layers: layer {idx} has more key heads than query heads"
        if any(values is not None and len(values) != n_heads for values in lists):
            return f"layers: layer {idx} has other than {n_heads} slopes or sinks"
        seen.add(idx)
    return None


def _fault_of_heads(manifest: dict[str, Any]) -> str | None:
    """Whether every head is one of a layer, with files or, where the sampler is none, in streams."""
    if fault := _fault_of_streams(manifest):
        return fault
    has_rows = keeps_rows(manifest)
    if ("moments" in manifest) != ("moments" in manifest["settings"]):
        return "moments: they must be there where the settings have some, and only there"
    if (bool(manifest["heads"]), "streams" in manifest) != (has_rows, not has_rows):
        return "heads: there must be some, or streams in their place where the sampler is none"
    layers = {layer["layer_idx"]: layer for layer in manifest["layers"]}
    for name in manifest["heads"]:
        parsed = parse_head_name(name)
        assert parsed is not None
        layer_idx, head, kind = parsed
        layer = layers.get(layer_idx)
        if layer is None or head >= layer[KINDS[kind].heads]:
            return f"heads: {name} is no head of the layers"
    return None


def _fault_of_streams(header: dict[str, Any]) -> str | None:
    """Whether the heads of a journal, or of a manifest that has them, are heads of its layers."""
    if fault := _fault_of_layers(header["layers"]):
        return fault
    layers = {layer["layer_idx"]: layer for layer in header["layers"]}
    seen: set[tuple[int, str]] = set()
    for stream in header.get("streams", ()):
        key = (stream["layer_idx"], stream["kind"])
        layer = layers.get(key[0])
        heads = stream["heads"]
        if (
            layer is None
            or key in seen
            or heads != sorted(set(heads))
            or heads[-1] >= layer[PARTS[stream["kind"]].heads]
            or stream["head_dim"]
            != part_width(stream["kind"], layer["head_dim"], layer.get("value_head_dim"))
        ):
            return f"streams: that of layer {key[0]}, {key[1]}, is none of the layers"
        seen.add(key)
    return None


def require_schema_version(path: Path, content: Any) -> None:
    """See that a manifest is not of a later version, whose fields may be others.

    Raises:
        UserError: It is.
    """
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version {str(version)[:_SHOWN]} is newer than this qk-sniffer, which "
            f"knows {SCHEMA_VERSION}; install a newer one"
        )


def require_own_file(data_root: Path, name: str) -> None:
    """See that one of the files of a data root is its own, as ``require_own_files`` does of all.

    Raises:
        UserError: It is not.
    """
    _require_own(str(data_root / name), _places(data_root))
    _require_kind(data_root / name)


def require_own_files(data_root: Path) -> None:
    """See that what a data root holds is its own, and files where files must be.

    Behind a link to elsewhere a file would be read, replaced or removed where it is; a pipe would be
    waited for. The data root itself may be a link, and the Hub's client keeps the files of its cache
    beside it.

    Raises:
        UserError: It is not.
    """
    places = _places(data_root)
    for entry in os.scandir(data_root):
        if entry.name in _NAMES or parse_head_name(entry.name) is not None:
            _require_own(entry.path, places)
            _require_kind(Path(entry.path))
            # Links to directories are not followed here.
            for directory, directories, files in os.walk(entry.path):
                for name in (*directories, *files):
                    _require_own(os.path.join(directory, name), places)


_FILE_NAMES = FILES | {temporary_name(name) for name in FILES}
_NAMES = DIRECTORIES | _FILE_NAMES


def _require_kind(path: Path) -> None:
    """See that what has the name of a file is none of a directory's, and the other way round."""
    if not path.exists():
        return
    is_file = path.name in _FILE_NAMES
    if path.is_dir() is is_file:
        kinds = ("a directory", "a file") if is_file else ("a file", "a directory")
        raise UserError(f"{path}: {kinds[0]}, where {kinds[1]} must be; remove it")


def _places(data_root: Path) -> list[Path]:
    """Where the files of a data root may be."""
    place = data_root.resolve()
    is_of_the_client = place.parent.name == "snapshots"
    return [place, place.parent.parent / "blobs"] if is_of_the_client else [place]


def _require_own(path: str, places: list[Path]) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        # A run that is at work there has just given it another name.
        return
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    if not stat.S_ISLNK(mode):
        raise UserError(f"{path}: neither a file nor a directory; remove it")
    if not any(Path(os.path.realpath(path)).is_relative_to(place) for place in places):
        raise UserError(
            f"{path}: a link to {os.readlink(path)}; a data root holds its files itself, so put the "
            "file there, or remove the link"
        )
