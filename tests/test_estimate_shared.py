"""What ``estimate`` says of processes that share a model, against such processes."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conftest import WriteRun, byte_tokenizer
from qk_sniffer.capture import ModelShard
from qk_sniffer.cli import main
from qk_sniffer.models import (
    ModelSource,
    SharedModel,
    attention_geometry,
    decoder_backbone,
    forward_footprint,
    load_model,
    load_skeleton,
    local_weights,
    model_share,
    plan_of,
)
from readers import error_line
from smollm2 import CHECKPOINT
from tiny import tiny_causal_lm


def weigh_loaded(number: int, name: str, store: str, results: Any) -> None:
    """Load one of two shares of a model for real, and tell the bytes of its weights."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=100)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=2, timeout=patience
    )
    source = ModelSource(name)
    skeleton = load_skeleton(source)
    layers = attention_geometry(decoder_backbone(skeleton)).layers
    shared = SharedModel(ModelShard(number, 2), torch.device("cpu"), plan_of(skeleton), layers)
    model = load_model(source, dtype="bfloat16", shared=shared)
    results.put((number, sum(weight.nbytes for weight in local_weights(model))))
    dist.destroy_process_group()


def loaded_bytes(name: str, directory: Path) -> list[int]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = name, str(directory / "store"), results
    processes = [context.Process(target=weigh_loaded, args=(n, *arguments)) for n in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=150) for _ in processes)
    for process in processes:
        process.join()
    return [found[number] for number in range(2)]


def told_bytes(name: str) -> list[int]:
    skeleton = load_skeleton(ModelSource(name), dtype="bfloat16")
    layers = attention_geometry(decoder_backbone(skeleton)).layers
    told = []
    for number in range(2):
        with model_share(skeleton, ModelShard(number, 2), layers) as share:
            told.append(sum(weight.nbytes for weight in local_weights(share)))
    return told


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_weights_of_a_share_are_those_that_are_loaded(name: str, tmp_path: Path) -> None:
    tiny_causal_lm(name).save_pretrained(tmp_path / name)
    told = told_bytes(str(tmp_path / name))
    assert told == loaded_bytes(str(tmp_path / name), tmp_path)


@pytest.mark.skipif(not CHECKPOINT.exists(), reason="`make weights` brings the checkpoint")
def test_weights_of_smollm2_are_shared_as_its_heads_are(tmp_path: Path) -> None:
    told = told_bytes(str(CHECKPOINT))
    assert [round(n_bytes / 2**20, 1) for n_bytes in told] == [136.8, 145.2]
    assert told == loaded_bytes(str(CHECKPOINT), tmp_path)


def test_activations_of_a_share_are_those_of_its_heads_and_of_its_part_of_the_mlp(
    model_dir: Callable[[str], Path],
) -> None:
    skeleton = load_skeleton(ModelSource(str(model_dir("llama"))), dtype="bfloat16")
    backbone = decoder_backbone(skeleton)
    layers = attention_geometry(backbone).layers
    whole = forward_footprint(backbone, 1, 512)
    with model_share(skeleton, ModelShard(0, 2), layers) as share:
        part = forward_footprint(decoder_backbone(share), 1, 512)
    hidden = 512 * skeleton.config.hidden_size * 2
    assert whole.n_bytes / 2 < part.n_bytes <= whole.n_bytes - hidden
    assert not any(
        weight.shape != full.shape
        for weight, full in zip(
            skeleton.parameters(),
            load_skeleton(ModelSource(str(model_dir("llama")))).parameters(),
            strict=True,
        )
    )


MOMENTS = {"capture": {"sampler": {"type": "uniform"}}, "moments": {"enabled": True, "cross": True}}


def estimated(capsys: pytest.CaptureFixture[str], run: list[str]) -> str:
    capsys.readouterr()
    assert main(["estimate", *run[1:]]) == 0
    return " ".join(capsys.readouterr().out.split())


