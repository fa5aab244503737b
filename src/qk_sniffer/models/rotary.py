"""Vectors before the rotary embedding, found by wrapping the modeling file's own rotary function.

One short forward shows how the vectors of an attention call are put together from what the rotary
function returned: whole or a slice of it, transposed, repeated over heads, changed again afterwards,
or taken from an earlier layer. Every later forward puts the function's arguments together in the same
way, so that no value has to be compared, or waited for, while a model runs.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from qk_sniffer.models.calls import modeling_globals
from qk_sniffer.models.notes import in_layers
from qk_sniffer.models.wrapping import wrapped

_ROTARY_NAME = re.compile(r"apply_(?!.*vision)\w*rotary\w*emb\w*")
_FIRST_STATES = {"apply_rotary_position_embeddings": 1}
"""Index of the first rotated tensor among a function's tensor arguments, where it is not 0."""


@dataclass(frozen=True)
class _Repeat:
    """How key heads become as many as the attention call has."""

    times: int
    tiled: bool

    def __call__(self, states: Tensor) -> Tensor:
        if self.times == 1:
            return states
        if self.tiled:
            return states.repeat(1, self.times, 1, 1)
        return states.repeat_interleave(self.times, dim=1)


@dataclass(frozen=True)
class _Placement:
    """Where the states of an attention call come from.

    Attributes:
        rotation: Index among the tensors that the layer rotated, from the last one, since an indexer
            before it may rotate as many as it likes.
        transposed: The rotary function sees (B, S, H, D).
        repeat: Heads that share one rotated head.
        offset: First dimension of the rotated slice.
        changed_after: The model changes the rotated vectors again, as a norm does.
    """

    rotation: int
    transposed: bool
    repeat: _Repeat
    offset: int = 0
    changed_after: bool = False

    def arrange(self, states: Tensor) -> Tensor:
        return self.repeat(states.transpose(1, 2) if self.transposed else states)

    def unrotated(self, states: Tensor, before: Tensor) -> Tensor:
        """``states`` of the attention call with the rotated part as it was before."""
        before = self.arrange(before)
        end = self.offset + before.shape[-1]
        if before.shape[-1] == states.shape[-1]:
            return before
        return torch.cat([states[..., : self.offset], before, states[..., end:]], dim=-1)


@dataclass(frozen=True)
class _SharedKey:
    """The layer attends to the keys of an earlier one."""

    layer_idx: int


@dataclass
class RotaryMap:
    """How the vectors before RoPE are found in each layer, learned from one short forward.

    Attributes:
        query: Where each layer's queries come from; layers that don't rotate are absent.
        key: Where its keys come from.
        problem: Why they can't be told, to follow "this architecture"; None where they can.
    """

    query: dict[int, _Placement] = field(default_factory=dict)
    key: dict[int, _Placement | _SharedKey] = field(default_factory=dict)
    problem: str | None = None

    def notes(self) -> list[str]:
        """What a reader of vectors before RoPE must know."""
        placements = [*self.query.items(), *self.key.items()]
        changed = {
            i for i, place in placements if isinstance(place, _Placement) and place.changed_after
        }
        if not changed:
            return []
        note = "the model normalizes after RoPE; those before it are not normalized yet"
        return [in_layers(note, changed)]


