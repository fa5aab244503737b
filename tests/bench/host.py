"""What a capture costs the host, by a model that takes next to no time itself."""

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from bench.loops import Pairs, predict
from bench.tables import section
from bench.texts import config, long_files
from families import HOST_BOUND, tiny_model
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.capture import Portion
from qk_sniffer.config import CaptureConfig, OutputConfig, TokenizerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.module import SnifferModule
from qk_sniffer.storage.journal import _Segment

HOST_TEXTS, HOST_TOKENS = 64, 128


class Counts(Callback):
    """Counts what a capture does in the loop, over all batches; it must come after the sniffer."""

    def __init__(self) -> None:
        self.copies = self.blocks = self.python_calls = 0
        self._patches = contextlib.ExitStack()

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(Portion, "wait", "copies")
        self._count(_Segment, "write", "blocks")
        sys.setprofile(self._profile)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sys.setprofile(None)
        self._patches.close()

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        self.python_calls += event == "call"

    def _count(self, owner: type, method: str, counter: str) -> None:
        original = getattr(owner, method)

        def counted(*args: Any) -> Any:
            setattr(self, counter, getattr(self, counter) + 1)
            return original(*args)

        setattr(owner, method, counted)
        self._patches.callback(setattr, owner, method, original)


def time_host(repetitions: int) -> str:
    """What a capture costs the host, by a model that takes next to no time itself."""
    # Its import sets HF_HUB_OFFLINE, which client_of takes back.
    from conftest import byte_tokenizer

    captures = {
        "uniform 128": config("uniform", HOST_TOKENS),
        "log_uniform 16": config("log_uniform", 16),
    }
    cells = [("", "bare, ms", "more, ms", "range", "goal", "copies", "blocks", "Python calls")]
    with tempfile.TemporaryDirectory() as place, long_files(HOST_TEXTS) as texts:
        tiny_model(HOST_BOUND).save_pretrained(place)
        byte_tokenizer().save_pretrained(place)
        for (name, capture), batch_size in itertools.product(captures.items(), (1, 8)):
            tokenizer = TokenizerConfig(place, max_length=HOST_TOKENS)
            data = TextDataModule(texts, tokenizer=tokenizer, batch_size=batch_size)
            bare, more, counts = time_host_batches(
                place, data, capture, HOST_TEXTS // batch_size, repetitions
            )
            cells.append(
                (
                    f"{name}, batches of {batch_size}",
                    f"{median(bare):.1f}",
                    f"{median(more):.1f}",
                    f"{min(more):.1f} - {max(more):.1f}",
                    "at most 3" if batch_size == 1 else "",
                    *(f"{count:,.2f}" for count in counts[:2]),
                    f"{counts[2]:,.0f}",
                )
            )
    return section(
        "Host cost",
        f"{HOST_TEXTS} texts of {HOST_TOKENS} tokens, read in one thread by a model of "
        f"{HOST_BOUND.num_hidden_layers} layers of width {HOST_BOUND.hidden_size}, which stands for a "
        "GPU that waits for its host. Each batch is read barely too, right before or behind: "
        "milliseconds of a bare batch, and how many more with a capture on average, medians of "
        f"{repetitions} runs. Copies to the host, journal blocks and calls of Python functions are "
        "those of a batch; the calls are those that a bare loop does not make.",
        *cells,
    )


def time_host_batches(
    place: str, data: TextDataModule, capture: CaptureConfig, n_batches: int, repetitions: int
) -> tuple[list[float], list[float], tuple[float, float, float]]:
    """Milliseconds of each bare batch, how many more with a capture in each run, and what is counted.

    A batch without capture takes more than the model too: that is Lightning's.
    """

    def loop(*callbacks: Callback) -> None:
        predict(data, *callbacks, module=SnifferModule(place))

    def captured(before: Sequence[Callback] = (), after: Sequence[Callback] = ()) -> None:
        with tempfile.TemporaryDirectory() as root:
            loop(*before, SnifferCallback(OutputConfig(root), capture, check=False), *after)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    uncaptured, *runs = [Pairs() for _ in range(repetitions + 1)]
    captured()
    loop(uncaptured.begin, uncaptured.end)
    for run in runs:
        captured([run.begin], [run.end])
    counts, own = Counts(), Counts()
    captured(after=[counts])
    loop(own)
    torch.set_num_threads(threads)
    bare = [1000 * seconds for run in runs for seconds in run.bare]
    # Means, since a batch in some draws for those behind it too.
    of_lightning = mean(uncaptured.more())
    more = [1000 * (mean(run.more()) - of_lightning) for run in runs]
    calls = counts.python_calls - own.python_calls
    return bare, more, (counts.copies / n_batches, counts.blocks / n_batches, calls / n_batches)
