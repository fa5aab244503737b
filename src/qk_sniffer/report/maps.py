"""The sections of a report that show all heads."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from qk_sniffer.kinds import KINDS, Kind
from qk_sniffer.pictures import draw_head_map, draw_rows
from qk_sniffer.reading import HeadMap, SoftmaxMean
from qk_sniffer.report.measures import Measures
from qk_sniffer.report.page import Section
from qk_sniffer.report.themes import picture
from qk_sniffer.storage import head_name


def rows_section(measures: Mapping[Kind, Measures]) -> Section:
    """Rows by layer and bucket."""
    section = Section("Rows", "Rows that a head of each layer keeps in each bucket of positions.")
    same_rows: dict[int, list[Kind]] = {}
    for kind in measures:
        same_rows.setdefault(KINDS[kind].number, []).append(kind)
    for kinds in same_rows.values():
        found, names = measures[kinds[0]], [KINDS[kind].plural for kind in kinds]
        draw = partial(draw_rows, layers=found.norms.layers, buckets=found.buckets, rows=found.rows)
        caption = f"Rows of {' and '.join(names)} by layer and bucket"
        section.pictures.append(picture(f"rows-{names[0]}", caption, draw))
    return section


_R2_TEXT = """\
How well a linear map of a head's vectors tells the position of tokens, in texts that it was not \
fitted on: 1 tells it exactly, 0 or less tells nothing. {about}Grey: not captured, or too few rows or \
texts to tell. Of {n_texts:,} texts."""

_WITH_ROPE = """\
{vectors} are those that attention uses, RoPE included, unless they were captured before it. """

_WITHOUT_ROPE = """\
RoPE turns no values: what they and the outputs tell of position has come from earlier layers and \
from the attention itself. """

_NORMS_TEXT = "Mean Euclidean norm of the vectors of each head, of {n_texts:,} texts."

_SOFTMAX_TEXT = """\
What the softmax of each head does, over all keys that a query attends to, whether they were kept or \
not: means over the kept queries{behind}, of {n_texts:,} texts. Entropy is 0 where a query attends to \
one key, and ln(n) where it attends to n keys alike. A head with most of its mass on the first token \
uses it as a sink; one with most of it on the last positions is local. Grey: not captured, or no such \
query."""

_SOFTMAX_MAPS = ("entropy", "sink_prob", "local_prob", "previous")


def r2_section(measures: Mapping[Kind, Measures]) -> Section:
    """How well position is told, by layer and head."""
    draw = partial(draw_head_map, label="positional R²", form="{:.2f}", limits=(0.0, 1.0))
    maps = {kind: found.r2 for kind, found in measures.items()}
    return _map_section(
        Section("Positional R²", _text(_R2_TEXT, measures, about=_about_rope(measures))),
        "positional-r2",
        maps,
        draw,
    )


def norms_section(measures: Mapping[Kind, Measures]) -> Section:
    """Norms by layer and head."""
    draw = partial(draw_head_map, label="mean norm", form="{:.1f}")
    maps = {kind: found.norms for kind, found in measures.items()}
    return _map_section(Section("Norms", _text(_NORMS_TEXT, measures)), "norms", maps, draw)


def softmax_section(measures: Mapping[Kind, Measures], means: Mapping[str, SoftmaxMean]) -> Section:
    """The statistics of the queries by layer and head.

    Args:
        measures: Those of the queries have statistics.
        means: What they are.
    """
    found = measures["q"]
    behind = f" from position {found.first_query:,} on, which has keys that are not local"
    text = _text(_SOFTMAX_TEXT, {"q": found}, behind=behind * (found.first_query > 0))
    section = Section("Where attention goes", text)
    for name in _SOFTMAX_MAPS:
        # Where all keys are local, all mass is on them.
        if name != "local_prob" or found.first_query:
            head_map, mean = found.softmax[name], means[name]
            draw = partial(
                draw_head_map,
                layers=head_map.layers,
                heads=head_map.heads,
                values=head_map.values,
                label=mean.label,
                form=mean.form,
                limits=mean.limits,
            )
            caption = f"{mean.label.removeprefix('mean ').capitalize()}{_extremes(name, head_map)}"
            section.pictures.append(picture(f"softmax-{name}", caption, draw))
    return section


def _extremes(name: str, head_map: HeadMap) -> str:
    """Which heads a map of the statistics singles out, as the end of a caption."""
    numbers = {
        head_name(head_map.layers[row], head, "q"): value
        for (row, head), value in np.ndenumerate(head_map.values)
        if np.isfinite(value)
    }
    if not numbers:
        return ""
    told = {head: f"{head} ({value:.2f})" for head, value in numbers.items()}
    least, most = (told[extreme(numbers, key=numbers.__getitem__)] for extreme in (min, max))
    if name == "entropy":
        return f": least in {least}, most in {most}"
    n_most = sum(value > 0.5 for value in numbers.values())
    which = f"{n_most:,} of {len(numbers):,} heads" if n_most else "no head"
    return f": more than half in {which}, most in {most}"


def _about_rope(measures: Mapping[Kind, Measures]) -> str:
    turned = [KINDS[kind].plural for kind in measures if kind in "qk"]
    vectors = "The vectors" if len(turned) == len(measures) else " and ".join(turned).capitalize()
    return _WITH_ROPE.format(vectors=vectors) * bool(turned) + _WITHOUT_ROPE * (
        len(turned) < len(measures)
    )


def _text(form: str, measures: Mapping[Kind, Measures], **parts: str) -> str:
    text = form.format(n_texts=next(iter(measures.values())).n_texts, **parts)
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
