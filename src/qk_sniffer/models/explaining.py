"""What of a model can be seen to be wrong before it is loaded, and what transformers says meanwhile."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qk_sniffer.errors import UserError, did_you_mean, first_line

_ATTENTION = re.compile("attn_implementation|flash ?attention", re.IGNORECASE)


def require_files(name: str, gguf_file: str | None) -> None:
    """See that a local model is a directory with what it is loaded from."""
    path = Path(name)
    if path.is_file():
        raise UserError(
            f"model.name: {path} is a file; name its directory, and set model.gguf_file if it is "
            "a GGUF file"
        )
    if path.is_dir() and gguf_file and not (path / gguf_file).exists():
        raise UserError(f"model.gguf_file: {path} has no {gguf_file}; name a GGUF file that it has")
    if path.is_dir() and not gguf_file and not (path / "config.json").exists():
        raise UserError(f"model.name: {path} has no config.json; give a directory with a model")


@contextmanager
def explained_settings(
    config: PreTrainedConfig,
    attn_implementation: str | None,
    device_map: str | dict[str, str] | None = None,
) -> Iterator[None]:
    """Turn what transformers raises for a setting that it can't use into a ``UserError``."""
    try:
        yield
    except KeyError as error:
        rope_type = str(error.args[0])
        rope = getattr(config.get_text_config(), "rope_parameters", None)
        # For each kind of layer there may be one.
        if f"'rope_type': {rope_type!r}" not in str(rope):
            raise
        choices = f"choose {', '.join(ROPE_INIT_FUNCTIONS)}"
        remedy = did_you_mean(rope_type, ROPE_INIT_FUNCTIONS, choices)
        raise UserError(
            f"model.config_overrides.rope_scaling.rope_type: there is no {rope_type}; {remedy}"
        ) from error
    except (ValueError, ImportError) as error:
        reason = first_line(error)
        if attn_implementation is not None and _ATTENTION.search(str(error)):
            raise UserError(
                f"model.attn_implementation: {attn_implementation} can't be used ({reason}); "
                "choose another, install what it needs, or set it to null"
            ) from error
        if isinstance(device_map, str) and "device_map" in str(error):
            raise UserError(
                f"model.device_map: {device_map} can't be used ({reason}); set it to auto or null"
            ) from error
        raise
