"""One ``sniff``: its model, what it captures, and the calls on their way."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qk_sniffer.capture import (
    CallSniffer,
    CapturedHeads,
    Selection,
    captured_streams,
    described_layers,
    heads_to_capture,
)
from qk_sniffer.config import CaptureConfig
from qk_sniffer.errors import UserError
from qk_sniffer.kinds import parts_of
from qk_sniffer.models import (
    AttentionCall,
    AttentionMap,
    OnResult,
    RotaryTrace,
    cache_of,
    is_probing,
    name_of,
    on_result_of,
    sequences_of,
    softmax_input,
    states_of,
    text_decoder,
    watch_attention,
    watch_caches,
    watch_stopping,
)
from qk_sniffer.sniffing.memory import Intake, RowStore
from qk_sniffer.sniffing.texts import Call, Row, Texts


@dataclass(frozen=True)
class Watched:
    """The model that is watched.

    Attributes:
        model: The transformers model, inside whatever wraps it.
        backbone: Its decoder.
        attention: What a probe saw in it.
        can_pack: Whether it keeps packed texts apart.
    """

    model: PreTrainedModel
    backbone: nn.Module
    attention: AttentionMap
    can_pack: bool


class Session:
    """What is captured of a model's calls.

    Args:
        watched: The model.
        capture: What is captured.
        tokenizer: Gives the token strings; None leaves them out.
        limit_bytes: The most that vectors may take in memory.
        stays: Keep vectors on the device that has them.

    Raises:
        UserError: The model has no such layer or head.
    """

    def __init__(
        self,
        watched: Watched,
        capture: CaptureConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        limit_bytes: int,
        stays: bool,
    ) -> None:
        self.watched = watched
        settings = capture.as_settings()
        attention = watched.attention
        self.heads: dict[int, CapturedHeads] = heads_to_capture(settings, attention.layers)
        self.streams = captured_streams(self.heads, parts_of(settings))
        self.tokenizer = tokenizer
        self.about = _about(watched, settings)
        self.store = RowStore(self.streams, limit_bytes)
        self.texts = Texts(any(layer.sliding_window is not None for layer in attention.layers))
        self.on_call: Callable[[], None] = lambda: None
        """Called behind each call."""
        self._pre_rope = capture.capture_pre_rope
        self._parts = parts_of(settings)
        self._layers = {layer.layer_idx: layer for layer in attention.layers}
        self._thread = _Thread(self, Selection.of(settings), capture.local_positions, stays)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Capture what the model reads, within a block."""
        attention = self.watched.attention
        with (
            watch_attention(
                self.watched.backbone,
                self._on_layer,
                numbered_by_call=attention.numbered_by_call,
                rotary=self._pre_rope,
                on_begin=self._on_begin,
                on_end=self._on_end,
                callers=[self.watched.model],
            ),
            watch_caches(self.texts.follows),
            watch_stopping(self._on_stop),
        ):
            yield

    def _on_begin(self, arguments: Mapping[str, Any]) -> None:
        if is_probing():
            return
        thread, cache = self._thread, cache_of(arguments)
        past_length = 0 if cache is None else int(cache.get_seq_length())
        watched = self.watched
        decoder = text_decoder(watched.backbone)
        sequences = sequences_of(decoder, arguments, past_length, can_pack=watched.can_pack)
        thread.call = call = self.texts.begin(sequences, cache, past_length)
        thread.cache = cache
        thread.sniffer.begin_call(call.tokens)

    def _on_layer(
        self, layer_idx: int, call: AttentionCall, past_length: int, trace: RotaryTrace | None
    ) -> OnResult | None:
        if self._thread.call is None:
            return None
        sniffer, layer = self._thread.sniffer, self._layers[layer_idx]
        query, key = states_of(layer_idx, call, past_length, trace, self.watched.attention)
        softmax = softmax_input(call, layer, past_length) if "softmax" in self._parts else None
        sniffer.capture(layer_idx, query, key, past_length, layer.sliding_window, softmax)
        if {"v", "o"}.isdisjoint(self._parts):
            return None
        take = partial(
            sniffer.capture_result,
            layer_idx,
            past_length=past_length,
            sliding_window=layer.sliding_window,
        )
        return on_result_of(call.module, take)

    def _on_stop(self, is_done: list[bool]) -> None:
        rows = self._thread.rows
        if len(rows) != len(is_done):
            return
        for row, ends in zip(rows, is_done, strict=True):
            if ends and row.tokens_left is None:
                # The one that it has just written is still to be read.
                row.tokens_left = 1
        if all(row.tokens_left is not None for row in rows):
            # So has this generate, and another may go on with the cache.
            for row in rows:
                row.tokens_left = None

    def _on_end(self, output: Any) -> None:
        thread = self._thread
        call, cache = thread.call, thread.cache
        thread.call = thread.cache = None
        if call is None:
            return
        try:
            if output is not None:
                thread.sniffer.end_call()
                self.texts.end(call, cache if cache is not None else cache_of(_named(output)))
                thread.rows, call = call.rows, None
        finally:
            if call is not None:
                thread.sniffer.drop_call()
                self.texts.drop(call)
        self.on_call()


class _Thread(threading.local):
    """What each thread has of its own while it calls the model."""

    def __init__(
        self, session: Session, selection: Selection, local_positions: int, stays: bool
    ) -> None:
        self.sniffer = CallSniffer(
            session.streams,
            selection,
            Intake(session.store),
            local_positions=local_positions,
            stays=stays,
        )
        self.call: Call | None = None
        self.cache: Any = None
        self.rows: list[Row] = []


def _named(output: Any) -> Mapping[str, Any]:
    """The parts of a model's output, which is a mapping or a tuple."""
    return output if isinstance(output, Mapping) else dict(enumerate(output))  # type: ignore[arg-type]


def _about(watched: Watched, capture: dict[str, Any]) -> dict[str, Any]:
    """Settings, layers and notes, as a manifest has them."""
    return {
        "settings": {"model": {"name": name_of(watched.model)}, "data": {}, "capture": capture},
        "layers": described_layers(watched.attention.layers, capture),
        "notes": watched.attention.notes_of(parts_of(capture), pre_rope=capture["capture_pre_rope"]),
    }


def require_watchable(attention: AttentionMap, name: str) -> None:
    """See that a model's attention is watched, and not reported by its own code.

    Raises:
        UserError: Its modeling file hands its vectors to the sniffer of a run.
    """
    if attention.captures_itself:
        raise UserError(
            f"sniff: {name} reports its own vectors to the sniffer of a run; capture it with "
            "`qk-sniffer predict`"
        )
