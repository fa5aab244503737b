"""Attention of one head in one text, computed from stored queries and keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from qk_sniffer.capture import (
    AttentionLayer,
    attended_from,
    attends,
    capped,
    softmax_with_sinks,
)
from qk_sniffer.errors import UserError

_MOST_MASS = 1.01
"""What the probabilities of a query may sum to, with room for rounding."""


@dataclass(frozen=True)
class Attention:
    """Scores of the stored queries and keys of one head in one text.

    Attributes:
        layer: The layer.
        head: The query head.
        query_positions: (Q,) int64, ascending.
        key_positions: (K,) int64, ascending.
        scores: (Q, K) float32: scaled, capped and biased q·k, which the softmax takes; -inf where the
            query does not attend to the key.
        start: The first position that queries can attend to.
        statistics: (Q,) each, by their column: those of each query's softmax over all its keys; empty
            where they were not captured.
    """

    layer: AttentionLayer
    head: int
    query_positions: Tensor
    key_positions: Tensor
    scores: Tensor
    start: int = 0
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def is_complete(self) -> Tensor:
        """(Q,) bool: whether every key that the query attends to is stored."""
        window, chunked = self.layer.sliding_window, self.layer.chunked
        # Blocks count from the first token of the text.
        own = self.query_positions - self.start
        first = attended_from(own, window, chunked=chunked).clamp(min=0) + self.start
        attended = (self.scores > -torch.inf).sum(dim=1)
        return attended == self.query_positions - first + 1

    @property
    def probabilities(self) -> Tensor:
        """(Q, K) float32: the model's own attention to the stored keys.

        A row sums to 1 where all keys that the query attends to are stored and there is no sink.

        Raises:
            UserError: A key that a query attends to is not stored, and neither are the statistics of
                its softmax, so the share of the stored ones is unknown.
        """
        if self.statistics:
            return self._with_statistics()
        n_incomplete = int((~self.is_complete).sum())
        if n_incomplete:
            raise UserError(
                f"attention: {n_incomplete:,} of {len(self.scores):,} queries attend to keys that were "
                "not kept, so the sum of the softmax is unknown; capture with capture_softmax: true or "
                "sampler all, leave out the queries that are not complete, or take among_kept or scores"
            )
        return self.among_kept

    def _with_statistics(self) -> Tensor:
        """Probabilities by the softmax that the model computed."""
        probabilities = (self.scores - self.statistics["lse"][:, None]).exp()
        n_impossible = int((probabilities.sum(dim=1) > _MOST_MASS).sum())
        if n_impossible:
            raise UserError(
                f"attention: the stored keys of {n_impossible:,} queries have more than all of their "
                "softmax, so the model attends to fewer than its layer's window says; take scores"
            )
        return probabilities

    @property
    def among_kept(self) -> Tensor:
        """(Q, K) float32: softmax among the stored keys alone, a query's share of each of them.

        A query that attends to no stored key has zeros.
        """
        function = self.layer.scores
        sinks = None if function is None else function.sinks
        sink = None if sinks is None else torch.tensor([sinks[self.head]], device=self.scores.device)
        # Where no key is attended to, the softmax is 0 / 0.
        return softmax_with_sinks(self.scores, sink).nan_to_num(nan=0.0)


def attention_of(
    layer: AttentionLayer,
    head: int,
    query: Tensor,
    key: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    start: int = 0,
    statistics: Mapping[str, Tensor] | None = None,
) -> Attention:
    """The attention of some queries to some keys.

    Args:
        layer: The layer, with its score function.
        head: The query head.
        query: (Q, head_dim) float32, as the attention used them.
        key: (K, head_dim) float32, of the key head that serves the query head.
        query_positions: (Q,) int64.
        key_positions: (K,) int64.
        start: The first position that queries can attend to.
        statistics: (Q,) each, of the queries' softmax.
    """
    function = layer.scores
    assert function is not None
    scores = capped(query @ key.T * function.scaling, function.softcap)
    if function.alibi_slopes is not None:
        scores = scores + function.alibi_slopes[head] * key_positions
    allowed = attends(
        query_positions - start, key_positions - start, layer.sliding_window, chunked=layer.chunked
    )
    scores = scores.masked_fill(~allowed, -torch.inf)
    return Attention(layer, head, query_positions, key_positions, scores, start, statistics or {})
