"""Bytes on disk: the journal of a running capture, Parquet files, manifest and dataset card."""

from qk_sniffer.storage.card import Place, describe_run, render_card, shown_names
from qk_sniffer.storage.card_parts import compose_card, own_part
from qk_sniffer.storage.data_root import (
    EarlierRun,
    check_space,
    clear_data_root,
    differing_settings,
    discard_pulled,
    earlier_run,
    prepare_data_root,
    require_captured,
    require_shared,
)
from qk_sniffer.storage.files import explained_writing, sync_directory, sync_file, write_text
from qk_sniffer.storage.finalizing import finalize, merge_pulled
from qk_sniffer.storage.finished import stored_example_ids
from qk_sniffer.storage.journal import Block, Example, JournalWriter
from qk_sniffer.storage.manifest import count_rows, read_manifest, require_manifest
from qk_sniffer.storage.parquet import FileFacts, StoredRows, checksum, is_described
from qk_sniffer.storage.schema import (
    CARD_FILE,
    CONFIG_FILE,
    DATA_FILE,
    EXAMPLES_DIRECTORY,
    EXAMPLES_SCHEMA,
    HEAD_DIRECTORY,
    JOURNAL_DIRECTORY,
    MANIFEST_FILE,
    PUBLICATION_FILE,
    PULLED_DIRECTORY,
    PULLING_DIRECTORY,
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
    "MANIFEST_FILE",
    "PUBLICATION_FILE",
    "PULLED_DIRECTORY",
    "PULLING_DIRECTORY",
    "SCHEMA_VERSION",
    "Block",
    "EarlierRun",
    "Example",
    "FileFacts",
    "JournalWriter",
    "Kind",
    "Place",
    "StoredRows",
    "check_space",
    "checksum",
    "clear_data_root",
    "compose_card",
    "count_rows",
    "describe_run",
    "differing_settings",
    "discard_pulled",
    "earlier_run",
    "explained_writing",
    "finalize",
    "head_name",
    "head_schema",
    "is_described",
    "merge_pulled",
    "own_part",
    "prepare_data_root",
    "read_manifest",
    "render_card",
    "require_captured",
    "require_manifest",
    "require_shared",
    "shown_names",
    "stored_example_ids",
    "sync_directory",
    "sync_file",
    "write_text",
]
