"""Texts in many files: lists, files of a directory or a Hub dataset, configurations, structs."""

import bz2
import gzip
import importlib.util
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from conftest import HUB_TOKEN, REPO, write_jsonl
from loopback import LoopbackHub
from qk_sniffer.cli import main
from qk_sniffer.config import TokenizerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.errors import UserError
from readers import error_line

Read = Callable[..., list[tuple[str, str]]]
"""Source id and text of each row that a data module reads."""

STREAMED = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture
def read(model_dir: Callable[[str], Path]) -> Read:
    def of(path: Any, **options: Any) -> list[tuple[str, str]]:
        tokenizer = TokenizerConfig(name=str(model_dir("llama")))
        path = [*map(str, path)] if isinstance(path, list) else str(path)
        data = TextDataModule(path, tokenizer=tokenizer, **options)
        data.setup("predict")
        return [
            (source, data.tokenizer.decode(ids[:length]))
            for batch in data.predict_dataloader()
            for source, ids, length in zip(
                batch["source_ids"], batch["input_ids"], batch["sequence_lengths"], strict=True
            )
        ]

    return of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files a to f, each with one text that is its name."""
    for name in ("c", "a", "b", "deep/e", "deep/d"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_jsonl(path, [{"text": path.stem, "id": f"id-{path.stem}"}])
    (tmp_path / "t.txt").write_text("one\ntwo")
    (tmp_path / "f.csv").write_text("text\nf\n")
    return tmp_path


def words(rows: list[tuple[str, str]]) -> str:
    """The texts, of rows that are numbered through."""
    assert [source for source, _ in rows] == [str(number) for number in range(len(rows))]
    return " ".join(text for _, text in rows)


@STREAMED
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["c.jsonl", "a.jsonl"], "c a"),
        (["c.jsonl", "*.jsonl"], "c a b"),
        (["c.jsonl", "deep", "a.jsonl"], "c d e a"),
        (["deep", "f.csv"], "d e f"),
        (["c.jsonl", "deep", "*.jsonl"], "c d e a b"),
        (["t.txt"], "one\ntwo"),
    ],
)
def test_a_list_is_read_in_its_order(
    read: Read, folder: Path, names: list[str], expected: str, streaming: bool
) -> None:
    paths = [folder / name for name in names]
    assert words(read(paths, streaming=streaming)) == expected
    first = read(paths, streaming=streaming, batch_size=2, max_samples=2)
    assert words(first) == " ".join(expected.split(" ")[:2])


def test_a_list_is_tokenized_in_several_processes(read: Read, folder: Path) -> None:
    paths = [folder / "b.jsonl", folder / "deep", folder / "a.jsonl"]
    rows = read(paths, num_proc=2, id_column="id")
    assert rows == [(f"id-{text}", text) for text in ("b", "d", "e", "a")]


@STREAMED
@pytest.mark.parametrize(
    ("data_files", "split", "expected"),
    [
        ("*.jsonl", "train", "a b c"),
        (["c.jsonl", "deep/*"], "train", "c d e"),
        ({"train": "c.jsonl", "test": ["b.jsonl", "**/d.jsonl"]}, "test", "b d"),
        ("t.txt", "train", "one\ntwo"),
    ],
)
def test_files_within_a_directory(
    read: Read, folder: Path, data_files: Any, split: str, expected: str, streaming: bool
) -> None:
    rows = read(folder, data_files=data_files, split=split, streaming=streaming)
    assert words(rows) == expected


@STREAMED
def test_files_within_a_hub_dataset(
    read: Read, hub: LoopbackHub, tmp_path: Path, streaming: bool
) -> None:
    def packed(text: str) -> bytes:
        return gzip.compress(json.dumps({"text": text}).encode() + b"\n")

    files = {f"{language}/{n}.json.gz": packed(f"{language}{n}") for language in "de" for n in (2, 1)}
    api = HfApi(token=HUB_TOKEN)
    api.create_repo(REPO, repo_type="dataset")
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    api.create_commit(REPO, operations, commit_message="Texts", repo_type="dataset")
    splits = {"train": "e/*.json.gz", "test": "d/1.json.gz"}
    assert words(read(REPO, data_files=splits, streaming=streaming)) == "e1 e2"
    assert words(read(REPO, data_files=splits, split="test", streaming=streaming)) == "d1"
    with pytest.raises(UserError, match=r"^data\.data_files: someone/attention can't be read \("):
        read(REPO, data_files="f/*.json.gz", streaming=streaming)


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A dataset with the configurations one and two, whose columns have other types in each."""
    for name, ids in (("one", ["x", "y"]), ("two", [1, 2])):
        (tmp_path / name).mkdir()
        rows = {"text": [f"{name}{i}" for i in (0, 1)], "id": ids, name: [0, 0]}
        pq.write_table(pa.table(rows), tmp_path / name / "rows.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("one", "two")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return tmp_path


@STREAMED
def test_configurations_are_read_one_behind_the_other(
    read: Read, several: Path, streaming: bool
) -> None:
    options = {"name": ["two", "one"], "streaming": streaming}
    assert words(read(several, **options)) == "two0 two1 one0 one1"
    assert words(read(several, **options, max_samples=3)) == "two0 two1 one0"
    rows = read(several, **options, id_column="id", batch_size=4)
    assert rows == [("1", "two0"), ("2", "two1"), ("x", "one0"), ("y", "one1")]
    with pytest.raises(UserError, match=r"^data\.id_column: the id 'x' appears twice"):
        read(several, name=["one", "two", "one"], id_column="id", streaming=streaming)


@STREAMED
def test_rows_of_a_later_part_have_their_number_in_messages(
    read: Read, folder: Path, streaming: bool
) -> None:
    late = write_jsonl(folder / "late.jsonl", [{"text": "x", "id": "x"}, {"text": "y", "id": None}])
    with pytest.raises(UserError, match=r"^data\.id_column: row 3 has the id None"):
        read([folder / "deep", late], id_column="id", streaming=streaming)


@STREAMED
@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ([], {}, r"data\.path: the list is empty; name at least one"),
        (["a.jsonl", "z.jsonl"], {}, r"data\.path: the list has .*z\.jsonl, and no file or directory"),
        (["a.jsonl", "deep/../f.csv"], {}, r"data\.path: the list has files of several kinds, such as"),
        (["README.md"], {}, r"data\.path: the list has .*README\.md, which is none of txt, json"),
        (["a.jsonl", "z*"], {}, r"data\.path: no file matches .*z\*"),
        ("", {"data_files": {"train": []}}, r"data\.data_files: the list is empty"),
        ("", {"data_files": "z*"}, r"data\.data_files: no file matches z\*; .* starts from /"),
        ("", {"data_files": ["a.jsonl", "f.csv"]}, r"data\.data_files: they have files of several"),
        (
            "a.jsonl",
            {"data_files": "a.jsonl"},
            r"data\.data_files: data\.path is .*a\.jsonl, and these",
        ),
        (["deep"], {"data_files": "a.jsonl"}, r"data\.data_files: data\.path is .*deep, and these"),
        ("", {"data_files": "a.jsonl", "split": "test"}, r"data\.split: .* can't be read"),
        ("*.jsonl", {"name": ["x"]}, r"data\.name: .*\.jsonl is read as files, which have no config"),
        ("deep", {"name": ["default", "x"]}, r"data\.name: .*BuilderConfig 'x' not found\. Available"),
    ],
)
def test_mistakes_in_lists_are_named(
    read: Read, folder: Path, path: Any, options: dict[str, Any], message: str, streaming: bool
) -> None:
    (folder / "README.md").write_text("about")
    place = [folder / name for name in path] if isinstance(path, list) else folder / path
    with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
        read(place, **options, streaming=streaming)


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return packed


