"""Files that appear under their names only when they are complete, and what a disk can refuse."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qk_sniffer.errors import UserError, first_line, redact
from qk_sniffer.storage.schema import temporary_name


@contextmanager
def replacing(path: Path, *, syncs_name: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name once it is written and synced.

    Args:
        path: The path.
        syncs_name: Make the name survive a loss of power too; otherwise the caller syncs the directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
        if syncs_name:
            sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_file(path: Path) -> None:
    """Make the content of a file survive a loss of power."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file, without any access token that stands in it."""
    with replacing(path) as temporary:
        temporary.write_text(redact(text), encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: It is damaged.
    """
    try:
        return parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise damaged(path, f"it is no JSON ({first_line(error)})") from error


def parse_json(text: bytes) -> Any:
    """What JSON says that somebody else may have written.

    Raises:
        ValueError: It is none, it is nested too deeply, or it has halves of characters, which no file,
            terminal or path takes.
    """
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return content


def damaged(path: Path, fault: str) -> UserError:
    """The error for a file of a data root that can't be believed."""
    return UserError(
        f"{path}: damaged, {fault}; restore it from a copy, or set sniffer.output.overwrite to true to "
        "start anew"
    )


@contextmanager
def explained_writing(path: Path, remedy: str) -> Iterator[None]:
    """Turn what a disk refuses into a ``UserError``.

    Args:
        path: What is written.
        remedy: What the user can do, besides mending the disk.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else first_line(error)
        raise UserError(f"{path}: {reason}; {remedy}") from error
