"""Examines how an architecture is captured, against what its own eager attention computes.

``python tests/examine.py NAME…`` prints the verdicts; without a name it examines all of them and
writes the table in ``docs/architectures.md``.
"""

import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.utils import logging

from qk_sniffer.capture import (
    AttentionLayer,
    Chunks,
    Selection,
    Sniffer,
    active_sniffer,
    build_sampler,
    captured_streams,
    select_heads,
)
from qk_sniffer.errors import UserError
from qk_sniffer.kinds import PARTS, SOFTMAX_COLUMNS, Part
from qk_sniffer.models import (
    AttentionMap,
    capture_attention,
    check_capture,
    check_passages,
    decoder_backbone,
    probe_attention,
)
from qk_sniffer.models.attention import watch_attention
from qk_sniffer.models.calls import AttentionCall, modeling_globals
from qk_sniffer.models.check import attention_probabilities
from qk_sniffer.models.refusals import REFUSED, refuse_unsupported
from qk_sniffer.models.results import is_projection
from qk_sniffer.module import SnifferModule
from qk_sniffer.reading import attention_of
from tiny import ARCHITECTURES, VOCABULARY, causal_overrides, tiny_causal_lm, tiny_config

TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
TOLERANCE = 1e-5
LENGTH = 21
SHORTER = 13
LOCAL = 5
ROPE_DIM = 8
_UNEXPLAINED = ("indexer", "keep_window_size", "relative-position", "ALiBi")
"""What a note says where queries and keys alone don't explain the attention."""

