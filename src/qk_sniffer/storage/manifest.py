"""The manifest: what a data root holds, with which settings it was made, and the files' checksums."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qk_sniffer.storage.files import read_json, write_text
from qk_sniffer.storage.parquet import FileFacts
from qk_sniffer.storage.schema import MANIFEST_FILE, SCHEMA_VERSION


def build_manifest(
    header: Mapping[str, Any],
    examples: FileFacts,
    heads: Mapping[str, FileFacts],
    *,
    complete: bool,
) -> dict[str, Any]:
    """The manifest of a data root.

    Args:
        header: The journal's header: fingerprint, versions, settings, layers and notes.
        examples: Rows, bytes and checksum of the examples table.
        heads: The same of each head's file, by its name.
        complete: Whether the run read every text.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        "fingerprint": header["fingerprint"],
        "versions": header["versions"],
        "settings": header["settings"],
        "layers": header["layers"],
        "notes": header["notes"],
        "examples": examples,
        "heads": heads,
    }


def write_manifest(data_root: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, the mark of a finished data root."""
    write_text(data_root / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def read_manifest(data_root: Path) -> dict[str, Any] | None:
    """The manifest of a data root, None where it is not finished.

    Raises:
        UserError: It is damaged.
    """
    path = data_root / MANIFEST_FILE
    return read_json(path) if path.exists() else None
