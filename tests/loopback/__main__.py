"""``python -m loopback --user NAME --token TOKEN`` prints its endpoint and serves until killed."""

import argparse
import threading
from pathlib import Path

from loopback.hub import LoopbackHub


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an empty Hub on the loopback until killed.")
    parser.add_argument("--port", type=int, default=0, help="where to listen; 0 finds a free one")
    parser.add_argument("--user", required=True, help="name of the user there is")
    parser.add_argument("--token", required=True, help="the user's token, which may write")
    parser.add_argument("--directory", type=Path, help="where to keep LFS objects; in memory if absent")
    arguments = parser.parse_args()
    hub = LoopbackHub(arguments.directory, arguments.port)
    hub.add_user(arguments.user, arguments.token)
    with hub:
        print(hub.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
