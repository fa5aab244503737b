"""The kinds of vectors that are captured, described once for all rooms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["q", "k"]
"""What a head's name ends with."""


@dataclass(frozen=True)
class KindOfVector:
    """What there is to know of a kind.

    Attributes:
        name: What one vector is called.
        plural: What many are.
        heads: The field of a layer with the number of its heads of this kind.
        setting: The field of the section capture that asks for it.
        number: Its part of the number of a random stream.
    """

    name: str
    plural: str
    heads: str
    setting: str
    number: int


KINDS: dict[Kind, KindOfVector] = {
    "q": KindOfVector("query", "queries", "num_attention_heads", "capture_queries", 0),
    "k": KindOfVector("key", "keys", "num_key_value_heads", "capture_keys", 1),
}
"""In the order of a layer's capture."""


def kinds_of(capture: Mapping[str, Any]) -> list[Kind]:
    """The kinds that a config captures.

    Args:
        capture: The section capture, as a mapping.
    """
    return [kind for kind, facts in KINDS.items() if capture[facts.setting]]


def random_stream(layer_idx: int, kind: Kind) -> int:
    """What names the random stream that draws the rows of a layer and kind."""
    return 2 * layer_idx + KINDS[kind].number
