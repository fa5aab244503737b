"""``qk-sniffer report``: measures a data root, draws it, and writes the page and the pictures."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from qk_sniffer.errors import UserError
from qk_sniffer.geometry import principal_components
from qk_sniffer.hub import Publication
from qk_sniffer.reading import Captures, Head
from qk_sniffer.report.measures import HeadMap, Measures, Progress, measure, measured_texts
from qk_sniffer.report.page import Picture, Section, bullets, paragraph, render_page
from qk_sniffer.report.pictures import (
    AttentionPicture,
    HeadPoints,
    draw_attention,
    draw_head_map,
    draw_points,
    draw_rows,
)
from qk_sniffer.storage import (
    HEAD_DIRECTORY,
    REPORT_DIRECTORY,
    Kind,
    count_rows,
    describe_run,
    explained_writing,
    shown_names,
    write_card,
)

_KINDS: dict[Kind, str] = {"q": "queries", "k": "keys"}
_MOST_POINTS = 4_000
_MOST_QUERIES, _MOST_KEYS = 40, 60
"""Of an attention map, whose tokens are still to be read."""


@dataclass(frozen=True)
class _Chosen:
    """A head that is looked at closely: a query head with its key head, or one of them alone."""

    name: str
    heads: dict[Kind, Head]


def write_report(
    data_root: Path,
    progress: Progress,
    *,
    heads: Sequence[str] = (),
    example: str | None = None,
) -> Path:
    """Write ``report/`` into a finished data root, and let its card show the main pictures.

    Args:
        data_root: The data root.
        progress: Wraps the iteration over the heads that are measured, given their number.
        heads: Names of heads to look at closely, such as l02h05q; without any, three are chosen by
            their positional R².
        example: Source id of the text whose attention is shown; None takes the one with most rows.

    Returns:
        The page.

    Raises:
        UserError: No run has finished there, it has no rows, or a head or example is not in it.
    """
    captures = Captures(data_root)
    if count_rows(captures.manifest) == 0:
        raise UserError(f"{data_root}: no row was kept, so there is nothing to show")
    wanted = [_head_of(captures, name) for name in heads]
    texts = measured_texts(captures)
    measures = measure(captures, texts, progress)
    chosen = [_with_partner(captures, h) for h in wanted or _telling_heads(captures, measures)]
    sections = [
        _rows_section(measures),
        _r2_section(measures),
        _norms_section(measures),
        _components_section(captures, chosen, texts),
        _attention_section(captures, chosen, texts, example),
    ]
    return _write(data_root, captures, sections)


def _head_of(captures: Captures, name: str) -> Head:
    match = HEAD_DIRECTORY.fullmatch(name)
    if match is None:
        raise UserError(f"report: {name} is no name of a head; give one such as l02h05q")
    return captures.head(int(match[1]), int(match[2]), "q" if match[3] == "q" else "k")


def _telling_heads(captures: Captures, measures: dict[Kind, Measures]) -> list[Head]:
    """The heads with the highest, the middle and the lowest R²."""
    kind = next(iter(measures))
    r2 = measures[kind].r2
    heads = [head for head in captures.heads if head.kind == kind and len(head)]

    def value(head: Head) -> float:
        number = r2.values[r2.layers.index(head.layer.layer_idx), head.head]
        return -np.inf if np.isnan(number) else float(number)

    ranked = sorted(heads, key=value, reverse=True)
    return [ranked[i] for i in sorted({0, len(ranked) // 2, len(ranked) - 1})]


def _with_partner(captures: Captures, head: Head) -> _Chosen:
    """A query head comes with its key head, where that was captured."""
    heads: dict[Kind, Head] = {head.kind: head}
    name = head.name
    if head.kind == "q" and captures.settings["capture"]["capture_keys"]:
        heads["k"] = captures.key_head(head.layer.layer_idx, head.head)
        name += f" with {heads['k'].name}"
    return _Chosen(name, heads)


def _picture(name: str, caption: str, draw: Any, *, is_wide: bool = False) -> Picture:
    return Picture(name, caption, draw(theme="light"), draw(theme="dark"), is_wide)


def _rows_section(measures: dict[Kind, Measures]) -> Section:
    section = Section("Rows", "Rows that a head of each layer keeps in each bucket of positions.")
    for kind, found in measures.items():
        draw = partial(draw_rows, found.norms.layers, found.buckets, found.rows)
        name = _KINDS[kind]
        section.pictures.append(_picture(f"rows-{name}", f"Rows of {name} by layer and bucket", draw))
    return section


_R2_TEXT = """\
How well a linear map of a head's vectors tells the position of tokens, in texts that it was not \
fitted on: 1 tells it exactly, 0 or less tells nothing. The vectors are those that attention uses, \
RoPE included, unless they were captured before it. Of {:,} texts."""

_NORMS_TEXT = "Mean Euclidean norm of the vectors of each head, of {:,} texts."


def _r2_section(measures: dict[Kind, Measures]) -> Section:
    draw = partial(draw_head_map, label="positional R²", form="{:.2f}", limits=(0.0, 1.0))
    maps = {kind: found.r2 for kind, found in measures.items()}
    return _map_section(
        Section("Positional R²", _text(_R2_TEXT, measures)), "positional-r2", maps, draw
    )


def _norms_section(measures: dict[Kind, Measures]) -> Section:
    draw = partial(draw_head_map, label="mean norm", form="{:.1f}")
    maps = {kind: found.norms for kind, found in measures.items()}
    return _map_section(Section("Norms", _text(_NORMS_TEXT, measures)), "norms", maps, draw)


def _text(form: str, measures: dict[Kind, Measures]) -> str:
    return form.format(next(iter(measures.values())).n_texts)