States = dict[tuple[int, str], Tensor]
"""(B, heads, S, head_dim) by layer and kind."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    architecture: str
    verdict: str
    pre_rope: str = ""
    passages: str = ""
    results: str = ""
    softmax: str = ""
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        cells = (
            self.architecture,
            self.verdict,
            self.pre_rope,
            self.passages,
            self.results,
            self.softmax,
            "; ".join(self.notes),
        )
        return f"| {' | '.join(cells)} |"


def examine(name: str) -> Row:
    """The row of an architecture; an assertion fails where a capture is not exact."""
    logging.set_verbosity_error()
    model_type = name.removesuffix(" (multimodal)")
    config = CONFIG_MAPPING[model_type] if model_type in REFUSED else tiny_config(name)
    try:
        refuse_unsupported(name, config)
    except UserError as error:
        reason = re.sub(r"^.*? model: (.*); choose another$", r"\1", str(error))
        return Row(name, "refused", notes=(reason,))
    model = tiny_causal_lm(name)
    backbone = decoder_backbone(model)
    attention = probe_attention(backbone)
    notes = [*attention.notes, *overrides_note(name)]
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(7, VOCABULARY, (2, LENGTH), generator=generator)
    captured = capture(backbone, input_ids)
    for _ in _implementations(model):
        assert_output_unchanged(backbone, input_ids)
        for row in input_ids:
            check_capture(backbone, row[None], [layer.layer_idx for layer in attention.layers])
    model.set_attn_implementation("eager")
    assert_attention_is_explained(backbone, attention, input_ids, captured)
    alone = capture(backbone, input_ids[1:, :SHORTER])
    assert_same(alone, {k: states[1:, :, :SHORTER] for k, states in captured.items()}, "padding")
    pre_rope = examine_pre_rope(backbone, attention, input_ids, captured)
    passages = examine_passages(backbone, attention, input_ids, captured)
    results, softmax = examine_results(model, attention, input_ids, passages)
    verdict = "exact, with a note" if notes else "exact"
    notes = [*notes, *attention.rotary.notes(), *attention.results.notes("o")]
    return Row(name, verdict, pre_rope, passages, results, softmax, tuple(notes))


def overrides_note(name: str) -> list[str]:
    """What a user must set so that an architecture is causal; without it, the model is refused."""
    overrides = causal_overrides(name)
    if not overrides:
        return []
    config = tiny_config(name)
    for field_name in overrides:
        setattr(config, field_name, getattr(type(config)(), field_name))
    try:
        refuse_unsupported(name, config)
        probe_attention(decoder_backbone(tiny_causal_lm(name, config)))
    except UserError as error:
        assert "model.config_overrides" in str(error)
        settings = ", ".join(f"{key}: {str(value).lower()}" for key, value in overrides.items())
        return [f"with model.config_overrides: {{{settings}}}"]
    return []


def sniff_all(
    backbone: nn.Module,
    lengths: list[int],
    *,
    pre_rope: bool = False,
    parts: Collection[Part] = ("q", "k"),
) -> tuple[Sniffer, Chunks]:
    """A sniffer that keeps everything of a batch that has begun, and where its chunks go."""
    chunks = Chunks()
    heads = select_heads(probe_attention(backbone, pre_rope=pre_rope).layers)
    sniffer = Sniffer(
        captured_streams(heads, parts),
        Selection(build_sampler("all", 1.0, 64)),
        chunks,
        local_positions=LOCAL,
        pre_rope=pre_rope,
    )
    sniffer.begin_batch(range(len(lengths)), lengths)
    return sniffer, chunks


def states_of(chunks: Chunks, batch_size: int) -> States:
    """The whole states of sequences of one length."""
    return {
        (c.layer_idx, c.kind): c.vectors.unflatten(1, (batch_size, -1)).transpose(0, 1) for c in chunks
    }


def capture(
    backbone: nn.Module,
    input_ids: Tensor,
    *,
    pre_rope: bool = False,
    passage: int = 0,
    parts: Collection[Part] = ("q", "k"),
) -> States:
    """Everything that a sniffer keeps of a batch, put together from its chunks."""
    batch_size, length = input_ids.shape
    sniffer, chunks = sniff_all(backbone, [length] * batch_size, pre_rope=pre_rope, parts=parts)
    module = SnifferModule("tiny", prefill_chunk_size=passage or None)
    module.backbone = backbone
    with active_sniffer(sniffer), torch.inference_mode():
        module.predict_step({"input_ids": input_ids}, 0)
    sniffer.flush_batch()
    assert all(c.positions.tolist() == [*range(length)] * batch_size for c in chunks)
    return states_of(chunks, batch_size)


def _implementations(model: PreTrainedModel) -> Iterator[str]:
    """The model in eager attention and, where it has it, in sdpa."""
    for implementation in ("eager", "sdpa"):
        with suppress(ValueError):
            model.set_attn_implementation(implementation)
            yield implementation


def assert_output_unchanged(backbone: nn.Module, input_ids: Tensor) -> None:
    pre_rope = probe_attention(backbone).rotary.problem is None
    sniffer, _ = sniff_all(backbone, [LENGTH, LENGTH], pre_rope=pre_rope)
    with torch.inference_mode():
        plain = backbone(input_ids=input_ids, use_cache=False)[0]
        with active_sniffer(sniffer), capture_attention(backbone):
            captured = backbone(input_ids=input_ids, use_cache=False)[0]
        after = backbone(input_ids=input_ids, use_cache=False)[0]
    sniffer.flush_batch()
    assert torch.equal(plain, captured) and torch.equal(plain, after), "capturing changes the output"


def assert_same(actual: States, expected: States, what: str) -> None:
    assert actual.keys() == expected.keys()
    for key, states in expected.items():
        scale = max(1.0, float(states.abs().max()))
        difference = float((actual[key] - states).abs().max())
        assert difference <= TOLERANCE * scale, f"{what}: layer {key} is off by {difference}"


@torch.inference_mode()
def assert_attention_is_explained(
    backbone: nn.Module, attention: AttentionMap, input_ids: Tensor, captured: States
) -> None:
    """softmax(q·kᵀ) of the captured vectors equals the probabilities that the model returns."""
    seen: dict[int, tuple[AttentionCall, Tensor | None]] = {}

    def on_layer(layer_idx: int, call: AttentionCall, *_: Any) -> Callable[..., None]:
        def on_result(_: Tensor | None, probabilities: Tensor | None, value: Tensor | None) -> None:
            seen[layer_idx] = call, probabilities

        return on_result

    with watch_attention(backbone, on_layer, numbered_by_call=attention.numbered_by_call):
        output = backbone(input_ids=input_ids, use_cache=False, output_attentions=True)
    returned = [a for a in (getattr(output, "attentions", None) or ()) if isinstance(a, Tensor)]
    for index, layer in enumerate(attention.layers):
        call, expected = seen[layer.layer_idx]
        if len(returned) == len(attention.layers):
            expected = returned[index]
        assert expected is not None
        query, key = (captured[layer.layer_idx, kind] for kind in "qk")
        actual = _explanation(attention, layer, call, query, key, expected)
        difference = float((actual - expected).abs().max())
        assert difference <= TOLERANCE, f"layer {layer.layer_idx} is off by {difference}"


def _explanation(
    attention: AttentionMap,
    layer: AttentionLayer,
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    expected: Tensor,
) -> Tensor:
    """Probabilities from what is stored alone; a note must stand where more is needed."""
    if call.adapter is not None and not call.adapter.complete:
        return _with_the_noted_term(call, query, key)
    if layer.scores is None:
        assert any(word in note for note in attention.notes for word in _UNEXPLAINED)
        actual = attention_probabilities(layer, call, query, key, passed_mask=True)
    else:
        actual = _from_the_manifest(layer, query, key)
    if torch.allclose(expected.sum(-1), torch.ones(()), atol=1e-4):
        # Where a sink scales the output afterwards, the returned probabilities are without it.
        actual = actual / actual.sum(-1, keepdim=True)
    return actual


def _from_the_manifest(layer: AttentionLayer, query: Tensor, key: Tensor) -> Tensor:
    """What the reading API computes, head by head and sequence by sequence."""
    positions = torch.arange(query.shape[2])
    return torch.stack(
        [
            torch.stack(
                [
                    attention_of(layer, head, q, k, positions, positions).probabilities
                    for q, k in zip(query[:, head], key[:, layer.key_head(head)], strict=True)
                ]
            )
            for head in range(query.shape[1])
        ],
        dim=1,
    )


def _with_the_noted_term(call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
    """ProphetNet's own term, computed by its own function from the hidden states."""
    states = call.arguments["hidden_states"]
    main = states.chunk(1 + call.module.ngram, dim=1)[0]
    scores = query @ key.transpose(-1, -2)
    term = call.module.get_main_relative_pos_embeddings(
        main, scores, call.arguments["position_ids"], call.arguments["main_relative_position_buckets"]
    )
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores + term).masked_fill(future, -torch.inf).softmax(dim=-1)


