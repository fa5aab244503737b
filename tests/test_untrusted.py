"""Files of a data root that somebody else has made: a fault is one line, nothing outside is touched."""

import copy
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from conftest import REPO, WriteRun
from loopback import LoopbackHub
from qk_sniffer.cli import main
from qk_sniffer.errors import UserError
from qk_sniffer.reading import Captures
from readers import error_line
from test_resume import interrupt

__all__ = ["interrupt"]

N_MUTATIONS = 30
HOSTILE = (
    *("../evil", "/etc", "l00h00q/../../evil", "..", "", "l00h00q\n", "l00h00x", ".journal", "~"),
    *("l000h00q", "l00h\u0661\u0661q", "l" + "9" * 5000 + "h00q", "\ud800"),
)
DEEP = 3000

Mutation = tuple[str, str]
"""What was changed, and the file's text then."""


def mutations(good: dict[str, Any], seed: int) -> Iterator[Mutation]:
    """Changes of a file of JSON, without end: each of one field, a name, the nesting or the bytes."""
    draw = random.Random(seed)
    while True:
        content = copy.deepcopy(good)
        place = draw.choice(list(_places(content)))
        kind = draw.choice(["value", "value", "drop", "name", "deep", "torn"])
        if kind == "torn":
            text = json.dumps(content)
            yield "torn", text[: draw.randrange(len(text))]
            continue
        if kind == "deep":
            yield f"deep at {place}", _with(content, place, "@").replace('"@"', "[" * DEEP + "]" * DEEP)
            continue
        if kind == "value":
            odd: list[Any] = [None, -1, 2**70, 1.5, math.inf, True, "x", [], {}, [[1]], {"rows": -1}]
            value = draw.choice([*odd, *HOSTILE])
            yield f"{place} is {value!r:.99}", _with(content, place, value)
            continue
        owner = _owner(content, place)
        if kind == "drop":
            del owner[place[-1]]
            yield f"{place} dropped", json.dumps(content)
        elif isinstance(owner, dict):
            name = draw.choice(HOSTILE)
            owner[name] = owner.pop(place[-1])
            yield f"{place} is called {name!r:.99}", json.dumps(content)


def _places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every field, and of a list or of many like fields the first."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items)[:12]:
        yield (*place, key)
        if isinstance(value, dict | list):
            yield from _places(value, (*place, key))


