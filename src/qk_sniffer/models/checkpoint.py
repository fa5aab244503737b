"""The files of a checkpoint: what is wrong with them, and how many bytes of weights they hold."""

import json
import pickle
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from qk_sniffer.errors import UserError, first_line

_CONFIG = "config.json"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Quantization:
    """Weights that are stored in fewer bits than the model computes in.

    Attributes:
        method: Such as gptq, awq or fp8.
        n_bytes: What all weights take in the checkpoint; None where that can't be told.
    """

    method: str
    n_bytes: int | None


def refuse_broken(name: str, revision: str, error: Exception) -> None:
    """Say what is wrong with a checkpoint that transformers has failed to load, if its files show it.

    Args:
        name: Hub id or local directory.
        revision: Of a Hub model.
        error: What transformers raised.

    Raises:
        UserError: One of its files is damaged.
    """
    config = checkpoint_file(name, revision, _CONFIG, local_files_only=True)
    if isinstance(error, pickle.UnpicklingError):
        raise UserError(
            f"model.name: a file of {name} is damaged, torch can't read it; download or copy it again"
        ) from error
    if config is not None:
        for file in _weight_files(config.parent):
            require_whole(file)


def stored_quantization(name: str, revision: str, config: Any) -> Quantization | None:
    """How a checkpoint is quantized; None where its weights are plain numbers.

    Args:
        name: Hub id or local directory.
        revision: Of a Hub model.
        config: The model's.
    """
    method = quantization_method(config)
    return None if method is None else Quantization(method, _stored_bytes(name, revision))


def quantization_method(config: Any) -> str | None:
    """The method by which the weights of a checkpoint are quantized; None where they are not.

    Args:
        config: The model's.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def _stored_bytes(name: str, revision: str) -> int | None:
    """Bytes of all tensors, from the sizes of files or, of a model that is not here, from the Hub."""
    config = checkpoint_file(name, revision, _CONFIG, local_files_only=True)
    files = [] if config is None else _weight_files(config.parent)
    if files and all(file.exists() for file in files):
        return sum(file.stat().st_size - _header_bytes(file) for file in files)
    if Path(name).exists():
        return None
    # A figure that the Hub doesn't give is left out, whatever the reason.
    with suppress(Exception):
        metadata = HfApi().get_safetensors_metadata(name, revision=revision)
        tensors = [t for file in metadata.files_metadata.values() for t in file.tensors.values()]
        return sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors)
    return None


def _header_bytes(file: Path) -> int:
    """What comes before the values in a safetensors file: a length in 8 bytes, and so many of JSON."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def checkpoint_file(name: str, revision: str, file: str, **options: Any) -> Path | None:
    """A file of a local directory or a Hub model; None where there is none."""
    try:
        found = cached_file(name, file, revision=revision, **options)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers reads: one, or those that an index names.

    Raises:
        UserError: The index is damaged.
    """
    index = directory / _INDEX
    if (directory / _WHOLE).exists() or not index.exists():
        return [file for file in [directory / _WHOLE] if file.exists()]
    try:
        names = {*json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index}: damaged, it does not say which file has which weight; download or copy it again"
        ) from error
    return [directory / name for name in sorted(names)]


def require_whole(file: Path) -> None:
    """See that a safetensors file is as long as its header says.

    Raises:
        UserError: It is not, or is not there.
    """
    if not file.exists():
        raise UserError(f"{file}: missing, though {_INDEX} names it; download or copy it again")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: damaged, it is no whole safetensors file ({first_line(error)}); download or copy "
            "it again"
        ) from error
