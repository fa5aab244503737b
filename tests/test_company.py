"""A text's rows are those of a fresh model that reads it alone, whatever is read with it or before."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from company import ROPE_TYPES, ROUNDING_OF_PASSAGES, TOLERANCE, NotApplicable, differences
from conftest import LENGTHS
from qk_sniffer.models import frequencies
from test_architectures import DOZEN, read_table
from test_exactness import probabilities, read_layer
from tiny import ARCHITECTURES

CAN_DIFFER = ("dynamic", "longrope")
BORDER = 24
OVERRIDES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + i for i in range(8)],
            "original_max_position_embeddings": BORDER,
        }
    },
    "dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": BORDER,
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "in the order of the file": {"data": {"batch_size": 3}},
    "under a budget": {"data": {"batch_size": 4, "max_tokens_per_batch": 130}},
    "from a stream": {"data": {"batch_size": 7, "streaming": True}},
    "in passages": {"data": {"batch_size": 3}, "model": {"prefill_chunk_size": 10}},
}


def walk() -> Iterator[Any]:
    """Every architecture with every kind of RoPE, of which continuous integration runs some."""
    for name, rope_type in itertools.product(ARCHITECTURES, ROPE_TYPES):
        is_often_run = name == "llama" or (name in DOZEN and rope_type in CAN_DIFFER)
        marks = [] if is_often_run else pytest.mark.every_architecture
        yield pytest.param(name, rope_type, marks=marks)


@pytest.mark.parametrize(("name", "rope_type"), walk())
def test_an_architecture_reads_each_text_as_if_it_were_alone(name: str, rope_type: str) -> None:
    try:
        found = differences(name, rope_type)
    except NotApplicable:
        pytest.skip(f"{name} has no RoPE of the kind {rope_type}")
    row = read_table()[name]
    assert ("in passages" in found) == ("| no: " not in row)
    passages = found.pop("in passages", 0.0)
    assert passages <= (1e-3 if "to 1e-3" in row else ROUNDING_OF_PASSAGES)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rope_type", OVERRIDES)
def test_files_have_the_attention_of_each_text_alone(
    rope_type: str,
    way: str,
    predict: Callable[..., int],
    model_dir: Callable[[str], Path],
    texts: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    overrides, sections = OVERRIDES[rope_type], WAYS[way]
    model = {"config_overrides": overrides} | sections.get("model", {})
    assert predict(**sections | {"model": model}) == 0
    assert min(LENGTHS) < BORDER < max(LENGTHS)
    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    for row in texts:
        oracle = fresh_model(model_dir("llama"), overrides)
        input_ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            attentions = oracle(input_ids=input_ids, output_attentions=True).attentions
        for layer, expected in enumerate(attentions):
            query = read_layer(tmp_path / "root", layer, 4, "q", row["id"])
            key = read_layer(tmp_path / "root", layer, 2, "k", row["id"])
            actual = probabilities(query, key, 0.25, None)
            torch.testing.assert_close(actual, expected[0], atol=1e-5, rtol=0)


def fresh_model(directory: Path, overrides: dict[str, Any]) -> PreTrainedModel:
    """The model of a directory, changed as transformers itself does it, that has read nothing."""
    config = AutoConfig.from_pretrained(directory)
    config.rope_parameters = config.rope_parameters | overrides["rope_scaling"]
    config.max_position_embeddings = overrides.get(
        "max_position_embeddings", config.max_position_embeddings
    )
    return AutoModelForCausalLM.from_pretrained(directory, config=config, attn_implementation="eager")


@pytest.mark.parametrize("rope_type", CAN_DIFFER)
def test_batches_in_other_orders_have_the_same_rows(
    rope_type: str, predict: Callable[..., int], tmp_path: Path
) -> None:
    """To the last bit where widths agree: a text is read alone, or beside texts of its frequencies."""
    model = {"config_overrides": OVERRIDES[rope_type]}
    assert predict("alone", model=model, data={"batch_size": 1}) == 0
    assert predict("backwards", model=model, data={"batch_size": 1, "max_tokens_per_batch": 1}) == 0
    for file in sorted((tmp_path / "alone").glob("l*/data.parquet")):
        other = tmp_path / "backwards" / file.relative_to(tmp_path / "alone")
        assert pq.read_table(file).equals(pq.read_table(other))


def test_the_walk_sees_frequencies_that_are_not_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequencies, "_renew", lambda *_: None)
    assert differences("llama", "dynamic")["one after another"] > 1e-2


def test_the_walk_sees_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qk_sniffer.module.spans_of_like_frequencies", lambda _, lengths: [(0, len(lengths))]
    )
    assert differences("phi3", "longrope")["in company"] > 1e-2


def test_a_run_refuses_passages_with_frequencies_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequencies, "_tell", lambda *_: [])
    assert "in passages" not in differences("phi3", "longrope")
