"""One prediction's recording: what is captured, how far it is, and what a person should know of it."""

from qk_sniffer.recording.advertisements import leave_out_advertisements
from qk_sniffer.recording.agreement import Offer, agree
from qk_sniffer.recording.own_data_root import OwnDataRoot
from qk_sniffer.recording.progress import Progress, ProgressReport, progress_bar
from qk_sniffer.recording.provenance import (
    describe,
    described_streams,
    fingerprint,
    settings,
    stream_keys,
)
from qk_sniffer.recording.recorder import Recorder
from qk_sniffer.recording.space import require_space
from qk_sniffer.recording.texts_ahead import TextsAhead, require_listed
from qk_sniffer.recording.warnings import TextWarnings, forewarnings

__all__ = [
    "Offer",
    "OwnDataRoot",
    "Progress",
    "ProgressReport",
    "Recorder",
    "TextWarnings",
    "TextsAhead",
    "agree",
    "describe",
    "described_streams",
    "fingerprint",
    "forewarnings",
    "leave_out_advertisements",
    "progress_bar",
    "require_listed",
    "require_space",
    "settings",
    "stream_keys",
]
