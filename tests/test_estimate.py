"""What ``estimate`` says of a run, against the run itself."""

import dataclasses
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config

from conftest import WriteRun, byte_tokenizer, write_jsonl
from families import FAMILIES, tiny_model
from qk_sniffer.capture import AttentionLayer, Sampler, Segment, Selection
from qk_sniffer.cli import main
from qk_sniffer.estimate.timing import Samples
from qk_sniffer.models import (
    ModelSource,
    attention_geometry,
    decoder_backbone,
    load_skeleton,
    probe_attention,
)
from qk_sniffer.models.refusals import REFUSED
from qk_sniffer.storage import journal
from readers import error_line
from smollm2 import CHECKPOINT
from tiny import ARCHITECTURES, tiny_causal_lm

Say = Callable[..., str]
UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
SAMPLERS = {
    "log_uniform": {"sampler": {"type": "log_uniform", "base_rate": 8}, "min_bucket_size": 16},
    "uniform": {"sampler": {"type": "uniform", "base_rate": 16}, "min_bucket_size": 128},
    "all": {"sampler": {"type": "all"}, "min_bucket_size": 128},
    "everything": {
        "sampler": {"type": "uniform", "base_rate": 16},
        "min_bucket_size": 128,
        "capture_values": True,
        "capture_outputs": True,
        "capture_softmax": True,
    },
    "first": {
        "sampler": {"type": "uniform", "base_rate": 16, "keep_first": 20},
        "min_bucket_size": 128,
    },
    "positions": {"sampler": {"type": "positions", "positions": [0, 7, 300]}, "min_bucket_size": 128},
}


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """What a command prints; it must succeed."""

    def run(*args: str) -> str:
        capsys.readouterr()
        assert main([*args]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def journal_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the journal of each run, before files are made of it."""
    from qk_sniffer.recording import own_data_root

    sizes: list[int] = []
    finalize = own_data_root.finalize

    def weigh(data_root: Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        sizes.append(sum(file.stat().st_size for file in data_root.glob(".journal/*/segment-*")))
        return finalize(data_root, *args, **kwargs)

    monkeypatch.setattr(own_data_root, "finalize", weigh)
    return sizes


def rows_of_each_head(text: str) -> dict[str, float]:
    """The column `of each head` by bucket."""
    rows = re.findall(r"^ *(\d+|all)   +([\d,.]+)   +[\d,.]+$", text, re.MULTILINE)
    return {bucket: float(count.replace(",", "")) for bucket, count in rows}


def bytes_before(text: str, words: str) -> float:
    """The size that stands before some words."""
    found = re.search(rf"([\d.,]+) (\w+)  (?=[^\n]*{words})", text)
    assert found is not None
    return float(found[1].replace(",", "")) * UNITS[found[2]]


def assert_near(text: str, root: Path, journal: int, *, distinct_buckets: bool = True) -> None:
    """Rows within 5%, bytes within 15%, and each bucket within five standard deviations.

    The seed is fixed; of other seeds one in a million would miss a bucket.
    """
    manifest = json.loads((root / "manifest.json").read_text())
    expected = rows_of_each_head(text)
    streams = {name[:3] + name[-1]: name for name in manifest["heads"]}
    rows = sum(head["rows"] for head in manifest["heads"].values())
    assert expected["all"] * len(manifest["heads"]) == pytest.approx(rows, rel=0.05)
    if distinct_buckets:
        found: Counter[int] = Counter()
        for name in streams.values():
            found.update(pq.read_table(root / name / "data.parquet")["bucket"].to_pylist())
        assert {str(bucket) for bucket in found} <= expected.keys()
        for bucket, count in expected.items():
            total = sum(found.values()) if bucket == "all" else found[int(bucket)]
            mean = count * len(streams)
            assert abs(total - mean) <= 5 * math.sqrt(mean) + 0.06 * len(streams), bucket
    size = sum(head["bytes"] for head in manifest["heads"].values())
    assert bytes_before(text, "Parquet files") == pytest.approx(size, rel=0.15)
    assert bytes_before(text, "journal, in") == pytest.approx(journal, rel=0.15)
    assert f"{len(manifest['heads']):,} Parquet files" in text


def options(**fields: Any) -> list[str]:
    return [part for name, value in fields.items() for part in (f"--{name}", json.dumps(value))]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_of_the_demo_is_as_estimated(
    say: Say, tmp_path: Path, journal_sizes: list[int], sampler: str
) -> None:
    root = tmp_path / "root"
    args = ["--config", "configs/demo.yaml", "--sniffer.output.data_root", str(root)]
    args += ["--data.max_samples", "6", "--trainer.enable_progress_bar", "false"]
    for name, value in SAMPLERS[sampler].items():
        args += [f"--sniffer.capture.{name}", json.dumps(value)]
    text = say("estimate", *args)
    assert not root.exists()
    say("predict", *args)
    assert_near(text, root, journal_sizes[-1])


@pytest.mark.skipif(not CHECKPOINT.exists(), reason="`make weights` brings the checkpoint")
@pytest.mark.parametrize(
    ("sampler", "dtype"),
    [("log_uniform", "float32"), ("uniform", "bfloat16"), ("all", "float16")],
)
def test_a_run_of_smollm2_is_as_estimated(
    say: Say, tmp_path: Path, journal_sizes: list[int], sampler: str, dtype: str
) -> None:
    passages = [topics[name] for name in ("class", "for", "with")]
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": passage[:900]} for passage in passages])
    config = {
        "model": {"name": str(CHECKPOINT), "dtype": dtype},
        "data": {"path": str(texts), "batch_size": 2},
        "sniffer": {
            "capture": {**SAMPLERS[sampler], "layers": [3, 17] if sampler == "all" else None},
            "output": {"data_root": str(tmp_path / "root")},
            "check": False,
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    text = say("estimate", "--config", str(tmp_path / "run.yaml"))
    say("predict", "--config", str(tmp_path / "run.yaml"))
    assert_near(text, tmp_path / "root", journal_sizes[-1])
    assert "134,515,008 in " + dtype in text


def test_without_time_no_weights_are_needed(
    say: Say, write_run: WriteRun, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_dir("qwen3"), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    run = write_run(model={"name": str(bare), "dtype": "bfloat16"})
    text = say("estimate", *run[1:])
    assert "captured   4 layers, 16 of 16 query heads, 8 of 8 key heads, head_dim 24" in text
    parameters = sum(p.numel() for p in tiny_model(FAMILIES["qwen3"]).parameters())
    assert f"{parameters:,} in bfloat16" in text
    assert "texts      7 of " in text and "tokens     189; 27 a text, the longest 61" in text
    assert rows_of_each_head(text)["all"] == 189
    assert main(run) == 2
    assert main(["estimate", *run[1:], "--time"]) == 2


def test_time_is_told_and_the_data_root_stays_as_it_is(
    say: Say, write_run: WriteRun, tmp_path: Path
) -> None:
    run = write_run()
    assert main(run) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "root").rglob("*") if path.is_file()}
    text = say("estimate", *run[1:], "--time", "--trainer.devices", "2")
    assert re.search(r"[\d.]+ s  to read all batches \([\d.]+ s to [\d.]+ s in 3 rounds\)", text)
    assert "for 2 devices, each assumed to be as fast" in text
    left = {path: path.read_bytes() for path in (tmp_path / "root").rglob("*") if path.is_file()}
    assert left == files
    assert rows_of_each_head(text)["all"] == 189


def test_what_is_timed_writes_its_rows_as_it_goes(
    say: Say, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run does; all at the end would be in no time."""
    commits = []
    commit = journal.JournalWriter.commit

    def counting(*args: Any) -> None:
        commits.append(len(args))
        commit(*args)

    monkeypatch.setattr(journal, "SYNC_SECONDS", 0)
    monkeypatch.setattr(journal.JournalWriter, "commit", counting)
    saved = []
    save = journal.JournalWriter.save_moments

    def saving(*args: Any) -> None:
        saved.append(len(args))
        save(*args)

    monkeypatch.setattr(journal.JournalWriter, "save_moments", saving)
    say("estimate", *write_run()[1:], "--time")
    assert len(commits) > 3 and not saved
    say("estimate", *write_run(sniffer={"moments": {"enabled": True}})[1:], "--time")
    assert len(saved) > 3


def test_seconds_of_another_length_follow_from_those_measured() -> None:
    def seconds(size: int, length: int) -> float:
        return 2e-4 * size * length + 3e-7 * size * length**2 + 0.01

    shapes = [(2, length) for length in (128, 256, 512, 700)]
    rounds = [[factor * seconds(*shape) for shape in shapes] for factor in (1, 1.1)]
    run = np.array([(4, 9000), (1, 30), (2, 5000), (3, 7000)])
    whole = sum(seconds(*shape) for shape in run.tolist())
    totals = Samples(shapes, rounds).totals(run, n_devices=1, scale=3)
    assert totals == pytest.approx([3 * whole, 3.3 * whole], rel=1e-6)
    shared = Samples(shapes, rounds[:1]).totals(run, n_devices=2, scale=1)
    assert shared == pytest.approx([seconds(4, 9000)], rel=1e-6)


@pytest.mark.parametrize(
    "sections",
    [
        {"sniffer": {"capture": {"sampler": {"bsae_rate": 1}}}},
        {"data": {"batch_size": "many"}},
        {"model": {"name": "no/such/directory"}},
        {"model": {"config_overrides": {"rope_scalng": 1}}},
        {"data": {"text_column": "body"}},
        {"sniffer": {"capture": {"layers": [0, 4]}}},
        {"sniffer": {"capture": {"sampler": {"type": "gaussian"}}}},
        {"trainer": {"precision": "bf16-true"}},
        {"trainer": {"devices": -3}},
    ],
)
def test_a_mistake_has_the_words_of_predict(
    write_run: WriteRun,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    sections: dict[str, Any],
) -> None:
    run = write_run(**sections)
    assert main(run) == 2
    expected = error_line(capsys)
    shutil.rmtree(tmp_path / "root", ignore_errors=True)
    assert main(["estimate", *run[1:]]) == 2
    assert error_line(capsys) == expected
    assert not (tmp_path / "root").exists()


def test_more_tokens_than_learned_positions_are_seen_beforehand(
    write_run: WriteRun, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"id": 0, "text": "x" * 129}])
    run = write_run(family="gpt2", data={"path": str(path)})
    assert main(["estimate", *run[1:]]) == 2
    assert error_line(capsys).startswith("data.tokenizer.max_length: a sequence has 129 tokens")


