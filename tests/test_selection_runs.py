"""First positions, listed positions and shared draws: from a config to files, in memory, verified."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import norm
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import LENGTHS, write_jsonl
from killing import Processes
from qk_sniffer import Captures, sniff
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.capture import Sampler, Segment
from qk_sniffer.cli import main
from qk_sniffer.config import CaptureConfig, OutputConfig, SamplerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.errors import UserError
from qk_sniffer.module import SnifferModule
from readers import assert_same_rows, error_line, files_of
from test_callback import own_loader, plain_batch, trainer
from test_estimate import bytes_before, rows_of_each_head
from test_ranks import run_two_ranks
from test_resume import interrupt  # noqa: F401
from test_verify import drop, faults, rewrite

Predict = Callable[..., int]
ModelDir = Callable[[str], Path]
ERROR_RATE = 1e-6
DRAWN = {"sampler": {"type": "log_uniform", "base_rate": 2.0, "seed": 3}, "min_bucket_size": 4}
FIRST, LISTED = 6, [0, 4, 5, 12, 36, 37, 60, 61, 400]
LISTS = [[3, 36, 37], [], [60, 0, 0, 7], [23, 24], [0], [1, 2, 400], [12]]
"""Of each text; some end before one, one is listed twice, and one has none."""


def with_sampler(**fields: Any) -> dict[str, Any]:
    """The section sniffer with some fields of the sampler changed."""
    return {"capture": {**DRAWN, "sampler": {**DRAWN["sampler"], **fields}}}


COLUMN = {"data": {"positions_column": "marked"}, "sniffer": with_sampler(type="positions")}


@pytest.fixture
def marked(texts: list[dict[str, Any]], tmp_path: Path) -> Path:
    """The texts with positions of each."""
    rows = [row | {"marked": some} for row, some in zip(texts, LISTS, strict=True)]
    return write_jsonl(tmp_path / "marked.jsonl", rows)


def rows_of(root: Path) -> dict[str, list[tuple[int, int, int]]]:
    """Text, by its place in the file, position and bucket of each row, for every head."""
    names = pq.read_table(root / "examples" / "data.parquet").to_pylist()
    places = {row["example_id"]: int(row["source_id"].removeprefix("topic-")) for row in names}
    found = {}
    for file in sorted(root.glob("l*/data.parquet")):
        table = pq.read_table(file, columns=["example_id", "position", "bucket"])
        found[file.parent.name] = sorted(
            (places[row["example_id"]], row["position"], row["bucket"]) for row in table.to_pylist()
        )
    assert len(found) == 24
    return found


def expected_of(lists: list[list[int]], keep_first: int = 0) -> list[tuple[int, int, int]]:
    """What a head holds of listed positions, with buckets of four."""
    return [
        (text, position, position // 4)
        for text, (length, some) in enumerate(zip(LENGTHS, lists, strict=True))
        for position in sorted({*some, *range(keep_first)})
        if position < length
    ]


def test_the_first_positions_of_every_text_are_kept_besides(predict: Predict, tmp_path: Path) -> None:
    assert predict("plain", sniffer=with_sampler()) == 0
    assert predict("first", sniffer=with_sampler(keep_first=FIRST)) == 0
    plain, first = rows_of(tmp_path / "plain"), rows_of(tmp_path / "first")
    for head, rows in plain.items():
        begun = {(text, p, 2) for text, length in enumerate(LENGTHS) for p in range(min(FIRST, length))}
        assert first[head] == sorted({*rows, *begun})
        assert len(first[head]) > len(rows)
    assert "and the first 6" in (tmp_path / "first" / "README.md").read_text()
    assert main(["verify", str(tmp_path / "first"), "--against-model"]) == 0


@pytest.mark.parametrize("keep_first", [0, 2])
def test_listed_positions_are_kept_of_every_text(
    predict: Predict, tmp_path: Path, keep_first: int
) -> None:
    sections = with_sampler(type="positions", positions=[*LISTED[::-1], 0], keep_first=keep_first)
    assert predict(sniffer=sections) == 0
    rows = rows_of(tmp_path / "root")
    assert all(found == expected_of([LISTED] * 7, keep_first) for found in rows.values())
    capture = json.loads((tmp_path / "root" / "manifest.json").read_text())["settings"]["capture"]
    assert capture["sampler"]["positions"] == LISTED
    assert main(["verify", str(tmp_path / "root"), "--against-model"]) == 0


WAYS: dict[str, dict[str, Any]] = {
    "mapped": {},
    "streamed": {"streaming": True},
    "by a budget": {"max_tokens_per_batch": 80},
    "by a budget, streamed": {"max_tokens_per_batch": 80, "streaming": True},
    "by workers": {"num_workers": 2},
    "by workers, streamed": {"num_workers": 2, "streaming": True},
    "one by one": {"batch_size": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_positions_come_with_their_texts(
    predict: Predict, marked: Path, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"path": str(marked), **COLUMN["data"], **WAYS[way]}
    assert predict(data=data, sniffer=COLUMN["sniffer"]) == 0
    assert all(rows == expected_of(LISTS) for rows in rows_of(tmp_path / "root").values())
    assert main(["verify", str(tmp_path / "root"), "--against-model"]) == 0
    assert "all is well" in capsys.readouterr().out


def test_positions_end_with_a_text_that_is_cut(predict: Predict, marked: Path, tmp_path: Path) -> None:
    data = {"path": str(marked), **COLUMN["data"], "tokenizer": {"max_length": 5}}
    assert predict(data=data, sniffer=with_sampler(type="positions", keep_first=1)) == 0
    expected = [row for row in expected_of(LISTS, 1) if row[1] < 5]
    assert all(rows == expected for rows in rows_of(tmp_path / "root").values())


def test_positions_of_txt_and_csv_need_lists(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.csv"
    file.write_text('id,text,marked\n1,some text,"[0, 1]"\n')
    assert predict(data={"path": str(file), **COLUMN["data"]}, sniffer=COLUMN["sniffer"]) == 2
    line = error_line(capsys)
    assert line.startswith(
        "data.positions_column: row 0 has '[0, 1]' in 'marked', not a list of integers"
    )


@pytest.mark.parametrize("value", [None, [-1], [1.5], ["a"], 3, [True], [None]], ids=str)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_no_list_of_positions_is_named(
    predict: Predict, tmp_path: Path, value: Any, streaming: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": number, "text": "some text", "marked": value} for number in range(2)]
    data = {"path": str(write_jsonl(tmp_path / "texts.jsonl", rows)), "streaming": streaming}
    assert predict(data=data | COLUMN["data"], sniffer=COLUMN["sniffer"]) == 2
    assert error_line(capsys).startswith("data.positions_column: row 0 has ")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_named(
    predict: Predict, streaming: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(data={**COLUMN["data"], "streaming": streaming}, sniffer=COLUMN["sniffer"]) == 2
    assert error_line(capsys).startswith("data.positions_column: the dataset has no column 'marked'")


@pytest.mark.parametrize(
    ("sampler", "column", "message"),
    [
        ({"keep_first": -1}, None, "sniffer.capture.sampler.keep_first: must be at least 0, got -1"),
        (
            {"positions": [1]},
            None,
            "sniffer.capture.sampler.positions: the sampler log_uniform does not",
        ),
        ({"type": "positions"}, None, "sniffer.capture.sampler.positions: list the positions to keep"),
        (
            {"type": "positions", "positions": []},
            None,
            "sniffer.capture.sampler.positions: expected at least one integer",
        ),
        (
            {"type": "positions", "positions": [0, -3]},
            None,
            "sniffer.capture.sampler.positions: expected at least one integer",
        ),
        (
            {"type": "positions", "positions": [2**31]},
            None,
            "sniffer.capture.sampler.positions: expected at least one integer",
        ),
        ({}, "marked", "data.positions_column: the sampler log_uniform does not use it"),
        (
            {"type": "positions", "positions": [1]},
            "marked",
            "data.positions_column: sniffer.capture.sampler.positions lists those of every text",
        ),
    ],
)
@pytest.mark.parametrize("command", ["predict", "estimate"])
def test_contradictions_are_named(
    write_run: Callable[..., list[str]],
    command: str,
    sampler: dict[str, Any],
    column: str | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, *args = write_run(data={"positions_column": column}, sniffer=with_sampler(**sampler))
    assert main([command, *args]) == 2
    assert error_line(capsys).startswith(message)


@pytest.mark.parametrize("changes", [{}, {"keep_first": 3}, {"type": "uniform"}], ids=str)
def test_a_shared_draw_is_that_of_the_first_queries(
    predict: Predict, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert predict("own", sniffer=with_sampler(**changes)) == 0
    assert predict("shared", sniffer=with_sampler(**changes, shared=True)) == 0
    own, shared = rows_of(tmp_path / "own"), rows_of(tmp_path / "shared")
    assert len({tuple(rows) for rows in own.values()}) == 8
    assert all(rows == own["l00h00q"] for rows in shared.values())
    assert main(["verify", str(tmp_path / "shared"), "--against-model"]) == 0
    # Whatever else is captured.
    later = with_sampler(**changes, shared=True)
    later["capture"] |= {"layers": [2], "capture_queries": False}
    assert predict("later", sniffer=later) == 0
    file = "l02h01k/data.parquet"
    assert pq.read_table(tmp_path / "later" / file).equals(pq.read_table(tmp_path / "shared" / file))


CASES: dict[str, dict[str, Any]] = {
    "first": {"sniffer": with_sampler(keep_first=FIRST)},
    "listed": {"sniffer": with_sampler(type="positions", positions=LISTED)},
    "column": COLUMN,
    "shared": {"sniffer": with_sampler(shared=True, keep_first=2)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupted_run_goes_on(
    predict: Predict,
    interrupt: Predict,  # noqa: F811
    marked: Path,
    tmp_path: Path,
    case: str,
    streaming: bool,
) -> None:
    data = {"path": str(marked), "batch_size": 2, "streaming": streaming, **CASES[case].get("data", {})}
    sections = CASES[case] | {"data": data}
    assert predict("whole", **sections) == 0
    interrupt("root", **sections)
    assert predict("root", **sections) == 0
    assert files_of(tmp_path / "root") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_files_of_one(
    write_run: Callable[..., list[str]], processes: Processes, marked: Path, tmp_path: Path, case: str
) -> None:
    data = {"path": str(marked), "batch_size": 2, **CASES[case].get("data", {})}
    assert main(write_run("one", **CASES[case] | {"data": data})) == 0
    command = write_run("two", **CASES[case] | {"data": data, "trainer": {"devices": 2}})
    run_two_ranks(processes, command)
    assert_same_rows(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("first", CASES)
@pytest.mark.parametrize("second", [*CASES, "plain"])
def test_a_data_root_of_other_rows_is_refused(
    predict: Predict, marked: Path, first: str, second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(case: str) -> int:
        sections = CASES.get(case, {"sniffer": with_sampler()})
        return predict(**sections | {"data": {"path": str(marked), **sections.get("data", {})}})

    assert run(first) == 0
    if second == first:
        assert run(first) == 0
        return
    assert run(second) == 2
    line = error_line(capsys)
    assert "holds a run with other settings: " in line
    assert "sniffer.capture.sampler." in line


def test_a_data_root_of_another_column_is_refused(
    predict: Predict, texts: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"marked": some, "other": some} for row, some in zip(texts, LISTS, strict=True)]
    path = str(write_jsonl(tmp_path / "texts.jsonl", rows))
    for column, status in ("marked", 0), ("other", 2):
        data = {"path": path, "positions_column": column}
        assert predict(data=data, sniffer=COLUMN["sniffer"]) == status
    assert 'data.positions_column is "marked" there and "other" here' in error_line(capsys)


def test_a_plain_run_has_the_settings_of_the_first_version(predict: Predict, tmp_path: Path) -> None:
    """So data roots that it made go on."""
    assert predict(sniffer=with_sampler()) == 0
    manifest = json.loads((tmp_path / "root" / "manifest.json").read_text())
    sampler = manifest["settings"]["capture"]["sampler"]
    assert sampler == {"type": "log_uniform", "base_rate": 2.0, "seed": 3}
    assert list(manifest["settings"]["data"]) == [
        "path",
        "name",
        "revision",
        "split",
        "text_column",
        "id_column",
        "max_samples",
        "streaming",
        "tokenizer",
        "batch_size",
        "max_tokens_per_batch",
        "num_workers",
        "num_proc",
    ]
    prefix = "sniffer.capture.sampler."
    in_it = {name.removeprefix(prefix) for name in manifest["fingerprint"] if name.startswith(prefix)}
    assert in_it == set(sampler)
    assert not [name for name in manifest["fingerprint"] if "positions" in name]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("streaming", [False, True])
def test_estimates_are_exact_where_nothing_is_drawn(
    write_run: Callable[..., list[str]],
    marked: Path,
    tmp_path: Path,
    case: str,
    streaming: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = {"path": str(marked), "streaming": streaming, **CASES[case].get("data", {})}
    command, *args = write_run(**CASES[case] | {"data": data})
    capsys.readouterr()
    assert main(["estimate", *args]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = next(line.split()[1:] for line in lines if line.split()[:1] == ["all"])
    assert main([command, *args]) == 0
    rows = rows_of(tmp_path / "root")
    if case in ("listed", "column"):
        n_rows = len(rows["l00h00q"])
        assert expected == [f"{n_rows:,}", f"{24 * n_rows:,}"]
    else:
        n_first = sum(min(length, FIRST if case == "first" else 2) for length in LENGTHS)
        assert n_first < float(expected[0]) < sum(LENGTHS)


def test_the_places_of_a_shared_draw_are_counted_once(
    write_run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """And not for the queries and the keys of each of four layers."""
    estimated = []
    for shared in False, True:
        _, *args = write_run(sniffer=with_sampler(shared=shared))
        capsys.readouterr()
        assert main(["estimate", *args]) == 0
        text = capsys.readouterr().out
        estimated.append((rows_of_each_head(text), bytes_before(text, "on its host: places")))
    (own_rows, own), (shared_rows, shared_once) = estimated
    assert shared_rows == own_rows
    assert own == pytest.approx(8 * shared_once, rel=0.05)


@pytest.mark.parametrize(
    ("lists", "warns"),
    [([[0], [], [], [], [], [], []], True), ([[0]] * 7, False), ([[0]] * 4 + [[]] * 3, False)],
)
def test_a_warning_where_most_texts_have_none_of_their_positions(
    write_run: Callable[..., list[str]],
    texts: list[dict[str, Any]],
    tmp_path: Path,
    lists: list[list[int]],
    warns: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [row | {"marked": some} for row, some in zip(texts, lists, strict=True)]
    path = str(write_jsonl(tmp_path / "texts.jsonl", rows))
    _, *args = write_run(data={"path": path, **COLUMN["data"]}, sniffer=COLUMN["sniffer"])
    assert main(["estimate", *args]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert ("most texts have none of the positions that are listed" in text) == warns


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("l02h01k", drop(2), "a row is lost, repeated or out of order"),
        ("l00h00k", drop(0), "a row is lost, repeated or out of order"),
        ("l03h03q", lambda table: table.slice(0, table.num_rows - 1), "rows are lost"),
        ("l01h00q", lambda table: table.take([1, 0, *range(2, table.num_rows)]), "out of order"),
    ],
)
def test_verify_holds_heads_against_each_other_where_positions_came_with_texts(
    predict: Predict,
    marked: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[Any], Any],
    found: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert predict(data={"path": str(marked), **COLUMN["data"]}, sniffer=COLUMN["sniffer"]) == 0
    rewrite(tmp_path / "root", f"{name}/data.parquet", change)
    (line,) = faults(tmp_path / "root", capsys)
    assert line.startswith(f"{name}/data.parquet: ") and found in line


def test_verify_finds_rows_beyond_a_text_and_first_rows_that_are_lost(
    predict: Predict, marked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In all heads alike."""
    sniffer = with_sampler(type="positions", keep_first=1)
    assert predict(data={"path": str(marked), **COLUMN["data"]}, sniffer=sniffer) == 0
    for path in (tmp_path / "root").glob("l*/data.parquet"):
        rewrite(tmp_path / "root", f"{path.parent.name}/data.parquet", drop(0))
    lines = faults(tmp_path / "root", capsys)
    assert len(lines) == 24 and all("must follow: a row is lost" in line for line in lines)