class RotaryTrace(threading.local):
    """The rotations since the last attention call of a forward; each thread has its own."""

    def __init__(self) -> None:
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []
        self._keys: dict[int, Tensor] = {}
        self._depth = 0

    def begin_forward(self) -> None:
        """Forget the forward before."""
        self._before, self._after, self._keys = [], [], {}

    def wrap(self, name: str, rotate: Callable[..., Any]) -> Callable[..., Any]:
        """A function that does what ``rotate`` does and notes its states before and after."""

        @wraps(rotate)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                result = rotate(*args, **kwargs)
            finally:
                self._depth -= 1
            if self._depth == 0:
                after = [result] if isinstance(result, Tensor) else list(result)
                tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
                first = _FIRST_STATES.get(name, 0)
                self._before += tensors[first : first + len(after)]
                self._after += after
            return result

        return noted

    def learn(self, layer_idx: int, query: Tensor, key: Tensor, rotary_map: RotaryMap) -> None:
        """Find the placements of one attention call and add them to ``rotary_map``."""
        after, self._before, self._after = self._after, [], []
        if after:
            if place := _find(query, after, first=True):
                rotary_map.query[layer_idx] = place
            if shared := self._shared_with(key):
                rotary_map.key[layer_idx] = shared
            elif place := _find(key, after, first=False):
                rotary_map.key[layer_idx] = place
            if layer_idx not in rotary_map.query or layer_idx not in rotary_map.key:
                rotary_map.problem = "rotates part of its vectors and changes them again"
        self._keys[layer_idx] = key

    def unrotated(
        self, layer_idx: int, query: Tensor, key: Tensor, rotary_map: RotaryMap
    ) -> tuple[Tensor, Tensor]:
        """What the vectors of an attention call were before their rotation.

        A layer that rotates nothing gets its own tensors back.

        Args:
            layer_idx: The layer.
            query: (B, num_attention_heads, Q, head_dim).
            key: (B, num_key_value_heads, Q, head_dim), those of the queries' tokens.
            rotary_map: What ``learn`` found.
        """
        before, self._before, self._after = self._before, [], []
        if place := rotary_map.query.get(layer_idx):
            query = place.unrotated(query, before[place.rotation])
        source = rotary_map.key.get(layer_idx)
        if isinstance(source, _SharedKey):
            key = self._keys[source.layer_idx]
        elif source is not None:
            key = source.unrotated(key, before[source.rotation])
        if _SharedKey(layer_idx) in rotary_map.key.values():
            self._keys[layer_idx] = key
        return query, key

    def _shared_with(self, key: Tensor) -> _SharedKey | None:
        for layer_idx, earlier in self._keys.items():
            if earlier.shape == key.shape and torch.equal(earlier, key):
                return _SharedKey(layer_idx)
        return None


def _find(states: Tensor, rotated: list[Tensor], *, first: bool) -> _Placement | None:
    """The rotated tensor that ``states`` hold, else the first or last that they can be made of."""
    heads, length, head_dim = states.shape[1:]
    fitting: list[_Placement] = []
    for rotation, after in enumerate(rotated, start=-len(rotated)):
        for transposed in (False, True):
            arranged = after.transpose(1, 2) if transposed else after
            width = arranged.shape[-1]
            if arranged.shape[2] != length or heads % arranged.shape[1] or width > head_dim:
                continue
            times = heads // arranged.shape[1]
            for tiled in (False, True):
                repeat = _Repeat(times, tiled)
                for offset in (0, head_dim - width):
                    part = states[..., offset : offset + width]
                    if torch.equal(repeat(arranged).to(part.dtype), part):
                        return _Placement(rotation, transposed, repeat, offset)
            if times == 1 and width == head_dim:
                place = _Placement(rotation, transposed, _Repeat(1, False), changed_after=True)
                fitting.append(place)
    if not fitting:
        return None
    return fitting[0] if first else fitting[-1]


@contextmanager
def trace_rotary(decoder: nn.Module) -> Iterator[RotaryTrace]:
    """Wrap the rotary functions of the decoder's modeling files for the length of a block."""
    trace = RotaryTrace()
    with ExitStack() as stack:
        kinds = {type(module) for module in decoder.modules()}
        files = {id(names): names for names in map(modeling_globals, kinds)}
        for names in files.values():
            for name in list(names):
                if _ROTARY_NAME.fullmatch(name):
                    stack.enter_context(wrapped(names, name, partial(trace.wrap, name)))
        for kind in kinds:
            for name, method in list(vars(kind).items()):
                if _ROTARY_NAME.fullmatch(name) and isinstance(method, staticmethod):
                    stack.enter_context(wrapped(kind, name, partial(trace.wrap, name)))
        yield trace
