"""A run is published on a branch of the Hub, taken up from it elsewhere, and loaded by name."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard

from conftest import HUB_TOKEN, LENGTHS, REPO, Run, byte_tokenizer, write_jsonl
from families import MANY_HEADS, tiny_model
from loopback import Fault, LoopbackHub, client_of, environment_of
from qk_sniffer.cli import main
from readers import error_line, files_of, schema

BRANCH = "tiny-llama"


def output(branch: str | None = BRANCH, **fields: Any) -> dict[str, Any]:
    return {"output": {"hf_repo_id": REPO, "hf_branch": branch, **fields}}


def queries_of(hub: LoopbackHub) -> set[str]:
    names = (path.partition("/")[0] for path in hub.files(REPO, BRANCH))
    return {name for name in names if name.startswith("l") and name.endswith("q")}


def published(hub: LoopbackHub, root: Path, branch: str = BRANCH) -> None:
    """See that a branch has the files of a data root and no others."""
    there = hub.files(REPO, branch)
    local = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    local.pop(".hub.json")
    there.pop(".gitattributes")
    assert there == local


def local_rows(root: Path) -> dict[str, bytes]:
    """All Parquet files of a data root."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.parquet")}


_LOAD = """
import json, sys
from datasets import load_dataset
repo, branch, head = sys.argv[1:]
whole = load_dataset(repo, head, revision=branch, split="train")
assert list(load_dataset(repo, head, revision=branch)) == ["train"]
streamed = list(load_dataset(repo, head, revision=branch, split="train", streaming=True))
assert streamed == whole.to_list(), "streamed rows differ"
whole.to_parquet(sys.stdin.readline().strip())
print(json.dumps({name: str(feature) for name, feature in whole.features.items()}))
"""


def load_in_a_fresh_process(
    hub: LoopbackHub, head: str, directory: Path, branch: str = BRANCH
) -> tuple[Any, dict[str, str]]:
    """The rows of a head that a process with empty caches loads by name, and their features."""
    file = directory / f"{head}.parquet"
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, REPO, branch, head],
        input=f"{file}\n",
        capture_output=True,
        text=True,
        env={"PATH": "", **environment_of(hub, HUB_TOKEN, directory / f"cache-{branch}-{head}")},
    )
    assert done.returncode == 0, done.stderr
    return pq.read_table(file), json.loads(done.stdout)


