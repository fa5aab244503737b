"""Who speaks in a conversation, at each of some tokens."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Roles = npt.NDArray[np.object_]


def roles_of(
    examples: pa.Table, example_ids: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]
) -> Roles:
    """The role of the message that each of some tokens is from; None where a template wrote it.

    Args:
        examples: The table of texts, with the column messages.
        example_ids: (N,).
        positions: (N,).

    Returns:
        (N,) strings.
    """
    texts = pc.list_parent_indices(examples["messages"]).to_numpy()
    spans = pc.list_flatten(examples["messages"])
    start, stop = (
        pc.struct_field(spans, name).to_numpy().astype(np.int64) for name in ("start", "stop")
    )
    names = np.array([*pc.struct_field(spans, "role").to_pylist(), None], object)
    first = (examples["example_id"].to_numpy().astype(np.int64)[texts] << 32) + start
    order = np.argsort(first, kind="stable")
    tokens = (example_ids.astype(np.int64) << 32) + positions
    found = np.searchsorted(first[order], tokens, side="right") - 1
    # Behind the spans is one for the tokens that are in none.
    spans_of = np.append(order, len(order))[found]
    last = np.append(first + stop - start, np.iinfo(np.int64).min)
    is_inside = tokens < last[spans_of]
    roles: Roles = names[np.where(is_inside, spans_of, len(order))]
    return roles
