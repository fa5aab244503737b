"""The parts of a journal, and processes that share a model, each of which writes some of its heads.

Each process of a run writes a part of its own. Of processes that share a model the part's name says how
many they are, so that a run that goes on with others never appends to a part with other heads. They
read the same texts, and a text is captured where all of them have it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qk_sniffer.errors import UserError
from qk_sniffer.storage.files import damaged, read_json, write_text

HEADS_FILE = "heads.json"

_SHARED = re.compile(r"rank-(\d{5}|[1-9]\d{5,8})-tp([2-9]|[1-9]\d{1,3})")
"""Every name that ``part_directory`` gives to one of several that share a model."""

Heads = tuple[tuple[int, ...], ...]
"""For each stream of a journal's header the numbers of some of its heads, in their order there."""


@dataclass(frozen=True)
class Shard:
    """What one of several processes that share a model writes.

    Attributes:
        number: Of the process among them, from 0; it is the remainder of its rank.
        count: How many they are, at least 2.
        heads: For each stream of the header the true numbers of the heads that it writes, ascending;
            those of a layer's queries and of their statistics are the same.
    """

    number: int
    count: int
    heads: Heads


def part_directory(journal: Path, rank: int, count: int = 1) -> Path:
    """The part of a journal that a process writes.

    Args:
        journal: The journal.
        rank: Number of the process.
        count: How many share its model.
    """
    return journal / (f"rank-{rank:05d}" if count == 1 else f"rank-{rank:05d}-tp{count}")


def part_directories(journal: Path) -> list[Path]:
    """All parts of a journal; those of an earlier run may be more than there are processes now."""
    return sorted(journal.glob("rank-*"))


def companions(part: Path) -> list[Path]:
    """The parts of all processes that share a model with the one that writes ``part``, its own too.

    Some of them may not be there.
    """
    found = _SHARED.fullmatch(part.name)
    if found is None:
        return [part]
    rank, count = int(found[1]), int(found[2])
    first = rank - rank % count
    return [part_directory(part.parent, other, count) for other in range(first, first + count)]


def is_whole(part: Path) -> bool:
    """Whether a part has all captured heads."""
    return companions(part) == [part]


def has_texts(part: Path) -> bool:
    """Whether the texts of a part's batches are in it, and not in that of another process."""
    return companions(part)[0] == part


def note_heads(part: Path, heads: Heads, streams: Sequence[Mapping[str, Any]], *, is_new: bool) -> None:
    """Write down which heads a part holds.

    Args:
        part: The part.
        heads: Its heads.
        streams: Those of the header.
        is_new: Whether the part has no batches; one that has some keeps its heads.

    Raises:
        UserError: It has batches of other heads.
        ValueError: These can't be a part's heads.
    """
    if fault := _fault(heads, streams):
        raise ValueError(fault)
    path = part / HEADS_FILE
    if is_new:
        write_text(path, json.dumps(heads))
    elif read_heads(part, streams) != heads:
        raise UserError(
            f"{path}: this process now has other heads than before the run was interrupted; "
            f"write what is there with `qk-sniffer finalize {part.parent.parent}`, then run the same "
            "command again"
        )


def read_heads(part: Path, streams: Sequence[Mapping[str, Any]]) -> Heads:
    """The heads that a part holds.

    Args:
        part: The part.
        streams: Those of the header.

    Raises:
        UserError: Its file of heads is damaged.
    """
    if is_whole(part):
        return tuple(tuple(stream["heads"]) for stream in streams)
    path = part / HEADS_FILE
    content = read_json(path)
    if fault := _fault(content, streams):
        raise damaged(path, fault)
    return tuple(map(tuple, content))


def heads_of_parts(parts: Iterable[Path], streams: Sequence[Mapping[str, Any]]) -> dict[Path, Heads]:
    """The heads that each of some parts holds, with those of their companions.

    Args:
        parts: The parts; those of all processes that share a model, or of none.
        streams: Those of the header.

    Raises:
        UserError: A file of heads is damaged, or several don't make up the heads of the header.
    """
    found = {part: read_heads(part, streams) for part in parts}
    for part in found:
        for number, stream in enumerate(streams):
            held = [head for other in companions(part) for head in found[other][number]]
            if sorted(held) != stream["heads"]:
                fault = (
                    f"it and those beside it don't name each head once of layer {stream['layer_idx']}"
                )
                raise damaged(part / HEADS_FILE, fault)
    return found


def _fault(heads: Any, streams: Sequence[Mapping[str, Any]]) -> str | None:
    """Why something is not the heads of a part; None where it is."""
    if not isinstance(heads, list | tuple) or len(heads) != len(streams):
        return f"it has other than {len(streams)} lists of heads"
    for own, stream in zip(heads, streams, strict=True):
        if not isinstance(own, list | tuple) or [h for h in stream["heads"] if h in own] != list(own):
            return f"{own} are no captured heads of layer {stream['layer_idx']}, in order"
    of = {
        (stream["layer_idx"], stream["kind"]): own for own, stream in zip(heads, streams, strict=True)
    }
    for (layer_idx, kind), own in of.items():
        if kind == "softmax" and own != of.get((layer_idx, "q")):
            return f"the statistics of layer {layer_idx} are of other heads than its queries"
    return None
