"""SnifferCallback: owns the sniffer and the journal for the length of one prediction."""

import logging
import shlex
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from qk_sniffer.capture import (
    Chunk,
    Sniffer,
    active_sniffer,
    build_sampler,
    expected_rows,
    select_heads,
)
from qk_sniffer.config import CaptureConfig, OutputConfig
from qk_sniffer.errors import UserError
from qk_sniffer.ids import ExampleFilter
from qk_sniffer.models import (
    check_capture,
    check_passages,
    probe_attention,
)
from qk_sniffer.provenance import describe, fingerprint, settings
from qk_sniffer.storage import (
    CONFIG_FILE,
    JOURNAL_DIRECTORY,
    Block,
    EarlierRun,
    Example,
    JournalWriter,
    check_space,
    clear_data_root,
    earlier_run,
    finalize,
    mark_complete,
    prepare_data_root,
    read_manifest,
    write_text,
)
from qk_sniffer.summary import file_progress, summary_table

log = logging.getLogger(__name__)


class SnifferCallback(pl.Callback):
    """Captures queries and keys while a trainer predicts, and writes one Parquet file per head.

    It works in any trainer whose module keeps its decoder in ``backbone`` and runs it under
    ``qk_sniffer.models.capture_attention``, as ``SnifferModule`` does, and whose batches are those of
    ``TextDataModule``.

    Args:
        output: Where the captured vectors go.
        capture: What is captured.
        check: Recompute attention in a few layers and heads on up to 512 tokens of the first batch,
            from the captured vectors, and stop where it differs from the model's own; or where the
            model reads passages otherwise than the whole.
    """

    def __init__(
        self,
        output: OutputConfig,
        capture: CaptureConfig = CaptureConfig(),  # noqa: B008
        check: bool = True,
    ) -> None:
        self.output = output
        self.capture = capture
        self.check = check
        self.data_root = Path(output.data_root)
        self.config_yaml: str | None = None
        """The resolved config to save in the data root; the command line sets it."""
        self._sampler = build_sampler(
            capture.sampler.type, capture.sampler.base_rate, capture.min_bucket_size
        )
        self._sniffer: Sniffer
        self._journal: JournalWriter | None = None
        self._running = ExitStack()
        self._ended = False
        self._tokens_seen = 0
        self._started = 0.0

    def check_output(self) -> None:
        """See that the data root can take a run, and repair what an interrupted one left there.

        Raises:
            UserError: It is not writable, or what it holds can't be continued or replaced.
        """
        prepare_data_root(self.data_root, self.output.overwrite)

    def earlier_run(
        self, module: pl.LightningModule, data: pl.LightningDataModule | None
    ) -> EarlierRun | None:
        """What the data root holds already of this very run; None where it begins anew.

        Raises:
            UserError: It holds a run with other settings.
        """
        earlier = None if self.output.overwrite else earlier_run(self.data_root)
        if earlier is not None:
            earlier.require(self.data_root, fingerprint(settings(module, data, self.capture)))
        return earlier

    def example_filter(self, trainer: pl.Trainer) -> ExampleFilter:
        """The texts that the data module reads: those that no earlier run has captured."""
        return _uncaptured(self.earlier_run(trainer.lightning_module, _data_module(trainer)))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the settings that need no model, and finish files that an earlier run has begun."""
        if trainer.world_size > 1:
            raise UserError(
                f"trainer.devices: {trainer.world_size} processes would write one data root; set "
                "devices and num_nodes to 1"
            )
        self.check_output()
        self._journal, self._ended = None, False
        self._started = time.monotonic()
        earlier = self.earlier_run(pl_module, _data_module(trainer))
        if earlier is not None:
            tqdm.write(f"{self.data_root}: going on after {earlier.example_ids.size:,} texts")
            if earlier.finalizing:
                finalize(self.data_root, file_progress)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the model's heads, open the journal and make the sniffer active."""
        config = self.capture
        self._backbone = cast(nn.Module, pl_module.backbone)
        attention = probe_attention(self._backbone, pre_rope=config.capture_pre_rope)
        sampling = config.head_sampling
        heads = select_heads(
            attention.layers,
            layers=config.layers,
            heads=config.heads,
            sample_count=sampling.count if sampling else None,
            sample_seed=sampling.seed if sampling else 0,
            full_attention_only=config.full_attention_only,
        )
        self._heads = heads
        tokenizer = getattr(_data_module(trainer), "tokenizer", None)
        if config.capture_token_strings and tokenizer is None:
            raise UserError(
                "sniffer.capture.capture_token_strings: the trainer has no TextDataModule to take the "
                "tokenizer from; pass one as datamodule, or set it to false"
            )
        self._tokenizer: PreTrainedTokenizerBase | None = tokenizer
        header = describe(
            settings(pl_module, _data_module(trainer), config), self._backbone, attention, heads
        )
        self._check_space(trainer, header["streams"])
        self._open_journal(header)
        self._sniffer = Sniffer(
            heads,
            self._sampler,
            config.sampler.seed,
            self._append,
            capture_queries=config.capture_queries,
            capture_keys=config.capture_keys,
            pre_rope=config.capture_pre_rope,
        )
        self._running.callback(self._sniffer.close)
        self._running.enter_context(active_sniffer(self._sniffer))
        self._checked = not self.check
        self._tokens_seen, self._started = 0, time.monotonic()

    def _open_journal(self, header: dict[str, Any]) -> None:
        """Clear the data root or see that it can be continued, and open its journal."""
        earlier = None if self.output.overwrite else earlier_run(self.data_root)
        if earlier is None:
            clear_data_root(self.data_root)
        else:
            earlier.require(self.data_root, header["fingerprint"])
        self._is_left = _uncaptured(earlier)
        if self.config_yaml is not None:
            write_text(self.data_root / CONFIG_FILE, self.config_yaml)
        journal = JournalWriter(self.data_root / JOURNAL_DIRECTORY, header)
        self._running.callback(journal.close)
        self._journal = journal

    def on_predict_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the rows that this batch keeps, and check the capture before the first.

        Raises:
            UserError: The batch is not padded on the right, or the check fails.
        """
        lengths, mask = batch["sequence_lengths"], batch["attention_mask"]
        expected = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
        if not torch.equal(mask.bool(), expected):
            raise UserError(
                "attention_mask: a batch is not padded on the right up to its sequence_lengths; set "
                "the tokenizer's padding_side to right"
            )
        if not self._checked:
            tokens = batch["input_ids"][:1, : int(lengths[0])]
            check_capture(self._backbone, tokens, list(self._heads))
            if pl_module.hparams.get("prefill_chunk_size") is not None:
                check_passages(self._backbone, tokens)
            self._checked = True
        # A loader of someone's own may give texts that are captured already: they keep no rows.
        is_new = self._is_new(batch)
        self._sniffer.begin_batch(batch["example_ids"].tolist(), (lengths.cpu() * is_new).tolist())

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the batch's rows to the journal, and stop after it where a SIGTERM asks for that."""
        assert self._journal is not None
        self._sniffer.flush_batch()
        self._journal.commit(self._examples(batch))
        self._tokens_seen += int(batch["sequence_lengths"].sum())
        self._show_progress(trainer)
        if trainer.received_sigterm:
            # Lightning notes the signal and would predict on to the end.
            raise SystemExit(128 + signal.SIGTERM)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the Parquet files, the card and the manifest, and print what there is."""
        self._running.close()
        self._end(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the files of a run whose texts were all captured before: it has no batch."""
        if not self._ended:
            self._end(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the journal, and say where the captured rows are."""
        try:
            self._running.close()
        except UserError as error:
            log.warning("%s", error)
        if self._journal is not None and (self.data_root / JOURNAL_DIRECTORY).exists():
            again = " with sniffer.output.overwrite: false" if self.output.overwrite else ""
            log.warning(
                "What was captured so far is safe. Go on with the same command%s, or write it as "
                "Parquet with: qk-sniffer finalize %s",
                again,
                shlex.quote(str(self.data_root)),
            )

    def _end(self, trainer: pl.Trainer) -> None:
        self._ended = True
        limit = trainer.limit_predict_batches
        complete = isinstance(limit, float) and limit == 1.0
        if (self.data_root / JOURNAL_DIRECTORY).exists():
            manifest = finalize(self.data_root, file_progress, complete=complete)
        elif (found := read_manifest(self.data_root)) is not None:
            manifest = mark_complete(self.data_root) if complete and not found["complete"] else found
        else:
            return
        seconds = time.monotonic() - self._started
        tqdm.write(summary_table(self.data_root, manifest, seconds=seconds))

    def _append(self, chunk: Chunk) -> None:
        assert self._journal is not None
        self._journal.append(lambda: _block(chunk), chunk.n_bytes)

    def _is_new(self, batch: dict[str, Any]) -> torch.Tensor:
        return torch.from_numpy(self._is_left(batch["example_ids"].cpu().numpy()))

    def _examples(self, batch: dict[str, Any]) -> list[Example]:
        lengths = batch["sequence_lengths"].tolist()
        tokens: list[list[str] | None] = [None] * len(lengths)
        if self.capture.capture_token_strings and self._tokenizer is not None:
            tokens = [
                self._tokenizer.convert_ids_to_tokens(ids[:length])
                for ids, length in zip(_host_input_ids(batch).tolist(), lengths, strict=True)
            ]
        rows = zip(
            batch["example_ids"].tolist(),
            batch["source_ids"],
            lengths,
            batch["truncated"],
            tokens,
            strict=True,
        )
        is_new = self._is_new(batch).tolist()
        return [Example(*fields) for fields, new in zip(rows, is_new, strict=True) if new]

    def _show_progress(self, trainer: pl.Trainer) -> None:
        bar = getattr(trainer.progress_bar_callback, "predict_progress_bar", None)
        if bar is not None:
            rate = self._tokens_seen / (time.monotonic() - self._started)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s, {self._sniffer.rows_kept:,} rows kept")

    def _check_space(self, trainer: pl.Trainer, streams: list[dict[str, Any]]) -> None:
        """Compare the room on the disk with what the texts that are left will take."""
        data: Any = _data_module(trainer)
        lengths = data.sequence_lengths() if hasattr(data, "sequence_lengths") else None
        if lengths is not None:
            rows = expected_rows(self._sampler, lengths)
            itemsize = next(self._backbone.parameters()).dtype.itemsize
            widths = sum(len(stream["heads"]) * stream["head_dim"] for stream in streams)
            check_space(self.data_root, int(rows * (widths * itemsize + 12 * len(streams))))


def _uncaptured(earlier: EarlierRun | None) -> ExampleFilter:
    return ExampleFilter(
        np.empty(0, np.int32) if earlier is None else earlier.example_ids, listed=False
    )


def _data_module(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    return getattr(trainer, "datamodule", None)


def _host_input_ids(batch: dict[str, Any]) -> torch.Tensor:
    """The tokens, without waiting for a device where the batch kept them."""
    tokens: torch.Tensor = getattr(batch, "host_input_ids", batch["input_ids"])
    return tokens


def _block(chunk: Chunk) -> Block:
    """A chunk as the journal takes it; waits for its copy to the host."""
    vectors = chunk.vectors.contiguous()
    dtype = str(vectors.dtype).removeprefix("torch.")
    if vectors.dtype == torch.bfloat16:
        vectors = vectors.view(torch.uint16)
    rows = torch.stack([chunk.example_ids, chunk.positions, chunk.buckets])
    return Block(
        chunk.layer_idx, chunk.kind, chunk.sliding_window, dtype, vectors.numpy(), rows.numpy()
    )
