"""Files that are written past the page cache.

A write through the cache is copied, and takes pages from whoever needs them: 0.3 seconds of a processor
for a gigabyte, and 2 or more where a virtual machine has to ask its host for the pages. Past it, the
disk fetches the bytes from where they lie.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

PAGE = 4096
"""Memory, places in the file and sizes must be multiples of this many bytes."""

_GATHERED_BYTES = 2**20
_PAST_THE_CACHE: int = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A new file that is appended to; past the page cache where system and disk allow it.

    Bytes that begin in a page of memory, behind whole pages, are written from where they lie. Others
    are copied, and wait for those that fill their page.

    Args:
        path: There may be no file.

    Raises:
        OSError: There is one, or the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        # Unbuffered, so that a write that fails takes no earlier one with it.
        self._file = path.open("xb", buffering=0)
        self._gathered = np.frombuffer(mmap.mmap(-1, _GATHERED_BYTES), np.uint8)
        self._n_gathered = 0
        try:
            self._set_direct(_PAST_THE_CACHE)
        except OSError:
            self._set_direct(0)

    def write(self, data: npt.NDArray[np.uint8]) -> None:
        """Append bytes: (N,) uint8."""
        if self._n_gathered == 0 and data.ctypes.data % PAGE == 0:
            whole = data.size - data.size % PAGE
            self._write(data[:whole])
            data = data[whole:]
        while data.size:
            room = self._gathered[self._n_gathered :][: data.size]
            room[:] = data[: room.size]
            data = data[room.size :]
            self._n_gathered += room.size
            if self._n_gathered == _GATHERED_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write what waits; that must be whole pages."""
        self._write(self._gathered[: self._n_gathered])
        self._n_gathered = 0

    def sync(self) -> None:
        """Make what was written survive a loss of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; what waits is dropped."""
        self._file.close()

    def _write(self, pages: npt.NDArray[np.uint8]) -> None:
        written = 0
        while written < pages.size:
            try:
                written += self._file.write(pages[written:].data)
            except OSError as error:
                # A disk with larger blocks, or one that takes a part of a page before it is full.
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set_direct(0)

    def _set_direct(self, flag: int) -> None:
        descriptor = self._file.fileno()
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_PAST_THE_CACHE
        self._direct = flag
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | flag)
