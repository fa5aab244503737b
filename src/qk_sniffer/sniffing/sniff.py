"""``sniff``: the context manager that users call."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from qk_sniffer.config import CaptureConfig, SamplerConfig
from qk_sniffer.errors import UserError
from qk_sniffer.kinds import KINDS, LOCAL_POSITIONS, parts_of
from qk_sniffer.models import (
    decoder_backbone,
    keeps_texts_apart,
    probe_quietly,
    transformers_model,
)
from qk_sniffer.sniffing.arguments import as_arguments, integers, require_integer
from qk_sniffer.sniffing.captured import Captured
from qk_sniffer.sniffing.saving import writing
from qk_sniffer.sniffing.session import Session, Watched, require_watchable

LIMIT_BYTES = 4 * 2**30


@contextmanager
def sniff(
    model: nn.Module,
    *,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    kinds: str = "qk",
    softmax: bool = False,
    local_positions: int = LOCAL_POSITIONS,
    sampler: str | None = None,
    base_rate: float = 1.0,
    min_bucket_size: int = 8192,
    seed: int = 0,
    keep_first: int = 0,
    positions: Iterable[int] | None = None,
    shared: bool = False,
    pre_rope: bool = False,
    full_attention_only: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit_bytes: int = LIMIT_BYTES,
    device: Literal["host", "model"] = "host",
    data_root: str | Path | None = None,
    overwrite: bool = False,
) -> Iterator[Captured]:
    """Capture the queries and keys of a loaded model while it is called, within a block.

    Each call of the model is a batch and each of its sequences a text, numbered from 0. Padding on
    either side is left out. A call with the cache of an earlier one goes on with its texts, so
    ``generate`` reads one text from its prompt to its last token but one, which it never reads.
    Outputs, gradients and generated tokens stay as they are.

    Args:
        model: A causal language model of transformers or its decoder, also inside PEFT's or another
            wrapper, on any device.
        layers: Layers to capture; None captures all.
        heads: Query heads to capture in each layer, key heads following; None captures all.
        kinds: q for queries, k for keys, v for values, o for the outputs of the query heads before the
            output projection; qkvo for all.
        softmax: Add statistics of each query's softmax over all its keys to the queries.
        local_positions: Positions that the statistic local_prob counts.
        sampler: Which positions are kept: all, uniform, log_uniform, positions, or a class path, as in
            a config. None keeps ``positions`` where they are given, and otherwise all.
        base_rate: Expected rows in each bucket of a text, for every head; not used by all.
        min_bucket_size: Positions in a bucket.
        seed: Seed of the random stream.
        keep_first: Number of first positions of each text that are kept besides.
        positions: What the sampler positions keeps of each text, counted from 0.
        shared: Draw once for queries and keys of all layers, which then keep the same positions.
        pre_rope: Capture the vectors as they are before the rotary embedding.
        full_attention_only: Leave out layers with a sliding window.
        tokenizer: Gives the column token_str; None leaves it empty.
        limit_bytes: The most that captured vectors may take in memory.
        device: Where they are kept: on the host, or where the model has them. ``torch`` and
            ``attention`` give tensors there.
        data_root: A directory to which texts are written as they end, and which is a finished data root
            behind the block. A block that was interrupted goes on in the same directory: texts that
            it has are not captured again.
        overwrite: Replace what an earlier block or run has left in ``data_root``.

    Yields:
        What is captured, to be read when a call has ended, and behind the block; with a data root,
        only behind the block.

    Raises:
        UserError: The model can't be captured, has no such layer or head, or an argument is wrong. In
            a call: its texts are not known, its cache is changed between calls, as by beam search, or
            ``limit_bytes`` is reached.
    """
    for name, number in (
        ("seed", seed),
        ("keep_first", keep_first),
        ("min_bucket_size", min_bucket_size),
        ("local_positions", local_positions),
        ("limit_bytes", limit_bytes),
    ):
        require_integer(name, number)
    for name, flag in (("softmax", softmax), ("shared", shared)):
        if not isinstance(flag, bool):
            raise UserError(f"{name}: expected True or False, got {flag!r}")
    if device not in ("host", "model"):
        raise UserError(f"device: expected host or model, got {device!r}")
    if tokenizer is not None and not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise UserError(f"tokenizer: expected a loaded one, got {tokenizer!r}; use AutoTokenizer")
    capture = _capture_config(
        kinds,
        layers=integers("layers", layers),
        heads=integers("heads", heads),
        full_attention_only=full_attention_only,
        capture_pre_rope=pre_rope,
        capture_token_strings=tokenizer is not None,
        min_bucket_size=min_bucket_size,
        capture_softmax=softmax,
        local_positions=local_positions,
        sampler=_sampler_config(sampler, base_rate, seed, keep_first, positions, shared),
    )
    watched = _watched(model, capture)
    session = as_arguments(lambda: Session(watched, capture, tokenizer, limit_bytes, device == "model"))
    captured = Captured(session)
    if data_root is None:
        with session.watching():
            yield captured
        return
    with writing(session, data_root, overwrite=overwrite) as path:
        captured.goes_to(path)
        with session.watching():
            yield captured
    captured.is_in(path)


def _capture_config(kinds: str, **settings: Any) -> CaptureConfig:
    if not isinstance(kinds, str) or not kinds or set(kinds) - set(KINDS):
        raise UserError(f"kinds: expected some of {''.join(KINDS)}, such as qk or v, got {kinds!r}")
    wanted: dict[str, Any] = {facts.setting: kind in kinds for kind, facts in KINDS.items()}
    return as_arguments(lambda: CaptureConfig(**wanted, **settings))


def _sampler_config(
    sampler: str | None,
    base_rate: float,
    seed: int,
    keep_first: int,
    positions: Iterable[int] | None,
    shared: bool,
) -> SamplerConfig:
    listed = integers("positions", positions)
    name = sampler or ("all" if listed is None else "positions")
    if name == "positions" and listed is None:
        raise UserError("positions: list those that the sampler positions keeps of each text")
    if name == "none":
        raise UserError("sampler: none keeps no rows, and nothing would be captured; choose another")
    return as_arguments(lambda: SamplerConfig(name, base_rate, seed, keep_first, listed, shared))


def _watched(model: nn.Module, capture: CaptureConfig) -> Watched:
    """The transformers model inside ``model``, seen in two forwards of a few tokens.

    Raises:
        UserError: There is none, or its architecture can't be captured.
    """
    inner = transformers_model(model)
    backbone = decoder_backbone(inner)
    parts, pre_rope = parts_of(capture.as_settings()), capture.capture_pre_rope
    attention = as_arguments(lambda: probe_quietly(backbone, parts, pre_rope=pre_rope))
    require_watchable(attention, type(inner).__name__)
    return Watched(inner, backbone, attention, keeps_texts_apart(backbone))
