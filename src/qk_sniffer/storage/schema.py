"""Names and column types of everything in a data root."""

import re
from typing import Literal

import pyarrow as pa

SCHEMA_VERSION = 1
DATA_FILE = "data.parquet"
EXAMPLES_DIRECTORY = "examples"
JOURNAL_DIRECTORY = ".journal"
FINISHED_JOURNAL_DIRECTORY = ".journal-finished"
PULLED_DIRECTORY, PULLING_DIRECTORY = ".pulled", ".pulling"
PUBLICATION_FILE = ".hub.json"
OWNER_FILE, OWNERS_FILE = ".owner.json", ".owner-ranks"
MANIFEST_FILE = "manifest.json"
CARD_FILE = "README.md"
REPORT_DIRECTORY = "report"
CONFIG_FILE = "config.yaml"

HEAD_DIRECTORY = re.compile(r"l(\d{2,})h(\d{2,})([qk])")
"""Every name that ``head_name`` gives: its layer, head and kind."""

REPORT_FILE = re.compile(
    r"index\.html|((rows|positional-r2|norms)-(queries|keys)|components-\d+[qk]|attention-\d+)\.png"
)
"""Every name of a file that a report has; others in its directory are a person's own."""

Kind = Literal["q", "k"]

EXAMPLES_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.int32(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
    ]
)


def head_name(layer_idx: int, head: int, kind: Kind) -> str:
    """Directory and dataset config of one head, such as l00h05q; keys count key-value heads."""
    return f"l{layer_idx:02d}h{head:02d}{kind}"


def head_schema(head_dim: int) -> pa.Schema:
    """Columns of a head's Parquet file."""
    return pa.schema(
        [
            ("bucket", pa.int32()),
            ("example_id", pa.int32()),
            ("position", pa.int32()),
            ("vector", pa.list_(pa.field("element", pa.float32()), head_dim)),
            ("sliding_window", pa.int32()),
            ("token_str", pa.string()),
        ]
    )
