"""``Captures``: what a person reads back, against independent readers and the model's attention."""

import ctypes
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import LENGTHS, REPO, Run, byte_tokenizer, write_jsonl
from families import FAMILIES, MANY_HEADS, tiny_model
from loopback import LoopbackHub
from qk_sniffer import Captures
from qk_sniffer.errors import UserError
from qk_sniffer.ids import example_id
from readers import eager_attention, softmax_means_of
from tiny import tiny_causal_lm, tiny_config

TOLERANCE = 1e-5
SAMPLED = {"sampler": {"type": "uniform", "base_rate": 7}, "min_bucket_size": 8}


@pytest.fixture
def captures(predict: Run, tmp_path: Path) -> Captures:
    """Everything of a tiny Llama with two key heads for four query heads."""
    assert predict() == 0
    return Captures(tmp_path / "root")


@contextmanager
def opened_files(root: Path) -> Iterator[list[str]]:
    """The files in a data root that anybody opens within a block, as the kernel reports them."""
    libc = ctypes.CDLL(None, use_errno=True)
    opened, is_directory = 0x20, 0x40000000
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    directories = [root, *(path for path in root.iterdir() if path.is_dir())]
    watched = {
        libc.inotify_add_watch(descriptor, os.fsencode(path), opened): path for path in directories
    }
    assert len(watched) == len(directories)
    files: list[str] = []
    yield files
    try:
        while events := os.read(descriptor, 2**16):
            while events:
                watch, mask, _, length = struct.unpack_from("iIII", events)
                name = events[16 : 16 + length].rstrip(b"\0").decode()
                if not mask & is_directory:
                    files.append(str((watched[watch] / name).relative_to(root)))
                events = events[16 + length :]
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "gpt_oss", "bloom", "llama4"])
def test_attention_is_the_models_own(
    family: str, predict: Run, model_dir: Callable[[str], Path], texts: list[Any], tmp_path: Path
) -> None:
    """Plain, windowed and chunked masks, caps, sinks and ALiBi, through files and manifest."""
    if family in FAMILIES:
        directory = model_dir(family)
    else:
        directory = tmp_path / family
        tiny_causal_lm(family).save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
    assert predict(model={"name": str(directory)}) == 0
    captures = Captures(tmp_path / "root")
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for row in texts[:3]:
        inputs = tokenizer(row["text"], return_tensors="pt")
        with torch.inference_mode():
            expected = model(input_ids=inputs["input_ids"], output_attentions=True).attentions
        assert len(captures.layers) == len(expected)
        for (layer, geometry), probabilities in zip(captures.layers.items(), expected, strict=True):
            for head in range(geometry.num_attention_heads):
                attention = captures.attention(layer, head, row["id"])
                torch.testing.assert_close(
                    attention.probabilities, probabilities[0, head], atol=TOLERANCE, rtol=0
                )


STATISTICS = SAMPLED | {"capture_softmax": True, "local_positions": 8}


def test_maps_of_the_softmax_are_means_over_the_kept_queries(
    predict: Run, tmp_path: Path, model_dir: Callable[[str], Path], texts: list[dict[str, Any]]
) -> None:
    assert predict(sniffer={"capture": STATISTICS | {"layers": [1, 3], "heads": [0, 2]}}) == 0
    captures = Captures(tmp_path / "root")
    eager = eager_attention(model_dir("llama"), texts)
    names = captures.source_ids()
    filters: list[dict[str, Any]] = [
        {},
        {"position": range(8, 99)},
        {"example": "topic-2", "bucket": 1},
    ]
    for chosen in filters:
        expected = {
            (row, head): softmax_means_of(captures.head(layer, head).where(**chosen), names, eager, 8)
            for row, layer in enumerate((1, 3))
            for head in (0, 2)
        }
        for name in ("entropy", "max_prob", "sink_prob", "local_prob", "previous"):
            found = captures.softmax_map(name, **chosen)
            assert (found.layers, found.heads) == ([1, 3], [0, 1, 2])
            assert np.isnan(found.values[:, 1]).all()
            for place, means in expected.items():
                assert found.values[place] == pytest.approx(means[name], abs=TOLERANCE)
            assert found.of(captures.head(3, 2)) == found.values[1, 2]
    lse = captures.softmax_map("lse").values[0, 0]
    assert lse == pytest.approx(captures.head(1, 0).numpy()["lse"].mean(), rel=1e-6)
    assert np.isnan(captures.softmax_map("entropy", position=99).values).all()


