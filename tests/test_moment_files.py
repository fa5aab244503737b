"""Moments on disk: from the states of processes to the files of a data root."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moment_runs import MadeUp, finish
from qk_sniffer.storage import earlier_run

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
