"""Values, outputs and statistics of the softmax, at the length where each query has many keys."""

import tempfile
from dataclasses import replace
from statistics import median

from bench.loops import Pairs, predict
from bench.tables import section
from bench.texts import UNIFORM, config, long_texts
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.config import CaptureConfig, OutputConfig

TEXTS, TOKENS = 2, 8192
WITH_SOFTMAX = {"capture_softmax": True}
EVERYTHING = {"capture_values": True, "capture_outputs": True, "capture_softmax": True}
CAPTURES: dict[str, tuple[CaptureConfig, str]] = {
    "uniform, buckets of 8,192, with statistics": (
        replace(config("uniform", 8192), **WITH_SOFTMAX),
        "at most 1.02",
    ),
    "uniform, buckets of 128, with everything": (replace(UNIFORM, **EVERYTHING), "at most 1.10"),
    "uniform, buckets of 128, queries and keys alone": (UNIFORM, ""),
}


def time_everything(repetitions: int) -> str:
    """Read each text barely and with its capture, in turn."""
    ratios: dict[str, list[float]] = {name: [] for name in CAPTURES}
    bare: list[float] = []
    with long_texts(TEXTS, TOKENS) as data:
        for _ in range(repetitions):
            for name, (capture, _) in CAPTURES.items():
                pairs = Pairs()
                with tempfile.TemporaryDirectory() as root:
                    sniffer = SnifferCallback(OutputConfig(root), capture, check=False)
                    predict(data, pairs.begin, sniffer, pairs.end)
                ratios[name].append(sum(pairs.captured) / sum(pairs.bare))
                bare.append(sum(pairs.bare))
    rows = [("", "loop / bare", "range", "goal")]
    for name, found in ratios.items():
        span = f"{min(found):.3f} - {max(found):.3f}"
        rows.append((name, f"{median(found):.3f}", span, CAPTURES[name][1]))
    return section(
        "Everything",
        f"{TEXTS} texts of {TOKENS:,} tokens, one at a time, each read barely too "
        f"({median(bare):.0f} s for all). Medians of {repetitions}. Everything is queries, keys, "
        "values, outputs, and statistics of each query's softmax.",
        *rows,
    )
