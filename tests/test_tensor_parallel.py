"""Processes that share a model: the files of one process, under every launcher, or one line."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow.parquet as pq
import pytest

from conftest import byte_tokenizer, write_jsonl
from conftest import Run as Predict
from families import FAMILIES, UNEVEN, tiny_model
from killing import Ended, Processes
from qk_sniffer.errors import UserError
from qk_sniffer.module import SnifferModule
from readers import assert_same_moments, assert_same_rows, error_line
from test_ranks import (
    TEXTS,
    Run,
    Variables,
    free_port,
    lightning_variables,
    readme_command,
    slurm_variables,
    torchrun_variables,
)
from test_ranks import environment  # noqa: F401
from tiny import tiny_causal_lm

EVERYTHING = {"capture_values": True, "capture_outputs": True, "capture_softmax": True}
MOMENTS = {"enabled": True, "by_bucket": True, "pre_rope": True, "cross": True}
GENERATE = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        family: Of its model.
        sampler, capture, moments, data, model: What its config has beside the defaults.
    """

    family: str
    sampler: Mapping[str, Any]
    capture: Mapping[str, Any] = field(default_factory=dict)
    moments: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "all that a row can have": Case("llama", {"type": "all"}, EVERYTHING | {"capture_token_strings": True}),
    "moments of all kinds, before RoPE": Case(
        "qwen3",
        {"type": "uniform", "base_rate": 3.0},
        EVERYTHING | {"capture_pre_rope": True},
        MOMENTS,
        {"max_tokens_per_batch": 80},
    ),
    "a stream and windows, some heads by chance": Case(
        "gemma3",
        {"type": "log_uniform", "base_rate": 4.0},
        {"head_sampling": {"count": 5, "seed": 2}, "capture_values": True},
        {"enabled": True},
        {"streaming": True, "num_workers": 1},
    ),
    "one head, in passages": Case(
        "mixtral",
        {"type": "positions", "positions": [0, 3, 20]},
        EVERYTHING | {"heads": [0]},
        MOMENTS | {"by_bucket": False},
        model={"prefill_chunk_size": 8},
    ),
    "attention whole in each": Case(
        "deepseek_v3", {"type": "uniform", "base_rate": 5.0}, EVERYTHING, MOMENTS | {"pre_rope": False}
    ),
    "uneven shares, continued texts": Case(
        "uneven",
        {"type": "all"},
        EVERYTHING | {"capture_token_strings": True},
        MOMENTS,
        model={"generate": GENERATE},
    ),
    "moments alone": Case(
        "uneven", {"type": "none"}, {"capture_values": True, "capture_outputs": True}, MOMENTS
    ),
}


@pytest.fixture(scope="module")
def model_of(
    model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Directory of a model with a tokenizer: of one of the families, the uneven one, or another."""
    made: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family in FAMILIES:
            return model_dir(family)
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            model = tiny_model(UNEVEN) if family == "uneven" else tiny_causal_lm(family)
            model.save_pretrained(made[family])
            byte_tokenizer().save_pretrained(made[family])
        return made[family]

    return directory


NewRun = Callable[[Case], Run]


@pytest.fixture(scope="module")
def new_run(
    processes: Processes, model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> NewRun:
    """A run of a case; ``model`` of its config takes the number of processes that share a model."""
    texts = write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", TEXTS)

    def new(case: Case) -> Run:
        directory = tmp_path_factory.mktemp("run")
        config = {
            "model": {"name": str(model_of(case.family)), "dtype": "float32"} | dict(case.model),
            "data": {"path": str(texts), "id_column": "id", "batch_size": 2} | dict(case.data),
            "sniffer": {
                "capture": {"sampler": dict(case.sampler), "min_bucket_size": 16} | dict(case.capture),
                "moments": dict(case.moments),
                "output": {"data_root": str(directory / "root")},
            },
        }
        return Run(processes, directory, deepcopy(config))

    return new


@pytest.fixture(scope="module")
def alone(new_run: NewRun) -> Callable[[str], Path]:
    """The data root of one process, by the name of its case."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            run = new_run(CASES[name])
            run.succeed(1)
            made[name] = run.root
        return made[name]

    return of


Alone = Callable[[str], Path]


def shared(run: Run, count: int) -> Run:
    """The same run by groups of so many processes."""
    run.config["model"] = run.config["model"] | {"tensor_parallel": count}
    return run


def assert_same_capture(root: Path, other: Path) -> None:
    """Two data roots with the same rows, moments and manifest, but for what sums round off."""
    assert_same_rows(root, other)
    assert_same_moments(root, other, rtol=1e-4)
    assert (root / "moments").exists() == (other / "moments").exists()
    mine, theirs = facts_of(root), facts_of(other)
    mine["settings"]["model"].pop("tensor_parallel", None)
    assert mine == theirs


def facts_of(root: Path) -> Any:
    """The manifest, but for the sizes and checksums of files, in which last bits may differ."""

    def without_bytes(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: without_bytes(v) for k, v in value.items() if k not in ("bytes", "xxh3_128")}

    return without_bytes(manifest_of(root))


def manifest_of(root: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((root / "manifest.json").read_text())
    return manifest


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_the_files_of_one_process(new_run: NewRun, alone: Alone, name: str, size: int) -> None:
    run = shared(new_run(CASES[name]), 2)
    run.succeed(size)
    assert_same_capture(run.root, alone(name))
    assert manifest_of(run.root)["complete"] is True
    assert not (run.root / ".journal").exists()
