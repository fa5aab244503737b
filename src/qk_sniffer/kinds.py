"""The kinds of vectors that are captured, and what else is of a query: described once for all rooms."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["q", "k", "v", "o"]
"""What a head's name ends with."""

Part = Literal["q", "k", "v", "o", "softmax"]
"""What is taken of an attention call: vectors of a kind, or the statistics of each query's softmax."""


@dataclass(frozen=True)
class CapturedPart:
    """What there is to know of a part of an attention call.

    Attributes:
        name: What one vector is called.
        plural: What many are.
        heads: The field of a layer with the number of its heads of this kind.
        setting: The field of the section capture that asks for it.
        number: Its part of the number of a random stream. Parts of one number keep the same rows.
    """

    name: str
    plural: str
    heads: str
    setting: str
    number: int


KINDS: dict[Kind, CapturedPart] = {
    "q": CapturedPart("query", "queries", "num_attention_heads", "capture_queries", 0),
    "k": CapturedPart("key", "keys", "num_key_value_heads", "capture_keys", 1),
    "v": CapturedPart("value", "values", "num_key_value_heads", "capture_values", 1),
    "o": CapturedPart("output", "outputs", "num_attention_heads", "capture_outputs", 0),
}
"""Kinds of vectors, each with files of its own, in the order of a layer's capture."""

PARTS: dict[Part, CapturedPart] = {
    **dict[Part, CapturedPart](KINDS.items()),  # type: ignore[arg-type]
    "softmax": CapturedPart(
        "softmax statistic", "softmax statistics", "num_attention_heads", "capture_softmax", 0
    ),
}
"""The same, and the statistics, which are columns in the files of the queries."""

SOFTMAX_COLUMNS = ("lse", "entropy", "max_prob", "argmax_position", "sink_prob", "local_prob")
"""The statistics of a query; argmax_position is an int32, the others are float32."""

LOCAL_POSITIONS = 64
"""Positions that the statistic local_prob counts, where a config says nothing."""


def part_width(part: Part, head_dim: int, value_head_dim: int | None) -> int:
    """Numbers in a vector of a kind, or statistics of a query.

    Args:
        part: The part.
        head_dim: Width of the layer's queries and keys.
        value_head_dim: Width of its values and outputs; None where it is the same.
    """
    if part == "softmax":
        return len(SOFTMAX_COLUMNS)
    return head_dim if part in "qk" else value_head_dim or head_dim


def kinds_of(capture: Mapping[str, Any]) -> list[Kind]:
    """The kinds of vectors that a config captures.

    Args:
        capture: The section capture, as a mapping; fields that are missing are false.
    """
    return [kind for kind, facts in KINDS.items() if capture.get(facts.setting)]


def parts_of(capture: Mapping[str, Any]) -> list[Part]:
    """The same, and the statistics where they are captured."""
    return [part for part, facts in PARTS.items() if capture.get(facts.setting)]


def random_stream(layer_idx: int, part: Part) -> int:
    """What names the random stream that draws the rows of a layer and part."""
    return 2 * layer_idx + PARTS[part].number


def random_streams(streams: Iterable[tuple[int, Part]]) -> list[int]:
    """What names the random streams of some layers and parts, each once, in their order."""
    return list(dict.fromkeys(random_stream(*stream) for stream in streams))
