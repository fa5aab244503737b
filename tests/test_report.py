"""``qk-sniffer report``: the page, its pictures, the card that shows them, and what they show."""

import io
import re
import shutil
import subprocess
import warnings
from base64 import b64decode
from collections.abc import Callable
from functools import partial
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from conftest import REPO, Run, write_jsonl
from families import FAMILIES, tiny_model
from loopback import LoopbackHub
from qk_sniffer import Captures, sniff
from qk_sniffer.cli import main
from qk_sniffer.geometry import positional_r2, principal_components
from qk_sniffer.pictures import AttentionMap, draw_attention, new_axes
from qk_sniffer.report.measures import measure, measured_texts
from qk_sniffer.report.moments import measure_moments
from qk_sniffer.report.themes import picture
from qk_sniffer.storage import remove_report
from readers import eager_attention, error_line, softmax_means_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TOKENS = {"capture_token_strings": True, "min_bucket_size": 16}
PICTURES = {
    "rows-queries", "rows-keys", "positional-r2-queries", "positional-r2-keys", "norms-queries",
    "norms-keys", *(f"components-{i}{kind}" for i in (1, 2, 3) for kind in "qk"),
    *(f"predictions-{i}{kind}" for i in (1, 2, 3) for kind in "qk"),
    *(f"norms-by-{what}-{i}" for what in ("position", "pair") for i in (1, 2, 3)),
    *(f"attention-{i}" for i in (1, 2, 3)), "attention-by-distance", "attention-to-first",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would fetch for a page, and its pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.resources: list[str] = []
        self.pictures: dict[str, list[str]] = {"img": [], "source": []}
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        values = dict(attributes)
        if tag == "img":
            assert values["alt"]
        if tag in self.pictures:
            self.pictures[tag].append(values["src" if tag == "img" else "srcset"])
        self.resources += [values[key] for key in ("src", "href", "srcset") if key in values]


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def data_of(uri: str) -> bytes:
    head, _, content = uri.partition(",")
    assert head == "data:image/png;base64"
    return b64decode(content)


def test_a_page_with_all_pictures_inside(
    predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(sniffer={"capture": TOKENS}) == 0
    root = tmp_path / "root"
    capsys.readouterr()
    assert main(["report", str(root)]) == 0
    assert capsys.readouterr().out == f"report   {root}/report/index.html\n"
    page = Page(root / "report" / "index.html")
    assert page.resources
    assert all(uri.startswith("data:") for uri in page.resources)
    assert "url(" not in page.text and "@import" not in page.text
    files = {path.stem: path.read_bytes() for path in (root / "report").glob("*.png")}
    assert set(files) == PICTURES
    light = [data_of(uri) for uri in page.pictures["img"]]
    assert sorted(light) == sorted(files.values())
    for data, dark in zip(light, map(data_of, page.pictures["source"]), strict=True):
        assert pixels(data)[0, 0].min() > 250
        assert pixels(dark)[0, 0].max() < 60
        assert pixels(data).shape == pixels(dark).shape
        assert len(np.unique(pixels(data).reshape(-1, 3), axis=0)) > 20
    assert main(["verify", str(root)]) == 0


def test_the_card_shows_pictures_until_they_are_old(predict: Run, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert predict(data={"max_samples": 5}) == 0
    report = ["report", str(root), "--heads", "l00h00q"]
    assert main(report) == 0
    card = (root / "README.md").read_text()
    shown = re.findall(r"!\[(.+)\]\((.+)\)", card)
    assert len(shown) == 4
    assert all(caption and (root / path).exists() for caption, path in shown)
    head = datasets.load_dataset(str(root), "l00h00q", split="train")
    assert head.num_rows == pq.read_metadata(root / "l00h00q" / "data.parquet").num_rows
    assert main(report) == 0
    assert (root / "README.md").read_text() == card
    (root / "report" / "mine.png").write_bytes(b"a picture of hers")
    assert predict() == 0
    assert [path.name for path in (root / "report").iterdir()] == ["mine.png"]
    assert "![" not in (root / "README.md").read_text()
    assert main(report) == 0
    assert predict(sniffer={"output": {"overwrite": True}}) == 0
    assert [path.name for path in (root / "report").iterdir()] == ["mine.png"]


def test_the_pictures_are_published_and_withdrawn(
    hub: LoopbackHub, predict: Run, tmp_path: Path
) -> None:
    published = {"output": {"hf_repo_id": REPO, "hf_branch": "tiny"}}
    root = tmp_path / "root"
    assert predict(data={"max_samples": 5}, sniffer=published) == 0
    assert main(["report", str(root), "--heads", "l00h00q"]) == 0
    assert f'load_dataset("{REPO}", "l00h00q", revision="tiny"' in (root / "README.md").read_text()
    assert main(["push", str(root)]) == 0
    files = hub.files(REPO, "tiny")
    expected = {f"report/{path.name}": path.read_bytes() for path in (root / "report").iterdir()}
    assert {path: data for path, data in files.items() if path.startswith("report/")} == expected
    assert b"](report/components-1q.png)" in files["README.md"]
    commits = len(hub.commits(REPO, "tiny"))
    assert main(["push", str(root)]) == 0
    assert len(hub.commits(REPO, "tiny")) == commits
    assert "Captures(&quot;someone/attention&quot;, revision=&quot;tiny&quot;)" in (
        files["report/index.html"].decode()
    )
    # Another machine with the same rows and no report.
    assert predict("other", data={"max_samples": 5}, sniffer=published) == 0
    assert main(["push", str(tmp_path / "other")]) == 0
    again = hub.files(REPO, "tiny")
    assert again | {"config.yaml": files["config.yaml"]} == files
    hub.commit(REPO, "tiny", {"report/notes.md": b"hers"})
    (root / "report" / "notes").mkdir()
    assert predict(sniffer=published) == 0
    left = [path for path in hub.files(REPO, "tiny") if path.startswith("report/")]
    assert left == ["report/notes.md"]
    assert b"](report/" not in hub.files(REPO, "tiny")["README.md"]


def test_what_is_measured(predict: Run, tmp_path: Path) -> None:
    assert predict(sniffer={"capture": {"heads": [0, 2], "layers": [1, 3], "min_bucket_size": 16}}) == 0
    root = tmp_path / "root"
    captures = Captures(root)
    texts = measured_texts(captures)
    assert texts == captures.examples["example_id"].to_pylist()
    found = measure(captures, texts, lambda heads, total: heads)
    assert list(found) == ["q", "k"]
    queries = found["q"]
    assert (queries.norms.layers, queries.norms.heads) == ([1, 3], [0, 1, 2])
    assert np.isnan(queries.norms.values[:, 1]).all()
    for row, layer in enumerate((1, 3)):
        table = pq.read_table(root / f"l0{layer}h02q" / "data.parquet").to_pandas()
        vectors = np.stack(table["vector"])
        norm = np.sqrt((vectors.astype(float) ** 2).sum(axis=1)).mean()
        assert queries.norms.values[row, 2] == pytest.approx(norm, rel=1e-5)
        assert queries.r2.values[row, 2] == positional_r2(vectors, table.position, table.example_id)
        rows = table.groupby("bucket").size()
        assert dict(zip(queries.buckets, queries.rows[row].tolist(), strict=True)) == rows.to_dict()


def test_only_some_texts_of_a_large_capture_are_measured(
    predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predict() == 0
    monkeypatch.setattr("qk_sniffer.report.measures.ROWS_MEASURED", 60)
    captures = Captures(tmp_path / "root")
    texts = measured_texts(captures)
    assert len(texts) == 3
    found = measure(captures, texts, lambda heads, total: heads)
    assert found["q"].n_texts == 3
    rows = captures.head(0, 0).where(example=texts).numpy()
    norm = np.linalg.norm(rows["vector"], axis=1).mean()
    assert found["q"].norms.values[0, 0] == pytest.approx(norm, rel=1e-6)
    assert found["q"].rows.sum() == 4 * len(captures.head(0, 0)), "rows are counted in all texts"


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        ({"capture_keys": False}, "one was not captured"),
        ({"capture_queries": False}, "one was not captured"),
        ({"capture_keys": False, "capture_softmax": True}, "one was not captured"),
        ({"capture_pre_rope": True}, "the vectors are those before RoPE"),
        (
            {"layers": [2], "heads": [1], "min_bucket_size": 64, "sampler": {"type": "uniform"}},
            "no key of this text was kept",
        ),
    ],
    ids=["queries", "keys", "no-keys-but-statistics", "pre-rope", "few-rows"],
)
def test_captures_that_lack_something(
    capture: dict[str, Any], reason: str, predict: Run, tmp_path: Path
) -> None:
    assert predict(sniffer={"capture": capture}) == 0
    assert main(["report", str(tmp_path / "root")]) == 0
    text = (tmp_path / "root" / "report" / "index.html").read_text()
    assert re.search(f"Not shown: .*{reason}", text)


STATISTICS = {
    "capture_softmax": True,
    "local_positions": 8,
    "sampler": {"type": "uniform", "base_rate": 5},
    "min_bucket_size": 8,
}


def test_maps_of_the_statistics(
    predict: Run, tmp_path: Path, model_dir: Callable[[str], Path], texts: list[dict[str, Any]]
) -> None:
    """Against eager attention, of the queries whose keys are not all local."""
    assert predict(sniffer={"capture": STATISTICS}) == 0
    root = tmp_path / "root"
    captures = Captures(root)
    found = measure(captures, measured_texts(captures), lambda heads, total: heads)
    assert found["k"].softmax == {}
    assert found["q"].first_query == 8
    eager, names = eager_attention(model_dir("llama"), texts), captures.source_ids()
    expected = {
        head: softmax_means_of(head.where(position=range(8, 99)), names, eager, 8)
        for head in captures.heads
        if head.kind == "q"
    }
    for head, means in expected.items():
        for name, mean in means.items():
            assert found["q"].softmax[name].of(head) == pytest.approx(mean, abs=1e-5)
    assert main(["report", str(root)]) == 0
    page = Page(root / "report" / "index.html").text
    captions = dict(re.findall(r"<figcaption>([^:<]*?(?:nats|token|positions|before)): (.*)<", page))
    by_mean = {
        name: sorted(expected, key=lambda head, name=name: expected[head][name])
        for name in ("entropy", "sink_prob", "local_prob", "previous")
    }
    told = {
        name: [f"{head.name} ({expected[head][name]:.2f})" for head in (heads[0], heads[-1])]
        for name, heads in by_mean.items()
    }
    n_local = sum(means["local_prob"] > 0.5 for means in expected.values())
    assert 0 < n_local < len(expected)
    assert captions == {
        "Entropy, in nats": f"least in {told['entropy'][0]}, most in {told['entropy'][1]}",
        "Mass on the first token": f"more than half in no head, most in {told['sink_prob'][1]}",
        "Mass on the last 8 positions": f"more than half in {n_local} of {len(expected)} heads, "
        f"most in {told['local_prob'][1]}",
        "Share attending most to the token before": "more than half in no head, "
        f"most in {told['previous'][1]}",
    }
    assert "kept queries from position 8 on" in page
    drawn = {path.stem for path in (root / "report").glob("softmax-*")}
    assert drawn == {f"softmax-{name}" for name in told}


def test_where_all_keys_are_local_no_map_says_so(predict: Run, tmp_path: Path) -> None:
    assert predict(sniffer={"capture": STATISTICS | {"local_positions": 61}}) == 0
    root = tmp_path / "root"
    assert main(["report", str(root), "--heads", "l00h00q"]) == 0
    drawn = {path.stem for path in (root / "report").glob("softmax-*")}
    assert drawn == {"softmax-entropy", "softmax-sink_prob", "softmax-previous"}
    assert "means over the kept queries, of 7 texts" in Page(root / "report" / "index.html").text


ALL = {"rows", "norms", "positional-r2"}


@pytest.mark.parametrize(
    ("kinds", "title", "expected"),
    [
        ("v", "Values", {f"{what}-values" for what in ALL} | {"components-1v", "norms-by-position-1"}),
        (
            "o",
            "Outputs",
            {f"{what}-outputs" for what in ALL} | {"components-1o", "norms-by-position-1"},
        ),
        (
            "qv",
            "Queries and values",
            {f"{what}-{kind}" for what in ALL for kind in ("queries", "values")}
            | {"components-1q", "norms-by-position-1", "norms-by-pair-1", "norms-mixed-1"},
        ),
        (
            "qkvo",
            "Queries, keys, values and outputs",
            {f"{what}-{kind}" for what in ALL for kind in ("queries", "keys")}
            | {f"{what}-{kind}" for what in ALL - {"rows"} for kind in ("values", "outputs")}
            | {"components-1q", "components-1k", "norms-by-position-1", "norms-by-pair-1"}
            | {"norms-mixed-1", "attention-1"},
        ),
    ],
)
def test_values_and_outputs(
    kinds: str, title: str, expected: set[str], predict: Run, tmp_path: Path
) -> None:
    names = {"q": "queries", "k": "keys", "v": "values", "o": "outputs"}
    capture = {f"capture_{name}": kind in kinds for kind, name in names.items()}
    few = {"sampler": {"type": "uniform", "base_rate": 4}, "min_bucket_size": 8, "layers": [1, 2]}
    assert predict(sniffer={"capture": capture | few}) == 0
    root = tmp_path / "root"
    wanted = f"l01h01{kinds[0]}"
    assert main(["report", str(root), "--heads", wanted]) == 0
    names_of_pictures = {path.stem for path in (root / "report").glob("*.png")}
    assert {name for name in names_of_pictures if not name.startswith("predictions")} == expected
    page = Page(root / "report" / "index.html").text
    assert f"<h1>{title} of llama" in page
    same = {"qkvo": ("queries and outputs", "keys and values")}.get(kinds, ())
    assert all(f"Rows of {pair} by layer" in page for pair in same)
    if "norms-mixed-1" in expected:
        mixed = "values and outputs" if "o" in kinds else "values"
        assert f"Norms by position of the {mixed} of l01h01q" in page
    assert ("RoPE included" in page) == ("q" in kinds)
    assert ("RoPE turns no values" in page) == (not {"v", "o"}.isdisjoint(kinds))
    (root / "report" / "mine.png").write_bytes(b"a picture of hers")
    remove_report(root)
    assert [path.name for path in (root / "report").iterdir()] == ["mine.png"]


def test_norms_of_what_a_head_mixes(
    predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values are those of the key head that serves the query head."""
    assert predict(sniffer={"capture": {"capture_values": True, "capture_outputs": True}}) == 0
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "qk_sniffer.report.closeups.draw_norms_by_position",
        lambda axes, curves: drawn.append(curves),
    )
    root = tmp_path / "root"
    assert main(["report", str(root), "--heads", "l02h03q"]) == 0
    assert list(drawn[0]) == ["queries of l02h03q", "keys of l02h01k"]
    assert list(drawn[-1]) == ["values of l02h01v", "outputs of l02h03o"]
    for label, (positions, norms) in drawn[-1].items():
        rows = pq.read_table(root / label.split()[-1] / "data.parquet")
        assert positions.tolist() == rows["position"].to_pylist()
        np.testing.assert_allclose(norms, np.linalg.norm(np.stack(rows["vector"].to_numpy()), axis=1))


def test_attention_on_average_of_a_sample_with_statistics(
    predict: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_dir: Callable[[str], Path],
    texts: list[dict[str, Any]],
) -> None:
    """Eager attention of the pairs that were kept, and that to the first token of all kept queries."""
    assert predict(sniffer={"capture": STATISTICS}) == 0
    root = tmp_path / "root"
    drawn: dict[str, Any] = {}
    for name in ("draw_attention_by_distance", "draw_attention_to_first"):
        monkeypatch.setattr(
            f"qk_sniffer.report.attention.{name}",
            lambda axes, curves, name=name: drawn.update({name: curves}),
        )
    monkeypatch.setattr("qk_sniffer.report.attention._LEAST_PAIRS", 0.0)
    assert main(["report", str(root), "--heads", "l01h02q"]) == 0
    assert "Of the pairs of a query and a key that were kept" in (
        (root / "report" / "index.html").read_text()
    )
    captures, eager = Captures(root), eager_attention(model_dir("llama"), texts)
    by_distance: dict[int, list[float]] = {}
    to_first = []
    for example, name in captures.source_ids().items():
        heads = [captures.head(1, 2), captures.head(1, 1, "k")]
        queries, keys = (h.where(example=example).numpy()["position"].tolist() for h in heads)
        p = eager[name][1][2].numpy()
        if queries and keys:
            to_first += [(query, p[query, 0]) for query in queries if query]
        for query in queries:
            for key in keys:
                if key <= query:
                    by_distance.setdefault(query - key, []).append(p[query, key])
    label = "l01h02q with l01h01k"
    distances, means = drawn["draw_attention_by_distance"][label]
    assert distances.tolist() == sorted(by_distance)
    expected = [np.mean(by_distance[distance]) for distance in sorted(by_distance)]
    np.testing.assert_allclose(means, expected, atol=1e-6)
    positions, shares = drawn["draw_attention_to_first"][label]
    found = sorted(zip(positions.tolist(), shares.tolist(), strict=True))
    np.testing.assert_allclose(found, sorted(to_first), atol=1e-6)


def test_the_card_tells_of_values_outputs_and_statistics(predict: Run, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert predict(sniffer={"capture": {"layers": [0]}}) == 0
    plain = (root / "README.md").read_text()
    assert "# Queries and keys of llama" in plain
    assert "Query (`q`) and key (`k`) vectors of" in plain
    assert "- 4 query heads and 2 key heads, in 1 layers\n- vectors that the attention" in plain
    assert "the head's query or key |" in plain
    assert not re.search(
        "value|output|softmax|lse", plain.partition("---\n\n")[2].partition("## Lic")[0]
    )
    rich = STATISTICS | {"capture_values": True, "capture_outputs": True, "layers": [0]}
    assert predict("rich", sniffer={"capture": rich}) == 0
    root = tmp_path / "rich"
    assert main(["report", str(root), "--heads", "l00h00q"]) == 0
    card = (root / "README.md").read_text()
    for words in (
        "# Queries, keys, values and outputs of llama",
        "Query (`q`), key (`k`), value (`v`) and output (`o`) vectors of",
        "- 4 query heads, 2 key heads, 2 value heads and 4 output heads, in 1 layers",
        "Values (`v`) are numbered as keys and outputs (`o`) as queries.",
        "- statistics of the softmax of each query",
        "the head's query, key, value or output |",
        "the last 8 positions, the query's own included |",
    ):
        assert words in card
    table = card.partition("## Columns")[2].partition("## Rows")[0]
    _, *columns = re.findall(r"^\| (\w+) \|", table, re.MULTILINE)
    assert columns == pq.read_schema(root / "l00h00q" / "data.parquet").names
    shown = re.findall(r"!\[.+\]\(report/(.+)\.png\)", card)
    softmax = [f"softmax-{name}" for name in ("entropy", "sink_prob", "local_prob", "previous")]
    assert [name for name in shown if name.startswith("softmax")] == softmax
    assert {"norms-values", "norms-outputs"} < set(shown)
    assert all((root / "report" / f"{name}.png").exists() for name in shown)


def test_heads_and_text_of_ones_choice(predict: Run, tmp_path: Path) -> None:
    assert predict(sniffer={"capture": TOKENS}) == 0
    root = str(tmp_path / "root")
    assert main(["report", root, "--heads", "l02h03q", "l01h00k", "--example", "topic-2"]) == 0
    text = (tmp_path / "root" / "report" / "index.html").read_text()
    assert "<code>l02h03q with l02h01k</code>, <code>l01h00k</code>" in text
    assert "in the text &quot;topic-2&quot;:" in text
    assert text.count("Attention of l02h03q to l02h01k") == 2
    assert "Attention of l01h00k" not in text


def test_heads_are_chosen_by_their_r2(predict: Run, tmp_path: Path) -> None:
    assert predict(sniffer={"capture": {"layers": [1, 3]}}) == 0
    captures = Captures(tmp_path / "root")
    found = measure(captures, measured_texts(captures), lambda heads, total: heads)["q"].r2
    ranked = sorted(
        (head for head in captures.heads if head.kind == "q"),
        key=lambda head: found.values[[1, 3].index(head.layer.layer_idx), head.head],
    )
    assert main(["report", str(tmp_path / "root")]) == 0
    text = (tmp_path / "root" / "report" / "index.html").read_text()
    shown = re.findall(r"<code>(l\d+h\d+q) with l\d+h\d+k</code>", text)
    assert shown == [ranked[-1].name, ranked[3].name, ranked[0].name]


def test_an_attention_map_has_the_first_queries_and_the_keys_before_them(
    predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = {"capture_token_strings": True, "sampler": {"type": "uniform", "base_rate": 5}}
    assert predict(sniffer={"capture": capture | {"min_bucket_size": 8}}) == 0
    drawn: list[Any] = []

    def spy(axes: Any, attention: AttentionMap) -> None:
        drawn.append(attention)
        draw_attention(axes, attention)

    monkeypatch.setattr("qk_sniffer.report.attention.draw_attention", spy)
    monkeypatch.setattr("qk_sniffer.reading.plots._MOST_QUERIES", 12)
    root = tmp_path / "root"
    assert main(["report", str(root), "--heads", "l01h02q", "--example", "topic-2"]) == 0
    captures = Captures(root)
    rows = [
        head.where(example="topic-2").pandas()
        for head in (captures.head(1, 2), captures.key_head(1, 2))
    ]
    queries, keys = rows[0][:12], rows[1][rows[1].position <= rows[0].position[11]]
    assert len(rows[0]) > 12 and 0 < len(keys) < len(rows[1])
    for labels, expected in (
        (drawn[0].query_labels, queries),
        (drawn[0].key_labels, keys),
    ):
        assert [label.split()[0] for label in labels] == [str(p) for p in expected.position]
        assert [label.split()[1] for label in labels] == [
            token.replace("Ġ", "·").replace("Ċ", "↵") for token in expected.token_str
        ]
    attention = captures.attention(1, 2, "topic-2").among_kept
    np.testing.assert_array_equal(drawn[0].shares, attention[:12, : len(keys)])
    later = keys.position.to_numpy() > queries.position.to_numpy()[:, None]
    assert later.any()
    np.testing.assert_array_equal(drawn[0].is_attended, ~later)
    text = (root / "report" / "index.html").read_text()
    assert "Rows and columns are different samples of positions" in text
    assert drawn[0].measure == "share among the keys kept"


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_attention_on_average_is_the_models_own(
    family: str, predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against loops over the probabilities; Mistral's window hides the first token from later ones."""
    assert predict(family=family) == 0
    root = tmp_path / "root"
    drawn: dict[str, Any] = {}
    for name in ("draw_attention_by_distance", "draw_attention_to_first"):
        monkeypatch.setattr(
            f"qk_sniffer.report.attention.{name}",
            lambda axes, curves, name=name: drawn.update({name: curves}),
        )
    monkeypatch.setattr("qk_sniffer.report.attention._LEAST_PAIRS", 0.0)
    assert main(["report", str(root), "--heads", "l01h02q"]) == 0
    captures = Captures(root)
    by_distance: dict[int, list[float]] = {}
    to_first = []
    for text in captures.examples["example_id"].to_pylist():
        probabilities = captures.attention(1, 2, text).probabilities.numpy()
        for query, row in enumerate(probabilities):
            window = captures.layers[1].sliding_window or 1_000
            for key in range(max(0, query - window + 1), query + 1):
                by_distance.setdefault(query - key, []).append(row[key])
            if 0 < query < window:
                to_first.append((query, row[0]))
    label = "l01h02q with l01h01k"
    distances, means = drawn["draw_attention_by_distance"][label]
    expected = {distance: np.mean(found) for distance, found in by_distance.items()}
    assert distances.tolist() == sorted(expected)
    np.testing.assert_allclose(means, [expected[d] for d in sorted(expected)], rtol=1e-5)
    positions, shares = drawn["draw_attention_to_first"][label]
    assert sorted(zip(positions.tolist(), shares.tolist(), strict=True)) == sorted(to_first)


def test_means_take_texts_that_were_kept_whole(predict: Run, tmp_path: Path) -> None:
    sampler = {"type": "uniform", "base_rate": 3}
    assert predict(sniffer={"capture": {"sampler": sampler, "min_bucket_size": 8}}) == 0
    assert main(["report", str(tmp_path / "root"), "--heads", "l01h02q"]) == 0
    text = (tmp_path / "root" / "report" / "index.html").read_text()
    assert "Not shown: it takes texts whose queries and keys were all kept" in text


def test_captions_say_why_heads_were_chosen(predict: Run, tmp_path: Path) -> None:
    assert predict(sniffer={"capture": {"layers": [1, 3]}}) == 0
    assert main(["report", str(tmp_path / "root")]) == 0
    text = (tmp_path / "root" / "report" / "index.html").read_text()
    captions = re.findall(r"<figcaption>(Queries of .*: .*|Keys of .*: .*)</figcaption>", text)
    assert len(captions) == 6
    for caption, place in zip(captions[::2], ("highest", "middle", "lowest"), strict=True):
        assert re.search(
            rf"positional R² -?\d\.\d\d, the {place} of the query heads\): .*component", caption
        )


def test_what_is_not_known_of_a_model_is_left_out(tmp_path: Path) -> None:
    """``sniff`` knows neither revision nor implementation."""
    model = tiny_model(FAMILIES["llama"]).eval()
    with torch.no_grad(), sniff(model, heads=[0]) as captured:
        model(input_ids=torch.arange(2, 40)[None])
    captured.save(tmp_path / "saved")
    assert main(["report", str(tmp_path / "saved")]) == 0
    assert "<code>None</code>" not in (tmp_path / "saved" / "report" / "index.html").read_text()
    assert "`None`" not in (tmp_path / "saved" / "README.md").read_text()


def test_vectors_that_are_not_finite_are_left_out_and_told(predict: Run, tmp_path: Path) -> None:
    assert predict() == 0
    root = tmp_path / "root"
    path = root / "l00h00q" / "data.parquet"
    table = pq.read_table(path)
    vectors = np.stack(table["vector"].to_numpy())
    vectors[3, 5], vectors[7, 1] = np.nan, np.inf
    kind = table.schema.field("vector").type
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=kind)
    pq.write_table(table.set_column(3, table.schema.field("vector"), column), path)
    assert main(["report", str(root), "--heads", "l00h00q"]) == 0
    assert "2 rows are left out: they are not finite" in (root / "report" / "index.html").read_text()


def test_a_text_without_rows_of_the_head(predict: Run, tmp_path: Path) -> None:
    capture = {"min_bucket_size": 256, "sampler": {"type": "uniform", "base_rate": 3}}
    assert predict(sniffer={"capture": capture}) == 0
    root = str(tmp_path / "root")
    empty = Captures(root)
    head = next(
        h for h in empty.heads if h.kind == "q" and not len(h.where(example="topic-4")) and len(h)
    )
    assert main(["report", root, "--heads", head.name, "--example", "topic-4"]) == 0
    text = (tmp_path / "root" / "report" / "index.html").read_text()
    assert "Not shown: no key of this text was kept before a query" in text


def test_names_of_texts_are_text(predict: Run, texts: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [row | {"id": f"<i>`{row['id']}`</i>"} for row in texts]
    data = {"path": str(write_jsonl(tmp_path / "odd.jsonl", rows))}
    assert predict(data=data) == 0
    assert main(["report", str(tmp_path / "root"), "--heads", "l00h00q"]) == 0
    text = (tmp_path / "root" / "report" / "index.html").read_text()
    assert "in the text &quot;&lt;i&gt;" in text
    assert "<i>" not in text
    assert "</p>" in text.partition("in the text")[2]


def test_signs_that_the_font_lacks_are_shown_by_number() -> None:
    content = AttentionMap(
        np.eye(2, dtype=np.float32),
        np.tri(2, dtype=bool),
        ["0 \u4f60", "1 \U0001f600"],
        ["0 \r", "1 a"],
        "probability",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = picture("attention-1", "", partial(draw_attention, attention=content))
    assert drawn.light.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "l00h09q"], r"l00h09q: not captured; layer 0 has the query heads 0, 1, 2, 3"),
        (["--heads", "first"], r"report: first is no name of a head; give one such as l02h05q"),
        (["--example", "nobody"], r"no example has the source id nobody"),
        (["--wrong"], r"report: unrecognized arguments: --wrong; `qk-sniffer report --help` lists"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    predict: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert predict() == 0
    assert main(["report", str(tmp_path / "root"), *arguments]) == 2
    assert re.search(message, error_line(capsys))
    assert not (tmp_path / "root" / "report").exists()


def test_nothing_to_show(predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no manifest.json is here" in error_line(capsys)
    capture = {"min_bucket_size": 2**31, "sampler": {"type": "uniform", "base_rate": 1e-9}}
    assert predict(sniffer={"capture": capture}) == 0
    assert main(["report", str(tmp_path / "root")]) == 2
    assert "no row was kept" in error_line(capsys)


def test_positional_r2_tells_position_from_noise() -> None:
    generator = np.random.default_rng(0)
    positions = np.tile(np.arange(200), 10)
    texts = np.repeat(np.arange(10), 200)
    noise = generator.normal(size=(2000, 8))
    assert -0.05 < positional_r2(noise, positions, texts) < 0.05
    # One coordinate is position with noise of a third of its variance: R² is 1 / (1 + 1/3).
    told = noise.copy()
    told[:, 3] = positions + np.sqrt(np.var(positions) / 3) * noise[:, 3]
    assert positional_r2(told, positions, texts) == pytest.approx(0.75, abs=0.02)
    assert positional_r2(1e4 * told + 7, positions, texts) == pytest.approx(0.75, abs=0.02)
    # What names the text tells no position of another one.
    own = np.eye(10)[texts] * positions[:, None]
    assert positional_r2(own, positions, texts) < 0.05
    assert np.isnan(positional_r2(noise[:200], positions[:200], texts[:200]))
    assert np.isnan(positional_r2(noise[:8], positions[:8], texts[::250]))
    assert np.isnan(positional_r2(noise, np.zeros(2000), texts))


def test_positional_r2_is_that_of_ridge_regression() -> None:
    """As least squares with a row for the penalty of each weight."""
    generator = np.random.default_rng(2)
    texts, positions = np.repeat(np.arange(5), 30), np.tile(np.arange(30), 5)
    x = generator.normal(size=(150, 12)) + 0.05 * positions[:, None] * generator.normal(size=12)
    residual = total = 0.0
    for text in range(5):
        seen = texts != text
        centred, mean = x[seen] - x[seen].mean(axis=0), positions[seen].mean()
        penalty = 1e-3 * (centred**2).sum(axis=0).mean()
        rows = np.concatenate([centred, np.sqrt(penalty) * np.eye(12)])
        wanted = np.concatenate([positions[seen] - mean, np.zeros(12)])
        weights = np.linalg.lstsq(rows, wanted)[0]
        predicted = (x[~seen] - x[seen].mean(axis=0)) @ weights + mean
        residual += ((positions[~seen] - predicted) ** 2).sum()
        total += ((positions[~seen] - mean) ** 2).sum()
    assert positional_r2(x, positions, texts) == pytest.approx(1 - residual / total, rel=1e-9)


def test_principal_components_are_those_of_the_singular_values() -> None:
    vectors = np.random.default_rng(1).normal(size=(300, 6)) * [5, 4, 3, 1, 1, 1] + 2
    points, shares = principal_components(vectors, 3)
    left, singular, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(left[:, :3] * singular[:3]), atol=1e-9)
    np.testing.assert_allclose(shares, singular[:3] ** 2 / (singular**2).sum())
    np.testing.assert_allclose(principal_components(-vectors, 3)[0], -points, atol=1e-9)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(predict: Run, tmp_path: Path) -> None:
    """The page takes the scheme of the screen, and nothing sticks out on a phone."""
    assert predict(sniffer={"capture": TOKENS | {"layers": [0, 1]}}) == 0
    assert main(["report", str(tmp_path / "root"), "--heads", "l00h00q"]) == 0
    page = tmp_path / "root" / "report" / "index.html"

    def browse(*options: str) -> str:
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars", *options,
        ]  # fmt: skip
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    for scheme, width in (("light", 1280), ("dark", 390)):
        shot = tmp_path / f"{scheme}.png"
        preferred = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
        browse(preferred, f"--window-size={width},2000", f"--screenshot={shot}", str(page))
        screen = pixels(shot.read_bytes())
        assert screen.shape[1] == width
        background = screen[-1, 0].mean()
        assert background > 250 if scheme == "light" else background < 40
        # The greens of a map, which nothing else on the page has.
        assert (screen[..., 1].astype(int) - screen[..., 0] > 60).mean() > 0.01

    # A window has a least width; a frame on a page has none.
    framed = escape(page.read_text())
    measure = "document.title = this.contentDocument.documentElement.scrollWidth"
    frame = f'<iframe width="360" style="border: 0" onload="{measure}" srcdoc="{framed}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><title></title>{frame}")
    assert "<title>360</title>" in browse("--dump-dom", str(tmp_path / "frame.html"))


MOMENTS = {"moments": {"enabled": True}}
FROM_MOMENTS = {f"moments-{what}-{kind}" for what in ("r2", "spectra") for kind in ("queries", "keys")}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """The curves of each picture of spectra, by its name."""
    found: dict[str, list[np.ndarray]] = {}

    def watched(name: str, caption: str, draw: Any, **options: Any) -> Any:
        drawn = picture(name, caption, draw, **options)
        axes = new_axes()
        draw(axes)
        found[name] = [line.get_ydata() for line in axes.lines]
        found[f"{name} label"] = (
            [text.get_text() for text in axes.get_legend().texts] if axes.lines else []
        )
        return drawn

    monkeypatch.setattr("qk_sniffer.report.moments.picture", watched)
    return found


def test_pictures_from_moments(predict: Run, tmp_path: Path, lines: dict[str, list[Any]]) -> None:
    root = tmp_path / "root"
    assert predict(sniffer={"capture": {"heads": [0, 2]}} | MOMENTS) == 0
    assert main(["report", str(root), "--heads", "l00h00q"]) == 0
    names = {path.stem for path in (root / "report").glob("*.png")}
    assert names >= FROM_MOMENTS and "positional-r2-queries" in names
    captures = Captures(root)
    heads = [head for head in captures.heads if head.kind == "q"]
    drawn = lines["moments-spectra-queries"]
    for head, line in zip(heads, drawn, strict=False):
        _, shares = principal_components(head.numpy()["vector"], 16)
        np.testing.assert_allclose(line, shares.cumsum(), atol=1e-5)
    sizes = {head.name: int((line < 0.9).sum()) + 1 for head, line in zip(heads, drawn, strict=False)}
    named = [label.partition(": ") for label in lines["moments-spectra-queries label"]]
    assert [label[2] for label in named] == [
        f"{extreme(sizes.values())} of 16" for extreme in (min, max)
    ]
    assert all(int(size.split()[0]) == sizes[name] for name, _, size in named)
    found = measure_moments(captures, lambda heads, total: heads)
    assert found["k"].n_tokens == sum(captures.examples["n_tokens"].to_pylist())
    assert found["q"].r2.values[2, 2] == captures.moments(2, 2).positional_r2()
    assert np.isnan(found["q"].r2.values[:, 1]).all()
    assert main(["verify", str(root)]) == 0
    assert "](report/moments-spectra-queries.png)" in (root / "README.md").read_text()


def test_a_report_of_moments_alone(predict: Run, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert predict(sniffer={"capture": {"sampler": {"type": "none"}}} | MOMENTS) == 0
    assert main(["report", str(root)]) == 0
    assert {path.stem for path in (root / "report").glob("*.png")} == FROM_MOMENTS
    page = Page(root / "report" / "index.html")
    assert f'moments = Captures("{root.name}").moments(0, 0, "q")' in page.text.replace("&quot;", '"')
    assert main(["verify", str(root)]) == 0
