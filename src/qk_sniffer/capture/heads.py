"""Which heads of which layers are captured: filters, grouped-query attention and random draws."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

from qk_sniffer.capture.attention import ScoreFunction
from qk_sniffer.capture.random import philox4x32
from qk_sniffer.errors import UserError
from qk_sniffer.kinds import PARTS, Part, part_width, parts_of


def known_fields(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass among some values, of which a later version may have more."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention layer, as its attention call shows it.

    With ``chunked`` the window is a block: position p attends from ``p - p % sliding_window`` on.
    Otherwise it slides: from ``p - sliding_window + 1`` on. ``scores`` is None where queries and keys
    alone don't explain the layer's attention. ``value_head_dim`` is the width of values and outputs;
    None where they are as wide as queries and keys.
    """

    layer_idx: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int | None = None
    chunked: bool = False
    scores: ScoreFunction | None = None
    value_head_dim: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "AttentionLayer":
        """The layer that ``dataclasses.asdict`` has made a mapping of."""
        scores = values.get("scores")
        known = known_fields(cls, values)
        if scores is not None:
            known["scores"] = ScoreFunction(**known_fields(ScoreFunction, scores))
        return cls(**known)

    def width(self, part: Part) -> int:
        """Numbers in a vector of a kind, or statistics of a query."""
        return part_width(part, self.head_dim, self.value_head_dim)

    def key_head(self, head: int) -> int:
        """The key head that serves a query head, by grouped-query attention."""
        return head // (self.num_attention_heads // self.num_key_value_heads)


@dataclass(frozen=True)
class CapturedHeads:
    """The heads of one layer whose vectors are captured, in ascending order."""

    layer: AttentionLayer
    query: tuple[int, ...]
    key: tuple[int, ...]

    def of(self, part: Part) -> tuple[int, ...]:
        """Those of a part."""
        return self.query if PARTS[part].heads == "num_attention_heads" else self.key


Stream = tuple[int, Part]
"""A layer and part."""


@dataclass(frozen=True)
class CapturedStream:
    """The captured heads of one layer and part, which keep the same rows."""

    layer: AttentionLayer
    kind: Part
    heads: tuple[int, ...]

    @property
    def key(self) -> Stream:
        """What names it."""
        return self.layer.layer_idx, self.kind

    @property
    def width(self) -> int:
        """Numbers in each of its vectors."""
        return self.layer.width(self.kind)


def captured_streams(
    heads: Mapping[int, CapturedHeads], parts: Iterable[Part] = ("q", "k")
) -> list[CapturedStream]:
    """What is captured of each layer, in the order in which a model calls them.

    Args:
        heads: The captured heads, by layer.
        parts: What is captured of each attention call.
    """
    return [
        CapturedStream(captured.layer, part, captured.of(part))
        for captured, part in product(heads.values(), parts)
    ]


def described_layers(
    layers: Iterable[AttentionLayer], capture: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The geometry of all layers as JSON takes it, with the width of values where they are captured.

    Args:
        layers: The layers.
        capture: The section capture.
    """
    described = [asdict(layer) for layer in layers]
    if {"v", "o"}.isdisjoint(parts_of(capture)):
        for layer in described:
            del layer["value_head_dim"]
    return described


def select_heads(
    attention_layers: Sequence[AttentionLayer],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    sample_count: int | None = None,
    sample_seed: int = 0,
    full_attention_only: bool = False,
) -> dict[int, CapturedHeads]:
    """Apply the filters, then the draw, then let the key heads follow.

    Key head ``h // (num_attention_heads // num_key_value_heads)`` serves query head ``h``, so it is
    captured when any query head of its group is.

    Args:
        attention_layers: Every self-attention layer of the model.
        layers: Layers to keep; None keeps all.
        heads: Query heads to keep in each layer; None keeps all.
        sample_count: Query heads to draw over all layers that are left, at most; None keeps all.
        sample_seed: Seed of the draw.
        full_attention_only: Drop the layers with a sliding or chunked window.

    Returns:
        The captured heads by layer; layers without any are absent.

    Raises:
        UserError: A layer or head does not exist, or none is left.
    """
    known = {layer.layer_idx for layer in attention_layers}
    _reject_unknown("layers", layers, known, "layer")
    kept = [
        layer
        for layer in attention_layers
        if (layers is None or layer.layer_idx in layers)
        and not (full_attention_only and layer.sliding_window is not None)
    ]
    if not kept:
        raise UserError(
            "sniffer.capture.full_attention_only: every chosen layer has a sliding window, so nothing "
            "is left to capture; set it to false"
        )
    widest = max(layer.num_attention_heads for layer in kept)
    _reject_unknown("heads", heads, set(range(widest)), "query head")
    candidates = [
        (layer.layer_idx, head)
        for layer in kept
        for head in range(layer.num_attention_heads)
        if heads is None or head in heads
    ]
    if sample_count is not None:
        candidates = sorted(_draw(candidates, sample_count, sample_seed))
    chosen = {layer.layer_idx: [h for idx, h in candidates if idx == layer.layer_idx] for layer in kept}
    return {
        layer.layer_idx: CapturedHeads(layer, tuple(query), _key_heads(layer, query))
        for layer in kept
        if (query := chosen[layer.layer_idx])
    }


def heads_to_capture(
    capture: Mapping[str, Any], layers: Sequence[AttentionLayer]
) -> dict[int, CapturedHeads]:
    """The heads that a config captures of a model, by layer.

    Args:
        capture: The section capture, as a mapping.
        layers: Every self-attention layer of the model.

    Raises:
        UserError: A layer or head does not exist, or none is left.
    """
    sampling = capture["head_sampling"]
    return select_heads(
        layers,
        layers=capture["layers"],
        heads=capture["heads"],
        sample_count=sampling["count"] if sampling else None,
        sample_seed=sampling["seed"] if sampling else 0,
        full_attention_only=capture["full_attention_only"],
    )


def _key_heads(layer: AttentionLayer, query_heads: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({layer.key_head(head) for head in query_heads}))


def _draw(candidates: list[tuple[int, int]], count: int, seed: int) -> list[tuple[int, int]]:
    """The ``count`` heads with the smallest hash, which no other head's presence changes."""

    def rank(candidate: tuple[int, int]) -> tuple[int, ...]:
        layer_idx, head = candidate
        return tuple(int(word) for word in philox4x32((layer_idx, head, 0, 0), seed))

    return sorted(candidates, key=rank)[:count]


def _reject_unknown(field: str, wanted: Sequence[int] | None, known: set[int], what: str) -> None:
    unknown = sorted(set(wanted or ()) - known)
    if unknown:
        raise UserError(
            f"sniffer.capture.{field}: the model has no {what} {unknown[0]}; choose from {_span(known)}"
        )


def _span(indices: set[int]) -> str:
    ordered = sorted(indices)
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))
