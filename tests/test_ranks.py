"""One run in several processes: the same files as in one, and an end for all where one dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from conftest import write_jsonl
from killing import Ended, Processes, Started
from qk_sniffer.cli import main
from qk_sniffer.storage.journal import SYNC_SECONDS
from readers import files_of

LENGTHS = (37, 5, 61, 24, 1, 48, 13)
TEXTS = [
    {"id": f"text-{number}", "text": "".join(chr(97 + (7 * number + i) % 26) for i in range(length))}
    for number, length in enumerate(LENGTHS)
]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    return Processes(tmp_path_factory.mktemp("processes"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def lightning_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What Lightning gives to the processes that it launches."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
    }


def torchrun_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun gives to its workers."""
    return lightning_variables(rank, size, port) | {
        "RANK": str(rank),
        "GROUP_RANK": "0",
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_RUN_ID": "none",
    }


def slurm_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What srun gives to the tasks of a job with one task on each node."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "capture",
        "SLURM_NTASKS": str(size),
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": str(size),
        "SLURM_NODELIST": f"node[1-{size}]",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
    }


Variables = Callable[[int, int, int], dict[str, str]]


class Run:
    """A prediction by as many processes as one likes, into one data root."""

    def __init__(self, processes: Processes, directory: Path, config: Mapping[str, Any]) -> None:
        self.processes = processes
        self.directory = directory
        self.root = directory / "root"
        self.config = dict(config)

    def start(
        self, size: int, variables: Variables = lightning_variables, **changes: Any
    ) -> list[Started]:
        trainer = {"accelerator": "cpu", "enable_progress_bar": False, "devices": size}
        config = self.config | {"trainer": trainer | changes}
        file = self.directory / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        port = free_port()
        command = ("predict", "--config", str(file))
        environments = [variables(rank, size, port) if size > 1 else {} for rank in range(size)]
        return [self.processes.start(command, environment=e) for e in environments]

    def run(self, size: int, variables: Variables = lightning_variables, **changes: Any) -> list[Ended]:
        return [started.wait(100) for started in self.start(size, variables, **changes)]

    def succeed(self, size: int, variables: Variables = lightning_variables, **changes: Any) -> None:
        for ended in self.run(size, variables, **changes):
            assert ended.exitcode == 0, ended.printed


NewRun = Callable[..., Run]


@pytest.fixture(scope="module")
def new_run(
    processes: Processes,
    model_dir: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> NewRun:
    """A run of the tiny Llama over the texts above, with some fields of its data section changed."""
    texts = write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", TEXTS)

    def new(*, output: Mapping[str, Any] | None = None, **data: Any) -> Run:
        directory = tmp_path_factory.mktemp("run")
        config = {
            "model": {"name": str(model_dir("llama"))},
            "data": {"path": str(texts), "id_column": "id"} | data,
            "sniffer": {
                "capture": {"sampler": {"type": "all"}},
                "output": {"data_root": str(directory / "root")} | dict(output or {}),
            },
        }
        return Run(processes, directory, config)

    return new


@pytest.fixture(scope="module")
def alone(new_run: NewRun) -> Callable[..., Path]:
    """The data root of one process, for each variant of the data section."""
    made: dict[str, Path] = {}

    def of(**data: Any) -> Path:
        key = json.dumps(data, sort_keys=True)
        if key not in made:
            run = new_run(**data)
            run.succeed(1)
            made[key] = run.root
        return made[key]

    return of


Alone = Callable[..., Path]


def assert_same_rows(root: Path, other: Path) -> None:
    """The same rows in the same order; vectors to the last bits of a model that batches otherwise."""
    names = sorted(path.parent.name for path in other.glob("*/data.parquet"))
    assert names == sorted(path.parent.name for path in root.glob("*/data.parquet"))
    for name in names:
        mine, theirs = (pq.read_table(place / name / "data.parquet") for place in (root, other))
        if name != "examples":
            vectors = [
                np.stack(table["vector"].to_numpy(zero_copy_only=False)) for table in (mine, theirs)
            ]
            np.testing.assert_allclose(*vectors, atol=1e-5, rtol=0)
            mine, theirs = mine.drop_columns("vector"), theirs.drop_columns("vector")
        assert mine.equals(theirs), name


VARIANTS = [
    {"batch_size": batch_size, "max_tokens_per_batch": budget, "streaming": streaming}
    for batch_size in (1, 4)
    for budget in (None, 80)
    for streaming in (False, True)
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("size", "variables"), [(2, lightning_variables), (3, torchrun_variables)], ids=["2", "3"]
)
def test_several_processes_make_the_files_of_one(
    new_run: NewRun, alone: Alone, variant: dict[str, Any], size: int, variables: Variables
) -> None:
    run = new_run(**variant)
    run.succeed(size, variables)
    assert files_of(run.root) == files_of(alone(**variant))
    assert json.loads((run.root / "manifest.json").read_text())["complete"] is True
    assert not (run.root / ".journal").exists()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_batches_change_nothing_but_last_bits(alone: Alone, variant: dict[str, Any]) -> None:
    assert_same_rows(alone(**variant), alone(**VARIANTS[0]))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("max_samples", [1, 2, 3, 4])
def test_fewer_texts_than_processes_or_as_many(
    new_run: NewRun, alone: Alone, max_samples: int, streaming: bool
) -> None:
    data = {"max_samples": max_samples, "streaming": streaming, "id_column": None}
    run = new_run(**data)
    run.succeed(3)
    assert files_of(run.root) == files_of(alone(**data))
    examples = pq.read_table(run.root / "examples" / "data.parquet")
    assert examples["example_id"].to_pylist() == list(range(max_samples))