def test_layers_left_out_are_named_and_drawn_heads_counted(
    say: Say, write_run: WriteRun, tmp_path: Path
) -> None:
    capture = {"full_attention_only": True, "head_sampling": {"count": 3}}
    run = write_run(family="gemma3", sniffer={"capture": capture})
    text = say("estimate", *run[1:])
    assert "left out   layers 0, 2: a window of 8 tokens, and full_attention_only is true" in text
    assert main(run) == 0
    heads = json.loads((tmp_path / "root" / "manifest.json").read_text())["heads"]
    queries, keys = (sum(name.endswith(kind) for name in heads) for kind in "qk")
    assert f"2 layers, {queries} of 16 query heads, {keys} of 8 key heads" in text


def test_the_memory_of_a_device_has_activations_and_the_way_of_reading(
    say: Say, write_run: WriteRun
) -> None:
    def activations(**model: Any) -> float:
        text = say("estimate", *write_run(model=model, data={"batch_size": 7})[1:])
        line = re.search(r"([\d.]+) (KB|MB) of activations\s+for 7 x 61 tokens", text)
        assert line is not None, text
        return float(line[1]) * {"KB": 1e3, "MB": 1e6}[line[2]]

    whole = activations()
    # Eager attention holds the scores of four heads.
    assert activations(attn_implementation="eager") > whole + 4 * 7 * 61 * 61 * 4
    assert activations(prefill_chunk_size=8) < 0.9 * whole


