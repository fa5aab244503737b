"""A data root before a run: is it free, what does it hold already, and is there room."""

import json
import re
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.config import is_address
from qk_sniffer.errors import UserError
from qk_sniffer.processes import Ranks
from qk_sniffer.storage.card_parts import own_part, read_card
from qk_sniffer.storage.checked import require_own_files
from qk_sniffer.storage.commits import (
    HEADER_FILE,
    locked_journal,
    read_header,
    read_journal,
    repair_journal,
)
from qk_sniffer.storage.files import explained_writing
from qk_sniffer.storage.finished import finished_runs
from qk_sniffer.storage.moment_sources import counted_anywhere
from qk_sniffer.storage.moment_states import repair_states
from qk_sniffer.storage.reports import remove_report
from qk_sniffer.storage.schema import (
    CARD_FILE,
    CONFIG_FILE,
    DIRECTORIES,
    FINISHED_JOURNAL_DIRECTORY,
    JOURNAL_DIRECTORY,
    MANIFEST_FILE,
    OWNER_FILE,
    OWNERS_FILE,
    PUBLICATION_FILE,
    PULLED_DIRECTORY,
    PULLING_DIRECTORY,
    REPORT_DIRECTORY,
    parse_head_name,
    temporary_name,
)

_FIELD = "sniffer.output.data_root"
_BEFORE_A_JOURNAL = {
    CARD_FILE,
    JOURNAL_DIRECTORY,
    FINISHED_JOURNAL_DIRECTORY,
    PULLED_DIRECTORY,
    PULLING_DIRECTORY,
    PUBLICATION_FILE,
    temporary_name(PUBLICATION_FILE),
    CONFIG_FILE,
    temporary_name(CONFIG_FILE),
    OWNER_FILE,
    OWNERS_FILE,
}
# A person may have written in the card and beside the report, and publication and ownership are this
# run's already.
_CLEARED = (DIRECTORIES - {REPORT_DIRECTORY}) | {
    CONFIG_FILE,
    temporary_name(CONFIG_FILE),
    temporary_name(PUBLICATION_FILE),
    MANIFEST_FILE,
}

_TOLD_LATER = ("model.weights", "model.heads", "data.chat_template.text")
"""Fields of the fingerprint that are known once weights and texts are loaded."""

_TOKEN_FILE = re.compile(r"\.shared-[0-9a-f]+")
"""What ``require_shared`` writes; a run that was killed may leave one."""

_SECONDS_TO_SEE = 10.0
"""How long a file that one process wrote may take to be seen by another."""


@dataclass(frozen=True)
class EarlierRun:
    """What a data root holds from an earlier run.

    Attributes:
        fingerprint: The settings that decide its rows, by field.
        example_ids: (E,) int32, ascending: the examples that are captured.
        counted_ids: (C,) int32, ascending: the examples that its moments count.
        has_moments: Whether it sums moments.
        finalizing: Whether writing its files has begun and was cut off.
        is_pulled: Whether all of it was pulled, and nothing captured here.
    """

    fingerprint: Mapping[str, Any]
    example_ids: npt.NDArray[np.int32]
    counted_ids: npt.NDArray[np.int32]
    has_moments: bool
    finalizing: bool
    is_pulled: bool

    @property
    def done_ids(self) -> npt.NDArray[np.int32]:
        """The examples that need not be read again, ascending: captured, and counted by any moments."""
        if not self.has_moments:
            return self.example_ids
        return np.intersect1d(self.example_ids, self.counted_ids)

    def require(self, data_root: Path, fingerprint: Mapping[str, Any]) -> None:
        """See that a run with other settings does not add to this one.

        Args:
            data_root: Where it is.
            fingerprint: The new run's; fields that it does not know yet are left out.

        Raises:
            UserError: A field differs.
        """
        if differing := differing_settings(self.fingerprint, fingerprint):
            place, other = f"{_FIELD}: {data_root}", "directory"
            if self.is_pulled:
                place, other = "sniffer.output.hf_branch: it", "branch"
            raise UserError(
                f"{place} holds a run with other settings: {differing}. Name another {other}, use "
                "those settings, or set sniffer.output.overwrite to true to replace it"
            )


