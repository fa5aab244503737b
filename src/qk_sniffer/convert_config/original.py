"""The config format of the original scripts: its fields, their defaults, and the check of a file."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qk_sniffer.errors import UserError, did_you_mean

Section = dict[str, Any]


class _Kind(NamedTuple):
    """What a field of the original may hold."""

    words: str
    accepts: Callable[[Any], bool]


class _Field(NamedTuple):
    """A field of the original; one whose default is null may be null."""

    kind: _Kind
    default: Any


def _is_integer(value: Any) -> bool:
    return type(value) is int


_TEXT = _Kind("text", lambda value: isinstance(value, str))
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_INTEGER = _Kind("an integer", _is_integer)
_COUNT = _Kind("an integer above 0", lambda value: _is_integer(value) and value > 0)
_RATE = _Kind("a number above 0", lambda value: type(value) in (int, float) and 0 < value < math.inf)
_INDICES = _Kind(
    "a list of integers", lambda value: isinstance(value, list) and all(map(_is_integer, value))
)
_MAPPING = _Kind("a mapping", lambda value: isinstance(value, dict))
_ANYTHING = _Kind("a value", lambda value: True)
DTYPES = {
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float32": "float32",
    "fp32": "float32",
}
_DTYPE = _Kind(
    f"one of {', '.join(DTYPES)}", lambda value: isinstance(value, str) and value.lower() in DTYPES
)
_SAMPLERS = ("log_uniform", "uniform", "all")
_SAMPLER = _Kind(
    f"one of {', '.join(_SAMPLERS)}",
    lambda value: isinstance(value, str) and value.lower() in _SAMPLERS,
)

_REQUIRED = object()

SECTIONS = ("dataset", "model", "tokenizer", "inference", "capture", "output")

# Every field that any version of the original had. What is only set to be known of has no default here,
# though it had one there.
FIELDS: dict[str, dict[str, _Field]] = {
    "dataset": {
        "path": _Field(_TEXT, _REQUIRED),
        "name": _Field(_TEXT, None),
        "split": _Field(_TEXT, "train"),
        "text_column": _Field(_TEXT, "text"),
        "id_column": _Field(_TEXT, None),
        "max_samples": _Field(_COUNT, None),
        "streaming": _Field(_FLAG, False),
    },
    "model": {
        "name": _Field(_TEXT, _REQUIRED),
        "revision": _Field(_TEXT, None),
        "dtype": _Field(_DTYPE, "float16"),
        "device_map": _Field(_ANYTHING, "auto"),
        "trust_remote_code": _Field(_FLAG, False),
        "attn_implementation": _Field(_TEXT, None),
        "config_overrides": _Field(_MAPPING, None),
    },
    "tokenizer": {
        "name": _Field(_TEXT, None),
        "max_length": _Field(_COUNT, 4096),
        "padding": _Field(_ANYTHING, "longest"),
        "trust_remote_code": _Field(_FLAG, False),
        "padding_side": _Field(_TEXT, "right"),
    },
    "inference": {
        "batch_size": _Field(_COUNT, 1),
        "autocast_dtype": _Field(_DTYPE, "float16"),
        "distributed": _Field(_FLAG, False),
        "backend": _Field(_TEXT, "auto"),
        "debug_logging": _Field(_FLAG, False),
        "debug_log_every_n_batches": _Field(_INTEGER, 1),
        "mps_cleanup_every_batches": _Field(_INTEGER, 0),
    },
    "capture": {
        "capture_queries": _Field(_FLAG, True),
        "capture_keys": _Field(_FLAG, True),
        "layers": _Field(_INDICES, None),
        "heads": _Field(_INDICES, None),
        "head_sampling": _Field(_MAPPING, None),
        "full_attention_only": _Field(_FLAG, False),
        "sampler": _Field(_MAPPING, None),
        "max_rows_per_batch": _Field(_INTEGER, None),
        "queue_size": _Field(_INTEGER, None),
        "min_bucket_size": _Field(_COUNT, 128),
        "capture_pre_rope": _Field(_FLAG, False),
        "capture_token_strings": _Field(_FLAG, False),
    },
    "capture.head_sampling": {"count": _Field(_COUNT, _REQUIRED), "seed": _Field(_INTEGER, 0)},
    "capture.sampler": {"type": _Field(_SAMPLER, "log_uniform"), "base_rate": _Field(_RATE, 1.0)},
    "output": {
        "data_root": _Field(_TEXT, "data"),
        "readme_path": _Field(_TEXT, "README.md"),
        "hf_repo_id": _Field(_TEXT, None),
        "hf_branch": _Field(_TEXT, None),
        "private": _Field(_FLAG, False),
        "write_batch_size": _Field(_INTEGER, None),
    },
}


def read_original(file: Path) -> dict[str, Section]:
    """The sections of a config of the original, with the defaults of what it leaves out.

    Raises:
        UserError: The file can't be read, is no such config, or a field is unknown or wrong.
    """
    try:
        loaded = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}); name a config file") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: expected a mapping with the sections {', '.join(SECTIONS)}")
    if "sniffer" in loaded:
        raise UserError(
            f"{file}: a config of predict already; run `qk-sniffer predict --config {file}`"
        )
    for name in loaded:
        if name not in SECTIONS:
            remedy = did_you_mean(str(name), SECTIONS, "remove it or mend its name")
            raise UserError(
                f"{file}: {name}: no section of the original scripts, which have "
                f"{', '.join(SECTIONS)}; {remedy}"
            )
    for name in SECTIONS:
        if name not in loaded:
            raise UserError(f"{file}: {name}: the section is missing; the original scripts need it")
        if not isinstance(loaded[name], dict):
            raise UserError(f"{file}: {name}: expected a mapping, got {_shown(loaded[name])}")
    sections = {name: _checked(file, name, loaded[name]) for name in SECTIONS}
    capture = sections["capture"]
    capture["sampler"] = _checked(file, "capture.sampler", capture["sampler"] or {})
    if capture["head_sampling"] is not None:
        capture["head_sampling"] = _checked(file, "capture.head_sampling", capture["head_sampling"])
    if not (capture["capture_queries"] or capture["capture_keys"]):
        raise UserError(
            f"{file}: capture.capture_queries: it and capture_keys are false; set one to true"
        )
    return sections


def _checked(file: Path, section: str, given: Section) -> Section:
    fields = FIELDS[section]
    for name in given:
        if name not in fields:
            remedy = did_you_mean(str(name), fields, "remove it or mend its name")
            raise UserError(
                f"{file}: {section}.{name}: no such field in the original scripts; {remedy}"
            )
    values = {name: given.get(name, default) for name, (_, default) in fields.items()}
    for name, value in values.items():
        kind, default = fields[name]
        if value is _REQUIRED:
            raise UserError(f"{file}: {section}.{name}: required; the original has no default")
        if not (kind.accepts(value) or (value is None and default is None)):
            raise UserError(f"{file}: {section}.{name}: expected {kind.words}, got {_shown(value)}")
    return values


def _shown(value: Any) -> str:
    """A value much as YAML writes it."""
    return json.dumps(value, default=str, ensure_ascii=False)
