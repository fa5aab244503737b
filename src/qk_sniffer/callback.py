"""SnifferCallback: owns the recording of one prediction, from the data root it finds to its files."""

import logging
import signal
import time
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from tqdm.auto import tqdm

from qk_sniffer.capture import CapturedHeads, ModelShard, Selection, heads_to_capture
from qk_sniffer.config import CaptureConfig, MomentsConfig, OutputConfig, require_something
from qk_sniffer.data import BatchFields, batch_fields
from qk_sniffer.errors import UserError
from qk_sniffer.ids import ExampleFilter, OnceEach
from qk_sniffer.kinds import parts_of
from qk_sniffer.models import (
    AttentionMap,
    begin_batch_of_like_frequencies,
    check_capture,
    check_passages,
    probe_attention,
    require_known_tokens,
    require_unrotated,
)
from qk_sniffer.module import SnifferModule
from qk_sniffer.processes import (
    ALONE,
    DeferredSigterm,
    Ranks,
    Stopped,
    await_launched,
    end_in_order,
    end_with_another,
    reason_of,
)
from qk_sniffer.recording import (
    Offer,
    OwnDataRoot,
    Progress,
    ProgressReport,
    Recorder,
    TextsAhead,
    TextWarnings,
    agree,
    describe,
    leave_out_advertisements,
    progress_bar,
    require_listed,
    require_space,
    settings,
)
from qk_sniffer.storage import (
    CONFIG_FILE,
    JOURNAL_DIRECTORY,
    EarlierRun,
    require_captured,
    require_shared,
    summary_table,
)

log = logging.getLogger(__name__)


