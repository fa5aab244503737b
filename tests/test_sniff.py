"""``sniff``: calls of a loaded model, against a run, its own attention, and itself without it."""

import inspect
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MambaConfig,
    PreTrainedModel,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import AttentionInterface

from conftest import Run, byte_tokenizer
from families import FAMILIES, tiny_model
from qk_sniffer import Captures, sniff
from qk_sniffer.capture import buffers
from qk_sniffer.cli import main
from qk_sniffer.errors import UserError
from qk_sniffer.kinds import SOFTMAX_COLUMNS
from qk_sniffer.models import decoder_backbone
from qk_sniffer.sniffing import Captured
from tiny import tiny_causal_lm

TOLERANCE = 1e-5
DOZEN = [*FAMILIES, "bloom", "opt", "gpt_neox", "gemma2", "gpt_oss", "phi3", "falcon"]
EVERYTHING: dict[str, Any] = {"kinds": "qkvo", "softmax": True, "local_positions": 5}
NO_ROPE = ("gpt2", "bloom", "opt")


def model_of(family: str, implementation: str | None = None) -> PreTrainedModel:
    # A model may change its config, and others are made of the same.
    model = tiny_model(deepcopy(FAMILIES[family])) if family in FAMILIES else tiny_causal_lm(family)
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
        found |= {
            f"{head.name} {name}": rows[name] for name in ("position", *SOFTMAX_COLUMNS) if name in rows
        }
    return found


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape, name
        np.testing.assert_allclose(found[name], values, atol=TOLERANCE, rtol=0, err_msg=name)


def alone(model: nn.Module, input_ids: Tensor) -> dict[str, np.ndarray]:
    """Everything of one text that is read by itself."""
    with torch.no_grad(), sniff(model, **EVERYTHING) as captured:
        model(input_ids=input_ids.reshape(1, -1))
    return rows_of(captured, 0)


@pytest.mark.parametrize("family", DOZEN)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampler": "uniform", "base_rate": 7.0, "min_bucket_size": 8},
        {"pre_rope": True},
        {**EVERYTHING, "sampler": "uniform", "base_rate": 4.0, "min_bucket_size": 8},
    ],
    ids=["all", "uniform", "pre-rope", "everything"],
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
    if "kinds" in settings:
        capture |= dict.fromkeys(("capture_values", "capture_outputs", "capture_softmax"), True)
        capture |= {"local_positions": 5}
    if family in NO_ROPE and "pre_rope" in settings:
        pytest.skip("no RoPE of a function of its own")
    directory = model_dir(family) if family in FAMILIES else tmp_path / family
    if family not in FAMILIES:
        tiny_causal_lm(family).save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
    model_section = {"name": str(directory)}
    assert predict(model=model_section, sniffer={"capture": capture}, data={"batch_size": 1}) == 0
    run = Captures(tmp_path / "root")
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad(), sniff(model, tokenizer=tokenizer, **settings) as captured:
        for row in texts:
            captured.names([row["id"]])
            model(**tokenizer(row["text"], return_tensors="pt"))
    assert [head.name for head in captured.heads] == [head.name for head in run.heads]
    for ours, theirs in zip(captured.heads, run.heads, strict=True):
        found, expected = ours.arrow(), theirs.arrow()
        assert found.schema == expected.schema
        for column in set(found.schema.names) - {"token_str"}:
            assert found[column].to_pylist() == expected[column].to_pylist(), (ours.name, column)
    assert captured.examples.to_pylist() == run.examples.to_pylist()


@pytest.mark.parametrize("family", DOZEN)
def test_left_padding_changes_no_row(family: str) -> None:
    model = model_of(family)
    texts = "a short one", "a text that has some more tokens", "two"
    with torch.no_grad(), sniff(model, **EVERYTHING) as captured:
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
    """Prompts of unequal length, padded on the left: prompt and continuation, as in one forward."""
    model = model_of(family, "eager")
    inputs = tokens_of("a short one", "a text that has some more tokens")
    del inputs["position_ids"]
    torch.manual_seed(1)
    with sniff(model, **EVERYTHING) as captured:
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


