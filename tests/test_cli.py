"""The command line: mistakes get one line and status 2, help and configs are complete."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import MambaConfig

from conftest import write_jsonl
from loopback import LoopbackHub
from qk_sniffer.cli import main
from readers import error_line
from test_data import colliding_pair

Predict = Callable[..., int]
TOKENIZER = "stands for the tiny model's tokenizer"
COMMAND = str(Path(sys.executable).with_name("qk-sniffer"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sniffer": {"capture": {"sampler": {"bsae_rate": 1}}}}, "sniffer.capture.sampler.bsae_rate: no such key; did you mean sniffer.capture.sampler.base_rate?"),
        ({"data": {"btach_size": 1}}, "data.btach_size: no such key; did you mean data.batch_size?"),
        ({"data": {"max_length": 8}}, "data.max_length: no such key; did you mean data.tokenizer.max_length?"),
        ({"sniffer": {"captre": {"layers": [1]}}}, "sniffer.captre.layers: no such key; did you mean sniffer.capture.layers?"),
        ({"data": {"colour": "red"}}, "data.colour: no such key; `qk-sniffer predict --help` lists the fields"),
        ({"sniffer": {"capture": {"head_sampling": {"cuont": 1}}}}, "head_sampling.cuont: no such key; did you mean sniffer.capture.head_sampling.count?"),
        ({"sniffer": {"capture": {"head_sampling": {"seed": 1}}}}, "sniffer.capture.head_sampling.count: required; set it"),
        ({"sniffer": {"capture": {"head_sampling": {"count": "many"}}}}, "sniffer.capture.head_sampling.count: expected int, got many"),
        ({"sniffer": {"capture": {"sampler": "all"}}}, "sniffer.capture.sampler: expected a section, got all"),
        ({"trainer": {"callbacks": {"class_path": "no.Such"}}}, "trainer.callbacks: no.Such can't be used (No module named 'no')"),
        ({"data": {"batch_size": "many"}}, "data.batch_size: expected int, got many"),
        ({"sniffer": {"capture": {"layers": "all"}}}, "sniffer.capture.layers: expected one of list[int], null"),
        ({"sniffer": {"capture": {"layers": 3}}}, "sniffer.capture.layers: expected one of list[int], null, got 3; write [3]"),
        ({"sniffer": {"capture": {"heads": "0,2"}}}, "sniffer.capture.heads: expected one of list[int], null, got 0,2; write [0,2]"),
        ({"model": {"dtype": "int4"}}, "model.dtype: expected one of 'auto', 'float32'"),
        ({"model": {"name": "no/such/directory"}}, "model.name: no directory no/such/directory is here; mend the path, which starts from "),
        ({"model": {"name": "no/such/directory"}, "data": {"tokenizer": {"name": TOKENIZER}}}, "model.name: no directory no/such/directory is here"),
        ({"model": {"name": "./model"}}, "model.name: no directory ./model is here"),
        ({"model": {"name": "~/no-such-model"}}, f"model.name: no directory {Path.home()}/no-such-model is here; mend the path, or"),
        ({"model": {"name": "s3://bucket/model"}}, "model.name: s3://bucket/model is an address"),
        ({"model": {"name": "someone/model"}}, "model.name: no directory someone/model is here or in the cache, and HF_HUB_OFFLINE keeps the client from the Hub; unset it"),
        ({"model": {"name": __file__}}, "test_cli.py is a file; name its directory, and set model.gguf_file"),
        ({"model": {"name": str(Path(__file__).parent)}}, "tests has no config.json"),
        ({"model": {"gguf_file": "model.gguf"}}, "model.gguf_file: "),
        ({"model": {"config_overrides": {"num_hidden_layers": "many"}}}, "model.config_overrides.num_hidden_layers: TypeError: Field 'num_hidden_layers' expected int, got str"),
        ({"model": {"config_overrides": {"rope_scaling": {"rope_type": "yarrn", "factor": 4.0}}}}, "model.config_overrides.rope_scaling.rope_type: there is no yarrn; did you mean yarn?"),
        ({"model": {"device_map": "autoo"}}, "model.device_map: autoo can't be used"),
        ({"data": {"num_workers": -1}}, "data.num_workers: must be at least 0, got -1"),
        ({"model": {"attn_implementation": "spda"}}, "model.attn_implementation: spda can't be used"),
        ({"model": {"config_overrides": {"rope_scalng": 1}}}, "model.config_overrides.rope_scalng: LlamaConfig has no such field; did you mean rope_scaling?"),
        ({"data": {"path": "no-such-file.jsonl"}}, "data.path: no file or directory no-such-file.jsonl is here; mend the path, which starts from "),
        ({"data": {"path": "no-such-file.jsonl", "streaming": True}}, "data.path: no file or directory no-such-file.jsonl is here"),
        ({"data": {"path": "/no/such/directory"}}, "data.path: no file or directory /no/such/directory is here; mend the path, or"),
        ({"data": {"path": "./texts"}}, "data.path: no file or directory ./texts is here"),
        ({"data": {"path": "~/no-such-file.txt"}}, "data.path: no file or directory ~/no-such-file.txt is here"),
        ({"data": {"path": "s3://bucket/texts.jsonl"}}, "data.path: s3://bucket/texts.jsonl is an address"),
        ({"data": {"path": "someone/texts"}}, "data.path: no file or directory someone/texts is here or in the cache, and HF_HUB_OFFLINE keeps the client from the Hub"),
        ({"data": {"path": "no-such-file*.jsonl"}}, "data.path: no file matches no-such-file*.jsonl; mend the pattern"),
        ({"data": {"path": __file__}}, "test_cli.py can't be read (Unable to find"),
        ({"data": {"name": "other"}}, "data.name: "),
        ({"data": {"split": "test"}}, "data.split: "),
        ({"data": {"text_column": "body"}}, "data.text_column: the dataset has no column 'body'; choose from id, text"),
        ({"data": {"id_column": "key"}}, "data.id_column: the dataset has no column 'key'; choose from id, text"),
        ({"data": {"batch_size": 0}}, "data.batch_size: must be at least 1, got 0"),
        ({"data": {"tokenizer": {"padding_side": "left"}}}, "data.tokenizer.padding_side: must be right, got left"),
        ({"data": {"tokenizer": {"max_length": 0}}}, "data.tokenizer.max_length: must be at least 1 or null"),
        ({"data": {"tokenizer": {"name": "./tokenizer"}}}, "data.tokenizer.name: no directory ./tokenizer is here"),
        ({"data": {"tokenizer": {"name": "someone/tokenizer"}}}, "data.tokenizer.name: no directory someone/tokenizer is here or in the cache, and HF_HUB_OFFLINE"),
        ({"data": {"tokenizer": {"name": str(Path(__file__).parent)}}}, "data.tokenizer.name: no tokenizer can be loaded"),
        ({"sniffer": {"capture": {"layers": [0, 4]}}}, "sniffer.capture.layers: the model has no layer 4; choose from 0 to 3"),
        ({"sniffer": {"capture": {"heads": [4]}}}, "sniffer.capture.heads: the model has no query head 4; choose from 0 to 3"),
        ({"sniffer": {"capture": {"heads": []}}}, "sniffer.capture.heads: the list is empty"),
        ({"sniffer": {"capture": {"min_bucket_size": 0}}}, "sniffer.capture.min_bucket_size: must lie between 1"),
        ({"sniffer": {"capture": {"min_bucket_size": -8}}}, "sniffer.capture.min_bucket_size: must lie between 1"),
        ({"sniffer": {"capture": {"sampler": {"type": "gaussian"}}}}, "sniffer.capture.sampler.type: no sampler is called 'gaussian'; choose log_uniform"),
        ({"sniffer": {"capture": {"sampler": {"type": "log_unifrom"}}}}, "no sampler is called 'log_unifrom'; did you mean log_uniform?"),
        ({"sniffer": {"capture": {"sampler": {"type": "qk_sniffer.capture.Unifrom"}}}}, "sniffer.capture.sampler.type: qk_sniffer.capture has no Unifrom"),
        ({"sniffer": {"output": {"data_root": "s3://bucket/root"}}}, "sniffer.output.data_root: s3://bucket/root is an address; name a directory"),
        ({"sniffer": {"capture": {"sampler": {"base_rate": 0}}}}, "sniffer.capture.sampler.base_rate: must be a finite number of at least 1e-30"),
        ({"sniffer": {"capture": {"sampler": {"seed": -1}}}}, "sniffer.capture.sampler.seed: must lie between"),
        ({"sniffer": {"capture": {"head_sampling": {"count": 0}}}}, "sniffer.capture.head_sampling.count: must be"),
        ({"sniffer": {"capture": {"capture_queries": False, "capture_keys": False}}}, "sniffer.capture.capture_queries"),
        ({"sniffer": {"output": {"hf_repo_id": "me/heads"}}}, "sniffer.output.hf_repo_id: "),
        ({"trainer": {"precision": "bf16-true"}}, "trainer.precision: bf16-true would also cast RoPE"),
        ({"trainer": {"precision": "16-mixed"}}, "trainer.precision: "),
        ({"trainer": {"devices": -3}}, "trainer: "),
        ({"trainer": {"logger": "CSVLogger"}}, "trainer.logger.save_dir: required; "),
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
    line = error_line(capsys)
    assert message in line
    assert "huggingface.co" not in line
    assert not (tmp_path / "root").exists()
    assert not Path("s3:").exists()


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


@pytest.mark.parametrize(
    ("section", "field", "what"),
    [
        ({"model": {"name": "someone/nothing"}}, "model.name", "directory"),
        ({"data": {"tokenizer": {"name": "someone/nothing"}}}, "data.tokenizer.name", "directory"),
        ({"data": {"path": "someone/nothing"}}, "data.path", "file or directory"),
    ],
)
def test_a_name_that_neither_this_machine_nor_the_hub_knows(
    hub: LoopbackHub,
    predict: Predict,
    capsys: pytest.CaptureFixture[str],
    section: dict[str, Any],
    field: str,
    what: str,
) -> None:
    assert predict(**section) == 2
    line = error_line(capsys)
    start = f"{field}: no {what} someone/nothing is here, and the Hub does not give it ("
    assert line.startswith(start)
    assert "mend the name, or log in with `hf auth login`" in line


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        ({"layers": [0, 4]}, "sniffer.capture.layers: the model has no layer 4; choose from 0 to 3"),
        ({"heads": [4]}, "sniffer.capture.heads: the model has no query head 4; choose from 0 to 3"),
    ],
)
def test_a_layer_that_the_config_rules_out_needs_no_weights(
    predict: Predict,
    capsys: pytest.CaptureFixture[str],
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    capture: dict[str, Any],
    message: str,
) -> None:
    model, without = model_dir("llama"), tmp_path / "without-weights"
    shutil.copytree(model, without, ignore=shutil.ignore_patterns("*.safetensors"))
    sections = {"model": {"name": str(without)}, "sniffer": {"capture": capture}}
    assert predict(**sections, data={"path": "no-such-file.jsonl"}) == 2
    assert error_line(capsys) == message


def test_a_refused_run_leaves_no_directories(
    predict: Predict, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    for number, sections in enumerate(
        ({"model": {"name": "./model"}}, {"data": {"path": "./texts"}}, {"model": {"dtype": "int4"}})
    ):
        root = tmp_path / "there" / f"new-{number}" / "root"
        assert predict(**sections, sniffer={"output": {"data_root": str(root)}}) == 2
        assert error_line(capsys)
    assert not list((tmp_path / "there").iterdir())
    # One that a person has made stays.
    assert (
        predict(sniffer={"output": {"data_root": str(tmp_path / "there")}}, data={"path": "./x"}) == 2
    )
    assert (tmp_path / "there").is_dir()


@pytest.mark.parametrize("streaming", [False, True])
def test_config_and_manifest_tell_of_the_same_run(
    predict: Predict, tmp_path: Path, streaming: bool
) -> None:
    root = tmp_path / "root"
    for max_samples, expected in ((4, 4), (2, 4), (6, 6)):
        assert predict(data={"max_samples": max_samples, "streaming": streaming}) == 0
        config = yaml.safe_load((root / "config.yaml").read_text())
        manifest = json.loads((root / "manifest.json").read_text())
        assert config["data"]["max_samples"] == expected
        assert manifest["settings"]["data"]["max_samples"] == expected
        assert manifest["examples"]["rows"] == expected


def test_a_pattern_of_files_is_what_a_run_is_known_by(
    predict: Predict, texts: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "essays").mkdir()
    pattern, root = str(tmp_path / "essays" / "*.jsonl"), tmp_path / "root"
    for number in range(3):
        write_jsonl(tmp_path / "essays" / f"{2 - number}.jsonl", texts[number : number + 1])
        assert predict(data={"path": pattern}) == 0
        manifest = json.loads((root / "manifest.json").read_text())
        assert manifest["fingerprint"]["data.path"] == pattern
        assert manifest["examples"]["rows"] == number + 1
    assert "texts of `essays/*.jsonl`" in (root / "README.md").read_text()
    assert main(["verify", "--against-model", str(root)]) == 0
    capsys.readouterr()
    estimate = ["estimate", "--config", str(tmp_path / "root.yaml")]
    assert main(estimate) == 0
    assert "texts      3 of " in capsys.readouterr().out


def test_a_data_root_with_a_colon_is_a_directory(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert predict(sniffer={"output": {"data_root": "run:1"}}) == 0
    assert main(["verify", "run:1"]) == 0
    assert len(list((tmp_path / "run:1").glob("l*/data.parquet"))) == 24


def test_a_home_directory_is_where_it_is(
    write_run: Callable[..., list[str]],
    model_dir: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "model").symlink_to(model_dir("llama"))
    (tmp_path / "home" / "texts.jsonl").symlink_to(text_file)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    output = {"output": {"data_root": "~/root"}}
    args = write_run(model={"name": "~/model"}, data={"path": "~/texts.jsonl"}, sniffer=output)
    assert main(args) == 0
    assert len(list((tmp_path / "home" / "root").glob("l*/data.parquet"))) == 24


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


def test_a_config_of_the_original_scripts_is_to_be_converted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("dataset: {path: texts.jsonl}\nmodel: {name: gpt2}\n")
    assert main(["predict", "--config", str(file)]) == 2
    assert "`qk-sniffer convert-config FILE`" in error_line(capsys)
    file.write_text("model: {name: gpt2}\nsniffer: {output: {data_root: x}}\n")
    assert main(["convert-config", str(file)]) == 2
    assert error_line(capsys).startswith(
        f"{file}: a config of predict already; run `qk-sniffer predict"
    )


def test_required_fields_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict"]) == 2
    line = error_line(capsys)
    assert line.startswith("model.name, data.path, sniffer.output.data_root: required")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sniff"], "sniff: no such command; choose predict, estimate,"),
        (["predit", "--config", "x.yaml"], "predit: no such command; did you mean predict?"),
        (["version"], "version: no such command; did you mean --version?"),
        (["--config", "x.yaml"], "--config: the first word is a command; choose predict,"),
        (["predict", "mine.yaml"], "mine.yaml: give a config file as --config mine.yaml"),
        (["estimate", "mine.yaml"], "mine.yaml: give a config file as --config mine.yaml"),
        (["predict", "--data.path", "a.jsonl", "b.jsonl"], "b.jsonl: no such argument; put a pattern of files in quotes"),
        (["predict", "mine"], "mine: no such argument; `qk-sniffer predict --help` lists the fields"),
        (["predict", "--confg", "mine.yaml"], "--confg: no such option; did you mean --config?"),
        (["predict", "--data.pth", "x"], "--data.pth: no such option; did you mean --data.path?"),
        (["predict", "--batch_size=8"], "--batch_size: no such option; did you mean --data.batch_size?"),
        (["predict", "--acelerator"], "--acelerator: no such option; did you mean --trainer.accelerator?"),
        (["predict", "--sniffer.capture.layers", "3"], "sniffer.capture.layers: expected one of list[int], null, got 3; write [3]"),
        (["predict", "--sniffer.capture.head_sampling.cuont", "3"], "sniffer.capture.head_sampling.cuont: no such key; did you mean sniffer.capture.head_sampling.count?"),
        (["predict", "--sniffer.capture.sampler", "all"], "sniffer.capture.sampler: expected a section, got all; give its fields one by one, as in --sniffer.capture.sampler.FIELD VALUE"),
        (["predict", "--data.batch_size"], "--data.batch_size: expected one argument; "),
        (["estimate", "--tiem"], "--tiem: no such option; did you mean --time?"),
        (["verify", "--against-modle", "."], "--against-modle: no such option; did you mean --against-model?"),
        (["finalize", "nowhere"], "nowhere: no such directory is here; name the data root of a run"),
        (["verify", "nowhere"], "nowhere: no such directory is here"),
        (["verify", "--against-model", "nowhere"], "nowhere: no such directory is here"),
        (["report", "nowhere"], "nowhere: no such directory is here"),
        (["push", "nowhere", "--hf_repo_id", "me/heads"], "nowhere: no such directory is here"),
        (["finalize", "s3://bucket/root"], "s3://bucket/root: an address; a data root is a directory"),
        (["verify", "s3://bucket/root"], "s3://bucket/root: an address"),
        (["report", "gs://bucket/root"], "gs://bucket/root: an address"),
        (["push", "s3://bucket/root", "--hf_repo_id", "me/heads"], "s3://bucket/root: an address"),
        (["verify", __file__], f"{__file__}: no directory but a file"),
    ],
)  # fmt: skip
def test_a_slip_on_the_command_line_is_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    assert error_line(capsys).startswith(message)


def test_no_command_prints_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: qk-sniffer")


def test_the_version_is_told_also_by_the_module() -> None:
    told = f"qk-sniffer {importlib.metadata.version('qk-sniffer')}\n"
    module = [sys.executable, "-m", "qk_sniffer"]
    for command in ([COMMAND, "--version"], [*module, "--version"]):
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == told
    done = subprocess.run([*module, "verify", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr
        == "qk-sniffer: error: nowhere: no such directory is here; name the data root of a run\n"
    )


def test_the_usage_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "predict --config FILE" in capsys.readouterr().out


def test_help_describes_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field, help_text in {
        "--model.name VALUE": "Hub id or local directory of the model, or of a PEFT adapter, which names its base.",
        "--model.config_overrides": "Values set on the model's config before it is built",
        "--data.text_column": "Column with the texts",
        "--data.tokenizer.max_length": "Tokens kept from the start of each text",
        "--sniffer.capture.sampler.type": "log_uniform, uniform, all, positions, none, or the class path",
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
