"""The processes of a run, one for each device: what they tell each other, and how they end."""

from qk_sniffer.processes.ranks import ALONE, Dealer, Ranks, await_launched, reason_of
from qk_sniffer.processes.signals import (
    DeferredSigterm,
    Stopped,
    end_in_order,
    end_with_another,
    stopping_on_signals,
    tidied_up,
    uninterrupted,
)

__all__ = [
    "ALONE",
    "Dealer",
    "DeferredSigterm",
    "Ranks",
    "Stopped",
    "await_launched",
    "end_in_order",
    "end_with_another",
    "reason_of",
    "stopping_on_signals",
    "tidied_up",
    "uninterrupted",
]
