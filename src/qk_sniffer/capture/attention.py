"""From queries and keys to attention: scale, cap, bias, mask, and the softmax with its sinks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreFunction:
    """How a layer turns q·kᵀ into scores, before its mask, and what joins its softmax.

    Attributes:
        scaling: Factor of q·k.
        softcap: Scores become softcap · tanh(scores / softcap); None where they are not capped.
        alibi_slopes: (num_attention_heads,) what is added for each position of the key; None where
            nothing is. Source: O. Press, N. A. Smith, M. Lewis, "Train short, test long", ICLR 2022.
        sinks: (num_attention_heads,) scores of a key without a value, that takes its share of the
            softmax; None where there is none.
    """

    scaling: float
    softcap: float | None = None
    alibi_slopes: Sequence[float] | None = None
    sinks: Sequence[float] | None = None


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores after the layer's cap, in their dtype and shape."""
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def attends(
    query_positions: Tensor, key_positions: Tensor, window: int | None = None, *, chunked: bool = False
) -> Tensor:
    """Which keys each query attends to.

    Args:
        query_positions: (Q,) int64.
        key_positions: (K,) int64.
        window: The layer's window; None attends to all earlier tokens and the query's own.
        chunked: The window is a block, and not the tokens before the query.

    Returns:
        (Q, K) bool.
    """
    query_positions = query_positions[:, None]
    distance = query_positions - key_positions
    if window is None:
        return distance >= 0
    if chunked:
        return (distance >= 0) & (query_positions // window == key_positions // window)
    return (distance >= 0) & (distance < window)


def attended_from(query_positions: Tensor, window: int | None, *, chunked: bool = False) -> Tensor:
    """The first position that each query attends to; arguments as of ``attends``.

    Returns:
        (Q,) int64.
    """
    if window is None:
        return torch.zeros_like(query_positions)
    if chunked:
        return query_positions - query_positions % window
    return (query_positions - window + 1).clamp(min=0)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Probabilities of the keys; with a sink they sum to less than 1.

    Args:
        scores: (..., K) float32, -inf where a query does not attend.
        sinks: (..., 1), broadcast against the scores; None for none.
    """
    if sinks is None:
        return scores.softmax(dim=-1)
    sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
