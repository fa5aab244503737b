"""Every kind of fault in a data root is found, each in one line, and a good one has none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import yaml

from conftest import write_jsonl
from qk_sniffer.cli import main
from readers import error_line

Predict = Callable[..., int]
FILE = "l02h01k/data.parquet"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"": tmp_path_factory.mktemp("finished") / "root"}


@pytest.fixture
def root(finished: dict[str, Path], predict: Predict, tmp_path: Path) -> Path:
    """A data root of its own for each test, captured once."""
    if not finished[""].exists():
        capture = {"sampler": {"type": "uniform", "base_rate": 3.0}, "min_bucket_size": 8}
        assert predict(sniffer={"capture": capture}) == 0
        shutil.copytree(tmp_path / "root", finished[""])
    return Path(shutil.copytree(finished[""], tmp_path / "copy"))


def faults(root: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    capsys.readouterr()
    status = main(["verify", str(root), *options])
    lines = capsys.readouterr().out.splitlines()
    if "all is well" in lines[-1]:
        assert status == 0
        return []
    assert status == 1
    return lines


def rewrite(root: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change a file's rows as a bug would: checksums and counts are those of the new file."""
    path = root / name
    table = change(pq.read_table(path))
    pq.write_table(table, path)
    manifest = json.loads((root / "manifest.json").read_text())
    head = path.parent.name
    facts = manifest["examples"] if head == "examples" else manifest["heads"][head]
    old = facts["xxh3_128"]
    facts |= {
        "rows": table.num_rows,
        "bytes": path.stat().st_size,
        "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes()),
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    card = (root / "README.md").read_text()
    (root / "README.md").write_text(card.replace(old, facts["xxh3_128"]))


def drop(*rows: int) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.take([i for i in range(table.num_rows) if i not in rows])


def swap(table: pa.Table) -> pa.Table:
    return table.take([1, 0, *range(2, table.num_rows)])


def repeat(table: pa.Table) -> pa.Table:
    return table.take([0, *range(table.num_rows)])


def set_column(name: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        field = table.schema.field(name)
        return table.set_column(place, field, pa.array([value] * table.num_rows, field.type))

    return change


def test_a_good_data_root_has_no_fault(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert faults(root, capsys) == []
    assert main(["verify", str(root)]) == 0
    assert capsys.readouterr().out.startswith(f"{root}: all is well, 24 heads, ")


@pytest.mark.parametrize("sampler", ["all", "log_uniform"])
def test_other_samplers_and_token_strings_verify(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str], sampler: str
) -> None:
    capture = {
        "sampler": {"type": sampler},
        "min_bucket_size": 4,
        "capture_token_strings": True,
        "head_sampling": {"count": 5},
    }
    assert predict(family="gemma3", sniffer={"capture": capture}) == 0
    assert faults(tmp_path / "root", capsys) == []


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        (FILE, drop(3), "a row is lost, repeated or out of order"),
        (FILE, drop(0), "row 0 has (example_id, position, bucket)"),
        (FILE, repeat, "a row is lost, repeated or out of order"),
        (FILE, swap, "a row is lost, repeated or out of order"),
        (FILE, lambda table: table.slice(0, table.num_rows - 1), "rows are lost"),
        (FILE, lambda table: pa.concat_tables([table, table.slice(0, 1)]), "it goes on after row"),
        (FILE, set_column("bucket", 1), "row 0 has (example_id, position, bucket)"),
        (FILE, set_column("sliding_window", 7), "sliding_window is not that of the layer, None"),
        (FILE, set_column("token_str", "x"), "token_str is null where it should not be"),
        (FILE, lambda table: table.drop_columns("bucket"), "other columns than the schema has, see b"),
        (FILE, lambda table: table.select(table.column_names[::-1]), "schema has, see the order"),
    ],
)  # fmt: skip
def test_faults_in_the_rows_of_a_head(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    change: Callable[[pa.Table], pa.Table],
    found: str,
) -> None:
    rewrite(root, name, change)
    (line,) = faults(root, capsys)
    assert line.startswith(f"{name}: ")
    assert found in line


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (drop(2), "a row is lost, repeated or out of order"),
        (swap, "examples/data.parquet: not sorted by example_id, or an id is repeated"),
        (repeat, "examples/data.parquet: not sorted by example_id, or an id is repeated"),
        (set_column("n_tokens", 90), " lost"),
    ],
)
def test_faults_in_the_examples(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[pa.Table], pa.Table],
    found: str,
) -> None:
    rewrite(root, "examples/data.parquet", change)
    assert any(found in line for line in faults(root, capsys))


