"""The command ``verify``: a finished run checked against its own manifest, and against its model."""

from qk_sniffer.verify.data_root import verify

__all__ = ["verify"]
