"""Copies between host and device that neither the host nor the model's own stream waits for.

On CUDA every call here returns at once: an upload starts from pinned memory, and a copy back runs on a
stream of its own, behind an event of the model's stream, into pinned memory that torch keeps for later
copies. Only ``HostCopy.wait`` waits, and the journal's thread calls it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class HostCopy:
    """A tensor that is on the host, or on its way there."""

    tensor: Tensor
    copied: Any = None
    """The event behind the copy; None where the tensor was on the host from the start."""

    def wait(self) -> Tensor:
        """The tensor, once it has arrived."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor


class HostCopies:
    """Starts copies to the host, on one side stream for each device."""

    def __init__(self) -> None:
        self._side_streams: dict[torch.device, Any] = {}

    def start(self, tensor: Tensor) -> HostCopy:
        """Start to copy a tensor that nobody else writes; its memory is free when the copy is done."""
        if tensor.device.type == "cpu":
            return HostCopy(tensor)
        if tensor.device.type != "cuda":
            return HostCopy(tensor.cpu())
        return self.start_beside(tensor)

    def start_beside(self, tensor: Tensor) -> HostCopy:
        """Start to copy on the side stream of the tensor's device."""
        backend = torch.get_device_module(tensor.device)
        if tensor.device not in self._side_streams:
            options = {"device": tensor.device} if tensor.is_cuda else {}
            self._side_streams[tensor.device] = backend.Stream(**options)
        side = self._side_streams[tensor.device]
        side.wait_stream(backend.current_stream(tensor.device))
        with backend.stream(side):
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            host.copy_(tensor, non_blocking=True)
            copied = backend.Event()
            copied.record(side)
        if tensor.is_cuda:
            # The allocator must not hand the memory on to the model before the copy has read it.
            tensor.record_stream(side)
        return HostCopy(host, copied)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
