"""``Captured``: what ``sniff`` has captured so far, to be read, looked at and saved."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa

from qk_sniffer.errors import UserError
from qk_sniffer.kinds import KINDS, SOFTMAX_COLUMNS
from qk_sniffer.reading import Captures
from qk_sniffer.reading.places import CapturePlace, LocalPlace
from qk_sniffer.sniffing.place import MemoryPlace, UnfinishedPlace
from qk_sniffer.sniffing.saving import save_rows
from qk_sniffer.sniffing.session import Session
from qk_sniffer.storage import has_softmax, shown_names


class Captured(Captures):
    """What was captured of the calls so far, read as ``Captures`` reads a data root.

    It can be read whenever a call has ended, in the ``sniff`` block and behind it.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._place: CapturePlace = MemoryPlace(
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
        if not isinstance(self._place, MemoryPlace):
            raise UserError(f"data_root: the rows go to {self._place} already; copy that directory")
        self._place.require_texts()
        save_rows(self._session, data_root)

    def goes_to(self, path: Path) -> None:
        """Note that rows are written to a data root, and are not in memory."""
        self._place = UnfinishedPlace(path)

    def is_in(self, path: Path) -> None:
        """Note that a data root is finished, and read that from now on."""
        self._place = LocalPlace(path)

    def __reduce__(self) -> Any:
        raise UserError("captured: it can't be pickled; write it with captured.save(data_root)")

    def __repr__(self) -> str:
        try:
            return super().__repr__().replace("<Captures", "<Captured", 1)
        except UserError as error:
            return f"<Captured: {str(error).removeprefix('captured: ')}>"

    def _repr_html_(self) -> str:
        """What there is, for a notebook."""
        try:
            facts = self._facts()
        except UserError as error:
            return f"<p>{escape(str(error))}</p>"
        rows = "".join(
            f"<tr><th>{name}</th><td>{escape(fact)}</td></tr>" for name, fact in facts.items()
        )
        return f"<table>{rows}</table>"

    def _facts(self) -> dict[str, str]:
        model, _ = shown_names(self.settings)
        heads, layers = self.heads, sorted(self.layers)
        counts = {kind: sum(head.kind == kind for head in heads) for kind in KINDS}
        n_tokens = sum(self.examples["n_tokens"].to_pylist())
        statistics = {"statistics": ", ".join(SOFTMAX_COLUMNS)} if has_softmax(self.manifest) else {}
        return {
            "model": model,
            "layers": f"{len(layers)} ({layers[0]} to {layers[-1]})",
            "heads": ", ".join(f"{n:,} {KINDS[kind].name}" for kind, n in counts.items() if n),
            **statistics,
            "texts": f"{self.examples.num_rows:,}, {n_tokens:,} tokens",
            "rows": f"{sum(len(head) for head in heads):,}",
            "memory": f"{self._session.store.n_bytes / 1e6:,.1f} MB",
        }