class SnifferCallback(pl.Callback):
    """Captures queries and keys while a trainer predicts, and writes one Parquet file per head.

    It works in any trainer whose module keeps its decoder in ``backbone`` and runs it under
    ``qk_sniffer.models.capture_attention``, as ``SnifferModule`` does, and whose batches are like those
    of ``TextDataModule``: ``input_ids`` and ``example_ids``, and what ``batch_fields`` takes beside
    them. In a run of several processes each captures what it reads, and all share the data root.
    Loggers of the trainer are given the settings, and while it runs what was read, kept and written.

    Args:
        output: Where the captured vectors go.
        capture: What is captured.
        check: Recompute attention in a few layers and heads on up to 512 tokens of the first batch,
            from the captured vectors, and stop where it differs from the model's own; or where the
            model reads passages otherwise than the whole.
        moments: Moments of every token, which are summed beside the rows.
    """

    def __init__(
        self,
        output: OutputConfig,
        capture: CaptureConfig = CaptureConfig(),  # noqa: B008
        check: bool = True,
        moments: MomentsConfig = MomentsConfig(),  # noqa: B008
    ) -> None:
        require_something(capture, moments)
        leave_out_advertisements()
        self.output = output
        self.capture = capture
        self.check = check
        self.moments = moments
        self.own_data_root = OwnDataRoot(output)
        self.data_root = self.own_data_root.path
        self._selection = Selection.of(capture.as_settings())
        self._ranks = ALONE
        self._has_joined = False
        self._earlier: EarlierRun | None = None
        self._recorder: Recorder | None = None
        self._sigterm = DeferredSigterm()
        self._started = 0.0

    def example_filter(self, trainer: pl.Trainer) -> ExampleFilter:
        """The texts that the data module reads: those that no earlier run has captured and counted."""
        self._join(trainer)
        return self._left("done_ids")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finish files that an earlier run has begun, and see that the model can read the texts."""
        self._join(trainer)
        self._ranks.first(lambda: _check_texts(TextsAhead(trainer), pl_module))
        if self._earlier is not None:
            if self._ranks.is_first:
                n_texts = self._earlier.example_ids.size
                tqdm.write(f"{self.data_root}: going on after {n_texts:,} texts")
            if self._earlier.finalizing:
                self.own_data_root.finalize(self._ranks)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the model's heads, open the journal and make the sniffer active."""
        self._sigterm.handle(trainer.strategy.launcher)
        self._backbone = _backbone_of(pl_module)
        ranks, texts = self._ranks, TextsAhead(trainer)
        if self.capture.capture_token_strings and texts.tokenizer is None:
            raise UserError(
                "sniffer.capture.capture_token_strings: the trainer has no TextDataModule to take the "
                "tokenizer from; pass one as datamodule, or set it to false"
            )
        attention = ranks.run(self._probe, together=True)
        held = attention.layers
        if ranks.model_size > 1:
            module: Any = pl_module
            shares = ranks.gather_in_model(held)
            whole = ranks.run(lambda: module.whole_layers(shares))
            attention = replace(attention, layers=whole)
        header, self._heads = ranks.run(
            lambda: self._describe(trainer, pl_module, attention), together=True
        )
        ranks.require_same(header["fingerprint"])
        lengths, listed = texts.sequence_lengths(), texts.listed_positions()
        ranks.first(
            lambda: require_space(
                self.data_root,
                self._selection,
                lengths,
                listed,
                header["streams"],
                next(self._backbone.parameters()).dtype,
                self.moments,
                ranks.n_readers,
                ranks.model_size,
            )
        )
        ranks.first(lambda: self.own_data_root.make_ready(self._earlier, header))
        self._recorder = ranks.run(
            lambda: Recorder(
                self.capture,
                self._selection,
                self._heads,
                self.data_root / JOURNAL_DIRECTORY,
                header,
                ranks.rank,
                self._left("example_ids"),
                texts.tokenizer,
                texts.own_batches(),
                self.moments,
                self._left("counted_ids"),
                ModelShard(ranks.shard, ranks.model_size),
                held,
            )
        )
        # Of several processes one warns.
        self._text_warnings = (
            TextWarnings(
                self._selection,
                lengths,
                listed,
                header["n_positions"],
                getattr(texts.tokenizer, "bos_token_id", None),
            )
            if ranks.is_first
            else None
        )
        self._checked = not self.check
        self._is_new, self._once_each = self._left("done_ids"), OnceEach()
        self._sigterm.is_deferred = True
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
            UserError: A field of the batch is missing or wrong, one of its texts has come before, the
                model doesn't know one of its tokens, or the check fails.
        """
        assert self._recorder is not None
        self._fields = fields = batch_fields(batch, listed=self._selection.needs_lists)
        self._agree(fields)
        smallest, largest = fields.input_ids.aminmax()
        require_known_tokens(int(smallest), int(largest), self._backbone)
        if self._text_warnings is not None:
            self._text_warnings.see(fields)
        if not isinstance(pl_module, SnifferModule):
            # That one takes texts apart by itself.
            begin_batch_of_like_frequencies(
                self._backbone, [*fields.sequence_lengths.tolist(), fields.input_ids.shape[1]]
            )
        self._once_each.note(fields.example_ids[self._is_new(fields.example_ids)])
        if not self._checked and fields.sequence_lengths.any():
            number = int((fields.sequence_lengths > 0).nonzero()[0])
            length = int(fields.sequence_lengths[number])
            tokens = batch["input_ids"][number : number + 1, :length]
            with self._ranks.reading_together():
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
            SystemExit: Another process ended.
        """
        assert self._recorder is not None
        self._recorder.end_batch(
            self._fields, before_saving=self.own_data_root.ownership.require, due=self._due
        )
        if self._ranks.is_first:
            # Not before: the config that is there describes what was captured earlier.
            self.own_data_root.save_config()
        lifeline = self._ranks.lifeline
        if lifeline is not None:
            lifeline.progress = self._recorder.progress
            if lifeline.failure is not None:
                end_with_another()
        if self._ranks.is_first:
            progress = self._recorder.progress
            if lifeline is not None:
                progress = Progress(*lifeline.total_progress())
            self._progress.show(progress, self._all_batches(trainer))
        if self._due is None:
            self._sigterm.raise_where_it_came()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the journal, then show and log what all processes have read."""
        assert self._recorder is not None
        self._agree(None)
        self._sigterm.is_deferred = False
        self._sigterm.raise_where_it_came()
        # The last rows are written first, so that the bytes are all of them.
        self._recorder.finish(self._ranks)
        gathered = self._ranks.gather(self._recorder.progress)
        progress = Progress(*(sum(numbers) for numbers in zip(*gathered, strict=True)))
        if self._ranks.is_first:
            self._progress.show(progress, self._all_batches(trainer))
            self._progress.log(progress)
            if progress.batches > 0 or not (self.data_root / CONFIG_FILE).exists():
                self.own_data_root.save_config()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the Parquet files, card and manifest, print what there is, and publish it."""
        assert self._recorder is not None
        ranks = self._ranks
        ranks.first(self.own_data_root.ownership.require)
        limit = trainer.limit_predict_batches
        complete = isinstance(limit, float) and limit == 1.0
        planned = TextsAhead(trainer).example_ids
        if complete and planned is not None:
            ranks.first(lambda: require_captured(self.data_root, planned))
        manifest = self.own_data_root.finalize(ranks, complete=complete)
        if ranks.is_first:
            seconds = time.monotonic() - self._started
            tqdm.write(summary_table(self.data_root, manifest, seconds=seconds))
        # The others need not wait for uploads.
        self._leave(None)
        if ranks.is_first:
            self.own_data_root.publish(manifest)
        self.own_data_root.ownership.release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the journal, tell the other processes, and say where the captured rows are."""
        end_in_order()
        if not self._has_joined:
            self.own_data_root.ownership.release()
            return
        try:
            if self._recorder is not None:
                self._recorder.close()
        except UserError as error:
            if error is not exception:
                log.warning("%s", error)
        is_first, watched = self._ranks.is_first, self._ranks.lifeline is not None
        if isinstance(exception, UserError | Stopped) and watched and not is_first:
            exception.is_told = True
        holds_rows = self._recorder is not None and self.own_data_root.holds_rows
        self._leave(reason_of(exception))
        await_launched(trainer, self._ranks.model_size)
        self.own_data_root.ownership.release()
        if (bar := progress_bar(trainer)) is not None:
            bar.close()
        if holds_rows and is_first:
            self.own_data_root.warn_how_to_go_on()

    def _join(self, trainer: pl.Trainer) -> None:
        """Meet the other processes, and learn together what the data root holds.

        Raises:
            UserError: They don't share it, or it can't take this run.
        """
        if self._has_joined:
            return
        self._has_joined = True
        self._recorder, self._sigterm = None, DeferredSigterm()
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
        ranks.first(lambda: self.own_data_root.take(n_nodes=trainer.num_nodes))
        require_shared(self.data_root, ranks)
        if not ranks.is_first:
            self.own_data_root.ownership.join()
        module: Any = trainer.lightning_module
        check_heads = getattr(module, "check_heads", None)
        if check_heads is not None:
            ranks.first(lambda: check_heads(self.capture.as_settings()))
        data = TextsAhead(trainer).data
        ranks.first(lambda: require_listed(self.capture.sampler, data))
        run_settings = settings(module, data, self.capture, self.moments)
        self._earlier = ranks.first(lambda: self.own_data_root.pull_earlier_run(run_settings))

    def _leave(self, reason: str | None) -> None:
        self._ranks.leave(reason)
        self._has_joined = False

    def _agree(self, fields: BatchFields | None) -> None:
        """Let the processes that share a model agree on a batch, and end together where one is to.

        Args:
            fields: The batch; None where there is no other.

        Raises:
            UserError: They were given different batches.
            Stopped: A SIGTERM has come to one of them.
        """
        assert self._recorder is not None
        self._due = None
        if self._ranks.model_size > 1:
            offer = Offer.of(fields, self._recorder.due, is_stopped=self._sigterm.has_come)
            offers = self._ranks.gather_in_model(offer)
            self._due = agree(offers)
            if any(offer.is_stopped for offer in offers):
                raise Stopped(signal.SIGTERM)

    def _probe(self) -> AttentionMap:
        """What is seen of the attention of the model, or of this process's part of it."""
        config = self.capture
        parts = parts_of(config.as_settings())
        attention = probe_attention(self._backbone, parts, pre_rope=config.capture_pre_rope)
        if self.moments.pre_rope:
            require_unrotated(attention, "sniffer.moments.pre_rope")
        return attention

    def _describe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, attention: AttentionMap
    ) -> tuple[dict[str, Any], dict[int, CapturedHeads]]:
        """The header of the journal, the same in all processes, and the captured heads by layer."""
        run_settings = settings(pl_module, TextsAhead(trainer).data, self.capture, self.moments)
        heads = heads_to_capture(run_settings["capture"], attention.layers)
        template = TextsAhead(trainer).chat_template
        return describe(run_settings, self._backbone, attention, heads, template), heads

    def _all_batches(self, trainer: pl.Trainer) -> int | None:
        """The batches of all processes, where the bar counts those of this one alone; else None."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        bar = trainer.progress_bar_callback
        if bar is None or self._ranks.size == 1 or callbacks.index(bar) > callbacks.index(self):
            return None
        return TextsAhead(trainer).n_batches()

    def _left(self, done: Literal["example_ids", "counted_ids", "done_ids"]) -> ExampleFilter:
        """The texts that no earlier run has captured, or counted, or both."""
        ids = np.empty(0, np.int32) if self._earlier is None else getattr(self._earlier, done)
        return ExampleFilter(ids, listed=False)


def _backbone_of(module: pl.LightningModule) -> nn.Module:
    backbone = getattr(module, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise UserError(
            f"SnifferCallback: {type(module).__name__} has no backbone; let it keep its decoder there, "
            "qk_sniffer.models.decoder_backbone(model), and run it under capture_attention, or use "
            "SnifferModule"
        )
    return backbone


def _check_texts(texts: TextsAhead, module: Any) -> None:
    """See before the weights are loaded that the model can read the texts, where these are known."""
    token_range, lengths = texts.token_range(), texts.sequence_lengths()
    if token_range is not None and hasattr(module, "check_tokens"):
        module.check_tokens(*token_range)
    if lengths is not None and lengths.numel() and hasattr(module, "check_length"):
        module.check_length(int(lengths.max()))
