"""Capture: sampling, head selection and the sniffer, on torch alone."""

from qk_sniffer.capture.heads import AttentionLayer, CapturedHeads, select_heads
from qk_sniffer.capture.positions import compute_positions, first_new_key
from qk_sniffer.capture.sampling import (
    Sampler,
    Segment,
    build_sampler,
    draw_positions,
    expected_rows,
)
from qk_sniffer.capture.sniffer import (
    CapturesAttention,
    Chunk,
    Sniffer,
    active_sniffer,
    get_active_sniffer,
)

__all__ = [
    "AttentionLayer",
    "CapturedHeads",
    "CapturesAttention",
    "Chunk",
    "Sampler",
    "Segment",
    "Sniffer",
    "active_sniffer",
    "build_sampler",
    "compute_positions",
    "draw_positions",
    "expected_rows",
    "first_new_key",
    "get_active_sniffer",
    "select_heads",
]
