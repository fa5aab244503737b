"""The Hugging Face Hub: a dataset has a branch for each model, pulled before a run, pushed after it."""

from qk_sniffer.hub.access import check_access
from qk_sniffer.hub.publication import Publication
from qk_sniffer.hub.pull import pull
from qk_sniffer.hub.push import push

__all__ = ["Publication", "check_access", "pull", "push"]
