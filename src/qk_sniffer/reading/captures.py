"""``Captures``: what a finished run holds, in a directory or on the Hub."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from qk_sniffer.capture import AttentionLayer
from qk_sniffer.errors import UserError
from qk_sniffer.kinds import KINDS, SOFTMAX_COLUMNS, Kind
from qk_sniffer.reading.attention import Attention, attention_of
from qk_sniffer.reading.head import Head, Numbers
from qk_sniffer.reading.maps import HeadMap, softmax_means
from qk_sniffer.reading.moment_rows import read_moments
from qk_sniffer.reading.moments import Moments
from qk_sniffer.reading.places import place_of
from qk_sniffer.storage import (
    captured_names,
    has_softmax,
    head_name,
    head_schema,
    keeps_rows,
    parse_head_name,
    shown_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Captures:
    """What was captured of one model on one dataset; opens the manifest alone.

    Args:
        path_or_repo: A data root, or a Hub dataset as OWNER/NAME.
        revision: Branch, tag or commit of the Hub dataset.

    Raises:
        UserError: No finished run is there, or the Hub fails.
    """

    def __init__(self, path_or_repo: str | Path, revision: str | None = None) -> None:
        self._place = place_of(path_or_repo, revision)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Settings, versions, layers, notes, rows and checksums."""
        return self._place.manifest

    def __repr__(self) -> str:
        model, text = shown_names(self.settings)
        n_heads = len(captured_names(self.manifest))
        return (
            f"<Captures of {model} on {text}, in {self._place}: {n_heads:,} heads in "
            f"{len(self.layers)} layers, {self.manifest['examples']['rows']:,} examples>"
        )

    @property
    def settings(self) -> Mapping[str, Any]:
        """The sections model, data and capture of the run's config."""
        settings: Mapping[str, Any] = self.manifest["settings"]
        return settings

    @property
    def layers(self) -> dict[int, AttentionLayer]:
        """The layers of which a head was captured, by their number."""
        names = map(parse_head_name, captured_names(self.manifest))
        captured = {parsed[0] for parsed in names if parsed is not None}
        return {idx: layer for idx, layer in self._model_layers.items() if idx in captured}

    @property
    def heads(self) -> list[Head]:
        """Every captured head: for each layer its query heads, then its key, value and output heads."""
        found = []
        for name, facts in self.manifest["heads"].items():
            parsed = parse_head_name(name)
            assert parsed is not None
            found.append(self._head(*parsed, facts["rows"]))
        return found

    @cached_property
    def examples(self) -> pa.Table:
        """The texts: example_id, source_id, n_tokens and truncated.

        Conversations and continued texts have n_prompt_tokens besides, conversations their messages,
        and continued texts generated_ids and generated_text.
        """
        return self._place.examples()

    def example_id(self, source_id: str) -> int:
        """The id of the text that the dataset knows by another.

        Raises:
            UserError: There is no such text.
        """
        rows = self.examples.filter(pc.field("source_id") == source_id)
        if not rows.num_rows:
            raise UserError(f"{self._place}: no example has the source id {source_id}; see .examples")
        return int(rows["example_id"][0].as_py())

    def head(self, layer: int, head: int, kind: Kind = "q") -> Head:
        """One head.

        Args:
            layer: Number of the layer.
            head: Number of the query head, or with kind k or v of the key head.
            kind: q, k, v or o.

        Raises:
            UserError: It was not captured.
        """
        layer, head = operator.index(layer), operator.index(head)
        if kind not in KINDS:
            raise UserError(f"kind: expected one of {', '.join(KINDS)}, got {kind}")
        facts = self.manifest["heads"].get(head_name(layer, head, kind))
        if facts is None:
            raise UserError(self._not_captured(layer, head, kind))
        return self._head(layer, head, kind, facts["rows"])

    def key_head(self, layer: int, head: int) -> Head:
        """The key head that serves a query head, by grouped-query attention.

        Raises:
            UserError: It was not captured.
        """
        if layer not in self._model_layers:
            raise UserError(self._not_captured(layer, head, "k"))
        geometry = self._model_layers[layer]
        if not 0 <= head < geometry.num_attention_heads:
            last = geometry.num_attention_heads - 1
            raise UserError(f"key_head: layer {layer} has the query heads 0 to {last}, and not {head}")
        return self.head(layer, geometry.key_head(head), "k")

    def attention(
        self, layer: int, head: int, example: int | str, queries: Numbers | None = None
    ) -> Attention:
        """Scores and probabilities of a query head in one text, from the stored vectors.

        Args:
            layer: Number of the layer.
            head: Number of the query head.
            example: Example id, or source id as a string.
            queries: Positions of the queries; None takes all that are stored. A text of 100,000
                tokens has scores of 40 GB.

        Raises:
            UserError: Query or key head was not captured, the text has no rows, or vectors and
                manifest don't explain the layer's attention.
        """
        query = self.head(layer, head).where(example=example, position=queries)
        key = self.key_head(layer, head).where(example=example)
        self._require_explained(query.layer)
        q, k = query.torch(), key.torch()
        if not len(q["position"]):
            wanted = "row" if queries is None else "one of these queries"
            raise UserError(f"{query.name}: no {wanted} of example {example} is stored there")
        positions = (q["position"].to(torch.int64), k["position"].to(torch.int64))
        start = self._place.start_of(int(q["example_id"][0]))
        statistics = {name: q[name] for name in SOFTMAX_COLUMNS if name in q}
        return attention_of(query.layer, head, q["vector"], k["vector"], *positions, start, statistics)

    def plot_attention(
        self,
        layer: int,
        head: int,
        example: int | str,
        queries: Numbers | None = None,
        axes: Axes | None = None,
    ) -> Axes:
        """Draw the attention of a query head in one text: a row for each query, a column for each key.

        Colour is the probability, or where keys were not kept, the share among those that were. Grey
        cells are not attended to: the key is behind the query, or outside the layer's window.

        Args:
            layer: Number of the layer.
            head: Number of the query head.
            example: Example id, or source id as a string.
            queries: Positions of the queries; None takes the first 40 that are stored.
            axes: Where to draw; None makes a figure on which the labels are legible.

        Returns:
            The axes.

        Raises:
            UserError: matplotlib is not installed, no key was kept that a query attends to, or as for
                ``attention``.
        """
        from qk_sniffer.reading.plots import plot_attention

        return plot_attention(self, layer, head, example, queries, axes)

    def moments(
        self,
        layer: Numbers | None = None,
        head: Numbers | None = None,
        kind: Kind = "q",
        *,
        bucket: Numbers | None = None,
        pre_rope: bool = False,
    ) -> Moments:
        """Moments of every token of the texts: mean, covariance, and their link to position.

        Those of several heads, layers or buckets are the moments of all their vectors together. Of a
        capture on the Hub, a large file is read in part.

        Args:
            layer: Number of the layer, or of several; None takes all.
            head: Number of the head among those of its kind, or of several, which each of the named
                layers must have; None takes all.
            kind: q, k, v or o.
            bucket: Bucket of the positions, or several, of a run with ``moments.by_bucket``; None takes
                all positions.
            pre_rope: Take the vectors before the rotary embedding, of a run with ``moments.pre_rope``.

        Raises:
            UserError: The run has no moments, or none of such heads, buckets or vectors; the vectors
                of these layers differ in width; or the file is missing or damaged.
        """
        return read_moments(self._place, kind, layer, head, bucket, pre_rope)

    def softmax_map(
        self,
        statistic: str,
        *,
        example: int | str | Iterable[int | str] | None = None,
        bucket: Numbers | None = None,
        position: Numbers | None = None,
    ) -> HeadMap:
        """A statistic of each query head's softmax, as a map of layers and heads.

        It is the mean over the queries that were kept, but those where it is not finite.

        Args:
            statistic: entropy, sink_prob, local_prob, max_prob or lse; or previous, the share of the
                queries behind position 0 whose largest probability is that of the token before.
            example: Example ids, or source ids as strings; None takes the queries of all texts.
            bucket: Buckets of the queries.
            position: Their positions. Where there are no more than local_positions keys, local_prob
                is 1 for any head.

        Returns:
            The map: ``layers`` (L,), ``heads`` (H,) and ``values`` (L, H) float64, NaN where a head
            was not captured or has no such query.

        Raises:
            UserError: There is no such statistic, the statistics were not captured, or as for
                ``Head.where``.
        """
        means = softmax_means(self.manifest)
        if statistic not in means:
            raise UserError(f"softmax_map: there is no {statistic}; choose from {', '.join(means)}")
        if not has_softmax(self.manifest):
            raise UserError(
                f"{self._place}: statistics of the softmax were not captured; capture with "
                "capture_softmax: true, or sniff(model, softmax=True)"
            )
        mean = means[statistic]
        numbers = []
        for head in (head for head in self.heads if head.kind == "q"):
            chosen = head.where(example=example, bucket=bucket, position=position)
            table = chosen.arrow([*mean.columns])
            numbers.append(
                (head, mean.of_rows({name: table[name].to_numpy() for name in mean.columns}))
            )
        return HeadMap.of_numbers(numbers)

    def plot_softmax(
        self,
        statistic: str,
        *,
        example: int | str | Iterable[int | str] | None = None,
        bucket: Numbers | None = None,
        position: Numbers | None = None,
        axes: Axes | None = None,
    ) -> Axes:
        """Draw what ``softmax_map`` gives: a cell for each query head, grey where it is NaN.

        Args:
            statistic: As for ``softmax_map``, like the next three.
            example: Example ids, or source ids as strings.
            bucket: Buckets of the queries.
            position: Their positions.
            axes: Where to draw; None makes a figure.

        Returns:
            The axes.

        Raises:
            UserError: matplotlib is not installed, or as for ``softmax_map``.
        """
        from qk_sniffer.reading.plots import plot_softmax

        found = self.softmax_map(statistic, example=example, bucket=bucket, position=position)
        return plot_softmax(found, softmax_means(self.manifest)[statistic], axes)

    @cached_property
    def _model_layers(self) -> dict[int, AttentionLayer]:
        layers = [AttentionLayer.of(fields) for fields in self.manifest["layers"]]
        return {layer.layer_idx: layer for layer in layers}

    def _head(self, layer: int, head: int, kind: Kind, n_rows: int) -> Head:
        name, geometry = head_name(layer, head, kind), self._model_layers[layer]
        schema = head_schema(geometry.width(kind), softmax=kind == "q" and has_softmax(self.manifest))
        return Head(
            geometry,
            head,
            kind,
            n_rows,
            schema,
            self._place.rows(name, schema),
            self.example_id,
            self.source_ids,
            self._texts,
            self.settings["capture"],
        )

    def _texts(self) -> pa.Table:
        # A process that is spawned gets methods, and no functions without a name.
        return self.examples

    def source_ids(self) -> dict[int, str]:
        """The dataset's own ids of the texts, by example id."""
        texts = self.examples
        return dict(zip(texts["example_id"].to_pylist(), texts["source_id"].to_pylist(), strict=True))

    def _not_captured(self, layer: int, head: int, kind: Kind) -> str:
        name = head_name(layer, head, kind)
        if not keeps_rows(self.manifest):
            return f"{name}: no rows were kept, since the sampler is none; there are moments alone"
        there = [str(h.head) for h in self.heads if h.layer.layer_idx == layer and h.kind == kind]
        what = KINDS[kind].name
        if there:
            return f"{name}: not captured; layer {layer} has the {what} heads {', '.join(there)}"
        numbers = sorted({h.layer.layer_idx for h in self.heads if h.kind == kind})
        layers = ", ".join(map(str, numbers))
        return f"{name}: not captured; there are {what} heads of the layers {layers or 'none'}"

    def _require_explained(self, layer: AttentionLayer) -> None:
        if self.settings["capture"]["capture_pre_rope"]:
            raise UserError(
                f"{self._place}: the vectors are those before RoPE, and attention uses those after it; "
                "capture with capture_pre_rope: false"
            )
        if "scores" not in self.manifest["layers"][0]:
            raise UserError(
                f"{self._place}: made by an older version, whose manifest lacks the scale; read "
                "one more text with the same command, which writes it anew"
            )
        if layer.scores is None:
            notes = "; ".join(self.manifest["notes"])
            raise UserError(
                f"{self._place}: queries and keys alone don't explain the attention of layer "
                f"{layer.layer_idx}{': ' if notes else ''}{notes}"
            )
