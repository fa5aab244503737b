"""Which files the paths of a config stand for, and how datasets reads them."""

import glob
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from qk_sniffer.config import described
from qk_sniffer.errors import UserError

Builder = tuple[str, dict[str, Any]]
"""The name of a builder of datasets, a directory or a Hub id, and its options."""

Paths = str | list[str]
DataFiles = str | list[str] | dict[str, str | list[str]]

_JSON: Builder = ("json", {})
_KINDS: dict[str, Builder] = {
    "txt": ("text", {"sample_by": "document"}),
    "json": _JSON,
    "jsonl": _JSON,
    "ndjson": _JSON,
    "csv": ("csv", {}),
    "tsv": ("csv", {"sep": "\t"}),
    "parquet": ("parquet", {}),
    "arrow": ("arrow", {}),
}
"""What reads the files of a suffix; each txt file becomes one row."""

_SUFFIX = re.compile(rf"\.({'|'.join(_KINDS)})(\.(gz|bz2|xz|zst))?$")


def is_pattern(path: str) -> bool:
    """Whether a path stands for the files that match it; a file that is called so comes first."""
    return glob.has_magic(path) and not Path(path).expanduser().exists()


def builders(path: Paths, data_files: DataFiles | None = None) -> list[Builder]:
    """Arguments of ``load_dataset`` for each of the parts that are read one behind the other.

    Args:
        path: A directory, a file, a pattern of files, or else a Hub id; or a list without a Hub id.
        data_files: Files within a directory or a Hub dataset, by split or all of them train.

    Raises:
        UserError: A file is missing or of a kind that is not read, no file matches a pattern, files of
            several kinds do, or a list has something else.
    """
    if data_files is not None:
        return [_within(path, data_files)]
    return [_builder_of(path)] if isinstance(path, str) else _builders_of_list(path)


def _builder_of(path: str) -> Builder:
    local = Path(path).expanduser()
    if is_pattern(path):
        return _reading(_matching(str(local)))
    if local.is_dir():
        files = sorted(str(file) for file in local.rglob("*"))
        texts = [file for file in files if _kind(file) == "txt"]
        return _reading(texts) if texts and not _has_tables(files) else (str(local), {})
    if local.is_file():
        # Given by its directory, a file could not have the signs of a pattern in its name.
        if _kind(path) == "txt" or (_kind(path) and glob.has_magic(path)):
            return _reading([str(local)])
        return str(local.resolve().parent), {"data_files": [local.name]}
    return path, {}


def _builders_of_list(paths: list[str]) -> list[Builder]:
    """Files that follow one another are one part, and each directory is one."""
    parts: list[Builder] = []
    read: dict[str, None] = {}
    for is_directory, some in groupby(paths, key=lambda path: Path(path).expanduser().is_dir()):
        if is_directory:
            parts += map(_builder_of, some)
            continue
        # A file that a pattern matches again is read where it came first.
        files = {file: None for path in some for file in _files_of(path) if file not in read}
        read |= files
        _require_one_kind([*read], "data.path: the list has")
        if files:
            parts.append(_reading([*files]))
    return parts


def _files_of(path: str) -> list[str]:
    """The files of a list's entry that is no directory."""
    local = Path(path).expanduser()
    if is_pattern(path):
        return _matching(str(local))
    if local.is_file():
        return [str(local)]
    raise UserError(
        f"data.path: the list has {path}, and no file or directory of that name is here; mend the "
        f"path, which starts from {Path.cwd()} unless it is absolute; a Hub dataset stands in no list"
    )


def _within(path: Paths, data_files: DataFiles) -> Builder:
    """Files of a directory, or of a Hub dataset."""
    root = None if isinstance(path, list) else Path(path).expanduser()
    if root is None or is_pattern(str(root)) or root.is_file():
        raise UserError(
            f"data.data_files: data.path is {described(path)}, and these are files within a directory "
            "or a Hub dataset; name that, or leave them out"
        )
    splits = data_files if isinstance(data_files, dict) else {"train": data_files}
    patterns = {
        split: [some] if isinstance(some, str) else list(some) for split, some in splits.items()
    }
    if not root.is_dir():
        kinds = {_kind(pattern) for some in patterns.values() for pattern in some}
        options = _KINDS["txt"][1] if kinds == {"txt"} else {}
        return str(path), {"data_files": patterns, **options}
    field = "data.data_files"
    files = {
        split: [file for pattern in some for file in _matching(pattern, field, root)]
        for split, some in patterns.items()
    }
    everything = [file for some in files.values() for file in some]
    _require_one_kind(everything, f"{field}: they have")
    name, options = _builder(everything[0])
    return name, {"data_files": {split: _escaped(some) for split, some in files.items()}, **options}


def _matching(pattern: str, field: str = "data.path", root: Path | None = None) -> list[str]:
    """The files that a pattern stands for, in the order of their names, all of one kind."""
    place = Path.cwd() if root is None else root
    if is_pattern(str(place / pattern)):
        prefix = "" if root is None else f"{glob.escape(str(root))}/"
        found = sorted(glob.glob(prefix + pattern, recursive=True))
    else:
        found = [str(place / pattern)]
    files = [file for file in found if Path(file).is_file()]
    if not files:
        raise UserError(
            f"{field}: no file matches {pattern}; mend the pattern, which starts from {place} unless "
            "it is absolute"
        )
    _require_one_kind(files, f"{field}: {pattern} matches")
    return files


def _require_one_kind(files: list[str], place: str) -> None:
    """See that files are read alike.

    Args:
        files: The files.
        place: Begins a message: the field, and what names the files.
    """
    unknown = next((file for file in files if _kind(file) is None), None)
    if unknown is not None:
        raise UserError(
            f"{place} {unknown}, which is none of {', '.join(_KINDS)}; narrow the pattern or list"
        )
    other = next((file for file in files if _builder(file) != _builder(files[0])), None)
    if other is not None:
        raise UserError(
            f"{place} files of several kinds, such as {files[0]} and {other}; narrow the pattern or "
            "list to one"
        )


def _reading(files: list[str]) -> Builder:
    name, options = _builder(files[0])
    return name, {"data_files": _escaped(files), **options}


def _escaped(files: list[str]) -> list[str]:
    """Names of files, which datasets takes for patterns."""
    return [glob.escape(file) for file in files]


def _has_tables(files: list[str]) -> bool:
    return any(_kind(file) not in (None, "txt") for file in files)


def _kind(file: str) -> str | None:
    found = _SUFFIX.search(file)
    return found[1] if found else None


def _builder(file: str) -> Builder:
    return _KINDS[_kind(file) or ""]
