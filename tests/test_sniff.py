"""``sniff``: a loaded model's own calls, against a run, the model's own attention, and itself without it."""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import AttentionInterface

from conftest import Run, WriteRun, byte_tokenizer, write_jsonl
from families import FAMILIES, tiny_model
from qk_sniffer import Captures, sniff
from qk_sniffer.errors import UserError
from qk_sniffer.models import decoder_backbone
from qk_sniffer.sniffing import Captured
from tiny import tiny_causal_lm

TOLERANCE = 1e-5
DOZEN = [*FAMILIES, "bloom", "opt", "gpt_neox", "gemma2", "gpt_oss", "phi3", "falcon"]


def model_of(family: str, implementation: str | None = None) -> PreTrainedModel:
    model = tiny_model(FAMILIES[family]) if family in FAMILIES else tiny_causal_lm(family)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model.eval()


def tokens_of(*texts: str) -> dict[str, Tensor]:
    """Texts that are padded on the left, with the positions that ``generate`` gives them."""
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": inputs["input_ids"], "attention_mask": mask, "position_ids": positions}


def rows_of(captured: Captures, example: int | str, **columns: Any) -> dict[str, np.ndarray]:
    """The rows of all heads in one text, by name."""
    found = {}
    for head in captured.heads:
        rows = head.where(example=example).numpy()
        assert (np.diff(rows["position"]) > 0).all()
        found[head.name] = rows["vector"]
        found[f"{head.name} position"] = rows["position"]
    return found


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape, name
        np.testing.assert_allclose(found[name], values, atol=TOLERANCE, rtol=0, err_msg=name)


def alone(model: nn.Module, input_ids: Tensor, **settings: Any) -> dict[str, np.ndarray]:
    """The rows of one text that is read by itself."""
    with torch.no_grad(), sniff(model, **settings) as captured:
        model(input_ids=input_ids.reshape(1, -1))
    return rows_of(captured, 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"sampler": "uniform", "base_rate": 7.0, "min_bucket_size": 8}, {"pre_rope": True}],
    ids=["all", "uniform", "pre-rope"],
)
def test_rows_are_those_of_a_run(
    family: str,
    settings: dict[str, Any],
    predict: Run,
    model_dir: Callable[[str], Path],
    texts: list[Any],
    tmp_path: Path,
) -> None:
    sampler = {"type": settings.get("sampler", "all"), "base_rate": settings.get("base_rate", 1.0)}
    capture = {
        "sampler": sampler,
        "min_bucket_size": settings.get("min_bucket_size", 8192),
        "capture_pre_rope": "pre_rope" in settings,
    }
    if family == "gpt2" and "pre_rope" in settings:
        pytest.skip("GPT-2 has no RoPE")
    assert predict(family=family, sniffer={"capture": capture}, data={"batch_size": 1}) == 0
    run = Captures(tmp_path / "root")
    model = AutoModelForCausalLM.from_pretrained(model_dir(family))
    tokenizer = AutoTokenizer.from_pretrained(model_dir(family))
    with torch.no_grad(), sniff(model, tokenizer=tokenizer, **settings) as captured:
        for row in texts:
            captured.names([row["id"]])
            model(**tokenizer(row["text"], return_tensors="pt"))
    assert [head.name for head in captured.heads] == [head.name for head in run.heads]
    for ours, theirs in zip(captured.heads, run.heads, strict=True):
        found, expected = ours.arrow(), theirs.arrow()
        for column in ("bucket", "example_id", "position", "vector", "sliding_window"):
            assert found[column].to_pylist() == expected[column].to_pylist(), (ours.name, column)
    assert captured.examples.to_pylist() == run.examples.to_pylist()


@pytest.mark.parametrize("family", DOZEN)
def test_left_padding_changes_no_row(family: str) -> None:
    model = model_of(family)
    texts = "a short one", "a text that has some more tokens", "two"
    with torch.no_grad(), sniff(model) as captured:
        model(**accepted(model, tokens_of(*texts)))
    for number, text in enumerate(texts):
        expected = alone(model, tokens_of(text)["input_ids"])
        assert_close(rows_of(captured, number), expected)


