"""Moments on disk: from the states of processes to the files of a data root."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moment_runs import MadeUp, finish
from qk_sniffer.cli import main
from qk_sniffer.storage import JournalWriter, checksum, configs_of, earlier_run, summary_table
from readers import error_line

WHOLE = MadeUp()
VARIANTS = {
    "all": WHOLE,
    "plain": MadeUp(by_bucket=False, pre_rope=False, cross=False),
    "widths": MadeUp(widths=(4, 6, 4)),
    "outputs": MadeUp(kinds=("q", "o"), cross=False),
}


@pytest.mark.parametrize("made_up", VARIANTS.values(), ids=VARIANTS)
def test_moments_of_several_processes_become_files(tmp_path: Path, made_up: MadeUp) -> None:
    made_up.journal(tmp_path, rows=[3, -7], moments=[3, -7])
    made_up.journal(tmp_path, rows=[12], moments=[12], rank=1)
    made_up.journal(tmp_path, rows=[40], moments=[40], rank=2)
    manifest = finish(tmp_path)
    made_up.assert_counted(tmp_path, 3, -7, 12, 40)
    facts = manifest["moments"]
    assert list(facts) == [*made_up.kinds, "texts"]
    for name, about in facts.items():
        path = tmp_path / "moments" / f"{name}.parquet"
        assert about["bytes"] == path.stat().st_size
        assert about["rows"] == pq.read_metadata(path).num_rows
    assert facts["texts"]["tokens"] == 30 + 5 + 17 + 1
    assert not (tmp_path / ".journal").exists()


def test_columns_have_the_types_that_are_documented(tmp_path: Path) -> None:
    WHOLE.journal(tmp_path, [3], [3])
    finish(tmp_path)

    def numbers(size: int) -> Any:
        return pa.list_(pa.field("element", pa.float64()), size)

    plain = [
        ("layer_idx", pa.int32()),
        ("head", pa.int32()),
        ("bucket", pa.int32()),
        ("pre_rope", pa.bool_()),
        ("count", pa.int64()),
        ("position_sum", pa.int64()),
        ("position_square_sum", pa.float64()),
        ("mean", numbers(4)),
        ("covariance", numbers(16)),
        ("position_covariance", numbers(4)),
    ]
    keys = [("key_mean", numbers(4)), ("key_covariance", numbers(16))]
    assert pq.read_schema(tmp_path / "moments" / "k.parquet") == pa.schema(plain)
    assert pq.read_schema(tmp_path / "moments" / "q.parquet") == pa.schema(plain + keys)


def test_a_process_goes_on_with_what_it_has_counted(tmp_path: Path) -> None:
    WHOLE.journal(tmp_path, [3], [3])
    WHOLE.journal(tmp_path, [12], [12])
    finish(tmp_path)
    WHOLE.assert_counted(tmp_path, 3, 12)


def test_texts_that_are_captured_and_not_counted_are_counted_later(tmp_path: Path) -> None:
    WHOLE.journal(tmp_path, [3, 12], [3])
    assert not finish(tmp_path)["complete"]
    earlier = earlier_run(tmp_path)
    assert earlier is not None
    assert earlier.example_ids.tolist() == [3, 12]
    assert earlier.counted_ids.tolist() == earlier.done_ids.tolist() == [3]
    rows = {path: path.read_bytes() for path in tmp_path.glob("l*/data.parquet")}
    WHOLE.journal(tmp_path, [], [12])
    assert finish(tmp_path, complete=True)["complete"]
    WHOLE.assert_counted(tmp_path, 3, 12)
    assert rows == {path: path.read_bytes() for path in tmp_path.glob("l*/data.parquet")}


def test_datasets_loads_moments_by_name(tmp_path: Path) -> None:
    WHOLE.journal(tmp_path, [3, -7], [3, -7])
    finish(tmp_path, complete=True)
    for kind in WHOLE.kinds:
        rows = datasets.load_dataset(str(tmp_path), f"moments_{kind}", split="train")
        assert rows.to_list() == pq.read_table(tmp_path / "moments" / f"{kind}.parquet").to_pylist()
    card = (tmp_path / "README.md").read_text()
    assert "35 tokens of 2 texts, kept or not" in card
    assert "key_covariance" in card


def test_a_large_capture_has_the_moments_as_configs_too() -> None:
    facts = {"rows": 1, "bytes": 1, "xxh3_128": "0" * 32}
    heads = {f"l{layer:02d}h{head:02d}q": facts for layer in range(100) for head in range(30)}
    moments = {"q": facts, "texts": facts | {"tokens": 1}}

    def names(n_heads: int) -> list[str]:
        some = dict([*heads.items()][:n_heads])
        manifest = {"heads": some, "examples": facts, "moments": moments}
        return [config["config_name"] for config in configs_of(manifest)]

    assert names(2998)[-2:] == ["examples", "moments_q"]
    assert len(names(2998)) == 3000
    assert names(2999) == ["examples", *(f"l{layer:02d}q" for layer in range(100)), "moments_q"]


@pytest.mark.parametrize("made_up", VARIANTS.values(), ids=VARIANTS)
def test_whole_moments_pass_verify(
    tmp_path: Path, made_up: MadeUp, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.journal(tmp_path, [3, -7, 12], [3, -7])
    made_up.journal(tmp_path, [], [12])
    manifest = finish(tmp_path, complete=True)
    assert main(["verify", str(tmp_path)]) == 0, capsys.readouterr()
    assert "moments  52 tokens of 3 texts" in summary_table(tmp_path, manifest, seconds=1.0)


def change(root: Path, kind: str, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Change the rows of a file as somebody would who keeps the manifest in step."""
    path = root / "moments" / f"{kind}.parquet"
    pq.write_table(edit(pq.read_table(path)), path)
    manifest = json.loads((root / "manifest.json").read_text())
    size, digest, rows = path.stat().st_size, checksum(path), pq.read_metadata(path).num_rows
    manifest["moments"][kind] |= {"bytes": size, "xxh3_128": digest, "rows": rows}
    (root / "manifest.json").write_text(json.dumps(manifest))


