"""A run that stops goes on where it stopped, and a finished one takes more texts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from conftest import LENGTHS, write_jsonl
from families import FAMILIES, tiny_model
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.cli import main
from qk_sniffer.config import CaptureConfig, OutputConfig, SamplerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.module import SnifferModule
from qk_sniffer.storage.commits import locked_journal
from readers import error_line, files_of
from test_callback import FailAt, plain_batch, trainer

Predict = Callable[..., int]
ModelDir = Callable[[str], Path]
ALL = CaptureConfig(sampler=SamplerConfig(type="all"))


@pytest.fixture
def interrupt(predict: Predict, monkeypatch: pytest.MonkeyPatch) -> Predict:
    """Run the command and stop it after some batches."""

    def run(root: str = "root", *, after: int = 2, **sections: Any) -> int:
        with monkeypatch.context() as patch:
            original = SnifferCallback.on_predict_batch_end

            def stopping(
                self: Any, trainer: Any, module: Any, outputs: Any, batch: Any, i: int
            ) -> None:
                original(self, trainer, module, outputs, batch, i)
                if i + 1 == after:
                    raise KeyboardInterrupt

            patch.setattr(SnifferCallback, "on_predict_batch_end", stopping)
            with pytest.raises(SystemExit):
                predict(root, **sections)
        return 1

    return run


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ids", ["id", None])
def test_the_same_command_goes_on(
    predict: Predict,
    interrupt: Predict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    streaming: bool,
    ids: str | None,
) -> None:
    sections = {"data": {"batch_size": 2, "streaming": streaming, "id_column": ids}}
    everything = ("token_strings", "values", "outputs", "softmax")
    sections |= {"sniffer": {"capture": {f"capture_{name}": True for name in everything}}}
    assert predict("whole", **sections) == 0
    interrupt("root", **sections)
    assert not list((tmp_path / "root").glob("l*"))
    read: list[int] = []
    original = SnifferModule.predict_step
    monkeypatch.setattr(
        SnifferModule,
        "predict_step",
        lambda self, batch, i: (
            read.extend(batch["sequence_lengths"].tolist()),
            original(self, batch, i),
        ),
    )
    assert predict("root", **sections) == 0
    assert read == list(LENGTHS[4:])
    assert files_of(tmp_path / "root") == files_of(tmp_path / "whole")
    manifests = [
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("root", "whole")
    ]
    assert manifests[0] == manifests[1]
    assert manifests[0]["complete"] is True


def test_texts_that_are_captured_are_not_tokenized_again(
    interrupt: Predict, model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    interrupt(data={"batch_size": 2})
    data = TextDataModule(str(text_file), id_column="id", batch_size=2)
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), ALL)
    trainer(sniffer).predict(SnifferModule(str(model_dir("llama"))), datamodule=data)
    lengths = data.sequence_lengths()
    assert lengths is not None
    assert lengths.tolist() == list(LENGTHS[4:])
    assert pq.read_metadata(tmp_path / "root" / "l00h00q" / "data.parquet").num_rows == sum(LENGTHS)


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"model": {"dtype": "bfloat16"}}, 'model.dtype is "auto" there and "bfloat16" here'),
        ({"model": {"attn_implementation": "eager"}}, "model.attn_implementation is null there"),
        ({"model": {"config_overrides": {"rms_norm_eps": 1e-5}}}, "model.config_overrides is null"),
        ({"data": {"tokenizer": {"max_length": 20}}}, "data.tokenizer.max_length is null there and 20"),
        ({"data": {"id_column": None}}, 'data.id_column is "id" there and null here'),
        ({"sniffer": {"capture": {"capture_softmax": True}}}, "softmax is not set there and true here"),
        ({"sniffer": {"capture": {"capture_values": True}}}, "values is not set there and true here"),
        ({"sniffer": {"capture": {"heads": [1]}}}, "sniffer.capture.heads is null there and [1]"),
        ({"sniffer": {"capture": {"sampler": {"seed": 3}}}}, "capture.sampler.seed is 0 there and 3"),
        ({"sniffer": {"capture": {"head_sampling": {"count": 3}}}}, "capture.head_sampling is null"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_by_name(
    predict: Predict,
    interrupt: Predict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sections: dict[str, Any],
    field: str,
    finished: bool,
) -> None:
    predict() if finished else interrupt(after=1)
    files = {path: path.read_bytes() for path in (tmp_path / "root").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert predict(**sections) == 2
    line = error_line(capsys)
    assert "holds a run with other settings" in line
    assert field in line
    assert {path: path.read_bytes() for path in files} == files


def test_other_weights_in_the_same_directory_are_refused(
    predict: Predict,
    interrupt: Predict,
    model_dir: ModelDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model_dir("llama").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    interrupt(model={"name": str(copy)})
    trained = tiny_model(FAMILIES["llama"])
    with torch.no_grad():
        trained.model.layers[2].self_attn.q_proj.weight.mul_(1.01)
    trained.save_pretrained(copy)
    capsys.readouterr()
    assert predict(model={"name": str(copy)}) == 2
    line = error_line(capsys)
    assert "model.weights is" in line
    assert "model.heads" not in line


def test_overwrite_starts_anew(predict: Predict, interrupt: Predict, tmp_path: Path) -> None:
    interrupt(data={"batch_size": 2})
    changes = {"capture": {"heads": [0]}, "output": {"overwrite": True}}
    assert predict(data={"max_samples": 1}, sniffer=changes) == 0
    table = pq.read_table(tmp_path / "root" / "l00h00q" / "data.parquet")
    assert table.num_rows == LENGTHS[0]


def test_batch_size_and_passages_may_change(
    predict: Predict, interrupt: Predict, tmp_path: Path
) -> None:
    assert predict("whole") == 0
    interrupt("root", after=1)
    assert predict("root", data={"batch_size": 1}, model={"prefill_chunk_size": 16}) == 0
    for file in (tmp_path / "whole").glob("l*/data.parquet"):
        whole = pq.read_table(file)
        parts = pq.read_table(tmp_path / "root" / file.relative_to(tmp_path / "whole"))
        assert parts.drop_columns("vector").equals(whole.drop_columns("vector"))
        vectors = [np.stack(table["vector"].to_numpy()) for table in (parts, whole)]
        np.testing.assert_allclose(*vectors, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sampler", ["all", "uniform"])
def test_more_texts_are_merged_into_a_finished_run(
    predict: Predict, tmp_path: Path, dtype: str, sampler: str
) -> None:
    sections: dict[str, Any] = {
        "model": {"dtype": dtype},
        "sniffer": {
            "capture": {
                "capture_token_strings": sampler == "all",
                "sampler": {"type": sampler, "base_rate": 3.0},
                "min_bucket_size": 8,
            }
        },
    }
    data: dict[str, Any] = {"batch_size": 2}
    assert predict("whole", **sections, data=data) == 0
    for max_samples in (2, 4, None):
        assert predict("root", **sections, data=data | {"max_samples": max_samples}) == 0
    assert files_of(tmp_path / "root") == files_of(tmp_path / "whole")
    assert main(["verify", str(tmp_path / "root")]) == 0


def test_merged_files_keep_their_order_over_many_row_groups(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qk_sniffer.storage.parquet.ROW_GROUP_BYTES", 7 * 4 * 16)
    monkeypatch.setattr("qk_sniffer.storage.stored_rows._ROWS_AT_ONCE", 5)
    monkeypatch.setattr("qk_sniffer.storage.journal.SEGMENT_BYTES", 1)
    data: dict[str, Any] = {"batch_size": 2}
    assert predict("whole", data=data) == 0
    assert predict("root", data=data | {"max_samples": 4}) == 0
    assert predict("root", data=data) == 0
    assert pq.read_metadata(tmp_path / "root" / "l00h00q" / "data.parquet").num_row_groups == 27
    assert files_of(tmp_path / "root") == files_of(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict() == 0
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("*.parquet")}
    capsys.readouterr()
    assert predict() == 0
    out = capsys.readouterr().out
    assert "going on after 7 texts" in out
    assert "heads    24" in out
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert not (tmp_path / "root" / ".journal").exists()


def test_what_finalize_wrote_of_an_interrupted_run_is_completed(
    predict: Predict, interrupt: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, data = tmp_path / "root", {"batch_size": 2}
    assert predict("whole", data=data) == 0
    interrupt("root", data=data)
    assert main(["finalize", str(root)]) == 0
    assert json.loads((root / "manifest.json").read_text())["complete"] is False
    assert "this is part of its texts" in (root / "README.md").read_text()
    assert main(["verify", str(root)]) == 0
    assert predict("root", data=data) == 0
    assert files_of(root) == files_of(tmp_path / "whole")
    assert (root / "README.md").read_bytes() == (tmp_path / "whole" / "README.md").read_bytes()


def test_fewer_batches_than_there_are_make_a_part(predict: Predict, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert predict(trainer={"limit_predict_batches": 1}) == 0
    assert json.loads((root / "manifest.json").read_text())["complete"] is False
    assert predict(data={"max_samples": 3}) == 0
    assert json.loads((root / "manifest.json").read_text())["complete"] is True
    assert "part of its texts" not in (root / "README.md").read_text()


def test_a_loader_of_ones_own_may_repeat_what_is_captured(model_dir: ModelDir, tmp_path: Path) -> None:
    batches = [plain_batch([[1, 1, 1], [1, 0, 0]]), plain_batch([[1, 1, 1], [1, 1, 0], [1, 0, 0]])]
    root = tmp_path / "root"
    for some in (batches[:1], batches[1:]):
        loader = DataLoader(some, batch_size=None)
        sniffer = SnifferCallback(OutputConfig(str(root)), ALL)
        trainer(sniffer).predict(
            SnifferModule(str(model_dir("llama"))), loader, return_predictions=False
        )
    table = pq.read_table(root / "l00h00q" / "data.parquet")
    assert table["example_id"].to_pylist() == [0, 0, 0, 1, 2]
    assert table["position"].to_pylist() == [0, 1, 2, 0, 0]
    examples = pq.read_table(root / "examples" / "data.parquet")
    assert examples["example_id"].to_pylist() == [0, 1, 2]
    assert examples["n_tokens"].to_pylist() == [3, 1, 1]


def test_the_line_that_says_how_to_go_on(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root"), overwrite=True), ALL)
    data = TextDataModule(str(text_file), batch_size=2)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(sniffer, FailAt(2, RuntimeError("out of luck"))).predict(
            SnifferModule(str(model_dir("llama"))), datamodule=data
        )
    assert "Go on with the same command with sniffer.output.overwrite: false" in caplog.text


def test_a_journal_in_use_is_refused(
    predict: Predict,
    interrupt: Predict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("qk_sniffer.storage.commits.LOCK_SECONDS", 0.1)
    interrupt()
    capsys.readouterr()
    with locked_journal(tmp_path / "root" / ".journal"):
        assert predict() == 2
        assert "is being written by another process" in error_line(capsys)
        assert main(["finalize", str(tmp_path / "root")]) == 2
    assert predict() == 0


def test_ids_by_row_number_stay_when_rows_are_appended(predict: Predict, tmp_path: Path) -> None:
    rows = [{"text": f"text number {i}"} for i in range(6)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows[:4])
    data: dict[str, Any] = {"path": str(path), "id_column": None, "batch_size": 2}
    assert predict(data=data) == 0
    write_jsonl(path, rows)
    assert predict(data=data) == 0
    examples = pq.read_table(tmp_path / "root" / "examples" / "data.parquet")
    assert examples["example_id"].to_pylist() == list(range(6))
    assert examples["source_id"].to_pylist() == [str(i) for i in range(6)]
