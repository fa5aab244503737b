"""The command line: mistakes get one line and status 2, help and configs are complete."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import MambaConfig

from conftest import write_jsonl
from qk_sniffer.cli import main
from readers import error_line
from test_data import colliding_pair

Predict = Callable[..., int]
TOKENIZER = "stands for the tiny model's tokenizer"
COMMAND = str(Path(sys.executable).with_name("qk-sniffer"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sniffer": {"capture": {"sampler": {"bsae_rate": 1}}}}, "sniffer.capture.sampler.bsae_rate: no such key"),
        ({"data": {"btach_size": 1}}, "data.btach_size: no such key"),
        ({"sniffer": {"capture": {"head_sampling": {"cuont": 1}}}}, "head_sampling.cuont: no such key"),
        ({"data": {"batch_size": "many"}}, "data.batch_size: expected int, got many"),
        ({"sniffer": {"capture": {"layers": "all"}}}, "sniffer.capture.layers: expected one of list[int], null"),
        ({"model": {"dtype": "int4"}}, "model.dtype: expected one of 'auto', 'float32'"),
        ({"model": {"name": "no/such/directory"}}, "model.name: no/such/directory can't be loaded"),
        ({"model": {"name": "no/such/directory"}, "data": {"tokenizer": {"name": TOKENIZER}}}, "model.name: no/such/directory can't be loaded"),
        ({"model": {"config_overrides": {"rope_scalng": 1}}}, "model.config_overrides.rope_scalng: LlamaConfig"),
        ({"data": {"path": "no-such-file.jsonl"}}, "data.path: no-such-file.jsonl can't be read"),
        ({"data": {"split": "test"}}, "data.split: "),
        ({"data": {"text_column": "body"}}, "data.text_column: the dataset has no column 'body'; choose from id, text"),
        ({"data": {"id_column": "key"}}, "data.id_column: the dataset has no column 'key'; choose from id, text"),
        ({"data": {"batch_size": 0}}, "data.batch_size: must be at least 1, got 0"),
        ({"data": {"tokenizer": {"padding_side": "left"}}}, "data.tokenizer.padding_side: must be right, got left"),
        ({"data": {"tokenizer": {"max_length": 0}}}, "data.tokenizer.max_length: must be at least 1 or null"),
        ({"data": {"tokenizer": {"name": "no-such-tokenizer"}}}, "data.tokenizer.name: no tokenizer can be loaded"),
        ({"sniffer": {"capture": {"layers": [0, 4]}}}, "sniffer.capture.layers: the model has no layer 4; choose from 0 to 3"),
        ({"sniffer": {"capture": {"heads": [4]}}}, "sniffer.capture.heads: the model has no query head 4; choose from 0 to 3"),
        ({"sniffer": {"capture": {"heads": []}}}, "sniffer.capture.heads: the list is empty"),
        ({"sniffer": {"capture": {"min_bucket_size": 0}}}, "sniffer.capture.min_bucket_size: must lie between 1"),
        ({"sniffer": {"capture": {"min_bucket_size": -8}}}, "sniffer.capture.min_bucket_size: must lie between 1"),
        ({"sniffer": {"capture": {"sampler": {"type": "gaussian"}}}}, "sniffer.capture.sampler.type: no sampler"),
        ({"sniffer": {"capture": {"sampler": {"base_rate": 0}}}}, "sniffer.capture.sampler.base_rate: must be above 0"),
        ({"sniffer": {"capture": {"sampler": {"seed": -1}}}}, "sniffer.capture.sampler.seed: must lie between"),
        ({"sniffer": {"capture": {"head_sampling": {"count": 0}}}}, "sniffer.capture.head_sampling.count: must be"),
        ({"sniffer": {"capture": {"capture_queries": False, "capture_keys": False}}}, "sniffer.capture.capture_queries"),
        ({"sniffer": {"output": {"hf_repo_id": "me/heads"}}}, "sniffer.output.hf_repo_id: "),
        ({"trainer": {"precision": "bf16-true"}}, "trainer.precision: bf16-true would also cast RoPE"),
        ({"trainer": {"precision": "16-mixed"}}, "trainer.precision: "),
        ({"trainer": {"devices": -3}}, "trainer: "),
        ({"trainer": {"callbacks": {"class_path": "qk_sniffer.callback.SnifferCallback", "init_args": {"output": {"data_root": "x"}}}}}, "trainer.callbacks: SnifferCallback"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_config_is_one_line(
    predict: Predict,
    capsys: pytest.CaptureFixture[str],
    sections: dict[str, Any],
    message: str,
    model_dir: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tokenizer = sections.get("data", {}).get("tokenizer", {})
    if tokenizer.get("name") is TOKENIZER:
        sections = sections | {"data": {"tokenizer": {"name": str(model_dir("llama"))}}}
    assert predict(**sections) == 2
    assert message in error_line(capsys)
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data.path: "),
        (
            [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}],
            "data.id_column: the id 'a' appears twice",
        ),
        ([{"id": i, "text": "x"} for i in colliding_pair()], "both become example_id"),
        ([{"id": "a", "text": "x"}, {"id": "b", "text": None}], "data.text_column: row 1 has None"),
        ([{"id": "a", "text": 7}], "data.text_column: row 0 has 7 in 'text', not a string"),
        (
            [{"id": None, "text": "x"}, {"id": "b", "text": "x"}],
            "data.id_column: row 0 has the id None",
        ),
    ],
)
@pytest.mark.parametrize("data", [{}, {"streaming": True}, {"streaming": True, "num_workers": 1}])
def test_a_mistake_in_the_data_is_one_line(
    predict: Predict,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    rows: list[dict[str, Any]],
    message: str,
    data: dict[str, Any],
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert predict(data={"path": str(path), **data}) == 2
    assert message in error_line(capsys)


def test_more_tokens_than_learned_positions(
    predict: Predict, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"id": 0, "text": "x" * 129}])
    assert predict(family="gpt2", data={"path": str(path)}) == 2
    line = error_line(capsys)
    assert line.startswith("data.tokenizer.max_length: a sequence has 129 tokens and the model has 128")


def test_a_model_without_attention_is_refused_before_any_data_is_loaded(
    predict: Predict,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    config = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    config.save_pretrained(tmp_path / "mamba")
    assert predict(model={"name": str(tmp_path / "mamba")}, data={"path": "no/such/data"}) == 2
    assert "is a mamba model: it has no softmax attention" in error_line(capsys)


def test_a_data_root_in_use_is_refused_and_left_alone(
    predict: Predict, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert predict() == 0
    files = {path: path.read_bytes() for path in (tmp_path / "root").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert predict(sniffer={"capture": {"heads": [0]}}) == 2
    line = error_line(capsys)
    assert line.startswith("sniffer.output.data_root: ")
    assert "set sniffer.output.overwrite to true" in line
    assert {
        path: path.read_bytes() for path in (tmp_path / "root").rglob("*") if path.is_file()
    } == files


def test_overwrite_replaces_the_run_and_nothing_else(predict: Predict, tmp_path: Path) -> None:
    assert predict() == 0
    notes = tmp_path / "root" / "notes.txt"
    notes.write_text("mine")
    assert predict(sniffer={"capture": {"heads": [0]}, "output": {"overwrite": True}}) == 0
    heads = {path.parent.name for path in (tmp_path / "root").glob("l*/data.parquet")}
    assert heads == {f"l{layer:02d}h00{kind}" for layer in range(4) for kind in "qk"}
    assert notes.read_text() == "mine"


def test_overwrite_keeps_the_old_run_when_the_new_config_is_wrong(
    predict: Predict, tmp_path: Path
) -> None:
    assert predict() == 0
    files = set((tmp_path / "root").rglob("*"))
    assert predict(sniffer={"capture": {"layers": [9]}, "output": {"overwrite": True}}) == 2
    assert set((tmp_path / "root").rglob("*")) == files


def test_a_data_root_under_a_file_is_refused(
    predict: Predict, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert predict(sniffer={"output": {"data_root": str(tmp_path / "file" / "root")}}) == 2
    line = error_line(capsys)
    assert line.startswith("sniffer.output.data_root: ")
    assert "is not writable (Not a directory)" in line


def test_a_read_only_data_root_is_refused(
    predict: Predict, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    read_only = tmp_path / "read-only"
    read_only.mkdir(mode=0o555)
    # Permissions do not bind root; sysfs takes files from no one.
    parent = Path("/sys") if os.getuid() == 0 else read_only
    root = parent / "qk-sniffer-test"
    assert predict(sniffer={"output": {"data_root": str(root)}}) == 2
    assert error_line(capsys).startswith(f"sniffer.output.data_root: {root} is not writable")


def run_command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *args], capture_output=True, text=True)


def test_the_installed_command_ends_with_the_status_of_the_mistake(tmp_path: Path) -> None:
    done = run_command("predict", "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("qk-sniffer: error: --config: File does not exist")


def test_required_fields_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict"]) == 2
    line = error_line(capsys)
    assert line.startswith("model.name, data.path, sniffer.output.data_root: required")


@pytest.mark.parametrize("args", [[], ["sniff"], ["predict", "--data.pth", "x"]])
def test_other_slips_on_the_command_line(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: qk-sniffer") or captured.err.count("\n") == 1


def test_the_usage_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "predict --config FILE" in capsys.readouterr().out


def test_help_describes_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field, help_text in {
        "--model.name NAME": "Hub id or local directory of the model.",
        "--model.config_overrides": "Values set on the model's config before it is built",
        "--data.text_column": "Column with the texts",
        "--data.tokenizer.max_length": "Tokens kept from the start of each text",
        "--sniffer.capture.sampler.type": "log_uniform, uniform, all, or the class path",
        "--sniffer.capture.full_attention_only": "Leave out layers with a sliding window.",
        "--sniffer.output.data_root": "Directory of the per-head Parquet files",
    }.items():
        assert field in text
        assert help_text in text


def test_print_config_is_complete_and_commented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert set(config) == {"seed_everything", "trainer", "model", "data", "sniffer"}
    lines = printed[printed.index("\nmodel:") :].splitlines()
    keys = [i for i, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")]
    bare = [lines[i] for i in keys if i > 0 and not lines[i - 1].strip().startswith("#")]
    assert bare in ([], ["model:"])


def test_the_saved_config_repeats_the_run(predict: Predict, tmp_path: Path) -> None:
    assert predict(sniffer={"capture": {"heads": [1]}}) == 0
    config = str(tmp_path / "root" / "config.yaml")
    other = str(tmp_path / "again")
    assert main(["predict", "--config", config, "--sniffer.output.data_root", other]) == 0
    for file in (tmp_path / "root").glob("l*/data.parquet"):
        again = tmp_path / "again" / file.relative_to(tmp_path / "root")
        assert again.read_bytes() == file.read_bytes()


def test_a_token_in_the_config_is_not_saved(predict: Predict, tmp_path: Path) -> None:
    token = "hf_" + "abcDEF123" * 4
    assert predict(data={"revision": token}) == 0
    for file in (tmp_path / "root").rglob("*"):
        assert file.is_dir() or token.encode() not in file.read_bytes()