def examine_passages(
    backbone: nn.Module, attention: AttentionMap, input_ids: Tensor, whole: States
) -> str:
    """Whether the rows of a text read in passages are those of one forward, where the model's are."""
    try:
        for row in input_ids:
            check_passages(backbone, row[None])
    except UserError as error:
        return "no: " + re.sub(r"^.*?: \w+ (.*?)( \(.*\))?; set it to null$", r"\1", str(error))
    error = max(
        float((states - whole[key]).abs().max()) / max(1.0, float(whole[key].abs().max()))
        for passage in (1, 8, LENGTH - 1)
        for key, states in capture(backbone, input_ids, passage=passage).items()
    )
    assert error <= 1e-3, f"passages are off by {error}"
    if not attention.rotary.problem and error <= TOLERANCE:
        pre = capture(backbone, input_ids, pre_rope=True)
        assert_same(capture(backbone, input_ids, pre_rope=True, passage=8), pre, "before RoPE")
    return "yes" if error <= TOLERANCE else "to 1e-3"


@torch.inference_mode()
def examine_results(
    model: PreTrainedModel, attention: AttentionMap, input_ids: Tensor, passages: str
) -> tuple[str, str]:
    """Values and outputs, and the statistics, against what eager attention computes."""
    backbone = decoder_backbone(model)
    problems = attention.results.problems
    parts: list[Part] = [part for part in PARTS if part not in problems]
    seen = see_results(backbone, attention, input_ids)
    for _ in _implementations(model):
        captured = capture(backbone, input_ids, parts=parts)
        for layer in attention.layers:
            result = seen[layer.layer_idx]
            if "o" in parts:
                assert_outputs(layer, result, captured)
            if "softmax" in parts:
                assert_statistics(layer, result.with_sink_of(layer, captured), captured)
    if passages == "yes":
        again = capture(backbone, input_ids, parts=parts, passage=8)
        argmax = SOFTMAX_COLUMNS.index("argmax_position")
        for states in (captured, again):
            for layer_idx, part in states:
                if part == "softmax":
                    states[layer_idx, part][..., argmax] = 0
        assert_same(again, captured, "passages")
    model.set_attn_implementation("eager")
    words = {part: f"refused: {problem}" for part, problem in problems.items()}
    assert ("v" in words) == ("o" in words)
    noted = "yes, with a note" if attention.results.notes("o") else "yes"
    return words.get("o", noted), words.get("softmax", "yes")


