"""Runs of made-up vectors, whose moments are known: journals that are filled by hand."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from qk_sniffer.kinds import KINDS, Kind
from qk_sniffer.moments import NO_BUCKET, MomentState, MomentTable
from qk_sniffer.storage import Example, JournalWriter, finalize

BUCKET = 8
LENGTHS = {3: 30, -7: 5, 12: 17, 40: 1, 41: 24, 99: 11}
"""Tokens of each text."""

Row = tuple[int, int, int | None, bool]
"""Layer, head, bucket and stage."""


@dataclass(frozen=True)
class MadeUp:
    """What is captured of a model that is none.

    Attributes:
        widths: Numbers in a vector of each layer.
        by_bucket, pre_rope, cross: The section moments.
    """

    widths: Sequence[int] = (4, 4)
    by_bucket: bool = True
    pre_rope: bool = True
    cross: bool = True
    kinds: Sequence[Kind] = ("q", "k", "v")
    capture: dict[str, Any] = field(default_factory=dict)

    @property
    def header(self) -> dict[str, Any]:
        layers = [
            {
                "layer_idx": layer_idx,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": width,
                "sliding_window": None,
            }
            for layer_idx, width in enumerate(self.widths)
        ]
        capture = {
            **{facts.setting: kind in self.kinds for kind, facts in KINDS.items()},
            "layers": None,
            "heads": None,
            "head_sampling": None,
            "full_attention_only": False,
            "capture_pre_rope": False,
            "capture_token_strings": False,
            "min_bucket_size": BUCKET,
            # None of the texts is so long, so that no vector of any is kept.
            "sampler": {"type": "positions", "base_rate": 1.0, "seed": 0, "positions": [10**6]},
        }
        moments = {
            "enabled": True,
            "by_bucket": self.by_bucket,
            "pre_rope": self.pre_rope,
            "cross": self.cross,
        }
        return {
            "fingerprint": {"model.name": "made-up", "sniffer.moments.enabled": True},
            "versions": {},
            "settings": {
                "model": {"name": "made-up"},
                "data": {"path": "made-up"},
                "capture": capture | self.capture,
                "moments": moments,
            },
            "layers": layers,
            "notes": [],
            "streams": [
                {
                    "layer_idx": layer["layer_idx"],
                    "kind": kind,
                    "heads": list(range(layer[KINDS[kind].heads])),
                    "head_dim": layer["head_dim"],
                }
                for layer in layers
                for kind in self.kinds
            ],
            "n_positions": None,
        }

    def vectors(
        self, kind: str, layer_idx: int, head: int, pre_rope: bool, texts: Iterable[int]
    ) -> npt.NDArray[np.float64]:
        """(N, D) of all tokens of some texts."""
        width = self.widths[layer_idx]
        rows = [np.empty((0, width))]
        for text in texts:
            seed = [ord(kind), layer_idx, head, pre_rope, text + 100]
            rows.append(np.random.default_rng(seed).normal(50.0, 1.0, (LENGTHS[text], width)))
        return np.concatenate(rows)

    def rows(self, kind: Kind, layer_idx: int, texts: Sequence[int]) -> Iterator[tuple[Row, Any]]:
        """What each row of a file is to say of some texts, by its key."""
        positions = np.concatenate([np.arange(LENGTHS[text]) for text in texts])
        buckets = positions // BUCKET
        for head in range(4 if kind in "qo" else 2):
            for pre_rope in (False, True)[: 2 if self.pre_rope and kind in "qk" else 1]:
                x = self.vectors(kind, layer_idx, head, pre_rope, texts)
                y = self.vectors("k", layer_idx, head // 2, pre_rope, texts)
                for bucket in np.unique(buckets).tolist() if self.by_bucket else [None]:
                    is_in = np.ones(len(x), bool) if bucket is None else buckets == bucket
                    cross = y[is_in] if self.cross and kind == "q" else None
                    key = (layer_idx, head, bucket, pre_rope)
                    yield key, exact(x[is_in], positions[is_in], cross)

    def state(self, *texts: int) -> MomentState:
        """What a process has counted after some texts."""
        tables: dict[Any, list[MomentTable]] = {}
        for kind in self.kinds:
            for width in sorted(set(self.widths)):
                layers = [layer for layer, other in enumerate(self.widths) if other == width]
                rows = [row for layer in layers for row in self.rows(kind, layer, texts)]
                tables.setdefault(kind, []).append(table_of(rows[::-1]))
        return MomentState(tables, np.array(sorted(texts), np.int32))

    def journal(
        self,
        root: Path,
        rows: Sequence[int] = (),
        moments: Sequence[int] = (),
        rank: int = 0,
    ) -> None:
        """Let a process capture the rows of some texts, and count some."""
        writer = JournalWriter(root / ".journal", self.header, rank)
        numbers = np.empty((3, 0), np.int32)
        if rows:
            examples = [Example(text, f"text {text}", LENGTHS[text], False) for text in rows]
            writer.commit([], numbers, examples)
        for n_texts in range(1, len(moments) + 1):
            writer.save_moments(self.state(*moments[:n_texts]))
        writer.close()

    def assert_counted(self, root: Path, *texts: int, rtol: float = 1e-10) -> None:
        """The files of a data root have the moments of these texts, in order, and nothing else."""
        ids = pq.read_table(root / "moments" / "texts.parquet")["example_id"].to_pylist()
        assert ids == sorted(texts)
        names = sorted(path.name for path in (root / "moments").iterdir())
        assert names == sorted(f"{name}.parquet" for name in (*self.kinds, "texts"))
        for kind in self.kinds:
            rows = pq.read_table(root / "moments" / f"{kind}.parquet").to_pylist()
            keys = [(row["layer_idx"], row["head"], row["bucket"], row["pre_rope"]) for row in rows]
            expected = {
                key: value
                for layer_idx in range(len(self.widths))
                for key, value in self.rows(kind, layer_idx, sorted(texts))
            }
            order = sorted(expected, key=lambda key: (key[0], key[1], key[3], key[2] or 0))
            assert keys == order
            for key, row in zip(keys, rows, strict=True):
                for name, value in expected[key].items():
                    scale = max(1.0, np.abs(value).max())
                    np.testing.assert_allclose(
                        row[name], value, rtol=rtol, atol=rtol * scale, err_msg=f"{kind} {key} {name}"
                    )


def exact(x: Any, positions: Any, y: Any) -> dict[str, Any]:
    """The columns of a row, straight from its vectors."""
    off, positions_off = x - x.mean(axis=0), positions - positions.mean()
    columns = {
        "count": len(x),
        "position_sum": positions.sum(),
        "position_square_sum": (positions**2).sum(),
        "mean": x.mean(axis=0),
        "covariance": (off.T @ off / len(x)).reshape(-1),
        "position_covariance": positions_off @ off / len(x),
    }
    if y is not None:
        keys_off = y - y.mean(axis=0)
        columns["key_mean"] = y.mean(axis=0)
        columns["key_covariance"] = (off.T @ keys_off / len(x)).reshape(-1)
    return columns


def table_of(rows: Sequence[tuple[Row, Any]]) -> MomentTable:
    """A table of such rows."""
    keys, columns = zip(*rows, strict=True)
    layers, heads, buckets, stages = zip(*keys, strict=True)
    column = {name: np.array([values[name] for values in columns]) for name in columns[0]}
    count = column["count"].astype(np.int64)
    width = column["mean"].shape[1]

    def products(name: str) -> Any:
        return column[name].reshape(-1, width, width) * count[:, None, None]

    keys_of = {}
    if "key_mean" in column:
        keys_of = {"key_mean": column["key_mean"], "key_products": products("key_covariance")}
    return MomentTable(
        layer_idx=np.array(layers, np.int32),
        head=np.array(heads, np.int32),
        bucket=np.array([NO_BUCKET if b is None else b for b in buckets], np.int32),
        pre_rope=np.array(stages, np.bool_),
        count=count,
        position_sum=column["position_sum"].astype(np.int64),
        position_square_sum=column["position_square_sum"].astype(np.float64),
        mean=column["mean"],
        products=products("covariance"),
        position_products=column["position_covariance"] * count[:, None],
        **keys_of,
    )


def no_progress(files: Iterable[Any], total: int) -> Iterable[Any]:
    return files


def finish(root: Path, *, complete: bool = False) -> dict[str, Any]:
    """Write the files of a data root."""
    return finalize(root, no_progress, complete=complete)