def accepted(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that a model takes: some count positions by the mask alone."""
    known = inspect.signature(model.forward).parameters
    return {name: values for name, values in inputs.items() if name in known}


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", DOZEN)
def test_generate_is_one_text(family: str, sampled: bool) -> None:
    """Prompts of unequal length, padded on the left: prompt and continuation as one forward has them."""
    model = model_of(family, "eager")
    inputs = tokens_of("a short one", "a text that has some more tokens")
    del inputs["position_ids"]
    torch.manual_seed(1)
    with sniff(model) as captured:
        texts = model.generate(**inputs, max_new_tokens=9, do_sample=sampled)
    for number, (text, mask) in enumerate(zip(texts, inputs["attention_mask"], strict=True)):
        # The last token is never read, and neither is what follows the end of a text.
        prompt, continuation = text[: mask.numel()][mask.bool()], text[mask.numel() : -1]
        ends = [
            i for i, token in enumerate(continuation) if token == model.generation_config.eos_token_id
        ]
        continuation = continuation[: ends[0] + 1] if ends else continuation
        whole = torch.cat([prompt, continuation])
        assert captured.examples["n_tokens"][number].as_py() == len(whole)
        assert_close(rows_of(captured, number), alone(model, whole))
        with torch.no_grad():
            expected = model(input_ids=whole[None], output_attentions=True).attentions
        if captured.manifest["layers"][0]["scores"] is not None:
            found = captured.attention(1, 2, number).probabilities
            torch.testing.assert_close(found, expected[1][0, 2], atol=TOLERANCE, rtol=0)


def test_a_text_that_generate_pads_has_ended() -> None:
    """A batch of prompts of which one ends early: what it is padded with is no row."""
    model = model_of("llama")
    inputs = tokens_of("a short one", "a text that has some more tokens")
    del inputs["position_ids"]
    width = inputs["input_ids"].shape[1]
    first, second = model.generate(**inputs, max_new_tokens=9, eos_token_id=None)[:, width:].tolist()
    end = next(token for token in first[1:4] if token not in second[:8] and token != first[0])
    model.generation_config.eos_token_id = end
    with sniff(model) as captured:
        texts = model.generate(**inputs, max_new_tokens=9)
        captured.names(["another"])
        model(**tokens_of("another"))
    assert texts[0, width:].tolist()[-1] == model.generation_config.pad_token_id
    n_tokens = {row["source_id"]: row["n_tokens"] for row in captured.examples.to_pylist()}
    assert [n_tokens["0"], n_tokens["1"]] == [
        len("a short one") + 1 + first.index(end),
        len("a text that has some more tokens") + 8,
    ]
    whole = torch.cat(
        [tokens_of("a short one")["input_ids"][0], torch.tensor(first[: first.index(end) + 1])]
    )
    assert_close(rows_of(captured, 0), alone(model, whole))


def test_a_conversation_is_one_text() -> None:
    """A second turn on the cache of the first goes on with its text; another cache begins another."""
    model, tokenizer = model_of("qwen3"), byte_tokenizer()
    turns = [
        tokenizer(text, return_tensors="pt")["input_ids"] for text in ("hello there", " and again")
    ]
    with torch.no_grad(), sniff(model) as captured:
        cache = model(input_ids=turns[0]).past_key_values
        model(input_ids=turns[1], past_key_values=cache)
        other = DynamicCache(config=model.config)
        for token in turns[1].split(1, dim=1):
            model(input_ids=token, past_key_values=other)
    assert captured.examples["n_tokens"].to_pylist() == [21, 10]
    assert_close(rows_of(captured, 0), alone(model, torch.cat(turns, dim=1)))
    assert_close(rows_of(captured, 1), alone(model, turns[1]))


def test_packed_texts_are_texts_of_their_own() -> None:
    model, tokenizer = model_of("llama"), byte_tokenizer()
    texts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in ("first", "a second", "3")]
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    with torch.no_grad(), sniff(model) as captured:
        captured.names(["a", "b", "c"])
        model(input_ids=torch.cat(texts, dim=1), position_ids=positions, use_cache=False)
    assert captured.examples.num_rows == 3
    for name, text in zip("abc", texts, strict=True):
        assert_close(rows_of(captured, name), alone(model, text))


def test_positions_are_the_models_own_where_none_are_given() -> None:
    """Without position_ids Llama counts every place, and rotates a padded text by where it begins."""
    model = model_of("llama")
    inputs = tokens_of("a text", "two")
    del inputs["position_ids"]
    with torch.no_grad(), sniff(model) as captured:
        model(**inputs)
    assert captured.head(0, 0).where(example=1).numpy()["position"].tolist() == [3, 4, 5]
    with torch.no_grad():
        expected = model_of("llama", "eager")(**inputs, output_attentions=True).attentions
    found = captured.attention(2, 1, 1).among_kept
    torch.testing.assert_close(found, expected[2][1, 1, 3:, 3:], atol=TOLERANCE, rtol=0)


@contextmanager
def nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3"])
def test_the_model_does_what_it_does_without(family: str, implementation: str) -> None:
    """Loss, gradients in train mode with dropout and checkpointing, and sampled tokens, bit by bit."""

    def results(sniffed: bool) -> list[Tensor]:
        model = model_of(family, implementation)
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.2
        torch.manual_seed(5)
        with sniff(model) if sniffed else nothing():
            inputs = tokens_of("a text", "another of them")
            generated = model.generate(**inputs, max_new_tokens=8, do_sample=True)
            model.train()
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            model.gradient_checkpointing_enable()
            checkpointed = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            checkpointed.backward()
        assert all(part.training for part in model.modules())
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        return [generated, loss, checkpointed, torch.rand(3), *gradients]

    for with_it, without in zip(results(True), results(False), strict=True):
        assert torch.equal(with_it, without)


def test_what_a_backward_computes_again_is_no_row() -> None:
    model = model_of("llama").train()
    model.gradient_checkpointing_enable()
    inputs = byte_tokenizer()("a text that is read once", return_tensors="pt")["input_ids"]
    with sniff(model) as captured:
        model(input_ids=inputs, labels=inputs, use_cache=False).loss.backward()
    assert len(captured.head(0, 0)) == inputs.shape[1]
    assert not captured.head(0, 0).torch()["vector"].requires_grad


def left_on(model: nn.Module) -> list[Any]:
    """All that somebody could hang on a model, and on the classes of transformers."""
    hooks = [
        (dict(part._forward_hooks), dict(part._forward_pre_hooks), dict(vars(part)).keys())
        for part in model.modules()
    ]
    kinds = {type(part) for part in model.modules()} | {AttentionInterface, Cache}
    classes = [(kind, dict(vars(kind))) for kind in sorted(kinds, key=str)]
    modules = {kind.__module__ for kind in kinds if kind.__module__.startswith("transformers.models")}
    files = [dict(vars(sys.modules[module])) for module in sorted(modules)]
    return [hooks, classes, files, {part: part.training for part in model.modules()}]


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_on_the_model(family: str, error: type[BaseException]) -> None:
    """After an error in a layer of a call, and one in the block; the calls before are kept."""
    model = model_of(family)
    alone(model, torch.tensor([5, 6, 7]))
    before = left_on(model)
    last = [part for part in model.modules() if isinstance(part, nn.Linear)][-2]
    input_ids = torch.tensor([[5, 6, 7, 8]])

    def fail(*_: Any) -> None:
        raise error

    with pytest.raises(error), torch.no_grad(), sniff(model, pre_rope=family == "llama") as captured:
        model(input_ids=input_ids)
        captured.names(["broken"])
        hook = last.register_forward_hook(fail)
        with pytest.raises(error):
            model(input_ids=input_ids)
        hook.remove()
        model(input_ids=input_ids[:, :3])
        raise error
    assert left_on(model) == before
    assert {row["source_id"]: row["n_tokens"] for row in captured.examples.to_pylist()} == {
        "0": 4,
        "broken": 3,
    }
    assert len(captured.head(1, 1)) == 7


def test_blocks_may_be_nested_and_models_watched_together() -> None:
    first, second = model_of("llama"), model_of("qwen3")
    text, other = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10]])
    before = left_on(first)
    with torch.no_grad(), sniff(first) as outer, sniff(second) as beside:
        first(input_ids=text)
        with sniff(first, layers=[1], kinds="k") as inner:
            first(input_ids=other)
            second(input_ids=other)
    assert left_on(first) == before
    assert outer.examples["n_tokens"].to_pylist() == [4, 2]
    assert inner.examples["n_tokens"].to_pylist() == [2]
    assert beside.examples["n_tokens"].to_pylist() == [2]
    assert [head.name for head in inner.heads] == ["l01h00k", "l01h01k"]
    found, expected = inner.head(1, 0, "k").numpy(), outer.head(1, 0, "k").where(example=1).numpy()
    np.testing.assert_array_equal(found["vector"], expected["vector"])


def test_blocks_of_several_threads_may_end_in_any_order() -> None:
    """One model, three threads with blocks of their own that overlap; each has its own calls alone."""
    model = model_of("llama")
    alone(model, torch.tensor([5, 6, 7]))
    before = left_on(model)
    barrier = threading.Barrier(3)
    found: dict[int, Captured] = {}

    def work(number: int) -> None:
        with torch.no_grad(), sniff(model, pre_rope=number == 1) as captured:
            barrier.wait()
            for length in range(2, 12):
                model(input_ids=torch.arange(length)[None] + 20 * number)
            barrier.wait()
            found[number] = captured
            threading.Event().wait(0.05 * number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left_on(model) == before
    for number, captured in found.items():
        texts = sorted(captured.examples["n_tokens"].to_pylist())
        assert texts == sorted([*range(2, 12)] * 3), number


def test_one_block_captures_the_calls_of_all_threads() -> None:
    model = model_of("llama")
    with torch.no_grad(), sniff(model) as captured:

        def work(number: int) -> None:
            with torch.no_grad():
                for length in range(2, 12):
                    model(input_ids=torch.arange(length)[None] + 20 * number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    tokens = {text.example_id: text.tokens for text in captured._session.texts.read}
    assert sorted(tokens) == list(range(30))
    for example, token_ids in tokens.items():
        assert_close(rows_of(captured, example), alone(model, torch.tensor(token_ids)))
