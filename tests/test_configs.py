"""The shipped configs: what they build on, that each is a run, and that one of each kind runs."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import PreTrainedConfig

from conftest import byte_tokenizer
from qk_sniffer.cli import main
from tiny import tiny_causal_lm, tiny_config

CONFIGS = Path(__file__).parents[1] / "configs"
BASES = sorted((CONFIGS / "base").glob("*.yaml"))
RUNS = sorted({*CONFIGS.rglob("*.yaml")} - {*BASES, CONFIGS / "demo.yaml"})
ANSWERS = CONFIGS / "qwen3-8b-answers.yaml"
"""The only one that reads conversations, of a model that another config names too."""

MOMENTS = CONFIGS / "qwen3-8b-moments.yaml"
"""The only one that keeps no rows, of that model again."""

DOCUMENTS = [file for file in RUNS if file not in (ANSWERS, MOMENTS)]

# One config of each kind of model, the only ones that run here, with the architecture that it names.
KINDS = {
    "llama-3.1-8b": "llama",
    "llama-3.2-11b-vision": "mllama (multimodal)",
    "mistral-7b-v0.2": "mistral",
    "ministral-3-8b": "mistral3 (multimodal)",
    "qwen3-8b": "qwen3",
    "gemma-3-1b": "gemma3_text",
    "gemma-3-4b": "gemma3",
    "smollm3/lc-4k-to-32k-step-20000": "smollm3",
}


def composed(file: Path) -> dict[str, Any]:
    """A config with what it builds on."""
    config = yaml.safe_load(file.read_text())
    base = config.pop("config", None)
    return merged(composed(file.parent / base), config) if base else config


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {k: merged(base[k], v) for k, v in changes.items() if isinstance(base.get(k), dict)}
    return base | changes | both


def leaves(config: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """The resolved config that the command line has of some arguments."""
    with pytest.raises(SystemExit) as stop:
        main(["predict", *args, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(list(args)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("qk-sniffer: error: ")


# --- the files


def name_of(file: Path) -> str:
    return str(file.relative_to(CONFIGS).with_suffix(""))


def test_no_config_repeats_another() -> None:
    files = {file: yaml.safe_load(file.read_text()) for file in [*BASES, *RUNS]}
    contents = [frozenset(leaves(config)) for config in files.values()]
    assert len(set(contents)) == len(files)
    for file, config in files.items():
        if "config" in config:
            base = dict(leaves(composed(file.parent / config["config"])))
            repeated = {key for key, value in leaves(config) if base.get(key, ...) == value}
            assert not repeated, file
    documents = [composed(file) for file in DOCUMENTS]
    models = {(run["model"]["name"], run["model"].get("revision")) for run in documents}
    assert len(models) == len(DOCUMENTS)
    assert len({composed(file)["sniffer"]["output"]["data_root"] for file in RUNS}) == len(RUNS)


def test_every_run_has_the_data_and_sampling_of_one_base() -> None:
    base = dict(leaves(composed(CONFIGS / "base" / "longbench-pro.yaml")))
    lengths = ("data.tokenizer.max_length", "sniffer.capture.min_bucket_size")
    for file in DOCUMENTS:
        run = dict(leaves(composed(file)))
        changed = {key for key, value in base.items() if run[key] != value}
        if "model.tensor_parallel" in run:
            assert run["trainer.devices"] == run["model.tensor_parallel"]
            changed.remove("trainer.devices")
        assert changed <= set(lengths), file
        assert 4 <= run[lengths[0]] / run[lengths[1]] <= 16, file


@pytest.mark.parametrize("name", ["demo", "qwen3-8b", "smollm3/stage1-step-40000"])
def test_the_command_line_composes_a_config(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = CONFIGS / f"{name}.yaml"
    resolved = dict(leaves(printed(capsys, "--config", str(file))))
    assert dict(leaves(composed(file))).items() <= resolved.items()


# --- that each is a run


@pytest.mark.parametrize("file", [file for file in RUNS if name_of(file) not in KINDS], ids=name_of)
def test_everything_of_a_config_is_built_before_its_model_is_asked_for(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Module, data module, callback and trainer are; then the Hub, which is out of reach, is asked."""
    line = error_of(
        capsys,
        "predict",
        f"--config={file}",
        "--trainer.accelerator=cpu",
        f"--sniffer.output.data_root={tmp_path}",
    )
    assert line.startswith(
        f"model.name: no directory {composed(file)['model']['name']} is here or in the"
    )


def checkpoint_config(name: str) -> PreTrainedConfig:
    """A small config with the structure of the checkpoint that a shipped config names."""
    config = tiny_config(KINDS[name])
    if name.startswith("ministral"):
        config.text_config = tiny_config("ministral3")
    if "mistral" in name or "ministral" in name:
        config.get_text_config().sliding_window = None
    return config


