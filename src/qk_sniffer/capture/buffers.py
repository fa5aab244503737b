"""Memory that captured vectors pass through on their way from the model to whoever takes them.

The vectors of a batch, or of several that are handed on together, are one sequence of bytes. It is laid
into buffers of fixed size, of which there is a fixed number, allocated when they are first needed. A
buffer that is full, or the last of a sequence, is handed on at once and comes back when its bytes have
been taken. So memory does not grow with the model, the sampler or the length of the texts, and the
forward waits only where bytes are taken more slowly than they come.

On an accelerator a buffer is two: vectors are gathered into memory of the device, and one copy brings
them to pinned memory of the host, on a stream of its own, behind an event of the model's stream. Only
``Portion.wait`` waits for it.
"""

import math
import mmap
import queue
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BUFFER_BYTES = 64 * 2**20
N_BUFFERS = 4
ALIGNMENT = 64
"""The vectors of a layer and kind begin at a multiple of this many bytes of the sequence, or right
behind others of their width."""


_WITH_STREAMS = ("cuda", "cpu")
"""Devices with streams in torch; the CPU's are empty, for tests."""


class Buffer:
    """Memory of the host, and of each device that fills it."""

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._on_devices: dict[torch.device, Tensor] = {}

    def host(self, *, pinned: bool = False) -> Tensor:
        """Its memory on the host: (BUFFER_BYTES,) uint8."""
        if self._host is None:
            self._host = _allocate(torch.device("cpu"), pinned=pinned)
        return self._host

    def on(self, device: torch.device) -> Tensor:
        """Where vectors of a device are gathered: (BUFFER_BYTES,) uint8."""
        if not needs_copy(device):
            return self.host()
        if device not in self._on_devices:
            self._on_devices[device] = _allocate(device)
        return self._on_devices[device]


def _allocate(device: torch.device, *, pinned: bool = False) -> Tensor:
    # A tensor of inference mode could not be written outside it.
    with torch.inference_mode(False):
        if needs_copy(device) or pinned:
            return torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device, pin_memory=pinned)
        # Begins in a page, as pinned memory does, for a disk that takes nothing else.
        return torch.frombuffer(mmap.mmap(-1, BUFFER_BYTES), dtype=torch.uint8)


def needs_copy(device: torch.device) -> bool:
    """Whether the host can't read the memory of a device."""
    return device.type != "cpu"