def test_maps_of_the_softmax_that_are_not_there(captures: Captures, predict: Run) -> None:
    remedy = r"capture with capture_softmax: true, or sniff\(model, softmax=True\)"
    with pytest.raises(UserError, match=f"root: statistics of the softmax were not captured; {remedy}"):
        captures.softmax_map("entropy")
    with pytest.raises(
        UserError, match="softmax_map: there is no sink; choose from entropy, sink_prob"
    ):
        captures.softmax_map("sink")


def test_a_query_that_is_not_finite_is_no_part_of_a_mean(predict: Run, tmp_path: Path) -> None:
    assert predict(sniffer={"capture": STATISTICS}) == 0
    root = tmp_path / "root"
    path = root / "l01h02q" / "data.parquet"
    table = pq.read_table(path)
    values = table["entropy"].to_numpy().copy()
    values[3] = np.nan
    column = table.schema.get_field_index("entropy")
    pq.write_table(table.set_column(column, table.schema.field(column), pa.array(values)), path)
    found = Captures(root).softmax_map("entropy").of(Captures(root).head(1, 2))
    assert found == pytest.approx(np.nanmean(values), rel=1e-6)


def test_attention_of_sampled_rows(predict: Run, tmp_path: Path) -> None:
    """Their scores are those of the whole; probabilities are given where all keys are there."""
    assert predict("whole") == 0
    assert predict("sampled", sniffer={"capture": SAMPLED}) == 0
    whole = Captures(tmp_path / "whole").attention(2, 3, "topic-2")
    sampled = Captures(tmp_path / "sampled").attention(2, 3, "topic-2")
    assert 10 < len(sampled.query_positions) < len(whole.query_positions)
    part = whole.scores[sampled.query_positions][:, sampled.key_positions]
    torch.testing.assert_close(sampled.scores, part, atol=1e-5, rtol=1e-5)
    assert not sampled.is_complete.all()
    with pytest.raises(UserError, match=r"attention: \d+ of \d+ queries attend to keys"):
        _ = sampled.probabilities
    shares = sampled.among_kept.sum(dim=1)
    has_keys = (sampled.scores > -torch.inf).any(dim=1)
    torch.testing.assert_close(shares, has_keys.float())


@pytest.mark.parametrize(("family", "window"), [("mistral", 8), ("llama", None)])
def test_completeness_counts_the_window(
    family: str, window: int | None, predict: Run, tmp_path: Path
) -> None:
    assert predict(family=family, sniffer={"capture": SAMPLED}) == 0
    attention = Captures(tmp_path / "root").attention(0, 0, "topic-2")
    kept = set(attention.key_positions.tolist())
    expected = [
        set(range(0 if window is None else max(0, p - window + 1), p + 1)) <= kept
        for p in attention.query_positions.tolist()
    ]
    assert attention.is_complete.tolist() == expected
    # Behind the first window, where all keys before a query are never kept.
    assert any(expected[8:]) is (window is not None) and not all(expected[8:])
    queries = [p for p, complete in zip(attention.query_positions.tolist(), expected, strict=True)]
    first = Captures(tmp_path / "root").attention(0, 0, "topic-2", queries=queries[:2])
    assert first.query_positions.tolist() == queries[:2]


