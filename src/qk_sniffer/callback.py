"""SnifferCallback: owns the recording of one prediction, from the data root it finds to its files."""

import logging
import shlex
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from tqdm.auto import tqdm

from qk_sniffer.capture import (
    CapturedHeads,
    heads_to_capture,
    sampler_of,
)
from qk_sniffer.config import CaptureConfig, OutputConfig
from qk_sniffer.data import batch_fields
from qk_sniffer.errors import UserError
from qk_sniffer.hub import Publication, check_access, pull, push
from qk_sniffer.ids import ExampleFilter
from qk_sniffer.models import (
    begin_batch_of_like_frequencies,
    check_capture,
    check_passages,
    probe_attention,
    require_known_tokens,
)
from qk_sniffer.module import SnifferModule
from qk_sniffer.processes import ALONE, Ranks, Stopped, await_launched, end_in_order, reason_of
from qk_sniffer.processes import stop as stop_command
from qk_sniffer.recording import (
    ProgressReport,
    Recorder,
    TextsAhead,
    TextWarnings,
    describe,
    fingerprint,
    leave_out_advertisements,
    progress_bar,
    require_space,
    settings,
)
from qk_sniffer.storage import (
    CONFIG_FILE,
    JOURNAL_DIRECTORY,
    EarlierRun,
    Ownership,
    clear_data_root,
    data_root_path,
    discard_pulled,
    earlier_run,
    file_progress,
    finalize,
    prepare_data_root,
    published_table,
    require_captured,
    require_shared,
    summary_table,
    write_text,
)

T = TypeVar("T")

log = logging.getLogger(__name__)


