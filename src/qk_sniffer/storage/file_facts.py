"""The files of one head, a single one or several in order, and what a manifest says of them."""

import mmap
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import xxhash

from qk_sniffer.kinds import KINDS
from qk_sniffer.storage.schema import (
    DATA_FILE,
    EXAMPLES_DIRECTORY,
    MOMENT_TEXTS,
    MOMENTS_DIRECTORY,
)

FileFacts = dict[str, Any]
"""Rows, bytes and checksum of a file; of a head with several, all together and of each as ``files``."""

FILE_NAME = re.compile(r"data(?:-[0-9]{5}-of-([0-9]{5}))?\.parquet")
"""Every name that ``file_names`` gives, and how many files there are."""

MOMENT_FILE = re.compile(rf"{MOMENTS_DIRECTORY}/(?:[{''.join(KINDS)}]|{MOMENT_TEXTS})\.parquet")
"""Every path that ``moment_file`` gives."""

MOST_FILES = 99_999
"""As many as the names have numbers for."""


def file_names(count: int) -> list[str]:
    """The names of a head's files, in the order of their rows."""
    if count == 1:
        return [DATA_FILE]
    return [f"data-{number:05d}-of-{count:05d}.parquet" for number in range(count)]


def head_files(name: str, facts: Mapping[str, Any]) -> dict[str, FileFacts]:
    """The files of a head, or of the texts, in the order of their rows.

    Args:
        name: Its directory.
        facts: What a manifest says of it.

    Returns:
        What the manifest says of each file, by its path in the data root.
    """
    files = facts.get("files", [facts])
    names = file_names(len(files))
    return {f"{name}/{file}": dict(about) for file, about in zip(names, files, strict=True)}


def moment_files(manifest: Mapping[str, Any]) -> dict[str, FileFacts]:
    """The files of moments that a manifest names, by their paths in the data root."""
    moments: Mapping[str, FileFacts] = manifest.get("moments", {})
    return {moment_file(name): facts for name, facts in moments.items()}


def moment_file(name: str) -> str:
    """The path of the moments of a kind, or of their texts, in a data root."""
    return f"{MOMENTS_DIRECTORY}/{name}.parquet"


def parquet_files(manifest: Mapping[str, Any]) -> dict[str, FileFacts]:
    """All Parquet files of a data root, by their paths in it."""
    directories = {EXAMPLES_DIRECTORY: manifest["examples"], **manifest["heads"]}
    of_rows = {
        path: about
        for name, facts in directories.items()
        for path, about in head_files(name, facts).items()
    }
    return of_rows | moment_files(manifest)


def describe_file(path: Path) -> FileFacts:
    """Rows, size in bytes and checksum of a Parquet file."""
    return {
        "rows": pq.read_metadata(path).num_rows,
        "bytes": path.stat().st_size,
        "xxh3_128": checksum(path),
    }


def describe_head_files(directory: Path, count: int) -> FileFacts:
    """What a manifest says of the files of a head.

    Args:
        directory: Where they are.
        count: How many there are.
    """
    files = [describe_file(directory / name) for name in file_names(count)]
    if count == 1:
        return files[0]
    return {
        "rows": sum(file["rows"] for file in files),
        "bytes": sum(file["bytes"] for file in files),
        "xxh3_128": joined_checksum(file["xxh3_128"] for file in files),
        "files": files,
    }


def checksum(path: Path) -> str:
    """The 128-bit XXH3 digest of a file, in hexadecimal, as `xxhsum -H2` prints it."""
    if path.stat().st_size == 0:
        return xxhash.xxh3_128_hexdigest(b"")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        return xxhash.xxh3_128_hexdigest(content)


def joined_checksum(checksums: Iterable[str]) -> str:
    """The checksum of several files together: that of their own ones, one behind the other."""
    return xxhash.xxh3_128_hexdigest("".join(checksums).encode())


def is_described(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a file is there, and is what a manifest says of it."""
    return path.exists() and checksum(path) == str(facts["xxh3_128"])