def test_a_mask_that_fills_the_device_is_named(
    say: Say, write_run: WriteRun, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    texts = write_jsonl(tmp_path / "long.jsonl", [{"id": 0, "text": "y" * 60_000}])
    model = {"name": str(model_dir("mistral"))}
    run = write_run(model=model, data={"path": str(texts), "batch_size": 1})
    text = " ".join(say("estimate", *run[1:]).split())
    assert "a mask of every pair of tokens takes 14.4 GB of it" in text
    assert "read in passages (model.prefill_chunk_size)" in text
    run = write_run(
        model=model | {"prefill_chunk_size": 512}, data={"path": str(texts), "batch_size": 1}
    )
    assert "a mask of" not in say("estimate", *run[1:])


def test_a_host_without_the_devices_of_the_run_estimates_it(
    say: Say, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(trainer={"accelerator": "gpu", "devices": 8})
    assert "captured   4 layers" in say("estimate", *run[1:])
    assert main(["estimate", *run[1:], "--time"]) == 2
    assert error_line(capsys).startswith("trainer: ")


def test_a_disk_without_room_is_told(
    say: Say, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run()
    assert "WILL NOT FIT" not in say("estimate", *run[1:])
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    text = say("estimate", *run[1:])
    assert "100.0 KB  free on the disk of " in text and "IT WILL NOT FIT: make room" in text


MOMENTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "plain": ({}, 24, 24 * 294),
    "before and after RoPE": ({"pre_rope": True}, 48, 48 * 294),
    "with keys": ({"cross": True}, 24, 24 * 294 + 16 * 272),
    "by bucket": ({"by_bucket": True}, 24 * 8, 24 * 8 * 294),
    "all of it": (
        {"pre_rope": True, "cross": True, "by_bucket": True},
        48 * 8,
        8 * (48 * 294 + 2 * 16 * 272),
    ),
}
"""Of 16 query and 8 key heads of 16 numbers, which reach eight buckets of eight positions: settings,
rows, and float64 numbers. A row has D² + 2 D + 6 = 294, and D² + D = 272 with the keys."""


@pytest.mark.parametrize("case", MOMENTS)
@pytest.mark.parametrize("devices", [1, 3])
def test_moments_take_what_their_formula_says(
    say: Say, write_run: WriteRun, case: str, devices: int
) -> None:
    settings, rows, numbers = MOMENTS[case]
    capture = {"min_bucket_size": 8, "sampler": {"type": "uniform", "base_rate": 4}}
    sections = {"capture": capture, "moments": {"enabled": True, **settings}}
    plain = say("estimate", *write_run(sniffer={"capture": capture}, trainer={"devices": devices})[1:])
    assert "moments/*" not in plain and "for moments" not in plain
    text = say("estimate", *write_run(sniffer=sections, trainer={"devices": devices})[1:])
    n_bytes = numbers * 8
    # Sizes have one digit behind the point.
    near = partial(pytest.approx, rel=0.03)
    assert bytes_before(text, "moments/") == near(n_bytes)
    assert f"moments/*.parquet, {rows:,} rows in float64\n" in text
    assert bytes_before(text, "moments in the journal") == near(2 * devices * n_bytes)
    assert ("of 3 processes" in text) == (devices == 3)
    assert bytes_before(text, "on its host, at most: moments while they are saved") == near(2 * n_bytes)
    found = re.search(r"([\d.]+) MB for moments", " ".join(text.split()))
    assert found is not None and float(found[1]) * 1e6 == near(2 * n_bytes + 2**27)
    more = bytes_before(text, "on its device at most") - bytes_before(plain, "on its device at most")
    assert more == pytest.approx(2 * n_bytes + 2**27, abs=2e5)
    assert rows_of_each_head(text) == rows_of_each_head(plain)


def test_moments_of_a_run_are_as_estimated(
    say: Say, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qk_sniffer.recording import own_data_root

    states: list[int] = []
    finalize = own_data_root.finalize

    def weigh(data_root: Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        states.extend(file.stat().st_size for file in data_root.glob(".journal/*/moments-*.npz"))
        return finalize(data_root, *args, **kwargs)

    monkeypatch.setattr(own_data_root, "finalize", weigh)
    sniffer = {
        "capture": {"sampler": {"type": "none"}, "min_bucket_size": 4},
        "moments": {"enabled": True, "by_bucket": True, "pre_rope": True, "cross": True},
    }
    run = write_run(sniffer=sniffer)
    text = say("estimate", *run[1:])
    assert main(run) == 0
    files = [tmp_path / "root" / "moments" / f"{kind}.parquet" for kind in "qk"]
    size, rows = sum(f.stat().st_size for f in files), sum(pq.read_metadata(f).num_rows for f in files)
    assert f"moments/*.parquet, {rows:,} rows in float64" in text
    assert bytes_before(text, "moments/") == pytest.approx(size, rel=0.15)
    assert bytes_before(text, "moments in the journal") == pytest.approx(2 * sum(states), rel=0.15)
    assert len(states) == 1


def test_moments_of_a_large_model_are_those_of_the_docs(say: Say, tmp_path: Path) -> None:
    config = Qwen3Config(
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    )
    config.hidden_size, config.intermediate_size, config.vocab_size = 64, 64, 300
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "some text"}])
    run = {
        "model": {"name": str(tmp_path / "model")},
        "data": {"path": str(texts)},
        "sniffer": {
            "capture": {"sampler": {"type": "none"}},
            "moments": {"enabled": True, "cross": True},
            "output": {"data_root": str(tmp_path / "root")},
        },
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    text = say("estimate", "--config", str(tmp_path / "run.yaml"))
    assert "343.9 MB  moments/*.parquet, 1,440 rows in float64" in text
    assert "344 MB" in Path("docs/scale.md").read_text()


def test_moments_that_do_not_fit_are_told(
    say: Say, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    for by_bucket in False, True:
        sniffer = {
            "capture": {"sampler": {"type": "uniform"}, "min_bucket_size": 4},
            "moments": {"enabled": True, "by_bucket": by_bucket},
        }
        text = " ".join(say("estimate", *write_run(sniffer=sniffer)[1:]).split())
        assert ("IT WILL NOT FIT" in text) is by_bucket
        assert ("moments take less of fewer heads" in text) is by_bucket


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"max_samples": 4}, "texts      4 of "),
        ({}, "texts      7 of "),
        ({"limit": 3}, "texts      3 of "),
        ({"limit": 3, "max_samples": 6}, "texts      6 of "),
    ],
)
def test_a_stream_is_counted_as_far_as_it_is_read(
    say: Say, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch, data: dict[str, int], words: str
) -> None:
    limit = data.pop("limit", 1000)
    monkeypatch.setattr("qk_sniffer.estimate.texts.STREAMED_TEXTS", limit)
    run = write_run(data={"streaming": True, "batch_size": 1, **data})
    text = say("estimate", *run[1:])
    assert words in text
    lengths = [37, 5, 61, 24, 1, 48, 13][: min(limit, data.get("max_samples", 7))]
    expected = sum(lengths) * (2 if "max_samples" in data and limit < 1000 else 1)
    assert rows_of_each_head(text)["all"] == expected
    assert ("the stream goes on after the first 3" in text) == (limit == 3 and len(data) == 0)
    assert ("the first 3 of the stream were counted" in text) == (limit == 3 and len(data) == 1)


