"""Whether the disk has room for a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qk_sniffer.capture import Sampler, count_draws, expected_rows_by_bucket
from qk_sniffer.recording.provenance import stream_keys
from qk_sniffer.storage import check_space, head_files_bytes, journal_bytes


def require_space(
    data_root: Path,
    sampler: Sampler,
    lengths: Tensor | None,
    streams: Sequence[Mapping[str, Any]],
    dtype: torch.dtype,
) -> None:
    """Compare the room on the disk with what texts will take.

    Args:
        data_root: Where they are captured.
        sampler: Which positions are kept.
        lengths: (N,) int64, tokens in each text; None where they stream, and nobody knows.
        streams: The captured heads of each layer and kind, as in a journal's header.
        dtype: Number format of the vectors.

    Raises:
        UserError: They won't fit.
    """
    if lengths is None:
        return
    name = str(dtype).removeprefix("torch.")
    rows = sum(expected_rows_by_bucket(sampler, lengths).values())
    n_draws = count_draws(sampler, stream_keys(streams), lengths)
    check_space(
        data_root,
        journal_bytes(streams, name, rows, n_draws=n_draws),
        head_files_bytes(streams, name, rows),
    )