def prompts_of_which_one_ends(model: PreTrainedModel) -> tuple[dict[str, Tensor], list[int], int]:
    """Two prompts, what is written behind the first, and a token there that the other lacks."""
    inputs = tokens_of("a short one", "a text that has some more tokens")
    del inputs["position_ids"]
    width = inputs["input_ids"].shape[1]
    first, second = model.generate(**inputs, max_new_tokens=9, eos_token_id=None)[:, width:].tolist()
    end = next(token for token in first[1:4] if token not in second[:8] and token != first[0])
    return inputs, first, end


def test_a_text_that_generate_pads_has_ended() -> None:
    """A batch of prompts of which one ends early: what it is padded with is no row."""
    model = model_of("llama")
    inputs, first, end = prompts_of_which_one_ends(model)
    width = inputs["input_ids"].shape[1]
    model.generation_config.eos_token_id = end
    with sniff(model, **EVERYTHING) as captured:
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
    with torch.no_grad(), sniff(model, **EVERYTHING) as captured:
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
    with torch.no_grad(), sniff(model, **EVERYTHING) as captured:
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
    found = captured.attention(2, 1, 1).probabilities
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
        with sniff(model, **EVERYTHING) if sniffed else nothing():
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
    with sniff(model, **EVERYTHING) as captured:
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
    """One model, three threads with blocks of their own that overlap: each has the calls of all."""
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
    with torch.no_grad(), sniff(model, **EVERYTHING) as captured:

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


def test_an_adapter_of_peft() -> None:
    """LoRA on queries and keys, in use, switched off, and merged."""
    from peft import LoraConfig, get_peft_model

    tokens = torch.arange(5, 17)
    plain = alone(model_of("llama"), tokens)
    config = LoraConfig(target_modules=["q_proj", "k_proj"], r=4, init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(model_of("llama"), config)
    adapted = alone(model, tokens)
    with model.disable_adapter():
        assert_close(alone(model, tokens), plain)
    assert np.abs(adapted["l00h00q"] - plain["l00h00q"]).max() > 0.1
    with torch.no_grad(), sniff(model, **EVERYTHING) as captured:
        whole = model.generate(input_ids=tokens[None], max_new_tokens=6)[:, :-1]
    assert_close(rows_of(captured, 0), alone(model, whole))
    merged = model.merge_and_unload()
    assert_close(alone(merged, tokens), adapted)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model(bits: int, tmp_path: Path) -> None:
    """Weights of few bits by bitsandbytes: the rows explain the attention that they give."""
    config = deepcopy(FAMILIES["llama"])
    config.intermediate_size = 128
    tiny_model(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4),
        attn_implementation="eager",
    )
    tokens = torch.arange(5, 17)[None]
    with torch.no_grad(), sniff(model, **EVERYTHING) as captured:
        expected = model(input_ids=tokens, output_attentions=True).attentions
    for layer, probabilities in enumerate(expected):
        found = captured.attention(layer, 3, 0).probabilities
        torch.testing.assert_close(found, probabilities[0, 3].float(), atol=TOLERANCE, rtol=0)
    plain = alone(AutoModelForCausalLM.from_pretrained(tmp_path), tokens)
    assert np.abs(rows_of(captured, 0)["l00h00q"] - plain["l00h00q"]).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_and_its_bare_decoder(dtype: torch.dtype) -> None:
    model = model_of("qwen2").to(dtype)
    tokens = torch.arange(5, 17)[None]
    with torch.no_grad(), sniff(decoder_backbone(model), **EVERYTHING) as captured:
        decoder_backbone(model)(tokens)
    assert_close(rows_of(captured, 0), alone(model, tokens))
    vectors = captured.head(0, 0).torch()["vector"]
    assert vectors.dtype == torch.float32
    assert torch.equal(vectors, vectors.to(dtype).float())


