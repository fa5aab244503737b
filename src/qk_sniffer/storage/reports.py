"""The files of a report in a data root, which lose their meaning with the rows that they show."""

from pathlib import Path

from qk_sniffer.storage.schema import REPORT_DIRECTORY, REPORT_FILE


def report_files(data_root: Path) -> list[str]:
    """The files of a report, by their paths in the data root."""
    names = sorted(path.name for path in (data_root / REPORT_DIRECTORY).glob("*"))
    return [f"{REPORT_DIRECTORY}/{name}" for name in names if REPORT_FILE.fullmatch(name)]


def remove_report(data_root: Path) -> None:
    """Remove a report; what a person has put beside it stays."""
    for path in report_files(data_root):
        (data_root / path).unlink()
    directory = data_root / REPORT_DIRECTORY
    if directory.exists() and not any(directory.iterdir()):
        directory.rmdir()
