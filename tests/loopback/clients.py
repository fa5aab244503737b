"""Clients of the server: the Hub of this process for a while, or of a new one."""

import importlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from loopback.hub import LoopbackHub


def environment_of(hub: LoopbackHub | str, token: str | None, cache: Path) -> dict[str, str]:
    """The variables with which a new process has the server for its Hub, and reaches nothing else.

    Args:
        hub: The server, or its endpoint.
        token: What the process is logged in with; None for nothing.
        cache: Directory of all that it caches.
    """
    endpoint = hub if isinstance(hub, str) else hub.endpoint
    variables = {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token or "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_ASSETS_CACHE": str(cache / "assets"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    }
    # datasets looks for its viewer at another host, which nobody has to find if there is a proxy.
    proxies = {f"{scheme}_proxy": endpoint for scheme in ("http", "https", "all")}
    proxies["no_proxy"] = "127.0.0.1,localhost"
    return variables | proxies | {name.upper(): value for name, value in proxies.items()}


@contextmanager
def client_of(hub: LoopbackHub | str, token: str | None, cache: Path) -> Iterator[Any]:
    """Make the server the Hub of this process for a while; gives an ``HfApi`` of it.

    Args:
        hub: The server, or its endpoint.
        token: What this process is logged in with; None for nothing.
        cache: Directory of all that it caches.
    """
    # The server needs neither in a process of its own.
    import datasets
    from huggingface_hub import HfApi, HfFileSystem, close_session, constants, hf_api, hf_file_system

    variables = environment_of(hub, token, cache)
    made_at_import = (hf_api.api, hf_file_system.hffs)
    with ExitStack() as stack:
        for owner in (constants, datasets.config, *made_at_import):
            stack.callback(vars(owner).update, dict(vars(owner)))
        stack.callback(setattr, HfFileSystem, "_cache", HfFileSystem._cache)
        stack.callback(os.environ.update, dict(os.environ))
        stack.callback(os.environ.clear)
        stack.callback(close_session)
        close_session()
        os.environ.update(variables)
        # All these have read the environment, or each other, when they were imported.
        importlib.reload(constants)
        importlib.reload(datasets.config)
        HfFileSystem._cache = {}
        for made in made_at_import:
            made.__init__()
        yield HfApi(variables["HF_ENDPOINT"], token=token)
