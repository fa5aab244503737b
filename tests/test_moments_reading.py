"""``Captures.moments``: what a person reads of moments, against NumPy over rows that were all kept."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import REPO, Run, byte_tokenizer
from loopback import Fault, LoopbackHub
from moments_of_rows import expected, part
from qk_sniffer import Captures, sniff
from qk_sniffer.errors import UserError
from qk_sniffer.geometry import positional_r2, predicted_positions, principal_components
from qk_sniffer.reading import Moments
from tiny import tiny_causal_lm

EVERYTHING = {"capture_values": True, "capture_outputs": True, "min_bucket_size": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moments")


@pytest.fixture
def captures(made: Path, predict: Run, tmp_path: Path) -> Captures:
    """All rows of a tiny Llama, and their moments by bucket, before RoPE too, and with the keys."""
    if not any(made.iterdir()):
        moments = {"enabled": True, "by_bucket": True, "pre_rope": True, "cross": True}
        before = {"capture": {"capture_pre_rope": True}}
        assert predict("after", sniffer={"capture": EVERYTHING, "moments": moments}) == 0
        assert predict("before", sniffer=before) == 0
        for name in ("after", "before"):
            (tmp_path / name).rename(made / name)
    return Captures(made / "after")


MOMENTS = {"moments": {"enabled": True}}
TOLERANCE = 1e-5
"""Relative, of the norm: products are those of float32."""


def agrees(found: Moments, numbers: dict[str, Any]) -> None:
    for name, value in numbers.items():
        error = np.linalg.norm(getattr(found, name) - value) / np.linalg.norm(value)
        assert error < TOLERANCE, (name, error)


@pytest.mark.parametrize("kind", ["q", "k", "v", "o"])
def test_moments_of_a_head(kind: Any, captures: Captures) -> None:
    rows = captures.head(2, 1, kind).numpy()
    found = captures.moments(2, 1, kind)
    agrees(found, expected([rows]))
    assert (found.covariance.dtype, found.width) == (np.float64, rows["vector"].shape[1])
    np.testing.assert_array_equal(found.variance, np.diag(found.covariance))
    assert repr(found) == f"<Moments of {len(rows['vector'])} vectors of 16 coordinates>"
    in_bucket = part(rows, rows["bucket"] == 2)
    agrees(captures.moments(2, 1, kind, bucket=2), expected([in_bucket]))
    late = part(rows, rows["bucket"] >= 1)
    agrees(captures.moments(2, 1, kind, bucket=range(1, 4)), expected([late]))


def test_moments_before_rope(captures: Captures, made: Path) -> None:
    before = Captures(made / "before")
    for kind in ("q", "k"):
        rows = before.head(1, 1, kind).numpy()
        agrees(captures.moments(1, 1, kind, pre_rope=True), expected([rows]))


def test_moments_of_several_heads_and_layers(captures: Captures) -> None:
    every = [head for head in captures.heads if head.kind == "q"]
    chosen: list[tuple[dict[str, Any], Callable[[int, int], bool]]] = [
        ({}, lambda layer, head: True),
        ({"layer": 3}, lambda layer, head: layer == 3),
        ({"head": [0, 2]}, lambda layer, head: head in (0, 2)),
        (
            {"layer": range(1, 3), "head": np.int64(3)},
            lambda layer, head: layer in (1, 2) and head == 3,
        ),
    ]
    for arguments, takes in chosen:
        heads = [head for head in every if takes(head.layer.layer_idx, head.head)]
        keys = [captures.key_head(head.layer.layer_idx, head.head).numpy() for head in heads]
        agrees(captures.moments(**arguments), expected([head.numpy() for head in heads], keys))


def test_moments_with_the_keys(captures: Captures) -> None:
    query, key = captures.head(1, 3).numpy(), captures.key_head(1, 3).numpy()
    agrees(captures.moments(1, 3), expected([query], [key]))
    assert captures.moments(1, 1, "k").key_covariance is None


def test_principal_components_are_those_of_the_rows(captures: Captures) -> None:
    rows = captures.head(2, 2).numpy()
    found = captures.moments(2, 2)
    variances, directions = found.components()
    points, shares = principal_components(rows["vector"], 3)
    np.testing.assert_allclose(variances[:3] / variances.sum(), shares)
    centred = rows["vector"] - found.mean
    np.testing.assert_allclose(centred @ directions[:, :3], points, atol=1e-6)
    assert (np.diff(variances) <= 0).all()


def test_what_position_explains(captures: Captures) -> None:
    rows = captures.head(0, 1).numpy()
    found, x, p = captures.moments(0, 1), rows["vector"].astype(np.float64), rows["position"]
    lines = [np.polyfit(p, column, 1) for column in x.T]
    np.testing.assert_allclose(found.positional_slope, [slope for slope, _ in lines], atol=1e-7)
    residual = np.stack([column - np.polyval(line, p) for column, line in zip(x.T, lines, strict=True)])
    assert found.positional_share == pytest.approx(1 - residual.var(axis=1).sum() / x.var(axis=0).sum())
    directions = np.random.default_rng(0).normal(size=(16, 3))
    correlations = [np.corrcoef(x @ column, p)[0, 1] ** 2 for column in directions.T]
    np.testing.assert_allclose(found.positional_shares(directions), correlations, atol=1e-6)
    assert found.positional_shares().shape == (16,)
    nothing = Moments(9, *(np.zeros(s) for s in (2, (2, 2))), 0.0, 0.0, np.zeros(2))
    assert np.isnan(
        [nothing.positional_share, nothing.positional_r2(), *nothing.positional_shares()]
    ).all()


def test_positional_r2_is_that_of_texts_that_were_seen_or_not(captures: Captures) -> None:
    rows = captures.head(1, 2).numpy()
    seen = np.isin(rows["example_id"], captures.examples["example_id"].to_numpy()[:3])
    fitted_on, other = add_up(part(rows, seen)), add_up(part(rows, ~seen))
    # Two texts, as positional_r2 divides them: it predicts each by what is fitted on the other.
    two = rows | {"example_id": seen.astype(int)}
    predicted = predicted_positions(two["vector"], two["position"], two["example_id"])
    p = rows["position"].astype(float)
    error = ((p - predicted)[~seen] ** 2).sum()
    total = ((p[~seen] - p[seen].mean()) ** 2).sum()
    assert fitted_on.positional_r2(other) == pytest.approx(1 - error / total, abs=1e-9)
    whole = (fitted_on.positional_r2(other), other.positional_r2(fitted_on))
    assert min(whole) < positional_r2(two["vector"], p, two["example_id"]) < max(whole)
    assert fitted_on.positional_r2() > max(whole)
    assert np.isnan(add_up(part(rows, rows["position"] < 2)).positional_r2())


def add_up(rows: Any) -> Moments:
    return Moments(**expected([rows]))


def test_two_runs_compared(captures: Captures, made: Path) -> None:
    one, other = captures.moments(1, 2), captures.moments(1, 2, pre_rope=True)
    found = one.compared_with(other)
    deviation = np.sqrt((one.variance + other.variance) / 2)
    np.testing.assert_allclose(found.mean_shift, (one.mean - other.mean) / deviation)
    norms = [np.sqrt((c**2).sum()) for c in (one.covariance - other.covariance, other.covariance)]
    assert found.covariance_distance == pytest.approx(norms[0] / norms[1])
    normal = [
        torch.distributions.MultivariateNormal(torch.tensor(m.mean), torch.tensor(m.covariance))
        for m in (one, other)
    ]
    divergences = [
        torch.distributions.kl_divergence(a, b).item() for a, b in (normal, reversed(normal))
    ]
    assert found.divergence == pytest.approx(sum(divergences))
    same = one.compared_with(one)
    assert (abs(same.mean_shift).max(), same.covariance_distance) == (0, 0)
    assert same.divergence == pytest.approx(0, abs=1e-9)
    short = captures.moments(1, 2, bucket=3)
    assert short.count < 16 and short.compared_with(one).divergence == np.inf


def test_moments_are_tensors_and_go_to_other_processes(captures: Captures) -> None:
    found = captures.moments(1, 2)
    tensors = found.torch()
    assert {name: t.dtype for name, t in tensors.items()}.pop("count") == torch.int64
    for name, tensor in tensors.items():
        assert name == "count" or tensor.dtype == torch.float64
        np.testing.assert_array_equal(tensor.numpy(), getattr(found, name))
    assert "key_mean" not in captures.moments(1, 1, "k").torch()
    copied = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(copied.covariance, found.covariance)
    again = pickle.loads(pickle.dumps(captures)).moments(1, 2)
    np.testing.assert_array_equal(again.covariance, found.covariance)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"layer": 4}, r"the queries have no layer 4; choose from 0 to 3$"),
    ({"layer": 1, "head": 4}, r"the queries of layer 1 have no head 4; choose from 0 to 3$"),
    ({"head": [0, 9]}, r"the queries have no head 9; choose from 0 to 3$"),
    ({"layer": 1, "head": 2, "kind": "k"}, r"the keys of layer 1 have no head 2; choose from 0, 1$"),
    ({"bucket": 7}, r"the queries have no bucket 7; choose from 0 to 3$"),
    ({"kind": "values"}, r"^kind: expected one of q, k, v, o, got values$"),
    ({"kind": "v", "pre_rope": True}, r"there are none of values before RoPE; pass pre_rope=False"),
    ({"layer": "1"}, r"^layer: expected integers, got '1'$"),
    ({"layer": []}, r"^layer: expected integers, got \[\]$"),
    ({"kind": ["q", "k"]}, r"^kind: expected one of q, k, v, o, got \['q', 'k'\]$"),
    ({"pre_rope": None}, r"^pre_rope: expected True or False, got None$"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_moments_that_are_not_there(
    arguments: dict[str, Any], message: str, captures: Captures
) -> None:
    with pytest.raises(UserError, match=message):
        captures.moments(**arguments)


def test_runs_that_have_fewer(predict: Run, tmp_path: Path) -> None:
    some = {"capture": {"layers": [1, 3], "heads": [0, 3]}}
    assert predict("plain", sniffer=some) == 0
    root = tmp_path / "root"
    remedy = "capture with sniffer.moments.enabled: true"
    with pytest.raises(UserError, match=f"plain: no moments were summed; {remedy}"):
        Captures(tmp_path / "plain").moments(1, 0)
    assert predict(sniffer=some | MOMENTS) == 0
    captures = Captures(root)
    with pytest.raises(UserError, match="none of values; choose from queries, keys"):
        captures.moments(1, 0, "v")
    with pytest.raises(UserError, match=r"no layer 2; choose from 1, 3"):
        captures.moments(2, 0)
    with pytest.raises(UserError, match="bucket: they were summed over all positions"):
        captures.moments(1, 0, bucket=0)
    with pytest.raises(UserError, match=r"none of queries before RoPE; pass pre_rope=False"):
        captures.moments(1, 0, pre_rope=True)
    (root / "moments" / "q.parquet").unlink()
    with pytest.raises(UserError, match=r"moments/q.parquet: missing, though the manifest has it"):
        captures.moments(1, 0)
    path = root / "moments" / "k.parquet"
    rows = pq.read_table(path)
    gaps = pa.array([None] * rows.num_rows, rows.schema.field("mean").type)
    column = rows.schema.get_field_index("mean")
    for damage, fault in (
        (rows.drop_columns("count"), "it has other columns than moments"),
        (rows.set_column(column, rows.schema.field("mean"), gaps), "mean has no value in some rows"),
    ):
        pq.write_table(damage, path)
        with pytest.raises(UserError, match=rf"moments/k.parquet can't be read \({fault}\)"):
            captures.moments(1, 0, "k")
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"moments/k.parquet can't be read"):
        captures.moments(1, 0, "k")


def test_sniff_sums_no_moments(tmp_path: Path) -> None:
    model = tiny_causal_lm("llama")
    with torch.no_grad(), sniff(model) as captured:
        model(input_ids=torch.arange(2, 40)[None])
    captured.save(tmp_path / "saved")
    for place, one in (("memory", captured), ("saved", Captures(tmp_path / "saved"))):
        with pytest.raises(UserError, match=f"{place}: no moments were summed"):
            one.moments(0, 0)


def test_layers_that_differ_in_width(predict: Run, tmp_path: Path) -> None:
    tiny_causal_lm("gemma4_text").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    capture = {"full_attention_only": False}
    model = {"name": str(tmp_path / "model")}
    assert predict(model=model, sniffer={"capture": capture} | MOMENTS) == 0
    captures = Captures(tmp_path / "root")
    for layer, width in ((2, 16), (3, 32)):
        assert captures.layers[layer].head_dim == width
        agrees(captures.moments(layer, 1), expected([captures.head(layer, 1).numpy()]))
    with pytest.raises(UserError, match="some vectors have 16 coordinates, others 32; name layers"):
        captures.moments()


@pytest.mark.parametrize("whole", [True, False])
def test_moments_on_the_hub(
    whole: bool,
    hub: LoopbackHub,
    captures: Captures,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small file is brought once; of a large one only what is asked for."""
    if not whole:
        monkeypatch.setattr("qk_sniffer.reading.places._READ_WHOLE", 0)
        monkeypatch.setattr("qk_sniffer.reading.places._READ_AHEAD", 1024)
    root, path = made / "after", "moments/q.parquet"
    hub.add_repo(REPO)
    names = ["manifest.json", *(f"moments/{kind}.parquet" for kind in "qkvo")]
    hub.commit(REPO, "main", {name: (root / name).read_bytes() for name in names})
    hub.forget()
    remote = Captures(REPO)
    found = remote.moments(2, 1)
    np.testing.assert_array_equal(found.covariance, captures.moments(2, 1).covariance)
    asked = [r for r in hub.requests if "moments" in r.path or "/cdn/" in r.path]
    assert asked and not any("moments/k" in r.path for r in asked)
    ranges = [r.headers["range"] for r in hub.requests if r.status == 206]
    assert bool(ranges) is not whole
    n_bytes = sum(int(last) - int(first) + 1 for first, last in (r[6:].split("-") for r in ranges))
    assert n_bytes < (root / path).stat().st_size / 2
    np.testing.assert_array_equal(remote.moments().covariance, captures.moments().covariance)
    hub.fail(Fault("GET|HEAD", "moments/k", status=403))
    with pytest.raises(UserError, match=r"someone/attention, revision main: .*, then read it again"):
        remote.moments(0, 0, "k")
