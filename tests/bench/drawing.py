"""Drawing rows, by the length of the texts."""

from functools import partial
from statistics import median

import torch

from bench.loops import timed
from bench.tables import section
from qk_sniffer.capture import Sampler, build_sampler, draw_positions

DRAW_LENGTHS = {"1k": 2**10, "8k": 2**13, "64k": 2**16, "1M": 2**20}
DRAW_SEQUENCES, DRAW_ROWS, DRAW_REPETITIONS = (60, 8), 128, 9


def draw(sampler: Sampler, layer_kinds: int, sequences: int, length: int) -> int:
    """Draw the rows of a batch."""
    drawn, _ = draw_positions(
        sampler,
        0,
        torch.arange(layer_kinds).repeat_interleave(sequences),
        torch.arange(sequences).repeat(layer_kinds),
        torch.full((layer_kinds * sequences,), length),
    )
    return drawn.numel()


def time_drawing(_repetitions: int) -> str:
    """Draw in turn for every length with as many rows on average, and for a model of a billion."""
    draws = {
        f"uniform, {name} positions": partial(
            draw, build_sampler("uniform", 1.0, length // DRAW_ROWS), *DRAW_SEQUENCES, length
        )
        for name, length in DRAW_LENGTHS.items()
    }
    first, *_, last = draws
    large = "log_uniform 128, a batch of 4 x 4,096 for 16 layers"
    draws[large] = partial(draw, build_sampler("log_uniform", 128, 128), 32, 4, 4096)
    rows = {name: drawn() for name, drawn in draws.items()}
    rounds = [{name: timed(drawn) for name, drawn in draws.items()} for _ in range(DRAW_REPETITIONS)]
    cells = [("", "rows", "ms", "/ the first", "goal")]
    for name in draws:
        seconds = median(times[name] for times in rounds)
        ratio = median(times[name] / times[first] for times in rounds)
        goal = {last: "under 2", large: "at most 5 ms"}.get(name, "")
        cells.append((name, f"{rows[name]:,}", f"{1000 * seconds:.1f}", f"{ratio:.2f}", goal))
    layer_kinds, sequences = DRAW_SEQUENCES
    return section(
        "Drawing",
        f"uniform: {layer_kinds} layers and kinds of {sequences} sequences, {DRAW_ROWS} rows kept of "
        f"each on average. Medians of {DRAW_REPETITIONS}.",
        *cells,
    )