def differing_settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The fields of two fingerprints that differ, with their values; empty where there are none.

    Args:
        there: The one that is known in full.
        here: The other; what only weights or texts tell is left out, and sections that it does not
            know. Of others it knows all, and what it lacks is not used.
    """
    sections = {name.partition(".")[0] for name in here}
    lacking = (name for name in there if name not in here and name not in _TOLD_LATER)
    names = [*here, *(name for name in lacking if name.partition(".")[0] in sections)]
    return "; ".join(
        f"{name} is {_told(there, name)} there and {_told(here, name)} here"
        for name in names
        if name not in there or name not in here or there[name] != here[name]
    )


def _told(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "not set"


def earlier_run(data_root: Path) -> EarlierRun | None:
    """What a data root holds already; None where that is nothing.

    Raises:
        UserError: Its header or manifest is damaged, or its moments are.
    """
    journal = data_root / JOURNAL_DIRECTORY
    runs = finished_runs(data_root)
    found = [run.manifest for run in runs]
    if (journal / HEADER_FILE).exists():
        found.insert(0, read_header(journal))
    if not found:
        return None
    log = read_journal(journal)
    stored = [run.example_ids for run in runs]
    has_moments = "moments" in found[0]["settings"]
    return EarlierRun(
        fingerprint=found[0].get("fingerprint", {}),
        example_ids=np.unique(np.concatenate([log.example_ids(), *stored])),
        counted_ids=counted_anywhere(data_root) if has_moments else np.empty(0, np.int32),
        has_moments=has_moments,
        finalizing=log.finalizing is not None,
        is_pulled=len(found) == len(runs) and all(run.directory != data_root for run in runs),
    )


def waiting_rows(data_root: Path) -> list[Path]:
    """What a data root holds besides its finished files, and waits to be merged with them.

    That is the journal of a run that is at work or was interrupted, and a run that was pulled.
    """
    directories = (data_root / name for name in (JOURNAL_DIRECTORY, PULLED_DIRECTORY))
    return [directory for directory in directories if directory.exists()]


def data_root_path(name: str | Path) -> Path:
    """The path of a data root as a person names it."""
    path = Path(name).expanduser()
    # pyarrow would take the run of run:1/l00h00q for a scheme, such as s3.
    return path.absolute() if ":" in str(path).partition("/")[0] else path


def existing_data_root(name: str | Path) -> Path:
    """The data root of this name, which a command is to read.

    Raises:
        UserError: No such directory is on this machine.
    """
    if is_address(str(name)):
        raise UserError(
            f"{name}: an address; a data root is a directory of this machine, so copy it first"
        )
    data_root = data_root_path(name)
    if not data_root.exists():
        raise UserError(f"{name}: no such directory is here; name the data root of a run")
    if not data_root.is_dir():
        raise UserError(f"{name}: no directory but a file; name the data root of a run")
    return data_root


def prepare_data_root(data_root: Path, overwrite: bool) -> None:
    """See that a run may write into a directory, and repair its journal.

    Args:
        data_root: The directory, which the run owns.
        overwrite: Whether what it holds is to be replaced.

    Raises:
        UserError: It holds a link, a card that can't be kept, or what is not a run's and ``overwrite``
            is false.
    """
    require_own_files(data_root)
    names = {entry.name for entry in data_root.iterdir()}
    for name in filter(_TOKEN_FILE.fullmatch, names):
        (data_root / name).unlink()
    shutil.rmtree(data_root / FINISHED_JOURNAL_DIRECTORY, ignore_errors=True)
    if not overwrite:
        if (data_root / JOURNAL_DIRECTORY / HEADER_FILE).exists():
            _repair_journal(data_root / JOURNAL_DIRECTORY)
        others = {name for name in names - _BEFORE_A_JOURNAL if not _TOKEN_FILE.fullmatch(name)}
        if others and earlier_run(data_root) is None:
            raise UserError(
                f"{_FIELD}: {data_root} is not empty and holds no run that could be continued; name "
                "a new directory, or set sniffer.output.overwrite to true to replace the run that it "
                "holds"
            )
    if (data_root / CARD_FILE).exists():
        # It stays, and its fault would else be found when all texts are read.
        own_part(read_card(data_root / CARD_FILE))


def _repair_journal(journal: Path) -> None:
    remedy = "make room or mend the disk, then try again"
    with explained_writing(journal, remedy), locked_journal(journal):
        repair_journal(journal, "what they stood for is captured again")
        repair_states(journal)


def require_shared(data_root: Path, ranks: Ranks) -> None:
    """See that the data root of all processes of a run is one directory.

    Raises:
        UserError: Some don't see what the first writes there.
    """
    if ranks.size == 1:
        return
    token = data_root / f".shared-{ranks.first(lambda: secrets.token_hex(8))}"
    ranks.first(token.touch)
    found = ranks.gather((_is_seen(token), socket.gethostname()))
    ranks.first(lambda: token.unlink(missing_ok=True))
    blind = [f"rank {rank} ({host})" for rank, (sees, host) in enumerate(found) if not sees]

    def refuse() -> None:
        if blind:
            raise UserError(
                f"{_FIELD}: what rank 0 ({found[0][1]}) writes to {data_root} is not seen by "
                f"{', '.join(blind)}; name a directory that all nodes share"
            )

    ranks.run(refuse)


def _is_seen(path: Path) -> bool:
    """Whether a file that another process wrote is here, at once or, over a network, before long."""
    deadline = time.monotonic() + _SECONDS_TO_SEE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def require_captured(data_root: Path, example_ids: npt.NDArray[np.int32]) -> None:
    """See that the processes of a run have together captured and counted all that they were to.

    Raises:
        RuntimeError: They have not.
    """
    earlier = earlier_run(data_root)
    none = np.empty(0, np.int32)
    _require_all(example_ids, none if earlier is None else earlier.example_ids, "captured")
    if earlier is not None and earlier.has_moments:
        _require_all(example_ids, earlier.counted_ids, "counted in the moments")


def _require_all(wanted: npt.NDArray[np.int32], found: npt.NDArray[np.int32], what: str) -> None:
    missing = np.setdiff1d(wanted, found)
    if missing.size:
        raise RuntimeError(
            f"{missing.size} of {wanted.size} texts were not {what}, as example {missing[0]}"
        )


def clear_data_root(data_root: Path) -> None:
    """Remove what a run writes; files of any other name stay."""
    # The manifest and the journal go first: half a run must not look like one.
    for name in (MANIFEST_FILE, JOURNAL_DIRECTORY, PULLED_DIRECTORY):
        _remove(data_root / name)
    for entry in data_root.iterdir():
        if entry.name in _CLEARED or parse_head_name(entry.name):
            _remove(entry)
    remove_report(data_root)


def discard_pulled(data_root: Path) -> None:
    """Remove a pulled run that is not to be merged."""
    _remove(data_root / PULLED_DIRECTORY)


def check_space(data_root: Path, journal: int, files: int, moments: int = 0) -> None:
    """See that the disk has room for a run.

    Args:
        data_root: On the disk in question.
        journal: Bytes that the journal will take.
        files: Bytes of the Parquet files, which are made of it before it goes.
        moments: Bytes of both that are moments.

    Raises:
        UserError: It has not.
    """
    free = shutil.disk_usage(data_root).free
    if free < journal + files:
        of_moments = (
            f"; {moments / 1e9:.1f} GB of it are moments, which take less of fewer heads and without "
            "sniffer.moments.by_bucket"
        )
        raise UserError(
            f"{_FIELD}: {data_root} has {free / 1e9:.1f} GB free, and the run needs about "
            f"{(journal + files) / 1e9:.1f} GB, {journal / 1e9:.1f} for the journal and "
            f"{files / 1e9:.1f} for the Parquet files; make room, name another disk, or lower "
            f"data.max_samples or sniffer.capture.sampler.base_rate{of_moments if moments else ''}"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
