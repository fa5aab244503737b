"""Whether the disk has room for a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qk_sniffer.capture import Listed, Selection
from qk_sniffer.recording.provenance import stream_keys
from qk_sniffer.storage import check_space, head_files_bytes, journal_bytes


def require_space(
    data_root: Path,
    selection: Selection,
    lengths: Tensor | None,
    listed: Listed | None,
    streams: Sequence[Mapping[str, Any]],
    dtype: torch.dtype,
) -> None:
    """Compare the room on the disk with what texts will take.

    Args:
        data_root: Where they are captured.
        selection: Which positions are kept.
        lengths: (N,) int64, tokens in each text; None where they stream, and nobody knows.
        listed: Positions to keep of each text, where they come with it.
        streams: The captured heads of each layer and kind, as in a journal's header.
        dtype: Number format of the vectors.

    Raises:
        UserError: They won't fit.
    """
    if lengths is None:
        return
    name = str(dtype).removeprefix("torch.")
    rows = float(selection.expected_rows(lengths, listed).sum())
    n_draws = selection.count_draws(stream_keys(streams), lengths)
    check_space(
        data_root,
        journal_bytes(streams, name, rows, n_draws=n_draws),
        head_files_bytes(streams, name, rows),
    )
