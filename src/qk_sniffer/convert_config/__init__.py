"""The command ``convert-config``: configs of the original scripts."""

from qk_sniffer.convert_config.conversion import convert_config

__all__ = ["convert_config"]