def test_a_model_that_accelerate_has_placed(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Layers whose weights are on the disk until they run."""
    tokens = torch.arange(5, 17)[None]
    place = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.rotary_emb": "cpu",
    }
    place |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(
        model_dir("llama"), device_map=place, offload_folder=str(tmp_path)
    )
    assert_close(alone(model, tokens), alone(model_of("llama"), tokens))


def test_what_is_saved_is_a_data_root(
    model_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands take it, ``load_dataset`` too, and its rows are those that were in memory."""
    model = AutoModelForCausalLM.from_pretrained(model_dir("gemma3"))
    tokenizer = AutoTokenizer.from_pretrained(model_dir("gemma3"))
    settings = {"sampler": "uniform", "base_rate": 5.0, "min_bucket_size": 8}
    with torch.no_grad(), sniff(model, tokenizer=tokenizer, **settings) as captured:
        captured.names(["one", "two"])
        model(
            **tokenizer(
                ["a first text", "and a second that is longer"], return_tensors="pt", padding=True
            )
        )
        model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)
    root = tmp_path / "saved"
    captured.save(root)
    assert main(["verify", str(root)]) == 0
    assert main(["report", str(root)]) == 0
    assert "Traceback" not in capsys.readouterr().err
    saved = Captures(root)
    assert saved.examples.to_pylist() == captured.examples.to_pylist()
    for found, expected in zip(saved.heads, captured.heads, strict=True):
        assert found.name == expected.name
        assert found.arrow().to_pylist() == expected.arrow().to_pylist()
    rows = datasets.load_dataset(str(root), "l01h02q", split="train")
    assert rows["token_str"][:] == captured.head(1, 2).arrow()["token_str"].to_pylist()
    assert None not in rows["token_str"][:]
    with pytest.raises(UserError, match=r"data_root: .* is not empty; name a new directory"):
        captured.save(root)


def test_it_is_read_like_a_data_root() -> None:
    """Arrays, tensors, a data frame, and batches, while the block goes on and behind it."""
    model, tokenizer = model_of("llama"), byte_tokenizer()
    with torch.no_grad(), sniff(model, tokenizer=tokenizer, layers=[1, 2], heads=[0, 3]) as captured:
        model(**tokenizer("a text", return_tensors="pt"))
        assert len(captured.head(1, 3)) == 6
        model(**tokenizer(["more", "and more"], return_tensors="pt", padding=True))
        assert len(captured.head(1, 3)) == 18
    head = captured.head(2, 0)
    assert repr(head) == "<Head l02h00q: 18 rows, head_dim 16>"
    assert "".join(head.where(example=0).pandas()["token_str"]) == "aĠtext"
    assert head.where(example="1", position=range(2)).torch()["position"].tolist() == [0, 1]
    batches = list(DataLoader(head.batches(5)))
    assert torch.equal(torch.cat([batch["vector"] for batch in batches]), head.torch()["vector"])
    assert [token for batch in batches for token in batch["token_str"]][:6] == list("aĠtext")
    assert list(captured.layers) == [1, 2]
    assert repr(captured) == (
        "<Captured of LlamaForCausalLM on a dataset, in memory: 8 heads in 2 layers, 3 examples>"
    )
    assert "<td>3, 18 tokens</td>" in captured._repr_html_()
    assert "statistics" not in captured._repr_html_()


