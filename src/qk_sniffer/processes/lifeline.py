"""Connections between the processes of a run, over which each notices that another has died.

Nothing else would: while they predict, the processes don't wait for each other, and one that is gone
would leave its share of the texts unread.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

from qk_sniffer.errors import UserError, first_line

BEAT_SECONDS = 0.5
SILENCE_SECONDS = 60.0
"""A process that is not heard of for so long is taken for dead; one that ends is noticed at once."""

STOP_SECONDS = 30.0
"""How long the others have to finish their batch."""

_FAREWELL = "farewell"


def stand_in_for_the_observer() -> None:
    """End the thread with which Lightning observes the processes that it has launched.

    It would kill this one some seconds after another has ended, also where both end in order.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            # It ends when there is nothing to observe.
            vars(thread)["_child_processes"] = []


@dataclass(frozen=True)
class Failure:
    """The end of a process before its time.

    Attributes:
        rank: Which.
        reason: What it said; "died" where it could say nothing.
    """

    rank: int
    reason: str


class Lifeline:
    """One process's end of the connections: all are connected to the first.

    Where a process fails, one of the others says so on standard error, ``failure`` is set, and after
    ``STOP_SECONDS`` the process is ended, whatever it is waiting for.

    Args:
        rank: Number of this process.
        names: Host and process number of all, by rank.
        key: A secret that they share.
    """

    def __init__(self, rank: int, names: list[str], key: bytes) -> None:
        self.rank = rank
        self.failure: Failure | None = None
        self.progress: tuple[int, ...] = ()
        """Numbers of this process that the first adds up."""
        self._names = names
        self._key = key
        self._listener = (
            Listener(("0.0.0.0", 0), backlog=len(names), authkey=key) if rank == 0 else None
        )
        self._progress: dict[int, tuple[int, ...]] = {}
        self._failed = threading.Event()
        self._connections: list[Connection] = []
        self._parting: str | None = None
        self._thread: threading.Thread

    @property
    def port(self) -> int:
        """Where the first process listens; 0 in the others."""
        address: Any = self._listener.address if self._listener else ("", 0)
        return int(address[1])

    def connect(self, address: str, port: int) -> None:
        """Connect to the first process, and begin to watch.

        Raises:
            UserError: It can't be reached.
        """
        if self._listener is not None:
            self._start(self._watch_all, self._listener)
            return
        try:
            first = Client((address, port), authkey=self._key)
            first.send(self.rank)
            self._connections.append(first)
        except OSError as error:
            raise UserError(
                f"trainer.strategy: rank {self.rank} ({self._names[self.rank]}) can't reach rank 0 at "
                f"{address}, port {port} ({first_line(error)}); open the ports between the nodes"
            ) from error
        self._start(self._watch_first, first)

    def _start(self, watch: Any, connection: Any) -> None:
        os.register_at_fork(after_in_child=self._let_go)
        self._thread = threading.Thread(target=watch, args=[connection], name="lifeline", daemon=True)
        self._thread.start()

    def _let_go(self) -> None:
        """Close the connections in a forked process, a data loader's for example.

        It may outlive this one, whose death shows when the last copy of a connection is closed.
        """
        for connection in self._connections:
            connection.close()

    def total_progress(self) -> list[int]:
        """The progress of all processes, added up; in the first."""
        parts = [self.progress, *list(self._progress.values())]
        return [sum(numbers) for numbers in zip(*(part for part in parts if part), strict=True)]

    def wait_for_failure(self, seconds: float) -> bool:
        """Whether a process has failed, which may take a moment to be known."""
        return self._failed.wait(seconds)

    def close(self, reason: str | None = None) -> None:
        """Stop watching, and tell the others why, if it is before the end."""
        self._parting = _FAREWELL if reason is None else reason
        self._thread.join(10 * BEAT_SECONDS)

    def _watch_all(self, listener: Listener) -> None:
        """The first process: hear all others, and pass on what happens."""
        ranks: dict[Connection, int] = {}
        while len(ranks) < len(self._names) - 1:
            # Whoever else finds the port, without the key, is of no interest.
            with suppress(AuthenticationError, EOFError, OSError):
                connection = listener.accept()
                self._connections.append(connection)
                ranks[connection] = connection.recv()
        listener.close()
        heard = dict.fromkeys(ranks, time.monotonic())
        beat, told = 0.0, False
        while ranks:
            ready: list[Any] = wait(list(ranks), BEAT_SECONDS)
            for connection in ready:
                heard[connection] = time.monotonic()
                self._hear(connection, ranks)
            now = time.monotonic()
            for connection, rank in list(ranks.items()):
                if now - heard[connection] > SILENCE_SECONDS:
                    self._fail(Failure(rank, f"was silent for {SILENCE_SECONDS:.0f} seconds"))
                    del ranks[connection]
            # Whoever is told of the end answers; a connection closed before would read as a death.
            if told or (now - beat < BEAT_SECONDS and self._parting is None):
                continue
            beat, told = now, self._parting is not None
            for connection in list(ranks):
                self._tell(connection, self._message())

    def _hear(self, connection: Connection, ranks: dict[Connection, int]) -> None:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            message = "died"
        if isinstance(message, tuple):
            self._progress[ranks[connection]] = message
            return
        rank = ranks.pop(connection)
        if message != _FAREWELL:
            self._fail(Failure(rank, message))

    def _tell(self, connection: Connection, message: Any) -> None:
        # What ended a closed connection is heard in its turn.
        with suppress(OSError):
            connection.send(message)

    def _message(self) -> Any:
        """What the first process says to the others at a beat."""
        if self.failure is not None or self._parting in (None, _FAREWELL):
            return self.failure or self._parting
        return Failure(0, str(self._parting))

    def _watch_first(self, first: Connection) -> None:
        """Any other process: hear the first, and report to it."""
        heard = time.monotonic()
        message: Any = None
        while message is None and self._parting is None:
            try:
                first.send(self.progress)
                if first.poll(BEAT_SECONDS):
                    message = first.recv()
                    heard = time.monotonic()
                elif time.monotonic() - heard > SILENCE_SECONDS:
                    message = Failure(0, f"was silent for {SILENCE_SECONDS:.0f} seconds")
            except (EOFError, OSError):
                message = Failure(0, "died")
        if isinstance(message, Failure):
            self._fail(message)
        self._tell(first, self._parting or _FAREWELL)

    def _fail(self, failure: Failure) -> None:
        if self._parting is not None or self.failure is not None:
            return
        self.failure = failure
        self._failed.set()
        # The first speaks for all, and where it is the one that failed, the second.
        if self.rank == (1 if failure.rank == 0 else 0):
            sys.stderr.write(
                f"\nqk-sniffer: error: rank {failure.rank} ({self._names[failure.rank]}): "
                f"{failure.reason}; the other processes stop after their batch, in "
                f"{STOP_SECONDS:.0f} seconds at the latest, and the same command goes on, with as many "
                "devices as you like\n"
            )
            sys.stderr.flush()
        # By then the process has ended, or it waits for one that is gone.
        end = threading.Timer(STOP_SECONDS, os._exit, [1])
        end.daemon = True
        end.start()