def with_column(name: str, edit: Callable[[list[Any]], None]) -> Callable[[pa.Table], pa.Table]:
    def edited(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        edit(values)
        index = table.schema.get_field_index(name)
        return table.set_column(index, table.schema.field(name), pa.array(values, table[name].type))

    return edited


def put(row: int, at: int, value: float) -> Callable[[list[Any]], None]:
    def edit(values: list[Any]) -> None:
        values[row][at] = value

    return edit


def swap(values: list[Any]) -> None:
    values[0], values[-1] = values[-1], values[0]


FAULTS: dict[str, tuple[str, Callable[[pa.Table], pa.Table], str]] = {
    "lost row": ("q", lambda rows: rows.slice(1), "a row is lost"),
    "lost end": ("q", lambda rows: rows.slice(0, len(rows) - 1), "rows where"),
    "order": ("k", with_column("head", swap), "a row is lost, repeated or out of order"),
    "count": ("v", with_column("count", swap), "tokens at positions of sum"),
    "symmetry": ("q", with_column("covariance", put(2, 1, 9.0)), "is not symmetric"),
    "variance": ("q", with_column("covariance", put(2, 5, -9.0)), "a variance is negative"),
    "infinity": ("k", with_column("mean", put(0, 0, float("inf"))), "1 rows hold inf or NaN"),
    "gap": ("k", with_column("mean", put(0, 0, None)), "mean has gaps"),
    "column": ("k", lambda rows: rows.drop_columns(["mean"]), "other columns than the schema has"),
    "text": ("texts", lambda rows: rows.slice(1), "lacks 1 texts that the other has, as -7"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_what_is_wrong(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    WHOLE.journal(tmp_path, [3, -7], [3, -7])
    finish(tmp_path, complete=True)
    kind, edit, message = FAULTS[fault]
    change(tmp_path, kind, edit)
    assert main(["verify", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if line.startswith(f"moments/{kind}.parquet: ")]
    assert any(message in line for line in told), lines


def test_verify_names_moments_that_are_damaged_or_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WHOLE.journal(tmp_path, [3], [3])
    finish(tmp_path, complete=True)
    path = tmp_path / "moments" / "q.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    (tmp_path / "moments" / "k.parquet").unlink()
    (tmp_path / "moments" / "o.parquet").write_bytes(b"")
    assert main(["verify", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "moments/o.parquet: not in the manifest" in printed
    (tmp_path / "moments" / "o.parquet").unlink()
    assert main(["verify", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "moments/q.parquet: damaged, its checksum is not that of the manifest" in printed
    assert "moments/k.parquet: missing" in printed


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no moments": lambda manifest: manifest.pop("moments"),
    "no settings": lambda manifest: manifest["settings"].pop("moments"),
    "half the settings": lambda manifest: manifest["settings"]["moments"].pop("cross"),
    "no texts": lambda manifest: manifest["moments"].pop("texts"),
    "no tokens": lambda manifest: manifest["moments"]["texts"].pop("tokens"),
    "a path": lambda manifest: manifest["moments"].update({"../q": manifest["moments"]["q"]}),
    "no checksum": lambda manifest: manifest["moments"]["q"].pop("xxh3_128"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    WHOLE.journal(tmp_path, [3], [3])
    manifest = finish(tmp_path, complete=True)
    HOSTILE[case](manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(tmp_path)]) == 2
    error = error_line(capsys)
    assert "manifest.json: damaged, it is no manifest of a run" in error
    assert "moments" in error


def test_moments_that_are_not_finite_are_told_and_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = WHOLE.state(3)
    state.tables["k"][0].mean[1, 2] = np.nan
    WHOLE.journal(tmp_path, [3])
    writer = JournalWriter(tmp_path / ".journal", WHOLE.header)
    writer.save_moments(state)
    writer.close()
    manifest = finish(tmp_path, complete=True)
    assert manifest["moments"]["k"]["non_finite"] == 1
    assert "1 row of moments holds inf or NaN" in summary_table(tmp_path, manifest, seconds=1.0)
    assert "1 row of moments holds inf or NaN" in (tmp_path / "README.md").read_text()
    assert main(["verify", str(tmp_path)]) == 0, capsys.readouterr()


def test_a_run_without_moments_has_none(tmp_path: Path) -> None:
    header = WHOLE.header
    del header["settings"]["moments"]
    JournalWriter(tmp_path / ".journal", header).close()
    manifest = finish(tmp_path)
    assert "moments" not in manifest
    assert not (tmp_path / "moments").exists()
    assert "oment" not in (tmp_path / "README.md").read_text()
