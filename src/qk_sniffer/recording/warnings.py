"""What a person should know of the texts of a run, though nothing forbids them."""

import logging
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from qk_sniffer.capture import Listed, PositionsSampler, Selection
from qk_sniffer.data import BatchFields

log = logging.getLogger(__name__)

_STRETCH = "stretch its positions by YaRN in model.config_overrides"


def forewarnings(
    selection: Selection, lengths: Tensor, listed: Listed | None, n_positions: int | None
) -> Iterator[str]:
    """One line for each.

    Args:
        selection: Which positions are kept.
        lengths: (N,) int64, tokens in each text that is to be read.
        listed: Positions to keep of each text, where they come with it.
        n_positions: Positions that the model covers; None for any number.
    """
    if lengths.numel() == 0:
        return
    if n_positions is not None and (n_beyond := int((lengths > n_positions).sum())):
        yield (
            f"data.tokenizer.max_length: {n_beyond:,} of {lengths.numel():,} texts are longer than the "
            f"{n_positions:,} positions that the model's config covers, the longest has "
            f"{int(lengths.max()):,} tokens; set max_length to {n_positions}, or {_STRETCH}"
        )
    if not selection.keeps_rows or (selection.needs_lists and listed is None):
        # None are wanted, or they come with the batches of a loader of someone's own.
        return
    # More than half of the texts keep no more; a longer text keeps what its beginning keeps.
    rows = float(np.sort(selection.expected_rows(lengths, listed))[lengths.numel() // 2])
    if rows >= 1:
        return
    if isinstance(selection.sampler, PositionsSampler):
        yield (
            "sniffer.capture.sampler: most texts have none of the positions that are listed; list "
            "others, or keep the beginning of each by sniffer.capture.sampler.keep_first"
        )
    else:
        typical = int(lengths.sort().values[lengths.numel() // 2])
        yield (
            "sniffer.capture.sampler: of most texts a head is expected to keep less than one row, "
            f"{rows:.2g} of the {typical:,} tokens of a typical one; set sniffer.capture.sampler.type: "
            "all for short texts, or raise base_rate"
        )


class TextWarnings:
    """Warns of all texts when it is made, or of the first that calls for it once it is read.

    Args:
        selection: Which positions are kept.
        lengths: (N,) int64, tokens in each text that is to be read; None where they stream.
        listed: Positions to keep of each text, where they come with it.
        n_positions: Positions that the model covers; None for any number.
        bos_token_id: The token that begins a text; None where there is none.
    """

    def __init__(
        self,
        selection: Selection,
        lengths: Tensor | None,
        listed: Listed | None,
        n_positions: int | None,
        bos_token_id: int | None,
    ) -> None:
        self._watched_positions = n_positions if lengths is None else None
        self._watched_token = bos_token_id
        if lengths is not None:
            for line in forewarnings(selection, lengths, listed, n_positions):
                log.warning("%s", line)

    def see(self, batch: BatchFields) -> None:
        """Look at the texts of a batch."""
        self._see_longest(int(batch.sequence_lengths.max()))
        self._see_beginnings(batch)

    def _see_longest(self, longest: int) -> None:
        watched = self._watched_positions
        if watched is None or longest <= watched:
            return
        self._watched_positions = None
        log.warning(
            "data.tokenizer.max_length: a text of %s tokens is longer than the %s positions that the "
            "model's config covers; the card will count them all; set max_length to %d, or %s",
            f"{longest:,}",
            f"{watched:,}",
            watched,
            _STRETCH,
        )

    def _see_beginnings(self, batch: BatchFields) -> None:
        if self._watched_token is None or batch.input_ids.shape[1] < 2:
            return
        begins_twice = (batch.input_ids[:, :2] == self._watched_token).all(1).cpu()
        begins_twice &= batch.sequence_lengths >= 2
        if begins_twice.any():
            self._watched_token = None
            log.warning(
                "data.tokenizer.add_special_tokens: the text %s begins with its own beginning-of-text "
                "token and with another that the tokenizer adds; set it to false if the texts have "
                "theirs",
                batch.source_ids[int(begins_twice.nonzero()[0])],
            )
