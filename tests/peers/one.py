"""Run one tool on one model: ``python one.py MODULE DIRECTORY OUT`` saves vectors and seconds."""

import importlib
import sys
import time
from pathlib import Path
from statistics import median

import torch

TOKENS, REPETITIONS = 256, 9


@torch.no_grad()
def main(name: str, directory: str, out: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    tool = importlib.import_module(name)
    model = tool.load(directory)
    tokens = 2 + torch.arange(TOKENS)[None] % 250
    queries, keys = tool.capture(model, tokens)
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        tool.capture(model, tokens)
        seconds.append(time.perf_counter() - started)
    vectors = [[layer.detach().clone() for layer in layers] for layers in (queries, keys)]
    torch.save({"vectors": vectors, "seconds": median(seconds)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
