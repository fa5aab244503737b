"""A run of the sampler none keeps no rows, for moments alone: no files of heads, and all else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoModelForCausalLM

from conftest import LENGTHS, REPO, write_jsonl
from killing import Processes
from loopback import LoopbackHub
from qk_sniffer import Captures, sniff
from qk_sniffer.cli import main
from qk_sniffer.errors import UserError
from readers import error_line
from test_estimate import Say, bytes_before, say  # noqa: F401
from test_hub import output
from test_ranks import run_two_ranks
from test_resume import interrupt  # noqa: F401

Predict = Callable[..., int]
ModelDir = Callable[[str], Path]
NONE: dict[str, Any] = {
    "capture": {"sampler": {"type": "none"}, "min_bucket_size": 4},
    "moments": {"enabled": True},
}


def heads_of(root: Path) -> list[Path]:
    """Files and directories of heads."""
    return [*root.glob("l*h*")]


def read_manifest(root: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((root / "manifest.json").read_text())
    return manifest


def n_texts(root: Path) -> int:
    return pq.read_table(root / "examples" / "data.parquet").num_rows


def test_a_run_writes_all_but_heads(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(sniffer=NONE) == 0
    root, ended = tmp_path / "root", capsys.readouterr()
    assert heads_of(root) == []
    table = pq.read_table(root / "examples" / "data.parquet")
    assert sorted(table["n_tokens"].to_pylist()) == sorted(LENGTHS)
    manifest = read_manifest(root)
    assert (manifest["complete"], manifest["heads"], manifest["buckets"]) == (True, {}, {})
    streams = {(s["layer_idx"], s["kind"]): (s["heads"], s["head_dim"]) for s in manifest["streams"]}
    kinds = {"q": ([0, 1, 2, 3], 16), "k": ([0, 1], 16)}
    assert streams == {(layer, kind): kinds[kind] for layer in range(4) for kind in "qk"}
    assert "heads    24\nrows     0\n" in ended.out and "no rows were kept" not in ended.out
    assert "expected to keep less than one row" not in ended.err
    assert main(["verify", str(root), "--against-model"]) == 0
    assert capsys.readouterr().out == f"{root}: all is well, 24 heads, 0 rows\n"


@pytest.mark.parametrize("by_bucket", [False, True])
def test_moments_are_those_of_a_run_with_rows(
    predict: Predict, tmp_path: Path, by_bucket: bool
) -> None:
    moments = {"enabled": True, "by_bucket": by_bucket, "cross": True}
    with_rows = {"sampler": {"type": "log_uniform"}, "min_bucket_size": 4}
    assert predict("none", sniffer=NONE | {"moments": moments}) == 0
    assert predict("rows", sniffer={"capture": with_rows, "moments": moments}) == 0
    assert heads_of(tmp_path / "none") == [] and len(heads_of(tmp_path / "rows")) == 24
    for name in ("q", "k", "texts"):
        tables = [
            pq.read_table(tmp_path / run / "moments" / f"{name}.parquet") for run in ("none", "rows")
        ]
        assert tables[0].num_rows > 0 and tables[0].equals(tables[1])


def test_the_card_tells_that_there_are_moments_alone(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(sniffer=NONE) == 0
    root = tmp_path / "root"
    card = (root / "README.md").read_text()
    assert "# Moments of queries and keys of " in card
    assert "- positions: no rows are kept of any, for moments alone, buckets from 4\n" in card
    assert "- 16 query heads and 8 key heads, in 4 layers\n" in card
    assert "- 24 heads, 0 rows\n" in card
    assert "## Columns" not in card and "## Rows" not in card and "l00h" not in card
    assert 'moments = load_dataset("PATH_OR_REPO", "moments_q", split="train")\n' in card
    listed = yaml.safe_load(card.split("---\n")[1])["configs"]
    assert [config["config_name"] for config in listed] == ["examples", "moments_q", "moments_k"]
    found = datasets.load_dataset(str(root), "examples", split="train")
    assert sorted(found["n_tokens"]) == sorted(LENGTHS)
    assert f'load_dataset("{root}", "moments_q", split="train")' in capsys.readouterr().out
    assert datasets.load_dataset(str(root), "moments_q", split="train").num_rows == 16


def test_captures_have_layers_and_no_heads(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(sniffer=NONE | {"capture": NONE["capture"] | {"layers": [1, 3]}}) == 0
    captures = Captures(tmp_path / "root")
    assert captures.heads == [] and [*captures.layers] == [1, 3]
    assert "12 heads in 2 layers, 7 examples" in repr(captures)
    told = "l01h00q: no rows were kept, since the sampler is none; there are moments alone"
    with pytest.raises(UserError, match=told):
        captures.head(1, 0)
    with pytest.raises(UserError, match=told):
        captures.attention(1, 0, example="topic-0")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupted_run_goes_on(
    predict: Predict,
    interrupt: Predict,  # noqa: F811
    tmp_path: Path,
    streaming: bool,
) -> None:
    sections = {"sniffer": NONE, "data": {"batch_size": 2, "streaming": streaming}}
    assert predict("whole", **sections) == 0
    interrupt("root", **sections)
    assert heads_of(tmp_path / "root") == []
    assert predict("root", **sections) == 0
    root, whole = tmp_path / "root", tmp_path / "whole"
    file = "examples/data.parquet"
    assert (root / file).read_bytes() == (whole / file).read_bytes()
    assert read_manifest(root)["streams"] == read_manifest(whole)["streams"]


def test_what_an_interrupted_run_read_is_finalized_and_completed(
    predict: Predict,
    interrupt: Predict,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sections = {"sniffer": NONE, "data": {"batch_size": 2}}
    interrupt("root", **sections)
    root = tmp_path / "root"
    assert main(["finalize", str(root)]) == 0
    assert n_texts(root) == 4 and not read_manifest(root)["complete"]
    assert "no rows were kept" not in capsys.readouterr().out
    streams = read_manifest(root)["streams"]
    assert predict("root", **sections) == 0
    assert n_texts(root) == 7 and read_manifest(root)["complete"]
    assert read_manifest(root)["streams"] == streams
    assert main(["verify", str(root)]) == 0


def test_two_processes_read_the_texts_of_one(
    write_run: Callable[..., list[str]], processes: Processes, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"sniffer": NONE, "data": {"batch_size": 2}}
    assert main(write_run("one", **sections)) == 0
    run_two_ranks(processes, write_run("two", **sections, trainer={"devices": 2}))
    one, two = tmp_path / "one", tmp_path / "two"
    assert heads_of(two) == []
    file = "examples/data.parquet"
    assert (two / file).read_bytes() == (one / file).read_bytes()
    assert read_manifest(two)["streams"] == read_manifest(one)["streams"]


def test_a_branch_is_published_pulled_and_added_to(
    hub: LoopbackHub, predict: Predict, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    sniffer = NONE | output()
    some, rest = (write_jsonl(tmp_path / f"{n}.jsonl", texts[n:]) for n in (4, 0))
    assert predict("first", data={"path": str(some)}, sniffer=sniffer) == 0
    assert hub.commits(REPO, "tiny-llama")[0].title.endswith(": 24 heads, 3 examples")
    index = hub.files(REPO, "main")["README.md"].decode()
    assert "| 3 | 24 | 0 |" in index and '"moments_q", revision="tiny-llama"' in index
    captures = Captures(REPO, "tiny-llama")
    assert captures.heads == [] and captures.examples.num_rows == 3
    # Another machine, which has none of it.
    rest.replace(some)
    assert predict("second", data={"path": str(some)}, sniffer=sniffer) == 0
    first, second = tmp_path / "first", tmp_path / "second"
    assert n_texts(first) == 3 and n_texts(second) == 7 and heads_of(second) == []
    assert read_manifest(second)["streams"] == read_manifest(first)["streams"]
    assert Captures(REPO, "tiny-llama").examples.num_rows == 7
    assert main(["verify", str(second)]) == 0
    # What the branch has more is merged into what has no journal.
    assert main(["push", str(first)]) == 0
    assert n_texts(first) == 7 and heads_of(first) == []
    assert read_manifest(first)["streams"] == read_manifest(second)["streams"]
    assert main(["verify", str(first)]) == 0


def test_texts_of_two_runs_are_joined(
    hub: LoopbackHub, predict: Predict, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "some.jsonl"
    for name, some in ("first", texts[:4]), ("second", texts[4:]):
        write_jsonl(file, some)
        assert predict(name, data={"path": str(file)}, sniffer=NONE) == 0
    for name in ("first", "second"):
        command = ["push", str(tmp_path / name), "--hf_repo_id", REPO, "--hf_branch", "joined"]
        assert main(command) == 0
    second = tmp_path / "second"
    assert n_texts(second) == 7 and len(read_manifest(second)["streams"]) == 8
    assert Captures(REPO, "joined").examples.num_rows == 7
    assert main(["verify", str(second)]) == 0


@pytest.mark.parametrize("damage", ["no streams", "other streams", "a head"])
def test_a_manifest_without_its_streams_is_damaged(
    predict: Predict, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(sniffer=NONE) == 0
    manifest = read_manifest(tmp_path / "root")
    if damage == "no streams":
        del manifest["streams"]
    elif damage == "other streams":
        manifest["streams"][0]["heads"] = [7]
    else:
        manifest["heads"]["l00h00q"] = manifest["examples"]
    (tmp_path / "root" / "manifest.json").write_text(json.dumps(manifest))
    for command in ("verify", "report"):
        assert main([command, str(tmp_path / "root")]) == 2
        assert "it is no manifest of a run (" in error_line(capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moments": {}}, "sniffer.capture.sampler.type: none keeps no rows, so nothing would"),
        (
            {"capture": {"sampler": {"keep_first": 3}}},
            "sniffer.capture.sampler.keep_first: the sampler none keeps no rows",
        ),
        (
            {"capture": {"sampler": {"positions": [3]}}},
            "sniffer.capture.sampler.positions: the sampler none does not use them",
        ),
        (
            {"capture": {"capture_softmax": True}},
            "sniffer.capture.capture_softmax: it adds to the rows, and the sampler none keeps none",
        ),
        (
            {"capture": {"capture_token_strings": True}},
            "sniffer.capture.capture_token_strings: it adds to the rows, and the sampler none keeps",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["predict", "estimate"])
def test_what_needs_rows_is_refused(
    write_run: Callable[..., list[str]],
    tmp_path: Path,
    command: str,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sniffer = {
        "capture": NONE["capture"] | changes.get("capture", {}),
        "moments": changes.get("moments", NONE["moments"]),
    }
    sniffer["capture"]["sampler"] = {"type": "none"} | changes.get("capture", {}).get("sampler", {})
    _, *args = write_run(sniffer=sniffer)
    assert main([command, *args]) == 2
    assert error_line(capsys).startswith(message)
    assert not (tmp_path / "root").exists()


def test_listed_positions_are_refused(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(sniffer=NONE, data={"positions_column": "id"}) == 2
    assert error_line(capsys).startswith("data.positions_column: the sampler none does not use it")


def test_a_loaded_model_needs_rows(model_dir: ModelDir) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    with pytest.raises(UserError, match="sampler: none keeps no rows"), sniff(model, sampler="none"):
        pass


def test_rows_after_all_are_another_run(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(sniffer=NONE) == 0
    assert predict(sniffer=NONE | {"capture": {"sampler": {"type": "all"}, "min_bucket_size": 4}}) == 2
    told = error_line(capsys)
    assert 'sniffer.capture.sampler.type is "none" there and "all" here' in told


@pytest.mark.parametrize("timed", [False, True])
def test_an_estimate_has_no_rows(
    say: Say,  # noqa: F811
    write_run: Callable[..., list[str]],
    timed: bool,
) -> None:
    text = say("estimate", *write_run(sniffer=NONE)[1:], *(["--time"] if timed else []))
    assert "\nrows       none are kept, for moments alone\n" in text
    assert "Parquet files" not in text and "warning" not in text
    assert "vectors on their way" not in text
    assert bytes_before(text, "moments/") > 0


def test_moments_that_the_disk_has_no_room_for_are_refused(
    predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They take 8 (D² + 2 D + 6) bytes a head, D = 16, once as files and twice in the journal."""
    usage, needed = shutil.disk_usage("."), 3 * 24 * 8 * 294
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    for streaming in True, False:
        assert predict(sniffer=NONE, data={"streaming": streaming}) == 2
        told = error_line(capsys)
        assert "0.0 GB of it are moments, which take less of fewer heads and without" in told
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed + 10_000))
    assert predict(sniffer=NONE) == 0
