"""Texts that the model continues before it reads them: its own generate, in any company."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import WriteRun, write_jsonl
from families import FAMILIES, tiny_model
from killing import AFTER, BEFORE, Death, Processes
from qk_sniffer import Captures
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.cli import main
from qk_sniffer.config import CaptureConfig, OutputConfig, SamplerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.errors import UserError
from qk_sniffer.models import Continuation, text_seed, transformers_model
from qk_sniffer.module import SnifferModule
from readers import assert_same_rows, error_line, files_of
from test_architectures import DOZEN, read_table
from test_callback import plain_batch, trainer
from test_conversations import CONVERSATIONS, DEMO, TAGGED
from test_ranks import run_two_ranks
from test_resume import interrupt  # noqa: F401
from tiny import ARCHITECTURES, tiny_causal_lm, tiny_config

Predict = Callable[..., int]
ModelDir = Callable[[str], Path]
ALL = CaptureConfig(sampler=SamplerConfig(type="all"))
SEED = 5
GENERATE = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 40, "seed": SEED}


def examples_of(root: Path) -> dict[str, dict[str, Any]]:
    """The texts of a data root, by their ids in the dataset."""
    return {row["source_id"]: row for row in Captures(root).examples.to_pylist()}


def own_continuation(model: Any, prompt: list[int], example_id: int, **options: Any) -> list[int]:
    """What the model's own generate adds to a text that is alone."""
    torch.manual_seed(text_seed(SEED, example_id))
    tokens = torch.tensor([prompt])
    sequences = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return list(sequences[0, len(prompt) :].tolist())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_text_goes_on_as_generate_would_go_on(
    predict: Predict,
    model_dir: ModelDir,
    texts: list[dict[str, Any]],
    tmp_path: Path,
    batch_size: int,
) -> None:
    """Sampled with the same seed, in batches of unequal texts too, of which some end early."""
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    generate = GENERATE | {"eos_token_id": [*range(2, 40)]}
    assert predict(model={"generate": generate}, data={"batch_size": batch_size}) == 0
    found = examples_of(tmp_path / "root")
    options = {name: value for name, value in generate.items() if name != "seed"}
    lengths = set()
    for row in texts:
        prompt, stored = tokenizer(row["text"])["input_ids"], found[row["id"]]
        expected = own_continuation(
            model, prompt, stored["example_id"], do_sample=True, pad_token_id=0, **options
        )
        assert stored["generated_ids"] == expected
        assert stored["generated_text"] == tokenizer.decode(expected)
        assert stored["n_prompt_tokens"] == len(prompt)
        assert stored["n_tokens"] == len(prompt) + len(expected)
        lengths.add(len(expected))
    assert len(lengths) > 1