def test_a_head_in_every_form(captures: Captures, tmp_path: Path) -> None:
    stored = pq.read_table(tmp_path / "root" / "l01h02q" / "data.parquet")
    head = captures.head(1, 2)
    assert (head.name, len(head)) == ("l01h02q", sum(LENGTHS))
    assert head.arrow().equals(stored)
    expected = np.stack(stored["vector"].to_numpy())
    arrays, tensors, frame = head.numpy(), head.torch(), head.pandas()
    np.testing.assert_array_equal(arrays["vector"], expected)
    np.testing.assert_array_equal(tensors["vector"].numpy(), expected)
    assert (arrays["vector"].dtype, tensors["vector"].dtype) == (np.float32, torch.float32)
    assert isinstance(frame, pd.DataFrame)
    np.testing.assert_array_equal(np.stack(frame["vector"]), expected)
    for column in ("bucket", "example_id", "position"):
        for rows in (arrays, tensors, frame):
            assert list(rows[column]) == stored[column].to_pylist()
    texts = {row["example_id"]: row["source_id"] for row in captures.examples.to_pylist()}
    assert list(frame["source_id"]) == [texts[number] for number in frame["example_id"]]
    assert head.arrow(["position"]).column_names == ["position"]
    tensors["vector"].add_(1)


def test_token_strings_come_where_they_were_captured(
    predict: Run, captures: Captures, tmp_path: Path, texts: list[Any]
) -> None:
    assert "token_str" not in captures.head(0, 0).numpy()
    assert predict("tokens", sniffer={"capture": {"capture_token_strings": True}}) == 0
    head = Captures(tmp_path / "tokens").head(0, 0).where(example="topic-1")
    assert "".join(head.numpy()["token_str"]).replace("Ġ", " ") == texts[1]["text"]


def test_filters(predict: Run, tmp_path: Path) -> None:
    assert predict(sniffer={"capture": {"min_bucket_size": 8}}) == 0
    captures = Captures(tmp_path / "root")
    head = captures.head(3, 0, "q")
    rows = head.pandas()
    first, second, ids = example_id("topic-0"), example_id("topic-2"), captures.examples
    for chosen, kept in (
        (dict(example=first), rows.example_id == first),
        (dict(example="topic-0"), rows.example_id == first),
        (dict(example=["topic-0", second]), rows.example_id.isin([first, second])),
        (dict(bucket=2), rows.bucket == 2),
        (dict(bucket=[0, 3]), rows.bucket.isin([0, 3])),
        (dict(position=range(3, 9)), rows.position.between(3, 8)),
        (dict(position=range(1, 30, 7)), rows.position.isin([1, 8, 15, 22, 29])),
        (dict(position=np.array([5, 11])), rows.position.isin([5, 11])),
        (dict(position=np.int64(4)), rows.position == 4),
        (dict(position=torch.tensor(4)), rows.position == 4),
        (dict(position=[4, 2**40]), rows.position == 4),
        (dict(example=np.int32(first)), rows.example_id == first),
        (
            dict(example=ids["source_id"].slice(0, 2)),
            rows.example_id.isin(ids["example_id"][:2].to_numpy()),
        ),
        (dict(example=first, bucket=1), (rows.example_id == first) & (rows.bucket == 1)),
    ):
        some = head.where(**chosen)  # type: ignore[arg-type]
        expected = rows[kept]
        assert 0 < len(some) == len(expected) < len(rows)
        assert some.arrow(["example_id", "position"]).to_pylist() == (
            expected[["example_id", "position"]].to_dict("records")
        )
    narrower = head.where(example=first).where(position=range(4))
    assert narrower.torch()["position"].tolist() == [0, 1, 2, 3]
    assert head.where() is head
    none = head.where(position=10**6)
    assert len(none) == 0
    assert none.torch()["vector"].shape == (0, 16)
    for wrong in (4.7, "4", [1.5]):
        with pytest.raises(UserError, match="position: expected integers, got"):
            head.where(position=wrong)  # type: ignore[arg-type]


def rewrite_in_row_groups(path: Path, rows: int) -> None:
    pq.write_table(pq.read_table(path), path, row_group_size=rows)


