"""The forward of a loaded model inside ``sniff`` against the bare one."""

from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer

from bench.loops import timed
from bench.tables import section
from bench.texts import model
from qk_sniffer import sniff
from smollm2 import checkpoint

SIZE, TOKENS = 8, 1024
CAPTURES: dict[str, tuple[dict[str, Any], str]] = {
    "uniform, buckets of 128": ({"sampler": "uniform", "min_bucket_size": 128}, "at most 1.05"),
    "uniform, buckets of 8,192": ({"sampler": "uniform"}, ""),
    "all": ({}, ""),
}


@torch.no_grad()
def time_sniffing(repetitions: int) -> str:
    """Read one batch barely and inside each kind of block, in turn."""
    module = model()
    module.configure_model()
    backbone, tokens = module.backbone, _tokens()

    def read() -> None:
        backbone(input_ids=tokens, use_cache=False)

    read()
    ratios: dict[str, list[float]] = {name: [] for name in CAPTURES}
    bare: list[float] = []
    for _ in range(repetitions):
        for name, (settings, _) in CAPTURES.items():
            before = timed(read)
            with sniff(backbone, **settings):
                inside = timed(read)
            after = timed(read)
            bare.append((before + after) / 2)
            ratios[name].append(inside / bare[-1])
    rows = [("", "s", "inside / bare", "range", "goal"), ("bare", f"{median(bare):.2f}", "1", "", "")]
    for name, found in ratios.items():
        span = f"{min(found):.3f} - {max(found):.3f}"
        seconds = f"{median(bare) * median(found):.2f}"
        rows.append((name, seconds, f"{median(found):.3f}", span, CAPTURES[name][1]))
    return section(
        "sniff",
        f"One forward of {SIZE} x {TOKENS:,} tokens inside a `sniff` block, which keeps its rows in "
        f"memory, against the mean of the bare ones before and behind, medians of {repetitions}.",
        *rows,
    )


def _tokens() -> torch.Tensor:
    """(SIZE, TOKENS) of real text."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    token_ids = tokenizer("\n\n".join(topics.values()))["input_ids"]
    return torch.tensor(token_ids[: SIZE * TOKENS]).view(SIZE, TOKENS)
