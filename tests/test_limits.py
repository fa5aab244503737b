"""What a model can be given: positions that it covers, tokens that it knows, and rows that are kept."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from conftest import WriteRun, write_jsonl
from killing import AFTER, Death, Processes
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.cli import main
from qk_sniffer.config import OutputConfig
from qk_sniffer.errors import UserError
from qk_sniffer.models import covered_positions
from qk_sniffer.module import SnifferModule
from readers import error_line, files_of
from test_callback import ALL, plain_batch, trainer
from test_ranks import free_port, lightning_variables

Predict = Callable[..., int]
ModelDir = Callable[[str], Path]
BEYOND = "2 of 5 texts are longer than the 128 positions that the model's config covers"
LENGTHS = (30, 129, 128, 5, 300)


@pytest.fixture
def long_texts(tmp_path: Path) -> Path:
    rows = [{"id": i, "text": "x" * length} for i, length in enumerate(LENGTHS)]
    return write_jsonl(tmp_path / "long.jsonl", rows)


def beyond(root: Path) -> Any:
    return json.loads((root / "manifest.json").read_text()).get("beyond_positions")


def lines_with(words: str, text: str) -> list[str]:
    return [line for line in text.splitlines() if words in line]


def test_texts_beyond_the_positions_are_told_before_they_are_read(
    write_run: WriteRun, processes: Processes, long_texts: Path, tmp_path: Path
) -> None:
    run = write_run(data={"path": str(long_texts), "batch_size": 2})
    printed = processes.start(run).wait(120).printed
    (line, at_the_end) = lines_with(BEYOND, printed)
    assert line.startswith(f"data.tokenizer.max_length: {BEYOND}, the longest has 300 tokens; set max")
    assert "set max_length to 128" in line and "by YaRN in model.config_overrides" in line
    assert printed.index(line) < printed.index("heads    24") < printed.rindex(at_the_end)
    assert beyond(tmp_path / "root") == {"positions": 128, "texts": 2, "longest": 300}
    assert f"; {BEYOND}, the longest has 300 tokens" in (tmp_path / "root" / "README.md").read_text()


def test_a_stream_tells_it_at_the_first_such_text(
    write_run: WriteRun, processes: Processes, long_texts: Path, tmp_path: Path
) -> None:
    run = write_run(data={"path": str(long_texts), "batch_size": 1, "streaming": True})
    printed = processes.start(run).wait(120).printed
    (line,) = lines_with("a text of ", printed)
    assert line.startswith("data.tokenizer.max_length: a text of 129 tokens is longer than the 128 pos")
    assert len(lines_with(BEYOND, printed)) == 1
    assert beyond(tmp_path / "root") == {"positions": 128, "texts": 2, "longest": 300}


def test_a_run_that_goes_on_in_two_processes_counts_the_whole_data_root(
    write_run: WriteRun, processes: Processes, long_texts: Path, tmp_path: Path
) -> None:
    data = {"path": str(long_texts), "batch_size": 1}
    assert processes.start(write_run(data=data | {"max_samples": 2})).wait(120).exitcode == 0
    assert beyond(tmp_path / "root") == {"positions": 128, "texts": 1, "longest": 129}
    run, port = write_run(data=data, trainer={"devices": 2}), free_port()
    started = [processes.start(run, environment=lightning_variables(i, 2, port)) for i in range(2)]
    printed = [one.wait(120).printed for one in started]
    told = "1 of 3 texts are longer than the 128 positions"
    assert [len(lines_with(told, text)) for text in printed] == [1, 0]
    assert [len(lines_with(BEYOND, text)) for text in printed] == [1, 0]
    assert beyond(tmp_path / "root") == {"positions": 128, "texts": 2, "longest": 300}


def test_an_interrupted_run_that_finalize_ends_is_counted(
    write_run: WriteRun, processes: Processes, long_texts: Path, tmp_path: Path
) -> None:
    run = write_run(data={"path": str(long_texts), "batch_size": 1})
    assert processes.start(run, death=Death("commit", AFTER, 4)).wait(120).exitcode == -9
    assert main(["finalize", str(tmp_path / "root")]) == 0
    assert beyond(tmp_path / "root") == {"positions": 128, "texts": 1, "longest": 129}


@pytest.mark.parametrize("is_pulled", [False, True])
def test_what_is_merged_is_counted(write_run: WriteRun, tmp_path: Path, is_pulled: bool) -> None:
    for name, lengths in {"short": (5, 30), "long": (129, 128)}.items():
        rows = [{"id": length, "text": "x" * length} for length in lengths]
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        assert main(write_run(name, data={"path": str(path)})) == 0
    own, pulled = ("short", "long") if is_pulled else ("long", "short")
    (tmp_path / pulled).rename(tmp_path / own / ".pulled")
    assert main(["finalize", str(tmp_path / own)]) == 0
    assert beyond(tmp_path / own) == {"positions": 128, "texts": 1, "longest": 129}
    assert "1 of 4 texts are longer" in (tmp_path / own / "README.md").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"tokenizer": {"max_length": 128}}},
        {"model": {"config_overrides": {"rope_scaling": {"rope_type": "yarn", "factor": 3.0}}}},
        {"model": {"config_overrides": {"max_position_embeddings": 300}}},
    ],
)
def test_the_remedies_help(
    write_run: WriteRun,
    long_texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, dict[str, Any]],
) -> None:
    data = {"path": str(long_texts), "batch_size": 2} | changes.pop("data", {})
    run = write_run(data=data, **changes)
    assert main(["estimate", *run[1:]]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(run) == 0
    assert "positions" not in caplog.text
    assert "positions that the model's" not in (tmp_path / "root" / "README.md").read_text()
    assert beyond(tmp_path / "root") is None


def test_estimate_has_both_warnings(
    write_run: WriteRun, long_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = {"sampler": {"type": "uniform"}}
    run = write_run(data={"path": str(long_texts)}, sniffer={"capture": capture})
    assert main(["estimate", *run[1:]]) == 0
    first, second = " ".join(capsys.readouterr().out.split()).split(" warning ")[1:]
    assert first.startswith(f"data.tokenizer.max_length: {BEYOND}")
    assert "keep less than one row, 0.016 of the 128 tokens of a typical one" in second


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


@pytest.mark.parametrize(
    ("trained", "rope", "original", "covered"),
    [
        (4096, {}, None, 4096),
        # Qwen3 with configs/base/qwen3.yaml, DeepSeek V3, and a config that names no original length.
        (40960, {"rope_type": "yarn", "factor": 4.0}, 32768, 131072),
        (163840, {"rope_type": "yarn", "factor": 40.0}, 4096, 163840),
        (4096, {"rope_type": "yarn", "factor": 2.0}, None, 8192),
        # Vicuna 16k, InternLM 2.
        (4096, {"rope_type": "linear", "factor": 4.0}, None, 16384),
        (32768, {"rope_type": "dynamic", "factor": 2.0}, None, 65536),
        # Llama 3.2, and Llama 3 with the scaling of Llama 3.1.
        (131072, LLAMA3 | {"factor": 32.0}, 8192, 131072),
        (8192, LLAMA3 | {"factor": 8.0}, 8192, 65536),
        # Phi 3, MiniCPM.
        (131072, LONG, 4096, 131072),
        (32768, LONG, 32768, 32768),
    ],
)
def test_positions_that_a_scaling_covers(
    trained: int, rope: dict[str, Any], original: int | None, covered: int
) -> None:
    parameters = {"rope_theta": 10000.0, **rope}
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    config = LlamaConfig(max_position_embeddings=trained, rope_parameters=parameters)
    assert covered_positions(config) == covered


@pytest.mark.parametrize(
    ("config", "covered"),
    [
        (GPT2Config(), None),
        (MambaConfig(), None),
        (Gemma3Config(), 131072),
        (Gemma3Config().text_config, 131072),
        (LlavaConfig(text_config=LlamaConfig(max_position_embeddings=4096)), 4096),
    ],
)
def test_positions_of_other_configs(config: PreTrainedConfig, covered: int | None) -> None:
    assert covered_positions(config) == covered


# --- tokens


def tokenizer_with(directory: Path, far: int, **special: str) -> str:
    """A tokenizer of one token for each byte, and of "zz" far behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 1} | {byte: 2 + i for i, byte in enumerate(alphabet)} | {"zz": far}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("z", "z")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return str(directory)


