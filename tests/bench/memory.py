"""The peak of the memory, by the number of documents."""

import resource
import subprocess
import sys
import tempfile

from bench.loops import predict
from bench.tables import section
from bench.texts import ALL, BATCH_SIZE, TOKENS, documents
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.config import OutputConfig
from smollm2 import gguf_file

MEMORY_DOCUMENTS = (8, 16, 32, 64)


def peak_bytes(count: int) -> int:
    """Peak of the resident memory of a process that captures ``count`` documents."""
    command = [sys.executable, "-m", "bench", "--measure-memory", str(count)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()[-1])


def measure_memory(count: int) -> None:
    """Capture ``count`` documents whole, finalize, and print this process's peak in bytes."""
    with documents(count) as data, tempfile.TemporaryDirectory() as root:
        predict(data, SnifferCallback(OutputConfig(root), ALL, False))
    unit = 1 if sys.platform == "darwin" else 1024
    print(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def compare_memory(_repetitions: int) -> str:
    """Peaks of runs in processes of their own, one run each, since they hardly vary."""
    gguf_file()
    peaks = {count: peak_bytes(count) for count in MEMORY_DOCUMENTS}
    first = peaks[MEMORY_DOCUMENTS[0]]
    head = ("documents", "peak, MB", f"growth against {MEMORY_DOCUMENTS[0]}", "goal")
    rows = [
        (f"{count}", f"{peak / 1e6:,.0f}", f"{100 * (peak / first - 1):+.1f} %", "at most 5 %")
        for count, peak in peaks.items()
    ]
    return section(
        "Memory of `all`",
        f"Peak of the resident memory with {TOKENS:,} tokens in each document and batches of "
        f"{BATCH_SIZE}, model and finalizing included, one run each.",
        head,
        *rows,
    )
