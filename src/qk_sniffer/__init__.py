"""qk-sniffer: the query and key vectors of every attention head, as Parquet files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qk_sniffer.reading import Captures as Captures
    from qk_sniffer.sniffing import sniff as sniff

__all__ = ["Captures", "sniff"]


def __getattr__(name: str) -> Any:
    # The command line says what it can do without loading torch.
    if name == "Captures":
        from qk_sniffer.reading import Captures

        return Captures
    if name == "sniff":
        from qk_sniffer.sniffing import sniff

        return sniff
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