def _owner(content: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        content = content[key]
    return content


def _with(content: Any, place: tuple[Any, ...], value: Any) -> str:
    _owner(content, place)[place[-1]] = value
    return json.dumps(content)


@pytest.fixture(scope="module")
def hostile_seed() -> int:
    return int(os.environ.get("QK_SNIFFER_SEED", "16"))


@pytest.fixture
def outside(tmp_path: Path) -> Callable[[], dict[str, tuple[bytes, int]]]:
    """What lies where a believed name would lead, beside the data root; it must stay as it is."""
    for directory in ("evil", "elsewhere"):
        (tmp_path / "roots" / directory).mkdir(parents=True)
        (tmp_path / "roots" / directory / "data.parquet").write_bytes(b"someone's")
    (tmp_path / "roots" / "data.parquet").write_bytes(b"someone's")

    def state() -> dict[str, tuple[bytes, int]]:
        return {
            str(path): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted((tmp_path / "roots").rglob("*"))
            if path.is_file() and "root" not in path.relative_to(tmp_path / "roots").parts
        }

    return state


def refuses(run: Callable[[], Any], what: str, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether something is refused, in one line; an exception of another kind fails the test."""
    capsys.readouterr()
    try:
        status = run()
    except UserError as error:
        assert "\n" not in str(error), what
        return True
    except BaseException as error:
        raise AssertionError(f"{what}: {error!r}") from error
    assert status in (0, 1, 2, None), what
    if status == 2:
        assert error_line(capsys), what
    return status == 2


def read_all(captures: Captures) -> None:
    """Everything that a reader may ask for."""
    repr(captures)
    assert captures.examples.num_rows >= 0
    for head in captures.heads[:2]:
        head.numpy()
    head = captures.heads[0]
    captures.attention(head.layer.layer_idx, 0, int(captures.examples["example_id"][0].as_py()))


@pytest.fixture
def good(write_run: WriteRun, tmp_path: Path, outside: Any) -> tuple[list[str], Path]:
    """A finished run, and the command that goes on with it."""
    root = tmp_path / "roots" / "root"
    command = write_run(sniffer={"output": {"data_root": str(root)}})
    assert main(command) == 0
    shutil.copytree(root, tmp_path / "good")
    return command, root


def test_hostile_manifests(
    good: tuple[list[str], Path],
    outside: Any,
    tmp_path: Path,
    hostile_seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, root = good
    manifest = json.loads((root / "manifest.json").read_text())
    before, refused = outside(), 0
    drawn = mutations(manifest, hostile_seed)
    while refused < N_MUTATIONS:
        change, text = next(drawn)
        what = f"seed {hostile_seed}: {change}"
        (root / "manifest.json").write_text(text)
        is_refused = refuses(lambda: main(["verify", str(root)]), what, capsys)
        for run in (
            lambda: main(["push", str(root), "--hf_repo_id", REPO]),
            lambda: main(["report", str(root)]),
            lambda: main(command),
            lambda: main(["finalize", str(root)]),
            lambda: read_all(Captures(root)),
        ):
            assert refuses(run, what, capsys) or not is_refused, what
            assert outside() == before, what
            if not is_refused:
                break
        refused += is_refused
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "good", root)


def test_hostile_headers_and_publications(
    interrupt: Callable[..., int],
    write_run: WriteRun,
    outside: Any,
    tmp_path: Path,
    hostile_seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "roots" / "root"
    sections = {"output": {"data_root": str(root)}}
    interrupt(sniffer=sections)
    publication = {"repo_id": REPO, "branch": "b", "private": False, "replaces": None, "card": ""}
    (root / ".hub.json").write_text(json.dumps(publication))
    shutil.copytree(root, tmp_path / "good")
    command, before = write_run(sniffer=sections), outside()
    for name, files in ((".journal/header.json", 10), (".hub.json", 5)):
        drawn = mutations(json.loads((root / name).read_text()), hostile_seed)
        refused = 0
        while refused < files:
            change, text = next(drawn)
            what = f"{name}, seed {hostile_seed}: {change}"
            (root / name).write_text(text)
            finalizing = refuses(lambda: main(["finalize", str(root)]), what, capsys)
            if name == ".hub.json":
                push = ["push", str(root)]
                refused += refuses(lambda: main(push), what, capsys)  # noqa: B023
            else:
                refused += finalizing
                assert not finalizing or refuses(lambda: main(command), what, capsys), what
            assert outside() == before, what
            shutil.rmtree(root)
            shutil.copytree(tmp_path / "good", root)


def test_hostile_logs(
    interrupt: Callable[..., int],
    write_run: WriteRun,
    outside: Any,
    tmp_path: Path,
    hostile_seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Records of a journal that lead elsewhere, with the digests of whole ones, are left out."""
    root = tmp_path / "roots" / "root"
    sections = {"output": {"data_root": str(root)}}
    interrupt(sniffer=sections)
    log, before = root / ".journal" / "rank-00000" / "commits.jsonl", outside()
    lines = log.read_text().splitlines()
    record = json.loads(lines[0].partition(" ")[2])
    drawn = mutations(record, hostile_seed)
    for _ in range(10):
        text = next(drawn)[1]
        lines.append(f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}")
    lines.append("0" * 16 + " {}")
    log.write_text("".join(f"{line}\n" for line in lines if "\n" not in line))
    assert main(write_run(sniffer=sections)) == 0
    # One may claim another example for a batch that is there.
    assert main(["verify", str(root)]) in (0, 1)
    assert outside() == before


def repeated(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table])


def with_column(name: str, values: Callable[[Any], Any]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, pa.array(values(table[name])))

    return change


TABLES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "repeated ids": repeated,
    "no ids": lambda table: table.drop_columns(["example_id"]),
    "ids that are null": with_column("example_id", lambda ids: pa.array([None] * len(ids), pa.int32())),
    "ids that are texts": with_column("example_id", lambda ids: ["x"] * len(ids)),
    "negative lengths": with_column("n_tokens", lambda n: pa.array([-1] * len(n), pa.int32())),
    "huge ids": with_column("example_id", lambda ids: [2**40 + i for i in range(len(ids))]),
}


