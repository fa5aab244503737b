"""What the methods of ``Head`` and ``Captures`` draw; matplotlib is imported with this module."""

from __future__ import annotations

import re
from textwrap import fill
from typing import TYPE_CHECKING

import torch

from qk_sniffer.errors import UserError
from qk_sniffer.geometry import telling_components
from qk_sniffer.pictures import (
    AttentionMap,
    attention_size,
    describe_components,
    draw_attention,
    draw_components,
    draw_head_map,
    new_axes,
    spread_evenly,
)
from qk_sniffer.reading.head import Head, Numbers, finite_rows
from qk_sniffer.reading.maps import HeadMap, SoftmaxMean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qk_sniffer.reading.captures import Captures

_MOST_QUERIES = 40
"""That are shown of a text where nobody says which."""
_LONGEST_TOKEN = 12
_TITLE_WIDTH = 60


def plot_head(head: Head, axes: Axes | None) -> Axes:
    """The vectors of a head along the components that tell most; see ``Head.plot``."""
    rows, _ = finite_rows(head)
    if len(rows["vector"]) < 2:
        raise UserError(f"{head.name}: fewer than two of these rows are finite, so there is no picture")
    some = spread_evenly(len(rows["vector"]))
    components = telling_components(rows["vector"][some], rows["position"][some])
    axes = axes or new_axes()
    draw_components(axes, components, rows["position"][some])
    title = f"{head.name}: {describe_components(components)}"
    axes.set_title(fill(title, _TITLE_WIDTH), loc="left", fontsize="medium")
    return axes


def plot_attention(
    captures: Captures,
    layer: int,
    head: int,
    example: int | str,
    queries: Numbers | None,
    axes: Axes | None,
) -> Axes:
    """The attention of a head in one text; see ``Captures.plot_attention``."""
    content = attention_map(captures, layer, head, example, queries)
    query = captures.head(layer, head)
    if content is None:
        raise UserError(
            f"{query.name}: no key of example {example} that these queries attend to was kept"
        )
    axes = axes or new_axes(attention_size(content))
    draw_attention(axes, content)
    key = captures.key_head(layer, head)
    source = example if isinstance(example, str) else captures.source_ids()[example]
    axes.set_title(f'{query.name} to {key.name} in "{source}"', loc="left")
    return axes


def plot_softmax(found: HeadMap, mean: SoftmaxMean, axes: Axes | None) -> Axes:
    """A map of the statistics of queries; see ``Captures.plot_softmax``."""
    axes = axes or new_axes()
    numbers = (found.layers, found.heads, found.values)
    draw_head_map(axes, *numbers, mean.label, form=mean.form, limits=mean.limits)
    return axes


def attention_map(
    captures: Captures,
    layer: int,
    head: int,
    example: int | str,
    queries: Numbers | None = None,
    most_keys: int | None = None,
) -> AttentionMap | None:
    """The attention of a head in one text, with tokens; None where no key was kept before a query.

    Args:
        captures: What was captured.
        layer: Number of the layer.
        head: Number of the query head.
        example: Example id, or source id as a string.
        queries: Positions of the queries; None takes the first that are stored.
        most_keys: How many keys are shown; None shows those from the first to the last that a query
            attends to.

    Raises:
        UserError: As ``Captures.attention``.
    """
    query = captures.head(layer, head).where(example=example)
    if queries is None:
        queries = query.arrow(["position"])["position"].to_pylist()[:_MOST_QUERIES]
    attention = captures.attention(layer, head, example, queries)
    is_attended = attention.scores > -torch.inf
    attended = is_attended.any(dim=0).nonzero().flatten().tolist()
    if not attended:
        return None
    first, last = attended[0], attended[-1]
    keys = slice(first, last + 1 if most_keys is None else min(last + 1, first + most_keys))
    key = captures.key_head(layer, head).where(example=example)
    is_known = bool(attention.statistics) or bool(attention.is_complete.all())
    shares = attention.probabilities if is_known else attention.among_kept
    return AttentionMap(
        shares[:, keys].cpu().numpy(),
        is_attended[:, keys].cpu().numpy(),
        _labels(query.where(position=queries)),
        _labels(key)[keys],
        "probability" if is_known else "share among the keys kept",
    )


def _labels(head: Head) -> list[str]:
    """Position and token of each row."""
    rows = head.arrow(["position", "token_str"]).to_pylist()
    return [f"{row['position']} {_readable(row['token_str'])}".strip() for row in rows]


def _readable(token: str | None) -> str:
    """A token in few characters; tokenizers mark spaces and line breaks in their own ways."""
    text = re.sub(r"[Ġ▁ ]", "·", re.sub(r"[Ċ\n]", "↵", token or ""))
    return text if len(text) <= _LONGEST_TOKEN else text[: _LONGEST_TOKEN - 1] + "…"
