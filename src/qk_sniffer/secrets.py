"""Keeps access tokens out of whatever is written or printed."""

import re

_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")


def redact(text: str) -> str:
    """``text`` with every Hub token replaced; a config can hold one by mistake, in a name or a path."""
    return _HUB_TOKEN.sub("<token>", text)