def test_it_says_which_kinds_and_statistics_are_there() -> None:
    model = model_of("llama")
    with torch.no_grad(), sniff(model, kinds="qvo", softmax=True, layers=[1]) as captured:
        model(**tokens_of("a text"))
    shown = captured._repr_html_()
    assert "<td>4 query, 2 value, 4 output</td>" in shown
    assert "<th>statistics</th><td>lse, entropy, max_prob, argmax_position, sink_prob" in shown


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    model = model_of("llama")
    tokens = torch.arange(5, 17)[None]

    def refused(message: str, use: Callable[[Captured], Any] = lambda _: None, **settings: Any) -> None:
        with (
            pytest.raises(UserError, match=message) as error,
            torch.no_grad(),
            sniff(settings.pop("model", model), **settings) as captured,
        ):
            use(captured)
        assert "\n" not in str(error.value)

    refused("model: expected a loaded model of transformers, got str; load one", model="gpt2")
    refused("model: Linear holds no model of transformers", model=nn.Linear(2, 2))
    refused("model.name: .* is a mamba model: it has no softmax attention", model=tiny_mamba())
    refused("model: a compiled backbone runs kernels", model=torch.compile(model))
    refused("layers: the model has no layer 99; choose from 0 to 3", layers=[99])
    refused("heads: the model has no query head 7; choose from 0 to 3", heads=[7])
    refused("kinds: expected some of qkvo, such as qk or v, got 'x'", kinds="x")
    refused("sampler: no sampler is called 'unifrom'", sampler="unifrom")
    refused("base_rate: must be a finite number", base_rate=0.0)
    refused("captured: nothing was read yet; call the model", lambda c: c.head(0, 0))
    refused("captured: nothing was read yet", lambda c: c.save(tmp_path / "root"))
    refused(
        "names: 2 names were given, and the call begins 1 texts",
        lambda c: (c.names(["a", "b"]), model(tokens)),
    )
    for wrong in ("ab", None, [True], [1.5]):
        refused("names: expected a list of strings or integers", lambda c, n=wrong: c.names(n))
    refused("device: expected host or model, got 'cuda'", device="cuda")
    refused("seed: expected an integer, got 'a'", seed="a")
    refused("limit_bytes: expected an integer, got '4GB'", limit_bytes="4GB")
    refused("layers: expected integers, got 'ab'", layers="ab")
    refused("tokenizer: expected a loaded one, got 'x'", tokenizer="x")
    refused("class path of a qk_sniffer.capture.Sampler subclass", sampler="foo")
    refused("T5ForConditionalGeneration is no causal language model", model=tiny_t5())
    refused("names: 'a' has the example id", lambda c: c.names(["a", "a"]))
    embedded = model.get_input_embeddings()(tokens)
    refused("called with inputs_embeds and no input_ids", lambda _: model(inputs_embeds=embedded))
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    refused("attention_mask says who attends to whom", lambda _: model(tokens, attention_mask=mask))
    refused(
        "beam search .* num_beams=1", lambda _: model.generate(tokens, num_beams=2, max_new_tokens=5)
    )
    assistant = {"assistant_model": model_of("llama"), "max_new_tokens": 5}
    refused(
        "assisted decoding does; generate without an assistant",
        lambda _: model.generate(tokens, **assistant),
    )
    static = {"cache_implementation": "static", "max_new_tokens": 5}
    refused("generate without a static cache", lambda _: model.generate(tokens, **static))
    refused(
        "limit_bytes: the rows take more than 1,000 bytes", lambda _: model(tokens), limit_bytes=1000
    )

    def padded(captured: Captured) -> None:
        inputs = tokens_of("one", "longer")
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        captured.save(tmp_path / "root")

    refused("data_root: it holds whole texts, and one was read at position 3 where 0", padded)
    assert not (tmp_path / "root").exists()


def tiny_t5() -> PreTrainedModel:
    sizes = dict(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(T5Config(vocab_size=20, **sizes))


def tiny_mamba() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1)
    )