@dataclass(frozen=True)
class Portion:
    """Consecutive bytes of vectors, on the host or on their way there, or where the model has them.

    Attributes:
        start: The number of the first in its sequence.
        n_bytes: How many they are.
    """

    start: int
    n_bytes: int
    _bytes: Tensor
    _copied: Any
    _release: Callable[[], None]

    def wait(self) -> npt.NDArray[np.uint8]:
        """The bytes, once they have arrived; they are there until ``release``."""
        return self.tensor().numpy()

    def tensor(self) -> Tensor:
        """The same as a tensor: (n_bytes,) uint8, on the device where they are."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._bytes[: self.n_bytes]

    def release(self) -> None:
        """Give the memory back, for other bytes."""
        self._release()


class Staging:
    """Lays vectors into buffers, and hands on those that are full.

    Args:
        take: Takes each portion, in the order of its bytes.
        stays: Leave vectors on the device that has them, and copy none to the host.
    """

    def __init__(self, take: Callable[[Portion], None], *, stays: bool = False) -> None:
        self._take = take
        self._stays = stays
        # The last that came back is used first, so that no more are allocated than are needed.
        self._free: queue.LifoQueue[Buffer] = queue.LifoQueue()
        for _ in range(N_BUFFERS):
            self._free.put(Buffer())
        self._side_streams: dict[torch.device, Any] = {}
        self._buffer: Buffer | None = None
        self._device = torch.device("cpu")
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._typed: dict[torch.dtype, Tensor] = {}
        self._used = 0
        self.size = 0
        """Bytes of the sequence so far."""

    def align(self) -> int:
        """Fill up to where the vectors of another layer or kind may begin, and give the place."""
        if padding := -self.size % ALIGNMENT:
            first = self._claim(padding)
            self._memory[first : first + padding] = 0
        return self.size

    def is_open(self, device: torch.device) -> bool:
        """Whether a buffer is being filled by a device."""
        return self._buffer is not None and self._device == device

    def open(self, device: torch.device) -> None:
        """Begin another buffer, for a device; waits where all are under way."""
        self._hand_on()
        self._buffer, self._device = self._free.get(), device
        self._memory = self._buffer.on(device)
        self._typed = {}

    def fits(self, n_bytes: int, device: torch.device) -> bool:
        """Whether the buffer that a device fills, or else the next, takes so many bytes more."""
        used = self._used + -self.size % ALIGNMENT if self.is_open(device) else 0
        return used + n_bytes <= BUFFER_BYTES

    def room(self, device: torch.device, dtype: torch.dtype, n_rows: int, width: int) -> Tensor:
        """Memory for the next vectors of a device: as many of them as fit.

        Args:
            device: The device.
            dtype: Number format of the vectors.
            n_rows: Vectors that are left to lay down.
            width: Numbers in each.

        Returns:
            (n, width), 1 <= n <= n_rows, for the caller to fill.

        Raises:
            ValueError: They are too wide for a buffer.
        """
        row_bytes = width * dtype.itemsize
        fitting = (BUFFER_BYTES - self._used) // row_bytes
        if fitting < n_rows:
            # The next buffer begins aligned too.
            fitting -= fitting % (ALIGNMENT // math.gcd(row_bytes, ALIGNMENT))
        if not self.is_open(device) or fitting == 0:
            if self._used == 0 and fitting == 0:
                raise ValueError(f"a vector of {row_bytes} bytes is wider than a buffer")
            self.open(device)
            return self.room(device, dtype, n_rows, width)
        return self.placed(dtype, min(n_rows, fitting), width)

    def placed(self, dtype: torch.dtype, n_rows: int, width: int) -> Tensor:
        """Memory for vectors that fit into the open buffer.

        Args:
            dtype: Their number format.
            n_rows: How many there are.
            width: Numbers in each.

        Returns:
            (n_rows, width), for the caller to fill before anything else is placed that does not fit.
        """
        if dtype not in self._typed:
            self._typed[dtype] = self._memory.view(dtype)
        first = self._claim(n_rows * width * dtype.itemsize) // dtype.itemsize
        return self._typed[dtype].as_strided((n_rows, width), (width, 1), first)

    def _claim(self, n_bytes: int) -> int:
        """Take the next bytes of the buffer, and give the number of the first."""
        first = self._used
        self._used += n_bytes
        self.size += n_bytes
        return first

    def end(self) -> None:
        """Hand on the buffer that is being filled; what comes next begins at byte 0 again."""
        self._hand_on()
        self.size = 0

    def _hand_on(self) -> None:
        buffer, used = self._buffer, self._used
        self._buffer, self._used = None, 0
        if buffer is None:
            return
        release = partial(self._free.put, buffer)
        if self._stays:
            self._take(Portion(self.size - used, used, buffer.on(self._device), None, release))
            return
        copied = self._copy(buffer, used) if needs_copy(self._device) else None
        self._take(Portion(self.size - used, used, buffer.host(), copied, release))

    def _copy(self, buffer: Buffer, n_bytes: int) -> Any:
        """Copy a buffer to the host; gives the event behind the copy, None where it has ended."""
        device = self._device
        if device.type not in _WITH_STREAMS:
            buffer.host()[:n_bytes].copy_(buffer.on(device)[:n_bytes])
            return None
        backend = torch.get_device_module(device)
        if device not in self._side_streams:
            options = {"device": device} if device.type == "cuda" else {}
            self._side_streams[device] = backend.Stream(**options)
        side = self._side_streams[device]
        side.wait_stream(backend.current_stream(device))
        with backend.stream(side):
            host = buffer.host(pinned=device.type == "cuda")
            host[:n_bytes].copy_(buffer.on(device)[:n_bytes], non_blocking=True)
            copied = backend.Event()
            copied.record(side)
        return copied

    def clear(self) -> None:
        """Begin at byte 0 again; what was not handed on is dropped."""
        if self._buffer is not None:
            self._free.put(self._buffer)
        self._buffer, self._used, self.size = None, 0, 0


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
