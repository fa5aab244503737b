"""Capture: sampling, head selection and the sniffer, on torch alone."""

from qk_sniffer.capture.heads import AttentionLayer, AttentionProbe, CapturedHeads, select_heads
from qk_sniffer.capture.positions import compute_positions
from qk_sniffer.capture.sampling import Sampler, Segment, build_sampler, draw_positions
from qk_sniffer.capture.sniffer import Chunk, Sniffer, active_sniffer, get_active_sniffer

__all__ = [
    "AttentionLayer",
    "AttentionProbe",
    "CapturedHeads",
    "Chunk",
    "Sampler",
    "Segment",
    "Sniffer",
    "active_sniffer",
    "build_sampler",
    "compute_positions",
    "draw_positions",
    "get_active_sniffer",
    "select_heads",
]
