"""What a run will take, told from its config before it begins."""

from qk_sniffer.estimate.command import estimate

__all__ = ["estimate"]
