"""How far a run is, in the progress bar and in the trainer's loggers."""

import time
from contextlib import suppress
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

_SECONDS = 60.0
"""Where batches take long, loggers are told this often."""


class Progress(NamedTuple):
    """What was read, kept over all heads, and written, by one process or by all."""

    batches: int
    texts: int
    tokens: int
    rows: int
    bytes: int


class ProgressReport:
    """Tells the progress of all processes of a run, from its first one.

    Args:
        trainer: Has the bar and the loggers.
        settings: What the loggers keep of the run's config.
    """

    def __init__(self, trainer: pl.Trainer, settings: dict[str, Any]) -> None:
        self._trainer = trainer
        self._started = self._last = time.monotonic()
        self._logged = Progress(0, 0, 0, 0, 0)
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)

    def show(self, progress: Progress, n_batches: int | None = None) -> None:
        """Set the numbers beside the bar, and log them every ``log_every_n_steps`` batches.

        They are logged as well when they were not for a minute.

        Args:
            progress: That of all processes.
            n_batches: All batches, where the bar has counted those of one process alone; else None.
        """
        bar = progress_bar(self._trainer)
        if bar is not None:
            if n_batches is not None:
                bar.total, bar.n = n_batches, progress.batches
            bar.set_postfix_str(f"{self._rate(progress):,.0f} tokens/s, {progress.rows:,} rows kept")
        every: Any = getattr(self._trainer, "log_every_n_steps", None)
        if not every:
            return
        is_due = progress.batches // every > self._logged.batches // every
        if is_due or time.monotonic() - self._last >= _SECONDS:
            self.log(progress)

    def log(self, progress: Progress) -> None:
        """Log the numbers now if they are others, with the batches as the step."""
        if progress == self._logged:
            return
        self._logged, self._last = progress, time.monotonic()
        metrics = {
            "texts_read": progress.texts,
            "tokens_read": progress.tokens,
            "tokens_per_second": self._rate(progress),
            "rows_kept": progress.rows,
            "bytes_written": progress.bytes,
            **_device_memory(),
        }
        for logger in self._trainer.loggers:
            logger.log_metrics(
                {name: float(value) for name, value in metrics.items()}, step=progress.batches
            )
            logger.save()

    def _rate(self, progress: Progress) -> float:
        return progress.tokens / (time.monotonic() - self._started)


def _device_memory() -> dict[str, int]:
    """The most that tensors of this process have taken on one of its devices, in bytes.

    The host counts that itself, so that nothing waits for a device.
    """
    if not torch.cuda.is_available():
        return {}
    devices = range(torch.cuda.device_count())
    return {"device_memory_peak": max(torch.cuda.max_memory_allocated(device) for device in devices)}


def progress_bar(trainer: pl.Trainer) -> Any:
    """The bar of tqdm over the batches; None where there is none, or not yet."""
    with suppress(TypeError):
        return getattr(trainer.progress_bar_callback, "predict_progress_bar", None)
    return None
