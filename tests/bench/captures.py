"""A capture against the bare forward, and how long the end of a batch holds up the loop."""

import tempfile
from statistics import median
from typing import Any, NamedTuple

from bench.loops import Pairs, predict, timed
from bench.tables import section
from bench.texts import ALL, BATCH_SIZE, DOCUMENTS, TOKENS, UNIFORM, config, documents
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.config import OutputConfig
from qk_sniffer.data import TextDataModule

CAPTURES = {
    "log_uniform, buckets from 128": (config("log_uniform", 128), False, ""),
    "uniform, buckets of 128": (UNIFORM, False, "at most 1.02"),
    "uniform, buckets of 8,192": (config("uniform", 8192), False, ""),
    "all": (ALL, False, "at most 1.05"),
    "uniform, buckets of 128, with its check": (UNIFORM, True, ""),
}
"""What is captured, whether the first 512 tokens are read once more to check it, and the goal for the
loop against the bare loop."""


class TimedSniffer(SnifferCallback):
    """Keeps the seconds that each batch's flush holds up the loop."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.flushes: list[float] = []

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.flushes.append(
            timed(lambda: super(TimedSniffer, self).on_predict_batch_end(*args, **kwargs))
        )


class Sample(NamedTuple):
    """Seconds of one run: its loop, closing, and median flush, and a bare loop around it."""

    loop: float
    close: float
    flush: float
    bare: float


def time_captures(repetitions: int) -> str:
    """Run every capture in turn, and read each batch barely too, or all of them before and after."""
    samples: dict[str, list[Sample]] = {name: [] for name in CAPTURES}
    with documents(DOCUMENTS) as data:
        predict(data)
        for _ in range(repetitions):
            for name, (capture, check, _) in CAPTURES.items():
                with tempfile.TemporaryDirectory() as root:
                    sniffer = TimedSniffer(OutputConfig(root), capture, check)
                    sample = between_loops if name == "all" else by_pairs
                    samples[name].append(sample(data, sniffer))
    return f"{captures_section(samples)}\n\n{flush_section(samples['all'])}"


def between_loops(data: TextDataModule, sniffer: TimedSniffer) -> Sample:
    """A capture whose writing goes on beside the next batch, with a bare loop before and behind."""
    before, _ = predict(data)
    loop, close = predict(data, sniffer)
    after, _ = predict(data)
    return Sample(loop, close, median(sniffer.flushes), (before + after) / 2)


def by_pairs(data: TextDataModule, sniffer: TimedSniffer) -> Sample:
    """A capture that writes little, with each batch read barely too."""
    pairs = Pairs()
    _, close = predict(data, pairs.begin, sniffer, pairs.end)
    return Sample(sum(pairs.captured), close, median(sniffer.flushes), sum(pairs.bare))


def captures_section(samples: dict[str, list[Sample]]) -> str:
    bare = median(sample.bare for runs in samples.values() for sample in runs)
    rows = [("", "loop, s", "loop / bare", "range", "goal", "closing, s", "(loop + closing) / bare")]
    rows.append(("bare forward", f"{bare:.2f}", "1", "", "", "", "1"))
    for name, runs in samples.items():
        ratios = [run.loop / run.bare for run in runs]
        rows.append(
            (
                name,
                f"{median(run.loop for run in runs):.2f}",
                f"{median(ratios):.3f}",
                f"{min(ratios):.3f} - {max(ratios):.3f}",
                CAPTURES[name][2],
                f"{median(run.close for run in runs):.2f}",
                f"{median((run.loop + run.close) / run.bare for run in runs):.3f}",
            )
        )
    return section(
        "Capture",
        f"{DOCUMENTS} x {TOKENS:,} tokens in batches of {BATCH_SIZE}, medians of {len(runs)}. Each "
        "batch is read barely too, right before or behind; for `all`, whose writing goes on beside the "
        "next batch, bare is the mean of the bare loops before and after. Closing is what follows the "
        "loop: the rest of the journal, and the Parquet files. Probing and hashing the weights come "
        "before the loop and are in neither.",
        *rows,
    )


def flush_section(runs: list[Sample]) -> str:
    batches = -(-DOCUMENTS // BATCH_SIZE)
    flush = median(run.flush for run in runs)
    share = median(run.flush * batches / run.bare for run in runs)
    return section(
        "Flush of `all`",
        f"How long the end of a batch holds up the loop: the median of {batches} batches in each run.",
        ("", "ms a batch", "share of the forward"),
        ("bare forward", f"{1000 * median(run.bare for run in runs) / batches:.0f}", "100 %"),
        ("flush_batch and commit", f"{1000 * flush:.2f}", f"{100 * share:.2f} %"),
    )
