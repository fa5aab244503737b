"""``sniff``: queries and keys of a model that is loaded already, while somebody calls it."""

from qk_sniffer.sniffing.captured import Captured
from qk_sniffer.sniffing.sniff import sniff

__all__ = ["Captured", "sniff"]