@pytest.mark.parametrize("case", [*TABLES, "torn", "a directory"])
def test_hostile_tables(
    case: str, good: tuple[list[str], Path], outside: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command, root = good
    path, before = root / "examples" / "data.parquet", outside()
    if case == "torn":
        path.write_bytes(path.read_bytes()[:-20])
    elif case == "a directory":
        path.unlink()
        path.mkdir()
    else:
        pq.write_table(TABLES[case](pq.read_table(path)), path)
    assert main(["verify", str(root)]) in (1, 2)
    for run in (lambda: main(command), lambda: read_all(Captures(root))):
        assert refuses(run, case, capsys), case
    assert outside() == before


def test_hostile_manifests_on_the_hub(
    hub: LoopbackHub,
    write_run: WriteRun,
    tmp_path: Path,
    outside: Any,
    hostile_seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A branch with a hostile manifest is read, and pulled into a new data root."""
    output = {"hf_repo_id": REPO, "hf_branch": "theirs", "data_root": str(tmp_path / "first")}
    assert main(write_run(sniffer={"output": output})) == 0
    files = hub.files(REPO, "theirs")
    manifest, before, refused = json.loads(files["manifest.json"]), outside(), 0
    root = tmp_path / "roots" / "root"
    command = write_run("pulling", sniffer={"output": output | {"data_root": str(root)}})
    drawn = mutations(manifest, hostile_seed + 1)
    while refused < 8:
        change, text = next(drawn)
        what = f"seed {hostile_seed + 1}: {change}"
        hub.commit(REPO, "theirs", {"manifest.json": text.encode()})
        is_refused = refuses(lambda: read_all(Captures(REPO, "theirs")), what, capsys)
        if is_refused:
            refuses(lambda: main(command), what, capsys)
        refused += is_refused
        assert outside() == before, what
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize(
    "name",
    [
        "l00h00q",
        "examples",
        "report",
        ".journal",
        "l01h01k/data.parquet",
        ".owner.json",
        ".owner-ranks",
    ],
)
def test_no_link_leads_out_of_a_data_root(
    name: str,
    good: tuple[list[str], Path],
    outside: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, root = good
    path, target = root / name, tmp_path / "roots" / "evil"
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    is_file = name.endswith((".parquet", ".json", "-ranks"))
    path.symlink_to(target / "data.parquet" if is_file else target)
    before = outside()
    for run in (
        lambda: main(command),
        lambda: main([*command, "--sniffer.output.overwrite", "true"]),
        lambda: main(["verify", str(root)]),
        lambda: main(["report", str(root)]),
        lambda: main(["finalize", str(root)]),
        lambda: main(["push", str(root), "--hf_repo_id", REPO]),
        lambda: Captures(root),
    ):
        assert refuses(run, name, capsys)
        assert outside() == before
    assert main(["verify", str(root)]) == 2
    assert error_line(capsys).startswith(f"{path}: a link to {target}")


@pytest.mark.parametrize(
    "name", ["manifest.json", "l00h00q/data.parquet", "examples", ".hub.json", ".owner.json"]
)
def test_a_pipe_is_not_waited_for(
    name: str, good: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command, root = good
    path = root / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for run in (
        lambda: main(command),
        lambda: main(["verify", str(root)]),
        lambda: main(["finalize", str(root)]),
        lambda: main(["push", str(root), "--hf_repo_id", REPO]),
        lambda: Captures(root),
    ):
        assert refuses(run, name, capsys)
    assert main(["verify", str(root)]) == 2
    assert error_line(capsys) == f"{path}: neither a file nor a directory; remove it"


def test_links_that_stay_inside_are_read(good: tuple[list[str], Path], tmp_path: Path) -> None:
    """As in the Hub client's cache, where every file is a link to one beside the snapshots."""
    root, cache = good[1], tmp_path / "datasets--some--one"
    snapshot, blobs = cache / "snapshots" / ("a" * 40), cache / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in sorted(root.rglob("*")):
        place = snapshot / path.relative_to(root)
        if path.is_dir():
            place.mkdir()
        else:
            blob = blobs / xxhash.xxh3_64_hexdigest(str(path).encode())
            shutil.copy(path, blob)
            place.symlink_to(os.path.relpath(blob, place.parent))
    assert main(["verify", str(snapshot)]) == 0
    read_all(Captures(snapshot))
    (root / "l00h00q" / "data.parquet").rename(root / "l00h00q" / "moved")
    (root / "l00h00q" / "data.parquet").symlink_to("moved")
    assert main(["verify", str(root)]) == 0


def test_a_file_that_is_being_written_is_no_link(
    good: tuple[list[str], Path], outside: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, root = good
    (root / ".manifest.json.tmp").symlink_to(tmp_path / "roots" / "data.parquet")
    before = outside()
    assert main(command) == 2
    assert error_line(capsys).startswith(f"{root / '.manifest.json.tmp'}: a link to")
    assert outside() == before


def vectors_of(change: Callable[[Any], Any]) -> Callable[[pa.Table], pa.Table]:
    return with_column("vector", lambda vectors: change(vectors.combine_chunks()))


HEADS: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "other width": (
        vectors_of(
            lambda v: pa.FixedSizeListArray.from_arrays(v.flatten(), v.type.list_size // 2)[: len(v)]
        ),
        "other columns than the schema has, see vector",
    ),
    "texts for numbers": (with_column("position", lambda p: ["x"] * len(p)), "see position"),
    "no ids": (lambda table: table.drop_columns(["example_id"]), "see example_id"),
    "ids that are null": (
        with_column("example_id", lambda ids: pa.array([None] * len(ids), pa.int32())),
        "example_id has no value in some rows",
    ),
    "vectors that are null": (
        vectors_of(lambda v: pa.array([None] * len(v), v.type)),
        "vector has no value in some rows",
    ),
    "vectors with gaps": (
        vectors_of(lambda v: pa.array([[None] * v.type.list_size] * len(v), v.type)),
        "some vectors have gaps",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_hostile_heads(
    case: str, good: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A head's file with other columns or without values, which a manifest describes as it is."""
    command, root = good
    change, fault = HEADS[case]
    assert main([*command, "--data.max_samples", "3", "--sniffer.output.overwrite", "true"]) == 0
    path = root / "l00h00q" / "data.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    manifest = json.loads((root / "manifest.json").read_text())
    content = path.read_bytes()
    digest = xxhash.xxh3_128_hexdigest(content)
    manifest["heads"]["l00h00q"] |= {"bytes": len(content), "xxh3_128": digest}
    (root / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(["verify", str(root)]) == 1
    if "vector has" not in fault and "gaps" not in fault:
        assert fault in capsys.readouterr().out
    head = Captures(root).head(layer=0, head=0)
    for read in (head.numpy, head.torch, lambda: list(head.batches(7)), lambda: head.arrow()):
        with pytest.raises(UserError, match=fault):
            read()
    assert main(["report", str(root)]) == 2
    assert fault in error_line(capsys)
    # One more text, which is merged into the file.
    assert main([*command, "--data.max_samples", "null"]) == 2
    assert fault in error_line(capsys)


def test_code_that_a_manifest_names_runs_when_it_is_trusted(
    good: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, models = good[1], tmp_path / "theirs"
    (models / "llama").mkdir(parents=True)
    (models / "llama" / "modeling_llama.py").write_text("raise RuntimeError('their code ran')")
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["settings"]["model"]["models_dir"] = str(models)
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(root), "--against-model"]) == 2
    line = error_line(capsys)
    assert f"model.models_dir is {json.dumps(str(models))}" in line
    assert line.endswith("if you trust it, add --trust-code")
    assert main(["verify", str(root), "--against-model", "--trust-code"]) == 2
    assert "RuntimeError: their code ran" in error_line(capsys)


def test_a_sampler_that_a_manifest_names_is_imported_when_it_is_trusted(
    good: tuple[list[str], Path], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root, theirs = good[1], tmp_path / "their_sampler.py"
    theirs.write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    monkeypatch.syspath_prepend(str(tmp_path))
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["settings"]["capture"]["sampler"]["type"] = "their_sampler.Theirs"
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(root)]) == 2
    line = error_line(capsys)
    assert f"{root / 'manifest.json'}: sniffer.capture.sampler.type is" in line
    assert not (tmp_path / "ran").exists()
    assert main(["verify", str(root), "--trust-code"]) == 2
    assert (tmp_path / "ran").exists()


HUGE = 10**400


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("settings", "capture", "sampler", "base_rate"), 1e-300),
        (("settings", "capture", "sampler", "base_rate"), HUGE),
        (("settings", "capture", "layers"), [5]),
        (("layers", 0, "scores", "scaling"), HUGE),
        (("layers", 0, "scores", "scaling"), 10**30),
        (("layers", 0, "scores", "alibi_slopes"), [HUGE] * 4),
    ],
)
def test_numbers_that_no_run_has(
    place: tuple[Any, ...], value: Any, good: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = good[1]
    manifest = json.loads((root / "manifest.json").read_text())
    _owner(manifest, place)[place[-1]] = value
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(root)]) == 2
    assert error_line(capsys).startswith(f"{root / 'manifest.json'}: damaged, ")


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "manifest.json",
        "config.yaml",
        ".hub.json",
        ".owner.json",
        ".journal",
        ".pulled",
        "report",
    ],
)
def test_a_directory_for_a_file_and_a_file_for_a_directory(
    name: str, good: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command, root = good
    path = root / name
    if is_file := "." in name[1:]:
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        path.write_text("")
    for run in (command, ["verify", str(root)], ["finalize", str(root)], ["report", str(root)]):
        capsys.readouterr()
        assert main(run) == 2
        line = error_line(capsys)
        assert line.startswith(f"{path}: {'a directory' if is_file else 'a file'}, where "), line


def test_settings_that_no_run_has_are_not_read_again(
    good: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = good[1]
    whole = json.loads((root / "manifest.json").read_text())
    for section, change in (
        ("model", {"evil": 1}),
        ("model", {"attn_implementation": ["eager"]}),
        ("data", {"num_workers": "many"}),
    ):
        manifest = copy.deepcopy(whole)
        manifest["settings"][section] |= change
        (root / "manifest.json").write_text(json.dumps(manifest))
        assert main(["verify", str(root), "--against-model"]) == 2
        line = error_line(capsys)
        assert "manifest.json: damaged, its settings are no run's" in line
        assert next(iter(change)) in line


CARDS = {
    "latin": "---\nlicense: mit\n---\n\nCaptur\xe9".encode("latin-1"),
    "names of two types": b"---\n1: a\nb: c\n---\n",
    "tags of tags": b"---\ntags: [[a], {b: c}]\n---\n",
    "one tag, a number": b"---\ntags: 5\n---\n",
    "a list that holds itself": b"---\na: &a [*a]\n---\n",
    "an object of Python": b"---\na: !!python/object/apply:os.system ['touch evil']\n---\n",
    "deep": b"---\na: " + b"[" * DEEP + b"]" * DEEP + b"\n---\n",
}


@pytest.mark.parametrize("case", CARDS)
def test_hostile_cards(
    case: str,
    hub: LoopbackHub,
    good: tuple[list[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are refused before a run, not when all texts are read, and on the Hub before a push."""
    command, root = good
    assert main(["push", str(root), "--hf_repo_id", REPO, "--hf_branch", "b"]) == 0
    hub.commit(REPO, "b", {"README.md": CARDS[case]})
    assert refuses(lambda: main(["push", str(root)]), case, capsys)
    (root / "README.md").write_bytes(CARDS[case])
    before = sorted(path.name for path in root.iterdir())
    assert main([*command, "--sniffer.output.overwrite", "true"]) == 2
    assert error_line(capsys).startswith("README.md: ")
    assert sorted(path.name for path in root.iterdir()) == before


def test_a_data_root_may_be_a_link_itself(good: tuple[list[str], Path], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(good[1])
    assert main(["verify", str(link)]) == 0
    assert Captures(link).heads
