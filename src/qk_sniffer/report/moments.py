"""The sections of a report that are drawn from moments, of every token of every text."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from qk_sniffer.kinds import KINDS, Kind
from qk_sniffer.pictures import draw_head_map, draw_spectra
from qk_sniffer.reading import Captures, HeadMap
from qk_sniffer.report.measures import Progress
from qk_sniffer.report.page import Section
from qk_sniffer.report.themes import picture
from qk_sniffer.storage import captured_names, head_name, parse_head_name

_MOST = 0.9
"""Of the variance, which the heads are told apart by."""


@dataclass(frozen=True)
class MomentMeasures:
    """What moments tell of the heads of one kind.

    Attributes:
        n_tokens: Tokens that each head's moments are taken of.
        r2: ``Moments.positional_r2``.
        spectra: By the name of a head, (D,) shares of the variance along each principal component,
            descending; of those whose moments are finite.
    """

    n_tokens: int
    r2: HeadMap
    spectra: Mapping[str, npt.NDArray[np.float64]]


def measure_moments(captures: Captures, progress: Progress) -> dict[Kind, MomentMeasures]:
    """Measure every head, for each kind that has moments; nothing where the run has none.

    Args:
        captures: A capture.
        progress: Wraps the iteration over the heads that are done, given their number.
    """
    if not captures.manifest.get("moments"):
        return {}
    heads: dict[Kind, list[tuple[int, int]]] = {}
    for name in captured_names(captures.manifest):
        parsed = parse_head_name(name)
        if parsed is not None and parsed[2] in KINDS:
            heads.setdefault(parsed[2], []).append(parsed[:2])
    places = [(kind, place) for kind, own in heads.items() for place in own]
    r2: dict[Kind, dict[tuple[int, int], float]] = {kind: {} for kind in heads}
    spectra: dict[Kind, dict[str, npt.NDArray[np.float64]]] = {kind: {} for kind in heads}
    n_tokens = dict.fromkeys(heads, 0)
    for kind, (layer, head) in progress(places, len(places)):
        moments = captures.moments(layer, head, kind)
        n_tokens[kind], r2[kind][layer, head] = moments.count, moments.positional_r2()
        if np.isfinite(moments.covariance).all() and moments.covariance.any():
            variances = moments.components().variances
            spectra[kind][head_name(layer, head, kind)] = variances / variances.sum()
    return {
        kind: MomentMeasures(n_tokens[kind], HeadMap.of_places(r2[kind]), spectra[kind])
        for kind in heads
    }


def moments_sections(measures: Mapping[Kind, MomentMeasures]) -> list[Section]:
    """Positional R² and spectra of all heads."""
    if not measures:
        return []
    n_tokens = next(iter(measures.values())).n_tokens
    r2 = Section(
        "Positional R², of every token",
        f"How well a linear map of a head's vectors tells the position of tokens, from the moments of "
        f"all {n_tokens:,} tokens, after RoPE. The map is fitted on the tokens that it is measured on, "
        "so it looks a little better than on texts that it has not seen. Grey: not captured, or no "
        "more tokens than coordinates.",
    )
    spectra = Section(
        "Spectra, of every token",
        f"The share of the variance that the first principal components of a head hold, from the "
        f"moments of all {n_tokens:,} tokens, after RoPE: a line for each head. Named are the heads "
        f"that hold {_MOST:.0%} of it in the fewest and in the most components.",
    )
    for kind, found in measures.items():
        plural = KINDS[kind].plural
        draw = partial(
            draw_head_map,
            layers=found.r2.layers,
            heads=found.r2.heads,
            values=found.r2.values,
            label="positional R²",
            form="{:.2f}",
            limits=(0.0, 1.0),
        )
        caption = f"Positional R² of the {plural} of each head, of every token"
        r2.pictures.append(picture(f"moments-r2-{plural}", caption, draw))
        if found.spectra:
            curves = partial(
                draw_spectra, spectra=[*found.spectra.values()], named=_named(found.spectra)
            )
            caption = f"Spectra of the {plural} of each head"
            spectra.pictures.append(picture(f"moments-spectra-{plural}", caption, curves))
    return [r2, spectra]


def _named(
    spectra: Mapping[str, npt.NDArray[np.float64]],
) -> dict[str, npt.NDArray[np.float64]]:
    """The spectra of the fewest and of the most components, with labels."""
    sizes = {name: int(np.searchsorted(shares.cumsum(), _MOST)) + 1 for name, shares in spectra.items()}
    ends = dict.fromkeys((min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)))
    return {f"{name}: {sizes[name]} of {len(spectra[name])}": spectra[name] for name in ends}
