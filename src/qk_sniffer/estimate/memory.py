"""The memory of a run: weights, activations, and what the capture needs on device and host."""

from collections.abc import Iterator
from math import prod

from transformers import PreTrainedModel

from qk_sniffer.estimate.capture import Capture, parameter_bytes
from qk_sniffer.estimate.lines import Line, as_size
from qk_sniffer.estimate.shares import Share
from qk_sniffer.models import Footprint, Quantization, decoder_backbone, forward_footprint


def memory_lines(
    skeleton: PreTrainedModel,
    capture: Capture,
    share: Share,
    quantization: Quantization | None,
    adapter_bytes: int,
    prefill_chunk_size: int | None,
    n_new_tokens: int,
) -> Iterator[Line]:
    """What a process needs.

    Args:
        skeleton: The model; it may be one without weights.
        capture: What is captured of which texts.
        share: What a process has of the model, the one that has most.
        quantization: How the weights are stored; None as plain numbers.
        adapter_bytes: What those of an adapter take beside them.
        prefill_chunk_size: Tokens that are read at a time; None reads each batch at once.
        n_new_tokens: Tokens that the model may add to each text.
    """
    weights = list(skeleton.parameters())
    count, n_bytes = sum(weight.numel() for weight in weights), share.weight_bytes
    numbers = f"{count:,} in {str(skeleton.dtype).removeprefix('torch.')}"
    if quantization is not None and quantization.n_bytes is not None:
        n_bytes = quantization.n_bytes * share.weight_bytes // parameter_bytes(weights)
        numbers = f"{count:,} quantized by {quantization.method}"
    if adapter_bytes:
        n_bytes += adapter_bytes
        numbers += f" and {as_size(adapter_bytes).strip()} of an adapter"
    whose = f"weights of each process, {numbers}"
    if share.shard.count > 1:
        whose = f"weights of a process, at most, of {numbers} that {share.shard.count:,} share"
    yield "memory", f"{as_size(n_bytes)}  {whose}, beside activations"
    if share.shard.count > 1 and share.has_all_heads:
        yield "", "attention is whole in each: the plan of transformers does not share it"
    if quantization is not None and quantization.n_bytes is None:
        yield (
            "",
            f"less, since they are quantized by {quantization.method}; how much can't be told here",
        )
    with share.model(skeleton) as part:
        yield from _device_memory(n_bytes, part, capture, prefill_chunk_size)
    if n_new_tokens:
        size, length = max(map(tuple, capture.texts.shapes.tolist()), key=prod)
        numbers_a_token = sum(
            layer.num_key_value_heads * (layer.width("k") + layer.width("v")) for layer in share.held
        )
        cache = size * length * numbers_a_token * skeleton.dtype.itemsize
        yield "", f"{as_size(cache)}  more there while texts are continued: their keys and values"
    if (moments := capture.moments) is not None:
        yield "", f"{as_size(moments.host_bytes)}  on its host, at most: moments while they are saved"
    if not capture.selection.keeps_rows:
        return
    yield "", f"{as_size(capture.plan_bytes)}  on its host: places of the rows of the largest batch"
    yield (
        "",
        f"{as_size(capture.buffer_bytes)}  on its host, at most: vectors on their way to the disk; a "
        "GPU has as much",
    )


def _device_memory(
    weight_bytes: int, skeleton: PreTrainedModel, capture: Capture, prefill_chunk_size: int | None
) -> Iterator[Line]:
    """What a process needs of its device: weights, activations, and buffers of the capture."""
    try:
        forward, batch = _largest_forward(skeleton, capture, prefill_chunk_size)
    # A forward may do anything with a value that isn't there.
    except Exception:
        remedy = "" if capture.n_shards > 1 else "; --time reads a batch"
        yield "", f"activations can't be told without the weights' values{remedy}"
        return
    moments_bytes = 0 if capture.moments is None else capture.moments.device_bytes
    parts = [
        f"{as_size(forward.n_bytes).strip()} of activations for {batch[0]:,} x {batch[1]:,} tokens",
        "vectors on their way" if capture.buffer_bytes else "",
        _of("for statistics of softmax", capture.softmax_bytes),
        _of("for moments", moments_bytes),
    ]
    more = capture.buffer_bytes + capture.softmax_bytes + moments_bytes
    total = weight_bytes + forward.n_bytes + more
    yield (
        "",
        f"{as_size(total)}  on its device at most: weights, {', '.join(filter(None, parts))}",
    )
    if forward.is_mask and forward.largest > total / 10:
        yield (
            "",
            f"a mask of every pair of tokens takes {as_size(forward.largest).strip()} of it, and more "
            "while it is made; read in passages (model.prefill_chunk_size), or without such masks "
            "(model.attn_implementation: flash_attention_2 or flex_attention)",
        )


def _of(purpose: str, n_bytes: int) -> str:
    """A size and what it is for; empty where it is none."""
    return f"{as_size(n_bytes).strip()} {purpose}" if n_bytes else ""


def _largest_forward(
    skeleton: PreTrainedModel, capture: Capture, prefill_chunk_size: int | None
) -> tuple[Footprint, tuple[int, int]]:
    """The memory of the batch that takes the most, and its shape."""
    backbone, shapes = decoder_backbone(skeleton), capture.texts.shapes.tolist()
    candidates = {
        max(map(tuple, shapes), key=lambda shape: shape[0] * shape[1] ** power) for power in (1, 2)
    }
    return max(
        (
            (forward_footprint(backbone, size, length, prefill_chunk_size), (size, length))
            for size, length in candidates
        ),
        key=lambda found: found[0].n_bytes,
    )