def test_rows_are_those_of_one_forward_over_the_whole(
    predict: Predict, model_dir: ModelDir, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Bit by bit, and their attention is the model's own."""
    assert predict(model={"generate": GENERATE}, data={"batch_size": 1}) == 0
    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    stored = examples_of(tmp_path / "root")
    batches = []
    for row in texts:
        example = stored[row["id"]]
        tokens = tokenizer(row["text"])["input_ids"] + example["generated_ids"]
        batch = plain_batch([[1] * len(tokens)])
        batches.append(
            batch
            | {
                "input_ids": torch.tensor([tokens]),
                "example_ids": torch.tensor([example["example_id"]]),
            }
        )
    callback = SnifferCallback(OutputConfig(str(tmp_path / "whole")), ALL)
    trainer(callback).predict(
        SnifferModule(str(model_dir("llama"))), DataLoader(batches, batch_size=None)
    )
    for name in files_of(tmp_path / "whole").keys() - {"examples"}:
        mine, whole = (
            pq.read_table(tmp_path / place / name / "data.parquet") for place in ("root", "whole")
        )
        assert mine.equals(whole), name
    eager = AutoModelForCausalLM.from_pretrained(model_dir("llama"), attn_implementation="eager")
    with torch.inference_mode():
        layers = eager(batches[2]["input_ids"], output_attentions=True).attentions
    own = Captures(tmp_path / "root").attention(1, 3, texts[2]["id"]).probabilities
    np.testing.assert_allclose(own, layers[1][0, 3], atol=1e-5)


def answering(directory: Path) -> dict[str, dict[str, Any]]:
    """The sections of a run that answers some conversations."""
    rows = [
        {"id": f"c{n}-{i}", "messages": each} for n in range(3) for i, each in enumerate(CONVERSATIONS)
    ]
    template = directory / "template.jinja"
    template.write_text(TAGGED)
    data = {
        "path": str(write_jsonl(directory / "conversations.jsonl", rows)),
        "messages_column": "messages",
        "chat_template": str(template),
        "batch_size": 2,
    }
    overrides = {"max_position_embeddings": 512}
    return {"model": {"generate": GENERATE, "config_overrides": overrides}, "data": data}


def test_a_conversation_is_answered(
    predict: Predict, model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own last answer is left out, and the new one is a message of the assistant."""
    assert predict(**answering(tmp_path)) == 0
    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    tokenizer.chat_template = TAGGED
    own = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    captures = Captures(tmp_path / "root")
    stored = examples_of(tmp_path / "root")
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 40, "pad_token_id": 0}
    for number, messages in enumerate(CONVERSATIONS):
        example = stored[f"c0-{number}"]
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        tokens = tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True)
        n_prompt = len(tokens["input_ids"])
        assert example["n_prompt_tokens"] == n_prompt
        assert example["generated_ids"] == own_continuation(
            own, tokens["input_ids"], example["example_id"], do_sample=True, **options
        )
        assert example["messages"][-1] == {
            "role": "assistant",
            "start": n_prompt,
            "stop": example["n_tokens"],
        }
        assert [message["role"] for message in example["messages"][:-1]] == [m["role"] for m in prompt]
    rows = captures.head(0, 0).where(example="c0-1").pandas()
    assert (rows["role"][-12:] == "assistant").all()
    assert main(["verify", str(tmp_path / "root"), "--against-model"]) == 0
    assert "all is well" in capsys.readouterr().out


@pytest.mark.parametrize("interrupted", [1, 3])
def test_an_interrupted_run_goes_on(
    predict: Predict,
    interrupt: Predict,  # noqa: F811
    tmp_path: Path,
    interrupted: int,
) -> None:
    sections = answering(tmp_path)
    assert predict("whole", **sections) == 0
    interrupt("root", after=interrupted, **sections)
    assert predict("root", **sections) == 0
    assert files_of(tmp_path / "root") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "death",
    [Death("forward", BEFORE, 7), Death("commit", AFTER, 2), Death("row group", AFTER, 3)],
    ids=lambda death: death.point,
)
def test_a_killed_run_goes_on(
    write_run: WriteRun, processes: Processes, tmp_path: Path, death: Death
) -> None:
    sections = answering(tmp_path)
    assert main(write_run("whole", **sections)) == 0
    command = write_run("root", **sections)
    assert processes.run(command, sync_seconds=0.0, death=death).exitcode == -9
    ended = processes.run(command, sync_seconds=0.0)
    assert ended.exitcode == 0, ended.printed
    assert files_of(tmp_path / "root") == files_of(tmp_path / "whole")


def test_two_processes_write_what_one_writes(
    write_run: WriteRun, processes: Processes, tmp_path: Path
) -> None:
    sections = answering(tmp_path)
    assert main(write_run("one", **sections)) == 0
    command = write_run("two", **sections, trainer={"devices": 2})
    run_two_ranks(processes, command)
    assert_same_rows(tmp_path / "two", tmp_path / "one")


def test_batches_samplers_and_streams_change_no_text(predict: Predict, tmp_path: Path) -> None:
    """A budget of tokens counts what may come, and a stream gives the same."""
    model = {"generate": GENERATE}
    assert predict("one", model=model, data={"batch_size": 1}) == 0
    variants: dict[str, dict[str, Any]] = {
        "budget": {"data": {"batch_size": 7, "max_tokens_per_batch": 150}},
        "stream": {"data": {"streaming": True}},
        "passages": {"model": {"prefill_chunk_size": 16}},
        "greedy": {"model": {"generate": {"max_new_tokens": 12, "do_sample": False}}},
    }
    for name, variant in variants.items():
        sections = {"model": model | variant.get("model", {}), "data": variant.get("data", {})}
        assert predict(name, **sections) == 0
        if name != "greedy":
            assert_same_rows(tmp_path / name, tmp_path / "one")
    assert examples_of(tmp_path / "greedy") != examples_of(tmp_path / "one")


def test_a_budget_counts_what_may_come(model_dir: ModelDir, text_file: Path) -> None:
    """No batch has more tokens than the budget in the end, whatever the model writes."""
    widths = []

    class Watched(SnifferModule):
        def predict_step(self, batch: dict[str, Any], batch_idx: int) -> int:
            widths.append(batch["input_ids"].shape)
            return super().predict_step(batch, batch_idx)

    generate = {"max_new_tokens": 20, "min_new_tokens": 20}
    data = TextDataModule(str(text_file), id_column="id", batch_size=7, max_tokens_per_batch=170)
    module = Watched(str(model_dir("llama")), generate=generate)
    trainer().predict(module, datamodule=data)
    assert max(size * width for size, width in widths) <= 170
    assert max(size for size, _ in widths) > 1
    assert sorted(width for _, width in widths)[-1] == 81


def test_a_sampled_run_keeps_what_the_lengths_in_the_end_keep(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verify draws the rows from the lengths that the table of texts has."""
    capture = {"sampler": {"type": "log_uniform", "base_rate": 2.0}, "min_bucket_size": 4}
    generate = GENERATE | {"eos_token_id": [*range(2, 60)]}
    assert predict(model={"generate": generate}, sniffer={"capture": capture}) == 0
    assert main(["verify", str(tmp_path / "root"), "--against-model"]) == 0
    assert "all is well" in capsys.readouterr().out


def test_listed_positions_may_lie_in_what_the_model_writes(
    predict: Predict, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = [row | {"marked": [0, len(row["text"]), len(row["text"]) + 500]} for row in texts]
    data = {"path": str(write_jsonl(tmp_path / "marked.jsonl", rows)), "positions_column": "marked"}
    capture = {"sampler": {"type": "positions"}}
    assert predict(model={"generate": GENERATE}, data=data, sniffer={"capture": capture}) == 0
    frame = Captures(tmp_path / "root").head(0, 0).pandas()
    for row in texts:
        found = frame["position"][frame["source_id"] == row["id"]].tolist()
        assert found == [0, len(row["text"])]


OFTEN = {*DOZEN, "git", "xlm", "llama4", "gpt2"}
"""Three of them read the padding: at once, behind it with a cache, and where a chunk ends."""

OTHERS = {"musicgen", "musicgen_melody"}
"""Decoders of music, which fail in a generate of text."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in OFTEN else pytest.mark.every_architecture)
        for name in ARCHITECTURES
        if name not in OTHERS
    ],
)
def test_an_architecture_continues_each_text_as_if_it_were_alone(name: str) -> None:
    if "refused" in read_table()[name]:
        pytest.skip("refused")
    model = transformers_model(tiny_causal_lm(name))
    draws = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 60, (length,), generator=draws) for length in (5, 17, 3, 24)]
    options = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 50}
    pad = model.generation_config.pad_token_id or 0
    with torch.inference_mode():
        together = Continuation(model, options | {"seed": SEED, "pad_token_id": pad}, None)
        found = together(texts, [1, 2, 3, 4])
        for number, (text, new) in enumerate(zip(texts, found, strict=True), 1):
            expected = own_continuation(
                model, text.tolist(), number, do_sample=True, pad_token_id=pad, **options
            )
            assert new.tolist() == expected


class _ReadsPadding(type(tiny_model(FAMILIES["llama"]))):  # type: ignore[misc]
    """A model that lets its tokens attend to padding."""

    def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_model_that_reads_padding_continues_a_text_at_a_time(
    text_file: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path, model_dir: ModelDir
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    found = {}
    for root, batch_size in (("one", 1), ("three", 3)):
        model = _ReadsPadding.from_pretrained(model_dir("llama"))
        module = SnifferModule.of(model, tokenizer, generate=GENERATE)
        data = TextDataModule(str(text_file), id_column="id", batch_size=batch_size)
        callback = SnifferCallback(OutputConfig(str(tmp_path / root)), ALL)
        trainer(callback).predict(module, datamodule=data)
        found[root] = examples_of(tmp_path / root)
        assert ("one at a time" in caplog.text) == (batch_size > 1)
    assert found["one"] == found["three"]


def test_rope_that_depends_on_the_longest_text_is_that_of_each() -> None:
    """And not that of a text in the same batch, or of one before."""
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config.max_position_embeddings = 24
    texts = [torch.arange(5, 5 + length) for length in (7, 90, 40, 60, 3)]
    options = {"max_new_tokens": 8, "temperature": 0.9, "pad_token_id": 0}
    model = transformers_model(tiny_causal_lm("llama", config))
    with torch.inference_mode():
        found = Continuation(model, options | {"seed": SEED}, None)(texts, [*range(5)])
        for number, (text, new) in enumerate(zip(texts, found, strict=True)):
            fresh = tiny_causal_lm("llama", config)
            assert new.tolist() == own_continuation(
                fresh, text.tolist(), number, do_sample=True, **options
            )


def test_weights_that_mix_the_texts_of_a_batch_continue_each_alone(
    predict: Predict, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    generate = {"max_new_tokens": 40, "temperature": 1.5, "seed": SEED}
    # So low that many columns have an outlier.
    weights = {"load_in_8bit": True, "llm_int8_threshold": 1.0}
    model = {"name": DEMO, "quantization": weights, "generate": generate}
    # Of one length, so that no padding gives them away.
    data = {"max_samples": 4, "tokenizer": {"max_length": 2}}
    for root, batch_size in (("one", 1), ("four", 4)):
        assert predict(root, model=model, data=data | {"batch_size": batch_size}) == 0
    one = examples_of(tmp_path / "one")
    assert {row["n_prompt_tokens"] for row in one.values()} == {2}
    assert one == examples_of(tmp_path / "four")


def test_a_loader_of_ones_own_is_continued_too(tmp_path: Path, model_dir: ModelDir) -> None:
    """It has no tokenizer, so there are tokens and no text."""
    callback = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL)
    loader = DataLoader([plain_batch([[1, 1, 1], [1, 0, 0]])], batch_size=None)
    module = SnifferModule(str(model_dir("llama")), generate={"max_new_tokens": 4})
    trainer(callback).predict(module, loader)
    table = Captures(tmp_path / "root").examples
    assert table["n_prompt_tokens"].to_pylist() == [3, 1]
    assert table["n_tokens"].to_pylist() == [7, 5]
    assert [len(ids) for ids in table["generated_ids"].to_pylist()] == [4, 4]
    assert table["generated_text"].to_pylist() == [None, None]


def test_a_model_that_gives_more_than_tokens_is_continued(text_file: Path, model_dir: ModelDir) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    model.generation_config.return_dict_in_generate = True
    module = SnifferModule.of(
        model,
        AutoTokenizer.from_pretrained(model_dir("llama")),
        generate=GENERATE | {"pad_token_id": None},
    )
    trainer().predict(module, datamodule=TextDataModule(str(text_file), batch_size=3))


def test_an_empty_text_stays_empty(predict: Predict, tmp_path: Path) -> None:
    rows = [{"id": "full", "text": "A list"}, {"id": "empty", "text": ""}]
    data = {"path": str(write_jsonl(tmp_path / "texts.jsonl", rows))}
    assert predict(model={"generate": GENERATE}, data=data) == 0
    assert examples_of(tmp_path / "root")["empty"]["n_tokens"] == 0


def test_estimate_counts_what_may_come(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    command = write_run(model={"generate": GENERATE})[1:]
    assert main(["estimate", *command, "--time"]) == 0
    printed = capsys.readouterr().out
    assert "12 in each text that the model may add" in printed
    assert "the longest 73" in printed
    assert "to continue all texts, at most" in printed


def test_a_data_root_of_other_continuations_is_refused(
    predict: Predict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(model={"generate": GENERATE}, data={"max_samples": 1}) == 0
    for generate in (None, GENERATE | {"seed": 6}):
        capsys.readouterr()
        assert predict(model={"generate": generate}) == 2
        assert "model.generate" in error_line(capsys)


MISTAKES = {
    "no number": ({"temperature": 0.6}, "model.generate.max_new_tokens: must be an integer"),
    "misspelt": (GENERATE | {"temprature": 1}, "model.generate.temprature: generate has no such"),
    "beams": (GENERATE | {"num_beams": 4}, "model.generate.num_beams: a text has one continuation"),
    "strings": (GENERATE | {"stop_strings": ["a"]}, "model.generate.stop_strings: a run can't use it"),
    "no token": (GENERATE | {"eos_token_id": "x"}, "model.generate.eos_token_id: expected a token id"),
    "a flag": ({"max_new_tokens": True}, "model.generate.max_new_tokens: must be an integer"),
    "a seed": (GENERATE | {"seed": -1}, "model.generate.seed: must be an integer of at least 0"),
    "out of range": (GENERATE | {"temperature": -1.0}, "model.generate: "),
    "too many": ({"max_new_tokens": 100}, "a text of 61 tokens and 100 new ones are more than the 128"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    generate, message = MISTAKES[mistake]
    assert predict(model={"generate": generate}) == 2
    assert message in error_line(capsys)
    assert files_of(tmp_path / "root") == {}


def test_a_text_of_a_stream_that_is_too_long_is_one_line(
    predict: Predict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(model={"generate": {"max_new_tokens": 100}}, data={"streaming": True}) == 2
    assert "are more than the 128 positions" in error_line(capsys)


def test_seeds_are_of_seed_and_text() -> None:
    """The formula of the documentation, in numbers."""
    digest = hashlib.blake2b(b"5 -7", digest_size=4).digest()
    assert text_seed(5, -7) == int.from_bytes(digest, "little")
    assert len({text_seed(seed, text) for seed in range(20) for text in range(20)}) == 400


def test_a_model_without_generate_is_one_line(model_dir: ModelDir) -> None:
    model = tiny_model(FAMILIES["llama"])
    model.can_generate = lambda: False  # type: ignore[method-assign]
    with pytest.raises(UserError, match="LlamaForCausalLM can't generate"):
        SnifferModule.of(model, generate=GENERATE)