@pytest.fixture
def loaded(model_dir: ModelDir) -> tuple[Any, Any]:
    directory = model_dir("llama")
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(
        directory
    )


@pytest.mark.parametrize("case", [case for case in CASES if case != "column"])
def test_sniff_keeps_the_rows_of_a_run(
    predict: Predict, loaded: tuple[Any, Any], texts: list[dict], tmp_path: Path, case: str
) -> None:
    assert predict(sniffer=CASES[case]["sniffer"], data={"batch_size": 1}) == 0
    model, tokenizer = loaded
    fields = {**CASES[case]["sniffer"]["capture"]["sampler"]}
    arguments = {"sampler": fields.pop("type"), "min_bucket_size": 4, **fields}
    with sniff(model, **arguments) as captured:
        for row in texts:
            captured.names([row["id"]])
            model(**tokenizer(row["text"], return_tensors="pt"))
    captured.save(tmp_path / "saved")
    for file in sorted((tmp_path / "root").glob("l*/data.parquet")):
        other = pq.read_table(tmp_path / "saved" / file.relative_to(tmp_path / "root"))
        run = pq.read_table(file)
        assert other.drop_columns("vector").equals(run.drop_columns("vector"))
        np.testing.assert_allclose(
            other["vector"].to_pylist(), run["vector"].to_pylist(), rtol=0, atol=1e-5
        )
    assert main(["verify", str(tmp_path / "saved")]) == 0


