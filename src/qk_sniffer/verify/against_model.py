"""Stored vectors against the model: it reads a few of the texts again."""

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from qk_sniffer.capture import (
    Chunk,
    Chunks,
    Selection,
    Sniffer,
    active_sniffer,
    captured_streams,
)
from qk_sniffer.config import explain
from qk_sniffer.data import TextDataModule, batch_fields
from qk_sniffer.errors import UserError
from qk_sniffer.ids import ExampleFilter
from qk_sniffer.kinds import LOCAL_POSITIONS, SOFTMAX_COLUMNS, parts_of
from qk_sniffer.models import check_capture
from qk_sniffer.module import SnifferModule
from qk_sniffer.storage import (
    DATA_FILE,
    EXAMPLES_DIRECTORY,
    MANIFEST_FILE,
    damaged,
    examples_schema,
    head_files,
    head_name,
    read_examples,
    require_manifest,
)
from qk_sniffer.verify.data_root import captured_heads, untrusted

_TEXTS = 4


def verify_against_model(data_root: Path, *, trust_code: bool = False) -> list[str]:
    """Let the model of a data root read a few of its texts again, and compare.

    Attention is recomputed from the vectors that the model uses and must be the model's own, and the
    stored vectors, of a few heads of every layer, must be those vectors.

    Args:
        data_root: The data root.
        trust_code: Whether code that its settings name may run.

    Returns:
        One line for each fault; none if all is well.

    Raises:
        UserError: The model or the texts can't be loaded, or need code that is not trusted.
    """
    manifest = require_manifest(data_root)
    settings = manifest["settings"]
    if "name" not in settings["model"] or "path" not in settings["data"]:
        raise UserError(
            f"{data_root}: the run had a module or texts of its own, which the manifest does not name, "
            "so they can't be read again; leave out --against-model"
        )
    if not trust_code:
        _refuse_code(data_root, settings)
    comparison = _Comparison(data_root, manifest)
    made = _modules_of(data_root, settings)
    if settings["model"].get("generate") is not None:
        # What it would write now may differ in a token, by a rounding.
        made.model.continuation = comparison.stored_continuation
    trainer = pl.Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[comparison],
    )
    trainer.predict(made.model, datamodule=made.data, return_predictions=False)
    return comparison.faults()


def _refuse_code(data_root: Path, settings: Mapping[str, Any]) -> None:
    """See that no code runs which a manifest names: it may be somebody else's.

    Raises:
        UserError: It names some.
    """
    model, data = settings["model"], settings["data"]
    named = {
        "model.trust_remote_code": model.get("trust_remote_code"),
        "model.models_dir": model.get("models_dir"),
        "data.tokenizer.trust_remote_code": data.get("tokenizer", {}).get("trust_remote_code"),
    }
    for field, value in named.items():
        if value:
            raise untrusted(data_root, field, value)