def run(name: str, text_file: Path, root: Path, *args: str) -> dict[str, Any]:
    """Run a shipped config with a tiny model of its architecture, on every position of small texts."""
    model = root.parent / "model"
    if not model.exists():
        tiny_causal_lm(KINDS[name], checkpoint_config(name)).save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
    status = main(
        [
            "predict",
            f"--config={CONFIGS / name}.yaml",
            f"--model.name={model}",
            f"--data.path={text_file}",
            "--data.split=train",
            "--data.tokenizer.name=null",
            "--data.batch_size=7",
            "--sniffer.capture.min_bucket_size=1",
            f"--sniffer.output.data_root={root}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            *args,
        ]
    )
    assert status == 0
    saved: dict[str, Any] = yaml.safe_load((root / "config.yaml").read_text())
    return saved


@pytest.mark.parametrize("name", KINDS)
def test_a_config_of_each_kind_of_model_runs(name: str, text_file: Path, tmp_path: Path) -> None:
    saved = dict(leaves(run(name, text_file, tmp_path / "root")))
    differing = {
        key for key, value in leaves(composed(CONFIGS / f"{name}.yaml")) if saved[key] != value
    }
    assert differing <= {
        "model.name",
        "data.path",
        "data.split",
        "data.tokenizer.name",
        "sniffer.capture.min_bucket_size",
        "sniffer.output.data_root",
        "trainer.accelerator",
    }
    tables = [pq.read_table(file) for file in (tmp_path / "root").glob("l*/data.parquet")]
    n_tokens = sum(pq.read_table(tmp_path / "root/examples/data.parquet")["n_tokens"].to_pylist())
    assert len(tables) >= 4
    for table in tables:
        assert table.num_rows == n_tokens
        assert table["sliding_window"].null_count == n_tokens


def test_qwen3_is_run_with_yarn(text_file: Path, tmp_path: Path) -> None:
    """YaRN makes rotated vectors longer by 0.1 ln(factor) + 1."""
    run("qwen3-8b", text_file, tmp_path / "rotated", "--model.dtype=float32")
    run(
        "qwen3-8b",
        text_file,
        tmp_path / "plain",
        "--model.dtype=float32",
        "--sniffer.capture.capture_pre_rope=true",
    )
    rotated, plain = (
        torch.tensor(pq.read_table(tmp_path / root / "l00h00q/data.parquet")["vector"].to_pylist())
        for root in ("rotated", "plain")
    )
    ratio = rotated.norm(dim=1) / plain.norm(dim=1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.1 * math.log(4) + 1))


# --- building on another file


def test_sections_are_merged_with_those_of_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "first.yaml").write_text(
        "data: {path: texts, id_column: id, tokenizer: {max_length: 64}}\n"
        "sniffer: {capture: {full_attention_only: true, layers: [1, 2]}}\n"
    )
    (tmp_path / "parts" / "second.yaml").write_text(
        "config: first.yaml\ndata: {path: others}\nsniffer: {capture: {layers: [3]}}\n"
    )
    (tmp_path / "run.yaml").write_text(
        "config: parts/second.yaml\nmodel: {name: model}\ndata: {tokenizer: {name: words}}\n"
    )
    run = str(tmp_path / "run.yaml")
    for args in (["--config", run], [f"--config={run}"], ["-c", run], [f"-c={run}"], [f"-c{run}"]):
        resolved = printed(capsys, *args, "--data.id_column", "key")
        assert resolved["model"]["name"] == "model"
        assert resolved["data"]["path"] == "others"
        assert resolved["data"]["id_column"] == "key"
        assert resolved["data"]["tokenizer"]["name"] == "words"
        assert resolved["data"]["tokenizer"]["max_length"] == 64
        assert resolved["sniffer"]["capture"]["full_attention_only"] is True
        assert resolved["sniffer"]["capture"]["layers"] == [3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: run.yaml", "run.yaml: config: run.yaml builds on this very file; name another"),
        ("config: [a.yaml, b.yaml]", "run.yaml: config: expected the path of one file to build on"),
        (
            "config: base.yaml\nsniffer:",
            "run.yaml: sniffer: the empty section would drop all",
        ),
        (
            "config: base.yaml\nsniffer: {capture: }",
            "run.yaml: sniffer.capture: the empty section",
        ),
        ("- model", "--config: {} is no mapping; write sections such as model and data"),
        ("", "--config: {} is no mapping; write sections such as model and data"),
        ("# caf\u00e9".encode("latin-1"), "--config: {} is no UTF-8 (unexpected end of data); save it"),
        ("config: none.yaml", "--config: File does not exist"),
        ("config: broken.yaml", "--config: not valid YAML"),
    ],
)
def test_a_base_that_is_none_is_one_line(
    text: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.yaml"
    run.write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "broken.yaml").write_text("model: {name: [")
    (tmp_path / "base.yaml").write_text("sniffer: {capture: {min_bucket_size: 16}}")
    assert message.format(run) in error_of(capsys, "predict", "--config", str(tmp_path / "run.yaml"))
