"""The command export-kvpress: moments as the statistics that a press of kvpress loads."""

from qk_sniffer.export_kvpress.statistics import export_kvpress

__all__ = ["export_kvpress"]
