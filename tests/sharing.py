"""Whether processes that share a model capture what one process does that has it for itself.

``python tests/sharing.py NAME…`` prints how two processes share some architectures; without a name it
examines all of them and writes the lists in ``docs/architectures.md``.
"""

import multiprocessing
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.utils import logging

from examine import LENGTH, TABLE, States, capture
from killing import PRELOADED
from qk_sniffer.capture import AttentionLayer, ModelShard
from qk_sniffer.errors import UserError
from qk_sniffer.kinds import KINDS, PARTS, SOFTMAX_COLUMNS
from qk_sniffer.models import (
    ModelSource,
    SharedModel,
    attention_geometry,
    decoder_backbone,
    load_model,
    load_skeleton,
    plan_of,
    probe_attention,
    require_plan,
    weights_digest,
    whole_layers,
)
from qk_sniffer.models.refusals import REFUSED, refuse_unsupported
from tiny import ARCHITECTURES, VOCABULARY, tiny_causal_lm, tiny_config, without_timm

T = TypeVar("T")

SHARE, WHOLE, NO_PLAN, BAD_PLAN = "share", "whole", "no plan", "bad plan"
HEADINGS = {
    SHARE: "Each process computes the heads that fall to it",
    WHOLE: "Each computes all heads, and captures those that fall to it",
    NO_PLAN: "Refused, since transformers has no plan by which processes share it",
    BAD_PLAN: "Refused, since the plan of transformers does not fit the model",
}
ROUNDING = 1e-4
"""Sums over processes are added in another order, and each layer carries that on."""

OTHER_DIGEST = {"inkling2_text"}
"""Architectures whose weights transformers puts in another order where they are shared, though it says
otherwise: such a run can't go on with another number of processes."""

_SECTION = "\n## Tensor parallel\n"


class Verdict(NamedTuple):
    """How processes share an architecture: one of ``HEADINGS``, and why it is refused."""

    kind: str
    problem: str = ""


class Sharers:
    """Processes in one group, which do what they are told together, one thing after the other.

    Args:
        count: How many there are.
        directory: Where they meet.
    """

    def __init__(self, count: int, directory: Path) -> None:
        self._count, self._directory = count, directory
        self._n_groups = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._n_groups += 1
        store = self._directory / f"group-{self._n_groups}"
        self._pipes, self._processes = [], []
        for number in range(self._count):
            here, there = context.Pipe()
            arguments = (ModelShard(number, self._count), store, there)
            self._processes.append(context.Process(target=_work, args=arguments))
            self._processes[-1].start()
            self._pipes.append(here)

    def run(self, task: Callable[..., T], *args: Any) -> list[T]:
        """What each of them gives.

        Args:
            task: A function of a module, which is given the place of its process.
            args: What it is given besides.
        """
        for pipe in self._pipes:
            pipe.send((task, args))
        answers = []
        for pipe in self._pipes:
            assert pipe.poll(100), "a process hangs"
            answers.append(pipe.recv())
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if errors:
            # One may have left the others in the middle of something.
            self.close()
            self._start()
            raise ExceptionGroup(f"{task.__name__}{args}", errors)
        return answers

    def close(self) -> None:
        for process in self._processes:
            process.kill()


def _work(shard: ModelShard, store: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    address, patience = f"file://{store}", timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=address, rank=shard.number, world_size=shard.count, timeout=patience
    )
    while True:
        task, args = pipe.recv()
        try:
            answer = task(shard, *args)
        except Exception as error:
            answer = RuntimeError(f"process {shard.number}: {type(error).__name__}: {error}")
        pipe.send(answer)


def examine_sharing(
    shard: ModelShard, name: str, directory: Path, changes: Mapping[str, Any] = MappingProxyType({})
) -> Verdict:
    """How the tiny model of an architecture is shared; an assertion fails where a capture is not exact.

    Args:
        shard: The place of this process.
        name: Of the architecture.
        directory: Where the model is saved, for all processes.
        changes: Of its config.
    """
    config = tiny_config(name, dict(changes))
    model = tiny_causal_lm(name, config)
    whole = probe_attention(decoder_backbone(model))
    try:
        require_plan(name, model, whole.layers, shard.count)
    except UserError as error:
        return Verdict(NO_PLAN if "has no plan" in str(error) else BAD_PLAN, str(error))
    if shard.number == 0:
        model.save_pretrained(directory)
    dist.barrier()
    source = ModelSource(str(directory))
    with without_timm(model.config):
        # What a checkpoint does to weights is done to both.
        model = load_model(source, dtype="float32", attn_implementation="eager")
        part, layers = _load_part(shard, source)
    expected, found = _captured(model), _captured(part)
    held = probe_attention(decoder_backbone(part)).layers
    shares: list[Any] = [None] * shard.count
    dist.all_gather_object(shares, held)
    digests = {weights_digest(decoder_backbone(each)) for each in (model, part)}
    # Whoever fails leaves the others, so they have nothing more to do together.
    assert len(digests) == 1 + (name in OTHER_DIGEST)
    assert whole_layers(shares, layers) == whole.layers
    _assert_same(found, _own(shard, expected, whole.layers, held))
    return Verdict(WHOLE if held == whole.layers else SHARE)


