"""The sections of a report that look at a few heads closely."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from qk_sniffer.errors import UserError
from qk_sniffer.geometry import principal_components
from qk_sniffer.kinds import KINDS, Kind
from qk_sniffer.reading import Captures, Head
from qk_sniffer.report.maps import picture
from qk_sniffer.report.measures import Measures, finite_rows
from qk_sniffer.report.page import Picture, Section
from qk_sniffer.report.pictures import AttentionPicture, HeadPoints, draw_attention, draw_points
from qk_sniffer.storage import parse_head_name

_MOST_POINTS = 4_000
_MOST_QUERIES, _MOST_KEYS = 40, 60
"""Of an attention map, whose tokens are still to be read."""


@dataclass(frozen=True)
class Chosen:
    """A head that is looked at closely: a query head with its key head, or one of them alone."""

    name: str
    heads: dict[Kind, Head]


def head_of(captures: Captures, name: str) -> Head:
    """The head of a name.

    Raises:
        UserError: It is no name of a head, or the head was not captured.
    """
    parsed = parse_head_name(name)
    if parsed is None:
        raise UserError(f"report: {name} is no name of a head; give one such as l02h05q")
    return captures.head(*parsed)


def telling_heads(captures: Captures, measures: Mapping[Kind, Measures]) -> list[Head]:
    """The heads with the highest, the middle and the lowest R², of those that were measured."""
    kind = next(iter(measures))
    norms, r2 = measures[kind].norms, measures[kind].r2
    heads = [head for head in captures.heads if head.kind == kind]
    measured = [head for head in heads if np.isfinite(norms.of(head))] or heads
    ranked = sorted(measured, key=lambda head: -np.nan_to_num(r2.of(head), nan=-np.inf))
    return [ranked[i] for i in sorted({0, len(ranked) // 2, len(ranked) - 1})]


def with_partner(captures: Captures, head: Head) -> Chosen:
    """A query head comes with its key head, where that was captured."""
    heads: dict[Kind, Head] = {head.kind: head}
    name = head.name
    if head.kind == "q" and captures.settings["capture"]["capture_keys"]:
        heads["k"] = captures.key_head(head.layer.layer_idx, head.head)
        name += f" with {heads['k'].name}"
    return Chosen(name, heads)


def components_section(chosen: Sequence[Chosen], texts: list[int]) -> Section:
    """Principal components by position."""
    section = Section(
        "Position in the vectors",
        "The first two principal components of a head's queries and of the keys that they meet, each "
        "dot a token, coloured by its position. "
        f"Heads: {', '.join(f'`{c.name}`' for c in chosen)}.",
    )
    for number, choice in enumerate(chosen, start=1):
        for kind, head in choice.heads.items():
            points = _points(head, texts)
            if points is not None:
                caption = (
                    f"Principal components of the {KINDS[kind].plural} of {head.name}, by position"
                )
                draw = partial(draw_points, points)
                section.pictures.append(picture(f"components-{number}{kind}", caption, draw))
    return section


def _points(head: Head, texts: list[int]) -> HeadPoints | None:
    rows, _ = finite_rows(head.where(example=texts))
    if len(rows["vector"]) < 2:
        return None
    some = np.linspace(0, len(rows["vector"]) - 1, min(_MOST_POINTS, len(rows["vector"]))).astype(int)
    points, shares = principal_components(rows["vector"][some])
    return HeadPoints(points, shares, rows["position"][some])


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
        pictures = [
            drawn
            for number, choice in enumerate(chosen, start=1)
            if shown is not None
            and (drawn := _attention_picture(captures, choice, number, shown)) is not None
        ]
    except UserError as error:
        return Section("Attention", f"Not shown: {error}.")
    if not pictures:
        return Section("Attention", f"Not shown: {_why_none(chosen)}.")
    ids = captures.examples.to_pylist()
    source = next(row["source_id"] for row in ids if row["example_id"] == shown)
    return Section(
        "Attention",
        f"Recomputed from the stored vectors, in the text {source}: each row is a query, each column "
        f"a key, with position and token; the first {_MOST_QUERIES} queries. Where keys were not kept, "
        "a row shows how the query shares its attention among those that were.",
        pictures,
    )


def _why_none(chosen: Sequence[Chosen]) -> str:
    if any(len(choice.heads) == 2 for choice in chosen):
        return "no key of this text was kept before a query"
    return "it takes queries and keys, and one was not captured"


def _longest(choice: Chosen, texts: list[int]) -> int | None:
    """The text with most rows in a head; None where it has none."""
    head = next(iter(choice.heads.values()))
    ids, counts = np.unique(
        head.where(example=texts).arrow(["example_id"])["example_id"].to_numpy(), return_counts=True
    )
    return int(ids[counts.argmax()]) if ids.size else None


def _attention_picture(captures: Captures, choice: Chosen, number: int, example: int) -> Picture | None:
    if len(choice.heads) < 2:
        return None
    query, key = (head.where(example=example) for head in choice.heads.values())
    positions = query.arrow(["position"])["position"].to_pylist()[:_MOST_QUERIES]
    if not positions:
        return None
    attention = captures.attention(query.layer.layer_idx, query.head, example, positions)
    n_keys = min(int((attention.key_positions <= positions[-1]).sum()), _MOST_KEYS)
    if not n_keys:
        return None
    shares = attention.among_kept[:, :n_keys].numpy()
    content = AttentionPicture(shares, _labels(query, len(shares)), _labels(key, n_keys))
    label = "probability" if attention.is_complete.all() else "share among the keys kept"
    caption = f"Attention of {query.name} to {key.name}"
    draw = partial(draw_attention, content, label)
    return picture(f"attention-{number}", caption, draw, is_wide=True)


def _labels(head: Head, count: int) -> list[str]:
    """Position and token of the first rows."""
    rows = head.arrow(["position", "token_str"]).slice(0, count).to_pylist()
    return [f"{row['position']} {_readable(row['token_str'])}".strip() for row in rows]


def _readable(token: str | None) -> str:
    """A token in few characters; tokenizers mark spaces and line breaks in their own ways."""
    text = re.sub(r"[Ġ▁ ]", "·", re.sub(r"[Ċ\n]", "↵", token or ""))
    return text if len(text) <= 12 else text[:11] + "…"