def test_a_run_is_published_and_a_head_is_loaded_by_name(
    hub: LoopbackHub, predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(sniffer=output()) == 0
    root = tmp_path / "root"
    published(hub, root)
    out = capsys.readouterr().out
    assert f'load_dataset("{REPO}", "l00h00q", revision="{BRANCH}", split="train")' in out
    made, first = hub.commits(REPO, BRANCH)
    assert re.fullmatch(r"llama\d* on texts.jsonl: 24 heads, 7 examples", made.title)
    assert "sampler" not in made.description
    assert "- positions: every position, buckets from 8,192" in made.description
    assert first.parent is None
    hub.forget()
    table, features = load_in_a_fresh_process(hub, "l00h00q", tmp_path)
    stored = pq.read_table(root / "l00h00q" / "data.parquet")
    assert table.to_pylist() == stored.to_pylist()
    assert features == {
        "bucket": "Value('int32')",
        "example_id": "Value('int32')",
        "position": "Value('int32')",
        "vector": "List(Value('float32'), length=16)",
        "sliding_window": "Value('int32')",
        "token_str": "Value('string')",
    }
    assert [(field.name, field.type) for field in stored.schema] == schema(16)
    fetched = {request.path for request in hub.requests if "parquet" in request.path}
    assert fetched and all("l00h00q" in path for path in fetched)


def test_1280_heads_are_two_portions_and_one_is_one_file(
    hub: LoopbackHub, predict: Run, tmp_path: Path
) -> None:
    tiny_model(MANY_HEADS).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert predict(model={"name": str(tmp_path / "model")}, sniffer=output()) == 0
    assert len(hub.files(REPO, BRANCH)) == 1280 + 5
    commits = {commit.id for branch in (BRANCH, "main") for commit in hub.commits(REPO, branch)}
    assert len(commits) == 1 + 3, "the repository's own, two of the branch, and the list's"
    assert set(hub.branches(REPO)) == {"main", BRANCH}
    hub.forget()
    head = datasets.load_dataset(REPO, "l19h31k", revision=BRANCH, split="train")
    assert head.num_rows == sum(LENGTHS)
    fetched = {request.path for request in hub.requests if "/cdn/" in request.path}
    assert len(fetched) == 1
    file = tmp_path / "root" / "l19h31k" / "data.parquet"
    assert fetched.pop().endswith(hashlib.sha256(file.read_bytes()).hexdigest())


def test_more_heads_than_the_viewer_has_configs(
    hub: LoopbackHub,
    predict: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert predict("few", sniffer=output("few")) == 0
    monkeypatch.setattr("qk_sniffer.storage.card_configs.MOST_CONFIGS", 24)
    capsys.readouterr()
    assert predict(sniffer=output()) == 0
    line = f'load_dataset("{REPO}", data_files="l00h00q/*.parquet", revision="{BRANCH}", split="train")'
    root, out = tmp_path / "root", capsys.readouterr().out
    text = (root / "README.md").read_text()
    assert line in out and line in text
    assert f'load_dataset("{root}", data_files="l00h00q/*.parquet", split="train")' in out
    configs = {config["config_name"]: config for config in DatasetCard(text).data.configs}
    layers = [f"l0{layer}{kind}" for layer in range(4) for kind in "qk"]
    assert [*configs] == ["examples", *layers]

    stored = [pq.read_table(root / f"l01h0{head}q" / "data.parquet") for head in range(4)]
    for source, where in ((str(root), {}), (REPO, {"revision": BRANCH})):
        hub.forget()
        files = "l01h03q/*.parquet"
        head = datasets.load_dataset(source, data_files=files, split="train", **where)
        assert head.to_list() == stored[3].to_pylist()
        assert len([request for request in hub.requests if "/cdn/" in request.path]) == len(where)
        layer = datasets.load_dataset(source, "l01q", split="train", **where)
        assert layer.to_list() == [row for table in stored for row in table.to_pylist()]

    assert main(["verify", str(root)]) == 0
    before = {name: config["description"] for name, config in configs.items()}
    assert predict("root", data={"max_samples": 3}, sniffer={"output": {"overwrite": True}}) == 0
    again = datasets.load_dataset(str(root), "l01q", split="train")
    assert again.num_rows == 4 * pq.read_metadata(root / "l01h00q" / "data.parquet").num_rows
    (root / "README.md").write_text(
        (root / "README.md").read_text().replace(_description(root, "l01q"), before["l01q"])
    )
    capsys.readouterr()
    assert main(["verify", str(root)]) == 1
    assert "README.md: l01q is not listed with its checksum" in capsys.readouterr().out


def _description(root: Path, name: str) -> str:
    configs = DatasetCard((root / "README.md").read_text()).data.configs
    return next(str(c["description"]) for c in configs if c["config_name"] == name)


def test_two_models_have_two_branches_and_main_only_the_list(
    hub: LoopbackHub, predict: Run, tmp_path: Path
) -> None:
    assert predict("one", sniffer=output("one/first")) == 0
    before = hub.files(REPO, "one/first")
    assert predict("two", family="mistral", sniffer=output("two")) == 0
    published(hub, tmp_path / "one", "one/first")
    published(hub, tmp_path / "two", "two")
    assert hub.files(REPO, "one/first") == before
    assert set(hub.files(REPO, "main")) == {".gitattributes", "README.md"}
    card = hub.files(REPO, "main")["README.md"].decode()
    assert "[one/first](" in card
    assert "[two](" in card
    table, _ = load_in_a_fresh_process(hub, "l01h00k", tmp_path, "one/first")
    assert table.equals(pq.read_table(tmp_path / "one" / "l01h00k" / "data.parquet"))


def test_the_branch_is_named_after_model_and_dataset(
    hub: LoopbackHub, predict: Run, tmp_path: Path
) -> None:
    assert predict(sniffer=output(None)) == 0
    model = yaml.safe_load((tmp_path / "root.yaml").read_text())["model"]["name"]
    assert set(hub.branches(REPO)) == {"main", f"{Path(model).name}-texts"}


def test_more_examples_on_another_machine(
    hub: LoopbackHub, predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data: dict[str, Any] = {"batch_size": 2}
    assert predict("first", data=data | {"max_samples": 4}, sniffer=output()) == 0
    assert predict("whole", data=data) == 0
    capsys.readouterr()
    assert predict("second", data=data, sniffer=output()) == 0
    assert "going on after 4 texts" in capsys.readouterr().out
    assert files_of(tmp_path / "second").keys() == files_of(tmp_path / "whole").keys()
    assert local_rows(tmp_path / "second") == local_rows(tmp_path / "whole")
    published(hub, tmp_path / "second")
    assert main(["verify", str(tmp_path / "second")]) == 0
    assert not (tmp_path / "second" / ".pulled").exists()
    assert json.loads((tmp_path / "second" / "manifest.json").read_text())["complete"] is True


def test_what_the_data_root_has_is_not_pulled(hub: LoopbackHub, predict: Run, tmp_path: Path) -> None:
    assert predict(data={"max_samples": 4}, sniffer=output()) == 0
    hub.forget()
    assert predict(sniffer=output()) == 0
    fetched = [request.path for request in hub.requests if "/resolve/" in request.path]
    assert fetched
    assert not any("/l0" in path for path in fetched)
    published(hub, tmp_path / "root")


def test_nothing_new_makes_no_commit(hub: LoopbackHub, predict: Run, tmp_path: Path) -> None:
    assert predict("first", sniffer=output()) == 0
    assert predict("second", sniffer=output()) == 0
    assert local_rows(tmp_path / "second") == local_rows(tmp_path / "first")
    rows = hub.uploaded()
    commits = hub.commits(REPO, BRANCH)
    assert predict("second", sniffer=output()) == 0
    assert hub.commits(REPO, BRANCH) == commits
    assert hub.uploaded() == rows
    assert max(rows.values()) == 1


def test_a_push_restores_what_was_changed_by_hand(
    hub: LoopbackHub, predict: Run, tmp_path: Path
) -> None:
    assert predict(sniffer=output()) == 0
    there = hub.files(REPO, BRANCH)
    manifest = json.loads(there["manifest.json"])
    manifest["heads"]["l00h00q"]["xxh3_128"] = "0" * 32
    changed = {
        "l00h00q/data.parquet": bytes(len(there["l00h00q/data.parquet"])),
        "manifest.json": json.dumps(manifest).encode(),
        "l00h01q/data.parquet": b"shorter",
        "l00h02q/data.parquet": None,
        "l07h00q/data.parquet": b"of no head",
    }
    hub.commit(REPO, BRANCH, changed)
    assert main(["push", str(tmp_path / "root")]) == 0
    published(hub, tmp_path / "root")


def test_damaged_files_are_not_published(
    hub: LoopbackHub, predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict() == 0
    file = tmp_path / "root" / "l00h00q" / "data.parquet"
    capsys.readouterr()
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-1]), file.unlink):
        damage()
        assert main(["push", str(tmp_path / "root"), "--hf_repo_id", REPO]) == 2
        assert error_line(capsys).startswith(f"{file}: damaged, it is not what the manifest describes")
    assert not [request for request in hub.requests if request.method == "PUT"]


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        (
            "examples/data.parquet",
            b"garbage",
            "examples/data.parquet is not what its manifest describes",
        ),
        ("l00h00q/data.parquet", b"", "l00h00q/data.parquet is not what its manifest describes"),
        ("l00h00q/data.parquet", None, "l00h00q/data.parquet is missing, which its manifest names"),
        ("manifest.json", b'{"fingerprint": {}, "heads": {}}', "holds files that are no capture"),
        ("manifest.json", b"{", "holds files that are no capture"),
    ],
)
def test_a_branch_that_was_damaged_by_hand_is_named(
    hub: LoopbackHub,
    predict: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    path: str,
    content: bytes | None,
    message: str,
) -> None:
    assert predict("first", sniffer=output()) == 0
    hub.commit(REPO, BRANCH, {path: content})
    capsys.readouterr()
    assert predict("second", sniffer=output()) == 2
    line = error_line(capsys)
    assert line.startswith(f"sniffer.output.hf_branch: {REPO}, branch {BRANCH}")
    assert message in line
    assert predict("third", sniffer=output("another")) == 0