@dataclass
class Result:
    """What eager attention computed in one layer.

    Attributes:
        probabilities: (B, num_attention_heads, S, S), as the model returns them.
        output: (B, S, num_attention_heads, D), None until the attention has ended.
        projected: What its output projection made of that, where it takes it as it is.
        projection: That projection.
        returned: What the attention module returned.
    """

    probabilities: Tensor | None = None
    output: Tensor | None = None
    projected: Tensor | None = None
    projection: nn.Module | None = None
    returned: Tensor | None = None

    def with_sink_of(self, layer: AttentionLayer, captured: States) -> Tensor:
        """The probabilities; where the model returns them without its sink, with it."""
        expected = self.probabilities
        assert expected is not None
        sinks = None if layer.scores is None else layer.scores.sinks
        if sinks is None or not torch.allclose(expected.sum(-1), torch.ones(()), atol=1e-4):
            return expected
        lse = captured[layer.layer_idx, "softmax"][..., 0]
        return expected * (1 - (torch.tensor(sinks)[:, None] - lse).exp())[..., None]


def see_results(backbone: nn.Module, attention: AttentionMap, input_ids: Tensor) -> dict[int, Result]:
    """What one eager forward computes in each layer."""
    seen: dict[int, Result] = {}
    last = Result()

    def on_layer(layer_idx: int, call: AttentionCall, *_: Any) -> Callable[..., None]:
        result = seen[layer_idx] = Result()

        def on_result(output: Tensor | None, probabilities: Tensor | None, _: Tensor | None) -> None:
            nonlocal last
            result.output, result.probabilities, last = output, probabilities, result

        # Some that compute their attention themselves add the residual too.
        if call.adapter is None:
            hooks.callback(call.module.register_forward_hook(on_return(result)).remove)
        return on_result

    def on_return(result: Result) -> Callable[..., None]:
        def returned(module: nn.Module, args: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            result.returned = first if result.returned is None else result.returned

        return returned

    def on_module(module: nn.Module, args: Any, output: Any) -> None:
        states = last.output
        given = args[0] if args and isinstance(args[0], Tensor) else None
        if states is None or given is None or last.projection is not None:
            return
        if given.numel() == states.numel() and torch.equal(given.reshape(-1), states.reshape(-1)):
            last.projection, last.projected = module, output

    with ExitStack() as hooks:
        for module in filter(is_projection, backbone.modules()):
            hooks.callback(module.register_forward_hook(on_module).remove)
        watch = watch_attention(backbone, on_layer, numbered_by_call=attention.numbered_by_call)
        with watch:
            output = backbone(input_ids=input_ids, use_cache=False, output_attentions=True)
    returned = [a for a in (getattr(output, "attentions", None) or ()) if isinstance(a, Tensor)]
    if len(returned) == len(attention.layers):
        for layer, probabilities in zip(attention.layers, returned, strict=True):
            seen[layer.layer_idx].probabilities = probabilities
    return seen


def assert_outputs(layer: AttentionLayer, result: Result, captured: States) -> None:
    """Outputs are the model's, and those that its probabilities give of the captured values."""
    output, value = captured[layer.layer_idx, "o"], captured[layer.layer_idx, "v"]
    assert result.output is not None
    off = (output.transpose(1, 2) - result.output).abs().max()
    assert off <= TOLERANCE * max(1.0, float(output.abs().max())), f"outputs are off by {off}"
    group = layer.num_attention_heads // layer.num_key_value_heads
    product = result.with_sink_of(layer, captured) @ value.repeat_interleave(group, dim=1)
    off = (output - product).abs().max()
    assert off <= TOLERANCE * max(1.0, float(output.abs().max())), f"values are off by {off}"
    if result.projection is not None:
        flat = output.transpose(1, 2).flatten(2)
        projected = result.projection(flat.reshape(result.projected.shape[:-1] + flat.shape[-1:]))
        assert _are_close(projected, result.projected), "the projection gives something else"
        # BERT and its kin project in a module of their own.
        returned = result.returned
        if returned is not None and not _are_close(returned, flat):
            assert _are_close(returned, projected), "the module returns something else"


def _are_close(states: Tensor, others: Tensor) -> bool:
    """Whether two have the same numbers, whatever their shapes."""
    same_size = states.numel() == others.numel()
    return same_size and torch.allclose(states.reshape(-1), others.reshape(-1), atol=1e-4)


def assert_statistics(layer: AttentionLayer, expected: Tensor, captured: States) -> None:
    """The statistics are those of the probabilities that the model returns."""
    columns = captured[layer.layer_idx, "softmax"].unbind(-1)
    lse, entropy, max_prob, argmax, sink_prob, local_prob = columns
    n_keys = expected.shape[-1]
    distance = torch.arange(n_keys)[:, None] - torch.arange(n_keys)
    mass = 1 - expected.sum(-1)
    told = {
        "entropy": (entropy, torch.special.entr(expected).sum(-1)),
        "max_prob": (max_prob, expected.amax(-1)),
        "sink_prob": (sink_prob, expected[..., 0] + mass),
        "local_prob": (local_prob, (expected * (distance < LOCAL)).sum(-1)),
    }
    for name, (actual, wanted) in told.items():
        off = float((actual - wanted).abs().max())
        assert off <= TOLERANCE * max(1.0, float(wanted.abs().max())), f"{name} is off by {off}"
    keys = argmax.contiguous().view(torch.int32).long()
    chosen = expected.gather(-1, keys[..., None]).squeeze(-1)
    assert torch.allclose(chosen, expected.amax(-1), atol=TOLERANCE), "argmax_position is another"
    if layer.scores is not None:
        query, key = captured[layer.layer_idx, "q"], captured[layer.layer_idx, "k"]
        positions = torch.arange(n_keys)
        for b, h in itertools.product(range(query.shape[0]), range(query.shape[1])):
            own = attention_of(
                layer,
                h,
                query[b, h],
                key[b, layer.key_head(h)],
                positions,
                positions,
                0,
                {"lse": lse[b, h]},
            )
            off = float((own.probabilities - expected[b, h]).abs().max())
            assert off <= TOLERANCE, f"lse gives probabilities that are off by {off}"


def examine_pre_rope(
    backbone: nn.Module, attention: AttentionMap, input_ids: Tensor, post: States
) -> str:
    if attention.rotary.problem:
        return f"refused: {attention.rotary.problem}"
    pre = capture(backbone, input_ids, pre_rope=True)
    rotations = record_rotations(backbone, attention, input_ids)
    rotating = {layer_idx for layer_idx, calls in rotations.items() if calls}
    for (layer_idx, kind), states in pre.items():
        after = post[layer_idx, kind]
        if layer_idx not in rotating:
            assert torch.equal(states, after), f"layer {layer_idx} does not rotate"
            continue
        assert not torch.equal(states, after), f"layer {layer_idx} stores {kind} after RoPE"
        if any("MLA" in note for note in attention.notes):
            assert torch.equal(states[..., :-ROPE_DIM], after[..., :-ROPE_DIM]), (
                "the first part rotates"
            )
        changed = any("normalizes after RoPE" in note for note in attention.rotary.notes())
        rotated = (
            r for calls in rotations[layer_idx] for r in calls.applied_to(states, after, changed)
        )
        shared = (
            torch.equal(states, pre[other, kind]) and torch.equal(after, post[other, kind])
            for other in rotating
            if other < layer_idx and states.shape == pre[other, kind].shape
        )
        assert any(itertools.chain(rotated, shared)), (
            f"layer {layer_idx}: {kind} does not rotate into itself"
        )
    if not rotating:
        return "no RoPE"
    return "yes" if len(rotating) == len(attention.layers) else "yes; some layers have no RoPE"


@dataclass(frozen=True)
class Rotation:
    """One call of the modeling file's rotary function."""

    rotate: Callable[..., Any]
    states: list[Tensor]
    rest: list[Any]
    results: list[Tensor]
    first: int

    def applied_to(self, pre: Tensor, post: Tensor, changed: bool) -> Iterator[bool]:
        """Whether rotating the stored ``pre`` gives the stored ``post``, for each way to see it."""
        for i, (state, result) in enumerate(zip(self.states, self.results, strict=True)):
            for transposed in (False, True):
                shape = state.transpose(1, 2).shape if transposed else state.shape
                if len(shape) != 4 or shape[2] != pre.shape[2] or pre.shape[1] % shape[1]:
                    continue
                width, n_heads = shape[3], shape[1]
                for offset, step in itertools.product(
                    {0, pre.shape[3] - width}, {1, pre.shape[1] // n_heads}
                ):
                    if offset < 0:
                        continue
                    inside = slice(offset, offset + width)
                    part = pre[:, ::step, :, inside][:, :n_heads]
                    part = part.transpose(1, 2) if transposed else part
                    inputs = [*self.states[:i], part, *self.states[i + 1 :]]
                    again = _tensors(
                        self.rotate(*self.rest[: self.first], *inputs, *self.rest[self.first :])
                    )
                    again_result = again[i].transpose(1, 2) if transposed else again[i]
                    target = post[:, ::step, :, inside][:, :n_heads]
                    if changed:
                        yield torch.allclose(again[i], result, atol=1e-5)
                    outside = torch.ones(pre.shape[3], dtype=torch.bool)
                    outside[inside] = False
                    yield torch.allclose(again_result, target, atol=1e-5) and torch.equal(
                        pre[..., outside], post[..., outside]
                    )


@torch.inference_mode()
def record_rotations(
    backbone: nn.Module, attention: AttentionMap, input_ids: Tensor
) -> dict[int, list[Rotation]]:
    """The rotary calls of each layer in one forward."""
    since: list[Rotation] = []
    by_layer: dict[int, list[Rotation]] = {}

    def on_layer(layer_idx: int, *_: Any) -> None:
        by_layer[layer_idx] = since.copy()
        since.clear()

    watch = watch_attention(backbone, on_layer, numbered_by_call=attention.numbered_by_call)
    with _recorded(backbone, since), watch:
        backbone(input_ids=input_ids, use_cache=False)
    return by_layer


@contextmanager
def _recorded(backbone: nn.Module, calls: list[Rotation]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in {type(module) for module in backbone.modules()}:
            for owner in (modeling_globals(kind), kind):
                names = owner if isinstance(owner, dict) else vars(kind)
                for name, function in list(names.items()):
                    if not re.fullmatch(r"apply_.*rotary.*emb.*", name) or "vision" in name:
                        continue
                    if isinstance(function, staticmethod):
                        setattr(kind, name, staticmethod(_noting(function.__func__, calls, first=1)))
                        stack.callback(setattr, kind, name, function)
                    elif not hasattr(function, "noted"):
                        names[name] = _noting(function, calls, first=0)
                        stack.callback(names.__setitem__, name, function)
        yield


def _noting(rotate: Callable[..., Any], calls: list[Rotation], first: int) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        result = rotate(*args, **kwargs)
        n = len(_tensors(result))
        states, rest = list(args[first : first + n]), [*args[:first], *args[first + n :]]

        def again(*args: Any) -> Any:
            return rotate(*args, **kwargs)

        calls.append(Rotation(again, states, rest, _tensors(result), first))
        return result

    noted.noted = True  # type: ignore[attr-defined]
    return noted


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def read_table() -> dict[str, str]:
    """The lines of the table in the repository, by architecture."""
    lines = TABLE.read_text().splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}


def render(rows: list[Row]) -> str:
    verdicts = Counter(row.verdict for row in rows)
    return _PAGE.format(
        version=transformers.__version__,
        total=len(rows),
        exact=verdicts["exact"],
        noted=verdicts["exact, with a note"],
        refused=verdicts["refused"],
        rows="\n".join(map(str, rows)),
    )


_PAGE = """\
# Architectures

The table lists every causal language model of transformers {version}, and multimodal models whose text
decoder is one: {total} in all, {exact} exact, {noted} exact with a note, {refused} refused.

For each, `make test-architectures` builds a tiny random model from its real config class and captures
everything. **Exact** means that softmax of the captured q·kᵀ, with the layer's scale and its causal
mask or stored window, equals the probabilities of the model's own eager attention to 1e-5. It also
means that capturing changes no bit of the output, in eager attention or sdpa, and that the rows of a
text do not depend on the padding beside it. **Exact, with a note** means the same once you take the
note into account. The dataset card of a capture contains its notes.

- **Pre-RoPE** (`capture_pre_rope`): if you rotate the stored vectors with the model's own function,
  you get the vectors that the attention used. In layers without RoPE both are the same.
- **Passages** (`prefill_chunk_size`): a text read in passages of 1, 8 or 20 tokens gives the rows of
  one forward to 1e-5, or "to 1e-3" where recurrent layers round differently. If the model itself reads
  passages differently from the whole text, a run stops before it captures anything.
- **Values, outputs** (`capture_values`, `capture_outputs`): the probabilities of eager attention times
  the captured values are the captured outputs, and these through the output projection are what the
  module returns. "With a note": a gate, a norm or experts come between outputs and projection.
- **Softmax** (`capture_softmax`): the six [statistics](files.md#statistics-of-the-softmax) are those of
  the probabilities that eager attention returns, and `lse` gives these probabilities, to 1e-5.

Each architecture is also tested with every type of RoPE that transformers has and its code accepts
(default, linear, dynamic, yarn, longrope, llama3, proportional), on texts shorter and longer than its
window, chunk and original length. A text has the same rows as when a fresh model reads it alone: with
other texts in its batch, after other texts, under a token budget, and in passages wherever the column
says yes. With every type of RoPE the verdict is the same.
[How that is done](exactness.md#a-text-alone)

`make architectures` writes this page.

| Architecture | Verdict | Pre-RoPE | Passages | Values, outputs | Softmax | Notes |
|---|---|---|---|---|---|---|
{rows}
"""


def main(names: list[str]) -> None:
    """Print the rows of some architectures, or write the table of all."""
    rows = []
    for name in names or ARCHITECTURES:
        rows.append(examine(name))
        print(rows[-1], flush=True)
    if not names:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(render(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
