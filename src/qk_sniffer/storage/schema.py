"""Names and column types of everything in a data root."""

import re
from collections.abc import Collection, Mapping
from typing import Any, cast

import pyarrow as pa

from qk_sniffer.kinds import KINDS, SOFTMAX_COLUMNS, Kind, Part

SCHEMA_VERSION = 1
DATA_FILE = "data.parquet"
EXAMPLES_DIRECTORY = "examples"
MOMENTS_DIRECTORY, MOMENT_TEXTS = "moments", "texts"
JOURNAL_DIRECTORY = ".journal"
FINISHED_JOURNAL_DIRECTORY = ".journal-finished"
PULLED_DIRECTORY, PULLING_DIRECTORY = ".pulled", ".pulling"
PUBLICATION_FILE = ".hub.json"
OWNER_FILE, OWNERS_FILE = ".owner.json", ".owner-ranks"
MANIFEST_FILE = "manifest.json"
CARD_FILE = "README.md"
CARD_ASIDE_FILE = "README.local.md"
REPORT_DIRECTORY = "report"
CONFIG_FILE = "config.yaml"

_NUMBER = "0[0-9]|[1-9][0-9]{1,6}"
HEAD_DIRECTORY = re.compile(f"l({_NUMBER})h({_NUMBER})([{''.join(KINDS)}])")
"""Every name that ``head_name`` gives: its layer, head and kind."""

DIRECTORIES = {
    EXAMPLES_DIRECTORY,
    MOMENTS_DIRECTORY,
    JOURNAL_DIRECTORY,
    FINISHED_JOURNAL_DIRECTORY,
    PULLED_DIRECTORY,
    PULLING_DIRECTORY,
    REPORT_DIRECTORY,
}
FILES = {
    CARD_FILE,
    CARD_ASIDE_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    PUBLICATION_FILE,
    OWNER_FILE,
    OWNERS_FILE,
}
"""What a data root holds beside the heads; files have ``temporary_name`` while they are written."""

REPORT_FILE = re.compile(
    r"index\.html|((rows|positional-r2|norms|moments-r2|moments-spectra)-"
    rf"({'|'.join(kind.plural for kind in KINDS.values())})|"
    rf"(components|predictions)-\d+[{''.join(KINDS)}]|norms-by-(position|pair)-\d+|norms-mixed-\d+|"
    r"softmax-(entropy|sink_prob|local_prob|previous)|"
    r"attention-(\d+|by-distance|to-first))\.png"
)
"""Every name of a file that a report has; others in its directory are a person's own."""

EXAMPLES_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.int32(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
    ]
)
"""Columns of the table of texts that every run has."""

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("start", pa.int32()), ("stop", pa.int32())]))
"""The messages of a conversation: who speaks, the first token, and the token behind the last."""


def examples_schema(settings: Mapping[str, Any]) -> pa.Schema:
    """Columns of the table of texts of a run.

    Args:
        settings: Its sections model, data and capture.
    """
    has_messages = settings["data"].get("messages_column") is not None
    is_continued = settings["model"].get("generate") is not None
    fields = list(EXAMPLES_SCHEMA)
    if has_messages or is_continued:
        fields.append(pa.field("n_prompt_tokens", pa.int32()))
    if has_messages:
        fields.append(pa.field("messages", MESSAGES))
    if is_continued:
        fields.append(pa.field("generated_ids", pa.list_(pa.int32())))
        fields.append(pa.field("generated_text", pa.string()))
    return pa.schema(fields)


def temporary_name(name: str) -> str:
    """What a file is called until it is complete."""
    return f".{name}.tmp"


def head_name(layer_idx: int, head: int, kind: Part) -> str:
    """Directory and dataset config of one head, such as l00h05q; keys count key-value heads."""
    return f"l{layer_idx:02d}h{head:02d}{kind}"


def parse_head_name(name: str) -> tuple[int, int, Kind] | None:
    """Layer, head and kind of what ``head_name`` gives; None where it would not give that."""
    match = HEAD_DIRECTORY.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]), cast(Kind, match[3]))


def has_softmax(manifest: Mapping[str, Any]) -> bool:
    """Whether the queries of a run have the statistics of their softmax; a header says so too."""
    return bool(manifest["settings"]["capture"].get("capture_softmax"))


def keeps_rows(manifest: Mapping[str, Any]) -> bool:
    """Whether a run has files of heads, and not moments alone; a header says so too."""
    return bool(manifest["settings"]["capture"]["sampler"]["type"] != "none")


def head_schema(width: int, *, softmax: bool = False) -> pa.Schema:
    """Columns of a head's Parquet file.

    Args:
        width: Numbers in a vector.
        softmax: Whether it has the statistics of each query's softmax.
    """
    statistics = [
        (name, pa.int32() if name == "argmax_position" else pa.float32()) for name in SOFTMAX_COLUMNS
    ]
    return pa.schema(
        [
            ("bucket", pa.int32()),
            ("example_id", pa.int32()),
            ("position", pa.int32()),
            ("vector", pa.list_(pa.field("element", pa.float32()), width)),
            ("sliding_window", pa.int32()),
            ("token_str", pa.string()),
            *(statistics if softmax else []),
        ]
    )


MOMENT_TEXTS_SCHEMA = pa.schema([pa.field("example_id", pa.int32(), nullable=False)])
"""Columns of the file that names the texts which moments count."""


def moment_schema(kind: Kind, widths: Collection[int], *, cross: bool) -> pa.Schema:
    """Columns of the moments of a kind.

    Args:
        kind: The kind of vectors.
        widths: Numbers in a vector, of all layers; where they differ, lists have no fixed size.
        cross: Whether those of queries have the covariance with their keys.
    """
    width = next(iter(widths)) if len(widths) == 1 else None

    def numbers(factors: int) -> pa.DataType:
        size = -1 if width is None else width**factors
        return pa.list_(pa.field("element", pa.float64()), size)

    with_keys = [("key_mean", numbers(1)), ("key_covariance", numbers(2))]
    return pa.schema(
        [
            ("layer_idx", pa.int32()),
            ("head", pa.int32()),
            ("bucket", pa.int32()),
            ("pre_rope", pa.bool_()),
            ("count", pa.int64()),
            ("position_sum", pa.int64()),
            ("position_square_sum", pa.float64()),
            ("mean", numbers(1)),
            ("covariance", numbers(2)),
            ("position_covariance", numbers(1)),
            *(with_keys if cross and kind == "q" else []),
        ]
    )