def test_row_groups_without_a_wanted_row_are_not_read(captures: Captures, tmp_path: Path) -> None:
    path = tmp_path / "root" / "l00h00q" / "data.parquet"
    rewrite_in_row_groups(path, 16)
    head = captures.head(0, 0)
    last = head.arrow(["example_id"])["example_id"][-1].as_py()
    expected = head.where(example=last).torch()["vector"]
    metadata = pq.read_metadata(path)
    column = metadata.schema.to_arrow_schema().get_field_index("vector")
    with path.open("r+b") as file:
        chunk = metadata.row_group(0).column(column)
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(bytes(chunk.total_compressed_size))
    assert torch.equal(head.where(example=last).torch()["vector"], expected)
    with pytest.raises(UserError, match=r"l00h00q/data\.parquet: can't be read"):
        head.torch()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_hold_every_row_once(
    num_workers: int, shuffle: bool, captures: Captures, tmp_path: Path
) -> None:
    rewrite_in_row_groups(tmp_path / "root" / "l00h00q" / "data.parquet", 50)
    head = captures.head(0, 0)
    rows = head.torch()
    torch.manual_seed(1)
    loader = DataLoader(head.batches(16, shuffle=shuffle), num_workers=num_workers)
    epochs = []
    for _ in range(4):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert {len(batch["vector"]) for batch in batches} == {16, 2, sum(LENGTHS) % 50 % 16}
        read = {name: torch.cat([batch[name] for batch in batches]) for name in rows}
        keys = [read[name].long() for name in ("example_id", "position")]
        order = torch.tensor(np.lexsort((keys[1], keys[0])))
        for name, values in rows.items():
            assert torch.equal(read[name][order], values)
        epochs.append(read["vector"])
    firsts = {int((epoch[0] == rows["vector"]).all(dim=1).int().argmax()) // 50 for epoch in epochs}
    assert (len(firsts) > 1) is shuffle
    epochs = epochs[:2]
    assert torch.equal(*epochs) is not shuffle
    assert torch.equal(epochs[0], rows["vector"]) is not (shuffle or num_workers > 0)


def test_batches_of_some_rows(captures: Captures) -> None:
    some = captures.head(0, 0).where(position=range(5))
    (batch,) = some.batches(100)
    assert torch.equal(batch["vector"], some.torch()["vector"])
    assert "token_str" not in batch
    joined = list(DataLoader(some.batches(4), batch_size=3))
    assert [len(batch["vector"]) for batch in joined] == [12, 12, len(some) - 24]
    assert len(some.batches(4)) == -(-len(some) // 4)
    assert torch.equal(torch.cat([batch["vector"] for batch in joined]), batch["vector"])
    for wrong in (0, 2.5):
        with pytest.raises(UserError, match="batch_size: must be an integer of at least 1"):
            some.batches(wrong)  # type: ignore[arg-type]


def test_what_is_in_it(captures: Captures, texts: list[Any], tmp_path: Path) -> None:
    assert [head.name for head in captures.heads] == [
        path.parent.name
        for layer in range(4)
        for kind in "qk"
        for path in sorted((tmp_path / "root").glob(f"l0{layer}h*{kind}/data.parquet"))
    ]
    assert list(captures.layers) == [0, 1, 2, 3]
    assert captures.settings["capture"]["sampler"]["type"] == "all"
    assert set(captures.examples["source_id"].to_pylist()) == {row["id"] for row in texts}
    assert repr(captures).startswith("<Captures of llama")
    assert repr(captures).endswith("24 heads in 4 layers, 7 examples>")
    assert repr(captures.head(0, 1, "k")) == f"<Head l00h01k: {sum(LENGTHS)} rows, head_dim 16>"
    assert captures.key_head(0, 1).name == "l00h00k"
    assert captures.key_head(0, 2).name == "l00h01k"


def test_mistakes_are_named(captures: Captures, predict: Run, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"l00h07q: not captured; layer 0 has the query heads 0, 1, 2, 3"
    ):
        captures.head(0, 7)
    with pytest.raises(UserError, match="l09h00k: not captured"):
        captures.key_head(9, 0)
    with pytest.raises(UserError, match="key_head: layer 0 has the query heads 0 to 3, and not 9"):
        captures.key_head(0, 9)
    with pytest.raises(UserError, match="kind: expected one of q, k, v, o, got Q"):
        captures.head(0, 0, "Q")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="columns: there is no postion; choose from bucket, example_id"):
        captures.head(0, 0).arrow(["postion"])
    with pytest.raises(UserError, match="l00h00q: no one of these queries of example topic-0"):
        captures.attention(0, 0, "topic-0", queries=[])
    with pytest.raises(UserError, match="no example has the source id nobody"):
        captures.head(0, 0).where(example="nobody")
    with pytest.raises(UserError, match="l00h00q: no row of example 12345"):
        captures.attention(0, 0, 12345)
    with pytest.raises(UserError, match="nothing: no such directory is here"):
        Captures(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no manifest\.json is here"):
        Captures(tmp_path)
    with pytest.raises(UserError, match="s3://bucket/root: an address"):
        Captures("s3://bucket/root")
    with pytest.raises(UserError, match="a directory has no revision main"):
        Captures(tmp_path / "root", revision="main")
    assert predict("pre", sniffer={"capture": {"capture_pre_rope": True, "layers": [1, 3]}}) == 0
    with pytest.raises(UserError, match="the vectors are those before RoPE"):
        Captures(tmp_path / "pre").attention(1, 0, "topic-0")
    with pytest.raises(
        UserError, match=r"l00h00q: not captured; there are query heads of the layers 1, 3$"
    ):
        Captures(tmp_path / "pre").head(0, 0)


@pytest.mark.parametrize(("name", "overrides"), [("doge", {}), ("falcon", {"alibi": True})])
def test_attention_that_q_and_k_dont_explain_is_refused(
    name: str, overrides: dict[str, Any], predict: Run, tmp_path: Path
) -> None:
    """Falcon rounds its ALiBi, which shows in texts of more than 256 tokens."""
    config = tiny_config(name)
    for field, value in overrides.items():
        setattr(config, field, value)
    tiny_causal_lm(name, config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert predict(model={"name": str(tmp_path / "model")}) == 0
    with pytest.raises(UserError, match=r"queries and keys alone don't explain .* layer 0: .*bias"):
        Captures(tmp_path / "root").attention(0, 0, "topic-0")


def test_one_of_1280_heads_opens_one_file_and_the_manifest(
    hub: LoopbackHub, predict: Run, tmp_path: Path
) -> None:
    tiny_model(MANY_HEADS).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    published = {"hf_repo_id": REPO, "hf_branch": "many"}
    data = {"path": str(write_jsonl(tmp_path / "text.jsonl", [{"id": "a", "text": "some text"}]))}
    assert (
        predict(model={"name": str(tmp_path / "model")}, data=data, sniffer={"output": published}) == 0
    )
    with opened_files(tmp_path / "root") as files:
        local = Captures(tmp_path / "root").head(19, 31, "k").torch()
    assert set(files) == {"manifest.json", "l19h31k/data.parquet"}

    hub.forget()
    remote = Captures(REPO, revision="many").head(19, 31, "k").torch()
    assert torch.equal(remote["vector"], local["vector"])
    fetched = {
        r.path.partition("/resolve/")[2].partition("/")[2]
        for r in hub.requests
        if "/resolve/" in r.path
    }
    assert fetched == {"manifest.json", "l19h31k/data.parquet"}
    hub.forget()
    assert torch.equal(
        Captures(REPO, revision="many").head(19, 31, "k").torch()["vector"], local["vector"]
    )
    assert not any("/cdn/" in request.path for request in hub.requests), "it is in the cache"
    with pytest.raises(UserError, match=rf"{REPO}, revision main: no capture is there; .*: many\."):
        Captures(REPO)
    with pytest.raises(UserError, match=r"revision other: no capture is there; .*: many$"):
        Captures(REPO, revision="other")
    with pytest.raises(
        UserError, match=r"someone/nothing, revision main: manifest\.json: it is not there"
    ):
        Captures("someone/nothing")


def test_a_capture_stays_that_of_its_commit(hub: LoopbackHub, predict: Run, tmp_path: Path) -> None:
    published = {"output": {"hf_repo_id": REPO, "hf_branch": "tiny"}}
    assert predict(data={"max_samples": 3}, sniffer=published) == 0
    captures = Captures(REPO, revision="tiny")
    assert predict(sniffer=published) == 0
    assert len(captures.head(0, 0)) == captures.head(0, 0).arrow().num_rows == sum(LENGTHS[:3])
    assert len(Captures(REPO, revision="tiny").head(0, 0)) == sum(LENGTHS)


def test_heads_go_to_other_processes(captures: Captures) -> None:
    head = captures.head(1, 0).where(example="topic-2", position=range(7))
    copy = pickle.loads(pickle.dumps(head))
    assert torch.equal(copy.torch()["vector"], head.torch()["vector"])
    assert repr(pickle.loads(pickle.dumps(captures)).heads) == repr(captures.heads)


def test_damaged_data_roots_are_named(captures: Captures, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "l00h00q" / "data.parquet").write_bytes(b"PAR1")
    (root / "l00h01q" / "data.parquet").unlink()
    (root / "examples" / "data.parquet").unlink()
    batches = captures.head(0, 0).batches(4)
    for task, message in (
        (captures.head(0, 0).numpy, r"l00h00q/data\.parquet: can't be read"),
        (lambda: len(captures.head(0, 0).where(bucket=0)), r"l00h00q/data\.parquet: can't be read"),
        (lambda: next(iter(batches)), r"l00h00q/data\.parquet: can't be read"),
        (captures.head(0, 1).numpy, r"l00h01q/data\.parquet: missing, though the manifest has it"),
        (lambda: captures.examples, r"examples/data\.parquet: missing"),
    ):
        with pytest.raises(UserError, match=message):
            task()  # type: ignore[operator]
    manifest = json.loads((root / "manifest.json").read_text())
    for content, message in (
        ([], "damaged, it is no manifest of a run"),
        ({}, "damaged, it is no manifest of a run"),
        (manifest | {"schema_version": 99}, "schema_version 99 is newer than this qk-sniffer"),
    ):
        (root / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            Captures(root)


def test_a_data_root_of_an_older_version(predict: Run, tmp_path: Path) -> None:
    """Its manifest has no scale of the layers; it is read, and the same command goes on with it."""
    assert predict(data={"max_samples": 3}) == 0
    root = tmp_path / "root"
    manifest = json.loads((root / "manifest.json").read_text())
    for layer in manifest["layers"]:
        del layer["scores"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    streams = [
        {"layer_idx": layer, "kind": kind, "heads": list(range(count)), "head_dim": 16}
        for layer in range(4)
        for kind, count in (("q", 4), ("k", 2))
    ]
    geometry = json.dumps([streams, manifest["layers"]], sort_keys=True)
    expected = xxhash.xxh3_64_hexdigest(geometry.encode())
    assert manifest["fingerprint"]["model.heads"] == expected, "older data roots could not be continued"
    assert len(Captures(root).head(0, 0).numpy()["vector"]) == sum(LENGTHS[:3])
    with pytest.raises(UserError, match="made by an older version, whose manifest lacks the scale"):
        Captures(root).attention(0, 0, "topic-0")
    assert predict() == 0
    assert Captures(root).attention(0, 0, "topic-0").probabilities.shape == (LENGTHS[0], LENGTHS[0])


def test_offline_and_not_in_the_cache() -> None:
    with pytest.raises(
        UserError, match=r"someone/attention, .*HF_HUB_OFFLINE keeps the client from the Hub"
    ):
        Captures(REPO, revision="many")
    with pytest.raises(
        UserError, match=r"HF_HUB_OFFLINE .* No directory here is called data/demos either"
    ):
        Captures("data/demos")
