"""Configs of the original scripts, as they are converted and as predict takes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from qk_sniffer.cli import main
from qk_sniffer.convert_config.original import FIELDS
from test_configs import error_of, leaves, merged, printed

SMALLEST: dict[str, dict[str, Any]] = {
    "dataset": {"path": "someone/texts"},
    "model": {"name": "someone/model"},
    "tokenizer": {},
    "inference": {},
    "capture": {},
    "output": {},
}

EVERY_FIELD: dict[str, dict[str, Any]] = {
    "dataset": {
        "path": "someone/texts",
        "name": "english",
        "split": "validation",
        "text_column": "body",
        "id_column": "key",
        "max_samples": 12,
        "streaming": True,
    },
    "model": {
        "name": "someone/model",
        "revision": "step-100",
        "dtype": "BF16",
        "device_map": {"": "cuda:1"},
        "trust_remote_code": True,
        "attn_implementation": "eager",
        "config_overrides": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    },
    "tokenizer": {
        "name": "someone/tokenizer",
        "max_length": 77,
        "padding": "max_length",
        "trust_remote_code": True,
        "padding_side": "left",
    },
    "inference": {
        "batch_size": 5,
        "autocast_dtype": "fp16",
        "distributed": True,
        "backend": "gloo",
        "debug_logging": True,
        "debug_log_every_n_batches": 10,
        "mps_cleanup_every_batches": 3,
    },
    "capture": {
        "capture_queries": True,
        "capture_keys": False,
        "layers": [0, 2],
        "heads": [1],
        "head_sampling": {"count": 3, "seed": 9},
        "full_attention_only": True,
        "sampler": {"type": "Uniform", "base_rate": 2},
        "max_rows_per_batch": 100,
        "queue_size": 8,
        "min_bucket_size": 256,
        "capture_pre_rope": True,
        "capture_token_strings": True,
    },
    "output": {
        "data_root": "captures",
        "readme_path": "CARD.md",
        "hf_repo_id": "someone/attention",
        "hf_branch": "model-texts",
        "private": True,
        "write_batch_size": 1024,
    },
}

CONVERTED = {
    "model.name": "someone/model",
    "model.revision": "step-100",
    "model.dtype": "bfloat16",
    "model.attn_implementation": "eager",
    "model.trust_remote_code": True,
    "model.device_map": None,
    "model.config_overrides.rope_scaling.rope_type": "yarn",
    "model.config_overrides.rope_scaling.factor": 4.0,
    "data.path": "someone/texts",
    "data.name": "english",
    "data.split": "validation",
    "data.text_column": "body",
    "data.id_column": "key",
    "data.max_samples": 12,
    "data.streaming": True,
    "data.tokenizer.name": "someone/tokenizer",
    "data.tokenizer.max_length": 77,
    "data.tokenizer.trust_remote_code": True,
    "data.batch_size": 5,
    "sniffer.capture.capture_queries": True,
    "sniffer.capture.capture_keys": False,
    "sniffer.capture.layers": [0, 2],
    "sniffer.capture.heads": [1],
    "sniffer.capture.head_sampling.count": 3,
    "sniffer.capture.head_sampling.seed": 9,
    "sniffer.capture.full_attention_only": True,
    "sniffer.capture.capture_pre_rope": True,
    "sniffer.capture.capture_token_strings": True,
    "sniffer.capture.min_bucket_size": 256,
    "sniffer.capture.sampler.type": "uniform",
    "sniffer.capture.sampler.base_rate": 2.0,
    "sniffer.capture.sampler.seed": 0,
    "sniffer.output.data_root": "captures",
    "sniffer.output.hf_repo_id": "someone/attention",
    "sniffer.output.hf_branch": "model-texts",
    "sniffer.output.private": True,
    "trainer.accelerator": "auto",
    "trainer.devices": "auto",
}

# What the smallest config has instead: the defaults of the original where ours are others.
CONVERTED_DEFAULTS = {
    "model.revision": "main",
    "model.dtype": "float16",
    "model.device_map": "auto",
    "data.split": "train",
    "data.text_column": "text",
    "data.tokenizer.name": "someone/model",
    "data.tokenizer.max_length": 4096,
    "data.batch_size": 1,
    "sniffer.capture.min_bucket_size": 128,
    "sniffer.capture.sampler.type": "log_uniform",
    "sniffer.capture.sampler.base_rate": 1.0,
    "sniffer.output.data_root": "data",
    "trainer.devices": 1,
}

Convert = Callable[..., tuple[dict[str, Any], list[str]]]


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Convert a config with some sections changed; gives the new one and what has no equal."""

    def convert(config: dict[str, Any], **sections: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        (tmp_path / "old.yaml").write_text(yaml.safe_dump(merged(config, sections)))
        assert main(["convert-config", str(tmp_path / "old.yaml")]) == 0
        captured = capsys.readouterr()
        (tmp_path / "new.yaml").write_text(captured.out)
        return yaml.safe_load(captured.out), captured.err.splitlines()

    return convert


def named(lines: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in lines]


def test_every_field_has_its_value_in_the_new_config(
    convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tested = {section: set(fields) for section, fields in EVERY_FIELD.items()}
    assert tested == {name: set(fields) for name, fields in FIELDS.items() if "." not in name}
    new, _ = convert(EVERY_FIELD)
    assert dict(leaves(new)) == CONVERTED
    resolved = dict(leaves(printed(capsys, "--config", str(tmp_path / "new.yaml"))))
    assert CONVERTED.items() <= resolved.items()


def test_defaults_that_differ_are_written_out(
    convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, _ = convert(SMALLEST)
    assert CONVERTED_DEFAULTS.items() <= dict(leaves(new)).items()
    resolved = dict(leaves(printed(capsys, "--config", str(tmp_path / "new.yaml"))))
    assert CONVERTED_DEFAULTS.items() <= resolved.items()


def test_what_has_no_equal_is_said_once_for_each_field(convert: Convert) -> None:
    _, lines = convert(EVERY_FIELD)
    assert sorted(named(lines)) == [
        "capture.head_sampling",
        "capture.max_rows_per_batch",
        "capture.queue_size",
        "capture.sampler",
        "dataset.id_column",
        "inference.autocast_dtype",
        "inference.backend",
        "inference.debug_log_every_n_batches",
        "inference.debug_logging",
        "inference.distributed",
        "inference.mps_cleanup_every_batches",
        "output.data_root",
        "output.hf_repo_id",
        "output.readme_path",
        "output.write_batch_size",
        "tokenizer.padding",
        "tokenizer.padding_side",
    ]
    _, lines = convert(SMALLEST)
    assert named(lines) == ["model.attn_implementation", "capture.sampler", "output.data_root"]


@pytest.mark.parametrize(
    ("section", "fields", "expected", "line"),
    [
        ("model", {"device_map": {"": 0}}, {"model.device_map": None}, "model.device_map"),
        ("model", {"device_map": None}, {"model.device_map": None}, None),
        ("model", {"dtype": "fp32"}, {"model.dtype": "float32"}, "inference.autocast_dtype"),
        ("model", {"dtype": "float16"}, {"model.dtype": "float16"}, None),
        ("capture", {"heads": [1]}, {"sniffer.capture.heads": [1]}, "capture.heads"),
        ("capture", {"heads": [], "layers": []}, {"sniffer.capture.heads": None}, None),
        ("capture", {"sampler": None}, {"sniffer.capture.sampler.type": "log_uniform"}, None),
        ("capture", {"max_rows_per_batch": None, "queue_size": None}, {}, None),
        ("output", {"hf_repo_id": "a/b"}, {"sniffer.output.hf_branch": None}, "output.hf_branch"),
        (
            "output",
            {"hf_repo_id": "a/b", "hf_branch": "main"},
            {"sniffer.output.hf_branch": None},
            "output.hf_branch",
        ),
        ("inference", {"distributed": False, "backend": "auto"}, {"trainer.devices": 1}, None),
        ("dataset", {"id_column": ""}, {"data.id_column": None}, None),
    ],
)
def test_a_value_is_taken_as_the_original_took_it(
    section: str,
    fields: dict[str, Any],
    expected: dict[str, Any],
    line: str | None,
    convert: Convert,
) -> None:
    new, lines = convert(SMALLEST, **{section: fields})
    assert expected.items() <= dict(leaves(new)).items()
    usual = {"model.attn_implementation", "capture.sampler", "output.data_root", "output.hf_repo_id"}
    assert set(named(lines)) - usual == ({line} if line else set())


def test_a_converted_config_runs(
    convert: Convert, model_dir: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    convert(
        SMALLEST,
        dataset={"path": str(text_file), "id_column": "id", "max_samples": 4},
        model={"name": str(model_dir("llama")), "dtype": "float32"},
        tokenizer={"max_length": 20, "padding": "longest"},
        inference={"batch_size": 3},
        capture={"sampler": {"type": "all"}, "layers": [1], "capture_queries": False},
        output={"data_root": str(tmp_path / "root")},
    )
    assert main(["predict", "--config", str(tmp_path / "new.yaml"), "--trainer.accelerator=cpu"]) == 0
    files = {file.parent.name: pq.read_table(file) for file in tmp_path.glob("root/l*/data.parquet")}
    assert set(files) == {"l01h00k", "l01h01k"}
    assert files["l01h00k"].num_rows == 20 + 5 + 20 + 20


WRONG = [
    ("dataset", {"pth": "x"}, "dataset.pth: no such field in the original scripts; did you mean path?"),
    ("inference", {"batchsize": 2}, "inference.batchsize: no such field in the original scripts; did"),
    ("output", {"zzz": 2}, "output.zzz: no such field in the original scripts; remove it or mend"),
    ("capture", {"sampler": {"rate": 2}}, "capture.sampler.rate: no such field"),
    ("capture", {"head_sampling": {"seed": 2}}, "capture.head_sampling.count: required"),
    ("capture", {"head_sampling": 300}, "capture.head_sampling: expected a mapping, got 300"),
    ("capture", {"sampler": {"type": "some"}}, "capture.sampler.type: expected one of log_uniform, un"),
    ("capture", {"sampler": {"base_rate": 0}}, "capture.sampler.base_rate: expected a number above 0"),
    ("capture", {"layers": [1, "2"]}, 'capture.layers: expected a list of integers, got [1, "2"]'),
    ("capture", {"capture_keys": "no"}, 'capture.capture_keys: expected true or false, got "no"'),
    (
        "capture",
        {"capture_keys": False, "capture_queries": False},
        "capture.capture_queries: it and capture_keys are false",
    ),
    ("model", {"dtype": "int8"}, "model.dtype: expected one of float16, fp16"),
    ("model", {"name": None}, "model.name: expected text, got null"),
    ("tokenizer", {"max_length": True}, "tokenizer.max_length: expected an integer above 0, got true"),
    ("dataset", {"max_samples": 0}, "dataset.max_samples: expected an integer above 0, got 0"),
    ("sniffer", {}, "a config of predict already; run `qk-sniffer predict --config "),
    (
        "captrue",
        {},
        "captrue: no section of the original scripts, which have dataset, model, tokenizer, inference, "
        "capture, output; did you mean capture?",
    ),
]


@pytest.mark.parametrize(("section", "fields", "message"), WRONG)
def test_a_wrong_field_is_one_line(
    section: str,
    fields: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(merged(SMALLEST, {section: fields})))
    assert error_of(capsys, "convert-config", str(file)).startswith(f"{file}: {message}")


@pytest.mark.parametrize("missing", SMALLEST)
def test_a_missing_section_is_one_line(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in SMALLEST.items() if k != missing}))
    line = error_of(capsys, "convert-config", str(file))
    assert line.startswith(f"{file}: {missing}: the section is missing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dataset: [", "not valid YAML: while parsing"),
        (b"\xff\xfe\x00", "not valid YAML: "),
        (b"- dataset", "expected a mapping with the sections dataset"),
        (b"", "expected a mapping with the sections dataset"),
        (b"dataset: text", 'dataset: expected a mapping, got "text"'),
        (None, "can't be read (No such file or directory)"),
    ],
)
def test_a_broken_file_is_one_line(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.yaml"
    if content is not None:
        file.write_bytes(content)
    assert error_of(capsys, "convert-config", str(file)).startswith(f"{file}: {message}")
