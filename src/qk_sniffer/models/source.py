"""Where a model comes from, and what is done to its weights while they are loaded."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, as ``from_pretrained`` takes it; its tokenizer is there too.

    Attributes:
        name: Hub id or local directory.
        revision: Of a Hub model.
        gguf_file: GGUF file of it.
        trust_remote_code: Run code that comes with it.
        quantization: What transformers' ``quantization_config`` takes; None leaves weights as they are.
        adapter: Hub id or local directory of a PEFT adapter.
        adapter_revision: Of a Hub adapter.
        merge_adapter: Add the adapter to the weights, instead of computing it beside them.
        named_by: The field or file that gives the name.
    """

    name: str
    revision: str = "main"
    gguf_file: str | None = None
    trust_remote_code: bool = False
    quantization: Mapping[str, Any] | None = None
    adapter: str | None = None
    adapter_revision: str = "main"
    merge_adapter: bool = False
    named_by: str = "model.name"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", os.path.expanduser(self.name))
        if self.adapter is not None:
            object.__setattr__(self, "adapter", os.path.expanduser(self.adapter))

    def kwargs(self) -> dict[str, Any]:
        """Arguments of every ``from_pretrained`` call for this source."""
        return {
            "pretrained_model_name_or_path": self.name,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        } | ({"gguf_file": self.gguf_file} if self.gguf_file else {})
