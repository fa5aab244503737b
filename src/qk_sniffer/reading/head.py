"""One head of a capture: its rows, all or some of them, in the array library of your choice."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
from torch import Tensor

from qk_sniffer.capture import SAMPLERS, AttentionLayer, Selection
from qk_sniffer.errors import UserError
from qk_sniffer.kinds import Kind
from qk_sniffer.reading.roles import roles_of
from qk_sniffer.reading.rows import HeadBatches, HeadRows, arrays, numbers_of
from qk_sniffer.storage import head_name

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

_INT32 = range(-(2**31), 2**31)

Numbers = int | range | Iterable[int]
"""One number, a range of them, or any others."""


@dataclass(frozen=True, eq=False)
class Head:
    """The rows of one head and kind; its file is opened when they are asked for.

    Attributes:
        layer: The head's layer.
        head: Number of the query head, for queries and outputs, or of the key head among the layer's
            key heads.
        kind: q, k, v or o.
    """

    layer: AttentionLayer
    head: int
    kind: Kind
    _n_rows: int
    _schema: pa.Schema
    _rows: HeadRows
    _example_id: Callable[[str], int]
    _source_ids: Callable[[], Mapping[int, str]]
    _examples: Callable[[], pa.Table]
    _capture: Mapping[str, Any]
    _condition: ds.Expression | None = None

    @property
    def name(self) -> str:
        """Its name in the data root, and in a card that has a config for each head."""
        return head_name(self.layer.layer_idx, self.head, self.kind)

    @property
    def head_dim(self) -> int:
        """Numbers in a vector."""
        return self.layer.width(self.kind)

    def __repr__(self) -> str:
        rows = f"{self._n_rows:,} rows" if self._condition is None else f"rows where {self._condition}"
        return f"<Head {self.name}: {rows}, head_dim {self.head_dim}>"

    def __len__(self) -> int:
        if self._condition is None:
            return self._n_rows
        return self._rows.count(self._condition)

    def where(
        self,
        *,
        example: int | str | Iterable[int | str] | None = None,
        bucket: Numbers | None = None,
        position: Numbers | None = None,
    ) -> Head:
        """Fewer of its rows; row groups of the file that have none of them are not read.

        Args:
            example: Example ids, or source ids as strings.
            bucket: Buckets.
            position: Token positions; ``range(1024)`` takes the first 1,024.

        Raises:
            UserError: No example has such a source id, or a number is no integer.
        """
        chosen = {"example_id": example, "bucket": bucket, "position": position}
        conditions = [
            _is_one_of(name, self._integers(name, numbers))
            for name, numbers in chosen.items()
            if numbers is not None
        ]
        if self._condition is not None:
            conditions.append(self._condition)
        return replace(self, _condition=reduce(operator.and_, conditions)) if conditions else self

    def arrow(self, columns: list[str] | None = None) -> pa.Table:
        """The rows in the types of the file, sorted by example_id and position.

        Args:
            columns: Some of bucket, example_id, position, vector, sliding_window and token_str, and of
                the statistics of queries; None takes all of them.

        Raises:
            UserError: There is no such column, or the file is missing or damaged.
        """
        known = self._schema.names
        for column in columns or ():
            if column not in known:
                raise UserError(f"columns: there is no {column}; choose from {', '.join(known)}")
        return self._rows.read(columns, self._condition)

    def numpy(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays of N rows by column.

        Returns:
            ``vector`` (N, head_dim) float32; ``bucket``, ``example_id`` and ``position`` (N,) int32;
            where they were captured ``lse``, ``entropy``, ``max_prob``, ``sink_prob`` and
            ``local_prob`` (N,) float32, ``argmax_position`` (N,) int32, and ``token_str`` (N,),
            strings.
        """
        table = self.arrow(["vector", *numbers_of(self._schema), "token_str"])
        columns = arrays(table)
        if table["token_str"].null_count < table.num_rows:
            columns["token_str"] = table["token_str"].to_numpy()
        return columns

    def torch(self) -> dict[str, Tensor]:
        """What ``numpy`` gives, as tensors, without the strings."""
        return self._rows.tensors(self._schema, self._condition)

    def pandas(self) -> pandas.DataFrame:
        """The rows as a data frame, with ``source_id``, the dataset's own id of the text.

        Each vector is an array of its own. ``token_str`` is the tokenizer's raw token, such as ``Ġqu``;
        its ``convert_tokens_to_string`` turns a list of them into text. Rows of conversations have
        their ``role``.
        """
        frame: pandas.DataFrame = self.arrow().to_pandas()
        source_ids = frame["example_id"].map(self._source_ids())
        frame.insert(frame.columns.get_loc("example_id") + 1, "source_id", source_ids)
        if "messages" in self._examples().column_names:
            frame.insert(frame.columns.get_loc("position") + 1, "role", self.roles())
        return frame

    def roles(self) -> npt.NDArray[np.object_]:
        """Who speaks at each of the rows, such as user or assistant, in the order of ``numpy``.

        Returns:
            (N,) strings; None at a token that the chat template wrote.

        Raises:
            UserError: The texts are no conversations.
        """
        examples = self._examples()
        if "messages" not in examples.column_names:
            raise UserError(
                f"{self.name}: its texts are no conversations, so that no row has a role; capture with "
                "data.messages_column"
            )
        rows = self.arrow(["example_id", "position"])
        return roles_of(examples, rows["example_id"].to_numpy(), rows["position"].to_numpy())

    def keep_probability(self, *, trust_code: bool = False) -> npt.NDArray[np.float64]:
        """How likely each of the rows was to be kept, by the settings of the capture.

        With it as a weight, a sample tells of all positions: ``(x / p).sum() / (1 / p).sum()`` is the
        mean of a number x of each row as if every position had been kept. Positions that were listed
        to be kept have 1: they are no random sample, and tell of themselves alone.

        Args:
            trust_code: Whether a sampler may be imported that is none of ours.

        Returns:
            (N,), above 0 and up to 1, in the order of ``numpy``.

        Raises:
            UserError: The sampler is code that is not trusted, or can't be imported.
        """
        sampler_type = self._capture["sampler"]["type"]
        if sampler_type not in SAMPLERS and not trust_code:
            raise UserError(
                f"{self.name}: the sampler {sampler_type} is code that would run; if you trust it, "
                "pass trust_code=True"
            )
        positions = self.arrow(["position"])["position"].to_numpy()
        selection = Selection.of(self._capture)
        # Only what came with the texts was kept.
        if selection.needs_lists:
            return np.ones(len(positions))
        return selection.keep_probabilities(positions)

    def batches(self, batch_size: int, *, shuffle: bool = False) -> HeadBatches:
        """Batches for a training loop, read while it runs: a torch ``IterableDataset``.

        Each is a dictionary as ``torch`` gives it, with a list ``token_str`` where that was captured.
        A plain ``DataLoader`` gives the same batches; with a ``batch_size`` of its own it joins so
        many. Its workers share the row groups out. Each worker holds one row group, of some 32 MiB of
        vectors, and a few copies of it while it is read.

        Args:
            batch_size: Rows in a batch; the last of a row group may have fewer.
            shuffle: Take row groups, and the rows of each, in random order, of torch's generator.

        Raises:
            UserError: The batch size is below 1.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size: must be an integer of at least 1, got {batch_size}")
        return HeadBatches(self._rows, self._condition, self._schema, batch_size, shuffle=shuffle)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the vectors along the two principal components that show most of position.

        A dot is a token. It is coloured by position, or where the vectors turn on a ring, by the phase
        of the turn; the title says which. Up to 4,000 rows are shown, evenly spread; all are read, so
        choose some of a large head by ``where``.

        Args:
            axes: Where to draw; None makes a figure.

        Returns:
            The axes.

        Raises:
            UserError: matplotlib is not installed, or fewer than two rows are finite.
        """
        from qk_sniffer.reading.plots import plot_head

        return plot_head(self, axes)

    def _integers(self, column: str, numbers: Any) -> range | list[int]:
        """The wanted values of a column, of any kind of integer; source ids become example ids."""
        if isinstance(numbers, range):
            return numbers
        return integers(column, numbers, partial(self._integer, column))

    def _integer(self, column: str, number: Any) -> int:
        number = number.as_py() if isinstance(number, pa.Scalar) else number
        if isinstance(number, str) and column == "example_id":
            return self._example_id(number)
        return operator.index(number)


