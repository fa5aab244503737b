"""Whose a data root is: one run's, from before anything in it is read until its last file is pushed.

The first process of a run holds a lock on a file in the data root, and its other processes share one on
a second file. The kernel lets go of both when a process dies, however that happens. Where a file system
has no such locks, and between hosts, where they may not be seen, the file's time decides: its owner
sets it every few seconds, and one that has not done so for a minute is dead.
"""

import atexit
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from qk_sniffer.errors import UserError
from qk_sniffer.storage.checked import require_own_file
from qk_sniffer.storage.schema import OWNER_FILE, OWNERS_FILE

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
DEAD_SECONDS = 60.0
"""An owner of which nothing is seen for so long is dead; by then its other processes have ended too."""

_ATTEMPTS = 5
_ATTEMPT_SECONDS = 0.1
"""Someone who only looks whether there is an owner holds the lock for a moment."""

_SETTLE_SECONDS = 0.5
"""Without locks, the time after which whoever came at the same moment has made or removed its file."""

_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}
_FIELD = "sniffer.output.data_root: "

_descriptors: set[int] = set()


def _let_go() -> None:
    """Close the locks in a forked process, a data loader's for example, which may outlive this one."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_let_go)


@dataclass(frozen=True)
class Owner:
    """The run that a data root belongs to.

    Attributes:
        host: Name of the host of its first process.
        process: Number of that process.
        since: When it began, in local time.
        n_nodes: Hosts that its processes are on.
        boot: The boot of that host, as its kernel names it: hosts may share a name. Empty where the
            kernel gives no such name.
    """

    host: str
    process: int
    since: str
    n_nodes: int = 1
    boot: str = ""

    def __str__(self) -> str:
        return f"a run at work on {self.host}, process {self.process}, since {self.since}"

    @property
    def is_here(self) -> bool:
        """Whether all of its processes are on this host, where their locks are seen."""
        return (self.host, self.boot, self.n_nodes) == (socket.gethostname(), _boot(), 1)


@cache
def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


class Ownership:
    """What one process of a run holds of its data root.

    Args:
        data_root: The directory.
        field: What an error begins with; empty for a command that has the directory as an argument.
    """

    def __init__(self, data_root: Path, field: str = _FIELD) -> None:
        self.data_root = data_root
        self._field = field
        self._path = data_root / OWNER_FILE
        self._descriptor: int | None = None
        self._made: list[Path] = []
        # Made when there is something to end: a callback that is sent to a process has no lock.
        self._ended: threading.Event | None = None
        self._is_lost = False
        self._record: bytes | None = None
        self._process = os.getpid()

    def take(self, n_nodes: int = 1) -> None:
        """Make the data root this run's, and make it if it is missing; a second call changes nothing.

        Args:
            n_nodes: Hosts that the processes of the run are on.

        Raises:
            UserError: It is another run's, not writable, or its owner's file is a link to elsewhere.
        """
        if self._descriptor is not None:
            return
        try:
            self._make()
            for name in (OWNER_FILE, OWNERS_FILE):
                require_own_file(self.data_root, name)
            self._descriptor = self._claim()
        except OSError as error:
            raise UserError(
                f"{self._field}{self.data_root} is not writable ({error.strerror}); name another "
                "directory or change its permissions"
            ) from error
        finally:
            if self._descriptor is None:
                self._unmake()
        _descriptors.add(self._descriptor)
        self._process = os.getpid()
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        owner = Owner(socket.gethostname(), os.getpid(), now, n_nodes, _boot())
        record = json.dumps(asdict(owner)).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, record, 0)
        self._record, self._is_lost = record, False
        atexit.register(self.release)
        self._ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=[self._ended], name="ownership", daemon=True)
        beat.start()

    def join(self) -> None:
        """Take part in the run whose first process has taken the data root."""
        if self._descriptor is not None:
            return
        self._path = self.data_root / OWNERS_FILE
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        _flock(descriptor, fcntl.LOCK_SH)
        self._descriptor, self._process = descriptor, os.getpid()
        _descriptors.add(descriptor)
        atexit.register(self.release)

    def require(self) -> None:
        """See that the data root is this run's still.

        Raises:
            UserError: Another run has taken this one for dead.
        """
        self._look()
        if self._is_lost:
            raise UserError(
                f"{self._field}{self.data_root} was taken over by another run, while this one stood "
                f"still for more than {DEAD_SECONDS:.0f} seconds; name another directory"
            )

    def release(self) -> None:
        """Give the data root free, and remove it where nothing was written to one that was made."""
        # A forked process has let go already, and the data root is still its parent's.
        if self._descriptor is None or self._process != os.getpid():
            return
        descriptor, self._descriptor = self._descriptor, None
        if self._ended is not None:
            self._ended.set()
        atexit.unregister(self.release)
        self._look()
        if self._path.name == OWNER_FILE and not self._is_lost:
            with suppress(OSError):
                (self.data_root / OWNERS_FILE).unlink(missing_ok=True)
                self._path.unlink(missing_ok=True)
        self._record = None
        _descriptors.discard(descriptor)
        os.close(descriptor)
        self._unmake()

    def _make(self) -> None:
        missing = [path for path in (self.data_root, *self.data_root.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._made.insert(0, path)

    def _unmake(self) -> None:
        with suppress(OSError):
            for path in self._made:
                path.rmdir()

    def _claim(self) -> int:
        """The descriptor of the owner's file, locked where there are locks.

        Raises:
            UserError: The data root is another run's.
        """
        owner, wait = None, "wait for its end"
        for attempt in range(_ATTEMPTS):
            time.sleep(attempt and _ATTEMPT_SECONDS)
            descriptor, is_new = self._open()
            if descriptor is None:
                continue
            owner, is_locked = _owner_in(descriptor), _flock(descriptor, fcntl.LOCK_EX)
            if is_new and is_locked is None:
                time.sleep(_SETTLE_SECONDS)
            if is_locked is not False and self._is_there(descriptor):
                if is_new:
                    return descriptor
                if _needs_signs(owner, is_locked):
                    wait = f"wait for its end, or {DEAD_SECONDS:.0f} seconds if it is dead"
                    self._await_sign()
                if not self._is_alive(owner, is_locked):
                    if is_locked:
                        return descriptor
                    # Without locks it is whoever makes the file that owns the data root.
                    self._put_aside(descriptor)
            os.close(descriptor)
        raise UserError(
            f"{self._field}{self.data_root} belongs to {owner or 'another run'}; {wait}, or name "
            "another directory"
        )

    def _await_sign(self) -> None:
        """Wait for an owner that misses its signs to give one, or to be dead.

        A job that a scheduler starts again on another host need not fail for being quick.
        """
        while 2 * BEAT_SECONDS < _age(self._path) < DEAD_SECONDS:
            time.sleep(_SETTLE_SECONDS)

    def _open(self) -> tuple[int | None, bool]:
        """The owner's file, and whether it was made; None where it was removed in this moment."""
        with suppress(FileExistsError):
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        with suppress(FileNotFoundError):
            return os.open(self._path, os.O_RDWR | os.O_NOFOLLOW), False
        return None, False

    def _is_there(self, descriptor: int) -> bool:
        """Whether a file is the owner's still: its owner may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def _put_aside(self, dead: int) -> None:
        """Remove the file of a dead owner, unless another run has just replaced it by its own."""
        aside = self._path.with_name(f"{self._path.name}.{secrets.token_hex(8)}")
        with suppress(FileNotFoundError):
            self._path.rename(aside)
            if not os.path.samestat(os.fstat(dead), aside.stat()):
                # Where a third has come first, the second finds out when it looks.
                with suppress(FileExistsError):
                    os.link(aside, self._path)
            aside.unlink()

    def _is_alive(self, owner: Owner | None, is_locked: bool | None) -> bool:
        """Whether an owner whose lock is free, or can't be seen, is at work."""
        if _is_shared(self.data_root / OWNERS_FILE):
            return True
        return _needs_signs(owner, is_locked) and _age(self._path) < DEAD_SECONDS

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_SECONDS):
            descriptor = self._descriptor
            self._look()
            if descriptor is None or self._is_lost:
                return
            with suppress(OSError):
                os.utime(descriptor)

    def _look(self) -> None:
        """See whether the owner's file is another run's."""
        if self._record is not None:
            with suppress(OSError):
                self._is_lost |= self._path.read_bytes() != self._record


