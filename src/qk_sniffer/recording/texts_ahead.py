"""What is known of the texts of a trainer before they are read."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from torch import Tensor

from qk_sniffer.capture import Listed
from qk_sniffer.config import SamplerConfig
from qk_sniffer.data import TextDataModule, template_text
from qk_sniffer.errors import UserError


class TextsAhead:
    """What a trainer's data module tells of its texts, and None for what it does not.

    ``TextDataModule`` tells all of it where it doesn't stream; one of a user's own need tell nothing.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.data: pl.LightningDataModule | None = getattr(trainer, "datamodule", None)
        """The data module."""

    @property
    def tokenizer(self) -> Any:
        """Their tokenizer, of transformers."""
        return getattr(self.data, "tokenizer", None)

    @property
    def chat_template(self) -> str | None:
        """What makes texts of conversations; None where there are none."""
        if getattr(self.data, "messages_column", None) is None:
            return None
        template = getattr(self.tokenizer, "chat_template", None)
        return None if template is None else template_text(template)

    @property
    def example_ids(self) -> npt.NDArray[np.int32] | None:
        """(E,) int32: all that are to be captured in the end."""
        return getattr(self.data, "example_ids", None)

    def sequence_lengths(self) -> Tensor | None:
        """(N,) int64: tokens in each text that is left to be read."""
        found: Tensor | None = self._asked("sequence_lengths")
        return found

    def listed_positions(self) -> Listed | None:
        """Positions to keep of each of these texts, where they come with it."""
        found: Listed | None = self._asked("listed_positions")
        return found

    def token_range(self) -> tuple[int, int] | None:
        """The smallest and the largest token id."""
        found: tuple[int, int] | None = self._asked("token_range")
        return found

    def n_batches(self) -> int | None:
        """The batches of all processes."""
        found: int | None = self._asked("n_batches")
        return found

    def own_batches(self) -> Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
        """Example ids and tokens of the texts of each batch of this process; empty if not known."""
        return self._asked("own_batches") or ()

    def _asked(self, name: str) -> Any:
        method = getattr(self.data, name, None)
        return None if method is None else method()


def require_listed(sampler: SamplerConfig, data: pl.LightningDataModule | None) -> None:
    """See that positions are listed in one place where the sampler keeps those, and nowhere else.

    A data module of a user's own may give them with its batches.

    Args:
        sampler: The sampler's section.
        data: What reads the texts.

    Raises:
        UserError: They are listed twice or not at all, or are not used.
    """
    column = getattr(data, "positions_column", None)
    if column is not None and sampler.type != "positions":
        raise UserError(
            f"data.positions_column: the sampler {sampler.type} does not use it; set "
            "sniffer.capture.sampler.type to positions, or leave it out"
        )
    if column is not None and sampler.positions is not None:
        raise UserError(
            "data.positions_column: sniffer.capture.sampler.positions lists those of every text "
            "already; leave one of them out"
        )
    has_none = column is None and sampler.positions is None
    if sampler.type == "positions" and has_none and isinstance(data, TextDataModule):
        raise UserError(
            "sniffer.capture.sampler.positions: list the positions to keep, or name the column that "
            "lists them for each text in data.positions_column"
        )
