"""The sections of a report that show all heads."""

from collections.abc import Callable, Mapping
from functools import partial

from qk_sniffer.kinds import KINDS, Kind
from qk_sniffer.pictures import draw_head_map, draw_rows
from qk_sniffer.report.measures import HeadMap, Measures
from qk_sniffer.report.page import Section
from qk_sniffer.report.themes import picture


def rows_section(measures: Mapping[Kind, Measures]) -> Section:
    """Rows by layer and bucket."""
    section = Section("Rows", "Rows that a head of each layer keeps in each bucket of positions.")
    for kind, found in measures.items():
        draw = partial(draw_rows, layers=found.norms.layers, buckets=found.buckets, rows=found.rows)
        name = KINDS[kind].plural
        section.pictures.append(picture(f"rows-{name}", f"Rows of {name} by layer and bucket", draw))
    return section


_R2_TEXT = """\
How well a linear map of a head's vectors tells the position of tokens, in texts that it was not \
fitted on: 1 tells it exactly, 0 or less tells nothing. The vectors are those that attention uses, \
RoPE included, unless they were captured before it. Grey: not captured, or too few rows or texts to \
tell. Of {:,} texts."""

_NORMS_TEXT = "Mean Euclidean norm of the vectors of each head, of {:,} texts."


def r2_section(measures: Mapping[Kind, Measures]) -> Section:
    """How well position is told, by layer and head."""
    draw = partial(draw_head_map, label="positional R²", form="{:.2f}", limits=(0.0, 1.0))
    maps = {kind: found.r2 for kind, found in measures.items()}
    return _map_section(
        Section("Positional R²", _text(_R2_TEXT, measures)), "positional-r2", maps, draw
    )


def norms_section(measures: Mapping[Kind, Measures]) -> Section:
    """Norms by layer and head."""
    draw = partial(draw_head_map, label="mean norm", form="{:.1f}")
    maps = {kind: found.norms for kind, found in measures.items()}
    return _map_section(Section("Norms", _text(_NORMS_TEXT, measures)), "norms", maps, draw)


def _text(form: str, measures: Mapping[Kind, Measures]) -> str:
    text = form.format(next(iter(measures.values())).n_texts)
    n_left_out = sum(found.n_left_out for found in measures.values())
    return text + f" {n_left_out:,} rows are left out: they are not finite." * (n_left_out > 0)


def _map_section(
    section: Section, file: str, maps: dict[Kind, HeadMap], draw: Callable[..., None]
) -> Section:
    """Add a map of each kind to a section."""
    for kind, head_map in maps.items():
        caption = f"{section.title} of the {KINDS[kind].plural} of each head"
        numbers = partial(draw, layers=head_map.layers, heads=head_map.heads, values=head_map.values)
        section.pictures.append(picture(f"{file}-{KINDS[kind].plural}", caption, numbers))
    return section
