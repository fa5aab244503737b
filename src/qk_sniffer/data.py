"""TextDataModule: texts from a Hub dataset or local files as batches of tokens, with example ids."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qk_sniffer.config import TokenizerConfig
from qk_sniffer.errors import UserError, explained_loading
from qk_sniffer.ids import ExampleFilter, collision, hash_ids
from qk_sniffer.models import ModelSource
from qk_sniffer.texts import Row, StreamedRows, TextSource, check_columns, example_ids


class TokenBatch(dict[str, Any]):
    """A batch of which only the tokens move to a device: ids, lengths and mask are read on the host."""

    host_input_ids: torch.Tensor
    """``input_ids`` as they were made, from ``to`` on."""

    def to(self, device: torch.device) -> "TokenBatch":
        """The batch with ``input_ids`` on ``device``; Lightning calls this for every batch."""
        batch = TokenBatch(self | {"input_ids": self["input_ids"].to(device, non_blocking=True)})
        batch.host_input_ids = self["input_ids"]
        return batch


class TextDataModule(pl.LightningDataModule):
    """Reads texts, gives each an int32 id, tokenizes them and pads batches on the right.

    In a notebook: ``dm = TextDataModule(path, tokenizer=TokenizerConfig(name=...))``,
    ``dm.setup("predict")``, ``dm.predict_dataloader()``.

    Each batch is a dictionary:

    - ``input_ids`` (B, S) int64 and ``attention_mask`` (B, S) int64, 1 up to each text's length,
    - ``example_ids`` (B,) int32 and ``sequence_lengths`` (B,) int64, in tokens,
    - ``source_ids``, B strings: the ids as the dataset has them,
    - ``truncated``, B booleans: whether ``tokenizer.max_length`` cut the text.

    Args:
        path: Hub dataset id, or a local directory or file (jsonl, parquet, csv or txt).
        name: Configuration of a Hub dataset that has several.
        revision: Branch, tag or commit of a Hub dataset.
        split: Split to read; local files without splits are train.
        text_column: Column with the texts; a txt file is one text in the column text.
        id_column: Column with unique integer or string ids; null numbers the rows from 0.
        max_samples: Rows to read from the start; null reads all.
        streaming: Read the dataset while the model runs instead of downloading it first.
        tokenizer: How text becomes tokens.
        batch_size: Texts in a batch.
        num_workers: Processes that prepare batches, at most one for a stream; 0 uses the main process.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        revision: str | None = None,
        split: str = "train",
        text_column: str = "text",
        id_column: str | None = None,
        max_samples: int | None = None,
        streaming: bool = False,
        tokenizer: TokenizerConfig = TokenizerConfig(),  # noqa: B008
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for field, value in (("batch_size", batch_size), ("max_samples", max_samples)):
            if value is not None and value < 1:
                raise UserError(f"data.{field}: must be at least 1, got {value}")
        self.save_hyperparameters()
        self.path = path
        self.name = name
        self.revision = revision
        self.split = split
        self.text_column = text_column
        self.id_column = id_column
        self.max_samples = max_samples
        self.streaming = streaming
        self.tokenizer_config = tokenizer
        self.batch_size = batch_size
        self.num_workers = num_workers

    tokenizer: PreTrainedTokenizerBase
    """The tokenizer, from ``setup`` on."""

    def setup(self, stage: str) -> None:
        """Load the tokenizer and the dataset; where it doesn't stream, check ids and tokenize it.

        Texts that a callback of the trainer doesn't need, since an earlier run has captured them, are
        left out before they are tokenized.

        Raises:
            UserError: The tokenizer, the dataset or a column is missing, an id is missing or shared,
                a text is not a string, or there are no rows.
        """
        filters = self._filters()
        self.tokenizer = self._load_tokenizer()
        source = TextSource(self.path, self.name, self.revision, self.split)
        encode = _Encode(
            self.tokenizer, self.text_column, self.id_column, self.tokenizer_config.max_length
        )
        self._dataset: torch.utils.data.Dataset[Any]
        if self.streaming:
            rows = source.stream(self.max_samples)
            self._dataset = _StreamedBatches(rows, encode, self.batch_size, filters)
            return
        dataset = source.load(self.max_samples)
        check_columns(dataset.column_names, self.text_column, self.id_column)
        ids = example_ids(dataset, self.id_column)
        left = np.flatnonzero(_are_left(ids, filters))
        if len(left) < len(dataset):
            encode.row_numbers = left
            dataset = dataset.select(left)
        self._dataset = dataset.map(
            encode,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            desc="Tokenizing",
        )

    def sequence_lengths(self) -> torch.Tensor | None:
        """Tokens in each text that is left to read, (N,) int64; None where the dataset streams."""
        if self.streaming:
            return None
        if len(self._dataset) == 0:  # type: ignore[arg-type]
            return torch.empty(0, dtype=torch.int64)
        lengths: torch.Tensor = self._dataset.with_format("torch")["n_tokens"][:]  # type: ignore[attr-defined]
        return lengths

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches in the order of the dataset."""
        # Several workers would each see some of a stream's files, and the order of rows would change.
        num_workers = min(self.num_workers, 1) if self.streaming else self.num_workers
        return DataLoader(
            self._dataset,
            batch_size=None if self.streaming else self.batch_size,
            num_workers=num_workers,
            collate_fn=_Collate(_pad_token_id(self.tokenizer)),
            pin_memory=torch.cuda.is_available(),
        )

    def _filters(self) -> list[ExampleFilter]:
        return [
            callback.example_filter(self.trainer)
            for callback in getattr(self.trainer, "callbacks", [])
            if hasattr(callback, "example_filter")
        ]

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        source = self._tokenizer_source()
        field = "model.name" if self.tokenizer_config.name is None else "data.tokenizer.name"
        with explained_loading(
            f"{field}: no tokenizer can be loaded from {source.name}",
            "name a local directory or a Hub id that you can reach and that has one",
        ):
            tokenizer = AutoTokenizer.from_pretrained(**source.kwargs())
        tokenizer.truncation_side = "right"
        return tokenizer

    def _tokenizer_source(self) -> ModelSource:
        config = self.tokenizer_config
        if config.name is not None:
            return ModelSource(config.name, trust_remote_code=config.trust_remote_code)
        source = getattr(getattr(self.trainer, "lightning_module", None), "source", None)
        if not isinstance(source, ModelSource):
            raise UserError(
                "data.tokenizer.name: null takes the tokenizer of the trainer's SnifferModule, and "
                "there is none here; name a tokenizer"
            )
        trust = source.trust_remote_code or config.trust_remote_code
        return replace(source, trust_remote_code=trust)


class _Encode:
    """Turns columns of the dataset into token ids, example ids and what the examples table needs."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_column: str,
        id_column: str | None,
        max_length: int | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.id_column = id_column
        self.max_length = max_length
        self.row_numbers: npt.NDArray[np.int64] | None = None
        """Numbers of the rows in the dataset, where only some of them are left."""

    def __call__(self, columns: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        if self.row_numbers is not None:
            rows = self.row_numbers[rows].tolist()
        texts = columns[self.text_column]
        for text, row in zip(texts, rows, strict=True):
            if not isinstance(text, str):
                raise UserError(
                    f"data.text_column: row {row} has {_shorten(text)} in {self.text_column!r}, not a "
                    "string; mend or drop the row, or name another column"
                )
        source_ids = rows if self.id_column is None else columns[self.id_column]
        input_ids, truncated = self._tokenize(texts)
        return {
            "input_ids": input_ids,
            "n_tokens": [len(ids) for ids in input_ids],
            "truncated": truncated,
            "example_id": hash_ids(source_ids, rows),
            "source_id": [str(source_id) for source_id in source_ids],
        }

    def _tokenize(self, texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        if self.max_length is None:
            return whole, [False] * len(whole)
        truncated = [len(ids) > self.max_length for ids in whole]
        # Tokenized again rather than cut, so that special tokens stay where the tokenizer puts them.
        kept = [
            self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
            if cut
            else ids
            for text, ids, cut in zip(texts, whole, truncated, strict=True)
        ]
        return kept, truncated


class _StreamedBatches(IterableDataset[list[Row]]):
    """Rows of a streaming dataset in batches, in the order of the stream."""

    def __init__(
        self,
        rows: StreamedRows,
        encode: _Encode,
        batch_size: int,
        filters: Sequence[ExampleFilter],
    ) -> None:
        self.rows = rows
        self.encode = encode
        self.batch_size = batch_size
        self.filters = filters

    def __iter__(self) -> Iterator[list[Row]]:
        rows = self._rows_left()
        while batch := list(islice(rows, self.batch_size)):
            columns = {name: [row[name] for _, row in batch] for name in batch[0][1]}
            encoded = self.encode(columns, [index for index, _ in batch])
            yield [
                dict(zip(encoded, values, strict=True))
                for values in zip(*encoded.values(), strict=True)
            ]

    def _rows_left(self) -> Iterator[tuple[int, Row]]:
        """The numbered rows that are to be read, checked for a shared id."""
        seen: dict[int, int | str] = {}
        id_column = self.encode.id_column
        for index, row in self.rows:
            if index == 0:
                check_columns(list(row), self.encode.text_column, id_column)
            source_id = index if id_column is None else row[id_column]
            (number,) = hash_ids([source_id], [index])
            if id_column is not None:
                if number in seen:
                    raise collision(seen[number], source_id)
                seen[number] = source_id
            if _are_left(np.array([number]), self.filters).all():
                yield index, row


def _are_left(ids: npt.NDArray[Any], filters: Sequence[ExampleFilter]) -> npt.NDArray[np.bool_]:
    left = np.full(ids.shape, True)
    for selects in filters:
        left &= selects(ids)
    return left


class _Collate:
    """Pads encoded rows on the right to the longest of the batch."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[Row]) -> TokenBatch:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        # A batch of empty texts still needs one column for the forward.
        padded_length = max(1, int(lengths.max()))
        input_ids = torch.full((len(rows), padded_length), self.pad_token_id)
        for index, row in enumerate(rows):
            input_ids[index, : lengths[index]] = torch.tensor(row["input_ids"], dtype=torch.int64)
        return TokenBatch(
            input_ids=input_ids,
            attention_mask=(torch.arange(padded_length) < lengths[:, None]).to(torch.int64),
            example_ids=torch.tensor([row["example_id"] for row in rows], dtype=torch.int32),
            sequence_lengths=lengths,
            source_ids=[row["source_id"] for row in rows],
            truncated=[row["truncated"] for row in rows],
        )


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any valid token: what stands in the padding reaches no row that is kept."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
