"""A prediction in this process, and the seconds of its loop, its batches and its end."""

import contextlib
import io
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from bench.texts import model
from qk_sniffer.data import TextDataModule
from qk_sniffer.module import SnifferModule


class LoopTimer(Callback):
    """Seconds from the first batch's start to the last batch's end; it must come first."""

    started = seconds = 0.0

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.started


class Pairs:
    """Seconds of each batch, read barely and with the callbacks between ``begin`` and ``end``, in turn.

    What takes its time when a batch has ended must be little: it would count as the bare one's.
    """

    def __init__(self) -> None:
        self.bare: list[float] = []
        self.captured: list[float] = []
        self.begin, self.end = _Begin(self), _End(self)
        self.started = 0.0

    def more(self) -> list[float]:
        """More seconds of each batch than of the bare one."""
        return [ours - bare for ours, bare in zip(self.captured, self.bare, strict=True)]

    def read_barely(self, module: Any, batch: Any, is_turn: bool) -> None:
        if is_turn:
            tokens = batch["input_ids"]
            self.bare.append(timed(lambda: module.backbone(input_ids=tokens, use_cache=False)))


class _Begin(Callback):
    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._pairs.read_barely(pl_module, batch, batch_idx % 2 == 0)
        self._pairs.started = time.perf_counter()


class _End(Callback):
    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def on_predict_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._pairs.captured.append(time.perf_counter() - self._pairs.started)
        self._pairs.read_barely(pl_module, batch, batch_idx % 2 == 1)


def timed(task: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    task()
    return time.perf_counter() - started


def quiet_trainer(*callbacks: Callback, accelerator: str = "cpu") -> pl.Trainer:
    """A trainer of one device that keeps and shows nothing."""
    return pl.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
    )


def predict(
    data: TextDataModule, *callbacks: Callback, module: SnifferModule | None = None
) -> tuple[float, float]:
    """Seconds of the loop and of what follows it: closing, and writing the Parquet files."""
    timer = LoopTimer()
    trainer = quiet_trainer(timer, *callbacks)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.predict(module or model(), datamodule=data, return_predictions=False)
    close = time.perf_counter() - timer.started - timer.seconds
    return timer.seconds, close
