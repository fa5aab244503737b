"""The callback in a trainer of one's own, and what an interrupted run leaves behind."""

import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from conftest import LENGTHS, write_jsonl
from killing import Processes, until
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.capture import get_active_sniffer
from qk_sniffer.cli import main
from qk_sniffer.config import CaptureConfig, OutputConfig, SamplerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.errors import UserError
from qk_sniffer.models import ModelSource, capture_attention, decoder_backbone, load_model
from qk_sniffer.module import SnifferModule
from qk_sniffer.recording import leave_out_advertisements
from qk_sniffer.storage import JournalWriter
from qk_sniffer.storage.commits import read_commits
from readers import error_line

Predict = Callable[..., int]
ModelDir = Callable[[str], Path]
ALL = CaptureConfig(sampler=SamplerConfig(type="all"))


def trainer(*callbacks: Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
        **options,
    )


def test_a_trainer_in_python_writes_what_the_command_writes(
    predict: Predict, model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    assert predict("command") == 0
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "python")), ALL)
    module = SnifferModule(str(model_dir("llama")))
    data = TextDataModule(str(text_file), id_column="id", batch_size=3)
    trainer(sniffer).predict(module, datamodule=data, return_predictions=False)
    files = sorted((tmp_path / "command").glob("*/data.parquet"))
    assert len(files) == 25
    for file in files:
        other = tmp_path / "python" / file.relative_to(tmp_path / "command")
        assert other.read_bytes() == file.read_bytes()
    settings = json.loads((tmp_path / "python" / "manifest.json").read_text())["settings"]
    assert settings == json.loads((tmp_path / "command" / "manifest.json").read_text())["settings"]


def in_memory(model_dir: ModelDir) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    directory = model_dir("llama")
    model = AutoModelForCausalLM.from_pretrained(directory)
    return model.train(), AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("kind", ["strings", "dataset"])
def test_a_model_and_texts_in_memory(
    kind: str, predict: Predict, model_dir: ModelDir, texts: list[Any], tmp_path: Path
) -> None:
    """Files with the rows of the command, which go on with the very same texts alone."""
    columns = {"id_column": "id"} if kind == "dataset" else {}
    assert predict("command", data={"id_column": columns.get("id_column"), "batch_size": 1}) == 0
    model, tokenizer = in_memory(model_dir)
    tokenizer.truncation_side = "left"
    strings = [row["text"] for row in texts]
    given = strings if kind == "strings" else datasets.Dataset.from_list(texts)

    def run(given: Any, **settings: Any) -> None:
        sniffer = SnifferCallback(OutputConfig(str(tmp_path / "python")), ALL)
        data = TextDataModule.of(given, **columns, **settings)
        module = SnifferModule.of(model, tokenizer)
        trainer(sniffer).predict(module, datamodule=data, return_predictions=False)

    run(given, max_samples=4)
    run(given)
    files = sorted((tmp_path / "command").glob("l*/data.parquet"))
    for file in files:
        other = tmp_path / "python" / file.relative_to(tmp_path / "command")
        assert pq.read_table(other).equals(pq.read_table(file))
    assert tokenizer.truncation_side == "left"
    assert main(["verify", str(tmp_path / "python")]) == 0
    with pytest.raises(UserError, match=r"holds a run with other settings: data\.path is"):
        run(["other texts", "than those"] if kind == "strings" else given.select(range(5)))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 1
    with pytest.raises(UserError, match=r"holds a run with other settings: model\.weights is"):
        run(given)


def test_texts_in_memory_are_checked() -> None:
    for wrong, message in (
        ("a text", "texts: expected a list of strings"),
        ([1, 2], "texts: expected a list of strings"),
        ([], "texts: the list is empty"),
        (datasets.Dataset.from_dict({"words": ["a"]}), "data.text_column: the dataset has no column"),
    ):
        with pytest.raises(UserError, match=message):
            TextDataModule.of(wrong)  # type: ignore[arg-type]


def plain_batch(mask: list[list[int]]) -> dict[str, Any]:
    """A batch as someone's own loader might make it, without the class of TextDataModule."""
    attention_mask = torch.tensor(mask)
    return {
        "input_ids": torch.arange(2, 2 + attention_mask.numel()).reshape(attention_mask.shape),
        "attention_mask": attention_mask,
        "example_ids": torch.arange(len(mask), dtype=torch.int32),
        "sequence_lengths": attention_mask.sum(1),
        "source_ids": [f"text-{i}" for i in range(len(mask))],
        "truncated": [False] * len(mask),
    }