def _load_part(shard: ModelShard, source: ModelSource) -> tuple[PreTrainedModel, list[AttentionLayer]]:
    """What a process computes of a model, and the layers of all of it."""
    skeleton = load_skeleton(source)
    layers = attention_geometry(decoder_backbone(skeleton)).layers
    shared = SharedModel(shard, torch.device("cpu"), plan_of(skeleton), layers)
    part = load_model(source, dtype="float32", attn_implementation="eager", shared=shared)
    return part, layers


def _captured(model: PreTrainedModel) -> States:
    """All that can be captured of some tokens."""
    backbone = decoder_backbone(model)
    problems = probe_attention(backbone).results.problems
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(7, VOCABULARY, (2, LENGTH), generator=generator)
    states = capture(backbone, input_ids, parts=[part for part in PARTS if part not in problems])
    for (_, part), values in states.items():
        if part == "softmax":
            # Of two keys that are as likely either may be the likelier.
            values[..., SOFTMAX_COLUMNS.index("argmax_position")] = 0
    return states


def _assert_same(actual: States, expected: States) -> None:
    assert actual.keys() == expected.keys()
    for key, states in expected.items():
        assert actual[key].shape == states.shape
        if states.numel():
            difference = float((actual[key] - states).abs().max() / states.abs().max().clamp(min=1))
            assert difference <= ROUNDING, f"{key} is off by {difference}"


def _own(
    shard: ModelShard, states: States, layers: list[AttentionLayer], held: list[AttentionLayer]
) -> States:
    """What a process is to have of the states of all heads."""
    own = {}
    for layer, share in zip(layers, held, strict=True):
        of_queries, of_keys = shard.query_heads(layer), shard.computed_keys(layer)
        for (layer_idx, part), values in states.items():
            if layer_idx != layer.layer_idx:
                continue
            is_key = part in KINDS and KINDS[part].heads == "num_key_value_heads"
            heads = of_keys if is_key else of_queries
            if share.num_attention_heads < layer.num_attention_heads:
                values = values[:, list(heads)]
            own[layer_idx, part] = values
    return own


def examined_in_general(names: list[str]) -> Iterator[str]:
    """Those of some architectures that are captured at all."""
    for name in names:
        model_type = name.removesuffix(" (multimodal)")
        if model_type in REFUSED:
            continue
        try:
            refuse_unsupported(name, tiny_config(name))
        except UserError:
            continue
        yield name


@contextmanager
def sharers(count: int) -> Iterator[tuple[Sharers, Path]]:
    """Processes that share models, and a directory for these."""
    with TemporaryDirectory() as directory:
        processes = Sharers(count, Path(directory))
        try:
            yield processes, Path(directory)
        finally:
            processes.close()


def read_lists() -> dict[str, str]:
    """The kind of each architecture, as the page says."""
    section = TABLE.read_text().partition(_SECTION)[2]
    kinds = {}
    for kind, heading in HEADINGS.items():
        (listed,) = re.findall(rf"^- \*\*{heading}\*\*: (.*)\.$", section, re.MULTILINE)
        kinds |= dict.fromkeys(listed.split(", "), kind)
    return kinds


def render(kinds: Mapping[str, str]) -> str:
    """The section of the page."""
    listed = defaultdict(list)
    for name, kind in kinds.items():
        listed[kind].append(name)
    lists = "\n".join(
        f"- **{heading}**: {', '.join(listed[kind])}." for kind, heading in HEADINGS.items()
    )
    return f"{_SECTION}{_INTRODUCTION}\n{lists}\n"


_INTRODUCTION = """
How processes share a model with `model.tensor_parallel`. For each architecture
`make test-architectures` lets two processes share a tiny model: queries, keys, values, outputs and
statistics that they capture are those of one process that has the model for itself, to 1e-4 of the
largest number, since sums over processes round otherwise from layer to layer. A run of
inkling2_text can't go on with another number of processes, since transformers keeps the weights of its
experts in another order where they are shared.
"""


def main(names: list[str]) -> None:
    """Print how some architectures are shared, or write the lists of all."""
    kinds = {}
    with sharers(2) as (processes, directory):
        for name in names or examined_in_general(list(ARCHITECTURES)):
            verdict, *_ = processes.run(examine_sharing, name, directory / name)
            print(name, *verdict, flush=True)
            kinds[name] = verdict.kind
    if not names:
        table, _, _ = TABLE.read_text().partition(_SECTION)
        TABLE.write_text(table + render(kinds))


if __name__ == "__main__":
    main(sys.argv[1:])
