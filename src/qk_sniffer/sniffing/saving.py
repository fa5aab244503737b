"""Writing captured texts as a data root, by way of a journal, as a run does."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from qk_sniffer.capture import Block, Stream
from qk_sniffer.config import OutputConfig
from qk_sniffer.errors import UserError
from qk_sniffer.processes import ALONE
from qk_sniffer.sniffing.arguments import as_arguments
from qk_sniffer.sniffing.memory import Rows
from qk_sniffer.sniffing.place import token_strings
from qk_sniffer.sniffing.session import Session
from qk_sniffer.sniffing.texts import Text, not_whole
from qk_sniffer.storage import (
    JOURNAL_ALIGNMENT,
    JOURNAL_DIRECTORY,
    Example,
    JournalWriter,
    data_root_path,
)


def save_rows(session: Session, data_root: str | Path) -> None:
    """Write what a session holds in memory; the arguments are those of ``Captured.save``."""
    path = data_root_path(data_root)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"data_root: {path} is not empty; name a new directory")
    for text in session.texts.read:
        _require_whole(text)
    rows = {stream: session.store.rows(stream) for stream in session.store.streams}
    with _journal_in(session, path) as journal:
        _write(session, journal, rows, session.texts.read)


@contextmanager
def writing(session: Session, data_root: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """Write the texts of a session as they end, within a block, and the files behind it.

    After an error the texts that have ended stay in the journal, and the same block goes on with them.

    Args:
        session: What captures them.
        data_root: A new directory, or that of an earlier block or run with the same settings.
        overwrite: Replace what is there.

    Yields:
        Where it is.

    Raises:
        UserError: It is in use or holds something else, or the disk refuses.
    """
    path = data_root_path(data_root)
    with _journal_in(session, path, overwrite=overwrite) as journal:
        writer = _Writer(session, journal)
        session.on_call, session.texts.must_be_whole = writer.write_ended, True
        yield path
        writer.write_all()


@contextmanager
def _journal_in(session: Session, path: Path, *, overwrite: bool = False) -> Iterator[JournalWriter]:
    """The journal of a data root that is ours within a block, and is finished behind it."""
    # Its import takes seconds, for Lightning.
    from qk_sniffer.recording import OwnDataRoot, describe

    watched, settings = session.watched, session.about["settings"]
    root = OwnDataRoot(OutputConfig(str(path), overwrite))
    as_arguments(root.take)
    try:
        header = describe(settings, watched.backbone, watched.attention, session.heads)
        earlier = as_arguments(lambda: root.earlier_run(settings))
        as_arguments(lambda: root.make_ready(earlier, header))
        if earlier is not None:
            session.texts.leave_out(earlier.example_ids.tolist())
        journal = JournalWriter(path / JOURNAL_DIRECTORY, header)
        try:
            yield journal
        except BaseException:
            journal.close()
            root.warn_how_to_go_on()
            raise
        journal.close()
        root.finalize(ALONE, complete=True)
    finally:
        root.ownership.release()


class _Writer:
    """Writes texts to a journal once nothing goes on with them."""

    def __init__(self, session: Session, journal: JournalWriter) -> None:
        self._session = session
        self._journal = journal
        self._lock = threading.Lock()

    def write_ended(self) -> None:
        """Write the texts that no cache goes on with."""
        self._write(self._session.texts.take_ended())

    def write_all(self) -> None:
        """Write all that were read."""
        self._write(self._session.texts.take_all())

    def _write(self, texts: Sequence[Text]) -> None:
        session = self._session
        texts = [text for text in texts if not session.texts.is_left_out(text)]
        if texts:
            with self._lock:
                rows = session.store.take(text.example_id for text in texts)
                _write(session, self._journal, rows, texts)


def _require_whole(text: Text) -> None:
    for expected, position in enumerate(text.positions):
        if position != expected:
            raise not_whole(position, expected)


@dataclass(frozen=True)
class _Bytes:
    """Bytes of vectors that stay where they are."""

    start: int
    _content: npt.NDArray[np.uint8]

    def wait(self) -> npt.NDArray[np.uint8]:
        return self._content

    def release(self) -> None:
        pass


def _write(
    session: Session, journal: JournalWriter, rows: Mapping[Stream, Rows], texts: Sequence[Text]
) -> None:
    """Append the rows of some texts, sorted by example id and position, as one batch."""
    blocks, numbers = [], []
    n_bytes = n_numbers = 0
    for stream in session.streams:
        key = stream.key
        vectors = rows[key].vectors
        n_heads, n_rows, head_dim = vectors.shape
        if n_rows == 0:
            continue
        for content in _aligned(vectors, n_bytes):
            journal.append(_Bytes(n_bytes, content))
            n_bytes += content.size
        first = n_bytes - vectors.nbytes
        dtype = str(vectors.dtype).removeprefix("torch.")
        window = stream.layer.sliding_window
        blocks.append(Block(*key, window, dtype, n_heads, n_rows, head_dim, first, n_numbers))
        numbers.append(rows[key].numbers.reshape(-1))
        n_numbers += rows[key].numbers.numel()
    all_numbers = torch.cat([torch.empty(0, dtype=torch.int32), *numbers]).numpy()
    journal.commit(blocks, all_numbers, [_example(session, text) for text in texts])


def _aligned(vectors: torch.Tensor, start: int) -> Iterator[npt.NDArray[np.uint8]]:
    if padding := -start % JOURNAL_ALIGNMENT:
        yield np.zeros(padding, np.uint8)
    yield vectors.cpu().contiguous().view(torch.uint8).reshape(-1).numpy()


def _example(session: Session, text: Text) -> Example:
    tokens = None if session.tokenizer is None else token_strings(session.tokenizer, text.tokens)
    return Example(text.example_id, text.source_id, len(text.positions), False, tokens)
