"""What pictures show: the dots, cells and curves on the axes, of ``Captures`` and of ``sniff``."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from conftest import Run, byte_tokenizer
from families import FAMILIES, tiny_model
from qk_sniffer import Captures, sniff
from qk_sniffer.errors import UserError
from qk_sniffer.geometry import TellingComponents, means_along, telling_components
from qk_sniffer.pictures import (
    AttentionMap,
    attention_size,
    describe_components,
    draw_attention,
    draw_attention_by_distance,
    draw_attention_to_first,
    draw_components,
    draw_norms_by_pair,
    draw_norms_by_position,
    draw_predictions,
    new_axes,
)
from readers import eager_attention
from tiny import tiny_causal_lm

TEXT = "def attention(query, key, value): return softmax(query @ key.T) @ value"


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


@pytest.fixture(params=["captures", "sniff"])
def captures(request: pytest.FixtureRequest, predict: Run, tmp_path: Path) -> Captures:
    """A run, or a block of ``sniff``, with a text that is named topic-2."""
    if request.param == "captures":
        assert predict(sniffer={"capture": {"capture_token_strings": True}}) == 0
        return Captures(tmp_path / "root")
    tokenizer = byte_tokenizer()
    model = tiny_model(FAMILIES["llama"]).eval()
    with torch.no_grad(), sniff(model, tokenizer=tokenizer) as captured:
        captured.names(["topic-2"])
        model(**tokenizer(TEXT, return_tensors="pt"))
    return captured


def bar_label(axes: Axes) -> str:
    """The name of the colour scale, at whichever of its sides."""
    (bar,) = [other for other in axes.figure.axes if other is not axes]
    return bar.get_ylabel() or bar.get_xlabel()


def tick_labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_head_is_plotted_along_its_telling_components(captures: Captures) -> None:
    head = captures.head(1, 2)
    rows = head.numpy()
    expected = telling_components(rows["vector"], rows["position"])
    axes = head.plot()
    dots = np.asarray(axes.collections[0].get_offsets())
    order = np.lexsort(dots.T), np.lexsort(expected.coordinates.T)
    np.testing.assert_allclose(dots[order[0]], expected.coordinates[order[1]])
    assert axes.get_xlabel().startswith(f"component {expected.numbers[0]} (")
    assert axes.get_ylabel().startswith(f"component {expected.numbers[1]} (")
    title = axes.get_title(loc="left").replace("\n", " ")
    assert title == f"l01h02q: {describe_components(expected)}"
    _, given = pyplot.subplots()
    assert head.where(position=range(9)).plot(axes=given) is given
    assert len(given.collections[0].get_offsets()) == sum(rows["position"] < 9)
    with pytest.raises(UserError, match="l01h02q: fewer than two of these rows are finite"):
        head.where(position=[]).plot()


def test_attention_is_plotted_as_the_model_has_it(captures: Captures) -> None:
    axes = captures.plot_attention(1, 2, "topic-2", queries=range(3, 9))
    probabilities = captures.attention(1, 2, "topic-2", queries=range(3, 9)).probabilities
    shown = axes.images[0].get_array()
    assert shown.shape == (6, 9), "keys behind the last query are not shown"
    above = np.arange(9) > np.arange(3, 9)[:, None]
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), above)
    np.testing.assert_array_equal(shown.data[~above], probabilities[:, :9].numpy()[~above])
    tokens = captures.head(1, 2).where(example="topic-2").numpy()["token_str"]
    labels = [f"{i} {token.replace('Ġ', '·')}".strip() for i, token in enumerate(tokens[:9])]
    assert tick_labels(axes.xaxis) == labels
    assert tick_labels(axes.yaxis) == labels[3:]
    assert axes.get_title(loc="left") == 'l01h02q to l01h01k in "topic-2"'
    assert bar_label(axes) == "probability, square-root scale"
    _, given = pyplot.subplots()
    number = captures.example_id("topic-2")
    assert captures.plot_attention(1, 2, number, axes=given) is given
    assert given.images[0].get_array().shape == (40, 40), "the first of more"
    assert '"topic-2"' in given.get_title(loc="left")


def test_cells_outside_a_window_are_grey(predict: Run, tmp_path: Path) -> None:
    assert predict(family="mistral") == 0
    captures = Captures(tmp_path / "root")
    window = captures.layers[0].sliding_window
    assert window is not None
    queries = range(window + 4, window + 9)
    axes = captures.plot_attention(0, 0, "topic-2", queries=queries)
    first_key = int(tick_labels(axes.xaxis)[0])
    assert first_key == 5, "the first that a query attends to"
    distance = np.array(queries)[:, None] - np.arange(5, window + 9)
    masked = np.ma.getmaskarray(axes.images[0].get_array())
    np.testing.assert_array_equal(masked, (distance < 0) | (distance >= window))
    assert len(set(to_rgb(axes.get_facecolor()))) == 1


def test_keys_that_were_not_kept(predict: Run, tmp_path: Path) -> None:
    sampler = {"type": "uniform", "base_rate": 3}
    assert predict(sniffer={"capture": {"sampler": sampler, "min_bucket_size": 8}}) == 0
    captures = Captures(tmp_path / "root")
    axes = captures.plot_attention(1, 2, "topic-2")
    assert bar_label(axes) == "share among the keys kept, square-root scale"
    first_key = captures.key_head(1, 2).where(example="topic-2").numpy()["position"][0]
    early = captures.head(1, 2).where(position=range(first_key)).numpy()
    for example, position in zip(early["example_id"], early["position"], strict=True):
        keys = captures.key_head(1, 2).where(example=int(example)).numpy()["position"]
        if not len(keys) or keys[0] > position:
            with pytest.raises(UserError, match=r"no key of example .* was kept"):
                captures.plot_attention(1, 2, int(example), queries=int(position))
            return
    pytest.fail("every query has a key before it")


def test_sampled_keys_have_their_own_probabilities_where_the_statistics_are_known(
    predict: Run, tmp_path: Path, model_dir: Callable[[str], Path], texts: list[dict[str, Any]]
) -> None:
    capture = {"sampler": {"type": "uniform", "base_rate": 3}, "min_bucket_size": 8}
    assert predict(sniffer={"capture": capture | {"capture_softmax": True}}) == 0
    axes = Captures(tmp_path / "root").plot_attention(1, 2, "topic-2")
    assert bar_label(axes) == "probability, square-root scale"
    queries, keys = ([int(i) for i in tick_labels(axis)] for axis in (axes.yaxis, axes.xaxis))
    eager = eager_attention(model_dir("llama"), texts)["topic-2"][1][2]
    expected = eager[queries][:, keys].numpy()
    shown = axes.images[0].get_array()
    assert len(keys) < 40 and (expected.sum(axis=1) < 0.9).any()
    np.testing.assert_allclose(shown.filled(0), expected, atol=1e-5)


def test_the_softmax_is_plotted_by_layer_and_head(predict: Run, tmp_path: Path) -> None:
    capture = {"capture_softmax": True, "local_positions": 8, "layers": [1, 3], "heads": [0, 2]}
    assert predict(sniffer={"capture": capture}) == 0
    captures = Captures(tmp_path / "root")
    labels = {
        "entropy": "mean entropy, in nats",
        "sink_prob": "mean mass on the first token",
        "local_prob": "mean mass on the last 8 positions",
        "previous": "share attending most to the token before",
    }
    for name, label in labels.items():
        axes = captures.plot_softmax(name, position=range(8, 99))
        image, expected = axes.images[0], captures.softmax_map(name, position=range(8, 99)).values
        np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), expected)
        assert bar_label(axes) == label
        high = np.nanmax(expected) if name == "entropy" else 1
        assert image.get_clim() == (0, high)
        assert tick_labels(axes.yaxis) == ["1", "3"] and tick_labels(axes.xaxis) == ["0", "1", "2"]
    _, given = pyplot.subplots()
    assert captures.plot_softmax("lse", axes=given) is given
    for name in ("entropy", "lse"):
        axes = captures.plot_softmax(name, position=99)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            axes.figure.canvas.draw()
        assert np.isnan(np.ma.filled(axes.images[0].get_array(), np.nan)).all()


def test_a_learned_sink_is_named(predict: Run, tmp_path: Path) -> None:
    model = tiny_causal_lm("gpt_oss")
    with torch.no_grad(), sniff(model, softmax=True) as captured:
        model(input_ids=torch.arange(2, 40)[None])
    assert bar_label(captured.plot_softmax("sink_prob")).endswith("first token and the learned sink")


RING = TellingComponents((2, 3), np.eye(2), np.array([0.2, 0.1]), 0.0, 6.28)
LINE = TellingComponents((4, 1), np.eye(2), np.array([0.2, 0.1]), 0.81)
NOISE = TellingComponents((1, 2), np.eye(2), np.array([0.2, 0.1]), 0.1)


def test_a_ring_is_coloured_by_phase_and_others_by_position() -> None:
    for components, label in ((RING, "position modulo 6.3"), (LINE, "position"), (NOISE, "position")):
        axes = new_axes()
        draw_components(axes, components, [5, 9])
        assert bar_label(axes) == label
        colours = sorted(axes.collections[0].get_array())
        assert colours == pytest.approx(sorted([5, 9 % 6.28]) if components is RING else [5, 9])
        first, second = components.numbers
        assert axes.get_xlabel() == f"component {first} (20% of variance)"
        assert axes.get_ylabel() == f"component {second} (10% of variance)"
    assert "turn with position, once in 6.3 tokens" in describe_components(RING)
    assert "component 4 carries position (squared correlation 0.81)" in describe_components(LINE)
    assert "no component tells position by itself" in describe_components(NOISE)


def test_predictions_are_beside_the_line_where_they_are_exact() -> None:
    axes = new_axes()
    draw_predictions(axes, [0, 4, 9], [1.0, 3.5, 9.0])
    dots = np.asarray(axes.collections[0].get_offsets())
    np.testing.assert_array_equal(dots, [[0, 1], [4, 3.5], [9, 9]])
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 0], [9, 9]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("position", "predicted position")


@pytest.mark.parametrize(
    "draw", [draw_norms_by_position, draw_attention_by_distance, draw_attention_to_first]
)
def test_curves_are_means_in_bins_that_widen(draw: Any) -> None:
    positions = np.arange(300)
    values = np.where(positions == 0, 9.0, 1 / (1 + positions))
    axes = new_axes()
    draw(axes, {"a head": (positions, values), "another": (positions[:5], values[:5])})
    drawn = axes.lines[0].get_xydata()
    np.testing.assert_array_equal(drawn.T, means_along(positions, values))
    assert drawn[0].tolist() == [0, 9], "the first token by itself"
    assert len(axes.lines) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a head", "another"]
    places = axes.transData.transform(np.column_stack([[0, 1, 10, 100], np.ones(4)]))[:, 0]
    steps = np.diff(places)
    assert steps[1] == pytest.approx(steps[2]) and steps[0] > 0.2 * steps[1]


def test_norms_by_pair_of_coordinates() -> None:
    axes = new_axes()
    draw_norms_by_pair(axes, {"queries": np.array([3.0, 1.0, 2.0])})
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 3], [1, 1], [2, 2]])
    assert axes.get_xlabel().startswith("pair of coordinates")


def test_the_bar_of_a_wide_map_is_on_a_phone() -> None:
    """A page shows 96 pixels of an inch, and a phone the leftmost 340 of a wide picture."""
    labels = [f"{i} an_identifi…" for i in range(12_300, 12_360)]
    content = AttentionMap(
        np.zeros((60, 60), np.float32), np.tri(60, dtype=bool), labels, labels, "probability"
    )
    axes = new_axes(attention_size(content))
    draw_attention(axes, content)
    axes.figure.canvas.draw()
    (bar,) = [other for other in axes.figure.axes if other is not axes]
    right = bar.get_window_extent().x1 / axes.figure.dpi * 96
    assert right < 340 < axes.get_window_extent().x1 / axes.figure.dpi * 96
    assert len(tick_labels(axes.xaxis)) == 60


def test_only_drawing_needs_matplotlib(predict: Run, tmp_path: Path) -> None:
    assert predict() == 0
    script = f"""
import sys
from qk_sniffer import Captures, sniff
head = Captures({str(tmp_path / "root")!r}).head(0, 0)
assert len(head.numpy()["vector"])
assert "matplotlib" not in sys.modules

sys.modules["matplotlib"] = None
from qk_sniffer.cli import main
from qk_sniffer.errors import UserError
for draw in (head.plot, lambda: Captures({str(tmp_path / "root")!r}).plot_attention(0, 0, 0)):
    try:
        draw()
    except UserError as error:
        print(error)
sys.exit(main(["report", {str(tmp_path / "root")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    remedy = "matplotlib is not installed; install it with `pip install 'qk-sniffer[report]'`"
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines() == [f"pictures: {remedy}"] * 2
    assert done.stderr.strip().endswith(f"pictures: {remedy}")
