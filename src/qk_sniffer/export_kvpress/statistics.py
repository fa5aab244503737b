"""Moments of queries before RoPE as kvpress's ``ExpectedAttentionStats``, for its own loader.

That is a directory with ``model.safetensors`` and ``config.json``, the arguments of the class. The file
holds float32 arrays ``query_mean`` (layers, heads, head_dim) and ``query_cov`` (layers, heads,
head_dim, head_dim), of all layers and heads of the model; kvpress divides a covariance by one less than
the number of vectors. Source: kvpress 0.5.5, ``presses/expected_attention_with_stats.py``.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from qk_sniffer.capture import SAMPLERS, AttentionLayer, build_sampler
from qk_sniffer.errors import UserError
from qk_sniffer.reading import Captures, Moments
from qk_sniffer.storage import explained_writing, write_text


def export_kvpress(captures: Captures, directory: Path, n_sink: int = 0) -> int:
    """Write the statistics of a capture's queries.

    Args:
        captures: A capture with moments of the queries of all layers and heads, before RoPE.
        directory: A new directory, or an empty one.
        n_sink: Positions at the beginning of each text that are left out, as kvpress leaves out four.

    Returns:
        How many tokens they are taken of.

    Raises:
        UserError: Some moments are missing, a bucket holds positions on both sides of ``n_sink``,
            layers differ in their heads, the directory holds something, or the disk refuses.
    """
    if n_sink < 0:
        raise UserError(f"--n_sink: must be at least 0, got {n_sink}")
    layers = _require_alike(captures)
    lengths = captures.examples["n_tokens"].to_numpy()
    buckets = None if n_sink == 0 else _buckets_behind(captures, n_sink, int(lengths.max(initial=0)))
    n_heads, width = layers[0].num_attention_heads, layers[0].head_dim
    mean = np.empty((len(layers), n_heads, width), np.float32)
    covariance = np.empty((len(layers), n_heads, width, width), np.float32)
    for layer in range(len(layers)):
        for head in range(n_heads):
            found = _moments(captures, layer, head, buckets)
            mean[layer, head] = found.mean
            covariance[layer, head] = found.covariance * (found.count / max(found.count - 1, 1))
    settings = captures.settings
    config = {
        "num_layers": len(layers),
        "num_heads": n_heads,
        "head_dim": width,
        "dataset_name": settings["data"]["path"],
        "model_name": settings["model"]["name"],
        "num_samples": len(lengths),
        "sample_seq_len": int(lengths.max(initial=0)),
        "n_sink": n_sink,
    }
    arrays = {"query_mean": torch.from_numpy(mean), "query_cov": torch.from_numpy(covariance)}
    with explained_writing(directory, "make room, or name another directory, then export again"):
        if directory.is_file():
            raise UserError(f"{directory}: it is a file; name a new directory")
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise UserError(f"{directory}: it holds something already; name a new directory")
        weights, settings_file = directory / "model.safetensors", directory / "config.json"
        save_file(arrays, weights, metadata={"format": "pt"})
        write_text(settings_file, json.dumps(config, indent=2, sort_keys=True) + "\n")
        # safetensors keeps its files from others, who may read all else.
        weights.chmod(settings_file.stat().st_mode)
    return found.count


def _require_alike(captures: Captures) -> list[AttentionLayer]:
    """All layers of the model, in order.

    Raises:
        UserError: kvpress has no place for them.
    """
    layers = [AttentionLayer.of(fields) for fields in captures.manifest["layers"]]
    shapes = {(layer.num_attention_heads, layer.head_dim) for layer in layers}
    if len(shapes) > 1:
        raise UserError(
            "export-kvpress: the layers differ in their heads or head_dim, and kvpress keeps all in "
            "one array; there is no such file for this model"
        )
    numbers = [layer.layer_idx for layer in layers]
    if numbers != [*range(len(layers))]:
        missing = min({*range(numbers[-1])} - {*numbers})
        raise UserError(
            f"export-kvpress: layer {missing} has no attention, and kvpress takes a model where every "
            "layer has; there is no such file for this model"
        )
    return layers


def _moments(captures: Captures, layer: int, head: int, buckets: Sequence[int] | None) -> Moments:
    try:
        return captures.moments(layer, head, "q", bucket=buckets, pre_rope=True)
    except UserError as error:
        raise UserError(
            f"export-kvpress: kvpress takes the queries of all layers and heads before RoPE; {error}"
        ) from error


def _buckets_behind(captures: Captures, n_sink: int, longest: int) -> range:
    """The buckets of the positions from some position on.

    Raises:
        UserError: Moments are not those of buckets, one holds earlier positions too, or no text is
            so long.
    """
    capture = captures.settings["capture"]
    sampler, size = capture["sampler"], capture["min_bucket_size"]
    ends = torch.tensor([n_sink - 1, n_sink, max(n_sink, longest - 1)])
    by_bucket = captures.settings.get("moments", {}).get("by_bucket")
    if by_bucket and sampler["type"] in SAMPLERS and longest > n_sink:
        buckets = build_sampler(sampler["type"], sampler["base_rate"], size).buckets(ends).tolist()
        if buckets[0] < buckets[1]:
            return range(buckets[1], buckets[2] + 1)
    raise UserError(
        f"--n_sink: the moments of this run don't tell the first {n_sink:,} positions of a text from "
        "those behind them; capture with sniffer.moments.by_bucket: true and buckets that end there, "
        f"as with the sampler uniform and min_bucket_size: {n_sink}, or leave --n_sink out"
    )
