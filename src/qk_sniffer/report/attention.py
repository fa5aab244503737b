"""The sections of a report on the attention of a few heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qk_sniffer.capture import attended_from
from qk_sniffer.errors import UserError
from qk_sniffer.pictures import (
    AttentionMap,
    attention_size,
    draw_attention,
    draw_attention_by_distance,
    draw_attention_to_first,
)
from qk_sniffer.reading import Attention, Captures, Head
from qk_sniffer.reading.plots import attention_map
from qk_sniffer.report.chosen import Chosen
from qk_sniffer.report.page import Section
from qk_sniffer.report.themes import picture
from qk_sniffer.storage import has_softmax

_MOST_KEYS = 60
"""Of a map, whose tokens are still to be read."""
_MOST_TEXTS, _MOST_QUERIES = 8, 1_024
"""Of the means, which take all scores of a text at once."""
_LEAST_PAIRS = 0.02
"""Of those at the commonest distance, for the mean at another one."""


def attention_section(
    captures: Captures, chosen: Sequence[Chosen], texts: list[int], example: int | None
) -> Section:
    """Attention of the chosen heads in one text, or the reason why there is none.

    Args:
        captures: The capture.
        chosen: The heads.
        texts: Of which one is taken.
        example: Another one; None takes that with most rows.
    """
    shown = _longest(chosen[0], texts) if example is None else example
    try:
        maps = {
            number: found
            for number, choice in enumerate(chosen, start=1)
            if shown is not None and (found := _map(captures, choice, shown)) is not None
        }
    except UserError as error:
        return Section("Attention", f"Not shown: {error}.")
    if not maps:
        return Section("Attention", f"Not shown: {_why_none(chosen)}.")
    assert shown is not None
    source = captures.source_ids()[shown]
    text = _text(source, list(maps.values()), has_statistics=has_softmax(captures.manifest))
    section = Section("Attention", text)
    for number, content in maps.items():
        query, key = (head.name for head in chosen[number - 1].heads.values())
        size, draw = attention_size(content), partial(draw_attention, attention=content)
        caption = f"Attention of {query} to {key}"
        section.pictures.append(picture(f"attention-{number}", caption, draw, size=size, is_wide=True))
    return section


def means_section(captures: Captures, chosen: Sequence[Chosen], texts: list[int]) -> Section:
    """Attention by distance and to the first token, or the reason why there is none."""
    title = "Attention on average"
    try:
        means = {
            choice.name: found
            for choice in chosen
            if len(choice.heads) == 2 and (found := _means(captures, choice, texts)) is not None
        }
    except UserError as error:
        return Section(title, f"Not shown: {error}.")
    if not means:
        return Section(
            title,
            "Not shown: it takes texts whose queries and keys were all kept, as by sampler all, or "
            "statistics of the softmax, as by capture_softmax.",
        )
    is_sampled = captures.settings["capture"]["sampler"]["type"] != "all"
    section = Section(
        title,
        f"The model's own attention in up to {_MOST_TEXTS} texts and their first {_MOST_QUERIES:,} "
        "queries: how much a key gets by its distance from the query, and how much of each query the "
        "first token draws." + " Of the pairs of a query and a key that were kept." * is_sampled,
    )
    by_distance = {name: (found.distances, found.by_distance) for name, found in means.items()}
    draw = partial(draw_attention_by_distance, curves=by_distance)
    section.pictures.append(picture("attention-by-distance", "Attention by distance", draw))
    to_first = {name: (m.positions, m.to_first) for name, m in means.items() if len(m.positions)}
    if to_first:
        draw = partial(draw_attention_to_first, curves=to_first)
        section.pictures.append(picture("attention-to-first", "Attention to the first token", draw))
    return section


def _text(source: str, maps: list[AttentionMap], *, has_statistics: bool) -> str:
    text = (
        f'Recomputed from the stored vectors, in the text "{source}": each row is a query, each column '
        "a key, with position and token; the first queries of the text. Grey: the query does not "
        "attend to the key, which is behind it or outside the layer's window."
    )
    if any(set(found.query_labels) != set(found.key_labels) for found in maps):
        text += " Rows and columns are different samples of positions."
    if any(found.measure != "probability" for found in maps):
        text += (
            " Not all keys were kept, so a row shows how the query shares its attention among those "
            "that were."
        )
    elif has_statistics:
        text += " Probabilities are the model's own, also where some of a query's keys were not kept."
    return text


def _why_none(chosen: Sequence[Chosen]) -> str:
    if any(len(choice.heads) == 2 for choice in chosen):
        return "no key of this text was kept before a query"
    return "it takes queries and keys, and one was not captured"


def _longest(choice: Chosen, texts: list[int]) -> int | None:
    """The text with most rows in a head; None where it has none."""
    rows = _rows_of_texts(next(iter(choice.heads.values())), texts)
    return max(rows, key=lambda text: rows[text], default=None)


def _rows_of_texts(head: Head, texts: list[int]) -> dict[int, int]:
    column = head.where(example=texts).arrow(["example_id"])["example_id"].to_numpy()
    ids, counts = np.unique(column, return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def _map(captures: Captures, choice: Chosen, example: int) -> AttentionMap | None:
    if len(choice.heads) < 2 or not len(choice.heads["q"].where(example=example)):
        return None
    query = choice.heads["q"]
    return attention_map(captures, query.layer.layer_idx, query.head, example, most_keys=_MOST_KEYS)


@dataclass(frozen=True)
class _Means:
    """What a head attends to on average.

    Attributes:
        distances: (D,) from query to key.
        by_distance: (D,) mean probability of a key there.
        positions: (N,) of the queries behind the first token that attend to it.
        to_first: (N,) its probability.
    """

    distances: npt.NDArray[np.int64]
    by_distance: npt.NDArray[np.float64]
    positions: npt.NDArray[Any]
    to_first: npt.NDArray[Any]


def _means(captures: Captures, choice: Chosen, texts: list[int]) -> _Means | None:
    """The means over texts whose rows were all kept; None where there is none."""
    query = choice.heads["q"]
    sums = np.zeros((2, _MOST_QUERIES))
    positions, to_first = [], []
    for text in _known_texts(captures, choice, texts)[:_MOST_TEXTS]:
        attention = captures.attention(query.layer.layer_idx, query.head, text, range(_MOST_QUERIES))
        probabilities, is_attended = attention.probabilities, attention.scores > -torch.inf
        distances = attention.query_positions[:, None] - attention.key_positions
        for total, weights in zip(sums, (probabilities[is_attended], None), strict=True):
            total += np.bincount(distances[is_attended], weights, _MOST_QUERIES)
        meets_first, to_first_token = _of_first_token(attention)
        positions.append(attention.query_positions[meets_first].numpy())
        to_first.append(to_first_token[meets_first].numpy())
    if not sums[1].any():
        return None
    # Of the largest distances a text has a pair or two, whose mean would be chance.
    often = sums[1] > _LEAST_PAIRS * sums[1].max()
    by_distance = sums[0, often] / sums[1, often]
    return _Means(
        np.flatnonzero(often), by_distance, np.concatenate(positions), np.concatenate(to_first)
    )


def _of_first_token(attention: Attention) -> tuple[Tensor, Tensor]:
    """Which queries behind the first token attend to it, where that is known, and its probability."""
    layer, queries = attention.layer, attention.query_positions
    first = attended_from(queries, layer.sliding_window, chunked=layer.chunked)
    meets_first = (first == 0) & (queries > 0)
    if attention.key_positions[0] == 0:
        return meets_first, attention.probabilities[:, 0]
    if layer.scores is None or layer.scores.sinks is not None:
        # The mass on a sink may be that on a learned one.
        return meets_first & False, torch.zeros(len(queries))
    return meets_first, attention.statistics["sink_prob"]


def _known_texts(captures: Captures, choice: Chosen, texts: list[int]) -> list[int]:
    """The texts whose probabilities are known: those kept whole, or all with statistics."""
    if not has_softmax(captures.manifest):
        return _whole_texts(captures, choice, texts)
    some = [head.where(position=range(_MOST_QUERIES)) for head in choice.heads.values()]
    kept = [_rows_of_texts(head, texts) for head in some]
    return [text for text in texts if all(text in rows for rows in kept)]


def _whole_texts(captures: Captures, choice: Chosen, texts: list[int]) -> list[int]:
    """The texts of which both heads have every token, from position 0."""
    kept = [_rows_of_texts(head, texts) for head in choice.heads.values()]
    lengths = dict(
        zip(*(captures.examples[name].to_pylist() for name in ("example_id", "n_tokens")), strict=True)
    )
    return [text for text in texts if all(rows.get(text) == lengths[text] > 0 for rows in kept)]