def test_faults_of_files(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "l00h00q")
    (root / "l09h00q").mkdir()
    path = root / "l01h00k" / "data.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    (root / ".journal").mkdir()
    content = bytearray((root / FILE).read_bytes())
    content[200] ^= 1
    (root / FILE).write_bytes(content)
    lines = faults(root, capsys)
    assert len(lines) == 5
    for start in (
        ".journal: rows are waiting",
        "l09h00q: not in the manifest",
        "l00h00q/data.parquet: missing",
        "l01h00k/data.parquet: damaged, it has ",
        f"{FILE}: damaged, its checksum",
    ):
        assert any(line.startswith(start) for line in lines), start


def test_heads_that_the_settings_do_not_give(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["heads"]["l00h00q"]
    manifest["settings"]["capture"]["layers"] = [0, 1, 2]
    (root / "manifest.json").write_text(json.dumps(manifest))
    lines = faults(root, capsys)
    assert "manifest.json: the head l00h00q is missing" in lines
    assert "l00h00q: not in the manifest" in lines
    assert "l03h00q/data.parquet: in the manifest, but the settings don't capture this head" in lines


@pytest.mark.parametrize("text", ["", "---\nconfigs: 3\n---\n", "---\n: [\n---\n", "no front matter"])
def test_a_card_that_lost_its_configs(
    root: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (root / "README.md").write_text(text)
    assert all(line.startswith("README.md: ") for line in faults(root, capsys))
    (root / "README.md").unlink()
    assert faults(root, capsys) == ["README.md: missing, so load_dataset can't find heads by name"]


def test_what_is_no_finished_data_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert error_line(capsys).startswith(f"{tmp_path}: no manifest.json is here")
    assert main(["verify"]) == 2
    assert main(["verify", "one", "two"]) == 2


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("llama", {}),
        ("llama", {"model": {"dtype": "bfloat16"}}),
        ("qwen3", {"sniffer": {"capture": {"capture_pre_rope": True}}}),
        ("llama", {"data": {"streaming": True}, "model": {"prefill_chunk_size": 16}}),
    ],
)
def test_the_model_gives_the_stored_vectors_again(
    predict: Predict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    sections: dict[str, Any],
) -> None:
    assert predict(family=family, **sections) == 0
    assert faults(tmp_path / "root", capsys, "--against-model") == []


def test_a_stored_vector_that_is_not_the_models(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(table: pa.Table) -> pa.Table:
        vectors = np.stack(table["vector"].to_numpy()).astype(np.float32)
        vectors[:, 3] *= 1.1
        kind = table.schema.field("vector").type
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=kind)
        return table.set_column(3, table.schema.field("vector"), column)

    rewrite(root, FILE, change)
    assert faults(root, capsys) == []
    lines = faults(root, capsys, "--against-model")
    assert lines
    for line in lines:
        assert line.startswith(f"{FILE}: example ")
        assert "a vector is off by" in line


def test_texts_that_have_changed_or_gone(
    predict: Predict, texts: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", texts)
    assert predict(data={"path": str(path)}) == 0
    write_jsonl(path, [row | {"text": row["text"] + "!"} for row in texts[:1] + texts[2:]])
    lines = faults(tmp_path / "root", capsys, "--against-model")
    assert any("tokens now and had" in line for line in lines)


def test_one_process_reads_what_several_captured_that_shared_the_model(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["settings"]["model"]["tensor_parallel"] = 2
    (root / "manifest.json").write_text(json.dumps(manifest))
    config = yaml.safe_load((root / "config.yaml").read_text())
    config["model"]["tensor_parallel"] = 2
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    assert faults(root, capsys, "--against-model") == []
    assert main(["report", str(root)]) == 0


def test_a_loader_of_ones_own_cannot_be_read_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["settings"]["data"] = {}
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(root), "--against-model"]) == 2
    assert "leave out --against-model" in error_line(capsys)
