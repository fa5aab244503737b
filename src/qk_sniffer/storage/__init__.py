"""Bytes on disk: the journal of a running capture, Parquet files, manifest and dataset card."""

from qk_sniffer.storage.data_root import (
    EarlierRun,
    check_space,
    clear_data_root,
    earlier_run,
    prepare_data_root,
    require_captured,
    require_shared,
)
from qk_sniffer.storage.files import write_text
from qk_sniffer.storage.finalizing import finalize
from qk_sniffer.storage.journal import Block, Example, JournalWriter
from qk_sniffer.storage.manifest import read_manifest
from qk_sniffer.storage.parquet import FileFacts, StoredRows, checksum
from qk_sniffer.storage.schema import (
    CARD_FILE,
    CONFIG_FILE,
    DATA_FILE,
    EXAMPLES_DIRECTORY,
    EXAMPLES_SCHEMA,
    HEAD_DIRECTORY,
    JOURNAL_DIRECTORY,
    SCHEMA_VERSION,
    Kind,
    head_name,
    head_schema,
)

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "DATA_FILE",
    "EXAMPLES_DIRECTORY",
    "EXAMPLES_SCHEMA",
    "HEAD_DIRECTORY",
    "JOURNAL_DIRECTORY",
    "SCHEMA_VERSION",
    "Block",
    "EarlierRun",
    "Example",
    "FileFacts",
    "JournalWriter",
    "Kind",
    "StoredRows",
    "check_space",
    "checksum",
    "clear_data_root",
    "earlier_run",
    "finalize",
    "head_name",
    "head_schema",
    "prepare_data_root",
    "read_manifest",
    "require_captured",
    "require_shared",
    "write_text",
]
