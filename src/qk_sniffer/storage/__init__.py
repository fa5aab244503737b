"""Bytes on disk: the journal of a running capture, Parquet files, manifest and dataset card."""

from qk_sniffer.storage.data_root import check_data_root, clear_data_root, finalize
from qk_sniffer.storage.files import write_text
from qk_sniffer.storage.journal import Block, Example, JournalReader, JournalWriter
from qk_sniffer.storage.schema import CONFIG_FILE, JOURNAL_DIRECTORY, Kind

__all__ = [
    "CONFIG_FILE",
    "JOURNAL_DIRECTORY",
    "Block",
    "Example",
    "JournalReader",
    "JournalWriter",
    "Kind",
    "check_data_root",
    "clear_data_root",
    "finalize",
    "write_text",
]
