"""A loopback server that speaks the wire protocol of the Hugging Face Hub to its unmodified clients."""

from loopback.clients import client_of, environment_of
from loopback.faults import Fault, Request
from loopback.hub import LoopbackHub

__all__ = ["Fault", "LoopbackHub", "Request", "client_of", "environment_of"]
