"""Texts of mixed lengths, in fixed batches and in batches of like length."""

import tempfile
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from bench.loops import predict
from bench.tables import section
from bench.texts import UNIFORM, text_files
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.config import OutputConfig, TokenizerConfig
from qk_sniffer.data import TextDataModule

MIXED_DOCUMENTS, MIXED_TOKENS, MIXED_SEED = 64, 2048, 0
MIXED_MEDIAN, MIXED_SIGMA = 400, 1.2
MIXED_CHARACTERS = (120, 8000)
BATCHES: dict[str, dict[str, Any]] = {
    "8 texts, in the order of the files": {"batch_size": 8},
    "at most 2,048 tokens and 64 texts": {"batch_size": 64, "max_tokens_per_batch": 2048},
}


class Reading(Callback):
    """Counts what a run reads."""

    batches = tokens = padded_tokens = 0

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.batches += 1
        self.tokens += int(batch["sequence_lengths"].sum())
        self.padded_tokens += batch["input_ids"].numel()


def mixed_lengths() -> list[int]:
    """Characters of texts of which most are short and a few are long."""
    drawn = np.random.default_rng(MIXED_SEED).lognormal(
        np.log(MIXED_MEDIAN), MIXED_SIGMA, MIXED_DOCUMENTS
    )
    lengths: list[int] = drawn.clip(*MIXED_CHARACTERS).astype(int).tolist()
    return lengths


def time_budget(repetitions: int) -> str:
    """Capture texts of mixed lengths in fixed batches and in batches of like length, in turn."""
    samples: dict[str, list[tuple[Reading, float]]] = {name: [] for name in BATCHES}
    with text_files(mixed_lengths()) as directory:
        tokenizer = TokenizerConfig(max_length=MIXED_TOKENS)
        data = {
            name: TextDataModule(directory, tokenizer=tokenizer, **batches)
            for name, batches in BATCHES.items()
        }
        *_, last = data.values()
        predict(last)
        lengths = last.sequence_lengths()
        assert lengths is not None
        for _ in range(repetitions):
            for name in BATCHES:
                with tempfile.TemporaryDirectory() as root:
                    reading = Reading()
                    seconds, _ = predict(
                        data[name], SnifferCallback(OutputConfig(root), UNIFORM, False), reading
                    )
                samples[name].append((reading, seconds))
    return budget_section(samples, lengths)


def budget_section(samples: dict[str, list[tuple[Reading, float]]], lengths: torch.Tensor) -> str:
    rates = [[reading.tokens / seconds for reading, seconds in runs] for runs in samples.values()]
    ratios = [mixed / fixed for fixed, mixed in zip(*rates, strict=True)]
    ratio = f"{median(ratios):.2f}", f"{min(ratios):.2f} - {max(ratios):.2f}", "at least 2"
    head = ("batches of", "batches", "tokens with padding", "loop, s", "tokens/s")
    rows = [(*head, "ratio", "range", "goal")]
    for (name, runs), rate, cells in zip(samples.items(), rates, [("1", "", ""), ratio], strict=True):
        reading, _ = runs[0]
        assert reading.tokens == int(lengths.sum()), "a text was not read"
        seconds = median(seconds for _, seconds in runs)
        counts = f"{reading.batches}", f"{reading.padded_tokens:,}"
        rows.append((name, *counts, f"{seconds:.2f}", f"{median(rate):,.0f}", *cells))
    return section(
        "Mixed lengths",
        f"{len(lengths)} texts, whose characters are drawn from a lognormal distribution with sigma "
        f"{MIXED_SIGMA} and cut to {MIXED_CHARACTERS[0]} - {MIXED_CHARACTERS[1]:,}. They have "
        f"{lengths.sum():,} tokens, {min(lengths)} to {max(lengths):,} each, with a mean of "
        f"{lengths.float().mean():.0f} and a median of {lengths.median()}. Captured as uniform with "
        f"buckets of 128, medians of {len(ratios)}. Tokens/s counts no padding.",
        *rows,
    )
