"""A device that runs out of memory in the middle of a forward."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from qk_sniffer.cli import main
from readers import assert_same_moments, assert_same_rows, error_line

Predict = Callable[..., int]


@pytest.fixture
def device_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[tuple[int, int]]]:
    """Give every layer after the second room for some tokens alone; collects what was tried."""

    def limit(n_tokens: int) -> list[tuple[int, int]]:
        tried: list[tuple[int, int]] = []
        forward = LlamaMLP.forward
        calls = 0

        def limited(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if x.shape[0] * x.shape[1] > n_tokens and calls % 4 == 2:
                calls = 0
                tried.append((x.shape[0], x.shape[1]))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(self, x)

        monkeypatch.setattr(LlamaMLP, "forward", limited)
        return tried

    return limit


@pytest.mark.parametrize("data", [{"batch_size": 7}, {"batch_size": 7, "max_tokens_per_batch": 400}])
@pytest.mark.parametrize("passages", [None, 16])
def test_a_batch_that_does_not_fit_is_read_in_halves(
    predict: Predict,
    tmp_path: Path,
    device_of: Callable[[int], list[tuple[int, int]]],
    caplog: pytest.LogCaptureFixture,
    data: dict[str, Any],
    passages: int | None,
) -> None:
    sections = {"model": {"prefill_chunk_size": passages}}
    everything = {f"capture_{name}": True for name in ("values", "outputs", "softmax")}
    moments = {"enabled": True, "by_bucket": True, "pre_rope": True, "cross": True}
    sections["sniffer"] = {"check": False, "capture": everything, "moments": moments}
    assert predict("whole", data=data, **sections) == 0
    tried = device_of(70 if passages is None else 40)
    assert predict("halves", data=data, **sections) == 0
    assert len(tried) >= 2
    assert_same_rows(tmp_path / "halves", tmp_path / "whole")
    assert_same_moments(tmp_path / "halves", tmp_path / "whole", rtol=1e-5)
    assert main(["verify", str(tmp_path / "halves")]) == 0
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    size, width = 6 if "max_tokens_per_batch" in data else 7, 61
    assert (
        f"a batch of {size} x {width} tokens did not fit into the device's memory and is read in "
        f"halves; set data.max_tokens_per_batch below {size * width}"
    ) in "\n".join(warnings)


def test_a_text_that_does_not_fit_ends_the_run_and_it_goes_on(
    predict: Predict,
    tmp_path: Path,
    device_of: Callable[[int], list[tuple[int, int]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = {"batch_size": 1}
    assert predict("whole", data=data) == 0
    with monkeypatch.context() as patch:
        patch.setattr("qk_sniffer.storage.journal.SYNC_SECONDS", 0)
        device_of(50)
        capsys.readouterr()
        assert predict("root", data=data, sniffer={"check": False}) == 2
        line = error_line(capsys)
        monkeypatch.undo()
    assert line.startswith(
        "data.tokenizer.max_length: a text of 61 tokens does not fit into the device's"
    )
    assert "set model.prefill_chunk_size" in line
    assert not (tmp_path / "root" / "manifest.json").exists()
    assert predict("root", data=data) == 0
    examples = pq.read_table(tmp_path / "root" / "examples" / "data.parquet")
    assert examples.num_rows == 7
    assert_same_rows(tmp_path / "root", tmp_path / "whole")
