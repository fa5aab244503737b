"""TextDataModule: texts from a Hub dataset or local files as batches of tokens, with example ids."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import datasets
import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from qk_sniffer.capture import Listed
from qk_sniffer.config import TokenizerConfig, described
from qk_sniffer.data.batches import Batch, longest_first, plan_batches, rest_of, share_of
from qk_sniffer.data.conversations import Conversations
from qk_sniffer.data.encoded_rows import EncodedRows, ShareSampler, token_counts, tokenized
from qk_sniffer.data.streaming import StreamedBatches
from qk_sniffer.data.texts import (
    TextSource,
    check_columns,
    dataset_of,
    digest_of,
    example_ids,
)
from qk_sniffer.data.token_batch import Collate, TokenBatch
from qk_sniffer.data.tokenizers import load_tokenizer, warn_of_date
from qk_sniffer.data.tokenizing import LISTED, ConversationColumn, Encode, TextColumn
from qk_sniffer.errors import UserError
from qk_sniffer.ids import are_left
from qk_sniffer.models import vocabulary_size
from qk_sniffer.processes import Ranks, tidied_up


class TextDataModule(pl.LightningDataModule):
    """Reads texts, gives each an int32 id, tokenizes them and pads batches on the right.

    In a notebook: ``dm = TextDataModule(path, tokenizer=TokenizerConfig(name=...))``,
    ``dm.setup("predict")``, ``dm.predict_dataloader()``.

    Each batch is a dictionary:

    - ``input_ids`` (B, S) int64 and ``attention_mask`` (B, S) int64, 1 up to each text's length,
    - ``example_ids`` (B,) int32 and ``sequence_lengths`` (B,) int64, in tokens,
    - ``source_ids``, B strings: the ids as the dataset has them,
    - ``truncated``, B booleans: whether ``tokenizer.max_length`` cut the text,
    - ``positions``, B arrays of int32: the positions to keep, only with a ``positions_column``,
    - ``n_prompt_tokens`` (B,) int64, tokens before the last answer, and ``messages``, B lists of
      ``role``, ``start`` and ``stop``, the tokens of each message: only with a ``messages_column``.

    Args:
        path: Hub dataset id, or a local directory, file or pattern of files such as texts/*.jsonl, all
            of one kind (jsonl, parquet, csv or txt) and read in the order of their names; or a list of
            these without a Hub dataset, read in its order.
        name: Configuration of a Hub dataset that has several, or a list of them, read in its order.
        revision: Branch, tag or commit of a Hub dataset.
        split: Split to read; local files without splits are train.
        data_files: Files within path, a directory or a Hub dataset: a name or pattern such as
            en/*.json.gz, a list of them, or those of each split; null reads what path has.
        text_column: Column with the texts, or a field of a struct such as doc.text, as in the other
            columns; a txt file is one text in the column text.
        messages_column: Column with conversations, each a list of messages, which the chat template
            makes texts of; null reads text_column.
        messages_format: What a message is called: messages (role, content) or sharegpt (from, value).
        tools_column: Column with the tools that the assistant may call; null for none.
        chat_template: File with a Jinja template in place of the tokenizer's own.
        chat_template_kwargs: What the template is given besides, such as enable_thinking.
        id_column: Column with unique integer or string ids; null numbers the rows from 0.
        positions_column: Column with a list of positions for each text, those that the sampler
            positions keeps of it; null for none.
        max_samples: Rows to read from the start; null reads all.
        streaming: Read the dataset while the model runs instead of downloading it first.
        tokenizer: How text becomes tokens.
        batch_size: Most texts in a batch.
        max_tokens_per_batch: Most tokens in a batch, padding included: texts of like length are read
            together, the longest first. A longer text is read alone. Null puts batch_size texts into
            each batch, in the order of the dataset.
        num_workers: Processes that prepare batches, for each device; 0 uses the main process. Each
            worker of a stream reads all of it.
        num_proc: Processes that tokenize a dataset before the run; null uses the main process, whose
            tokenizer has threads.
    """

    def __init__(
        self,
        path: str | list[str],
        name: str | list[str] | None = None,
        revision: str | None = None,
        split: str = "train",
        data_files: str | list[str] | dict[str, str | list[str]] | None = None,
        text_column: str = "text",
        id_column: str | None = None,
        messages_column: str | None = None,
        messages_format: Literal["messages", "sharegpt"] = "messages",
        tools_column: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        positions_column: str | None = None,
        max_samples: int | None = None,
        streaming: bool = False,
        tokenizer: TokenizerConfig = TokenizerConfig(),  # noqa: B008
        batch_size: int = 1,
        max_tokens_per_batch: int | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
    ) -> None:
        super().__init__()
        if num_workers < 0:
            raise UserError(f"data.num_workers: must be at least 0, got {num_workers}")
        for field, value in (
            ("batch_size", batch_size),
            ("max_samples", max_samples),
            ("max_tokens_per_batch", max_tokens_per_batch),
            ("num_proc", num_proc),
        ):
            if value is not None and value < 1:
                raise UserError(f"data.{field}: must be at least 1, got {value}")
        for_conversations = {
            "tools_column": tools_column,
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
        }
        unused = next((name for name, value in for_conversations.items() if value is not None), None)
        if messages_column is None and unused is not None:
            raise UserError(
                f"data.{unused}: only conversations have a use for it; name their column in "
                "data.messages_column, or leave it out"
            )
        for field, given in (("path", path), ("name", name), ("data_files", data_files)):
            if given in ([], {}) or (isinstance(given, dict) and [] in given.values()):
                raise UserError(f"data.{field}: the list is empty; name at least one")
        # The callback gives loggers the settings; Lightning would merge those of module and data.
        self.save_hyperparameters(logger=False)
        self.path = path
        self.dataset_name = name
        self.revision = revision
        self.split = split
        self.data_files = data_files
        self.text_column = text_column
        self.id_column = id_column
        self.messages_column = messages_column
        self.messages_format = messages_format
        self.tools_column = tools_column
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs
        self.positions_column = positions_column
        self.max_samples = max_samples
        self.streaming = streaming
        self.tokenizer_config = tokenizer
        self.batch_size = batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self.num_workers = num_workers
        self.num_proc = num_proc

    tokenizer: PreTrainedTokenizerBase
    """The tokenizer, from ``setup`` on."""

    _texts: datasets.Dataset | None = None
    _given_tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def of(
        cls,
        texts: Sequence[str] | datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_length: int | None = None,
        positions: Sequence[Sequence[int]] | None = None,
        **settings: Any,
    ) -> "TextDataModule":
        """A data module of texts that are in memory.

        Args:
            texts: Strings, or a dataset.
            tokenizer: Their tokenizer; None takes that of the trainer's module.
            max_length: Tokens kept from the start of each text; None keeps all.
            positions: A list of positions for each of the strings, those that the sampler positions
                keeps of it; a dataset has them in its ``positions_column``.
            settings: ``text_column``, ``id_column``, ``positions_column``, ``max_samples``,
                ``batch_size``, ``max_tokens_per_batch``, ``num_workers`` and ``num_proc``, as of the
                class.

        Raises:
            UserError: There are no texts, a column is missing, or positions are no such lists.
        """
        if isinstance(texts, datasets.Dataset):
            dataset = texts
            if positions is not None:
                raise UserError(
                    "positions: a dataset has a column for them; name it in positions_column"
                )
        else:
            dataset = dataset_of(texts, positions)
        if positions is not None:
            settings["positions_column"] = "positions"
        name = None if tokenizer is None else tokenizer.name_or_path or type(tokenizer).__name__
        module = cls("texts", tokenizer=TokenizerConfig(name, max_length), **settings)
        columns = module._columns()
        check_columns(dataset.features, columns)
        digest = digest_of(dataset, [column for column in columns.values() if column is not None])
        module.path = module.hparams["path"] = f"texts-{digest}"
        module._texts, module._given_tokenizer = dataset, tokenizer
        return module

    example_ids: npt.NDArray[np.int32]
    """(N,) ids of all texts, from ``setup`` on; unset where the dataset streams."""

    n_new_tokens: int
    """Tokens that the trainer's module may add to each text, from ``setup`` on."""

    def setup(self, stage: str) -> None:
        """Load the tokenizer and the dataset; where it doesn't stream, check ids and tokenize it.

        In a run of several processes the first does so alone, and the others find what it made in the
        cache of datasets.

        Raises:
            UserError: The tokenizer, the dataset or a column is missing, an id is missing or shared,
                a text is not a string, there are no rows, or the processes find different texts.
        """
        self._filters = [
            callback.example_filter(self.trainer)
            for callback in getattr(self.trainer, "callbacks", [])
            if hasattr(callback, "example_filter")
        ]
        ranks = Ranks.of(self.trainer)
        if not ranks.is_first:
            datasets.disable_progress_bars()
        with tidied_up():
            ranks.after_first(self._load)
        if ranks.is_first and self.messages_column is not None:
            warn_of_date(self.tokenizer, self.chat_template_kwargs or {})
        if not self.streaming:
            ranks.run(lambda: self._require_same_texts(ranks))
            self._plan()

    def _columns(self) -> dict[str, str | None]:
        """The columns that are read, by the field that names them."""
        reads_texts = self.messages_column is None
        return {
            "text_column": self.text_column if reads_texts else None,
            "messages_column": self.messages_column,
            "tools_column": self.tools_column,
            "id_column": self.id_column,
            "positions_column": self.positions_column,
        }

    def _encode(self) -> Encode:
        """What makes tokens of rows."""
        module = getattr(self.trainer, "lightning_module", None)
        n_new_tokens = getattr(module, "max_new_tokens", 0)
        texts: TextColumn | ConversationColumn = TextColumn(self.text_column)
        if self.messages_column is not None:
            conversations = Conversations(
                self.tokenizer,
                self.messages_format,
                self.chat_template_kwargs or {},
                is_continued=n_new_tokens > 0,
            )
            texts = ConversationColumn(self.messages_column, self.tools_column, conversations)
        special = self.tokenizer_config.add_special_tokens
        return Encode(
            self.tokenizer,
            texts,
            self.id_column,
            self.tokenizer_config.max_length,
            # A chat template writes them itself.
            add_special_tokens=self.messages_column is None if special is None else special,
            positions_column=self.positions_column,
            n_new_tokens=n_new_tokens,
        )

    def _load(self) -> None:
        module = getattr(self.trainer, "lightning_module", None)
        self.tokenizer = load_tokenizer(
            self.tokenizer_config, module, self._given_tokenizer, self.chat_template
        )
        source = TextSource(
            self.path, self.dataset_name, self.revision, self.split, self.data_files, self._texts
        )
        encode = self._encode()
        self.n_new_tokens = encode.n_new_tokens
        if self.streaming:
            self._stream = source.stream(self.max_samples), encode
            return
        parts = source.load(self.max_samples)
        for part in parts:
            check_columns(part.features, encode.columns)
        ids = example_ids(parts, self.id_column)
        # Texts that are captured already are tokenized all the same: the cache has them, and batches
        # are to be those of a run that nothing interrupted.
        listed = [selects for selects in self._filters if selects.listed]
        is_left = are_left(ids, listed)
        self.example_ids = ids[is_left]
        self._dataset = tokenized(parts, encode, is_left, self.num_proc).with_format("arrow")
        self._lengths = token_counts(self._dataset) + self.n_new_tokens

    def _require_same_texts(self, ranks: Ranks) -> None:
        digest = xxhash.xxh3_64(self.example_ids.tobytes())
        digest.update(self._lengths.tobytes())
        if (listed := self._listed(np.arange(self._lengths.size))) is not None:
            digest.update(listed.sizes.tobytes() + listed.positions.tobytes())
        found = ranks.gather(digest.hexdigest())
        differing = [str(rank) for rank, other in enumerate(found) if other != found[0]]
        if differing:
            raise UserError(
                f"data.path: {described(self.path)} or its tokenizer is not the same everywhere: rank "
                f"{', '.join(differing)} found other texts than rank 0; give all nodes the same files"
            )

    def _plan(self) -> None:
        is_left = are_left(self.example_ids, self._filters)
        batches = plan_batches(self._lengths, self.batch_size, self.max_tokens_per_batch)
        batches = rest_of(batches, is_left)
        if self.max_tokens_per_batch is not None:
            batches = longest_first(batches, self._lengths)
        self._is_left, self._batches = is_left, batches
        self._own: list[Batch] | None = None

    def sequence_lengths(self) -> torch.Tensor | None:
        """Tokens in each text that is left to read, (N,) int64; None where the dataset streams.

        Where the module continues the texts, these are the most that there can be, here and below.
        """
        return None if self.streaming else torch.from_numpy(self._lengths[self._is_left])

    def listed_positions(self) -> Listed | None:
        """Positions to keep of each of these texts, where they come with it and it doesn't stream."""
        return self._listed(np.flatnonzero(self._is_left)) if not self.streaming else None

    def _listed(self, rows: Batch) -> Listed | None:
        if self.positions_column is None:
            return None
        if rows.size == 0:
            return Listed.of([])
        lists = self._dataset.select_columns(list(LISTED))[rows]["positions"]
        sizes, positions = pc.list_value_length(lists), pc.list_flatten(lists)
        return Listed(*(part.to_numpy().astype(np.int64) for part in (sizes, positions)))

    def token_range(self) -> tuple[int, int] | None:
        """The smallest and the largest token id of all texts; None where the dataset streams."""
        if self.streaming or int(self._lengths.sum()) == 0:
            return None
        # A part at a time, of a file that is mapped: no copy of the tokens is made.
        parts = (part.flatten() for part in self._dataset.data.column("input_ids").chunks)
        ends = [pc.min_max(part).as_py() for part in parts if len(part)]
        return min(end["min"] for end in ends), max(end["max"] for end in ends)

    def n_batches(self) -> int | None:
        """Batches that are left to read, of all processes; None where the dataset streams."""
        return None if self.streaming else len(self._batches)

    def own_batches(
        self,
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]] | None:
        """Example ids and tokens of the texts of each batch of this process, in their order.

        None where the dataset streams, or nobody knows how long the texts will be.
        """
        if self.streaming or self.n_new_tokens:
            return None
        return ((self.example_ids[batch], self._lengths[batch]) for batch in self._own_batches())

    def _own_batches(self) -> list[Batch]:
        if self._own is None:
            ranks = Ranks.of(self.trainer)
            self._own = share_of(self._batches, self._lengths, ranks.reader, ranks.n_readers)
        return self._own

    def batch_lengths(self) -> list[npt.NDArray[np.int64]] | None:
        """Tokens in each text of each batch that ``n_batches`` counts."""
        return None if self.streaming else [self._lengths[batch] for batch in self._batches]

    def batch_positions(self) -> Listed | None:
        """Positions to keep of each of these texts, batch behind batch, where they come with it."""
        return self._listed(np.concatenate(self._batches)) if not self.streaming else None

    def batch(self, number: int) -> TokenBatch:
        """One of the batches that ``n_batches`` counts."""
        collate = Collate(self._pad_token_id())
        return collate(EncodedRows(self._dataset)[self._batches[number]])

    def predict_dataloader(self) -> DataLoader[Any]:
        """The batches of this process: in the order of the dataset, or longest first in a budget."""
        ranks = Ranks.of(self.trainer)
        dataset: Dataset[Any]
        sampler: ShareSampler | None = None
        if self.streaming:
            dataset = StreamedBatches(
                *self._stream,
                self.batch_size,
                self.max_tokens_per_batch,
                self._filters,
                ranks.reader,
                ranks.n_readers,
            )
        else:
            dataset, sampler = EncodedRows(self._dataset), ShareSampler(self._own_batches())
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=Collate(self._pad_token_id()),
            pin_memory=torch.cuda.is_available(),
        )

    def _pad_token_id(self) -> int:
        """Any token that the model knows: what stands in the padding reaches no row that is kept.

        A token that was added to the tokenizer for padding may be none.
        """
        backbone = getattr(getattr(self.trainer, "lightning_module", None), "backbone", None)
        n_known = None if backbone is None else vocabulary_size(backbone)
        tokens = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        known = (t for t in tokens if t is not None and (n_known is None or t < n_known))
        return next(known, 0)
