"""One run in several processes: the same files as in one, and an end for all where one dies."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import PIPE
from types import MappingProxyType
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from conftest import HUB_TOKEN, REPO, write_jsonl
from families import FAMILIES, tiny_model
from killing import AFTER, BEFORE, Death, Ended, Processes, Started
from loopback import Fault, LoopbackHub, environment_of
from readers import assert_same_rows, files_of

LENGTHS = (37, 5, 61, 24, 1, 48, 13)
TEXTS = [
    {"id": f"text-{number}", "text": "".join(chr(97 + (7 * number + i) % 26) for i in range(length))}
    for number, length in enumerate(LENGTHS)
]


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


def run_two_ranks(processes: Processes, command: Sequence[str]) -> None:
    """Run a command of two devices to its end, in two processes as Lightning starts them."""
    port = free_port()
    started = [
        processes.start(command, environment=lightning_variables(rank, 2, port)) for rank in range(2)
    ]
    for process in started:
        ended = process.wait(100)
        assert ended.exitcode == 0, ended.printed


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

    def write_config(self, size: int, **changes: Any) -> Path:
        trainer = {"accelerator": "cpu", "enable_progress_bar": False, "devices": size}
        file = self.directory / "config.yaml"
        file.write_text(yaml.safe_dump(self.config | {"trainer": trainer | changes}))
        return file

    def start(
        self,
        size: int,
        variables: Variables = lightning_variables,
        deaths: Mapping[int, Death] = MappingProxyType({}),
        **changes: Any,
    ) -> list[Started]:
        command, port = ("predict", "--config", str(self.write_config(size, **changes))), free_port()
        return [
            self.processes.start(
                command,
                death=deaths.get(rank),
                environment=variables(rank, size, port) if size > 1 else {},
            )
            for rank in range(size)
        ]

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
                "capture": {
                    "sampler": {"type": "all"},
                    "capture_values": True,
                    "capture_outputs": True,
                    "capture_softmax": True,
                },
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


def many_texts(path: Path) -> Path:
    return write_jsonl(path, [{"text": TEXTS[2]["text"][i % 50 :]} for i in range(500)])


def committed(root: Path, rank: int) -> int:
    log = root / ".journal" / f"rank-{rank:05d}" / "commits.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for(condition: Callable[[], bool], started: list[Started]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert all(process.is_alive() for process in started), [p.printed for p in started]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_stops_the_other_and_the_run_goes_on(
    new_run: NewRun, alone: Alone, tmp_path: Path, killed: int, streaming: bool
) -> None:
    texts = many_texts(tmp_path / "many.jsonl")
    data = {"path": str(texts), "id_column": None, "batch_size": 2, "streaming": streaming}
    data["num_workers"] = 1 if streaming else 0
    run = new_run(**data)
    started = run.start(2)
    wait_for(lambda: all(committed(run.root, rank) >= 20 for rank in range(2)), started)
    started[killed].kill()
    died = time.monotonic()
    ended = started[1 - killed].wait(60)
    assert time.monotonic() - died < 60
    assert ended.exitcode not in (0, None)
    assert f"qk-sniffer: error: rank {killed} (" in ended.printed
    assert "): died; the other processes stop" in ended.printed
    assert "Traceback" not in ended.printed
    assert not (run.root / "manifest.json").exists()
    assert committed(run.root, 1 - killed) < 125
    (resumed,) = run.run(1)
    assert resumed.exitcode == 0, resumed.printed
    assert "going on after" in resumed.printed
    assert_same_rows(run.root, alone(**data))
    if not streaming:
        assert files_of(run.root) == files_of(alone(**data))


@pytest.mark.parametrize("sizes", [(1, 3), (3, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(
    new_run: NewRun, alone: Alone, tmp_path: Path, sizes: tuple[int, int]
) -> None:
    data = {"batch_size": 2, "max_tokens_per_batch": 90}
    run = new_run(**data)
    first, then = sizes
    for ended in run.run(first, limit_predict_batches=1):
        assert ended.exitcode == 0, ended.printed
    assert json.loads((run.root / "manifest.json").read_text())["complete"] is False
    run.succeed(then)
    assert files_of(run.root) == files_of(alone(**data))


def test_more_texts_join_a_finished_run(new_run: NewRun, alone: Alone) -> None:
    run = new_run(max_samples=3)
    run.succeed(2)
    del run.config["data"]["max_samples"]
    run.succeed(3)
    assert files_of(run.root) == files_of(alone())
    run.succeed(2)
    assert files_of(run.root) == files_of(alone())


@pytest.mark.usefixtures("environment")
def test_a_job_of_slurm(new_run: NewRun, alone: Alone) -> None:
    run, port = new_run(batch_size=2), free_port()
    srun = readme_command("srun", run.write_config(1))
    assert srun[:5] == ["srun", "--nodes", "2", "--ntasks-per-node", "8"]
    tasks = [
        subprocess.Popen(srun[5:], env=os.environ | slurm_variables(rank, 2, port), stderr=PIPE)
        for rank in range(2)
    ]
    printed = [task.communicate(timeout=100) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], printed
    assert files_of(run.root) == files_of(alone(batch_size=2))


def test_a_model_that_is_placed_on_each_of_two_nodes(new_run: NewRun, alone: Alone) -> None:
    run = new_run(batch_size=2)
    run.config["model"] = run.config["model"] | {"device_map": "cpu"}
    for ended in run.run(2, slurm_variables, devices=1, num_nodes=2):
        assert ended.exitcode == 0, ended.printed
    assert files_of(run.root) == files_of(alone(batch_size=2))


@pytest.fixture
def nodes(tmp_path: Path) -> Variables:
    """Variables of processes in directories of their own, which stand for the disks of nodes."""
    for rank in range(3):
        (tmp_path / f"node-{rank}").mkdir()

    def variables(rank: int, size: int, port: int) -> dict[str, str]:
        place = {"WORKING_DIRECTORY": str(tmp_path / f"node-{rank}")}
        return lightning_variables(rank, size, port) | place

    return variables


def test_other_texts_on_another_node_are_refused(
    new_run: NewRun, tmp_path: Path, nodes: Variables
) -> None:
    for rank in range(3):
        write_jsonl(tmp_path / f"node-{rank}" / "texts.jsonl", TEXTS[: 5 + (rank == 1)])
    ended = new_run(path="texts.jsonl").run(3, nodes)
    assert [process.exitcode for process in ended] == [2, 2, 2]
    assert "data.path: texts.jsonl or its tokenizer is not the same everywhere: rank 1 found other" in (
        ended[0].printed
    )
    assert "error" not in ended[1].printed + ended[2].printed


def test_another_model_on_another_node_is_refused(
    new_run: NewRun, tmp_path: Path, nodes: Variables, model_dir: Callable[[str], Path]
) -> None:
    for rank in range(3):
        model = tiny_model(FAMILIES["llama"])
        if rank == 2:
            with torch.no_grad():
                next(model.parameters())[0, 0] += 1
        model.save_pretrained(tmp_path / f"node-{rank}" / "model")
    run = new_run(tokenizer={"name": str(model_dir("llama"))})
    run.config["model"] = {"name": "model"}
    ended = run.run(3, nodes)
    assert [process.exitcode for process in ended] == [2, 2, 2]
    assert "error: model.weights: rank 2 and rank 0 differ in model.weights; give all" in (
        ended[0].printed
    )
    assert not (run.root / ".journal").exists()


def test_a_data_root_that_is_not_shared_is_refused(
    new_run: NewRun, tmp_path: Path, nodes: Variables
) -> None:
    run = new_run()
    run.config["sniffer"]["output"]["data_root"] = "root"
    first, second = run.run(2, nodes)
    assert first.exitcode == second.exitcode == 2
    assert "sniffer.output.data_root: what rank 0 (" in first.printed
    assert "writes to root is not seen by rank 1 (" in first.printed
    assert "Traceback" not in first.printed + second.printed
    assert "error" not in second.printed
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mistake_in_the_share_of_one_rank_is_told_once(
    new_run: NewRun, tmp_path: Path, streaming: bool
) -> None:
    rows: list[dict[str, Any]] = [{"text": "good"} for _ in range(8)]
    rows[5]["text"] = None
    texts = write_jsonl(tmp_path / "texts.jsonl", rows)
    ended = new_run(path=str(texts), id_column=None, streaming=streaming).run(2)
    assert all(process.exitcode not in (0, None) for process in ended)
    printed = "".join(process.printed for process in ended)
    assert printed.count("data.text_column: row 5 has None") == 1
    assert "Traceback" not in printed


def test_two_ids_that_collide_over_ranks_are_found(new_run: NewRun, tmp_path: Path) -> None:
    rows = [{"id": number % 7, "text": "text"} for number in range(8)]
    texts = write_jsonl(tmp_path / "texts.jsonl", rows)
    for streaming in (False, True):
        ended = new_run(path=str(texts), streaming=streaming).run(2)
        assert all(process.exitcode not in (0, None) for process in ended)
        assert "data.id_column: the id 0 appears twice" in "".join(p.printed for p in ended)


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        (
            "model",
            {"device_map": "auto"},
            "model.device_map: auto gives one process all devices of its host",
        ),
        ("trainer", {"strategy": "fsdp"}, "trainer"),
        ("trainer", {"precision": "bf16-true"}, "trainer.precision: bf16-true would also cast"),
    ],
)
def test_what_several_processes_can_not_do(
    new_run: NewRun, section: str, changes: dict[str, Any], words: str
) -> None:
    run = new_run()
    trainer = changes if section == "trainer" else {}
    if section == "model":
        run.config["model"] = run.config["model"] | changes
    for ended in run.run(2, **trainer):
        assert ended.exitcode == 2
        assert f"qk-sniffer: error: {words}" in ended.printed
        assert "Traceback" not in ended.printed


@pytest.mark.parametrize(
    ("variables", "name"), [(torchrun_variables, "torchrun"), (slurm_variables, "srun")]
)
def test_a_launcher_that_the_trainer_was_not_told_of(
    new_run: NewRun, variables: Variables, name: str
) -> None:
    for ended in new_run().run(2, variables, devices=1):
        assert ended.exitcode == 2
        assert f"error: trainer.devices: {name} has started 2 processes" in ended.printed
        assert "Traceback" not in ended.printed


def test_the_first_rank_alone_tokenizes_and_prints(new_run: NewRun) -> None:
    run = new_run(max_samples=6, batch_size=3)
    first, second = run.run(2)
    assert "heads    48" in first.printed
    assert second.printed == ""
    assert first.passages["tokenizing"] == 1
    assert second.passages["tokenizing"] == 0
    for ended in run.run(2):
        assert ended.exitcode == 0
        assert ended.passages["tokenizing"] == 0


def test_the_first_rank_alone_logs_what_all_have_read(new_run: NewRun) -> None:
    run = new_run(batch_size=2)
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(run.directory), "name": "logs"}}
    run.succeed(2, logger=logger, log_every_n_steps=1)
    (file,) = (run.directory / "logs").rglob("metrics.csv")
    *_, last = csv.DictReader(file.open())
    manifest = json.loads((run.root / "manifest.json").read_text())
    assert float(last["texts_read"]) == manifest["examples"]["rows"] == len(TEXTS)
    assert float(last["rows_kept"]) == sum(head["rows"] for head in manifest["heads"].values())
    assert float(last["bytes_written"]) > 0


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_told_to_stop_stops_the_other(
    new_run: NewRun, alone: Alone, tmp_path: Path, stopped: int
) -> None:
    data = {"path": str(many_texts(tmp_path / "many.jsonl")), "id_column": None, "batch_size": 2}
    run = new_run(**data)
    started = run.start(2)
    wait_for(lambda: all(committed(run.root, rank) >= 20 for rank in range(2)), started)
    os.kill(started[stopped].process.pid, signal.SIGTERM)
    ended = [process.wait(60) for process in started]
    assert ended[stopped].exitcode == 128 + signal.SIGTERM
    assert ended[1 - stopped].exitcode == 1
    assert f"rank {stopped} (" in ended[1 - stopped].printed
    assert "): stopped by SIGTERM; the other processes stop" in ended[1 - stopped].printed
    assert "Traceback" not in ended[0].printed + ended[1].printed
    assert f"qk-sniffer finalize {run.root}" in ended[0].printed
    run.succeed(2)
    assert files_of(run.root) == files_of(alone(**data))


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize(
    "death",
    [
        Death("row group", BEFORE, 3),
        Death("rename", AFTER, 9),
        Death("flush", AFTER, 2),
        Death("commit", BEFORE, 1),
    ],
    ids=lambda death: death.point,
)
def test_a_death_at_a_fault_point(new_run: NewRun, alone: Alone, killed: int, death: Death) -> None:
    data = {"batch_size": 2}
    run = new_run(**data)
    ended = run.run(2, deaths={killed: death})
    assert ended[killed].exitcode == -signal.SIGKILL
    assert ended[1 - killed].exitcode not in (0, None)
    assert not (run.root / "manifest.json").exists()
    run.succeed(1)
    assert files_of(run.root) == files_of(alone(**data))


README = (Path(__file__).parents[1] / "README.md").read_text()


def readme_command(launcher: str, config: Path, devices: int = 1) -> list[str]:
    """A command line of the README's section on several devices, for this machine and this config."""
    section = README.split("## More than one GPU")[1].split("```sh\n")[1].split("```")[0]
    lines = section.replace("\\\n", " ").splitlines()
    words = next(line for line in lines if line.startswith(launcher)).split()
    changed = {
        "--config": str(config),
        "--trainer.devices": str(devices),
        "--nproc-per-node": str(devices),
        "--rdzv-endpoint": f"127.0.0.1:{free_port()}",
    }
    words = [changed.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    scripts = Path(sys.executable).parent
    return [str(scripts / word) if (scripts / word).exists() else word for word in words]


@pytest.fixture
def environment(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands in processes of their own need here."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(processes.directory / "datasets"))
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.mark.usefixtures("environment")
def test_the_launcher_of_lightning(new_run: NewRun, alone: Alone) -> None:
    run = new_run(batch_size=2)
    command = readme_command("qk-sniffer", run.write_config(2), devices=2)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("heads    48") == 1
    assert ended.stderr == ""
    assert files_of(run.root) == files_of(alone(batch_size=2))


@pytest.mark.usefixtures("environment")
def test_torchrun_over_two_nodes(new_run: NewRun, alone: Alone) -> None:
    run = new_run(batch_size=2)
    command = readme_command("torchrun", run.write_config(1))
    agents = [subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) for _ in range(2)]
    printed = [agent.communicate(timeout=100) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert sum(out.count("heads    48") for out, _ in printed) == 1
    assert files_of(run.root) == files_of(alone(batch_size=2))


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("strategy", ["ddp_notebook", "ddp_spawn"])
def test_a_notebook(
    new_run: NewRun, alone: Alone, model_dir: Callable[[str], Path], tmp_path: Path, strategy: str
) -> None:
    run = new_run(batch_size=2)
    script = tmp_path / "notebook.py"
    script.write_text(f"""
import lightning.pytorch as pl
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.config import CaptureConfig, OutputConfig, SamplerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.module import SnifferModule

if __name__ == "__main__":
    capture = {{"sampler": SamplerConfig(type="all")}}
    capture |= dict.fromkeys(["capture_values", "capture_outputs", "capture_softmax"], True)
    sniffer = SnifferCallback(OutputConfig({str(run.root)!r}), CaptureConfig(**capture))
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy={strategy!r}, logger=False, callbacks=[sniffer]
    )
    dm = TextDataModule({run.config["data"]["path"]!r}, id_column="id", batch_size=2)
    module = SnifferModule({str(model_dir("llama"))!r})
    trainer.predict(module, datamodule=dm, return_predictions=False)
""")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert files_of(run.root) == files_of(alone(batch_size=2))


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("killed", ["launcher", "launched"])
def test_nothing_of_a_killed_launch_is_left_running(
    new_run: NewRun, alone: Alone, tmp_path: Path, killed: str
) -> None:
    data = {"path": str(many_texts(tmp_path / "many.jsonl")), "id_column": None, "batch_size": 2}
    run = new_run(**data)
    command = readme_command("qk-sniffer", run.write_config(2), devices=2)
    with subprocess.Popen(command, stderr=PIPE, text=True, process_group=0) as process:
        try:
            deadline = time.monotonic() + 100
            while not all(committed(run.root, rank) for rank in range(2)):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            child = int(children.split()[0])
            os.kill(process.pid if killed == "launcher" else child, signal.SIGKILL)
            # The pipe closes with the last process that has it.
            _, printed = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert f"rank {0 if killed == 'launcher' else 1} (" in printed
    run.succeed(1)
    assert files_of(run.root) == files_of(alone(**data))


def test_the_first_process_pulls_and_pushes_for_all(
    hub: LoopbackHub, new_run: NewRun, alone: Alone, tmp_path: Path
) -> None:
    output = {"hf_repo_id": REPO, "hf_branch": "branch"}

    def variables(rank: int, size: int, port: int) -> dict[str, str]:
        # The other has no token, and needs none.
        token = HUB_TOKEN if rank == 0 else None
        cache = tmp_path / f"cache-{rank}"
        return lightning_variables(rank, size, port) | environment_of(hub, token, cache)

    new_run(output=output, max_samples=3).succeed(2, variables)
    run = new_run(output=output)
    run.succeed(2, variables)
    assert_same_rows(run.root, alone())
    there = hub.files(REPO, "branch")
    for path in run.root.rglob("*.parquet"):
        assert there[str(path.relative_to(run.root))] == path.read_bytes()
    hub.fail(Fault("POST", "/commit/", status=403))
    more = new_run(output=output | {"hf_branch": "other"})
    first, second = more.run(2, variables)
    assert (first.exitcode, second.exitcode) == (2, 0)
    assert f"`qk-sniffer push {more.root}`" in first.printed


def test_all_processes_end_where_the_hub_refuses(
    hub: LoopbackHub, new_run: NewRun, tmp_path: Path
) -> None:
    def variables(rank: int, size: int, port: int) -> dict[str, str]:
        cache = tmp_path / f"cache-{rank}"
        return lightning_variables(rank, size, port) | environment_of(hub, None, cache)

    first, second = new_run(output={"hf_repo_id": REPO}).run(2, variables)
    assert (first.exitcode, second.exitcode) == (2, 2)
    line = first.printed.splitlines()[-1]
    assert line.startswith("qk-sniffer: error: sniffer.output.hf_repo_id: there is no token")
    assert "error" not in second.printed