def test_what_the_limit_left_out_is_told_and_what_was_there_stays() -> None:
    model = model_of("llama")
    # 12 heads of 16 numbers of 4 bytes in each of 4 layers, queries and keys together 6 x 4.
    with torch.no_grad(), sniff(model, limit_bytes=24 * 64 * 6) as captured:
        model(torch.tensor([[5, 6, 7, 8]]))
        with pytest.raises(UserError, match="limit_bytes"):
            model(torch.tensor([[5, 6, 7]]))
        model(torch.tensor([[5, 6]]))
    assert captured.examples.to_pylist() == [
        {"example_id": number, "source_id": str(number), "n_tokens": n_tokens, "truncated": False}
        for number, n_tokens in enumerate((4, 2))
    ]
    assert len(captured.head(3, 3)) == 6


def contents(captured: Captures) -> dict[str, Any]:
    texts = captured.examples.to_pylist()
    return {head.name: head.arrow().to_pylist() for head in captured.heads} | {"texts": texts}


def test_texts_go_to_a_data_root_as_they_end(tmp_path: Path) -> None:
    """Memory holds what may go on, and no more; the files have what memory would have had."""
    model, root = model_of("llama"), tmp_path / "root"
    prompts = [tokens_of("a text", "another of them"), tokens_of("more of it"), tokens_of("the last")]
    kept = []

    def read() -> None:
        for prompt in prompts * 3:
            model.generate(**accepted(model, prompt), max_new_tokens=5)
            kept.append(captured._session.store.n_bytes)

    with sniff(model) as captured:
        read()
    expected, in_memory = contents(captured), kept[-1]
    kept.clear()
    with sniff(model, data_root=root) as captured:
        read()
        with pytest.raises(UserError, match=r"captured: its rows are written to .*root; read"):
            captured.head(0, 0)
        assert repr(captured).startswith("<Captured: its rows are written to")
    assert contents(captured) == contents(Captures(root)) == expected
    assert max(kept) < in_memory / 2
    assert main(["verify", str(root)]) == 0
    with pytest.raises(UserError, match=r"data_root: the rows go to .*root already"):
        captured.save(tmp_path / "other")


def test_a_block_that_was_interrupted_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The text that was being read is captured again, and those that had ended are kept."""
    model, root = model_of("llama"), tmp_path / "root"
    texts = {f"text {number}": torch.arange(3, 12 + number)[None] for number in range(5)}

    def read(until: int, data_root: Path | None, **settings: Any) -> Captured:
        with torch.no_grad(), sniff(model, data_root=data_root, **settings) as captured:
            for number, (name, tokens) in enumerate(texts.items()):
                captured.names([name])
                model(tokens, use_cache=False)
                if number == until:
                    raise KeyboardInterrupt
        return captured

    expected = contents(read(9, None))
    with pytest.raises(KeyboardInterrupt):
        read(2, root)
    assert "What was captured so far is safe" in caplog.text
    assert not (root / "manifest.json").exists()
    assert contents(read(9, root)) == expected
    assert main(["verify", str(root)]) == 0
    with pytest.raises(UserError, match=r"data_root: .* with other settings: sampler is"):
        read(9, root, sampler="uniform")
    read(9, root, sampler="uniform", overwrite=True)
    assert Captures(root).settings["capture"]["sampler"]["type"] == "uniform"


def test_a_data_root_has_one_owner(tmp_path: Path) -> None:
    model, root = model_of("llama"), tmp_path / "root"
    with sniff(model, data_root=root):
        with (
            pytest.raises(UserError, match=r"data_root: .* belongs to a run at work"),
            sniff(model, data_root=root),
        ):
            pass
        assert main(["finalize", str(root)]) == 2


def test_many_calls_leave_few_tensors() -> None:
    """Tokens that come one by one are joined, and are the rows of one call."""
    model = model_of("llama")
    with torch.no_grad(), sniff(model, **EVERYTHING) as captured:
        text = model.generate(torch.tensor([[5, 6]]), max_new_tokens=100, eos_token_id=None)
    parts = captured._session.store._parts.values()
    assert max(map(len, parts)) < 12
    assert_close(rows_of(captured, 0), alone(model, text[:, :-1]))


def test_packed_texts_that_the_model_does_not_keep_apart_are_refused() -> None:
    """With a cache or a mask transformers lets them attend to each other."""
    model = model_of("llama")
    tokens, positions = torch.arange(5, 17)[None], torch.arange(6).repeat(2)[None]
    mask = torch.ones_like(tokens)
    cases: list[dict[str, Any]] = [{}, {"attention_mask": mask, "use_cache": False}]
    for case in cases:
        with (
            pytest.raises(UserError, match="position_ids begin anew within a sequence"),
            torch.no_grad(),
            sniff(model),
        ):
            model(input_ids=tokens, position_ids=positions, **case)
    with torch.no_grad(), sniff(model) as captured:
        cache = model(input_ids=tokens).past_key_values
        with pytest.raises(UserError, match="position_ids begin anew"):
            model(input_ids=tokens, position_ids=positions, past_key_values=cache)
    assert captured.examples["n_tokens"].to_pylist() == [12]


@pytest.mark.parametrize("family", ["gpt_oss", "opt", "falcon", "bert"])
def test_packed_texts_of_models_that_never_keep_them_apart_are_refused(family: str) -> None:
    """Their modeling files don't tell what makes the mask of the positions."""
    model = model_of(family)
    positions = torch.arange(6).repeat(2)[None]
    inputs = {"input_ids": torch.arange(5, 17)[None], "position_ids": positions, "use_cache": False}
    with (
        pytest.raises(UserError, match="position_ids begin anew within a sequence"),
        torch.no_grad(),
        sniff(model),
    ):
        model(**inputs)


