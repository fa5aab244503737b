"""Bytes on disk: the journal of a running capture, Parquet files, manifest and dataset card."""

from qk_sniffer.storage.data_root import (
    EarlierRun,
    check_data_root,
    check_space,
    clear_data_root,
    earlier_run,
)
from qk_sniffer.storage.files import write_text
from qk_sniffer.storage.finalizing import finalize, finished, mark_complete
from qk_sniffer.storage.journal import Block, Example, JournalWriter
from qk_sniffer.storage.schema import CONFIG_FILE, JOURNAL_DIRECTORY, SCHEMA_VERSION, Kind

__all__ = [
    "CONFIG_FILE",
    "JOURNAL_DIRECTORY",
    "SCHEMA_VERSION",
    "Block",
    "EarlierRun",
    "Example",
    "JournalWriter",
    "Kind",
    "check_data_root",
    "check_space",
    "clear_data_root",
    "earlier_run",
    "finalize",
    "finished",
    "mark_complete",
    "write_text",
]
