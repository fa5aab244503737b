"""Moments of every token against the bare forward."""

import tempfile
from statistics import median

from bench.captures import Sample, TimedSniffer, by_pairs
from bench.loops import predict
from bench.tables import section
from bench.texts import BATCH_SIZE, DOCUMENTS, TOKENS, UNIFORM, config, documents
from qk_sniffer.config import CaptureConfig, MomentsConfig, OutputConfig

NONE = config("none", 128)
SUMMED = MomentsConfig(enabled=True)
CAPTURES: dict[str, tuple[CaptureConfig, MomentsConfig, str]] = {
    "moments alone": (NONE, SUMMED, "at most 1.03"),
    "with uniform, buckets of 128": (UNIFORM, SUMMED, ""),
    "alone, by bucket, from 128": (NONE, MomentsConfig(enabled=True, by_bucket=True), ""),
    "alone, both stages": (NONE, MomentsConfig(enabled=True, pre_rope=True), ""),
    "alone, with queries and keys together": (NONE, MomentsConfig(enabled=True, cross=True), ""),
}
"""What is captured, which moments are summed, and the goal for the loop against the bare loop."""


def time_moments(repetitions: int) -> str:
    """Run every capture in turn, and read each batch barely too."""
    samples: dict[str, list[Sample]] = {name: [] for name in CAPTURES}
    with documents(DOCUMENTS) as data:
        predict(data)
        for _ in range(repetitions):
            for name, (capture, moments, _) in CAPTURES.items():
                with tempfile.TemporaryDirectory() as root:
                    sniffer = TimedSniffer(OutputConfig(root), capture, False, moments)
                    samples[name].append(by_pairs(data, sniffer))
    rows = [("", "loop / bare", "range", "goal", "closing, s")]
    for name, runs in samples.items():
        ratios = [run.loop / run.bare for run in runs]
        rows.append(
            (
                name,
                f"{median(ratios):.3f}",
                f"{min(ratios):.3f} - {max(ratios):.3f}",
                CAPTURES[name][2],
                f"{median(run.close for run in runs):.2f}",
            )
        )
    return section(
        "Moments",
        f"{DOCUMENTS} x {TOKENS:,} tokens in batches of {BATCH_SIZE}, medians of {repetitions}; each "
        "batch is read barely too, right before or behind.",
        *rows,
    )
