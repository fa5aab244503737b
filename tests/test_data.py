"""TextDataModule alone, as in a notebook."""

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import LENGTHS, write_jsonl
from qk_sniffer.config import TokenizerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.errors import UserError
from qk_sniffer.ids import example_id

Batches = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def batches(model_dir: Callable[[str], Path]) -> Batches:
    def read(path: Path, max_length: int | None = None, **options: Any) -> list[dict[str, Any]]:
        tokenizer = TokenizerConfig(name=str(model_dir("llama")), max_length=max_length)
        data = TextDataModule(str(path), tokenizer=tokenizer, **options)
        data.setup("predict")
        return list(data.predict_dataloader())

    return read


def test_batches_are_padded_on_the_right(batches: Batches, text_file: Path, texts: list[dict]) -> None:
    read = batches(text_file, id_column="id", batch_size=3)
    assert [len(batch["sequence_lengths"]) for batch in read] == [3, 3, 1]
    assert [n for batch in read for n in batch["sequence_lengths"].tolist()] == list(LENGTHS)
    alphabet = {}
    for batch in read:
        ids, mask, lengths = batch["input_ids"], batch["attention_mask"], batch["sequence_lengths"]
        assert ids.shape == mask.shape == (len(lengths), max(lengths))
        assert ids.dtype == torch.int64
        assert batch["example_ids"].dtype == torch.int32
        for row, length in enumerate(lengths):
            assert mask[row].tolist() == [1] * length + [0] * (ids.shape[1] - length)
            assert set(ids[row, length:].tolist()) <= {0}
            source = batch["source_ids"][row]
            text = next(t["text"] for t in texts if t["id"] == source)
            for character, token in zip(text, ids[row].tolist(), strict=False):
                assert alphabet.setdefault(character, token) == token
    assert len(set(alphabet.values())) == len(alphabet)


@pytest.mark.parametrize("streaming", [False, True])
def test_max_length_cuts_the_end_and_says_so(
    batches: Batches, text_file: Path, streaming: bool
) -> None:
    whole = batches(text_file, batch_size=7)[0]
    (cut,) = batches(text_file, max_length=24, batch_size=7, streaming=streaming)
    assert cut["sequence_lengths"].tolist() == [min(n, 24) for n in LENGTHS]
    assert cut["truncated"] == [n > 24 for n in LENGTHS]
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :24])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_without_an_id_column_rows_are_numbered(
    batches: Batches, text_file: Path, streaming: bool, batch_size: int
) -> None:
    read = batches(text_file, batch_size=batch_size, streaming=streaming, max_samples=6)
    assert [i for batch in read for i in batch["example_ids"].tolist()] == list(range(6))
    assert [i for batch in read for i in batch["source_ids"]] == [str(i) for i in range(6)]


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing(
    batches: Batches, text_file: Path, streaming: bool, num_workers: int
) -> None:
    options = {"id_column": "id", "batch_size": 2, "streaming": streaming}
    alone = batches(text_file, **options)
    shared = batches(text_file, **options, num_workers=num_workers)
    assert [batch["source_ids"] for batch in shared] == [batch["source_ids"] for batch in alone]
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])


def test_ids_are_kept_where_they_fit_and_hashed_where_they_do_not() -> None:
    def blake2b(text: str) -> int:
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=4).digest()
        return int.from_bytes(digest, "little", signed=True)

    for number in (0, -1, 2**31 - 1, -(2**31)):
        assert example_id(number) == number
    assert example_id(2**31) == blake2b("2147483648")
    assert example_id("topic-ä") == blake2b("topic-ä")
    assert example_id("7") == blake2b("7") != 7


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.gz", "json", "parquet", "csv", "txt", "directory", "txts"]
)
def test_local_formats(
    batches: Batches, texts: list[dict], tmp_path: Path, form: str, streaming: bool
) -> None:
    rows, path = texts[:3], tmp_path / f"rows.{form}"
    if form in ("jsonl", "json"):
        write_jsonl(path, rows)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif form == "txt":
        rows = rows[:1]
        path.write_text(rows[0]["text"])
    elif form == "directory":
        path.mkdir()
        write_jsonl(path / "train.jsonl", rows)
        (path / "LICENSE.txt").write_text("not a text to read")
    else:
        path.mkdir()
        for row in rows:
            (path / f"{row['id']}.txt").write_text(row["text"])
    read = batches(path, streaming=streaming)
    assert [int(batch["sequence_lengths"][0]) for batch in read] == [len(row["text"]) for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a", "b", "c"]),
        ("[ac].jsonl", ["a", "c"]),
        ("**/*.jsonl", ["a", "b", "c", "deep"]),
        ("?.json*", ["a", "b", "c", "d"]),
        ("[[]1].jsonl", ["brackets"]),
        ("[1].jsonl", ["brackets"]),
        ("*.txt", ["t", "u"]),
        ("*.tsv", ["tab"]),
    ],
)
def test_a_pattern_reads_its_files_in_the_order_of_their_names(
    batches: Batches, tmp_path: Path, pattern: str, expected: list[str], streaming: bool
) -> None:
    (tmp_path / "e").mkdir()
    texts = {"c.jsonl": "c", "a.jsonl": "a", "b.jsonl": "b", "d.json": "d", "e/f.jsonl": "deep"}
    for name, text in texts.items():
        write_jsonl(tmp_path / name, [{"text": text}])
    if pattern.startswith("["):
        write_jsonl(tmp_path / "[1].jsonl", [{"text": "brackets"}])
    for name in "ut":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "g.tsv").write_text("text\ttab\ntab\tx\n")
    read = batches(tmp_path / pattern, streaming=streaming)
    assert [int(batch["sequence_lengths"][0]) for batch in read] == [len(text) for text in expected]
    assert [i for batch in read for i in batch["example_ids"].tolist()] == list(range(len(expected)))
    one_by_one = {text: tokens(batches, tmp_path, text) for text in expected}
    assert [batch["input_ids"][0].tolist() for batch in read] == [one_by_one[text] for text in expected]


