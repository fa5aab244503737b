"""The sections of a report that look at the vectors of a few heads closely."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from qk_sniffer.geometry import pair_norms, predicted_positions, telling_components
from qk_sniffer.kinds import KINDS
from qk_sniffer.pictures import (
    describe_components,
    draw_components,
    draw_norms_by_pair,
    draw_norms_by_position,
    draw_predictions,
    spread_evenly,
)
from qk_sniffer.report.chosen import Chosen, Rows
from qk_sniffer.report.page import Picture, Section
from qk_sniffer.report.themes import picture

_TOO_FEW = "it takes two texts, and more rows than a vector has coordinates"


def components_section(chosen: Sequence[Chosen]) -> Section:
    """The principal components that show most of position."""
    what = "The queries of a head, and the keys that they meet,"
    if all("q" not in choice.heads for choice in chosen):
        what = "The vectors of a head"
    section = Section(
        "Position in the vectors",
        f"{what} along two of their first eight principal components: those that show most of "
        "position. Each dot is a token. "
        f"Heads: {', '.join(f'`{choice.name}`' for choice in chosen)}.",
    )
    for number, choice in enumerate(chosen, start=1):
        for kind, rows in choice.rows.items():
            some = spread_evenly(len(rows["position"]))
            if len(some) >= 2:
                positions = rows["position"][some]
                components = telling_components(rows["vector"][some], positions)
                caption = f"{choice.titles[kind]}: {describe_components(components)}"
                draw = partial(draw_components, components=components, positions=positions)
                section.pictures.append(picture(f"components-{number}{kind}", caption, draw))
    return section


def predictions_section(chosen: Sequence[Chosen]) -> Section:
    """Predicted against true positions."""
    section = Section(
        "Position predicted",
        "The linear map behind positional R²: for each token the position that it predicts from the "
        "vector, fitted on other texts, against the true one. Dots on the line are predicted exactly.",
    )
    for number, choice in enumerate(chosen, start=1):
        for kind, rows in choice.rows.items():
            predicted = predicted_positions(rows["vector"], rows["position"], rows["example_id"])
            if np.isfinite(predicted).any():
                some = spread_evenly(len(predicted))
                draw = partial(
                    draw_predictions, positions=rows["position"][some], predicted=predicted[some]
                )
                section.pictures.append(
                    picture(f"predictions-{number}{kind}", choice.titles[kind], draw)
                )
    return section if section.pictures else _left_out(section, _TOO_FEW)


def chosen_norms_section(chosen: Sequence[Chosen]) -> Section:
    """Norms by position and by pair of coordinates."""
    text = "By position, where a first token that draws attention differs from the others"
    if any(not {"q", "k"}.isdisjoint(choice.heads) for choice in chosen):
        text += (
            "; and by pair of coordinates i and i + head_dim/2, which RoPE turns together in Llama and "
            "models like it, the fastest pair first"
        )
    section = Section("Norms of these heads", f"{text}.")
    for number, choice in enumerate(chosen, start=1):
        section.pictures += _norms(choice, number) + _mixed_norms(choice, number)
    return section if section.pictures else _left_out(section, "these heads have no rows")


def _norms(choice: Chosen, number: int) -> list[Picture]:
    found = {kind: rows for kind, rows in choice.rows.items() if len(rows["position"])}
    if not found:
        return []
    labels = {kind: f"{KINDS[kind].plural} of {choice.heads[kind].name}" for kind in found}
    curves = {labels[kind]: (rows["position"], _norm(rows)) for kind, rows in found.items()}
    pictures = [
        picture(
            f"norms-by-position-{number}",
            f"Norms of {choice.name} by position",
            partial(draw_norms_by_position, curves=curves),
        )
    ]
    turned = {kind: rows for kind, rows in found.items() if kind in "qk"}
    if turned and all(head.layer.head_dim % 2 == 0 for head in choice.heads.values()):
        pairs = {labels[kind]: pair_norms(rows["vector"]) for kind, rows in turned.items()}
        caption = f"Norms of {choice.name} by pair of coordinates"
        draw = partial(draw_norms_by_pair, norms=pairs)
        pictures.append(picture(f"norms-by-pair-{number}", caption, draw))
    return pictures


def _mixed_norms(choice: Chosen, number: int) -> list[Picture]:
    """Those of the values that a query head mixes, and of its outputs."""
    curves = {
        f"{KINDS[kind].plural} of {head.name}": (rows["position"], _norm(rows))
        for kind, (head, rows) in choice.mixed.items()
        if len(rows["position"])
    }
    if not curves:
        return []
    mixed = " and ".join(KINDS[kind].plural for kind in choice.mixed)
    caption = f"Norms by position of the {mixed} of {next(iter(choice.heads.values())).name}"
    draw = partial(draw_norms_by_position, curves=curves)
    return [picture(f"norms-mixed-{number}", caption, draw)]


def _norm(rows: Rows) -> Any:
    return np.linalg.norm(rows["vector"], axis=1)


def _left_out(section: Section, reason: str) -> Section:
    return Section(section.title, f"Not shown: {reason}.")