def finite_rows(head: Head) -> tuple[dict[str, npt.NDArray[Any]], int]:
    """A head's rows but those whose vectors have a NaN or an infinity, and how many these are."""
    # Not as numpy() gives them, which reads the tokens too.
    rows = {name: values.cpu().numpy() for name, values in head.torch().items()}
    finite = np.isfinite(rows["vector"]).all(axis=1)
    return {name: values[finite] for name, values in rows.items()}, int((~finite).sum())


def _is_one_of(column: str, numbers: range | list[int]) -> ds.Expression:
    field = ds.field(column)
    if isinstance(numbers, range) and numbers.step == 1:
        return (field >= numbers.start) & (field < numbers.stop)
    return field.isin(pa.array([number for number in numbers if number in _INT32], pa.int32()))


def integers(name: str, numbers: Any, read: Callable[[Any], int] = operator.index) -> list[int]:
    """One integer or several, as a list.

    Args:
        name: Of the argument.
        numbers: What somebody gave.
        read: Makes an integer of each.

    Raises:
        UserError: They are none.
    """
    is_one = isinstance(numbers, str) or (
        hasattr(numbers, "__index__") and getattr(numbers, "ndim", 0) == 0
    )
    try:
        return [read(number) for number in ([numbers] if is_one else numbers)]
    except TypeError as error:
        raise UserError(f"{name}: expected integers, got {numbers!r}") from error