def tokens(batches: Batches, directory: Path, text: str) -> list[int]:
    (directory / "one").mkdir(exist_ok=True)
    (batch,) = batches(write_jsonl(directory / "one" / f"{text}.json", [{"text": text}]))
    ids: list[int] = batch["input_ids"][0].tolist()
    return ids


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "*.parquet",
            r"data\.path: no file matches .*\*\.parquet; mend the pattern, which starts from",
        ),
        ("e*", r"data\.path: no file matches"),
        ("*", r"data\.path: .*\* matches .*README\.md, which is none of txt, json, jsonl, .*; narrow"),
        ("[ab].*", r"matches files of several kinds, such as .*a\.jsonl and .*b\.csv; narrow"),
    ],
)
def test_a_pattern_takes_files_of_one_kind(
    batches: Batches, tmp_path: Path, pattern: str, message: str
) -> None:
    (tmp_path / "e.txt").mkdir()
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.csv").write_text("text\nb\n")
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(UserError, match=message):
        batches(tmp_path / pattern)


def test_a_text_file_keeps_its_lines_in_one_example(batches: Batches, tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_text("one\ntwo\n\nthree\n")
    (batch,) = batches(tmp_path / "poem.txt")
    assert batch["sequence_lengths"].tolist() == [15]


def test_an_empty_text_is_an_example_without_tokens(batches: Batches, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": ""}, {"text": "abc"}])
    lengths = [batch["sequence_lengths"].tolist() for batch in batches(path)]
    assert lengths == [[0], [3]]


def colliding_pair() -> tuple[str, str]:
    seen: dict[int, str] = {}
    for number in range(10**6):
        name = f"document-{number}"
        if (first := seen.setdefault(example_id(name), name)) != name:
            return first, name
    raise AssertionError("no collision found")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"body": "a"}], {}, r"data\.text_column: .* no column 'text'; choose from body"),
        (
            [{"text": "a"}],
            {"id_column": "key"},
            r"data\.id_column: .* no column 'key'; choose from text",
        ),
        (
            [{"text": "a"}, {"text": None}],
            {},
            r"data\.text_column: row 1 has None in 'text', not a string",
        ),
        ([{"text": 5}], {}, r"data\.text_column: row 0 has 5 in 'text', not a string"),
        (
            [{"text": "a", "id": "x"}, {"text": "b", "id": "y"}, {"text": "c", "id": "x"}],
            {"id_column": "id"},
            r"data\.id_column: the id 'x' appears twice",
        ),
        (
            [{"text": "a", "id": "x"}, {"text": "a", "id": None}],
            {"id_column": "id"},
            r"data\.id_column: row 1 has the id None",
        ),
        ([{"text": "a", "id": 1.5}], {"id_column": "id"}, r"data\.id_column: row 0 has the id 1\.5"),
    ],
)
def test_mistakes_in_the_data_are_named(
    batches: Batches, tmp_path: Path, rows: list[dict], options: dict, message: str, streaming: bool
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=message):
        batches(path, **options, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_colliding_ids_are_both_named(batches: Batches, tmp_path: Path, streaming: bool) -> None:
    first, second = colliding_pair()
    rows = [{"text": "a", "id": first}, {"text": "b", "id": "other"}, {"text": "c", "id": second}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    message = rf"the ids '{first}' and '{second}' both become example_id {example_id(first)};"
    with pytest.raises(UserError, match=message):
        batches(path, id_column="id", streaming=streaming)


def test_the_tokenizer_needs_a_name_outside_a_trainer(text_file: Path) -> None:
    data = TextDataModule(str(text_file))
    with pytest.raises(UserError, match=r"^data\.tokenizer\.name: "):
        data.setup("predict")