@STREAMED
@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_compressed_files(read: Read, tmp_path: Path, kind: str, suffix: str, streaming: bool) -> None:
    rows = [{"text": "abc"}, {"text": "de"}]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    content = {"jsonl": lines, "json": json.dumps(rows), "csv": "text\nabc\nde\n", "txt": "abc\nde"}
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}[suffix]
    file = tmp_path / f"rows.{kind}.{suffix}"
    file.write_bytes(pack(content[kind].encode()))
    for path in (file, tmp_path / f"*.{kind}.*", [file]):
        if suffix == "zst" and importlib.util.find_spec("zstandard") is None:
            with pytest.raises(
                UserError, match=r"^data\.path: .* needs the package zstandard; install"
            ):
                read(path, streaming=streaming)
        else:
            rest = read(path, streaming=streaming)
            assert words(rest) == ("abc\nde" if kind == "txt" else "abc de")


@STREAMED
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_columns_inside_structs(read: Read, tmp_path: Path, form: str, streaming: bool) -> None:
    rows = [
        {"doc": {"text": text, "about": {"key": text.upper()}, "kept": [0]}, "doc.title": "top"}
        for text in ("a", "bc", "d")
    ]
    path = tmp_path / f"rows.{form}"
    if form == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    names = {"text_column": "doc.text", "id_column": "doc.about.key", "positions_column": "doc.kept"}
    inside = read(path, **names, streaming=streaming, batch_size=2)
    assert inside == [("A", "a"), ("BC", "bc"), ("D", "d")]
    assert words(read(path, text_column="doc.title", streaming=streaming)) == "top top top"
    for name in ("doc.body", "doc.text.body", "doc.about.key.x"):
        message = rf"no column '{name}'; choose from doc\.text, doc\.about\.key, doc\.kept, doc\.title$"
        with pytest.raises(UserError, match=message):
            read(path, text_column=name, streaming=streaming)


