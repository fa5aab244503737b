"""What the processes that share a model agree on before each batch that they read together."""

from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from qk_sniffer.data import BatchFields
from qk_sniffer.errors import UserError


class Due(NamedTuple):
    """What is to be done at the end of a batch.

    Attributes:
        rows: Move rows to the journal.
        moments: Save the moments too.
    """

    rows: bool
    moments: bool


class Offer(NamedTuple):
    """What one process says before a batch, and when it has read the last.

    Attributes:
        batch: A digest of it; empty behind the last.
        due: What this process would do at its end.
        is_stopped: Whether it was told to stop.
    """

    batch: str
    due: Due
    is_stopped: bool

    @classmethod
    def of(cls, batch: BatchFields | None, due: Due, *, is_stopped: bool) -> "Offer":
        """The offer for a batch; None is the end."""
        if batch is None:
            return cls("", due, is_stopped)
        digest = xxhash.xxh3_64(batch.example_ids.tobytes())
        digest.update(batch.sequence_lengths.numpy().tobytes())
        digest.update(batch.input_ids.cpu().numpy().tobytes())
        return cls(digest.hexdigest(), due, is_stopped)


def agree(offers: Sequence[Offer]) -> Due:
    """What all of them do at the end of the batch, so that they have the same texts at any time.

    Args:
        offers: Those of the processes that share a model, in their order.

    Raises:
        UserError: They were given different batches.
    """
    if any(offer.batch != offers[0].batch for offer in offers):
        raise UserError(
            f"model.tensor_parallel: the loader gives the {len(offers)} processes that share a model "
            "different batches; read the texts with TextDataModule, or let a loader of your own give "
            "them the same"
        )
    return Due(any(offer.due.rows for offer in offers), all(offer.due.moments for offer in offers))