def subset(texts: list[dict[str, Any]], path: Path, *numbers: int) -> dict[str, Any]:
    return {"path": str(write_jsonl(path, [texts[number] for number in numbers])), "batch_size": 1}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [((0, 1, 2), (4, 5)), ((0, 2, 4), (1, 2, 3, 4)), ((1, 2), (0, 1, 2, 3)), ((0, 1, 2, 3), (1, 2))],
)
@pytest.mark.parametrize("interrupted", [False, True])
def test_local_captures_and_the_branchs_are_joined(
    hub: LoopbackHub,
    predict: Run,
    tmp_path: Path,
    texts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    ours: tuple[int, ...],
    theirs: tuple[int, ...],
    interrupted: bool,
) -> None:
    """One file of texts, with other rows in it whenever a run begins."""
    path = tmp_path / "some.jsonl"
    joined = sorted({*ours, *theirs, 6})
    assert predict("whole", data=subset(texts, path, *joined)) == 0
    assert predict("theirs", data=subset(texts, path, *theirs), sniffer=output()) == 0
    limit = {"limit_predict_batches": len(ours)} if interrupted else {}
    if interrupted:
        with monkeypatch.context() as patch:
            patch.setattr("qk_sniffer.recording.own_data_root.finalize", _fail)
            with pytest.raises(RuntimeError, match="cut off"):
                predict("ours", data=subset(texts, path, *ours), trainer=limit)
        assert (tmp_path / "ours" / ".journal").exists()
    else:
        assert predict("ours", data=subset(texts, path, *ours)) == 0
    assert predict("ours", data=subset(texts, path, 6), sniffer=output()) == 0
    assert local_rows(tmp_path / "ours") == local_rows(tmp_path / "whole")
    assert main(["verify", str(tmp_path / "ours")]) == 0
    published(hub, tmp_path / "ours")


