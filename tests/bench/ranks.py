"""The command in one process and in two."""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import NamedTuple

import yaml

from bench.tables import section
from bench.texts import BATCH_SIZE, UNIFORM, long_files
from smollm2 import checkpoint

RANKS_DOCUMENTS, RANKS_TOKENS = 16, 2048
PROCESSES = {
    "one process": ("--trainer.devices", "1"),
    "two processes": ("--trainer.devices", "2", "--trainer.strategy", "ddp"),
}


class Command(NamedTuple):
    """What the closing table of one command says, and the seconds of the whole command."""

    seconds: float
    rows: int
    whole: float


def write_config(file: Path, texts: str) -> None:
    """The YAML of a capture of the texts in a directory, in all but its data root."""
    sections = {
        "model": {"name": str(checkpoint()), "dtype": "float32"},
        "data": {"path": texts, "tokenizer": {"max_length": RANKS_TOKENS}, "batch_size": BATCH_SIZE},
        "sniffer": {"capture": asdict(UNIFORM)},
        "trainer": {"accelerator": "cpu"},
    }
    file.write_text(yaml.safe_dump(sections), encoding="utf-8")


def run_command(place: Path, *options: str) -> Command:
    """Capture into a new data root with one thread for each process."""
    single = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    variables = os.environ | dict.fromkeys(single, "1") | {"HF_DATASETS_CACHE": str(place / "cache")}
    with tempfile.TemporaryDirectory(dir=place) as root:
        command = [str(Path(sys.executable).with_name("qk-sniffer")), "predict", "--config"]
        command += [str(place / "config.yaml"), "--sniffer.output.data_root", root, *options]
        started = time.perf_counter()
        ended = subprocess.run(command, env=variables, capture_output=True, text=True)
        whole = time.perf_counter() - started
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stderr}")
    closing = dict(re.findall(r"^(rows|seconds) +([\d.,]+)$", ended.stdout, re.MULTILINE))
    return Command(float(closing["seconds"]), int(closing["rows"].replace(",", "")), whole)


def time_ranks(repetitions: int) -> str:
    """Run the command in one process and in two, in turn, after one that fills the caches."""
    samples: dict[str, list[Command]] = {name: [] for name in PROCESSES}
    with long_files(RANKS_DOCUMENTS) as texts, tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_config(place / "config.yaml", texts)
        run_command(place, "--trainer.devices", "1", "--trainer.limit_predict_batches", "1")
        for _ in range(repetitions):
            for name, options in PROCESSES.items():
                samples[name].append(run_command(place, *options))
    return ranks_section(samples)


def ranks_section(samples: dict[str, list[Command]]) -> str:
    (rows,) = {run.rows for runs in samples.values() for run in runs}
    pairs = list(zip(*samples.values(), strict=True))
    cells = [("", *PROCESSES, "two / one", "range", "goal")]
    for name, field, goal in (
        ("capture and files, s", "seconds", "at most 0.6"),
        ("whole command, s", "whole", ""),
    ):
        one, two = ([getattr(run, field) for run in runs] for runs in samples.values())
        ratios = [second / first for first, second in zip(one, two, strict=True)]
        cells.append(
            (
                name,
                f"{median(one):.1f}",
                f"{median(two):.1f}",
                f"{median(ratios):.3f}",
                f"{min(ratios):.3f} - {max(ratios):.3f}",
                goal,
            )
        )
    return section(
        "Two processes",
        f"{RANKS_DOCUMENTS} x {RANKS_TOKENS:,} tokens in batches of {BATCH_SIZE}, captured as uniform "
        "with buckets of 128 by `qk-sniffer predict`, in one process and in two with the strategy ddp, "
        f"one thread of torch in each, medians of {len(pairs)}. Capture and files is what the command "
        "prints as seconds, from the first batch to the last file, and the whole command adds its "
        "imports and loading the model. The texts are tokenized before. All runs kept the same "
        f"{rows:,} rows.",
        *cells,
    )