class EverySecond(Sampler):
    """Even positions in their own bucket, with a probability that falls."""

    def segments(self, length: int) -> list[Segment]:
        return [Segment(i, i + 1, 1 / (1 + i)) for i in range(length)]

    def buckets(self, positions: Tensor) -> Tensor:
        return positions % 2


def test_rows_of_a_sampler_of_ones_own_are_expected_by_bucket() -> None:
    lengths = torch.tensor([5, 1, 0, 8, 5])
    sums = {0: 0.0, 1: 0.0}
    for length in lengths.tolist():
        for position in range(length):
            sums[position % 2] += 1 / (1 + position)
    selection = Selection(EverySecond(1.0, 1))
    assert selection.expected_rows_by_bucket(lengths) == pytest.approx(sums)
    assert selection.expected_rows_by_bucket(torch.tensor([], dtype=torch.int64)) == {}


def geometry_of(layers: list[AttentionLayer]) -> list[AttentionLayer]:
    return [dataclasses.replace(layer, scores=None) for layer in layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_geometry_is_that_of_the_real_model(family: str, model_dir: Callable[[str], Path]) -> None:
    real = probe_attention(decoder_backbone(tiny_model(FAMILIES[family])))
    skeleton = load_skeleton(ModelSource(str(model_dir(family))))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    geometry = attention_geometry(decoder_backbone(skeleton))
    assert geometry.layers == geometry_of(real.layers)
    assert geometry.dtype == torch.float32


NEEDS_VALUES = {"jetmoe"}
"""Their code looks at numbers on the way to the attention."""


@pytest.mark.every_architecture
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in REFUSED])
def test_the_geometry_of_every_architecture_is_that_of_the_real_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = probe_attention(decoder_backbone(tiny_causal_lm(name)))
    monkeypatch.setattr("tiny._spread_weights", lambda model: None)
    with torch.device("meta"):
        backbone = decoder_backbone(tiny_causal_lm(name))
    if name in NEEDS_VALUES:
        with pytest.raises(Exception, match="add --time"):
            attention_geometry(backbone)
    else:
        assert attention_geometry(backbone).layers == geometry_of(real.layers)


def test_a_model_that_needs_its_weights_is_told_with_time(
    say: Say, write_run: WriteRun, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny_causal_lm("jetmoe").save_pretrained(tmp_path / "jetmoe")
    byte_tokenizer().save_pretrained(tmp_path / "jetmoe")
    run = write_run(model={"name": str(tmp_path / "jetmoe")})
    assert main(["estimate", *run[1:]]) == 2
    line = error_line(capsys)
    assert line.startswith("model.name: the layers of JetMoeModel can't be told without its weights")
    assert line.endswith("add --time, which loads them")
    assert "captured   4 layers" in say("estimate", *run[1:], "--time")
