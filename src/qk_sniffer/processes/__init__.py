"""The processes of a run, one for each device: what they tell each other, and how they end."""

from qk_sniffer.processes.ranks import ALONE, Dealer, Ranks, await_launched, reason_of
from qk_sniffer.processes.signals import Stopped, end_in_order, stop, stopping_on_signals, tidied_up

__all__ = [
    "ALONE",
    "Dealer",
    "Ranks",
    "Stopped",
    "await_launched",
    "end_in_order",
    "reason_of",
    "stop",
    "stopping_on_signals",
    "tidied_up",
]