@contextmanager
def owned(data_root: Path) -> Iterator[None]:
    """Own a data root within a block, for a command that writes to it.

    Raises:
        UserError: It is another run's, or not writable.
    """
    ownership = Ownership(data_root, field="")
    if data_root.is_dir():
        ownership.take()
    try:
        yield
    finally:
        ownership.release()


def note_owner(data_root: Path) -> None:
    """Warn whoever reads a data root of a run that is at work there."""
    if (owner := owner_of(data_root)) is not None:
        log.warning(
            "%s belongs to %s; what is read now are files of the run before it, or that it has written",
            data_root,
            owner,
        )


def owner_of(data_root: Path) -> Owner | None:
    """The run that is at work in a data root, in another process; None where there is none."""
    path = data_root / OWNER_FILE
    try:
        # A pipe is not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        owner, is_locked = _owner_in(descriptor), _flock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)
    if owner is None or (owner.host, owner.process) == (socket.gethostname(), os.getpid()):
        return None
    if is_locked is False:
        return owner
    is_alive = Ownership(data_root)._is_alive(owner, is_locked)
    return owner if is_alive else None


def _flock(descriptor: int, operation: int) -> bool | None:
    """Whether a lock could be had at once; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _needs_signs(owner: Owner | None, is_locked: bool | None) -> bool:
    """Whether an owner whose lock is free may be alive: on another host, or where no locks are."""
    return is_locked is None or (owner is not None and not owner.is_here)


def _is_shared(path: Path) -> bool:
    """Whether another process of a run holds its lock."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return _flock(descriptor, fcntl.LOCK_EX) is False
    finally:
        os.close(descriptor)


def _owner_in(descriptor: int) -> Owner | None:
    """What the owner's file says; None where it has just been made, or says nothing that is known."""
    try:
        fields = json.loads(os.pread(descriptor, 4096, 0))
        return Owner(
            str(fields["host"]),
            int(fields["process"]),
            str(fields["since"]),
            int(fields["n_nodes"]),
            str(fields["boot"]),
        )
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None


def _age(path: Path) -> float:
    """Seconds since a file was touched, by the clock of its file system; 0 where it has just gone."""
    with tempfile.TemporaryFile(dir=path.parent) as now, suppress(FileNotFoundError):
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
    return 0.0
