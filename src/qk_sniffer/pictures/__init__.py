"""Pictures of heads, each drawn on matplotlib axes, for a notebook, the report and the card."""

import importlib.util

from qk_sniffer.errors import UserError

if importlib.util.find_spec("matplotlib") is None:
    # Here, so that all who draw say the same; who only reads does not import this.
    raise UserError(
        "pictures: matplotlib is not installed; install it with `pip install 'qk-sniffer[report]'`"
    )

from qk_sniffer.pictures.attention import AttentionMap, attention_size, draw_attention
from qk_sniffer.pictures.components import describe_components, draw_components
from qk_sniffer.pictures.curves import (
    Curves,
    draw_attention_by_distance,
    draw_attention_to_first,
    draw_norms_by_pair,
    draw_norms_by_position,
    draw_spectra,
)
from qk_sniffer.pictures.maps import draw_head_map, draw_rows
from qk_sniffer.pictures.predictions import draw_predictions
from qk_sniffer.pictures.style import new_axes, spread_evenly

__all__ = [
    "AttentionMap",
    "Curves",
    "attention_size",
    "describe_components",
    "draw_attention",
    "draw_attention_by_distance",
    "draw_attention_to_first",
    "draw_components",
    "draw_head_map",
    "draw_norms_by_pair",
    "draw_norms_by_position",
    "draw_predictions",
    "draw_rows",
    "draw_spectra",
    "new_axes",
    "spread_evenly",
]