def _map_section(section: Section, file: str, maps: dict[Kind, HeadMap], draw: Any) -> Section:
    for kind, head_map in maps.items():
        caption = f"{section.title} of the {_KINDS[kind]} of each head"
        section.pictures.append(_picture(f"{file}-{_KINDS[kind]}", caption, partial(draw, head_map)))
    return section


def _components_section(captures: Captures, chosen: list[_Chosen], texts: list[int]) -> Section:
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
                caption = f"Principal components of the {_KINDS[kind]} of {head.name}, by position"
                draw = partial(draw_points, points)
                section.pictures.append(_picture(f"components-{number}{kind}", caption, draw))
    return section


def _points(head: Head, texts: list[int]) -> HeadPoints | None:
    rows = head.where(example=texts).numpy()
    if len(rows["vector"]) < 2:
        return None
    some = np.linspace(0, len(rows["vector"]) - 1, min(_MOST_POINTS, len(rows["vector"]))).astype(int)
    points, shares = principal_components(rows["vector"][some])
    return HeadPoints(points, shares, rows["position"][some])


def _attention_section(
    captures: Captures, chosen: list[_Chosen], texts: list[int], example: str | None
) -> Section:
    """Attention of the chosen heads in one text, or the reason why there is none."""
    try:
        shown = example if example is not None else _longest(chosen[0], texts)
        pictures = [
            picture
            for number, choice in enumerate(chosen, start=1)
            if (picture := _attention_picture(captures, choice, number, shown)) is not None
        ]
    except UserError as error:
        if example is not None:
            raise
        return Section("Attention", f"Not shown: {error}.")
    if not pictures:
        has_both = any(len(choice.heads) == 2 for choice in chosen)
        reason = (
            "no key of this text was kept before a query"
            if has_both
            else ("it takes queries and keys, and one was not captured")
        )
        return Section("Attention", f"Not shown: {reason}.")
    ids = captures.examples.to_pylist()
    source = next(row["source_id"] for row in ids if shown in (row["source_id"], row["example_id"]))
    return Section(
        "Attention",
        f"Recomputed from the stored vectors, in the text `{source}`: each row is a query, each column "
        f"a key, with position and token; the first {_MOST_QUERIES} queries. Where keys were not kept, "
        "a row shows how the query shares its attention among those that were.",
        pictures,
    )


def _longest(choice: _Chosen, texts: list[int]) -> int:
    """The text with most rows in a head."""
    head = next(iter(choice.heads.values()))
    ids, counts = np.unique(
        head.where(example=texts).arrow(["example_id"])["example_id"].to_numpy(), return_counts=True
    )
    return int(ids[counts.argmax()])


def _attention_picture(
    captures: Captures, choice: _Chosen, number: int, example: int | str
) -> Picture | None:
    if len(choice.heads) < 2:
        return None
    query, key = (head.where(example=example) for head in choice.heads.values())
    positions = query.arrow(["position"])["position"].to_pylist()[:_MOST_QUERIES]
    attention = captures.attention(query.layer.layer_idx, query.head, example, positions)
    n_keys = min(int((attention.key_positions <= positions[-1]).sum()), _MOST_KEYS)
    if not n_keys:
        return None
    shares = attention.among_kept[:, :n_keys].numpy()
    picture = AttentionPicture(shares, _labels(query, len(shares)), _labels(key, n_keys))
    label = "probability" if attention.is_complete.all() else "share among the keys kept"
    caption = f"Attention of {query.name} to {key.name}"
    draw = partial(draw_attention, picture, label)
    return _picture(f"attention-{number}", caption, draw, is_wide=True)


def _labels(head: Head, count: int) -> list[str]:
    """Position and token of the first rows."""
    rows = head.arrow(["position", "token_str"]).slice(0, count).to_pylist()
    return [f"{row['position']} {_readable(row['token_str'])}".strip() for row in rows]


def _readable(token: str | None) -> str:
    """A token in few characters; tokenizers mark spaces and line breaks in their own ways."""
    text = re.sub(r"[Ġ▁ ]", "·", re.sub(r"[Ċ\n]", "↵", token or ""))
    return text if len(text) <= 12 else text[:11] + "…"


def _write(data_root: Path, captures: Captures, sections: list[Section]) -> Path:
    model, text = shown_names(captures.settings)
    notes = captures.manifest["notes"]
    partial_run = (
        "" if captures.manifest["complete"] else '<p class="warning">Not every text was read.</p>'
    )
    summary = bullets(describe_run(captures.manifest)) + partial_run
    if notes:
        summary += paragraph("Of this architecture:") + bullets("\n".join(notes))
    load = f'from qk_sniffer import Captures\n\nhead = Captures("{data_root}").head({_first(captures)})'
    summary += f"<pre>{escape(load)}</pre>"
    versions = captures.manifest["versions"]
    footer = f"qk-sniffer {versions['qk-sniffer']}, transformers {versions['transformers']}"
    page = render_page(f"Queries and keys of {model} on {text}", summary, sections, footer)
    directory, temporary = data_root / REPORT_DIRECTORY, data_root / f".{REPORT_DIRECTORY}.tmp"

    @explained_writing(data_root, "make room or mend the disk, then run report again")
    def write() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for section in sections:
            for picture in section.pictures:
                (temporary / f"{picture.name}.png").write_bytes(picture.light)
        (temporary / "index.html").write_text(page, encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
        publication = Publication.read(data_root)
        write_card(data_root, captures.manifest, publication.place if publication else None)

    write()
    return directory / "index.html"


def _first(captures: Captures) -> str:
    head = captures.heads[0]
    return f'{head.layer.layer_idx}, {head.head}, "{head.kind}"'
