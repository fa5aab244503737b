"""A config file that builds on another, which its key ``config`` names."""

from pathlib import Path

import yaml

from qk_sniffer.errors import UserError


def bases_first(args: list[str]) -> list[str]:
    """Put before each ``--config FILE`` the files that it builds on, the first of them first.

    jsonargparse follows the key too, but there a section of the file takes the place of the whole
    section of its base. Files that the command line names one after another it merges key by key.

    Args:
        args: Arguments of ``qk-sniffer predict``.

    Raises:
        UserError: A file builds on itself, or its key ``config`` is no path.
    """
    expanded: list[str] = []
    for flag, arg in zip(["", *args], args, strict=False):
        if flag == "--config":
            expanded[-1:] = [*(f"--config={base}" for base in _bases(Path(arg))), flag]
        elif arg.startswith("--config="):
            expanded += [f"--config={base}" for base in _bases(Path(arg.removeprefix("--config=")))]
        expanded.append(arg)
    return expanded


def _bases(file: Path, descendants: tuple[Path, ...] = ()) -> list[Path]:
    """The files that a config builds on, the first of them first."""
    try:
        config = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return []  # The parser reads it again, and says what is wrong.
    name = config.get("config") if isinstance(config, dict) else None
    if name is None:
        return []
    if not isinstance(name, str):
        raise UserError(f"{file}: config: expected the path of one file to build on, got {name!r}")
    base, lineage = file.parent / name, (*descendants, file.resolve())
    if base.resolve() in lineage:
        raise UserError(f"{file}: config: {name} builds on this very file; name another")
    return [*_bases(base, lineage), base]
