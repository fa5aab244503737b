"""qk-sniffer: the query and key vectors of every attention head, as Parquet files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qk_sniffer.reading import Captures as Captures

__all__ = ["Captures"]


def __getattr__(name: str) -> Any:
    # The command line says what it can do without loading torch.
    if name == "Captures":
        from qk_sniffer.reading import Captures

        return Captures
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
