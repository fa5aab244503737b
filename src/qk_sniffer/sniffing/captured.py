"""``Captured``: what ``sniff`` has captured so far, to be read, looked at and saved."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import pyarrow as pa

from qk_sniffer.kinds import KINDS
from qk_sniffer.reading import Captures
from qk_sniffer.sniffing.place import MemoryPlace
from qk_sniffer.sniffing.saving import save_rows
from qk_sniffer.sniffing.session import Session


class Captured(Captures):
    """The queries and keys of the calls so far, read as ``Captures`` reads a data root.

    It can be read whenever a call has ended, in the ``sniff`` block and behind it.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._place = MemoryPlace(
            session.about, session.streams, session.store, session.texts, session.tokenizer
        )

    @property
    def examples(self) -> pa.Table:  # type: ignore[override]
        """The texts so far: example_id, source_id, n_tokens and truncated."""
        return self._place.examples()

    def names(self, names: Sequence[int | str]) -> None:
        """Name the texts that the next call begins; the others are named by their numbers.

        Args:
            names: One for each text of that call; its example id is what a run makes of it.

        Raises:
            UserError: One is neither an integer nor a string, or has the example id of another text.
        """
        self._session.texts.name_next(names)

    def save(self, data_root: str | Path) -> None:
        """Write a data root, as a run does, for ``load_dataset``, ``qk-sniffer verify`` and the others.

        Args:
            data_root: A new directory.

        Raises:
            UserError: Something is there already, nothing was read yet, a text does not begin at
                position 0 or has gaps, or the disk refuses.
        """
        assert self.manifest is not None
        save_rows(self._session, data_root)

    def __repr__(self) -> str:
        if not self._session.texts.read:
            return "<Captured: nothing yet>"
        return super().__repr__().replace("<Captures", "<Captured", 1)

    def _repr_html_(self) -> str:
        """What there is, for a notebook."""
        session = self._session
        if not session.texts.read:
            return "<p>Nothing is captured yet.</p>"
        layers = sorted({stream.layer.layer_idx for stream in session.streams})
        heads = {
            kind: sum(len(stream.heads) for stream in session.streams if stream.kind == kind)
            for kind in KINDS
        }
        n_rows = sum(head["rows"] for head in self.manifest["heads"].values())
        n_tokens = sum(len(text.positions) for text in session.texts.read)
        facts = {
            "model": session.about["settings"]["model"]["name"],
            "layers": f"{len(layers)} ({layers[0]} to {layers[-1]})",
            "heads": ", ".join(f"{n:,} {KINDS[kind].name}" for kind, n in heads.items() if n),
            "texts": f"{len(session.texts.read):,}, {n_tokens:,} tokens",
            "rows": f"{n_rows:,}",
            "memory": f"{session.store.n_bytes / 1e6:,.1f} MB of vectors",
        }
        rows = "".join(
            f"<tr><th>{name}</th><td>{escape(str(fact))}</td></tr>" for name, fact in facts.items()
        )
        return f"<table>{rows}</table>"
