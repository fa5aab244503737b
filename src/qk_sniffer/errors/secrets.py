"""Keeps access tokens out of whatever is written or printed."""

import re

_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
_SHORTEST_TOKEN = 8


def redact(text: str) -> str:
    """``text`` with every Hub token replaced; a config can hold one by mistake, in a name or a path.

    That is whatever looks like one, and the token with which this process is logged in.
    """
    # It takes a moment to import, which the command's help does not wait for.
    from huggingface_hub import get_token

    token = get_token() or ""
    if len(token) >= _SHORTEST_TOKEN:
        text = text.replace(token, "<token>")
    return _HUB_TOKEN.sub("<token>", text)
