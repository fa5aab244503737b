"""What rows take on disk, told from their number before there are any.

The constants were measured with the demo model (head_dim 32, its 24 texts) and SmolLM2-135M (head_dim
64, six texts of 9,369 tokens), each sampler, with and without token strings: files of 2 to 18,827 rows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_COMPRESSED = {"float32": (0.93, 0.85), "bfloat16": (0.40, 0.355), "float16": (0.55, 0.46)}
"""What is left of float32 vectors that a model computed in a dtype: in a small file, and in others.
Measured: 0.92 to 0.93, 0.40, and 0.56 in files with 18 to 46 KiB of vectors; 0.84 to 0.88, 0.34 to
0.38, and 0.44 to 0.50 in those with 150 KiB to 2.4 MiB."""

_SMALL = 2**17
"""Bytes of vectors up to which a file is small: zstd finds less in it."""

_FILE, _ROW, _TOKEN_STRING, _STATISTICS = 1850, 1.2, 3.0, 18.0
"""Bytes of a file without rows (footer, and headers of its pages), of the numbers of a row, of its
token string, and of a query's statistics. Measured: 1,790 to 2,400 a file; 0.1 (`all`) to 2, 1.6 to 6,
and 16.9 to 18.2 a row."""

_BLOCK, _BATCH = 28, 1000
"""Bytes of a block in the index of its batch in the journal, and of a batch's examples."""

_JOURNAL_ROW, _JOURNAL_TOKEN = 12, 9
"""Bytes of a row's numbers in the journal, for all heads of a layer and kind; of a token string."""

_ITEMSIZE: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

_MOMENT_NUMBERS = 6
"""Numbers of eight bytes that a row of moments has beside its vectors and matrices, at most."""

Stream = Mapping[str, Any]
"""Heads of a layer and kind, and their head_dim, as in a journal's header."""


def journal_bytes(
    streams: Sequence[Stream],
    dtype: str,
    rows: float,
    *,
    n_draws: int,
    n_batches: float = 1,
    n_token_strings: float = 0,
    n_shards: int = 1,
) -> int:
    """Bytes of a journal, in all its parts.

    Args:
        streams: What is captured.
        dtype: Number format of the vectors, by its name in torch.
        rows: Rows of each head.
        n_draws: Layers and kinds with rows of their own; 1 where all share theirs.
        n_batches: Batches that they come from.
        n_token_strings: Tokens of all texts, where their strings are captured.
        n_shards: Processes that share a model; each writes the numbers of the rows beside its vectors.
    """
    return math.ceil(
        rows * (row_bytes(streams, dtype) + _JOURNAL_ROW * n_draws * n_shards)
        + (_BLOCK * len(streams) + _BATCH) * n_batches * n_shards
        + _JOURNAL_TOKEN * n_token_strings
    )


def row_bytes(streams: Sequence[Stream], dtype: str) -> int:
    """Bytes of one row of all heads, as it is captured; statistics are float32.

    Args:
        streams: What is captured.
        dtype: Number format of the vectors, by its name in torch.
    """
    return sum(
        len(stream["heads"])
        * stream["head_dim"]
        * _ITEMSIZE["float32" if stream["kind"] == "softmax" else dtype]
        for stream in streams
    )


def head_files_bytes(
    streams: Sequence[Stream], dtype: str, rows: float, *, token_strings: bool = False
) -> int:
    """Bytes of the Parquet files of all heads.

    Args:
        streams: What is captured.
        dtype: Number format in which the model computes the vectors.
        rows: Rows of each head.
        token_strings: Whether they are captured.
    """
    numbers = _ROW + _TOKEN_STRING * token_strings
    total = 0.0
    for stream in streams:
        if stream["kind"] == "softmax":
            total += len(stream["heads"]) * rows * _STATISTICS
            continue
        vectors = 4 * rows * stream["head_dim"]
        small, large = _COMPRESSED[dtype]
        size = _FILE + rows * numbers + vectors * (small if vectors <= _SMALL else large)
        total += len(stream["heads"]) * size
    return math.ceil(total)


def moments_bytes(streams: Sequence[Stream], settings: Mapping[str, Any], n_buckets: int) -> int:
    """Bytes of the moments of all heads: of the final files, and of the file of each process too.

    A row is float64 and hardly shrinks: with D numbers in a vector it takes 8 (D² + 2 D + 6), and a row
    of queries 8 (D² + D) more where the covariance with their keys is there.

    Args:
        streams: What is captured.
        settings: The run's, whose section moments says what is summed; 0 where it has none.
        n_buckets: Buckets that positions fall into; they count where each has rows of its own.
    """
    moments = settings.get("moments")
    if not moments:
        return 0
    total = 0
    for stream in streams:
        kind, width = stream["kind"], stream["head_dim"]
        if kind == "softmax":
            continue
        numbers = width**2 + 2 * width + _MOMENT_NUMBERS
        if kind == "q" and moments["cross"]:
            numbers += width**2 + width
        stages = 2 if kind in "qk" and moments["pre_rope"] else 1
        total += 8 * numbers * stages * len(stream["heads"])
    return total * (n_buckets if moments["by_bucket"] else 1)
