"""One model in one process, and shared by two."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import Callback

from bench.tables import section
from bench.texts import UNIFORM, long_files
from smollm2 import checkpoint

TEXTS, TOKENS = 3, 2048
NAMES = ("one process", "two processes, the first", "two processes, the second")
_EVERY = 0.02
"""Seconds between two looks at the memory."""


class Seen(NamedTuple):
    """What one process has seen.

    Attributes:
        seconds: Of one text, the median.
        bytes: Most private memory beyond that before the weights were loaded.
    """

    seconds: float
    bytes: int


class Watch(Callback):
    """Times each text, and looks at the memory from before the weights are loaded; it comes first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._before = self._peak = self._started = 0.0

    def setup(self, *_: Any, **__: Any) -> None:
        self._before = private_bytes()
        self._thread.start()

    def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def seen(self) -> Seen:
        self._is_over.set()
        return Seen(median(self.seconds), int(self._peak - self._before))

    def _look(self) -> None:
        while not self._is_over.wait(_EVERY):
            self._peak = max(self._peak, private_bytes())


def private_bytes() -> float:
    """Memory of this process that no file is behind; Linux tells it."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line)


def measure_share(dtype: str, size: int, n_texts: int) -> None:
    """Capture some texts in one of ``size`` processes that share a model, and print what was seen."""
    # What takes memory whatever the model is comes first.
    import torch
    import torch.distributed.tensor
    import transformers.distributed
    import transformers.models.llama.modeling_llama  # noqa: F401
    from lightning.pytorch import Trainer

    from qk_sniffer.callback import SnifferCallback
    from qk_sniffer.config import OutputConfig, TokenizerConfig
    from qk_sniffer.data import TextDataModule
    from qk_sniffer.module import SnifferModule

    torch.set_num_threads(1)
    watch = Watch()
    output = OutputConfig(os.environ["BENCH_ROOT"])
    trainer = Trainer(
        accelerator="cpu",
        devices=size,
        strategy="ddp" if size > 1 else "auto",
        callbacks=[watch, SnifferCallback(output, UNIFORM, False)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = SnifferModule(str(checkpoint()), dtype=dtype, tensor_parallel=size)
    data = TextDataModule(
        os.environ["BENCH_TEXTS"], tokenizer=TokenizerConfig(max_length=TOKENS), max_samples=n_texts
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    # Under the closing table of the run.
    print(json.dumps(watch.seen()._asdict()))


def run_shares(dtype: str, size: int, n_texts: int, **environment: str) -> list[Seen]:
    """What each of ``size`` processes sees of some texts, with one thread of torch each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    single = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    with long_files(TEXTS) as texts, tempfile.TemporaryDirectory() as root:
        variables = (
            os.environ
            | environment
            | dict.fromkeys(single, "1")
            | {
                "BENCH_ROOT": root,
                "BENCH_TEXTS": texts,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            | {"NODE_RANK": "0", "WORLD_SIZE": str(size)}
        )
        command = [sys.executable, "-m", "bench", "--measure-share", dtype, str(size), str(n_texts)]
        started = [
            subprocess.Popen(
                command,
                env=variables | {"LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{' '.join(command)} failed")
    return [Seen(**json.loads(lines.splitlines()[-1])) for lines in printed]


def time_shares(repetitions: int) -> str:
    """Read texts with a model in one process and in two, in turn; memory once, as it hardly varies."""
    checkpoint()
    # So that freed memory is given back at once, and the peak is that of what is needed.
    giving_back = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
    memory = [seen.bytes for size in (1, 2) for seen in run_shares("bfloat16", size, 1, **giving_back)]
    pairs = [
        [max(seen.seconds for seen in run_shares("float32", size, TEXTS)) for size in (1, 2)]
        for _ in range(repetitions)
    ]
    return shares_section(memory, pairs)


def shares_section(memory: list[int], pairs: list[list[float]]) -> str:
    ratios = [two / one for one, two in pairs]
    whole = memory[0]
    rows = [("", *NAMES, "two / one", "range", "goal")]
    seconds = [f"{median(column):.2f}" for column in zip(*pairs, strict=True)]
    spread = f"{min(ratios):.3f} - {max(ratios):.3f}"
    rows.append(
        ("one text, s", seconds[0], seconds[1], "", f"{median(ratios):.3f}", spread, "at most 0.75")
    )
    shares = " and ".join(f"{share / whole:.3f}" for share in memory[1:])
    megabytes = [f"{share / 1e6:,.0f}" for share in memory]
    rows.append(("private memory, MB", *megabytes, shares, "", "at most 0.6 each"))
    return section(
        "One model over two processes",
        f"SmolLM2-135M with `model.tensor_parallel: 2`, one thread of torch in each process, {TEXTS} "
        f"texts of {TOKENS:,} tokens, one at a time, captured as uniform with buckets of 128. Seconds "
        f"in float32, medians of {len(pairs)}. Memory in bfloat16, one run of one text: the most that "
        "a process had without a file behind it, beyond what it had before the weights were loaded; "
        "in float32 the weights stay in the mapped file. They have 4 and 5 of the 9 query heads, and a "
        "copy of a key head for each.",
        *rows,
    )