@STREAMED
def test_fields_are_listed_where_the_first_struct_is_null(
    read: Read, tmp_path: Path, streaming: bool
) -> None:
    table = pa.table({"doc": [None, {"text": "a"}]})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"no column 'doc\.body'; choose from doc\.text$"):
        read(tmp_path / "rows.parquet", text_column="doc.body", streaming=streaming)


@STREAMED
@pytest.mark.parametrize("null", [{"doc": None}, {"doc": {"text": None}}])
def test_a_null_inside_a_struct_is_named(
    read: Read, tmp_path: Path, null: dict[str, Any], streaming: bool
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"doc": {"text": "a"}}, null])
    with pytest.raises(UserError, match=r"^data\.text_column: row 1 has None in 'doc\.text', not a"):
        read(path, text_column="doc.text", streaming=streaming)


def test_ids_inside_structs_are_compared(read: Read, tmp_path: Path) -> None:
    rows = [{"doc": {"text": "a", "id": "x"}}, {"doc": {"text": "b", "id": "x"}}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"^data\.id_column: the id 'x' appears twice"):
            read(path, text_column="doc.text", id_column="doc.id", streaming=streaming)


def test_a_run_over_a_list_goes_on_and_is_verified(
    write_run: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(folder / "b.jsonl"), str(folder / "a.jsonl")]
    run = write_run(data={"path": paths})
    assert main(run) == 0
    root = tmp_path / "root"
    card = (root / "README.md").read_text()
    assert "texts of `b.jsonl and 1 more`" in card
    assert json.loads((root / "manifest.json").read_text())["settings"]["data"]["path"] == paths
    assert main(["verify", "--against-model", str(root)]) == 0
    assert main(["estimate", *run[1:]]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"2 of {paths[0]} and 1 more, split train" in told
    assert main(run) == 0
    longer = write_run(data={"path": [*paths, str(folder / "c.jsonl")]})
    assert main(longer) == 2
    assert "holds a run with other settings: data.path is [" in capsys.readouterr().err


def test_a_run_over_files_of_a_directory(
    write_run: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(data={"path": str(folder), "data_files": {"train": ["deep/*.jsonl"]}})
    assert main(run) == 0
    card = (tmp_path / "root" / "README.md").read_text()
    assert ", files `{'train': ['deep/*.jsonl']}`, split `train`, 2 examples" in card
    assert main(["verify", "--against-model", str(tmp_path / "root")]) == 0
    write_jsonl(folder / "deep" / "f.jsonl", [{"text": "f", "id": "id-f"}])
    assert main(run) == 0
    assert "3 examples" in (tmp_path / "root" / "README.md").read_text()
    whole = write_run(data={"path": str(folder), "data_files": None})
    assert main(whole) == 2
    assert 'data.data_files is {"train": ["deep/*.jsonl"]} there and not set here' in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_half_a_compressed_file_is_one_line(
    predict: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    streaming: bool,
) -> None:
    """What a download leaves that broke off."""
    whole = gzip.compress(b'{"id": "a", "text": "A"}\n' * 3000)
    path = tmp_path / "half.jsonl.gz"
    path.write_bytes(whole[:-40])
    assert predict(data={"path": str(path), "id_column": None, "streaming": streaming}) == 2
    assert "half.jsonl.gz can't be read" in error_line(capsys)
