"""Whether the disk has room for a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qk_sniffer.capture import Listed, Selection
from qk_sniffer.config import MomentsConfig
from qk_sniffer.errors import UserError
from qk_sniffer.recording.provenance import stream_keys
from qk_sniffer.storage import (
    STORED_DTYPES,
    check_space,
    head_files_bytes,
    journal_bytes,
    moments_bytes,
    most_state_files,
)


def require_space(
    data_root: Path,
    selection: Selection,
    lengths: Tensor | None,
    listed: Listed | None,
    streams: Sequence[Mapping[str, Any]],
    dtype: torch.dtype,
    moments: MomentsConfig,
    n_readers: int,
    n_shards: int,
) -> None:
    """Compare the room on the disk with what texts will take.

    Args:
        data_root: Where they are captured.
        selection: Which positions are kept.
        lengths: (N,) int64, tokens in each text; None where they stream, and nobody knows: then only
            the moments of one bucket count.
        listed: Positions to keep of each text, where they come with it.
        streams: The captured heads of each layer and kind, as in a journal's header.
        dtype: Number format of the vectors.
        moments: Which are summed.
        n_readers: Processes, or groups of them that share a model, each with moments of its own.
        n_shards: Processes that share a model.

    Raises:
        UserError: They won't fit, or rows of this number format are not stored.
    """
    name = str(dtype).removeprefix("torch.")
    if selection.keeps_rows and name not in STORED_DTYPES:
        raise UserError(
            f"model.dtype: rows of {name} are not stored; load the model in "
            f"{', '.join(STORED_DTYPES)}, or sum moments alone with sniffer.capture.sampler.type: none"
        )
    journal, files, n_buckets = 0, 0, 1
    if lengths is not None:
        rows = float(selection.expected_rows(lengths, listed).sum())
        n_draws = selection.count_draws(stream_keys(streams), lengths)
        if selection.keeps_rows:
            journal = journal_bytes(streams, name, rows, n_draws=n_draws, n_shards=n_shards)
            files = head_files_bytes(streams, name, rows)
        n_buckets = selection.count_buckets(int(lengths.max())) if lengths.numel() else 1
    sums = moments_bytes(streams, {"moments": moments.as_settings()}, n_buckets)
    states = most_state_files(n_shards) * sums * n_readers
    check_space(data_root, journal + states, files + sums, states + sums)
