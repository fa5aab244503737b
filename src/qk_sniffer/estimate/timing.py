"""How long a run will take, from a few of its own tokens that are read and captured for real.

The largest batch of the run is read cut to growing lengths, from 128 tokens on, twice as many each
time, for as long as the next one is likely to fit into the time that is left. A forward over B texts
padded to S tokens takes ``a·B·S + b·B·S² + c`` seconds: weights, attention, and launching. The three
are fitted, none of them negative, and summed over the batches of the run.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qk_sniffer.data import TokenBatch, batch_fields
from qk_sniffer.estimate.capture import Capture
from qk_sniffer.ids import EVERY_EXAMPLE
from qk_sniffer.module import SnifferModule
from qk_sniffer.processes import Dealer
from qk_sniffer.recording import Recorder

SECONDS = 60.0
"""How long batches are read, about: a forward that has begun is not broken off, and where attention is
most of it, it takes longer than its length suggests."""

_SHORTEST = 128
_ROUNDS = 3
_STEPS = 16

FILE_BYTES_PER_SECOND = 165e6
"""Float32 vectors that a thread makes Parquet of; measured, see docs/scale.md."""

Shape = tuple[int, int]
"""Texts in a batch, and tokens that each is padded to."""


@dataclass(frozen=True)
class Samples:
    """Batches that were read and captured.

    Attributes:
        shapes: Texts, and tokens that each is padded to.
        rounds: Seconds of each shape, once in each round.
    """

    shapes: list[Shape]
    rounds: list[list[float]]

    def totals(self, shapes: npt.NDArray[np.int64], n_devices: int, scale: float) -> list[float]:
        """Seconds of a run, as each round has them.

        Args:
            shapes: (batches, 2): those of the run.
            n_devices: How many devices share them, each as fast as this one: the slowest counts.
            scale: Batches of the run for each in ``shapes``.
        """
        dealer, loads = Dealer(n_devices), np.empty(len(shapes), np.int64)
        for number in np.argsort(-shapes.prod(axis=1), kind="stable").tolist():
            loads[number] = dealer.deal(int(shapes[number].prod()))
        totals = []
        for seconds in self.rounds:
            fit = _terms(shapes) @ _fit(_terms(np.array(self.shapes)), np.array(seconds))
            totals.append(float(np.bincount(loads, fit).max()) * scale)
        return totals


def read_samples(
    module: SnifferModule, capture: Capture, device: torch.device, tokenizer: Any
) -> Samples:
    """Read the largest batch of a run, cut to several lengths, and capture what it keeps.

    The rows go into a journal of their own in the directory for temporary files.

    Args:
        module: With its model loaded.
        capture: What the run captures.
        device: Where the model is.
        tokenizer: Gives the token strings, where they are captured.
    """
    largest = capture.texts.largest
    width = largest["input_ids"].shape[1]
    lengths = [*(_SHORTEST << i for i in range(32) if _SHORTEST << i < width), width]
    with tempfile.TemporaryDirectory(prefix="qk-sniffer-") as directory, torch.inference_mode():
        recorder = Recorder(
            capture.config,
            capture.selection,
            capture.heads,
            Path(directory),
            {"streams": capture.streams, "settings": {"model": dict(module.hparams), "data": {}}},
            0,
            EVERY_EXAMPLE,
            tokenizer,
            moments=capture.moments_config,
        )

        def read(length: int) -> float:
            batch = cut(largest, length)
            fields = batch_fields(batch, listed=capture.selection.needs_lists)
            _synchronize(device)
            started = time.perf_counter()
            recorder.begin_batch(fields)
            module.predict_step(batch.to(device), 0)
            recorder.end_batch(fields)
            _synchronize(device)
            return time.perf_counter() - started

        try:
            return _sample(read, largest["input_ids"].shape[0], lengths)
        finally:
            recorder.close()


def seconds_a_token(module: SnifferModule, capture: Capture, device: torch.device) -> float:
    """Seconds by which the largest batch of a run is continued by a token in each text.

    Args:
        module: With its model loaded, which continues texts.
        capture: What the run captures.
        device: Where the model is.
    """
    largest = capture.texts.largest
    fields = batch_fields(largest)
    lengths = fields.sequence_lengths.tolist()
    tokens = largest["input_ids"].to(device)
    texts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]

    def continue_by(n_tokens: int) -> float:
        continuation = module.continuation_by(n_tokens)
        _synchronize(device)
        started = time.perf_counter()
        continuation(texts, fields.example_ids.tolist())
        _synchronize(device)
        return time.perf_counter() - started

    with torch.inference_mode():
        continue_by(1)  # The first of a process is slower.
        return max(0.0, continue_by(1 + _STEPS) - continue_by(1)) / _STEPS


def _sample(read: Callable[[int], float], size: int, lengths: Sequence[int]) -> Samples:
    read(lengths[0])  # The first forward of a process is slower.
    end = time.perf_counter() + SECONDS
    first: list[float] = []
    for length, last in zip(lengths, [lengths[0], *lengths], strict=False):
        if first and first[-1] * length / last > end - time.perf_counter():
            break
        first.append(read(length))
    shapes = [(size, length) for length in lengths[: len(first)]]
    rounds = [first]
    while len(rounds) < _ROUNDS and sum(first) < end - time.perf_counter():
        rounds.append([read(length) for _, length in shapes])
    return Samples(shapes, rounds)


def cut(batch: TokenBatch, length: int) -> TokenBatch:
    """The first tokens of each text of a batch."""
    return TokenBatch(
        batch
        | {
            "input_ids": batch["input_ids"][:, :length],
            "attention_mask": batch["attention_mask"][:, :length],
            "sequence_lengths": batch["sequence_lengths"].clamp(max=length),
        }
    )


def _terms(shapes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(batches, 3): what a batch has of each of the three costs."""
    sizes, lengths = shapes.astype(np.float64).T
    return np.stack([sizes * lengths, sizes * lengths**2, np.ones_like(sizes)], axis=1)


def _fit(terms: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The costs, none negative, that explain the measured seconds with the least relative error."""
    scale = terms.max(axis=0)
    weighted = terms / scale / seconds[:, None]
    best, least = np.zeros(3), np.inf
    # One measurement goes to the first cost, that of the weights.
    for number in range(1, min(3, len(seconds)) + 1):
        for chosen in itertools.combinations(range(3), number):
            part = weighted[:, chosen]
            found, *_ = np.linalg.lstsq(part, np.ones(len(seconds)), rcond=None)
            error = float(np.square(part @ found - 1).sum())
            if (found >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(3), error
                best[list(chosen)] = found / scale[list(chosen)]
    return best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
