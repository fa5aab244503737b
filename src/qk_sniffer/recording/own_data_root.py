"""The data root of a run: taken for it, continued or replaced, finished, published and given free."""

import logging
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from tqdm.auto import tqdm

from qk_sniffer.config import OutputConfig
from qk_sniffer.errors import UserError
from qk_sniffer.hub import Publication, check_access, pull, push
from qk_sniffer.processes import Ranks
from qk_sniffer.recording.provenance import fingerprint
from qk_sniffer.storage import (
    CONFIG_FILE,
    JOURNAL_DIRECTORY,
    EarlierRun,
    Ownership,
    clear_data_root,
    data_root_path,
    discard_pulled,
    earlier_run,
    file_progress,
    finalize,
    prepare_data_root,
    published_table,
    write_text,
)

T = TypeVar("T")

log = logging.getLogger(__name__)


class OwnDataRoot:
    """The data root of one run; in a run of several processes each has this object.

    Args:
        output: Where it is, and where it is published.

    Attributes:
        path: Where it is.
        ownership: Keeps other runs out.
        config_yaml: The resolved config to save in it; None saves none.
    """

    def __init__(self, output: OutputConfig) -> None:
        self.path = data_root_path(output.data_root)
        self.ownership = Ownership(self.path)
        self.config_yaml: str | None = None
        self._output = output
        self._publication: Publication | None = None

    def take(self, *, n_nodes: int = 1) -> None:
        """Take it for this run, and repair what an interrupted one left there.

        The first process does so for all.

        Args:
            n_nodes: Hosts that the processes of the run are on.

        Raises:
            UserError: It belongs to another run, is not writable, or holds what can't be continued or
                replaced.
        """
        self.ownership.take(n_nodes)
        try:
            prepare_data_root(self.path, self._output.overwrite)
        except UserError:
            self.ownership.release()
            raise

    def earlier_run(self, settings: Mapping[str, Any]) -> EarlierRun | None:
        """What it holds already of this very run; None where it begins anew.

        Args:
            settings: The sections model, data and capture of the run.

        Raises:
            UserError: It holds a run with other settings.
        """
        earlier = None if self._output.overwrite else earlier_run(self.path)
        if earlier is not None:
            earlier.require(self.path, fingerprint(settings))
        return earlier

    def pull_earlier_run(self, settings: Mapping[str, Any]) -> EarlierRun | None:
        """The same, and what the branch on the Hub has beyond that, which is pulled.

        Raises:
            UserError: One of them holds a run with other settings, or the Hub fails.
        """
        output, earlier = self._output, self.earlier_run(settings)
        self._publication = None
        if output.hf_repo_id is None:
            return earlier
        self._publication = publication = Publication.of_run(
            self.path, settings, output.hf_repo_id, output.hf_branch, output.private
        )
        check_access(publication, "set it to null and publish later with `qk-sniffer push`")
        known = fingerprint(settings) | dict(earlier.fingerprint if earlier else {})
        pull(self.path, publication, known, overwrite=output.overwrite)
        if not output.overwrite:
            publication.write(self.path)
        return self.earlier_run(settings)

    def make_ready(self, earlier: EarlierRun | None, header: Mapping[str, Any]) -> None:
        """Clear it for a new run, or see that the earlier one can be continued.

        Args:
            earlier: The run that is continued; None begins anew.
            header: The journal's.

        Raises:
            UserError: The earlier run was made by other weights or of other heads.
        """
        if earlier is None:
            clear_data_root(self.path)
            if self._publication is not None:
                # Not before: what the branch holds is given up together with what was here.
                self._publication.write(self.path)
            return
        try:
            earlier.require(self.path, header["fingerprint"])
        except UserError:
            if earlier.is_pulled:
                discard_pulled(self.path)
            raise

    def save_config(self) -> None:
        """Save the config, once."""
        if self.config_yaml is not None:
            write_text(self.path / CONFIG_FILE, self.config_yaml)
            self.config_yaml = None

    def finalize(self, ranks: Ranks, *, complete: bool = False) -> dict[str, Any]:
        """Write the Parquet files of all that was captured, while it is ours.

        Args:
            ranks: The processes that share the work; each of them calls this.
            complete: Whether every text has been read.

        Returns:
            The manifest.

        Raises:
            UserError: As ``qk_sniffer.storage.finalize``.
        """

        def progress(files: Iterable[T], total: int) -> Iterable[T]:
            if not ranks.is_first:
                return files
            share = "" if ranks.size == 1 else f" the first of {ranks.size} shares"
            return self._while_ours(file_progress(files, total, f"Writing{share}"))

        return finalize(self.path, progress, complete=complete, ranks=ranks)

    def _while_ours(self, files: Iterable[T]) -> Iterator[T]:
        for file in files:
            self.ownership.require()
            yield file

    def publish(self, manifest: dict[str, Any]) -> None:
        """Push it to the Hub, where the run says so.

        Raises:
            UserError: It is not ours any more, or the Hub fails.
        """
        if self._publication is not None:
            self.ownership.require()
            push(self.path, self._publication)
            tqdm.write(published_table(self._publication.place, manifest))

    @property
    def holds_rows(self) -> bool:
        """Whether rows wait there to be written as Parquet."""
        return (self.path / JOURNAL_DIRECTORY).exists()

    def warn_how_to_go_on(self) -> None:
        """Say how to continue a run that has ended before its files were written."""
        again = " with sniffer.output.overwrite: false" if self._output.overwrite else ""
        log.warning(
            "What was captured so far is safe. Go on with the same command%s, or write it as "
            "Parquet with: qk-sniffer finalize %s",
            again,
            shlex.quote(str(self.path)),
        )
