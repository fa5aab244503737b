"""The figures of an estimate as a person reads them."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import wrap

from transformers import PreTrainedModel

from qk_sniffer.config import described
from qk_sniffer.data import TextDataModule
from qk_sniffer.estimate.capture import Capture
from qk_sniffer.estimate.lines import Line, as_size
from qk_sniffer.estimate.memory import memory_lines
from qk_sniffer.estimate.shares import Share
from qk_sniffer.estimate.texts import Texts
from qk_sniffer.estimate.timing import FILE_BYTES_PER_SECOND, Samples
from qk_sniffer.kinds import KINDS, kinds_of
from qk_sniffer.models import Quantization, covered_positions
from qk_sniffer.recording import forewarnings
from qk_sniffer.storage import n_threads

_WIDTH = 96
_LABEL = 11
_MOST_BUCKETS = 16


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        load: Seconds that the weights took to load.
        samples: Batches that were read.
        n_devices: Devices of the run.
        device: Where the batches were read.
        step: Seconds by which a batch is continued by a token in each text; None where it is not.
    """

    load: float
    samples: Samples
    n_devices: int
    device: str
    step: float | None = None


def table(
    data: TextDataModule,
    skeleton: PreTrainedModel,
    capture: Capture,
    share: Share,
    data_root: Path,
    timing: Timing | None,
    quantization: Quantization | None,
    adapter_bytes: int,
    prefill_chunk_size: int | None,
) -> str:
    """Everything that is expected of a run.

    Args:
        data: Where the texts are.
        skeleton: The model; it may be one without weights.
        capture: What is captured of which texts.
        share: What a process has of the model, the one that has most.
        data_root: Where it would go.
        timing: What was measured; None leaves the time out.
        quantization: How the weights are stored; None as plain numbers.
        adapter_bytes: What those of an adapter take beside them.
        prefill_chunk_size: Tokens that are read at a time; None reads each batch at once.
    """
    lines = [
        *_heads(skeleton, capture),
        *_texts(data, capture),
        *_rows(capture),
        *_disk(capture, data_root),
        *memory_lines(
            skeleton, capture, share, quantization, adapter_bytes, prefill_chunk_size, data.n_new_tokens
        ),
        *_time(capture, timing, data.n_new_tokens),
        *_warnings(skeleton, capture),
    ]
    return "\n".join(line for label, text in lines for line in _filled(label, text))


def _filled(label: str, text: str) -> Iterator[str]:
    """A line, or several where it is too long."""
    # Columns are aligned already; only prose is wrapped.
    parts = wrap(text, _WIDTH - _LABEL) if len(text) > _WIDTH - _LABEL else [text]
    for part in parts or [""]:
        yield f"{label:<{_LABEL}}{part}".rstrip()
        label = ""


def _heads(skeleton: PreTrainedModel, capture: Capture) -> Iterator[Line]:
    layers, chosen = capture.geometry.layers, list(capture.heads.values())
    yield "model", f"{type(skeleton).__name__}, {len(layers):,} layers with attention"
    counts = [
        f"{len(chosen):,} layers",
        f"{sum(len(heads.query) for heads in chosen):,} of "
        f"{sum(layer.num_attention_heads for layer in layers):,} query heads",
        f"{sum(len(heads.key) for heads in chosen):,} of "
        f"{sum(layer.num_key_value_heads for layer in layers):,} key heads",
    ]
    if not capture.config.capture_queries:
        counts[1] = "no queries"
    if not capture.config.capture_keys:
        counts[2] = "no keys"
    kinds = kinds_of(capture.config.as_settings())
    counts += [
        f"{sum(len(heads.of(kind)) for heads in chosen):,} {KINDS[kind].name} heads"
        for kind in kinds
        if kind in ("v", "o")
    ]
    if capture.config.capture_softmax:
        counts.append("statistics of each query's softmax")
    dims = sorted({heads.layer.width(kind) for heads in chosen for kind in kinds})
    yield "captured", f"{', '.join(counts)}, head_dim {' and '.join(map(str, dims))}"
    for reason, numbers in capture.left_out():
        yield "left out", f"layers {_spans(numbers)}: {reason}"


def _texts(data: TextDataModule, capture: Capture) -> Iterator[Line]:
    texts, limit = capture.texts, data.tokenizer_config.max_length
    yield "texts", f"{texts.n_texts:,} of {described(data.path)}, split {data.split}"
    if texts.note is not None:
        yield "", texts.note
    cut = "" if limit is None else f", max_length {limit:,}"
    mean = texts.n_tokens / max(1, texts.n_texts)
    longest = int(texts.lengths.max())
    yield "tokens", f"{texts.n_tokens:,}; {mean:,.0f} a text, the longest {longest:,}{cut}"
    padded = round(int(texts.shapes.prod(axis=1).sum()) * texts.scale)
    if data.n_new_tokens:
        yield "", f"of them {data.n_new_tokens:,} in each text that the model may add, at most"
    yield "batches", f"{texts.n_batches:,}, with padding {padded:,} tokens"