@pytest.mark.parametrize("given", ["position_ids", "none"])
@pytest.mark.parametrize("family", ["llama4_text", "mpt", "bloom", "falcon", "llama"])
def test_attention_is_that_of_a_padded_text(family: str, given: str) -> None:
    """Chunks count from its first token, and some models count the padding or pass over positions."""
    model = model_of(family, "eager")
    inputs = tokens_of("two", "a text that has some more tokens")
    if given == "none":
        del inputs["position_ids"]
    with torch.no_grad(), sniff(model, softmax=True) as captured:
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    padding = inputs["input_ids"].shape[1] - len("two")
    for layer in range(len(attentions)):
        if captured.layers[layer].scores is not None:
            expected = attentions[layer][0, 1, padding:, padding:]
            found = captured.attention(layer, 1, 0).probabilities
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_keys_that_the_model_has_left_out_are_seen() -> None:
    """As by a cache that drops tokens which a layer's window does not tell of."""
    model = model_of("llama")
    with torch.no_grad(), sniff(model, softmax=True) as captured:
        model(torch.arange(5, 17)[None])
    attention = captured.attention(0, 0, 0)
    fewer = {"lse": attention.statistics["lse"] - 0.5}
    with pytest.raises(UserError, match="the stored keys of 12 queries have more than all of their"):
        _ = replace(attention, statistics=fewer).probabilities


@pytest.mark.parametrize(
    "ends", ["argument", "criterion", "pad is eos"], ids=["argument", "criterion", "pad"]
)
def test_a_text_has_ended_however_generate_is_told(ends: str) -> None:
    model = model_of("llama")
    inputs, first, end = prompts_of_which_one_ends(model)
    width = inputs["input_ids"].shape[1]
    settings: dict[str, Any] = {"eos_token_id": end, "pad_token_id": 0}
    if ends == "pad is eos":
        settings["pad_token_id"] = end
    if ends == "criterion":
        settings = {"eos_token_id": None, "pad_token_id": 0, "stopping_criteria": [EndsAt(end)]}
    with sniff(model, **EVERYTHING) as captured:
        texts = model.generate(**inputs, max_new_tokens=9, **settings)
        model(input_ids=torch.tensor([[5, 6]]))
    kept = len("a short one") + 1 + first.index(end)
    assert captured.examples["n_tokens"].to_pylist() == [
        kept,
        len("a text that has some more tokens") + 8,
        2,
    ]
    whole = torch.cat([texts[0, :width][inputs["attention_mask"][0].bool()], texts[0, width:]])[:kept]
    assert_close(rows_of(captured, 0), alone(model, whole))