UNKNOWN = (
    "data.tokenizer.name: a text has the token id 300, and the embedding of LlamaModel has 300 rows, "
    "from 0 to 299; name the tokenizer that belongs to the model"
)


@pytest.fixture
def tokens_run(write_run: WriteRun, tmp_path: Path) -> Callable[..., list[str]]:
    """A run over some texts with a tokenizer whose token "zz" the model may not know."""

    def run(texts: list[str], far: int = 300, **data: Any) -> list[str]:
        path = write_jsonl(
            tmp_path / "z.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)]
        )
        name = tokenizer_with(tmp_path / "tokenizer", far, bos_token="<bos>")
        return write_run(data={"path": str(path), "tokenizer": {"name": name}, "batch_size": 1} | data)

    return run


def test_a_token_beyond_the_vocabulary_is_seen_before_the_weights_are_loaded(
    tokens_run: Callable[..., list[str]],
    model_dir: ModelDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tokens_run(["abc", "abcd", "a zz", "ab"])
    (tmp_path / "bare").mkdir()
    config = (model_dir("llama") / "config.json").read_text()
    (tmp_path / "bare" / "config.json").write_text(config)
    for command in ("predict", "estimate"):
        assert main([command, *run[1:], "--model.name", str(tmp_path / "bare")]) == 2
        assert error_line(capsys) == UNKNOWN


def test_a_token_beyond_the_vocabulary_in_a_stream_loses_nothing(
    tokens_run: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tokens_run(["abc", "abcd", "a zz", "ab"], streaming=True)
    assert main(run) == 2
    assert error_line(capsys) == UNKNOWN
    assert main(["finalize", str(tmp_path / "root")]) == 0
    assert len(files_of(tmp_path / "root")) == 25
    assert "rows     168" in capsys.readouterr().out


def test_the_last_row_of_an_embedding_is_known(tokens_run: Callable[..., list[str]]) -> None:
    assert main(tokens_run(["zz", "ab"], far=299)) == 0


def test_a_padding_token_that_was_added_does_no_harm(
    write_run: WriteRun, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    added = {"name": tokenizer_with(tmp_path / "tokenizer", 300, pad_token="zz")}
    run = write_run(data={"tokenizer": added, "batch_size": 3})
    assert main(run) == 0
    assert main(["estimate", *run[1:], "--time"]) == 0
    assert main(write_run("alone", data={"tokenizer": added, "batch_size": 1})) == 0
    assert files_of(tmp_path / "root").keys() == files_of(tmp_path / "alone").keys()


@pytest.mark.parametrize("token", [300, -100])
def test_tokens_of_a_loader_of_ones_own(model_dir: ModelDir, tmp_path: Path, token: int) -> None:
    batch = plain_batch([[1, 1, 1], [1, 0, 0]])
    batch["input_ids"][0, 1] = token
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL, check=False)
    with pytest.raises(UserError, match=f"has the token id {token}, "):
        trainer(sniffer).predict(
            SnifferModule(str(model_dir("llama"))), DataLoader([batch], batch_size=None)
        )


# --- rows


def test_a_sampler_that_keeps_nothing_of_most_texts_is_told(
    write_run: WriteRun, processes: Processes, tmp_path: Path
) -> None:
    sentences = [{"id": i, "text": "A short text."} for i in range(5)]
    path = write_jsonl(tmp_path / "short.jsonl", sentences)
    capture = {"sampler": {"type": "uniform"}}
    run = write_run(data={"path": str(path)}, sniffer={"capture": capture})
    ended = processes.start(run).wait(120)
    assert ended.exitcode == 0
    (line,) = lines_with("sniffer.capture.sampler: of most texts", ended.printed)
    assert "keep less than one row, 0.0016 of the 13 tokens of a typical one; " in line
    assert "set sniffer.capture.sampler.type: all for short texts" in line
    (at_the_end,) = lines_with("no rows were kept", ended.printed)
    assert "set sniffer.capture.sampler.type: all for short texts" in at_the_end


def test_verify_says_that_nothing_was_kept(
    write_run: WriteRun, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "short.jsonl", [{"id": 0, "text": "A short text."}])
    capture = {"sampler": {"type": "uniform"}}
    run = write_run(data={"path": str(path), "streaming": True}, sniffer={"capture": capture})
    assert main(run) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "root")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "all is well" not in first and first.endswith("they are empty, 24 heads, 0 rows")
    assert second.startswith("no rows were kept; set sniffer.capture.sampler.type: all")


@pytest.mark.parametrize(
    ("lengths", "told"), [((10, 10, 90, 90), False), ((10, 10, 10, 90), True), ((64,), False)]
)
def test_most_texts_are_more_than_half(
    write_run: WriteRun,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    lengths: tuple[int, ...],
    told: bool,
) -> None:
    rows = [{"id": i, "text": "x" * length} for i, length in enumerate(lengths)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    capture = {"sampler": {"type": "uniform"}, "min_bucket_size": 64}
    run = write_run(data={"path": str(path)}, sniffer={"capture": capture})
    assert main(["estimate", *run[1:]]) == 0
    assert bool(re.search("^warning ", capsys.readouterr().out, re.MULTILINE)) == told
