"""SnifferCallback: owns the sniffer and the journal for the length of one prediction."""

import importlib.metadata
import logging
import platform
import shlex
import signal
import time
from contextlib import ExitStack
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from qk_sniffer.capture import (
    CapturedHeads,
    Chunk,
    Sniffer,
    active_sniffer,
    build_sampler,
    select_heads,
)
from qk_sniffer.config import CaptureConfig, OutputConfig
from qk_sniffer.errors import UserError
from qk_sniffer.models import AttentionMap, check_capture, check_passages, probe_attention
from qk_sniffer.storage import (
    CONFIG_FILE,
    JOURNAL_DIRECTORY,
    Block,
    Example,
    JournalWriter,
    check_data_root,
    clear_data_root,
    finalize,
    write_text,
)
from qk_sniffer.summary import file_progress, summary_table

log = logging.getLogger(__name__)

_PACKAGES = ("qk-sniffer", "torch", "transformers", "lightning", "datasets", "pyarrow")


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
        self._journal: JournalWriter
        self._running = ExitStack()
        self._tokens_seen = 0
        self._started = 0.0

    def check_output(self) -> None:
        """See that the data root can take a run.

        Raises:
            UserError: It is not writable, or holds an earlier run that is not to be overwritten.
        """
        check_data_root(self.data_root, self.output.overwrite)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the settings that need no model."""
        if trainer.world_size > 1:
            raise UserError(
                f"trainer.devices: {trainer.world_size} processes would write one data root; set "
                "devices and num_nodes to 1"
            )
        self.check_output()

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
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if config.capture_token_strings and tokenizer is None:
            raise UserError(
                "sniffer.capture.capture_token_strings: the trainer has no TextDataModule to take the "
                "tokenizer from; pass one as datamodule, or set it to false"
            )
        self._tokenizer: PreTrainedTokenizerBase | None = tokenizer
        clear_data_root(self.data_root)
        if self.config_yaml is not None:
            write_text(self.data_root / CONFIG_FILE, self.config_yaml)
        self._journal = JournalWriter(
            self.data_root / JOURNAL_DIRECTORY, self._header(trainer, pl_module, attention, heads)
        )
        self._running.callback(self._journal.close)
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
        self._sniffer.begin_batch(batch["example_ids"].tolist(), lengths.tolist())

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
        self._sniffer.flush_batch()
        self._journal.commit(self._examples(batch))
        self._tokens_seen += int(batch["sequence_lengths"].sum())
        self._show_progress(trainer)
        if trainer.received_sigterm:
            # Lightning notes the signal and would predict on to the end.
            raise SystemExit(128 + signal.SIGTERM)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the Parquet files, the card and the manifest, and print what there is."""
        self._journal.mark_complete()
        self._running.close()
        manifest = finalize(self.data_root, file_progress)
        seconds = time.monotonic() - self._started
        tqdm.write(summary_table(self.data_root, manifest, seconds=seconds))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the journal, and say where the captured rows are."""
        self._running.close()
        if (self.data_root / JOURNAL_DIRECTORY).exists():
            log.warning(
                "The rows captured so far are safe; write them as Parquet with: qk-sniffer finalize %s",
                shlex.quote(str(self.data_root)),
            )

    def _append(self, chunk: Chunk) -> None:
        dtype = str(chunk.vectors.dtype).removeprefix("torch.")
        vectors = chunk.vectors.contiguous()
        if chunk.vectors.dtype == torch.bfloat16:
            vectors = vectors.view(torch.uint16)
        rows = torch.stack([chunk.example_ids, chunk.positions, chunk.buckets])
        self._journal.append(
            Block(
                chunk.layer_idx,
                chunk.kind,
                chunk.sliding_window,
                dtype,
                vectors.numpy(),
                rows.numpy(),
            )
        )

    def _examples(self, batch: dict[str, Any]) -> list[Example]:
        lengths = batch["sequence_lengths"].tolist()
        tokens: list[list[str] | None] = [None] * len(lengths)
        if self.capture.capture_token_strings and self._tokenizer is not None:
            tokens = [
                self._tokenizer.convert_ids_to_tokens(ids[:length])
                for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)
            ]
        return [
            Example(*fields)
            for fields in zip(
                batch["example_ids"].tolist(),
                batch["source_ids"],
                lengths,
                batch["truncated"],
                tokens,
                strict=True,
            )
        ]

    def _show_progress(self, trainer: pl.Trainer) -> None:
        bar = getattr(trainer.progress_bar_callback, "predict_progress_bar", None)
        if bar is not None:
            rate = self._tokens_seen / (time.monotonic() - self._started)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s, {self._sniffer.rows_kept:,} rows kept")

    def _notes(self, attention: AttentionMap) -> list[str]:
        """What the card says of the architecture."""
        if not self.capture.capture_pre_rope:
            return attention.notes
        return attention.notes + attention.rotary.notes()

    def _header(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        attention: AttentionMap,
        heads: dict[int, CapturedHeads],
    ) -> dict[str, Any]:
        """What finalizing needs to know: versions, settings, layers, and the captured heads."""
        kinds = [("q", "query")] * self.capture.capture_queries
        kinds += [("k", "key")] * self.capture.capture_keys
        return {
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _PACKAGES},
            },
            "settings": {
                "model": _plain(pl_module.hparams),
                "data": _plain(getattr(getattr(trainer, "datamodule", None), "hparams", {})),
                "capture": asdict(self.capture),
            },
            "layers": [asdict(layer) for layer in attention.layers],
            "notes": self._notes(attention),
            "streams": [
                {
                    "layer_idx": layer_idx,
                    "kind": kind,
                    "heads": list(getattr(captured, field)),
                    "head_dim": captured.layer.head_dim,
                }
                for layer_idx, captured in heads.items()
                for kind, field in kinds
            ],
        }


def _plain(hparams: Any) -> dict[str, Any]:
    """Hyperparameters as JSON takes them, without what Lightning's command line adds."""
    return {
        key: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for key, value in dict(hparams).items()
        if not key.startswith("_")
    }