class EndsAt(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids[:, -1] == self.token


def test_tokens_that_are_read_one_by_one_are_all_kept() -> None:
    """Also one that ends texts, behind another of them."""
    model = model_of("llama")
    tokens = torch.tensor([[5, 6, 1, 1, 7, 8]])
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), sniff(model, **EVERYTHING) as captured:
        for token in tokens.split(1, dim=1):
            model(input_ids=token, past_key_values=cache)
    assert_close(rows_of(captured, 0), alone(model, tokens))


def test_a_model_that_was_changed_is_seen_anew() -> None:
    """A layer that is exchanged, layers that change places, and another scale."""
    model = model_of("llama", "eager")
    tokens = torch.arange(5, 17)[None]
    alone(model, tokens)
    layers = model.model.layers

    def exchange() -> None:
        layers[1] = deepcopy(layers[2])
        layers[1].self_attn.layer_idx = 1

    def reverse() -> None:
        model.model.layers = nn.ModuleList(reversed(layers))
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = number

    def rescale() -> None:
        model.model.layers[0].self_attn.scaling *= 2

    def cut() -> None:
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2

    for change in (exchange, reverse, rescale, cut):
        change()
        with torch.no_grad(), sniff(model) as captured:
            expected = model(tokens, output_attentions=True, use_cache=False).attentions
        assert list(captured.layers) == list(range(len(expected))), change
        for layer, probabilities in enumerate(expected):
            found = captured.attention(layer, 2, 0).probabilities
            torch.testing.assert_close(found, probabilities[0, 2], atol=TOLERANCE, rtol=0)


def test_masks_that_change_what_was_read_are_refused() -> None:
    model, windowed = model_of("llama"), model_of("mistral")
    tokens = torch.arange(5, 11).view(2, 3)
    padded = torch.tensor([[1, 1, 1], [0, 1, 1]])
    longer = torch.ones(2, 3, dtype=torch.int64)

    def call_twice(model: nn.Module, first: Tensor, second: Tensor | None) -> None:
        with torch.no_grad(), sniff(model):
            cache = model(input_ids=tokens, attention_mask=first).past_key_values
            model(input_ids=tokens, attention_mask=second, past_key_values=cache)

    hidden = torch.cat([padded, longer], dim=1)
    hidden[0, 0] = 0
    with pytest.raises(UserError, match="attention_mask hides tokens that an earlier call has read"):
        call_twice(model, padded, hidden)
    for second in (None, torch.ones(2, 6, dtype=torch.int64)):
        with pytest.raises(UserError, match="lets tokens attend to padding that the cache holds"):
            call_twice(model, padded, second)
    right = padded.flip(1)
    call_twice(model, right, torch.cat([right, longer], dim=1))
    with pytest.raises(UserError, match="padding between the tokens of a text"):
        call_twice(windowed, right, torch.cat([right, longer], dim=1))


def test_chunks_of_a_prompt_are_numbered_by_their_sequences() -> None:
    """A sequence whose first chunk is padding alone is the text that its place says."""
    model = model_of("llama")
    inputs = tokens_of("two", "a text that has some more tokens")
    del inputs["position_ids"]
    with sniff(model, **EVERYTHING) as captured:
        captured.names(np.array([7, 9]))
        model.generate(**inputs, max_new_tokens=3, prefill_chunk_size=8)
    assert_close(rows_of(captured, 7), rows_of_generate(model, "two"))
    assert len(captured.head(0, 0).where(example=9)) == len("a text that has some more tokens") + 2


def rows_of_generate(model: PreTrainedModel, text: str) -> dict[str, np.ndarray]:
    with sniff(model, **EVERYTHING) as captured:
        model.generate(tokens_of(text)["input_ids"], max_new_tokens=3)
    return rows_of(captured, 0)


