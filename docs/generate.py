"""Writes what the code itself says of its fields and commands: ``python docs/generate.py``."""

import argparse
import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import docstring_parser
import lightning.pytorch as pl

from qk_sniffer.callback import SnifferCallback
from qk_sniffer.cli import main as command
from qk_sniffer.config import CaptureConfig, MomentsConfig, SamplerConfig, TokenizerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.module import SnifferModule
from qk_sniffer.recording import fingerprint, settings

DOCS = Path(__file__).parent
HELP_FILE = DOCS.parent / "src" / "qk_sniffer" / "predict" / "help.txt"
SECTIONS = {"model": SnifferModule, "data": TextDataModule, "sniffer": SnifferCallback}
TITLES = {
    "model": "The model, and how it is loaded",
    "data": "The texts, and how they are batched",
    "data.tokenizer": "How text becomes tokens",
    "sniffer": "The check of the capture",
    "sniffer.output": "Where the files go",
    "sniffer.capture": "What is captured",
    "sniffer.capture.sampler": "Which positions are kept",
    "sniffer.capture.head_sampling": "A random draw of heads",
    "sniffer.moments": "Moments of every token, beside the rows",
    "trainer": "The devices, and how Lightning runs the model",
}
TRAINER = {
    "accelerator": "cpu, gpu, or auto for what there is.",
    "devices": "Devices of each node, one process for each; 1 with `model.device_map`, a multiple of "
    "`model.tensor_parallel`.",
    "num_nodes": "Nodes of the run, all started with the same command.",
    "strategy": "auto is ddp for several devices; in a notebook ddp_notebook.",
    "precision": "Leave it: `model.dtype` sets the number format, and another value is refused.",
    "limit_predict_batches": "Batches, or a share of them, after which each process stops; the card "
    "then says that it is a part.",
    "enable_progress_bar": "Whether to show batches, tokens a second and rows.",
    "logger": "Loggers, one or a list, such as CSVLogger, that are told how far the run is.",
    "log_every_n_steps": "Batches between what loggers get; a minute and the end are told too.",
    "callbacks": "Callbacks of your own, beside the one of the section sniffer.",
}
"""The fields of Lightning's Trainer that a prediction needs."""

CONFIG_TOP = """\
# Config reference

Every field of a config file, from the same docstrings as `qk-sniffer predict --help`. On the command line a
field is an option, `--data.max_samples 10`, which wins over the file; a list has brackets, `[3]`, and a pattern
of files stands in quotes, `'texts/*.jsonl'`, lest the shell spell it out. Of several `--config` files a later
one wins, and a file may build on another, `config: base/qwen3.yaml`, named from its own directory.
`qk-sniffer predict --config FILE --print_config` prints the result with comments.

**Fixed** fields decide which rows there are and what is in them: runs that add to one data root must have
the same. The others may change whenever a run [goes on](data-root.md#when-it-stops).

`make docs` writes this page.
"""

TRAINER_TOP = """\
The arguments of [Lightning's Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html), of which
a prediction needs these:
"""

COMMANDS_TOP = """\
# Commands

The exit status is 0 on success, 1 if `verify` finds a fault, 2 for a mistake, 130 after Ctrl-C and 143 after
SIGTERM. For a mistake, one line on standard error names the field or file and
[the remedy](troubleshooting.md). `make docs` writes this page.
"""


HELP_TOP = """\
Run a causal language model over texts, and write a sample of its queries and keys as one
Parquet file per head.

Every field of a config file is an option too, and an option wins over the file:
`qk-sniffer predict --config run.yaml --data.max_samples 10`.
"""

HELP_END = """\
A config file needs model.name, data.path and sniffer.output.data_root. A list is written [3, 7];
a pattern of files stands in quotes. The other arguments of Lightning's Trainer are fields of the
section trainer, and options, in the same way.
"""


@dataclasses.dataclass(frozen=True)
class Field:
    """One line of the reference."""

    name: str
    type: Any
    default: Any
    meaning: str


def fields(cls: type, prefix: str) -> dict[str, list[Field]]:
    """The fields of a class and of the dataclasses in it, by the name of their section."""
    hints = typing.get_type_hints(cls.__init__)
    meanings = {p.arg_name: p.description for p in docstring_parser.parse_from_object(cls).params}
    own: list[Field] = []
    sections = {prefix: own}
    for name, parameter in list(inspect.signature(cls).parameters.items()):
        inner = _dataclass_in(hints[name])
        if inner is None or parameter.default is None:
            meaning = " ".join(str(meanings[name]).split())
            own.append(Field(f"{prefix}.{name}", hints[name], parameter.default, meaning))
        if inner is not None:
            sections |= fields(inner, f"{prefix}.{name}")
    return sections


def all_fields() -> dict[str, list[Field]]:
    """The sections of a config file, without that of the trainer."""
    return {k: v for section, cls in SECTIONS.items() for k, v in fields(cls, section).items()}


def _trainer_fields() -> list[Field]:
    defaults = inspect.signature(pl.Trainer).parameters
    return [
        Field(f"trainer.{name}", str, defaults[name].default, meaning)
        for name, meaning in TRAINER.items()
    ]


def pages() -> dict[Path, str]:
    """The generated files."""
    return {
        DOCS / "config.md": _config_page(),
        DOCS / "commands.md": _commands_page(),
        HELP_FILE: help_text(),
    }


