"""Tiny real models, real text, and the command line as a user calls it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from families import FAMILIES, tiny_model
from killing import Processes
from loopback import LoopbackHub, client_of
from qk_sniffer.capture import selection
from qk_sniffer.cli import main
from tiny import tiny_causal_lm

Run = Callable[..., int]
WriteRun = Callable[..., list[str]]


@pytest.fixture(scope="session", autouse=True)
def _private_dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Starts the command line in processes of its own."""
    with closing(Processes(tmp_path_factory.mktemp("processes"))) as processes:
        yield processes


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qk-sniffer"])


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the tiny model of a family, with a tokenizer of one token for each byte."""
    made: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_model(FAMILIES[family]).save_pretrained(made[family])
            byte_tokenizer().save_pretrained(made[family])
        return made[family]

    return directory


@pytest.fixture(scope="session")
def in_float64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny Llama in float64, whose vectors don't show what was read together."""
    directory = tmp_path_factory.mktemp("llama-float64")
    tiny_model(FAMILIES["llama"]).to(torch.float64).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<bos>": 1} | {byte: 2 + i for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>")


def directory_of(family: str, model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """Directory of the tiny model of a family, or else of any architecture, made in ``tmp_path``."""
    if family in FAMILIES:
        return model_dir(family)
    directory = tmp_path / family
    tiny_causal_lm(family).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


LENGTHS = (37, 5, 61, 24, 1, 48, 13)
"""Tokens in each of the texts below: unequal, and one of a single token."""


@pytest.fixture(scope="session")
def texts() -> list[dict[str, Any]]:
    """Rows with a string id and text from the language reference."""
    passages = [topics[name] for name in ("assert", "break", "class", "del", "for", "if", "with")]
    return [
        {"id": f"topic-{i}", "text": passage[:length].encode("ascii", "replace").decode()}
        for i, (passage, length) in enumerate(zip(passages, LENGTHS, strict=True))
    ]


@pytest.fixture(scope="session")
def text_file(texts: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", texts)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def write_run(model_dir: Callable[[str], Path], text_file: Path, tmp_path: Path) -> WriteRun:
    """Write a config with some sections changed; gives the arguments of its run."""

    def write(root: str = "root", *, family: str = "llama", **sections: dict[str, Any]) -> list[str]:
        config: dict[str, Any] = {
            "model": {"name": str(model_dir(family))},
            "data": {"path": str(text_file), "id_column": "id", "batch_size": 3},
            "sniffer": {
                "capture": {"sampler": {"type": "all"}},
                "output": {"data_root": str(tmp_path / root)},
            },
            "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        }
        for section, changes in sections.items():
            _update(config[section], changes)
        file = tmp_path / f"{root}.yaml"
        file.write_text(yaml.safe_dump(config))
        return ["predict", "--config", str(file)]

    return write


@pytest.fixture
def predict(write_run: WriteRun) -> Run:
    """Run ``qk-sniffer predict --config FILE`` with some sections changed; gives the exit status."""
    return lambda *args, **sections: main(write_run(*args, **sections))


def copy_old_and_new(made: Path, predict: Run, tmp_path: Path) -> None:
    """Copy a data root ``old``, and ``new`` with more texts, to a test's directory.

    Args:
        made: Where they are kept, and made by the first test that asks.
        predict: The fixture.
        tmp_path: The test's directory.
    """
    if not any(made.iterdir()):
        assert predict("old", data={"max_samples": 3}) == 0
        assert predict("new") == 0
        for name in ("old", "new"):
            shutil.move(tmp_path / name, made / name)
    for name in ("old", "new"):
        shutil.copytree(made / name, tmp_path / name)


class Maker:
    """Makes data roots of some of the texts, in a directory that several tests share.

    Args:
        made: The directory.
        predict: The fixture, like those that follow.
        tmp_path: Where a run happens.
        texts: All texts.
        monkeypatch: Cuts a run off.
    """

    def __init__(
        self,
        made: Path,
        predict: Run,
        tmp_path: Path,
        texts: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self._made, self._predict, self._tmp_path = made, predict, tmp_path
        self._texts, self._monkeypatch = texts, monkeypatch

    def finish(self, name: str, *numbers: int) -> None:
        """Run to the end over the texts of these numbers."""
        assert self._predict(name, data=self._data(*numbers)) == 0
        shutil.move(self._tmp_path / name, self._made / name)

    def interrupt(self, name: str, *numbers: int) -> None:
        """Run until the files would be written."""
        with self._monkeypatch.context() as patch:
            patch.setattr("qk_sniffer.recording.own_data_root.finalize", _cut_off)
            with pytest.raises(RuntimeError, match="cut off"):
                self._predict(name, data=self._data(*numbers))
        shutil.move(self._tmp_path / name, self._made / name)

    def _data(self, *numbers: int) -> dict[str, Any]:
        rows = [self._texts[number] for number in numbers]
        return {"path": str(write_jsonl(self._made / "texts.jsonl", rows)), "batch_size": 1}


def _cut_off(*_: Any, **__: Any) -> None:
    raise RuntimeError("cut off")


HUB_TOKEN = "hf_MarkedToken0123456789"
REPO = "someone/attention"


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The lengths of the sequences of each draw that a sniffer makes."""
    found: list[torch.Tensor] = []
    draw = selection.draw_positions

    def watched(*args: Any) -> Any:
        found.append(args[-1])
        return draw(*args)

    monkeypatch.setattr(selection, "draw_positions", watched)
    return found


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub on this machine, to which this process is logged in; nobody waits long before a retry."""
    monkeypatch.setattr("qk_sniffer.hub.requests.WAITS", (0.01, 0.01))
    with LoopbackHub() as hub:
        hub.add_user("someone", HUB_TOKEN, orgs=["lab"])
        with client_of(hub, HUB_TOKEN, tmp_path / "hub-cache"):
            yield hub


def _update(config: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _update(config[key], value)
        else:
            config[key] = value


@pytest.fixture(autouse=True)
def _fixed_threads() -> None:
    # One for each process that runs tests.
    torch.set_num_threads(1)
