"""Capturing single calls of a model, whose texts may be padded on either side, packed, or continued.

``Sniffer`` is told of whole texts before they are read, and they begin at the first token of each
sequence. Here a call says for each of its tokens which text it belongs to and which position it has
there, so nothing has to be known of later calls.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qk_sniffer.capture.buffers import Staging
from qk_sniffer.capture.gathers import Gather, Gathers, result_states
from qk_sniffer.capture.heads import CapturedStream, Stream
from qk_sniffer.capture.plan import KeptQueries, KeptRows, draws_of
from qk_sniffer.capture.positions import own_keys
from qk_sniffer.capture.rows import BatchRows, Sink
from qk_sniffer.capture.selection import Selection
from qk_sniffer.capture.softmax import SoftmaxInput, SoftmaxStatistics
from qk_sniffer.kinds import LOCAL_POSITIONS, Kind


@dataclass(frozen=True, eq=False)
class CallTokens:
    """The tokens that one call of a model reads, without padding; int64 tensors on the host.

    Attributes:
        sequences: (N,) the sequence of the batch that each is in.
        columns: (N,) its place among the tokens of the call.
        example_ids: (N,) its text; the int32 ids.
        positions: (N,) its position there; those of a text ascend.
        n_before: (N,) places of cache and call before it, from the first of its text on.
        key_positions: (B, P) positions at all places of cache and call, -1 for padding; None where
            those of each sequence follow each other, but for padding on either side.
    """

    sequences: Tensor
    columns: Tensor
    example_ids: Tensor
    positions: Tensor
    n_before: Tensor
    key_positions: Tensor | None = None


class _CallRows(KeptRows):
    """The kept rows of one call."""

    def __init__(
        self,
        draws: dict[Stream, int],
        stops: list[int],
        tokens: CallTokens,
        kept: Tensor,
        buckets: Tensor,
    ) -> None:
        super().__init__(draws, stops)
        self._tokens = tokens
        self._kept = kept
        self._buckets = buckets

    def _places(self) -> tuple[Tensor, Tensor]:
        return self._tokens.sequences[self._kept], self._tokens.columns[self._kept]

    def queries(self, stream: Stream) -> KeptQueries:
        """The kept queries of a layer."""
        tokens, kept = self._tokens, self._kept[self.rows_of(stream)]
        return KeptQueries(
            tokens.sequences[kept].numpy(),
            tokens.columns[kept].numpy(),
            tokens.positions[kept].numpy(),
            tokens.n_before[kept].numpy(),
            tokens.key_positions,
        )

    def numbers(self) -> Tensor:
        """Example id, position and bucket of each row: (3 K,) int32, as ``Passage.numbers``."""
        tokens, kept = self._tokens, self._kept
        return self._by_draw([tokens.example_ids[kept], tokens.positions[kept], self._buckets[kept]])


class _Gathered(NamedTuple):
    stream: Stream
    sliding_window: int | None
    gather: Gather


class CallSniffer:
    """Keeps the rows of a model's calls that a run would keep of the same texts.

    For each call use ``begin_call``, let every attention layer ``capture``, and then ``end_call``.

    Args:
        streams: The captured heads of each layer and kind, in the order in which the model calls them.
        selection: Which positions are kept.
        sink: Takes the rows that are kept.
        local_positions: Positions that the statistic local_prob counts.
        stays: Leave vectors on the device that has them.
    """

    def __init__(
        self,
        streams: Iterable[CapturedStream],
        selection: Selection,
        sink: Sink,
        *,
        local_positions: int = LOCAL_POSITIONS,
        stays: bool = False,
    ) -> None:
        streams = list(streams)
        self._heads = {stream.key: stream.heads for stream in streams}
        self._has_results = any(stream.kind in ("v", "o") for stream in streams)
        self._selection, self._sink = selection, sink
        self._staging = Staging(sink.take_vectors, stays=stays)
        statistics = SoftmaxStatistics(streams, local_positions)
        self._gathers = Gathers(self._heads, self._staging, statistics)
        self._rows: _CallRows | None = None
        self._gathered: list[_Gathered] = []
        self._n_tokens = 0
        self._layers_seen: set[int] = set()
        self._results_seen: set[int] = set()

    def begin_call(self, tokens: CallTokens) -> None:
        """Draw the rows of a call.

        Args:
            tokens: What it reads.
        """
        self.drop_call()
        self._rows = self._draw(tokens)

    def _draw(self, tokens: CallTokens) -> _CallRows:
        example_ids, texts = torch.unique(tokens.example_ids, return_inverse=True)
        lengths = torch.zeros_like(example_ids)
        lengths.scatter_reduce_(0, texts, tokens.positions + 1, "amax")
        n_draws, n_texts = self._selection.count_draws(self._heads, lengths), len(example_ids)
        draws, stream_ids = draws_of(self._selection, tuple(self._heads), n_draws)
        sequences, positions = self._selection.draw(
            stream_ids.repeat_interleave(n_texts),
            example_ids.repeat(n_draws),
            lengths.repeat(n_draws),
        )
        # Text and position as one number, behind which none is larger.
        drawn = ((sequences % max(1, n_texts)) << 32) + positions
        read, order = ((texts << 32) + tokens.positions).sort()
        read = torch.cat([read, torch.tensor([n_texts << 32])])
        places = torch.searchsorted(read, drawn)
        # Those before this call were drawn again, since all of a text are drawn from its start.
        is_read = read[places] == drawn
        stops = torch.searchsorted(sequences[is_read], n_texts * torch.arange(1, n_draws + 1))
        buckets = self._selection.sampler.buckets(tokens.positions)
        return _CallRows(dict(draws), stops.tolist(), tokens, order[places[is_read]], buckets)

    def capture(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        past_length: int,
        sliding_window: int | None = None,
        softmax: SoftmaxInput | None = None,
    ) -> None:
        """Gather the kept rows of one attention call.

        Args:
            layer_idx: Layer in the text decoder.
            query: (B, num_attention_heads, Q, head_dim).
            key: (B, num_key_value_heads, K, head_dim), K > Q where a cache holds other tokens.
            past_length: Tokens in the cache before the call, padding included.
            sliding_window: The layer's window; None for full attention.
            softmax: What its softmax takes, where its statistics are wanted.
        """
        assert self._rows is not None
        if layer_idx in self._layers_seen:
            raise RuntimeError(f"layer {layer_idx} has attended twice in one call")
        self._layers_seen.add(layer_idx)
        self._n_tokens = query.shape[2]
        key = own_keys(key, past_length, query.shape[2])
        states: dict[Kind, Tensor] = {"q": query, "k": key}
        for stream, gather in self._gathers.gather_call(layer_idx, states, self._rows, softmax):
            self._gathered.append(_Gathered(stream, sliding_window, gather))

    def capture_result(
        self,
        layer_idx: int,
        value: Tensor | None,
        output: Tensor | None,
        past_length: int,
        sliding_window: int | None = None,
    ) -> None:
        """Gather the kept values and outputs of the attention call that the layer has captured.

        Args:
            layer_idx: Layer in the text decoder.
            value: (B, num_key_value_heads, K, value_head_dim), as the keys of the call; None for none.
            output: (B, Q, num_attention_heads, value_head_dim), before the output projection; None for
                none.
            past_length: Tokens in the cache before the call, padding included.
            sliding_window: The layer's window; None for full attention.
        """
        assert self._rows is not None
        self._results_seen.add(layer_idx)
        states = result_states(value, output, past_length, self._n_tokens)
        for stream, gather in self._gathers.gather_call(layer_idx, states, self._rows):
            self._gathered.append(_Gathered(stream, sliding_window, gather))

    def end_call(self) -> None:
        """Hand the rows of the call to the sink.

        Raises:
            RuntimeError: A layer has not attended.
        """
        assert self._rows is not None
        seen = self._layers_seen & self._results_seen if self._has_results else self._layers_seen
        if missing := {layer_idx for layer_idx, _ in self._heads} - seen:
            raise RuntimeError(f"layer {min(missing)} has not attended in this call")
        numbers = self._rows.numbers()
        blocks = [gather.block(stream, window, 0) for stream, window, gather in self._gathered]
        self._staging.end()
        self._sink.take_rows(BatchRows(numbers[:0].long(), blocks, numbers))
        self._begin_anew()

    def drop_call(self) -> None:
        """Forget a call that has failed."""
        self._begin_anew()
        self._staging.clear()

    def _begin_anew(self) -> None:
        self._rows, self._gathered = None, []
        self._layers_seen, self._results_seen = set(), set()