def test_a_loader_of_ones_own(model_dir: ModelDir, tmp_path: Path) -> None:
    loader = DataLoader([plain_batch([[1, 1, 1], [1, 0, 0]])], batch_size=None)
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL)
    trainer(sniffer).predict(SnifferModule(str(model_dir("llama"))), loader, return_predictions=False)
    table = pq.read_table(tmp_path / "root" / "l00h00q" / "data.parquet")
    assert table["example_id"].to_pylist() == [0, 0, 0, 1]
    assert table["position"].to_pylist() == [0, 1, 2, 0]


def test_a_loader_that_gives_a_text_twice_is_told_at_once(model_dir: ModelDir, tmp_path: Path) -> None:
    batches = [plain_batch([[1, 1, 1], [1, 0, 0]]), plain_batch([[1, 1]])]
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL)
    loader = DataLoader(batches, batch_size=None)
    with pytest.raises(UserError, match="example_ids: the text 0 comes twice in this run"):
        trainer(sniffer).predict(
            SnifferModule(str(model_dir("llama"))), loader, return_predictions=False
        )
    # In another run it was read before, and is left out.
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL)
    loader = DataLoader(batches[:1], batch_size=None)
    trainer(sniffer).predict(SnifferModule(str(model_dir("llama"))), loader, return_predictions=False)
    table = pq.read_table(tmp_path / "root" / "l00h00q" / "data.parquet")
    assert table["example_id"].to_pylist() == [0, 0, 0, 1]


def own_loader(**changes: Any) -> DataLoader:
    """One batch of two texts, with some fields changed; None leaves one out."""
    batch = plain_batch([[1, 1, 1], [1, 0, 0]]) | changes
    return DataLoader([{k: v for k, v in batch.items() if v is not None}], batch_size=None)


REASONABLE: dict[str, dict[str, Any]] = {
    "tensors": {"truncated": torch.tensor([False, True]), "source_ids": torch.tensor([70, 71])},
    "arrays": {"truncated": np.array([False, True]), "example_ids": np.array([0, 1])},
    "lists": {"example_ids": [0, 1], "sequence_lengths": [3, 1]},
    "long ids": {"example_ids": torch.tensor([0, 1])},
    "no more than ids": {"source_ids": None, "truncated": None},
    "the mask alone": {"sequence_lengths": None},
    "lengths alone": {"attention_mask": None},
}


@pytest.mark.parametrize("case", REASONABLE)
def test_a_loader_may_give_its_fields_as_it_has_them(
    case: str, model_dir: ModelDir, tmp_path: Path
) -> None:
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL)
    module = SnifferModule(str(model_dir("llama")))
    trainer(sniffer).predict(module, own_loader(**REASONABLE[case]), return_predictions=False)
    table = pq.read_table(tmp_path / "root" / "l00h00q" / "data.parquet")
    assert table["example_id"].to_pylist() == [0, 0, 0, 1]
    examples = pq.read_table(tmp_path / "root" / "examples" / "data.parquet").to_pylist()
    assert [row["n_tokens"] for row in examples] == [3, 1]
    assert examples[1]["truncated"] is (case in ("tensors", "arrays"))
    expected = {"tensors": "71", "no more than ids": "1"}.get(case, "text-1")
    assert examples[1]["source_id"] == expected


UNREASONABLE: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"input_ids": None}, r"^input_ids: .*got the keys attention_mask, "),
    "tokens of one text": ({"input_ids": torch.arange(3)}, r"^input_ids: .*shape \(3,\)"),
    "embeddings": ({"input_ids": torch.zeros(2, 3)}, r"^input_ids: .*float32"),
    "no ids": ({"example_ids": None}, r"^example_ids: a batch has none; "),
    "strings as ids": ({"example_ids": ["a", "b"]}, r"^example_ids: expected 2 integers"),
    "one id": ({"example_ids": [7]}, r"^example_ids: expected 2 integers"),
    "a shared id": ({"example_ids": [7, 7]}, r"^example_ids: two texts"),
    "a long id": ({"example_ids": [7, 2**31]}, r"^example_ids: .*32-bit"),
    "lengths beyond the width": (
        {"sequence_lengths": [4, 1], "attention_mask": None},
        r"^sequence_lengths: expected 0 to 3",
    ),
    "one source id": ({"source_ids": ["a"]}, r"^source_ids: expected 2 values"),
    "a string of source ids": ({"source_ids": "ab"}, r"^source_ids: expected 2 values"),
}


