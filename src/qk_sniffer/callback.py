"""SnifferCallback: owns the recording of one prediction, from the data root it finds to its files."""

import logging
import shlex
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from tqdm.auto import tqdm

from qk_sniffer.capture import (
    CapturedHeads,
    build_sampler,
    expected_rows_by_bucket,
    heads_to_capture,
)
from qk_sniffer.config import CaptureConfig, OutputConfig
from qk_sniffer.errors import UserError, first_line
from qk_sniffer.hub import Publication, check_access, pull, push
from qk_sniffer.ids import ExampleFilter
from qk_sniffer.models import check_capture, check_passages, probe_attention
from qk_sniffer.provenance import describe, fingerprint, settings
from qk_sniffer.ranks import ALONE, Ranks
from qk_sniffer.recorder import Recorder
from qk_sniffer.storage import (
    CONFIG_FILE,
    JOURNAL_DIRECTORY,
    EarlierRun,
    check_space,
    clear_data_root,
    data_root_path,
    discard_pulled,
    earlier_run,
    finalize,
    head_files_bytes,
    journal_bytes,
    prepare_data_root,
    require_captured,
    require_shared,
    write_text,
)
from qk_sniffer.summary import file_progress, published_table, summary_table

log = logging.getLogger(__name__)


class SnifferCallback(pl.Callback):
    """Captures queries and keys while a trainer predicts, and writes one Parquet file per head.

    It works in any trainer whose module keeps its decoder in ``backbone`` and runs it under
    ``qk_sniffer.models.capture_attention``, as ``SnifferModule`` does, and whose batches are those of
    ``TextDataModule``. In a run of several processes each captures what it reads, and all share the
    data root.

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
        self.data_root = data_root_path(output.data_root)
        self.config_yaml: str | None = None
        """The resolved config to save in the data root; the command line sets it."""
        self._sampler = build_sampler(
            capture.sampler.type, capture.sampler.base_rate, capture.min_bucket_size
        )
        self._ranks = ALONE
        self._has_joined = False
        self._earlier: EarlierRun | None = None
        self._publication: Publication | None = None
        self._recorder: Recorder | None = None
        self._received_sigterm = False
        self._started = 0.0

    def check_output(self, *, repair_journal: bool = True) -> None:
        """See that the data root can take a run, and repair what an interrupted one left there.

        Args:
            repair_journal: Whether this process is the one that repairs.

        Raises:
            UserError: It is not writable, or what it holds can't be continued or replaced.
        """
        prepare_data_root(self.data_root, self.output.overwrite, repair_journal=repair_journal)

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
        self._join(trainer)
        return self._uncaptured()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finish files that an earlier run has begun."""
        self._join(trainer)
        if self._earlier is not None:
            if self._ranks.is_first:
                n_texts = self._earlier.example_ids.size
                tqdm.write(f"{self.data_root}: going on after {n_texts:,} texts")
            if self._earlier.finalizing:
                finalize(self.data_root, self._file_progress, ranks=self._ranks)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the model's heads, open the journal and make the sniffer active."""
        self._backbone = cast(nn.Module, pl_module.backbone)
        ranks, tokenizer = self._ranks, getattr(_data_module(trainer), "tokenizer", None)
        if self.capture.capture_token_strings and tokenizer is None:
            raise UserError(
                "sniffer.capture.capture_token_strings: the trainer has no TextDataModule to take the "
                "tokenizer from; pass one as datamodule, or set it to false"
            )
        header, self._heads = ranks.run(lambda: self._describe(trainer, pl_module))
        ranks.run(lambda: _require_same(ranks.gather(header["fingerprint"])))
        ranks.first(lambda: self._check_space(trainer, header["streams"]))
        ranks.first(lambda: self._prepare_journal(header))
        self._recorder = ranks.run(
            lambda: Recorder(
                self.capture,
                self._sampler,
                self._heads,
                self.data_root / JOURNAL_DIRECTORY,
                header,
                ranks.rank,
                self._uncaptured(),
                tokenizer,
            )
        )
        self._stop_on_sigterm(trainer)
        self._checked = not self.check
        self._unsaved_config = self.config_yaml
        self._started = time.monotonic()

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
        assert self._recorder is not None
        if not self._checked:
            tokens = batch["input_ids"][:1, : int(batch["sequence_lengths"][0])]
            check_capture(self._backbone, tokens, list(self._heads))
            if pl_module.hparams.get("prefill_chunk_size") is not None:
                check_passages(self._backbone, tokens)
            self._checked = True
        self._recorder.begin_batch(batch)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the batch's rows to the journal, and stop after it where there is a reason.

        Raises:
            SystemExit: A SIGTERM came, or another process died.
        """
        assert self._recorder is not None
        self._recorder.end_batch(batch)
        self._save_config()
        lifeline = self._ranks.lifeline
        if lifeline is not None:
            lifeline.progress = self._recorder.progress
            if lifeline.failure is not None:
                raise SystemExit(1)
        self._show_progress(trainer, lifeline.total_progress() if lifeline else self._recorder.progress)
        if self._received_sigterm:
            raise SystemExit(128 + signal.SIGTERM)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what all processes have read, when the last of them has."""
        assert self._recorder is not None
        progress = self._ranks.gather(self._recorder.progress)
        n_batches, *others = [sum(numbers) for numbers in zip(*progress, strict=True)]
        self._show_progress(trainer, [n_batches, *others])
        if n_batches > 0 or not (self.data_root / CONFIG_FILE).exists():
            self._save_config()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the Parquet files, card and manifest, print what there is, and publish it."""
        assert self._recorder is not None
        ranks = self._ranks
        ranks.run(self._recorder.close)
        limit = trainer.limit_predict_batches
        complete = isinstance(limit, float) and limit == 1.0
        planned = getattr(_data_module(trainer), "example_ids", None)
        if complete and planned is not None:
            ranks.first(lambda: require_captured(self.data_root, planned))
        manifest = finalize(self.data_root, self._file_progress, complete=complete, ranks=ranks)
        if ranks.is_first:
            seconds = time.monotonic() - self._started
            tqdm.write(summary_table(self.data_root, manifest, seconds=seconds))
        # The others need not wait for uploads.
        self._leave(None)
        if self._publication is not None:
            push(self.data_root, self._publication)
            tqdm.write(published_table(self._publication.place, manifest))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the journal, tell the other processes, and say where the captured rows are."""
        if not self._has_joined:
            return
        try:
            if self._recorder is not None:
                self._recorder.close()
        except UserError as error:
            log.warning("%s", error)
        is_first, watched = self._ranks.is_first, self._ranks.lifeline is not None
        if isinstance(exception, UserError) and watched and not is_first:
            exception.is_told = True
        holds_rows = self._recorder is not None and (self.data_root / JOURNAL_DIRECTORY).exists()
        self._leave(_reason(exception))
        if holds_rows and is_first:
            again = " with sniffer.output.overwrite: false" if self.output.overwrite else ""
            log.warning(
                "What was captured so far is safe. Go on with the same command%s, or write it as "
                "Parquet with: qk-sniffer finalize %s",
                again,
                shlex.quote(str(self.data_root)),
            )

    def _join(self, trainer: pl.Trainer) -> None:
        """Meet the other processes, and learn together what the data root holds.

        Raises:
            UserError: They don't share it, or it can't take this run.
        """
        if self._has_joined:
            return
        self._has_joined = True
        self._recorder, self._received_sigterm = None, False
        self._started = time.monotonic()
        self._ranks = ranks = Ranks.of(trainer)
        if ranks.size > 1:
            strategy = trainer.strategy
            if not isinstance(strategy, DDPStrategy):
                raise UserError(
                    f"trainer.strategy: {type(strategy).__name__} can't be captured; set it to ddp, or "
                    "to ddp_notebook in a notebook"
                )
            assert strategy.cluster_environment is not None
            ranks.watch(strategy.cluster_environment.main_address)
        ranks.first(self.check_output)
        require_shared(self.data_root, ranks)
        module, data = trainer.lightning_module, _data_module(trainer)
        check_heads = getattr(module, "check_heads", None)
        if check_heads is not None:
            ranks.first(lambda: check_heads(asdict(self.capture)))
        self._earlier = ranks.first(lambda: self._earlier_and_pulled(module, data))

    def _earlier_and_pulled(
        self, module: pl.LightningModule, data: pl.LightningDataModule | None
    ) -> EarlierRun | None:
        """What the data root holds of this run, and what its branch of the Hub adds to that."""
        output, run_settings = self.output, settings(module, data, self.capture)
        self._publication = None
        earlier = self.earlier_run(module, data)
        if output.hf_repo_id is None:
            return earlier
        self._publication = publication = Publication.of_run(
            self.data_root, run_settings, output.hf_repo_id, output.hf_branch, output.private
        )
        check_access(publication, "set it to null and publish later with `qk-sniffer push`")
        known = fingerprint(run_settings) | dict(earlier.fingerprint if earlier else {})
        pull(self.data_root, publication, known, overwrite=output.overwrite)
        if not output.overwrite:
            publication.write(self.data_root)
        return self.earlier_run(module, data)

    def _leave(self, reason: str | None) -> None:
        self._ranks.leave(reason)
        self._has_joined = False

    def _describe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> tuple[dict[str, Any], dict[int, CapturedHeads]]:
        """The header of the journal, the same in all processes, and the captured heads by layer."""
        config = self.capture
        attention = probe_attention(self._backbone, pre_rope=config.capture_pre_rope)
        run_settings = settings(pl_module, _data_module(trainer), config)
        heads = heads_to_capture(run_settings["capture"], attention.layers)
        return describe(run_settings, self._backbone, attention, heads), heads

    def _prepare_journal(self, header: dict[str, Any]) -> None:
        """Clear the data root or see that it can be continued, in the first process."""
        if self._earlier is None:
            clear_data_root(self.data_root)
            if self._publication is not None:
                # Not before: what the branch holds is given up together with what was here.
                self._publication.write(self.data_root)
        else:
            try:
                self._earlier.require(self.data_root, header["fingerprint"])
            except UserError:
                if self._earlier.is_pulled:
                    discard_pulled(self.data_root)
                raise

    def _save_config(self) -> None:
        """Save the config once it has captured something: the one that is there describes what is."""
        if self._ranks.is_first and self._unsaved_config is not None:
            write_text(self.data_root / CONFIG_FILE, self._unsaved_config)
            self._unsaved_config = None

    def _stop_on_sigterm(self, trainer: pl.Trainer) -> None:
        """Note a SIGTERM, and pass it on to the processes that the trainer has launched.

        Lightning's own handler would let a run go on to its end, and wait in a handler for all
        processes to receive the signal, which hangs where one of them does not.
        """

        def stop(signum: int, frame: Any) -> None:
            self._received_sigterm = True
            if not self._has_joined:
                # The files are written, and what is left is a push.
                raise SystemExit(128 + signal.SIGTERM)
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)

        # Elsewhere Python takes no handlers; the trainer puts back the earlier one when it ends.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)

    def _show_progress(self, trainer: pl.Trainer, progress: Sequence[int]) -> None:
        """Show batches, tokens and rows of all processes in the bar of the first."""
        bar_callback = trainer.progress_bar_callback
        bar = getattr(bar_callback, "predict_progress_bar", None)
        if bar is None or not self._ranks.is_first:
            return
        n_batches, n_tokens, n_rows = progress
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if self._ranks.size > 1 and callbacks.index(bar_callback) < callbacks.index(self):
            # The bar has counted the batches of this process alone.
            bar.total = getattr(_data_module(trainer), "n_batches", lambda: None)()
            bar.n = n_batches
        rate = n_tokens / (time.monotonic() - self._started)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s, {n_rows:,} rows kept")

    def _file_progress(self, files: Any, total: int) -> Any:
        if not self._ranks.is_first:
            return files
        share = "" if self._ranks.size == 1 else f" the first of {self._ranks.size} shares"
        return file_progress(files, total, f"Writing{share}")

    def _uncaptured(self) -> ExampleFilter:
        captured = np.empty(0, np.int32) if self._earlier is None else self._earlier.example_ids
        return ExampleFilter(captured, listed=False)

    def _check_space(self, trainer: pl.Trainer, streams: list[dict[str, Any]]) -> None:
        """Compare the room on the disk with what the texts that are left will take."""
        data: Any = _data_module(trainer)
        lengths = data.sequence_lengths() if hasattr(data, "sequence_lengths") else None
        if lengths is not None:
            rows = sum(expected_rows_by_bucket(self._sampler, lengths).values())
            dtype = str(next(self._backbone.parameters()).dtype).removeprefix("torch.")
            check_space(
                self.data_root,
                journal_bytes(streams, dtype, rows),
                head_files_bytes(streams, dtype, rows),
            )


def _data_module(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    return getattr(trainer, "datamodule", None)


def _require_same(fingerprints: list[dict[str, Any]]) -> None:
    """See that all processes have loaded one model and have one config."""
    for rank, other in enumerate(fingerprints):
        differing = [name for name, value in fingerprints[0].items() if other.get(name) != value]
        if differing:
            raise UserError(
                f"{differing[0]}: rank {rank} and rank 0 differ in {', '.join(differing)}; give all "
                "nodes the same config and the same model"
            )


def _reason(exception: BaseException) -> str:
    """What the other processes are told of the end of this one."""
    if isinstance(exception, UserError):
        return str(exception)
    if isinstance(exception, KeyboardInterrupt):
        return "interrupted"
    if isinstance(exception, SystemExit):
        return "stopped by SIGTERM" if exception.code == 128 + signal.SIGTERM else "stopped"
    return f"{type(exception).__name__}: {first_line(exception)}"
