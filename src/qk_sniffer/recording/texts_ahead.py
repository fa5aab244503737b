"""What is known of the texts of a trainer before they are read."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from torch import Tensor


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
    def example_ids(self) -> npt.NDArray[np.int32] | None:
        """(E,) int32: all that are to be captured in the end."""
        return getattr(self.data, "example_ids", None)

    def sequence_lengths(self) -> Tensor | None:
        """(N,) int64: tokens in each text that is left to be read."""
        found: Tensor | None = self._asked("sequence_lengths")
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
