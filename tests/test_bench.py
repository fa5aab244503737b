"""The benchmark for a GPU runs on any device, so that a machine that is lent loses no time to it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, stand_in
from families import FAMILIES
from qk_sniffer.config import MomentsConfig


def test_every_kind_of_case_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    config = FAMILIES["llama"]
    captures = {
        name: (gpu.capture_config(name, 16, n_heads), goal)
        for name, n_heads, goal in (("uniform", 5, 1.1), ("all", None, gpu.WITH_DISK))
    }
    moments = {"moments": (MomentsConfig(enabled=True), 1.1)}
    case = gpu.Case("tiny", config, 5, 32, 2, captures, has_peer=True, moments=moments)
    lines = gpu.time_cases([case], torch.device("cpu"), 1)
    assert capsys.readouterr().out.splitlines() == lines
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0].rpartition(", ")[2] for row in cells[:3]] == ["uniform", "all", "moments"]
    assert "8 of them" in cells[3][0] and len(cells) == 4
    for row in cells:
        assert float(row[1]) > 0
    for row in cells[:3]:
        assert all(float(cell) > 0 for cell in row[3].split(","))
        assert all(float(cell) > 0 for cell in row[4:7])


def test_what_stands_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    captures = {
        name: (gpu.capture_config(name, 16), goal)
        for name, goal in (("log_uniform", 1.1), ("all", gpu.WITH_DISK))
    }
    case = gpu.Case("tiny", FAMILIES["llama"], 4, 64, 2, captures)
    lines = stand_in.time_hosts([case], 3)
    assert capsys.readouterr().out.splitlines() == lines
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in cells] == ["tiny, 2 x 64, log_uniform", "tiny, 2 x 64, all"]
    assert [bool(cell) for cell in cells[0]] == [True] * 5 + [False] * 2
    assert [bool(cell) for cell in cells[1]] == [True] * 3 + [False] * 2 + [True] * 2
    assert all(float(cell) > 0 for cell in cells[1][5:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "bench", "--only", "gpu"]
    ended = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ended.returncode == 0
    assert "This machine has no CUDA device." in ended.stdout
