"""Recorder: one process's sniffer, and the journal that its rows go to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from qk_sniffer.capture import (
    WHOLE_MODEL,
    AttentionLayer,
    BatchRows,
    CapturedHeads,
    ModelShard,
    Portion,
    Selection,
    Sniffer,
    active_sniffer,
)
from qk_sniffer.config import CaptureConfig, MomentsConfig
from qk_sniffer.data import BatchFields
from qk_sniffer.errors import UserError
from qk_sniffer.ids import EVERY_EXAMPLE, ExampleFilter
from qk_sniffer.kinds import parts_of
from qk_sniffer.processes import Ranks, uninterrupted
from qk_sniffer.recording.agreement import Due
from qk_sniffer.recording.counting import Counting
from qk_sniffer.recording.own_streams import OwnStreams
from qk_sniffer.recording.progress import Progress
from qk_sniffer.storage import Example, JournalWriter


class Recorder:
    """Captures the batches that a model reads, from its making to ``close``.

    Args:
        capture: What is captured.
        selection: Which positions are kept.
        heads: Its heads, by layer.
        journal: Where rows go.
        header: What is captured, for whoever reads the journal.
        rank: Number of this process.
        is_left: The texts that no earlier run has captured.
        tokenizer: Gives the token strings, where they are captured, and the text that a model writes.
        expected: Example ids, int32, and lengths, int64, of batches to come; others may come instead.
        moments: Which moments of every token are summed.
        is_uncounted: The texts whose moments no earlier run has summed.
        shard: The place of this process among those that share the model.
        layers: The attention layers as this process has them, where they share it.

    Raises:
        UserError: The journal is in use, or the disk refuses.
    """

    def __init__(
        self,
        capture: CaptureConfig,
        selection: Selection,
        heads: Mapping[int, CapturedHeads],
        journal: Path,
        header: dict[str, Any],
        rank: int,
        is_left: ExampleFilter,
        tokenizer: PreTrainedTokenizerBase | None,
        expected: Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = (),
        moments: MomentsConfig = MomentsConfig(),  # noqa: B008
        is_uncounted: ExampleFilter = EVERY_EXAMPLE,
        shard: ModelShard = WHOLE_MODEL,
        layers: Sequence[AttentionLayer] = (),
    ) -> None:
        self._shard = shard
        self._is_left = is_left
        self._tokenizer = tokenizer
        self._needs_tokens = capture.capture_token_strings
        self._is_continued = header["settings"]["model"].get("generate") is not None
        own = OwnStreams(heads, parts_of(capture.as_settings()), shard, layers)
        self._journal = JournalWriter(journal, header, rank, own.shard)
        self._counting = (
            Counting(moments, own, selection.sampler, self._journal, is_uncounted)
            if moments.enabled
            else None
        )
        self._captures = bool(own.streams)
        self._sniffer = Sniffer(
            own.streams,
            selection,
            self,
            local_positions=capture.local_positions,
            pre_rope=capture.capture_pre_rope,
            expected=((ids.tolist(), is_left.tokens(ids, lengths)) for ids, lengths in expected),
            moments=None if self._counting is None else self._counting.sums,
        )
        self._open = ExitStack()
        self._open.callback(self._journal.close)
        self._open.callback(self._sniffer.close)
        self._open.callback(self._sniffer.hand_on)
        if self._counting is not None and shard.count == 1:
            self._open.callback(self._counting.save)
        self._open.enter_context(active_sniffer(self._sniffer))
        self._examples: list[Example] = []
        """Texts whose rows the sniffer has not handed on."""
        self.batches_read = self.texts_read = self.tokens_read = 0

    @property
    def progress(self) -> Progress:
        """How far it is; its bytes are those that have gone to the journal.

        Of several processes that share a model one counts what they have read.
        """
        is_first = self._shard.number == 0
        return Progress(
            is_first * self.batches_read,
            is_first * self.texts_read,
            is_first * self.tokens_read,
            self._sniffer.rows_kept,
            self._journal.bytes_written,
        )

    @property
    def due(self) -> Due:
        """What is to be done once the batch that runs has ended."""
        counting = self._counting
        moments = counting is not None and counting.is_due
        if self._shard.count > 1:
            # Sums replace those before the last, which all processes that share the model must have.
            moments = moments and self._journal.moments_are_saved
        return Due(self._journal.is_due, moments)

    def begin_batch(self, batch: BatchFields) -> None:
        """Draw the rows that a batch keeps."""
        lengths = self._is_left.tokens(batch.example_ids, batch.sequence_lengths.numpy())
        counted = None
        if self._counting is not None:
            counted = self._counting.lengths(batch.example_ids, batch.sequence_lengths.numpy())
        self._sniffer.begin_batch(batch.example_ids.tolist(), lengths, batch.listed, counted)

    def end_batch(
        self,
        batch: BatchFields,
        before_saving: Callable[[], None] = lambda: None,
        due: Due | None = None,
    ) -> None:
        """Move the batch's rows to the journal, or keep them for the end of another that soon follows.

        Args:
            batch: Its fields.
            before_saving: Called where rows are moved; raises where they may not be.
            due: What is to be done, as all processes that share the model do it; None does what is due.

        Raises:
            UserError: The backbone has run outside ``capture_attention``.
        """
        if self._captures and batch.sequence_lengths.any() and not self._sniffer.has_captured:
            raise UserError(
                "SnifferCallback: predict_step has run, and nothing was captured; run self.backbone "
                "under `with qk_sniffer.models.capture_attention(self.backbone):`"
            )
        examples = self._examples_of(batch)
        # Rows, moments and texts together, or none of them.
        with uninterrupted():
            self._sniffer.flush_batch(hand_on=False)
            self._examples += examples
            if self._counting is not None:
                self._counting.end_batch(batch.example_ids)
        self.batches_read += 1
        self.texts_read += len(batch.example_ids)
        self.tokens_read += int(batch.sequence_lengths.sum())
        due = due or self.due
        if due.rows:
            before_saving()
            self._sniffer.hand_on()
            if self._counting is not None and due.moments:
                self._counting.save()

    def finish(self, ranks: Ranks) -> None:
        """Commit what all texts have, in all processes.

        Raises:
            UserError: The disk refused something; what was committed stays readable.
        """
        if self._counting is not None and self._shard.count > 1:
            # Each keeps the last sums that all of them have, and replaces those before.
            ranks.run(self._journal.wait_for_moments)
            self._counting.save()
        ranks.run(self.close)

    def close(self) -> None:
        """Commit what is waiting, and stop capturing; a second call does nothing.

        Raises:
            UserError: The disk refused something; what was committed stays readable.
        """
        self._open.close()

    def take_vectors(self, portion: Portion) -> None:
        """Let the journal write some bytes."""
        self._journal.append(portion)

    def take_rows(self, rows: BatchRows) -> None:
        """Let the journal write what the bytes are, and the texts."""
        self._journal.commit(rows.blocks, rows.numbers.numpy(), self._examples)
        self._examples = []

    def _examples_of(self, batch: BatchFields) -> list[Example]:
        is_new = self._is_left(batch.example_ids).tolist()
        return [self._example_of(batch, number) for number, new in enumerate(is_new) if new]

    def _example_of(self, batch: BatchFields, number: int) -> Example:
        length = int(batch.sequence_lengths[number])
        example = Example(
            int(batch.example_ids[number]), batch.source_ids[number], length, batch.truncated[number]
        )
        beside: dict[str, Any] = {}
        if self._needs_tokens:
            assert self._tokenizer is not None
            token_ids = batch.input_ids[number, :length].tolist()
            beside["tokens"] = self._tokenizer.convert_ids_to_tokens(token_ids)
        if batch.messages is not None:
            beside["messages"] = batch.messages[number]
        if batch.n_prompt_tokens is not None:
            n_prompt_tokens = int(batch.n_prompt_tokens[number])
            beside["n_prompt_tokens"] = n_prompt_tokens
            if self._is_continued:
                new = batch.input_ids[number, n_prompt_tokens:length].tolist()
                beside["generated_ids"] = new
                if self._tokenizer is not None:
                    # As the model wrote it, with the tokens that end a turn.
                    beside["generated_text"] = self._tokenizer.decode(
                        new, skip_special_tokens=False, clean_up_tokenization_spaces=False
                    )
        return replace(example, **beside)