@pytest.mark.parametrize("case", UNREASONABLE)
def test_other_fields_are_refused_in_one_line(case: str, model_dir: ModelDir, tmp_path: Path) -> None:
    changes, line = UNREASONABLE[case]
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL)
    with pytest.raises(UserError, match=line) as error:
        trainer(sniffer).predict(SnifferModule(str(model_dir("llama"))), own_loader(**changes))
    assert "\n" not in str(error.value)
    assert get_active_sniffer() is None


def test_a_batch_that_is_no_dictionary_is_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL)
    loader = DataLoader([torch.ones(2, 3, dtype=torch.int64)], batch_size=None)
    with pytest.raises(UserError, match=r"^input_ids: .*got a Tensor; "):
        trainer(sniffer).predict(SnifferModule(str(model_dir("llama"))), loader)


class OwnModule(pl.LightningModule):
    """A module of someone's own, with or without what the callback asks for."""

    def __init__(self, backbone: torch.nn.Module | None, *, captures: bool = True) -> None:
        super().__init__()
        if backbone is not None:
            self.backbone = backbone
        self.captures = captures

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        with capture_attention(self.backbone) if self.captures else nullcontext():
            self.backbone(input_ids=batch["input_ids"], use_cache=False)


def tiny_backbone(directory: Path, **overrides: Any) -> torch.nn.Module:
    return decoder_backbone(load_model(ModelSource(str(directory)), config_overrides=overrides))


def test_a_module_of_ones_own(model_dir: ModelDir, tmp_path: Path) -> None:
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL)
    module = OwnModule(tiny_backbone(model_dir("llama")))
    trainer(sniffer).predict(module, own_loader(), return_predictions=False)
    assert pq.read_table(tmp_path / "root" / "l00h00q" / "data.parquet").num_rows == 4


def test_a_module_that_can_t_be_captured_is_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    for module, line in (
        (OwnModule(None), r"^SnifferCallback: OwnModule has no backbone; "),
        (
            OwnModule(tiny_backbone(model_dir("llama")), captures=False),
            r"^SnifferCallback: predict_step",
        ),
    ):
        sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL, check=False)
        with pytest.raises(UserError, match=line):
            trainer(sniffer).predict(module, own_loader())
    with pytest.raises(UserError, match=r"^model\.name: .* got LlamaModel; "):
        SnifferModule(tiny_backbone(model_dir("llama")))  # type: ignore[arg-type]


def test_a_module_of_ones_own_does_not_mix_frequencies(model_dir: ModelDir, tmp_path: Path) -> None:
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 2}
    module = OwnModule(tiny_backbone(model_dir("llama"), **dynamic))
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL)
    with pytest.raises(UserError, match=r"^input_ids: a batch has texts of 3 and 1 tokens"):
        trainer(sniffer).predict(module, own_loader())


@pytest.mark.parametrize("logger", ["default", "CSVLogger"])
def test_any_logger_of_a_trainer_is_told_of_the_run(
    logger: str, model_dir: ModelDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {} if logger == "default" else {"logger": CSVLogger(".", name="lightning_logs")}
    sniffer = SnifferCallback(OutputConfig("root"), replace(ALL, capture_softmax=True))
    module = SnifferModule(str(model_dir("llama")))
    data = TextDataModule(str(text_file), id_column="id", batch_size=1)
    own = pl.Trainer(accelerator="cpu", callbacks=[sniffer], log_every_n_steps=3, **options)
    own.predict(module, datamodule=data, return_predictions=False)
    (directory,) = Path("lightning_logs").iterdir()
    metrics = list(csv.DictReader((directory / "metrics.csv").open()))
    assert [row["step"] for row in metrics] == ["3", "6", "7"]
    manifest = json.loads(Path("root/manifest.json").read_text())
    assert float(metrics[-1]["rows_kept"]) == sum(head["rows"] for head in manifest["heads"].values())
    assert float(metrics[-1]["tokens_read"]) == sum(LENGTHS)
    assert all(float(row["tokens_per_second"]) > 0 for row in metrics)
    assert [float(row["texts_read"]) for row in metrics] == [3, 6, 7]
    vectors = sum(
        head["rows"] * 4 * manifest["layers"][0]["head_dim"] for head in manifest["heads"].values()
    )
    assert vectors < float(metrics[-1]["bytes_written"]) < 2 * vectors
    assert ("device_memory_peak" in metrics[-1]) == torch.cuda.is_available()
    settings = yaml.safe_load((directory / "hparams.yaml").read_text())
    assert settings["model"]["name"] == str(model_dir("llama"))
    assert settings["data"]["path"] == str(text_file)


def test_loggers_on_the_command_line(predict: Predict, tmp_path: Path) -> None:
    loggers = [
        {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs"), "name": name}}
        for name in ("one", "two")
    ]
    assert predict(trainer={"logger": loggers}) == 0
    one, two = ((tmp_path / "logs" / name).rglob("metrics.csv") for name in ("one", "two"))
    assert next(one).read_text() == next(two).read_text() != ""


def test_loggers_are_told_after_a_minute(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qk_sniffer.recording.progress._SECONDS", 0.0)
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs")}}
    assert predict(trainer={"logger": logger}) == 0
    (metrics,) = (tmp_path / "logs").rglob("metrics.csv")
    assert [row["step"] for row in csv.DictReader(metrics.open())] == ["1", "2", "3", "3"]


@pytest.mark.parametrize("mask", [[[0, 1, 1], [1, 1, 1]], [[1, 0, 1]]])
def test_batches_not_padded_on_the_right_are_refused(
    model_dir: ModelDir, tmp_path: Path, mask: list[list[int]]
) -> None:
    loader = DataLoader([plain_batch(mask)], batch_size=None)
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL)
    with pytest.raises(UserError, match=r"^attention_mask: .*padding_side to right"):
        trainer(sniffer).predict(SnifferModule(str(model_dir("llama"))), loader)
    assert get_active_sniffer() is None


def test_token_strings_need_the_data_modules_tokenizer(model_dir: ModelDir, tmp_path: Path) -> None:
    loader = DataLoader([plain_batch([[1, 1]])], batch_size=None)
    capture = CaptureConfig(capture_token_strings=True)
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), capture)
    with pytest.raises(UserError, match=r"^sniffer\.capture\.capture_token_strings: "):
        trainer(sniffer).predict(SnifferModule(str(model_dir("llama"))), loader)