def _rows(capture: Capture) -> Iterator[Line]:
    if not capture.selection.keeps_rows:
        yield "rows", "none are kept, for moments alone"
        return
    cells = [("bucket", "of each head", "of all heads")]
    cells += [
        (label, _number(rows), _number(rows * capture.n_heads))
        for label, rows in _joined(capture.rows_by_bucket)
    ]
    cells.append(("all", _number(capture.rows), _number(capture.rows * capture.n_heads)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, row in enumerate(cells):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "rows" if number == 0 else "", "   ".join([first, *others])
    yield "", "expected of the whole run, also where the data root holds a part of it already"


def _joined(rows_by_bucket: dict[int, float]) -> list[tuple[str, float]]:
    """Rows by bucket, of adjacent buckets together where there are many."""
    buckets = sorted(rows_by_bucket)
    size = -(-len(buckets) // _MOST_BUCKETS)
    groups = [buckets[first : first + size] for first in range(0, len(buckets), max(1, size))]
    return [
        (
            str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}",
            sum(rows_by_bucket[bucket] for bucket in group),
        )
        for group in groups
    ]


def _disk(capture: Capture, data_root: Path) -> Iterator[Line]:
    moments, free = capture.moments, _free_bytes(data_root)
    parts = [(capture.journal_bytes, f"journal, in {capture.dtype}, until the files are written")]
    if capture.selection.keeps_rows:
        n_files = f"{capture.n_heads:,} Parquet files, in float32, compressed"
        parts.append((capture.files_bytes, n_files))
    if moments is not None:
        parts.append((moments.journal_bytes * capture.n_readers, _states(capture)))
        parts.append((moments.n_bytes, f"moments/*.parquet, {moments.rows:,} rows in float64"))
    for number, (n_bytes, what) in enumerate(parts):
        yield "disk" if number == 0 else "", f"{as_size(n_bytes)}  {what}"
    room = "both" if len(parts) == 2 else "all of it"
    yield (
        "",
        f"{as_size(free)}  free on the disk of {data_root}, which needs room for {room} at the end",
    )
    if free < sum(n_bytes for n_bytes, _ in parts):
        remedy = (
            "IT WILL NOT FIT: make room, name another disk in sniffer.output.data_root, or lower "
            "data.max_samples or sniffer.capture.sampler.base_rate"
        )
        if moments is not None:
            remedy += "; moments take less of fewer heads and without sniffer.moments.by_bucket"
        yield "", remedy


def _states(capture: Capture) -> str:
    """What the moments in the journal are."""
    n_processes = capture.n_readers * capture.n_shards
    whose = "" if n_processes == 1 else f", of {n_processes:,} processes"
    if capture.n_shards == 1:
        return f"moments in the journal{whose}, at most: two while one replaces the other"
    return f"moments in the journal{whose}, at most: two of its heads each, and one that is written"


def _free_bytes(directory: Path) -> int:
    """Free space where a directory is or will be."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _time(capture: Capture, timing: Timing | None, n_new_tokens: int) -> Iterator[Line]:
    if timing is None:
        remedy = "--time loads the model and reads some tokens of the run"
        if capture.n_shards > 1:
            remedy = "--time would need a process that has all of the model"
        yield "time", f"not measured; {remedy}"
        return
    texts, samples = capture.texts, timing.samples
    totals = sorted(samples.totals(texts.shapes, timing.n_devices, texts.scale))
    spread = "measured once"
    if len(totals) > 1:
        ends = (_duration(seconds).strip() for seconds in (totals[0], totals[-1]))
        spread = f"{' to '.join(ends)} in {len(totals)} rounds"
    vectors = 4 * sum(capture.rows * len(s["heads"]) * s["head_dim"] for s in capture.streams)
    files = vectors / FILE_BYTES_PER_SECOND / n_threads()
    yield "time", f"{_duration(timing.load)}  to load the weights, measured"
    if timing.step is not None:
        n_steps = -(-texts.n_batches // timing.n_devices) * n_new_tokens
        yield (
            "",
            f"{_duration(timing.step * n_steps)}  to continue all texts, at most, as the largest batch "
            "would be",
        )
    yield "", f"{_duration(totals[len(totals) // 2])}  to read all batches ({spread})"
    yield (
        "",
        f"{_duration(files)}  to write the files, {n_threads()} threads of 165 MB of vectors a second",
    )
    yield "", _how(samples, texts, timing)


def _warnings(skeleton: PreTrainedModel, capture: Capture) -> Iterator[Line]:
    n_positions = covered_positions(skeleton.config)
    texts = capture.texts
    for line in forewarnings(capture.selection, texts.lengths, texts.listed, n_positions):
        yield "warning", line


def _how(samples: Samples, texts: Texts, timing: Timing) -> str:
    """How the time to read was found."""
    size, shortest = samples.shapes[0]
    longest = samples.shapes[-1][1]
    read = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    text = (
        f"read on {timing.device}, with capture: {size:,} texts of the run at once, cut to {read} "
        "tokens; each batch then takes a·tokens + b·tokens·length + c"
    )
    beyond = int(texts.shapes[:, 1].max()) / longest
    if beyond > 1:
        text += f", also those {beyond:,.0f} times as long"
    if timing.n_devices > 1:
        text += f"; for {timing.n_devices:,} devices, each assumed to be as fast"
    return text


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as 0-3, 5."""
    spans = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        spans.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(spans)


def _number(rows: float) -> str:
    """A number of rows; small expectations keep a digit."""
    return f"{rows:,.0f}" if rows >= 10 else f"{rows:,.1f}"


def _duration(seconds: float) -> str:
    """A time in a unit that a person reads, right-aligned."""
    if seconds < 100:
        text = f"{seconds:,.1f} s"
    elif seconds < 6000:
        text = f"{seconds / 60:,.1f} min"
    else:
        text = f"{seconds / 3600:,.1f} h"
    return text.rjust(9)