def _modules_of(data_root: Path, settings: Mapping[str, Any]) -> Any:
    """The module and the data module of a run, which reads a text at a time.

    Raises:
        UserError: Its settings are none.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SnifferModule, "model")
    parser.add_class_arguments(TextDataModule, "data")
    sections = {
        # One process reads here, however many shared the model.
        "model": settings["model"] | {"tensor_parallel": 1},
        "data": settings["data"] | {"batch_size": 1},
    }
    try:
        parsed = parser.parse_object(sections)
    except ArgumentError as error:
        fault = explain(str(error), ())
        raise damaged(data_root / MANIFEST_FILE, f"its settings are no run's ({fault})") from error
    return parser.instantiate_classes(parsed)


class _Comparison(pl.Callback):
    """Captures the chosen texts once more and holds them against the files."""

    def __init__(self, data_root: Path, manifest: dict[str, Any]) -> None:
        self._data_root = data_root
        self._facts = manifest["heads"]
        self._heads = captured_heads(manifest)
        self._capture = manifest["settings"]["capture"]
        self._selection = Selection.of(self._capture)
        schema = examples_schema(manifest["settings"])
        examples = read_examples(data_root / EXAMPLES_DIRECTORY / DATA_FILE, schema=schema)
        ids = examples["example_id"].to_pylist()
        self._lengths = dict(zip(ids, examples["n_tokens"].to_pylist(), strict=True))
        self._left = set(random.Random(0).sample(ids, min(_TEXTS, len(ids))))
        self._generated = dict[int, list[int]]()
        if "generated_ids" in schema.names:
            chosen = examples.filter(
                pc.is_in(examples["example_id"], pa.array(sorted(self._left), pa.int32()))
            )
            columns = (chosen[name].to_pylist() for name in ("example_id", "generated_ids"))
            self._generated = dict(zip(*columns, strict=True))
        self._found: list[str] = []
        self._chunks = Chunks()
        self._running = ExitStack()

    def stored_continuation(self, texts: Sequence[Tensor], example_ids: Sequence[int]) -> list[Tensor]:
        """What the model has added to each text in the run, (N,) int64."""
        return [torch.tensor(self._generated[example_id]) for example_id in example_ids]

    def example_filter(self, trainer: pl.Trainer) -> ExampleFilter:
        """The chosen texts, which are all that the data module reads."""
        return ExampleFilter(np.array(sorted(self._left), np.int32), listed=True)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make a sniffer like that of the run."""
        self._backbone = cast(nn.Module, pl_module.backbone)
        self._dtype = next(self._backbone.parameters()).dtype
        self._sniffer = Sniffer(
            captured_streams(self._heads, parts_of(self._capture)),
            self._selection,
            self._chunks,
            local_positions=self._capture.get("local_positions", LOCAL_POSITIONS),
            pre_rope=self._capture["capture_pre_rope"],
        )
        self._running.enter_context(active_sniffer(self._sniffer))

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        """Recompute attention, and draw the rows that were stored; a batch is one text."""
        fields = batch_fields(batch, listed=self._selection.needs_lists)
        (example_id,), lengths = fields.example_ids.tolist(), fields.sequence_lengths.tolist()
        if lengths != [self._lengths[example_id]]:
            self._found.append(
                f"{EXAMPLES_DIRECTORY}/{DATA_FILE}: the text of example {example_id} has {lengths[0]} "
                f"tokens now and had {self._lengths[example_id]}"
            )
        try:
            check_capture(self._backbone, batch["input_ids"], list(self._heads))
        except UserError as error:
            self._found.append(f"example {example_id}: {error}")
        self._sniffer.begin_batch([example_id], lengths, fields.listed)
        self._left.discard(example_id)

    def on_predict_batch_end(self, *_: Any) -> None:
        """Compare the rows of the text."""
        self._sniffer.flush_batch()
        for chunk in self._chunks:
            self._compare(chunk)
        self._chunks.clear()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the attention."""
        self._running.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let go of the attention."""
        self._running.close()

    def faults(self) -> list[str]:
        """What was found, and the texts that were not."""
        missing = [
            f"{EXAMPLES_DIRECTORY}/{DATA_FILE}: example {example_id} is not in the dataset any more"
            for example_id in sorted(self._left)
        ]
        return self._found + missing

    def _compare(self, chunk: Chunk) -> None:
        """Hold a few heads of a layer and kind of one text against their files."""
        heads = self._heads[chunk.layer_idx].of(chunk.kind)
        fault_of = self._fault_of_statistics if chunk.kind == "softmax" else self._fault
        for number in sorted({0, len(heads) - 1}):
            name = head_name(
                chunk.layer_idx, heads[number], "q" if chunk.kind == "softmax" else chunk.kind
            )
            if fault := fault_of(name, chunk, chunk.vectors[number]):
                files = next(iter(head_files(name, self._facts[name])))
                self._found.append(f"{files}: example {int(chunk.example_ids[0])}: {fault}")

    def _read(self, name: str, chunk: Chunk, columns: list[str]) -> pa.Table:
        """Some columns of the stored rows of a text."""
        return pq.read_table(
            [str(self._data_root / path) for path in head_files(name, self._facts[name])],
            columns=columns,
            filters=[("example_id", "=", int(chunk.example_ids[0]))],
        )

    def _fault_of_statistics(self, name: str, chunk: Chunk, values: Tensor) -> str | None:
        rows = self._read(name, chunk, list(SOFTMAX_COLUMNS))
        if rows.num_rows != len(values):
            # Said of the queries themselves.
            return None
        for number, column in enumerate(SOFTMAX_COLUMNS):
            # A rounding may decide which of two keys has the largest score.
            if column == "argmax_position":
                continue
            stored, now = torch.from_numpy(rows[column].to_numpy().copy()), values[:, number]
            error = float(((stored - now).abs() / (1 + now.abs())).max())
            if not error <= _tolerance(self._dtype):
                return f"{column} is off by {error:.1%} from what the model's softmax gives"
        return None

    def _fault(self, name: str, chunk: Chunk, vectors: Tensor) -> str | None:
        rows = self._read(name, chunk, ["position", "vector"])
        if rows["position"].to_pylist() != chunk.positions.tolist():
            return "its positions are not those that the settings draw"
        stored = torch.from_numpy(np.stack(rows["vector"].to_numpy()))
        error = float(((stored - vectors.float()).norm(dim=1) / vectors.float().norm(dim=1)).max())
        if not error <= _tolerance(vectors.dtype):
            return f"a vector is off by {error:.1%} from the one that the model attends with"
        return None


def _tolerance(dtype: torch.dtype) -> float:
    """How far numbers may be off that a model computes in a dtype."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)