def test_the_backbone_runs_without_head_cache_or_mask(
    model_dir: ModelDir, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SnifferModule(str(model_dir("llama")))
    module.configure_model()
    assert type(module.backbone).__name__ == "LlamaModel"
    assert not any("lm_head" in name for name, _ in module.backbone.named_parameters())
    # Lightning would send registered weights from the first process to all others.
    assert list(module.parameters()) == []
    calls: list[dict[str, Any]] = []
    grad: list[bool] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)
        grad.append(torch.is_inference_mode_enabled())

    module.backbone.register_forward_pre_hook(note, with_kwargs=True)
    data = TextDataModule(str(text_file), batch_size=4)
    predictions = trainer().predict(module, datamodule=data)
    assert [set(call) for call in calls] == [{"input_ids", "use_cache"}] * 2
    assert all(call["use_cache"] is False for call in calls)
    assert all(grad)
    assert predictions == [4 * 61, 3 * 48]


class FailAt(Callback):
    """Raises after a number of batches."""

    def __init__(self, batch: int, error: BaseException) -> None:
        self.batch = batch
        self.error = error

    def on_predict_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self.batch:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_what_an_interrupted_run_captured_can_be_written(
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    error: BaseException,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "root"
    sniffer = SnifferCallback(OutputConfig(str(root)), ALL)
    data = TextDataModule(str(text_file), id_column="id", batch_size=2)
    with pytest.raises((type(error), SystemExit)):
        trainer(sniffer, FailAt(2, error)).predict(
            SnifferModule(str(model_dir("llama"))), datamodule=data, return_predictions=False
        )
    assert get_active_sniffer() is None
    assert not list(root.glob("l*"))
    assert f"qk-sniffer finalize {root}" in caplog.text
    assert main(["finalize", str(root)]) == 0
    assert "heads    24" in capsys.readouterr().out
    table = pq.read_table(root / "l00h00q" / "data.parquet")
    assert table.num_rows == sum(LENGTHS[:4])
    assert datasets.load_dataset(str(root), "l03h01k", split="train").num_rows == table.num_rows
    assert json.loads((root / "manifest.json").read_text())["complete"] is False
    assert "The run was interrupted" in (root / "README.md").read_text()
    assert not (root / ".journal").exists()


def test_a_failure_while_files_are_written_loses_nothing(
    predict: Predict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "root"
    with monkeypatch.context() as patch:
        # A directory where a file must go: the last head of the first layer can't be renamed there.
        patch.setattr(
            "qk_sniffer.recording.recorder.JournalWriter", _blocking(root / "l00h03q" / "data.parquet")
        )
        assert predict() == 2
    line = error_line(capsys)
    assert line.startswith(
        f"{root}: Is a directory; make room or mend the disk, then go on with `qk-sniffer finalize"
    )
    assert not (root / "manifest.json").exists()
    shutil.rmtree(root / "l00h03q")
    assert main(["finalize", str(root)]) == 0
    assert json.loads((root / "manifest.json").read_text())["complete"] is True
    assert len(list(root.glob("l*/data.parquet"))) == 24


def _blocking(path: Path) -> type[JournalWriter]:
    class Blocking(JournalWriter):
        def close(self) -> None:
            (path / "in the way").mkdir(parents=True, exist_ok=True)
            super().close()

    return Blocking


def test_finalize_needs_an_interrupted_run(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict() == 0
    root = tmp_path / "root"
    assert main(["finalize", str(root)]) == 2
    assert f"{root}: no interrupted run is here" in capsys.readouterr().err
    assert main(["finalize"]) == 2


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_whole_batches(
    processes: Processes,
    model_dir: ModelDir,
    texts: list[dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    sent: signal.Signals,
) -> None:
    root = tmp_path / "root"
    rows = [{"text": texts[2]["text"]} for _ in range(100_000)]
    path = write_jsonl(tmp_path / "many.jsonl", rows)
    command = ["predict", "--model.name", str(model_dir("llama")), "--data.path", str(path)]
    command += ["--data.streaming", "true", "--sniffer.output.data_root", str(root)]
    command += ["--sniffer.capture.sampler.type", "all", "--trainer.accelerator", "cpu"]
    part = root / ".journal" / "rank-00000"
    commits = part / "commits.jsonl"
    started = processes.start(command)
    until(
        lambda: commits.exists() and commits.read_text().count("\n") >= 2,
        started.is_alive,
        lambda: started.printed,
    )
    for _ in range(3 if sent == signal.SIGINT else 1):
        # Whoever waits for the end presses again.
        os.kill(started.process.pid, sent)
    ended = started.wait(60)
    assert ended.exitcode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    assert "Traceback" not in ended.printed
    assert (f"qk-sniffer finalize {root}" in ended.printed) == (sent != signal.SIGKILL)
    committed = sum(commit.example_ids.size for commit in read_commits(part).commits)
    with commits.open("a") as torn:
        torn.write('{"examples": 12')
    assert main(["finalize", str(root)]) == 0
    assert "1 entries were torn or damaged; what they stood for is not in the files" in caplog.text
    table = pq.read_table(root / "l03h01k" / "data.parquet")
    assert table["example_id"].unique().to_pylist() == list(range(committed))
    assert table.num_rows == committed * LENGTHS[2]


def test_a_placement_by_accelerate_writes_the_same_files(predict: Predict, tmp_path: Path) -> None:
    assert predict("plain") == 0
    assert predict("placed", model={"device_map": "cpu"}) == 0
    for file in (tmp_path / "plain").glob("l*/data.parquet"):
        other = tmp_path / "placed" / file.relative_to(tmp_path / "plain")
        assert other.read_bytes() == file.read_bytes()


def test_importing_the_package_changes_nothing() -> None:
    code = (
        "from transformers.modeling_utils import AttentionInterface as A; before = A.get_interface; "
        "import qk_sniffer.predict; assert A.get_interface is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Forgetful(TextDataModule):
    """Leaves out its last batch."""

    def predict_dataloader(self) -> DataLoader[Any]:
        loader = super().predict_dataloader()
        loader.sampler.batches.pop()
        return loader


def test_a_run_that_missed_a_text_is_not_finished(
    model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"

    def predict(data: TextDataModule) -> None:
        trainer(SnifferCallback(OutputConfig(str(root)), ALL)).predict(
            SnifferModule(str(model_dir("llama"))), datamodule=data, return_predictions=False
        )

    with pytest.raises(RuntimeError, match="1 of 7 texts were not captured, as example 6"):
        predict(Forgetful(str(text_file), batch_size=3))
    assert not (root / "manifest.json").exists()
    predict(TextDataModule(str(text_file), batch_size=3))
    assert pq.read_table(root / "examples" / "data.parquet").num_rows == 7


def test_lightning_advertises_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A default Trainer still tells its devices."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    callbacks = [SnifferCallback(OutputConfig(str(tmp_path / "root"))) for _ in range(2)]
    # The command line, which other tests have used, lets Lightning tell less.
    level = caplog.at_level(logging.INFO, "lightning.pytorch")
    with level, warnings.catch_warnings(record=True) as warned:
        leave_out_advertisements()
        pl.Trainer(accelerator="cpu", callbacks=callbacks[:1])
    logger.removeHandler(handler)
    assert any("GPU available" in line for line in said)
    assert not [line for line in said if "Tip" in line or "pip" in line]
    assert not warned