def test_sniff_keeps_listed_positions_of_a_text_that_it_continues(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    with sniff(model, positions=[13, 2, 300, 2]) as captured:
        inputs = tokenizer("some text", return_tensors="pt")
        model.generate(**inputs, max_new_tokens=10, min_new_tokens=10)
    for head in captured.heads:
        assert head.numpy()["position"].tolist() == [2, 13]
        assert head.keep_probability().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"positions": [1], "sampler": "all"},
            "positions: the sampler all does not use them; set sampler ",
        ),
        ({"sampler": "positions"}, "positions: list those that the sampler positions keeps"),
        ({"positions": [1.5]}, "positions: expected integers, got "),
        ({"positions": []}, "positions: expected at least one integer"),
        ({"keep_first": 1.5}, "keep_first: expected an integer"),
        ({"keep_first": -1}, "keep_first: must be at least 0"),
    ],
)
def test_sniff_names_its_arguments(
    loaded: tuple[Any, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error, sniff(loaded[0], **arguments):
        pass
    assert str(error.value).startswith(message)


BY_LIST = CaptureConfig(min_bucket_size=4, sampler=SamplerConfig("positions"))


@pytest.mark.parametrize("kind", ["strings", "dataset"])
def test_texts_in_memory_have_positions(
    kind: str, loaded: tuple[Any, Any], texts: list[dict], tmp_path: Path
) -> None:
    strings = [row["text"] for row in texts]

    def run(lists: list[list[int]]) -> None:
        if kind == "strings":
            data = TextDataModule.of(strings, positions=lists, batch_size=3)
        else:
            given = datasets.Dataset.from_dict({"text": strings, "marked": lists})
            data = TextDataModule.of(given, positions_column="marked", batch_size=3)
        sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), BY_LIST)
        trainer(sniffer).predict(SnifferModule.of(*loaded), datamodule=data, return_predictions=False)

    run(LISTS)
    run(LISTS)
    assert all(rows == expected_of(LISTS) for rows in rows_of(tmp_path / "root").values())
    with pytest.raises(UserError, match=r"holds a run with other settings: data\.path is"):
        run([[0]] * 7)


