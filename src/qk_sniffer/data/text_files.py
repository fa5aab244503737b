"""Which files a path in the config stands for, and how datasets reads them."""

import glob
import re
from pathlib import Path
from typing import Any

from qk_sniffer.errors import UserError

_Builder = tuple[str, dict[str, Any]]
"""The name of a builder of datasets, and its options."""

_JSON: _Builder = ("json", {})
_KINDS: dict[str, _Builder] = {
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


def builder_arguments(path: str) -> _Builder:
    """Arguments of ``load_dataset`` for a directory, a file, a pattern of files, or else a Hub id.

    Raises:
        UserError: No file matches the pattern, or files of several kinds do.
    """
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


def _matching(pattern: str) -> list[str]:
    """The files that a pattern stands for, in the order of their names, all of one kind."""
    files = [file for file in sorted(glob.glob(pattern, recursive=True)) if Path(file).is_file()]
    if not files:
        raise UserError(
            f"data.path: no file matches {pattern}; mend the pattern, which starts from {Path.cwd()} "
            "unless it is absolute"
        )
    unknown = next((file for file in files if _kind(file) is None), None)
    if unknown is not None:
        raise UserError(
            f"data.path: {pattern} matches {unknown}, which is none of {', '.join(_KINDS)}; narrow the "
            "pattern"
        )
    other = next((file for file in files if _builder(file) != _builder(files[0])), None)
    if other is not None:
        raise UserError(
            f"data.path: {pattern} matches files of several kinds, such as {files[0]} and {other}; "
            "narrow the pattern to one"
        )
    return files


def _reading(files: list[str]) -> _Builder:
    name, options = _builder(files[0])
    # datasets takes each for a pattern of its own.
    return name, {"data_files": [glob.escape(file) for file in files], **options}


def _has_tables(files: list[str]) -> bool:
    return any(_kind(file) not in (None, "txt") for file in files)


def _kind(file: str) -> str | None:
    found = _SUFFIX.search(file)
    return found[1] if found else None


def _builder(file: str) -> _Builder:
    return _KINDS[_kind(file) or ""]
