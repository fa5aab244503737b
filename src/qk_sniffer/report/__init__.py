"""Pictures of a finished data root, and a page that holds them all."""

from qk_sniffer.report.write import write_report

__all__ = ["write_report"]
