"""Files that are written past the page cache."""

import errno
import fcntl
import mmap
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qk_sniffer.storage import direct
from qk_sniffer.storage.direct import PAGE, DirectFile


def in_a_page(content: bytes) -> Any:
    """Bytes in memory that begins in a page."""
    memory = np.frombuffer(mmap.mmap(-1, max(1, len(content))), np.uint8)[: len(content)]
    memory[:] = np.frombuffer(content, np.uint8)
    return memory


def require_written_through_the_cache(path: Path) -> None:
    content = np.random.default_rng(0).bytes(2 * PAGE)
    file = DirectFile(path)
    assert not file._direct
    file.write(in_a_page(content))
    file.close()
    assert path.read_bytes() == content


def is_cached(path: Path, start: int) -> bool:
    """Whether a page of a file can be read without its disk."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(PAGE)], start, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False


SIZES = [
    [0, PAGE],
    [3 * PAGE],
    [1, 2, PAGE - 3],
    [2 * PAGE + 64, PAGE - 64],
    [100, 2 * 2**20 + 7, PAGE - 107],
    [2**20, 2**20 - 1, 1],
    [PAGE - 1, 5 * PAGE, 1],
]


@pytest.mark.parametrize("begins_in_a_page", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_bytes_of_any_size_and_place(sizes: list[int], begins_in_a_page: bool, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(sum(sizes))
    file = DirectFile(tmp_path / "file")
    stop = 0
    for size in sizes:
        start, stop = stop, stop + size
        if begins_in_a_page:
            file.write(in_a_page(content[start:stop]))
        else:
            file.write(in_a_page(b"-" + content[start:stop])[1:])
    file.flush()
    file.sync()
    assert (tmp_path / "file").read_bytes() == content
    file.write(in_a_page(content[: 2 * PAGE]))
    file.close()
    assert (tmp_path / "file").read_bytes() == content + content[: 2 * PAGE]


def test_whole_pages_are_written_at_once_and_not_kept_in_memory(tmp_path: Path) -> None:
    path, content = tmp_path / "file", bytes(range(256)) * (16 * PAGE // 256)
    file = DirectFile(path)
    if not file._direct:
        pytest.skip("the disk of temporary files has no writes past the page cache")
    file.write(in_a_page(content))
    assert path.stat().st_size == len(content)
    assert not is_cached(path, 0)
    assert path.read_bytes() == content
    assert is_cached(path, 0)
    file.close()


def test_a_disk_that_wants_other_places_gets_its_bytes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of 64 bytes, which no disk takes."""
    monkeypatch.setattr(direct, "PAGE", 64)
    content = np.random.default_rng(0).bytes(64 * 37)
    file = DirectFile(tmp_path / "file")
    file.write(in_a_page(content[: 64 * 3]))
    file.write(in_a_page(content[64 * 3 :]))
    assert not file._direct
    file.close()
    assert (tmp_path / "file").read_bytes() == content


def test_a_system_without_such_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_PAST_THE_CACHE", 0)
    require_written_through_the_cache(tmp_path / "file")


def test_a_disk_that_refuses_such_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_flags = fcntl.fcntl

    def refusing(descriptor: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return set_flags(descriptor, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    require_written_through_the_cache(tmp_path / "file")


def test_what_a_disk_refuses_is_raised(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: it takes a part of the bytes first."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = DirectFile(tmp_path / "file")
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE + 100, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            file.write(in_a_page(bytes(4 * PAGE)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.close()
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / "file").stat().st_size <= PAGE + 100


def test_no_file_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
