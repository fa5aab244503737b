"""Writing what is in memory as a data root, by way of a journal, as a run does."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from qk_sniffer.capture import Block
from qk_sniffer.errors import UserError
from qk_sniffer.sniffing.place import token_strings
from qk_sniffer.sniffing.session import Session
from qk_sniffer.sniffing.texts import Text
from qk_sniffer.storage import (
    JOURNAL_DIRECTORY,
    Example,
    JournalWriter,
    data_root_path,
    file_progress,
    finalize,
    owned,
)
from qk_sniffer.storage.journal import ALIGNMENT


@dataclass(frozen=True)
class _Bytes:
    """Bytes of vectors that stay where they are."""

    start: int
    _content: npt.NDArray[np.uint8]

    def wait(self) -> npt.NDArray[np.uint8]:
        return self._content

    def release(self) -> None:
        pass


def save_rows(session: Session, data_root: str | Path) -> None:
    """Write the rows of a session; the arguments are those of ``Captured.save``."""
    # Its import takes seconds, for Lightning.
    from qk_sniffer.recording import describe

    path = data_root_path(data_root)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"data_root: {path} is not empty; name a new directory")
    for text in session.texts.read:
        _require_whole(text)
    watched = session.watched
    header = describe(session.about["settings"], watched.backbone, watched.attention, session.heads)
    path.mkdir(parents=True, exist_ok=True)
    with owned(path):
        journal = JournalWriter(path / JOURNAL_DIRECTORY, header)
        try:
            _write(session, journal)
        finally:
            journal.close()
        finalize(path, file_progress, complete=True)


def _require_whole(text: Text) -> None:
    if text.positions != list(range(len(text.positions))):
        first = text.positions[0]
        raise UserError(
            f"data_root: text {text.source_id!r} was not read from position 0 on without gaps (it "
            f"begins at {first}), and a data root holds whole texts; pass position_ids that count "
            "each text from 0, or pad on the right"
        )


def _write(session: Session, journal: JournalWriter) -> None:
    blocks, numbers = [], []
    n_bytes = n_numbers = 0
    for stream in session.streams:
        rows = session.store.rows((stream.layer.layer_idx, stream.kind))
        n_heads, n_rows, head_dim = rows.vectors.shape
        if n_rows == 0:
            continue
        for content in _aligned(rows.vectors, n_bytes):
            journal.append(_Bytes(n_bytes, content))
            n_bytes += content.size
        start = n_bytes - rows.vectors.nbytes
        dtype = str(rows.vectors.dtype).removeprefix("torch.")
        window = stream.layer.sliding_window
        blocks.append(
            Block(
                stream.layer.layer_idx,
                stream.kind,
                window,
                dtype,
                n_heads,
                n_rows,
                head_dim,
                start,
                n_numbers,
            )
        )
        numbers.append(rows.numbers.reshape(-1))
        n_numbers += rows.numbers.numel()
    all_numbers = torch.cat([torch.empty(0, dtype=torch.int32), *numbers]).numpy()
    journal.commit(blocks, all_numbers, list(_examples(session)))


def _aligned(vectors: torch.Tensor, start: int) -> Iterator[npt.NDArray[np.uint8]]:
    if padding := -start % ALIGNMENT:
        yield np.zeros(padding, np.uint8)
    yield vectors.contiguous().view(torch.uint8).reshape(-1).numpy()


def _examples(session: Session) -> Iterator[Example]:
    tokenizer = session.tokenizer
    for text in session.texts.read:
        tokens = None if tokenizer is None else token_strings(tokenizer, text.tokens)
        yield Example(text.example_id, text.source_id, len(text.positions), False, tokens)
