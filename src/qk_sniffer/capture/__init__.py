"""Capture: sampling, head selection and the sniffer, on torch alone."""

from qk_sniffer.capture.attention import (
    ScoreFunction,
    attended_from,
    attends,
    capped,
    softmax_with_sinks,
)
from qk_sniffer.capture.buffers import BUFFER_BYTES, N_BUFFERS, Portion
from qk_sniffer.capture.calls import CallSniffer, CallTokens
from qk_sniffer.capture.chunks import Chunk, Chunks
from qk_sniffer.capture.heads import (
    AttentionLayer,
    CapturedHeads,
    CapturedStream,
    Stream,
    captured_streams,
    described_layers,
    heads_to_capture,
    select_heads,
)
from qk_sniffer.capture.moments import MomentSums
from qk_sniffer.capture.positions import compute_positions, own_keys
from qk_sniffer.capture.rows import BatchRows, Block
from qk_sniffer.capture.sampling import (
    SAMPLERS,
    PositionsSampler,
    Sampler,
    Segment,
    build_sampler,
    draw_positions,
)
from qk_sniffer.capture.selection import Listed, Selection
from qk_sniffer.capture.shards import WHOLE_MODEL, ModelShard
from qk_sniffer.capture.sniffer import (
    CapturesAttention,
    Sniffer,
    active_sniffer,
    get_active_sniffer,
)
from qk_sniffer.capture.softmax import SOFTMAX_BYTES, SoftmaxInput
from qk_sniffer.capture.tiles import MOMENTS_BYTES

__all__ = [
    "BUFFER_BYTES",
    "MOMENTS_BYTES",
    "N_BUFFERS",
    "SAMPLERS",
    "SOFTMAX_BYTES",
    "WHOLE_MODEL",
    "AttentionLayer",
    "BatchRows",
    "Block",
    "CallSniffer",
    "CallTokens",
    "CapturedHeads",
    "CapturedStream",
    "CapturesAttention",
    "Chunk",
    "Chunks",
    "Listed",
    "ModelShard",
    "MomentSums",
    "Portion",
    "PositionsSampler",
    "Sampler",
    "ScoreFunction",
    "Segment",
    "Selection",
    "Sniffer",
    "SoftmaxInput",
    "Stream",
    "active_sniffer",
    "attended_from",
    "attends",
    "build_sampler",
    "capped",
    "captured_streams",
    "compute_positions",
    "described_layers",
    "draw_positions",
    "get_active_sniffer",
    "heads_to_capture",
    "own_keys",
    "select_heads",
    "softmax_with_sinks",
]
