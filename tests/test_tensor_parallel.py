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
import pytest
from transformers import AutoModelForCausalLM

from conftest import Run as Predict
from conftest import byte_tokenizer, write_jsonl
from families import FAMILIES, UNEVEN, tiny_model
from killing import Processes
from qk_sniffer.cli import main
from qk_sniffer.errors import UserError
from qk_sniffer.module import SnifferModule
from readers import assert_same_moments, assert_same_rows, error_line
from test_ranks import (
    TEXTS,
    Run,
    Variables,
    environment,  # noqa: F401
    readme_command,
    slurm_variables,
    torchrun_variables,
)
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
    "all that a row can have": Case(
        "llama", {"type": "all"}, EVERYTHING | {"capture_token_strings": True}
    ),
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
    "a key head in one process, and its query head in another": Case(
        "uneven", {"type": "all"}, EVERYTHING | {"heads": [5]}, MOMENTS
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


def two_nodes_of_torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun gives to its workers on two nodes with as many of them each."""
    local = {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": str(rank // 2)}
    return torchrun_variables(rank, size, port) | local | {"NODE_RANK": str(rank // 2)}


def one_node_of_slurm(rank: int, size: int, port: int) -> dict[str, str]:
    """What srun gives to the tasks of a job on one node."""
    tasks = {"SLURM_NTASKS_PER_NODE": str(size), "SLURM_NNODES": "1", "SLURM_NODELIST": "node1"}
    places = {"SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
    return slurm_variables(rank, size, port) | tasks | places


PLAIN = "all that a row can have"


@pytest.mark.parametrize(
    ("variables", "size", "trainer"),
    [
        (two_nodes_of_torchrun, 4, {"devices": 2, "num_nodes": 2}),
        (one_node_of_slurm, 2, {"devices": 2}),
    ],
    ids=["torchrun on two nodes", "srun"],
)
def test_other_launchers(
    new_run: NewRun, alone: Alone, variables: Variables, size: int, trainer: dict[str, int]
) -> None:
    run = shared(new_run(CASES[PLAIN]), 2)
    run.succeed(size, variables, **trainer)
    assert_same_capture(run.root, alone(PLAIN))


@pytest.mark.usefixtures("environment")
def test_the_launcher_of_lightning(new_run: NewRun, alone: Alone) -> None:
    run = shared(new_run(CASES[PLAIN]), 2)
    command = readme_command("qk-sniffer", run.write_config(2), devices=2)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("heads    48") == 1
    assert ended.stderr == ""
    assert_same_capture(run.root, alone(PLAIN))
    assert main(["verify", str(run.root)]) == 0


@pytest.mark.usefixtures("environment")
def test_a_notebook_with_a_loader_of_ones_own(alone: Alone, new_run: NewRun, tmp_path: Path) -> None:
    run = new_run(CASES[PLAIN])
    script = tmp_path / "notebook.py"
    script.write_text(f"""
import lightning.pytorch as pl
import torch
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.config import CaptureConfig, OutputConfig, SamplerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.module import SnifferModule

def predict(root, **texts):
    capture = dict.fromkeys(["capture_values", "capture_outputs", "capture_softmax"], True)
    capture |= {{"sampler": SamplerConfig("all"), "min_bucket_size": 16}}
    capture["capture_token_strings"] = "datamodule" in texts
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_notebook",
        logger=False,
        enable_progress_bar=False,
        callbacks=[SnifferCallback(OutputConfig(root), CaptureConfig(**capture))],
    )
    module = SnifferModule({run.config["model"]["name"]!r}, dtype="float32", tensor_parallel=2)
    trainer.predict(module, **texts, return_predictions=False)

class Uneven(torch.utils.data.IterableDataset):
    def __iter__(self):
        for number in range(3 - torch.distributed.get_rank()):
            yield {{"input_ids": torch.arange(3, 9), "example_ids": number}}

if __name__ == "__main__":
    rows = [{{"input_ids": torch.arange(3, 9), "example_ids": number}} for number in range(4)]
    for texts in rows, Uneven():
        try:
            predict({str(tmp_path / "refused")!r}, dataloaders=torch.utils.data.DataLoader(texts))
        except Exception as error:
            print(error)
    texts = TextDataModule({run.config["data"]["path"]!r}, id_column="id", batch_size=2)
    predict({str(run.root)!r}, datamodule=texts)
""")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    message = "model.tensor_parallel: the loader gives the 2 processes that share a model different"
    assert ended.stdout.count(message) == 2
    assert not (tmp_path / "refused" / "manifest.json").exists()
    assert_same_rows(run.root, alone(PLAIN))


@pytest.mark.parametrize(
    ("family", "size", "count", "words"),
    [
        ("llama", 1, 2, "2 processes share a model, and the trainer has 1 on each host; set"),
        ("llama", 3, 2, "2 processes share a model, and the trainer has 3 on each host; set"),
        ("bloom", 2, 2, "transformers has no plan by which processes share BloomForCausalLM"),
    ],
)
def test_a_run_that_is_refused(new_run: NewRun, family: str, size: int, count: int, words: str) -> None:
    run = shared(new_run(Case(family, {"type": "all"})), count)
    ended = run.run(size)
    assert [process.exitcode for process in ended] == [2] * size
    # As with all settings of a trainer, each process that a launcher has begun says it by itself.
    for process in ended:
        assert process.printed.count("\n") == 1
        assert process.printed.startswith("qk-sniffer: error: model.tensor_parallel: ")
        assert words in process.printed
    assert not run.root.exists() or not list(run.root.iterdir())


@pytest.mark.parametrize(
    ("family", "count", "settings", "words"),
    [
        (
            "llama",
            2,
            {"quantization": {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}},
            "model.quantization: processes that share a model can't use it",
        ),
        ("llama", 2, {"device_map": "auto"}, "model.device_map: auto gives one process all devices"),
        ("llama", 5, {}, "has 4 query heads, too few for 5 processes; set it to 4 or less"),
        ("gpt_neox", 3, {}, "3 processes can't share the 4 key heads of"),
        ("hrm_text", 2, {}, "the plan by which transformers shares HrmTextForCausalLM"),
        ("opt", 2, {}, "transformers has no plan by which processes share OPTForCausalLM"),
    ],
)
def test_what_can_not_be_shared(
    model_of: Callable[[str], Path], family: str, count: int, settings: dict[str, Any], words: str
) -> None:
    module = SnifferModule(str(model_of(family)), tensor_parallel=count, **settings)
    trainer = pl.Trainer(accelerator="cpu", devices=count, logger=False, barebones=True)
    with pytest.raises(UserError) as error:
        module.check_trainer(trainer)
    assert words in str(error.value)


def test_an_adapter_can_not_be_shared(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(model_of("llama"))
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    module = SnifferModule(str(tmp_path), tensor_parallel=2)
    trainer = pl.Trainer(accelerator="cpu", devices=2, logger=False, barebones=True)
    with pytest.raises(UserError, match=r"model\.adapter: processes that share a model can't use it"):
        module.check_trainer(trainer)


def test_no_process_at_all(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(model={"tensor_parallel": 0}) == 2
    assert error_line(capsys) == "model.tensor_parallel: must be at least 1, got 0"