@pytest.mark.parametrize(
    "positions", [3, [[0]], [[0], [-1]], [[0], None], [[0], [0.5]], [[0], 1]], ids=str
)
def test_positions_of_strings_are_a_list_for_each(positions: Any) -> None:
    with pytest.raises(UserError, match=r"^positions: expected 2 lists of integers of at least 0"):
        TextDataModule.of(["one", "two"], positions=positions)


def test_positions_of_a_dataset_are_a_column() -> None:
    with pytest.raises(UserError, match=r"^positions: a dataset has a column for them"):
        TextDataModule.of(datasets.Dataset.from_dict({"text": ["one"]}), positions=[[0]])


LOADED: dict[str, Any] = {
    "lists": [[2, 0, 9], [0]],
    "arrays": [np.array([0, 2, 2], np.uint8), np.array([0])],
    "tensors": [torch.tensor([0, 2]), torch.tensor([0])],
    "a tensor": torch.tensor([[0, 2], [1, 0]]),
}


@pytest.mark.parametrize("case", LOADED)
def test_a_loader_of_ones_own_gives_positions(case: str, model_dir: ModelDir, tmp_path: Path) -> None:
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), BY_LIST)
    loader = own_loader(positions=LOADED[case])
    trainer(sniffer).predict(SnifferModule(str(model_dir("llama"))), loader, return_predictions=False)
    table = pq.read_table(tmp_path / "root" / "l00h00q" / "data.parquet")
    assert table["example_id"].to_pylist() == [0, 0, 1]
    assert table["position"].to_pylist() == [0, 2, 0]
    assert main(["verify", str(tmp_path / "root")]) == 0