def help_text() -> str:
    """What ``qk-sniffer predict --help`` prints."""
    parser = argparse.ArgumentParser(
        "qk-sniffer predict",
        usage="%(prog)s --config FILE [--SECTION.FIELD VALUE ...]",
        description=HELP_TOP,
        epilog=HELP_END,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="a config file; of several, a later one wins")
    parser.add_argument("--print_config", action="store_true", help="print all fields, with comments")
    for section, members in all_fields().items():
        group = parser.add_argument_group(TITLES[section])
        for field in members:
            _add_option(group, field)
    group = parser.add_argument_group(TITLES["trainer"])
    for field in _trainer_fields():
        _add_option(group, field)
    return parser.format_help()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)


def _add_option(group: Any, field: Field) -> None:
    required = field.default is inspect.Parameter.empty
    default = "required" if required else f"default: {_yaml(field.default)}"
    meaning = field.meaning.replace("``", "").replace("`", "").replace("%", "%%")
    group.add_argument(f"--{field.name}", metavar=_metavar(field.type), help=f"{meaning} ({default})")


def _metavar(annotation: Any) -> str:
    """What stands for a value on the command line."""
    kinds = [kind for kind in typing.get_args(annotation) or [annotation] if kind is not type(None)]
    if typing.get_origin(annotation) is Literal or kinds == [bool]:
        return "{" + ",".join(kinds if kinds != [bool] else ["true", "false"]) + "}"
    return {int: "INT", float: "NUMBER", list[int]: "[INT,...]"}.get(kinds[0], "VALUE")


def _config_page() -> str:
    # Fields of later versions are settings where they are used.
    sampler = SamplerConfig("positions", keep_first=1, positions=[0], shared=True)
    capture = CaptureConfig(
        capture_values=True,
        capture_outputs=True,
        capture_softmax=True,
        local_positions=1,
        sampler=sampler,
    )
    data = TextDataModule(
        "",
        data_files="",
        messages_column="",
        messages_format="sharegpt",
        tools_column="",
        chat_template="",
        chat_template_kwargs={},
        positions_column="",
        tokenizer=TokenizerConfig(add_special_tokens=True),
    )
    module = SnifferModule(
        "",
        generate={"max_new_tokens": 1},
        quantization={},
        adapter="",
        adapter_revision="",
        merge_adapter=True,
    )
    moments = MomentsConfig(enabled=True, by_bucket=True, pre_rope=True, cross=True)
    fixed = set(fingerprint(settings(module, data, capture, moments)))
    lines = [CONFIG_TOP]
    for section, members in all_fields().items():
        lines += [f"## {section}", "", *_table(members, fixed), ""]
    lines += ["## trainer", "", TRAINER_TOP, "| field | default | meaning |", "|---|---|---|"]
    lines += [
        f"| `{field.name}` | `{_yaml(field.default)}` | {field.meaning} |"
        for field in _trainer_fields()
    ]
    return "\n".join(lines) + "\n"


def _table(members: list[Field], fixed: set[str]) -> Iterator[str]:
    yield "| field | type | default | fixed | meaning |"
    yield "|---|---|---|:-:|---|"
    for field in members:
        required = field.default is inspect.Parameter.empty
        default = "*required*" if required else f"`{_yaml(field.default)}`"
        # head_sampling is fixed as a whole, and its fields with it.
        is_fixed = any(f"{field.name}.".startswith(f"{name}.") for name in fixed)
        meaning = field.meaning.replace("``", "`").replace("<", "&lt;").replace("|", "\\|")
        cells = f"`{field.name}`", _type(field.type), default, "✓" if is_fixed else "", meaning
        yield f"| {' | '.join(cells)} |"


def _type(annotation: Any) -> str:
    """An annotation in the words of YAML."""
    arguments = typing.get_args(annotation)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " or ".join(_type(argument) for argument in arguments)
    if typing.get_origin(annotation) is Literal:
        return ", ".join(map(str, arguments[:-1])) + f" or {arguments[-1]}"
    if typing.get_origin(annotation) is list:
        return f"list of {_type(arguments[0])}"
    if typing.get_origin(annotation) is dict or dataclasses.is_dataclass(annotation):
        return "mapping"
    return {types.NoneType: "null"}.get(annotation, annotation.__name__)


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _dataclass_in(annotation: Any) -> type | None:
    candidates = (annotation, *typing.get_args(annotation))
    return next((c for c in candidates if dataclasses.is_dataclass(c)), None)  # type: ignore[return-value]


def _commands_page() -> str:
    usage = _help()
    names = [name for name in re.findall(r"^  ([a-z-]+) ", usage, re.MULTILINE) if name != "predict"]
    lines = [COMMANDS_TOP, "```text", usage, "```", ""]
    lines += ["## predict", "", "Its options are the fields of the [config](config.md).", ""]
    for name in names:
        lines += [f"## {name}", "", "```text", _help(name), "```", ""]
    return "\n".join(lines)


def _help(*words: str) -> str:
    """What a command prints for ``--help``."""
    width = mock.patch.dict(os.environ, COLUMNS="100")
    with width, contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        if status := command([*words, "--help"]):
            raise RuntimeError(f"{' '.join(words)} --help ended with status {status}")
    return out.getvalue().strip()


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text)
