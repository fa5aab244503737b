"""Every architecture by processes that share it: exact, or refused as docs/architectures.md says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM

from examine import TABLE
from killing import Processes
from qk_sniffer.capture import ModelShard
from qk_sniffer.errors import UserError
from qk_sniffer.module import SnifferModule
from sharing import Sharers, Verdict, examine_sharing, examined_in_general, read_lists, sharers
from tiny import ARCHITECTURES, tiny_causal_lm

OFTEN = {"bloom", "deepseek_v3", "gemma3", "hrm_text", "llama", "mixtral", "qwen3_5_moe_text"}
EXAMINED = list(examined_in_general(list(ARCHITECTURES)))

Group = tuple[Sharers, Path]


@pytest.fixture(scope="module")
def two(processes: Processes) -> Iterator[Group]:
    # The first fixture warms what all processes are forked from.
    with sharers(2) as group:
        yield group


def examine(group: Group, name: str, changes: dict[str, Any]) -> Verdict:
    processes, directory = group
    first, *others = processes.run(examine_sharing, name, directory / name, changes)
    assert others == [first] * len(others)
    return first


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in OFTEN else pytest.mark.every_architecture)
        for name in EXAMINED
    ],
)
def test_an_architecture_is_shared_as_the_page_says(two: Group, name: str) -> None:
    assert examine(two, name, {}).kind == read_lists()[name]


def test_the_page_has_every_architecture() -> None:
    version = TABLE.read_text().partition("of transformers ")[2].partition(",")[0]
    if transformers.__version__ != version:
        pytest.skip(f"the page is about transformers {version}")
    assert set(read_lists()) == set(EXAMINED)


FOUR_KEY_HEADS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "attention_bias": True,
    # The product of matrices of experts takes no width that is not a multiple of four.
    "moe_intermediate_size": 48,
}


@pytest.mark.parametrize("count", [3, 4])
def test_more_than_two_processes(processes: Processes, count: int) -> None:
    kinds = {}
    with sharers(count) as group:
        for name in ("llama", "qwen3", "gemma3_text", "qwen3_moe"):
            kinds[name] = examine(group, name, FOUR_KEY_HEADS).kind
        kinds["deepseek_v3"] = examine(group, "deepseek_v3", {"moe_intermediate_size": 48}).kind
        kinds["mistral"] = examine(group, "mistral", {}).kind
    assert kinds == dict.fromkeys(kinds, "share") | {"deepseek_v3": "whole"}


def refusal_of_ones_own(shard: ModelShard, directory: Path) -> str:
    """What a model says that a person has sharded."""
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    if shard.number == 0:
        tiny_causal_lm("llama").save_pretrained(directory)
    dist.barrier()
    config = DistributedConfig(tp_size=shard.count)
    model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=config)
    with pytest.raises(UserError) as error:
        SnifferModule.of(model)
    return str(error.value)


def test_a_model_that_a_person_has_sharded(two: Group) -> None:
    processes, directory = two
    for message in processes.run(refusal_of_ones_own, directory / "own"):
        assert message.startswith(
            "model: LlamaForCausalLM is shared by 2 processes, and the numbers of"
        )
        assert message.endswith("SnifferModule load it with tensor_parallel=2")
