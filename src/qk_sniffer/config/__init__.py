"""The config: its fields, files that build on others, and what its parser says."""

from qk_sniffer.config.fields import (
    CaptureConfig,
    HeadSamplingConfig,
    MomentsConfig,
    OutputConfig,
    SamplerConfig,
    TokenizerConfig,
    require_hub_names,
    require_something,
)
from qk_sniffer.config.files import bases_first
from qk_sniffer.config.local_or_hub import absent, described, explained_loading, is_address
from qk_sniffer.config.parser_messages import HELP, explain

__all__ = [
    "HELP",
    "CaptureConfig",
    "HeadSamplingConfig",
    "MomentsConfig",
    "OutputConfig",
    "SamplerConfig",
    "TokenizerConfig",
    "absent",
    "bases_first",
    "described",
    "explain",
    "explained_loading",
    "is_address",
    "require_hub_names",
    "require_something",
]
