"""How far a run is, in the progress bar and in the trainer's loggers."""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl


class ProgressReport:
    """Tells batches, tokens and rows of all processes of a run, from its first one.

    Args:
        trainer: Has the bar and the loggers.
        settings: What the loggers keep of the run's config.
    """

    def __init__(self, trainer: pl.Trainer, settings: dict[str, Any]) -> None:
        self._trainer = trainer
        self._started = time.monotonic()
        self._logged = 0
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)

    def show(self, progress: Sequence[int], n_batches: int | None = None) -> None:
        """Set the numbers beside the bar, and log them every ``log_every_n_steps`` batches.

        Args:
            progress: Batches and tokens that were read, and rows that were kept.
            n_batches: All batches, where the bar has counted those of one process alone; else None.
        """
        batches, tokens, rows = progress
        rate = tokens / (time.monotonic() - self._started)
        bar = progress_bar(self._trainer)
        if bar is not None:
            if n_batches is not None:
                bar.total, bar.n = n_batches, batches
            bar.set_postfix_str(f"{rate:,.0f} tokens/s, {rows:,} rows kept")
        every: Any = getattr(self._trainer, "log_every_n_steps", None)
        if every and batches // every > self._logged // every:
            self.log(progress)

    def log(self, progress: Sequence[int]) -> None:
        """Log the numbers now, with the batches as the step."""
        batches, tokens, rows = progress
        if batches == self._logged:
            return
        self._logged = batches
        rate = tokens / (time.monotonic() - self._started)
        metrics = {"tokens_per_second": rate, "tokens_read": tokens, "rows_kept": rows}
        for logger in self._trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in metrics.items()}, step=batches)
            logger.save()


def progress_bar(trainer: pl.Trainer) -> Any:
    """The bar of tqdm over the batches; None where there is none, or not yet."""
    with suppress(TypeError):
        return getattr(trainer.progress_bar_callback, "predict_progress_bar", None)
    return None
