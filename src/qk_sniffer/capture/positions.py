"""Absolute token positions, counted on the host so that no kernel has to finish for them."""

import torch
from torch import Tensor

from qk_sniffer.errors import UserError


def compute_positions(
    query_length: int,
    key_length: int,
    position_ids: Tensor | None = None,
    cache_position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Absolute positions of the queries and of the keys of one attention call.

    Sequences are padded on the right, so every row of a batch has the same positions. Without
    ``position_ids`` or ``cache_position`` the queries are the last ``query_length`` of the
    ``key_length`` tokens, which holds for a plain forward and for one that extends a dynamic cache.

    Args:
        query_length: Number of queries, Q.
        key_length: Number of keys, K >= Q; larger where a cache holds other tokens.
        position_ids: Optional (B, Q) or (Q,) integers. Reading a tensor that is on an accelerator
            waits for it, so pass it from the host or leave it out.
        cache_position: Optional (Q,) integers; read like ``position_ids`` and preferred to it.

    Returns:
        int64 tensors on the CPU: (Q,) of the queries and (K,) of the keys. The keys of the queries'
        own tokens start at ``first_new_key``; a static cache has slots behind them that are not
        written yet, whose positions are those that they will get.

    Raises:
        UserError: The rows of ``position_ids`` differ, as left padding or packing makes them.
    """
    if cache_position is not None:
        queries = cache_position.to("cpu", torch.int64).reshape(-1)
    elif position_ids is not None:
        rows = position_ids.to("cpu", torch.int64).reshape(-1, query_length)
        if not torch.equal(rows, rows[:1].expand_as(rows)):
            raise UserError(
                "position_ids: the rows of the batch differ; pad sequences on the right and do not "
                "pack them"
            )
        queries = rows[0]
    else:
        queries = torch.arange(key_length - query_length, key_length)
    start = int(queries[0])
    first = first_new_key(start, query_length, key_length)
    keys = torch.arange(key_length) + (start - first)
    keys[first : first + query_length] = queries
    return queries, keys


def own_keys(key: Tensor, start: int, query_length: int) -> Tensor:
    """The keys of the queries' own tokens: (B, num_key_value_heads, Q, head_dim).

    Args:
        key: (B, num_key_value_heads, K, head_dim) of an attention call.
        start: Tokens in the cache before it.
        query_length: Q.
    """
    if key.shape[2] == query_length:
        return key
    first = first_new_key(start, query_length, key.shape[2])
    return key[:, :, first : first + query_length]


def first_new_key(start: int, query_length: int, key_length: int) -> int:
    """Index, among the keys of an attention call, of the first query's own token.

    A dynamic cache ends with the new tokens. A static one holds token p in slot p until its window is
    full, and has empty slots behind.

    Args:
        start: Absolute position of the first query.
        query_length: Number of queries.
        key_length: Number of keys.
    """
    return min(start, key_length - query_length)