def _fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("cut off")


@pytest.mark.parametrize("cut_off", ["recording.own_data_root.finalize", "storage.finalizing._end"])
def test_what_waits_to_be_merged_stays_when_the_branch_moves(
    hub: LoopbackHub,
    predict: Run,
    tmp_path: Path,
    texts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    cut_off: str,
) -> None:
    path = tmp_path / "some.jsonl"
    assert predict("whole", data=subset(texts, path, 0, 1, 2, 4, 5, 6)) == 0
    assert predict("theirs", data=subset(texts, path, 0, 1), sniffer=output()) == 0
    with monkeypatch.context() as patch:
        patch.setattr(f"qk_sniffer.{cut_off}", _fail)
        with pytest.raises(RuntimeError, match="cut off"):
            predict("ours", data=subset(texts, path, 0, 1, 2), sniffer=output())
    assert (tmp_path / "ours" / ".pulled").exists()
    anew = output(overwrite=True)
    assert predict("theirs", data=subset(texts, path, 4, 5), sniffer=anew) == 0
    assert predict("ours", data=subset(texts, path, 6), sniffer=output()) == 0
    assert local_rows(tmp_path / "ours") == local_rows(tmp_path / "whole")
    published(hub, tmp_path / "ours")


def test_token_strings_and_several_row_groups_are_joined(
    hub: LoopbackHub,
    predict: Run,
    tmp_path: Path,
    texts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qk_sniffer.storage.parquet.ROW_GROUP_BYTES", 7 * 4 * 16)
    monkeypatch.setattr("qk_sniffer.storage.stored_rows._ROWS_AT_ONCE", 5)
    capture = {"capture": {"capture_token_strings": True}}
    path = tmp_path / "some.jsonl"
    assert predict("whole", data=subset(texts, path, *range(7)), sniffer=capture) == 0
    assert predict("theirs", data=subset(texts, path, 1, 3, 5), sniffer=output() | capture) == 0
    assert predict("ours", data=subset(texts, path, 0, 3, 4), sniffer=capture) == 0
    assert predict("ours", data=subset(texts, path, *range(7)), sniffer=output() | capture) == 0
    assert local_rows(tmp_path / "ours") == local_rows(tmp_path / "whole")
    published(hub, tmp_path / "ours")


def test_other_settings_are_refused_by_name_before_anything_is_read(
    hub: LoopbackHub, predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("first", sniffer=output()) == 0
    capsys.readouterr()
    changes = output() | {"capture": {"heads": [1]}}
    assert predict("second", sniffer=changes) == 2
    line = error_line(capsys)
    assert line.startswith(f"sniffer.output.hf_branch: {REPO}, branch {BRANCH} holds a run with other")
    assert "sniffer.capture.heads is null there and [1] here" in line
    published(hub, tmp_path / "first")


def test_other_weights_are_refused(
    hub: LoopbackHub, predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("first", sniffer=output()) == 0
    manifest = json.loads(hub.files(REPO, BRANCH)["manifest.json"])
    manifest["fingerprint"]["model.weights"] = "other"
    hub.commit(REPO, BRANCH, {"manifest.json": json.dumps(manifest).encode()})
    capsys.readouterr()
    for data_root in ("first", "second"):
        assert predict(data_root, sniffer=output()) == 2
        line = error_line(capsys)
        assert 'model.weights is "other" there' in line
        assert line.startswith("sniffer.output.hf_branch: ")
        assert "qk-sniffer push" not in line, "it was told at the end only"
    assert predict("second", sniffer=output("another")) == 0


def test_overwrite_replaces_the_branch_in_one_commit(
    hub: LoopbackHub, predict: Run, tmp_path: Path
) -> None:
    assert predict("first", sniffer=output()) == 0
    hub.commit(REPO, BRANCH, {"figure.png": b"a person's"})
    n_commits = len(hub.commits(REPO, BRANCH))
    changes = {"capture": {"heads": [1]}} | output(overwrite=True)
    assert predict("second", data={"max_samples": 2}, sniffer=changes) == 0
    assert queries_of(hub) == {f"l0{layer}h01q" for layer in range(4)}
    assert hub.files(REPO, BRANCH)["figure.png"] == b"a person's"
    assert len(hub.commits(REPO, BRANCH)) == n_commits + 1


def test_an_overwriting_run_that_never_began_gives_nothing_up(
    hub: LoopbackHub, predict: Run, tmp_path: Path, texts: list[dict[str, Any]]
) -> None:
    path = tmp_path / "some.jsonl"
    assert predict("whole", data=subset(texts, path, 0, 1, 2)) == 0
    assert predict("ours", data=subset(texts, path, 0), sniffer=output()) == 0
    assert predict("theirs", data=subset(texts, path, 0, 1, 2), sniffer=output()) == 0
    wrong = output(overwrite=True) | {"capture": {"heads": [99]}}
    assert predict("ours", data=subset(texts, path, 0), sniffer=wrong) == 2
    assert main(["push", str(tmp_path / "ours")]) == 0
    assert local_rows(tmp_path / "ours") == local_rows(tmp_path / "whole")
    published(hub, tmp_path / "ours")


def test_an_overwriting_run_that_was_cut_off_goes_on(
    hub: LoopbackHub, predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predict("first", sniffer=output()) == 0
    capture = {"capture": {"heads": [1]}}
    with monkeypatch.context() as patch:
        patch.setattr("qk_sniffer.recording.own_data_root.finalize", _fail)
        with pytest.raises(RuntimeError, match="cut off"):
            predict("second", sniffer=output(overwrite=True) | capture)
    assert predict("second", sniffer=output() | capture) == 0
    assert queries_of(hub) == {f"l0{layer}h01q" for layer in range(4)}
    published(hub, tmp_path / "second")


def test_an_overwriting_run_takes_up_what_came_in_between(
    hub: LoopbackHub,
    predict: Run,
    tmp_path: Path,
    texts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, capture = tmp_path / "some.jsonl", {"capture": {"heads": [1]}}
    anew = output(overwrite=True) | capture
    assert predict("first", data=subset(texts, path, 0), sniffer=output()) == 0
    with monkeypatch.context() as patch:
        patch.setattr("qk_sniffer.recording.own_data_root.finalize", _fail)
        with pytest.raises(RuntimeError, match="cut off"):
            predict("second", data=subset(texts, path, 0), sniffer=anew)
    assert predict("third", data=subset(texts, path, 1, 2), sniffer=anew) == 0
    capsys.readouterr()
    assert predict("second", data=subset(texts, path, 0, 1, 2, 3), sniffer=output() | capture) == 0
    assert "second: going on after 3 texts" in capsys.readouterr().out
    published(hub, tmp_path / "second")


def test_a_branch_with_someones_files_is_refused(
    hub: LoopbackHub, predict: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_repo(REPO)
    hub.add_branch(REPO, BRANCH)
    hers = {"thesis.tex": b"hers", "README.md": b"About it."}
    hub.commit(REPO, BRANCH, hers)
    assert predict(sniffer=output()) == 2
    assert "holds files that are no capture; name another branch" in error_line(capsys)
    assert hub.files(REPO, BRANCH).items() >= hers.items()
    assert predict(sniffer=output(overwrite=True)) == 0
    there = hub.files(REPO, BRANCH)
    assert there["thesis.tex"] == b"hers"
    assert "About it." in there["README.md"].decode()
    assert "l00h00q/data.parquet" in there


def test_a_new_branch_begins_empty(hub: LoopbackHub, predict: Run, tmp_path: Path) -> None:
    hub.add_repo(REPO)
    hub.commit(REPO, "main", {"data.csv": b"1,2", "README.md": b"About my data."})
    assert predict(sniffer=output()) == 0
    published(hub, tmp_path / "root")
    _, first = hub.commits(REPO, BRANCH)
    assert set(first.tree) == {".gitattributes"}
    main_files = hub.files(REPO, "main")
    assert main_files["data.csv"] == b"1,2"
    assert "About my data." in main_files["README.md"].decode()
    url = f"{hub.endpoint}/datasets/{REPO}/tree/{BRANCH}"
    assert f"| [{BRANCH}]({url}) | `llama" in main_files["README.md"].decode()


def test_a_branch_that_someone_made_from_main_is_emptied(
    hub: LoopbackHub, predict: Run, tmp_path: Path
) -> None:
    hub.add_repo(REPO)
    hub.commit(REPO, "main", {"data.csv": b"1,2"})
    hub.add_branch(REPO, BRANCH)
    assert "data.csv" in hub.files(REPO, BRANCH)
    assert predict(sniffer=output()) == 0
    published(hub, tmp_path / "root")


def concurrently(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    """Let someone else write just before our commit arrives, once."""
    waiting = [write]

    def before(method: str, path: str) -> None:
        if waiting and method == "POST" and f"/commit/{BRANCH}" in path:
            waiting.pop()()

    monkeypatch.setattr(hub, "before", before)


def files_to_commit(hub: LoopbackHub, branch: str) -> dict[str, bytes]:
    return {path: data for path, data in hub.files(REPO, branch).items() if path != ".gitattributes"}


def test_what_another_writer_adds_meanwhile_is_merged(
    hub: LoopbackHub,
    predict: Run,
    tmp_path: Path,
    texts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "some.jsonl"
    assert predict("theirs", data=subset(texts, path, 1, 3, 5), sniffer=output("copy")) == 0
    assert predict("whole", data=subset(texts, path, 0, 1, 2, 3, 5)) == 0
    theirs = files_to_commit(hub, "copy")
    concurrently(hub, monkeypatch, lambda: hub.commit(REPO, BRANCH, theirs))
    assert predict("ours", data=subset(texts, path, 0, 1, 2), sniffer=output()) == 0
    assert local_rows(tmp_path / "ours") == local_rows(tmp_path / "whole")
    published(hub, tmp_path / "ours")
    assert main(["verify", str(tmp_path / "ours")]) == 0


def test_another_writer_with_other_settings_is_refused(
    hub: LoopbackHub,
    predict: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert predict("theirs", sniffer=output("copy") | {"capture": {"heads": [1]}}) == 0
    theirs = files_to_commit(hub, "copy")
    concurrently(hub, monkeypatch, lambda: hub.commit(REPO, BRANCH, theirs))
    capsys.readouterr()
    assert predict("ours", sniffer=output()) == 2
    line = error_line(capsys)
    assert "sniffer.capture.heads is [1] there and null here" in line
    assert f"`qk-sniffer push {tmp_path / 'ours'}`" in line
    assert files_to_commit(hub, BRANCH) == theirs
    assert main(["verify", str(tmp_path / "ours")]) == 0
    assert main(["push", str(tmp_path / "ours"), "--hf_branch", "mine"]) == 0
    published(hub, tmp_path / "ours", "mine")


def test_a_persons_text_and_fields_stay_in_the_card(
    hub: LoopbackHub, predict: Run, tmp_path: Path
) -> None:
    assert predict(data={"max_samples": 2}, sniffer=output()) == 0
    card = hub.files(REPO, BRANCH)["README.md"].decode()
    edited = card.replace("license: other", "license: cc-by-4.0\nlanguage: en")
    edited = edited.replace("license_name: terms-of-model-and-dataset\n", "")
    edited = edited.replace("<!-- qk-sniffer begin", "Read our *paper*.\n\n<!-- qk-sniffer begin")
    edited += "\n## Citation\n\n---\n\nSomeone, 2026.\n"
    edited = edited.replace("## Load", "## Changed inside of the marks")
    hub.commit(REPO, BRANCH, {"README.md": edited.encode()})
    for data_root in ("root", "another"):
        assert predict(data_root, sniffer=output()) == 0
        text = hub.files(REPO, BRANCH)["README.md"].decode()
        parsed = DatasetCard(text)
        assert parsed.data.license == "cc-by-4.0"
        assert parsed.data.language == "en"
        assert "license_name" not in parsed.data.to_dict()
        assert "Read our *paper*.\n\n<!-- qk-sniffer begin" in text
        assert text.endswith("## Citation\n\n---\n\nSomeone, 2026.\n")
        assert text.count("## Load") == 1
        assert "Changed inside" not in text
        assert len(parsed.data.configs) == 25
        assert "7 examples" in text
        published(hub, tmp_path / data_root)


def test_a_card_is_edited_here_on_the_hub_or_at_both(
    hub: LoopbackHub, predict: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert predict(sniffer=output()) == 0
    root = tmp_path / "root"
    local = root / "README.md"
    local.write_text(local.read_text() + "\nFirst, here.\n")
    assert main(["push", str(root)]) == 0
    assert hub.files(REPO, BRANCH)["README.md"].decode().endswith("First, here.\n")
    local.write_text(local.read_text().replace("First, here.", "Second, here."))
    assert main(["push", str(root)]) == 0
    card = hub.files(REPO, BRANCH)["README.md"]
    assert card.decode().endswith("Second, here.\n")
    hub.commit(REPO, BRANCH, {"README.md": card.replace(b"Second, here.", b"Third, there.")})
    assert main(["push", str(root)]) == 0
    assert local.read_text().endswith("Third, there.\n")
    hub.commit(REPO, BRANCH, {"README.md": card.replace(b"Second, here.", b"")})
    assert main(["push", str(root)]) == 0
    assert "here." not in local.read_text()
    assert "there." not in local.read_text()
    hub.commit(REPO, BRANCH, {"README.md": card.replace(b"Second, here.", b"Third, there.")})
    assert main(["push", str(root)]) == 0
    assert not (root / "README.local.md").exists()
    card = hub.files(REPO, BRANCH)["README.md"]
    hub.commit(REPO, BRANCH, {"README.md": card.replace(b"Third, there.", b"Fourth, there.")})
    local.write_text(local.read_text().replace("Third, there.", "Fourth, here."))
    assert main(["push", str(root)]) == 0
    assert local.read_text().endswith("Fourth, there.\n")
    assert (root / "README.local.md").read_text().endswith("Fourth, here.\n")
    assert "edited here and on the Hub" in caplog.text


def test_a_card_with_broken_yaml_is_named(
    hub: LoopbackHub, predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(sniffer=output()) == 0
    root, broken = tmp_path / "root", b"---\nlicense: [\n---\n"
    hub.commit(REPO, BRANCH, {"README.md": broken})
    capsys.readouterr()
    assert main(["push", str(root)]) == 2
    line = error_line(capsys)
    assert line.startswith(
        f"{REPO}, branch {BRANCH}: README.md: the YAML between its --- lines is broken"
    )
    (root / "README.md").write_bytes(broken)
    before = files_of(root)
    assert predict(data={"max_samples": 2}, sniffer=output(overwrite=True)) == 2
    line = error_line(capsys)
    assert line.startswith("README.md: the YAML between its --- lines is broken")
    assert files_of(root) == before
    (root / "README.md").unlink()
    hub.commit(REPO, BRANCH, {"README.md": None})
    hub.commit(REPO, "main", {"README.md": broken})
    assert main(["push", str(root)]) == 2
    assert error_line(capsys).startswith(f"{REPO}, branch main: README.md: the YAML between its ---")


def test_the_card_tells_what_was_captured(hub: LoopbackHub, predict: Run, tmp_path: Path) -> None:
    capture = {
        "capture_pre_rope": True,
        "head_sampling": {"count": 6, "seed": 3},
        "min_bucket_size": 16,
        "sampler": {"type": "uniform", "base_rate": 4.0},
    }
    assert predict(family="gemma3", sniffer=output() | {"capture": capture}) == 0
    text = (tmp_path / "root" / "README.md").read_text()
    parsed = DatasetCard(text)
    assert parsed.data.size_categories == ["n<1K"]
    assert {"attention", "interpretability", "qk-sniffer"} <= set(parsed.data.tags)
    assert [config["config_name"] for config in parsed.data.configs][-1] == "examples"
    assert all(config["data_files"][0]["split"] == "train" for config in parsed.data.configs)
    for words in (
        "before the rotary embedding",
        "drawn at random, 6 with seed 3",
        "attend within a window of",
        "sampler `uniform`, base rate 4.0, seed 0",
        f'load_dataset("{REPO}", "examples", revision="{BRANCH}", split="train")',
        "fixed_size_list<float32>",
    ):
        assert words in text
    rows = {int(b): int(n) for b, n in _table(text, "bucket")}
    files = [pq.read_table(p)["bucket"].to_numpy() for p in (tmp_path / "root").glob("l*/*.parquet")]
    buckets, counts = np.unique(np.concatenate(files), return_counts=True)
    assert rows == dict(zip(buckets.tolist(), counts.tolist(), strict=True))


def _table(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose head begins with a word, below its rule."""
    lines = text.split(f"\n| {head} |")[-1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace(",", "") for cell in line.strip("|").split("|")])
    return rows


def test_private_stays_private(
    hub: LoopbackHub, predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(data={"max_samples": 2}, sniffer=output(private=True)) == 0
    assert hub.is_private(REPO)
    assert predict(sniffer=output()) == 0
    assert hub.is_private(REPO)
    hub.add_repo("lab/open")
    capsys.readouterr()
    assert predict("second", sniffer={"output": {"hf_repo_id": "lab/open", "private": True}}) == 2
    assert error_line(capsys).startswith("sniffer.output.private: true, but lab/open is public")
    assert main(["push", str(tmp_path / "root"), "--hf_repo_id", "lab/open"]) == 0
    assert main(["push", str(tmp_path / "root"), "--private"]) == 2
    assert main(["push", str(tmp_path / "root"), "--no-private"]) == 0


@pytest.mark.parametrize(
    ("repo_id", "user", "message"),
    [
        (REPO, None, "there is no token to write with; log in with `hf auth login`, set HF_TOKEN"),
        (REPO, "nobody", "the Hub does not accept the token (401"),
        (REPO, "reader", "someone/attention is not there, and reader may not make it for someone"),
        ("reader/attention", "reader", "the token may only read"),
        ("open/attention", "reader", "the token may not write there (403"),
        ("lab/attention", "fine", "the token may only read"),
        ("a/b/c", "someone", "a/b/c is no name of a Hub dataset; give OWNER/NAME"),
        ("attention", "someone", "attention is no name of a Hub dataset; give OWNER/NAME"),
    ],
)
def test_no_access_is_told_before_the_model_is_loaded(
    hub: LoopbackHub,
    predict: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    repo_id: str,
    user: str | None,
    message: str,
) -> None:
    monkeypatch.setattr("qk_sniffer.module.load_model", _fail)
    hub.add_user("reader", "hf_ReadOnly0123456789", role="read")
    hub.add_user("fine", "hf_FineGrained0123456789", role="fineGrained", orgs=["lab"])
    hub.add_user("open", "hf_Open0123456789")
    hub.add_repo("open/attention")
    token = {
        "someone": HUB_TOKEN,
        "reader": "hf_ReadOnly0123456789",
        "fine": "hf_FineGrained0123456789",
        "nobody": "hf_Unknown0123456789",
    }.get(user or "")
    with client_of(hub, token, tmp_path / "its-cache"):
        assert predict(sniffer={"output": {"hf_repo_id": repo_id}}) == 2
    line = error_line(capsys)
    assert line.startswith("sniffer.output.hf_repo_id: ")
    assert message in line
    assert not [request for request in hub.requests if request.method != "GET"]


def test_offline_is_told(predict: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(sniffer=output()) == 2
    assert "HF_HUB_OFFLINE keeps the client from the Hub; unset it, or" in error_line(capsys)


@pytest.mark.parametrize("branch", ["main", "refs/pr/1", "a b", "-x", "x..y"])
def test_a_branch_that_cannot_be(predict: Run, capsys: pytest.CaptureFixture[str], branch: str) -> None:
    assert predict(sniffer=output(branch)) == 2
    assert "sniffer.output.hf_branch: " in error_line(capsys)


def test_a_local_run_is_published_later(
    hub: LoopbackHub, predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "root")
    assert main(["push", root]) == 2
    assert "no such directory is here" in error_line(capsys)
    assert predict() == 0
    capsys.readouterr()
    assert main(["push", root]) == 2
    assert "was never published; name a dataset with --hf_repo_id" in error_line(capsys)
    assert main(["push", root, "--hf_repo", REPO, "--private", "--hf_branch", BRANCH]) == 0
    published(hub, tmp_path / "root")
    assert hub.is_private(REPO)
    assert main(["push", root]) == 0


@pytest.mark.parametrize("token", [HUB_TOKEN, "a marked token of another form"])
def test_the_token_is_nowhere(
    hub: LoopbackHub,
    predict: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    token: str,
) -> None:
    """Not even where a server repeats it, or a config holds it by mistake."""
    caplog.set_level("DEBUG")
    hub.add_user("someone", token)
    with client_of(hub, token, tmp_path / "its-cache"):
        assert predict(data={"revision": token}, sniffer=output(private=True)) == 0
        said = f"the token {token} is bad"
        hub.fail(Fault("POST", "/commit/", status=503, message=said, times=1))
        hub.fail(Fault("POST", "/commit/", status=403, message=said))
        assert predict("second", sniffer=output("other")) == 2
    printed = "".join(capfd.readouterr())
    assert "the token may not write there (403 the token <token> is bad)" in printed
    # The last has what the server said, whole.
    logged = [r.getMessage() for r in caplog.records if not r.name.startswith("httpcore")]
    assert all(token not in text for text in (printed, *logged))
    for place in ("root", "second", "its-cache"):
        for file in (tmp_path / place).rglob("*"):
            assert file.is_dir() or token.encode() not in file.read_bytes(), file
    for branch in hub.branches(REPO):
        assert all(token.encode() not in data for data in hub.files(REPO, branch).values())
        assert all(token not in repr(vars(commit)) for commit in hub.commits(REPO, branch))
