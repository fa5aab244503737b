"""What a run keeps: heads, rows, and the memory and disk that they take."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from qk_sniffer.capture import (
    BUFFER_BYTES,
    N_BUFFERS,
    SOFTMAX_BYTES,
    AttentionLayer,
    CapturedHeads,
    ModelShard,
    Selection,
    heads_to_capture,
)
from qk_sniffer.config import CaptureConfig, MomentsConfig
from qk_sniffer.estimate.moments import Moments
from qk_sniffer.estimate.texts import Texts
from qk_sniffer.kinds import KINDS, SOFTMAX_COLUMNS
from qk_sniffer.models import AttentionGeometry
from qk_sniffer.recording import described_streams, stream_keys
from qk_sniffer.storage import head_files_bytes, journal_bytes, row_bytes

_PLANNED_ROW = 64
"""Bytes of a row in the plan of its batch, for all heads of a layer and kind: eight int64."""


@dataclass(frozen=True)
class Capture:
    """The expected rows of a run, and what they take.

    Attributes:
        config: What is captured.
        geometry: The attention of the model.
        texts: What is read.
        selection: Which positions are kept.
        moments_config: Which moments are summed.
        n_readers: Processes, or groups of them that share a model, that share the texts.
        n_shards: Processes that share a model.
    """

    config: CaptureConfig
    geometry: AttentionGeometry
    texts: Texts
    selection: Selection
    moments_config: MomentsConfig
    n_readers: int
    n_shards: int

    @cached_property
    def heads(self) -> Mapping[int, CapturedHeads]:
        """The captured heads, by layer.

        Raises:
            UserError: A layer or head does not exist, or none is left.
        """
        return heads_to_capture(self.config.as_settings(), self.geometry.layers)

    @cached_property
    def streams(self) -> list[dict[str, Any]]:
        """The heads of each layer and kind."""
        return described_streams(self.config.as_settings(), self.heads)

    @cached_property
    def _heads_of_shares(self) -> list[dict[int, CapturedHeads]]:
        """Those that fall to each of the processes that share a model."""
        shards = [ModelShard(number, self.n_shards) for number in range(self.n_shards)]
        return [{idx: shard.of(heads) for idx, heads in self.heads.items()} for shard in shards]

    @cached_property
    def _streams_of_shares(self) -> list[list[dict[str, Any]]]:
        settings = self.config.as_settings()
        return [described_streams(settings, heads) for heads in self._heads_of_shares]

    @property
    def dtype(self) -> str:
        """Number format of the vectors, by its name in torch."""
        return str(self.geometry.dtype).removeprefix("torch.")

    @cached_property
    def moments(self) -> Moments | None:
        """What is summed over all tokens; None for nothing."""
        if not self.moments_config.enabled:
            return None
        n_buckets = self.selection.count_buckets(int(self.texts.lengths.max()))
        return Moments(self.moments_config, self.streams, self._streams_of_shares, n_buckets)

    @property
    def n_heads(self) -> int:
        """Heads of all kinds: files that are written."""
        return sum(len(stream["heads"]) for stream in self.streams if stream["kind"] in KINDS)

    @cached_property
    def rows_by_bucket(self) -> dict[int, float]:
        """Expected rows of each head in each bucket."""
        rows = self.selection.expected_rows_by_bucket(self.texts.lengths, self.texts.listed)
        return {bucket: count * self.texts.scale for bucket, count in rows.items()}

    @property
    def rows(self) -> float:
        """Expected rows of each head."""
        return sum(self.rows_by_bucket.values())

    @property
    def journal_bytes(self) -> int:
        """What the journal takes when the last batch is read."""
        return journal_bytes(
            self.streams,
            self.dtype,
            self.rows,
            n_draws=self._n_draws,
            n_batches=self.texts.n_batches,
            n_token_strings=self.texts.n_tokens if self.config.capture_token_strings else 0,
            n_shards=self.n_shards,
        )

    @property
    def files_bytes(self) -> int:
        """What the Parquet files of all heads take."""
        if not self.selection.keeps_rows:
            return 0
        return head_files_bytes(
            self.streams, self.dtype, self.rows, token_strings=self.config.capture_token_strings
        )

    @cached_property
    def rows_of_largest_batch(self) -> float:
        """Expected rows of each head in the batch that keeps the most."""
        rows = self.selection.expected_rows(self.texts.lengths, self.texts.listed)
        firsts = np.cumsum([0, *(lengths.size for lengths in self.texts.batches[:-1])])
        return float(np.add.reduceat(rows, firsts).max())

    @property
    def plan_bytes(self) -> int:
        """Host memory of the places of that batch's rows."""
        return round(self.rows_of_largest_batch * _PLANNED_ROW * self._n_draws)

    @property
    def buffer_bytes(self) -> int:
        """The most that vectors take of the host's memory, and of a device's, on their way."""
        if not self.selection.keeps_rows:
            return 0
        most = max(row_bytes(streams, self.dtype) for streams in self._streams_of_shares)
        n_bytes = self.rows_of_largest_batch * most
        n_buffers: int = min(N_BUFFERS, math.ceil(n_bytes / BUFFER_BYTES) + 1)
        return n_buffers * BUFFER_BYTES

    @property
    def softmax_bytes(self) -> int:
        """The most that computing the statistics of softmax takes of a device's memory."""
        if not self.config.capture_softmax:
            return 0
        most_heads = max(len(h.query) for heads in self._heads_of_shares for h in heads.values())
        result = 4 * len(SOFTMAX_COLUMNS) * most_heads * self.rows_of_largest_batch
        return SOFTMAX_BYTES + math.ceil(result)

    @property
    def _n_draws(self) -> int:
        """Layers and kinds with rows of their own."""
        return self.selection.count_draws(stream_keys(self.streams), self.texts.lengths)

    def left_out(self) -> list[tuple[str, list[int]]]:
        """Why layers with attention are not captured, and which."""
        reasons: dict[str, list[int]] = {}
        for layer in self.geometry.layers:
            if layer.layer_idx not in self.heads:
                reasons.setdefault(self._reason(layer), []).append(layer.layer_idx)
        return list(reasons.items())

    def _reason(self, layer: AttentionLayer) -> str:
        if self.config.layers is not None and layer.layer_idx not in self.config.layers:
            return "not in sniffer.capture.layers"
        if self.config.full_attention_only and layer.sliding_window is not None:
            return f"a window of {layer.sliding_window:,} tokens, and full_attention_only is true"
        if self.config.head_sampling is not None:
            return "head_sampling has drawn none of their heads"
        return "they have none of sniffer.capture.heads"


def parameter_bytes(parameters: Sequence[torch.Tensor]) -> int:
    """Memory of weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