class OwnData(pl.LightningDataModule):
    """Tells the lengths of its texts beforehand, and their positions with the batch."""

    def sequence_lengths(self) -> torch.Tensor:
        return torch.tensor([3, 1])

    def predict_dataloader(self) -> DataLoader:
        return own_loader(positions=[[0, 2], [0]])


def test_nothing_is_warned_of_positions_that_are_not_known_yet(
    model_dir: ModelDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), BY_LIST)
    module = SnifferModule(str(model_dir("llama")))
    trainer(sniffer).predict(module, datamodule=OwnData(), return_predictions=False)
    assert len(Captures(tmp_path / "root").head(0, 0)) == 3
    assert "sniffer.capture.sampler" not in caplog.text


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (None, "positions: a batch has none; give each text a list of those to keep"),
        ([[0]], "positions: expected 2 lists of integers of at least 0, one for each sequence"),
        ([[0], [-1]], "positions: expected 2 lists of integers of at least 0, one for each sequence"),
        ([0, 1], "positions: expected 2 lists of integers of at least 0, one for each sequence"),
        (3, "positions: expected 2 lists of integers of at least 0, one for each sequence"),
    ],
    ids=str,
)
def test_a_loader_of_ones_own_without_such_lists(
    positions: Any, message: str, model_dir: ModelDir, tmp_path: Path
) -> None:
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), BY_LIST)
    with pytest.raises(UserError) as error:
        trainer(sniffer).predict(
            SnifferModule(str(model_dir("llama"))), own_loader(positions=positions)
        )
    assert str(error.value).startswith(message)