@pytest.mark.parametrize("family", ["opt", "bloom", "biogpt", "xglm", "falcon", "gpt2", "llama"])
def test_positions_are_those_of_the_vectors(family: str) -> None:
    """Padded on the left without position_ids: as with the very positions that the rows have."""
    model = model_of(family)
    inputs = tokens_of("two", "some text")
    del inputs["position_ids"]
    inputs = accepted(model, inputs)
    with torch.no_grad(), sniff(model, **EVERYTHING) as captured:
        model(**inputs)
    found = rows_of(captured, 0)
    counts_places = found["l00h00q position"][0] > 0
    assert counts_places == (family not in ("opt", "bloom"))
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = torch.from_numpy(found["l00h00q position"]).long()[None]
        with torch.no_grad(), sniff(model, **EVERYTHING) as again:
            model(input_ids=inputs["input_ids"][:1, -3:], position_ids=positions, use_cache=False)
        assert_close(
            {k: v for k, v in found.items() if k.startswith("l00")},
            {k: v for k, v in rows_of(again, 0).items() if k.startswith("l00")},
        )


def test_a_data_root_refuses_a_text_and_goes_on_with_others(tmp_path: Path) -> None:
    model, root = model_of("llama"), tmp_path / "root"
    padded = tokens_of("two", "some text")
    del padded["position_ids"]
    with torch.no_grad(), sniff(model, data_root=root) as captured:
        model(torch.tensor([[5, 6, 7]]), use_cache=False)
        with pytest.raises(
            UserError, match="data_root: it holds whole texts, and one was read at position"
        ):
            model(**padded)
        model(torch.tensor([[8, 9]]), use_cache=False)
    assert captured.examples["n_tokens"].to_pylist() == [3, 2]
    assert main(["verify", str(root)]) == 0


def test_copies_and_other_processes(tmp_path: Path) -> None:
    """A copy of a watched model is not watched; batches go to processes that are spawned."""
    model = model_of("llama")
    tokens = torch.arange(5, 17)[None]
    with torch.no_grad(), sniff(model) as captured:
        copy = deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        copy(tokens)
        model(tokens)
        copy(tokens)
    assert captured.examples.num_rows == 1
    head = captured.head(0, 0)
    loader = DataLoader(head.batches(5), num_workers=1, multiprocessing_context="spawn")
    read = torch.cat([batch["vector"] for batch in loader])
    assert torch.equal(read, head.torch()["vector"])
    with pytest.raises(UserError, match="captured: it can't be pickled; write it with"):
        pickle.dumps(captured)


@pytest.mark.parametrize("device", ["host", "model"])
def test_vectors_may_come_in_many_buffers(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also in the middle of a layer; on the host or left where the model has them."""
    model = model_of("gpt_oss")
    tokens = torch.arange(5, 45)[None]
    expected = alone(model, tokens)
    monkeypatch.setattr(buffers, "BUFFER_BYTES", 4096)
    with torch.no_grad(), sniff(model, device=device, **EVERYTHING) as captured:  # type: ignore[arg-type]
        model(tokens)
        whole = model.generate(tokens[:, :7], max_new_tokens=4, do_sample=False)
    assert_close(rows_of(captured, 0), expected)
    head = captured.head(2, 1)
    some = head.where(position=range(3, 6), example=1)
    assert torch.equal(some.torch()["vector"], head.torch()["vector"][40 + 3 : 40 + 6])
    assert torch.equal(some.torch()["vector"], torch.from_numpy(some.numpy()["vector"]))
    assert some.torch()["position"].tolist() == [3, 4, 5]
    assert_close(rows_of(captured, 1), alone(model, whole[:, :-1]))
    assert captured.attention(2, 1, 0).probabilities.shape == (40, 40)
    captured.save(tmp_path / "root")
    assert contents(Captures(tmp_path / "root")) == contents(captured)