class SnifferCallback(pl.Callback):
    """Captures queries and keys while a trainer predicts, and writes one Parquet file per head.

    It works in any trainer whose module keeps its decoder in ``backbone`` and runs it under
    ``qk_sniffer.models.capture_attention``, as ``SnifferModule`` does, and whose batches are like those
    of ``TextDataModule``: ``input_ids`` and ``example_ids``, and what ``batch_fields`` takes beside
    them. In a run of several processes each captures what it reads, and all share the data root.
    Loggers of the trainer are given the settings, tokens per second and rows kept.

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
        leave_out_advertisements()
        self.output = output
        self.capture = capture
        self.check = check
        self.data_root = data_root_path(output.data_root)
        self.config_yaml: str | None = None
        """The resolved config to save in the data root; the command line sets it."""
        self._sampler = sampler_of(asdict(capture))
        self._ranks = ALONE
        self._has_joined = False
        self._ownership = Ownership(self.data_root)
        self._earlier: EarlierRun | None = None
        self._publication: Publication | None = None
        self._recorder: Recorder | None = None
        self._received_sigterm = self._is_reading = False
        self._started = 0.0

    def check_output(self, *, n_nodes: int = 1) -> None:
        """Take the data root for this run, and repair what an interrupted one left there.

        The first process does so for all.

        Args:
            n_nodes: Hosts that the processes of the run are on.

        Raises:
            UserError: It belongs to another run, is not writable, or holds what can't be continued or
                replaced.
        """
        self._ownership.take(n_nodes)
        try:
            prepare_data_root(self.data_root, self.output.overwrite)
        except UserError:
            self._ownership.release()
            raise

    def release_output(self) -> None:
        """Give the data root free for other runs."""
        self._ownership.release()

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
        """Finish files that an earlier run has begun, and see that the model knows the tokens."""
        self._join(trainer)
        self._ranks.first(lambda: _check_tokens(TextsAhead(trainer), pl_module))
        if self._earlier is not None:
            if self._ranks.is_first:
                n_texts = self._earlier.example_ids.size
                tqdm.write(f"{self.data_root}: going on after {n_texts:,} texts")
            if self._earlier.finalizing:
                finalize(self.data_root, self._file_progress, ranks=self._ranks)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the model's heads, open the journal and make the sniffer active."""
        self._stop_on_sigterm(trainer)
        self._backbone = _backbone_of(pl_module)
        ranks, texts = self._ranks, TextsAhead(trainer)
        if self.capture.capture_token_strings and texts.tokenizer is None:
            raise UserError(
                "sniffer.capture.capture_token_strings: the trainer has no TextDataModule to take the "
                "tokenizer from; pass one as datamodule, or set it to false"
            )
        header, self._heads = ranks.run(lambda: self._describe(trainer, pl_module))
        ranks.require_same(header["fingerprint"])
        lengths = texts.sequence_lengths()
        ranks.first(
            lambda: require_space(
                self.data_root,
                self._sampler,
                lengths,
                header["streams"],
                next(self._backbone.parameters()).dtype,
            )
        )
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
                texts.tokenizer,
                texts.own_batches(),
            )
        )
        # Of several processes one warns.
        self._text_warnings = (
            TextWarnings(self._sampler, lengths, header["n_positions"]) if ranks.is_first else None
        )
        self._checked = not self.check
        self._is_reading = True
        self._unsaved_config = self.config_yaml
        self._started = time.monotonic()
        if ranks.is_first:
            self._progress = ProgressReport(trainer, header["settings"])

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
            UserError: A field of the batch is missing or wrong, the model doesn't know one of its
                tokens, or the check fails.
        """
        assert self._recorder is not None
        self._fields = fields = batch_fields(batch)
        smallest, largest = fields.input_ids.aminmax()
        require_known_tokens(int(smallest), int(largest), self._backbone)
        if self._text_warnings is not None:
            self._text_warnings.see(fields.sequence_lengths)
        if not isinstance(pl_module, SnifferModule):
            # That one takes texts apart by itself.
            begin_batch_of_like_frequencies(
                self._backbone, [*fields.sequence_lengths.tolist(), fields.input_ids.shape[1]]
            )
        if not self._checked:
            tokens = batch["input_ids"][:1, : int(fields.sequence_lengths[0])]
            check_capture(self._backbone, tokens, list(self._heads))
            if pl_module.hparams.get("prefill_chunk_size") is not None:
                check_passages(self._backbone, tokens)
            self._checked = True
        self._recorder.begin_batch(fields)

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
            Stopped: A SIGTERM came.
            SystemExit: Another process died.
        """
        assert self._recorder is not None
        self._recorder.end_batch(self._fields, before_saving=self._ownership.require)
        self._save_config()
        lifeline = self._ranks.lifeline
        if lifeline is not None:
            lifeline.progress = self._recorder.progress
            if lifeline.failure is not None:
                raise SystemExit(1)
        if self._ranks.is_first:
            progress = lifeline.total_progress() if lifeline else self._recorder.progress
            self._progress.show(progress, self._all_batches(trainer))
        if self._received_sigterm:
            raise Stopped(signal.SIGTERM)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show and log what all processes have read, when the last of them has."""
        assert self._recorder is not None
        self._is_reading = False
        if self._received_sigterm:
            raise Stopped(signal.SIGTERM)
        gathered = self._ranks.gather(self._recorder.progress)
        progress = [sum(numbers) for numbers in zip(*gathered, strict=True)]
        if self._ranks.is_first:
            self._progress.show(progress, self._all_batches(trainer))
            self._progress.log(progress)
        n_batches = progress[0]
        if n_batches > 0 or not (self.data_root / CONFIG_FILE).exists():
            self._save_config()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the Parquet files, card and manifest, print what there is, and publish it."""
        assert self._recorder is not None
        ranks = self._ranks
        ranks.run(self._recorder.close)
        ranks.first(self._ownership.require)
        limit = trainer.limit_predict_batches
        complete = isinstance(limit, float) and limit == 1.0
        planned = TextsAhead(trainer).example_ids
        if complete and planned is not None:
            ranks.first(lambda: require_captured(self.data_root, planned))
        manifest = finalize(self.data_root, self._file_progress, complete=complete, ranks=ranks)
        if ranks.is_first:
            seconds = time.monotonic() - self._started
            tqdm.write(summary_table(self.data_root, manifest, seconds=seconds))
        # The others need not wait for uploads.
        self._leave(None)
        if not ranks.is_first:
            self._ownership.release()
        if self._publication is not None:
            self._ownership.require()
            push(self.data_root, self._publication)
            tqdm.write(published_table(self._publication.place, manifest))
        self._ownership.release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the journal, tell the other processes, and say where the captured rows are."""
        end_in_order()
        if not self._has_joined:
            self._ownership.release()
            return
        try:
            if self._recorder is not None:
                self._recorder.close()
        except UserError as error:
            log.warning("%s", error)
        is_first, watched = self._ranks.is_first, self._ranks.lifeline is not None
        if isinstance(exception, UserError | Stopped) and watched and not is_first:
            exception.is_told = True
        holds_rows = self._recorder is not None and (self.data_root / JOURNAL_DIRECTORY).exists()
        self._leave(reason_of(exception))
        await_launched(trainer)
        self._ownership.release()
        if (bar := progress_bar(trainer)) is not None:
            bar.close()
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
        self._recorder, self._received_sigterm, self._is_reading = None, False, False
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
        ranks.first(lambda: self.check_output(n_nodes=trainer.num_nodes))
        require_shared(self.data_root, ranks)
        if not ranks.is_first:
            self._ownership.join()
        module, data = trainer.lightning_module, TextsAhead(trainer).data
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
        run_settings = settings(pl_module, TextsAhead(trainer).data, config)
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
        """While texts are read, note a SIGTERM, and pass it on to the processes that were launched.

        Lightning's own handler would let a run go on to its end, and wait in a handler for all
        processes to receive the signal, which hangs where one of them does not.
        """

        def stop(signum: int, frame: Any) -> None:
            if not self._is_reading:
                stop_command(signum)
                return
            self._received_sigterm = True
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)

        # Elsewhere Python takes no handlers; the trainer puts back the earlier one when it ends.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)

    def _all_batches(self, trainer: pl.Trainer) -> int | None:
        """The batches of all processes, where the bar counts those of this one alone; else None."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        bar = trainer.progress_bar_callback
        if bar is None or self._ranks.size == 1 or callbacks.index(bar) > callbacks.index(self):
            return None
        return TextsAhead(trainer).n_batches()

    def _file_progress(self, files: Any, total: int) -> Any:
        if not self._ranks.is_first:
            return files
        share = "" if self._ranks.size == 1 else f" the first of {self._ranks.size} shares"
        return self._while_owned(file_progress(files, total, f"Writing{share}"))

    def _while_owned(self, files: Iterable[T]) -> Iterator[T]:
        for file in files:
            self._ownership.require()
            yield file

    def _uncaptured(self) -> ExampleFilter:
        captured = np.empty(0, np.int32) if self._earlier is None else self._earlier.example_ids
        return ExampleFilter(captured, listed=False)


def _backbone_of(module: pl.LightningModule) -> nn.Module:
    backbone = getattr(module, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise UserError(
            f"SnifferCallback: {type(module).__name__} has no backbone; let it keep its decoder there, "
            "qk_sniffer.models.decoder_backbone(model), and run it under capture_attention, or use "
            "SnifferModule"
        )
    return backbone


def _check_tokens(texts: TextsAhead, module: Any) -> None:
    """See before the weights are loaded that the model knows all tokens, where these are known."""
    token_range = texts.token_range()
    if token_range is not None and hasattr(module, "check_tokens"):
        module.check_tokens(*token_range)