def size_before(text: str, words: str) -> float:
    found = re.search(rf"([\d.,]+) (B|KB|MB|GB) {words}", text)
    assert found is not None, text
    return float(found[1].replace(",", "")) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[found[2]]


def test_a_share_of_everything_is_told(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    alone = estimated(capsys, write_run(sniffer=MOMENTS, trainer={"devices": 4}))
    run = write_run(model={"tensor_parallel": 2}, sniffer=MOMENTS, trainer={"devices": 4})
    text = estimated(capsys, run)
    assert "that 2 share, beside activations" in text
    assert "attention is whole" not in text
    weights = size_before(alone, "weights of each process")
    assert size_before(text, "weights of a process, at most") == pytest.approx(weights / 2, rel=0.05)
    # Four processes that have a file and its successor, and two pairs with three files of a half each.
    words = "moments in the journal, of 4 processes"
    assert size_before(text, words) == pytest.approx(size_before(alone, words) / 8 * 6, rel=0.03)
    saved = "on its host, at most: moments while they are saved"
    assert size_before(text, saved) == pytest.approx(size_before(alone, saved) / 2, rel=0.03)
    assert size_before(text, "moments/") == size_before(alone, "moments/")
    assert "--time would need a process that has all of the model" in text


def test_attention_that_each_process_has_whole_is_told(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_causal_lm("deepseek_v3").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = {"name": str(tmp_path / "model"), "tensor_parallel": 2}
    text = estimated(capsys, write_run(model=model, trainer={"devices": 2}))
    assert "attention is whole in each: the plan of transformers does not share it" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--time"], "model.tensor_parallel: --time reads with a model that one process has"),
        (["--trainer.devices=3"], "model.tensor_parallel: 2 processes share a model"),
        (["--model.tensor_parallel=5", "--trainer.devices=5"], "model.tensor_parallel: "),
    ],
)
def test_what_predict_refuses_and_a_time_are_refused(
    write_run: WriteRun, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    run = write_run(model={"tensor_parallel": 2}, trainer={"devices": 2})
    assert main(["estimate", *run[1:], *args]) == 2
    assert error_line(capsys).startswith(words)


WEIGHING = """
import json, os, sys
from pathlib import Path
from qk_sniffer.cli import main
from qk_sniffer.recording import own_data_root

finalize = own_data_root.finalize

def weigh(data_root, *args, **kwargs):
    if os.environ.get("LOCAL_RANK", "0") == "0":
        files = (data_root / ".journal").glob("rank-*/*")
        sizes = {str(file.relative_to(data_root)): file.stat().st_size for file in files}
        Path(__file__).with_suffix(".json").write_text(json.dumps(sizes))
    return finalize(data_root, *args, **kwargs)

own_data_root.finalize = weigh
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
"""The command line, which notes the files of the journal before it makes others of them."""


def test_the_journal_of_a_shared_run_is_as_estimated(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = {"sampler": {"type": "all"}, "capture_queries": False}
    sniffer = {"capture": capture, "moments": {"enabled": True, "pre_rope": True}}
    model = {"tensor_parallel": 2, "dtype": "bfloat16"}
    run = write_run(model=model, sniffer=sniffer, trainer={"devices": 2})
    text = estimated(capsys, run)
    script = tmp_path / "weighing.py"
    script.write_text(WEIGHING)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, *run], check=True, env=environment, timeout=200)
    sizes = json.loads((tmp_path / "weighing.json").read_text())
    rows = sum(size for name, size in sizes.items() if "segment-" in name)
    # Narrow keys alone, so that the numbers of their rows count.
    assert size_before(text, "journal, in bfloat16") == pytest.approx(rows, rel=0.1)
    states = [size for name, size in sizes.items() if "moments-" in name]
    parts = {name.split("/")[1] for name in sizes}
    assert parts == {"rank-00000-tp2", "rank-00001-tp2"} and len(states) in (2, 4)
    told = size_before(text, "moments in the journal, of 2 processes")
    assert told == pytest.approx(3 * sum(states) / (len(states) / 2), rel=0.15)