def test_another_field_of_this_name_is_left_alone(model_dir: ModelDir, tmp_path: Path) -> None:
    capture = CaptureConfig(sampler=SamplerConfig("all"))
    sniffer = SnifferCallback(OutputConfig(str(tmp_path / "root")), capture)
    loader = DataLoader([plain_batch([[1, 1]]) | {"positions": "anything"}], batch_size=None)
    trainer(sniffer).predict(SnifferModule(str(model_dir("llama"))), loader, return_predictions=False)
    assert Captures(tmp_path / "root").head(0, 0).numpy()["position"].tolist() == [0, 1]


class Thirds(Sampler):
    """A sampler of someone's own: every position with a probability of a third, in one bucket."""

    def segments(self, length: int) -> list[Segment]:
        return [Segment(0, length, 1 / 3)]

    def buckets(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(positions)


def test_rows_have_the_probability_that_they_were_kept_with(predict: Predict, tmp_path: Path) -> None:
    assert predict(sniffer=with_sampler(keep_first=3)) == 0
    for head in Captures(tmp_path / "root").heads:
        positions = head.numpy()["position"].tolist()
        p = [min(1.0, 2 / 2 ** max(2, (p + 1).bit_length() - 1)) if p >= 3 else 1 for p in positions]
        found = head.keep_probability()
        assert found.dtype == np.float64 and found.tolist() == p
        some = head.where(position=range(2, 9))
        chosen = [x for x, position in zip(p, positions, strict=True) if 2 <= position < 9]
        assert some.keep_probability().tolist() == chosen


def test_a_sampler_of_ones_own_is_asked_where_it_is_trusted(predict: Predict, tmp_path: Path) -> None:
    assert predict(sniffer=with_sampler(type=f"{__name__}.Thirds", keep_first=1)) == 0
    head = Captures(tmp_path / "root").head(0, 0)
    with pytest.raises(UserError, match=r"^l00h00q: the sampler .*Thirds is code .*trust_code=True$"):
        head.keep_probability()
    found = dict(
        zip(head.numpy()["position"].tolist(), head.keep_probability(trust_code=True), strict=True)
    )
    assert found.pop(0) == 1 and set(found.values()) == {1 / 3}


def test_listed_rows_were_certain(predict: Predict, marked: Path, tmp_path: Path) -> None:
    assert predict(data={"path": str(marked), **COLUMN["data"]}, sniffer=COLUMN["sniffer"]) == 0
    head = Captures(tmp_path / "root").head(0, 0)
    assert head.keep_probability().tolist() == [1.0] * len(head)


def test_weighted_means_are_those_of_all_positions(loaded: tuple[Any, Any]) -> None:
    """Weighted sums over eight independent draws of a model; each of two fails by chance with a
    probability of ``ERROR_RATE`` / 2."""
    model, tokenizer = loaded
    generator = random.Random(0)
    arguments = {"sampler": "log_uniform", "base_rate": 4, "min_bucket_size": 8, "keep_first": 2}
    with sniff(model) as whole, sniff(model, **arguments) as sample:
        for _ in range(60):
            text = "".join(generator.choice("abcdefgh ") for _ in range(200))
            model(**tokenizer(text, return_tensors="pt"), use_cache=False)
    found, expected, variance = np.zeros(2), np.zeros(2), np.zeros(2)
    for layer in range(4):
        for kind in "qk":
            rows, all_rows = (c.head(layer, 0, kind).numpy() for c in (sample, whole))
            p = sample.head(layer, 0, kind).keep_probability()
            exponents = np.array([(p + 1).bit_length() - 1 for p in all_rows["position"].tolist()])
            all_p = np.minimum(1, 4 / 2.0 ** np.maximum(3, exponents))
            all_p[all_rows["position"] < 2] = 1
            for number, value in enumerate((lambda v: np.ones(len(v)), lambda v: v[:, 0])):
                x, all_x = value(rows["vector"]), value(all_rows["vector"])
                found[number] += (x / p).sum()
                expected[number] += all_x.sum()
                variance[number] += (all_x**2 * (1 - all_p) / all_p).sum()
    for deviation in (found - expected) / np.sqrt(variance):
        assert math.isfinite(deviation) and 2 * norm.sf(abs(deviation)) > ERROR_RATE / 2
