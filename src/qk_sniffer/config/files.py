"""A config file that builds on another, which its key ``config`` names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from qk_sniffer.errors import UserError

_SECTIONS = (
    "model",
    "data",
    "data.tokenizer",
    "sniffer",
    "sniffer.capture",
    "sniffer.output",
    "trainer",
)
_FLAGS = ("--config", "-c")


def bases_first(args: list[str]) -> list[str]:
    """Put before each config file the files that it builds on, the first of them first.

    jsonargparse follows the key too, but there a section of the file takes the place of the whole
    section of its base. Files that the command line names one after another it merges key by key.

    Args:
        args: Arguments of ``qk-sniffer predict``; each ``--config FILE``, in all its spellings, is
            given as ``--config=FILE``.

    Raises:
        UserError: A file is no text in UTF-8 or no mapping, builds on itself, empties a section of its
            base, or its key ``config`` is no path.
    """
    expanded: list[str] = []
    rest = iter(args)
    for arg in rest:
        file = next(rest, None) if arg in _FLAGS else _file_in(arg)
        if file is None:
            expanded.append(arg)
        else:
            expanded += [f"--config={path}" for path in (*_bases(Path(file)), file)]
    return expanded


def _file_in(arg: str) -> str | None:
    """The file of ``--config=FILE``, ``-c=FILE`` or ``-cFILE``; None in any other argument."""
    if arg.startswith("--config="):
        return arg.removeprefix("--config=")
    if arg.startswith("-c"):
        return arg.removeprefix("-c").removeprefix("=")
    return None


def _bases(file: Path, descendants: tuple[Path, ...] = ()) -> list[Path]:
    """The files that a config builds on, the first of them first."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"--config: {file} is no UTF-8 ({error.reason}); save it as UTF-8") from error
    except (OSError, yaml.YAMLError):
        return []  # The parser reads it again, and says what is wrong.
    if not isinstance(config, dict):
        raise UserError(
            f"--config: {file} is no mapping; write sections such as model and data, with their keys"
        )
    name = config.get("config")
    if name is None:
        return []
    if not isinstance(name, str):
        raise UserError(f"{file}: config: expected the path of one file to build on, got {name!r}")
    for section in _empty_sections(config):
        raise UserError(
            f"{file}: {section}: the empty section would drop all that {name} sets there; remove it"
        )
    base, lineage = file.parent / name, (*descendants, file.resolve())
    if base.resolve() in lineage:
        raise UserError(f"{file}: config: {name} builds on this very file; name another")
    return [*_bases(base, lineage), base]


def _empty_sections(config: dict[str, Any]) -> Iterator[str]:
    for section in _SECTIONS:
        found: Any = config
        for key in section.split("."):
            if not isinstance(found, dict) or key not in found:
                break
            found = found[key]
        else:
            if found is None:
                yield section
