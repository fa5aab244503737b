"""The command ``qk-sniffer``; heavy imports wait until a command needs them."""

import argparse
import importlib.metadata
import importlib.resources
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qk_sniffer.errors import UserError, did_you_mean, nearest, redact
from qk_sniffer.processes import Stopped, stopping_on_signals

if TYPE_CHECKING:
    from qk_sniffer.hub import Publication

_USAGE = """\
usage: qk-sniffer COMMAND ...

Capture the query and key vectors of every attention head of a causal language model.

commands:
  predict --config FILE     run a model over texts and write one Parquet file per head
  estimate --config FILE    tell rows, bytes and memory of a run beforehand; --time its time too
  finalize DATA_ROOT        write Parquet files from what an interrupted run captured
  verify DATA_ROOT          check the files of a finished run; --against-model reads texts again
  report DATA_ROOT          draw a finished run: a page and pictures, which its card shows
  export-kvpress DATA_ROOT  write moments of queries as the statistics that kvpress loads
  push DATA_ROOT            publish a finished run on the Hub, or go on with a push that failed
  convert-config FILE       print a config of the original scripts as one for predict

`qk-sniffer predict --help` explains every field; `--print_config` prints a commented config.
`qk-sniffer --version` prints the version; `python -m qk_sniffer` is the same command.
"""


def _predict(args: list[str]) -> int:
    if not {"-h", "--help"}.isdisjoint(args):
        # Written by docs/generate.py: the parser itself takes seconds of imports.
        help_file = importlib.resources.files("qk_sniffer") / "predict" / "help.txt"
        sys.stdout.write(help_file.read_text())
        return 0
    from qk_sniffer.predict import predict

    predict(args)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        misspelt = re.search(r"unrecognized arguments: (-[^\s=]+)", message)
        if misspelt and (meant := nearest(misspelt[1], self._option_string_actions)):
            raise UserError(f"{misspelt[1]}: no such option; did you mean {meant}?")
        raise UserError(f"{self.prog.split()[-1]}: {message}; `{self.prog} --help` lists the options")


def _data_root(name: str) -> Path:
    from qk_sniffer.storage import existing_data_root

    return existing_data_root(name)


def _estimate(args: list[str]) -> int:
    parser = _Parser(
        "qk-sniffer estimate",
        usage="%(prog)s --config FILE [arguments of predict ...] [--time]",
        description="Tell what a run will take, from the arguments of predict; nothing is captured.",
        epilog="`qk-sniffer predict --help` explains the arguments of predict.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="load the model too, and read some tokens of the run for about a minute at most",
    )
    options, rest = parser.parse_known_args(args)

    from qk_sniffer.estimate import estimate

    sys.stdout.write(estimate(rest, timed=options.time) + "\n")
    return 0


def _finalize(args: list[str]) -> int:
    parser = _Parser("qk-sniffer finalize", description="Write what an interrupted run captured.")
    parser.add_argument("data_root", type=_data_root, help="directory of the run")
    data_root = parser.parse_args(args).data_root

    from qk_sniffer.storage import (
        PULLED_DIRECTORY,
        file_progress,
        finalize,
        merge_pulled,
        owned,
        summary_table,
    )

    started = time.monotonic()
    with owned(data_root):
        has_pulled = (data_root / PULLED_DIRECTORY).exists()
        manifest = (merge_pulled if has_pulled else finalize)(data_root, file_progress)
    sys.stdout.write(summary_table(data_root, manifest, seconds=time.monotonic() - started) + "\n")
    return 0


def _verify(args: list[str]) -> int:
    parser = _Parser("qk-sniffer verify", description="Check the files of a finished run.")
    parser.add_argument("data_root", type=_data_root, help="directory of the run")
    parser.add_argument(
        "--against-model",
        action="store_true",
        help="let the model read four texts again, and compare their vectors",
    )
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="run code that the run's settings name: a sampler, trust_remote_code, models_dir",
    )
    options = parser.parse_args(args)

    from qk_sniffer.storage import (
        captured_names,
        count_rows,
        note_owner,
        nothing_kept,
        require_manifest,
        warn_of_non_finite,
    )
    from qk_sniffer.verify import verify

    data_root = options.data_root
    note_owner(data_root)
    faults = verify(data_root, trust_code=options.trust_code)
    if not faults and options.against_model:
        from qk_sniffer.predict import quiet_lightning
        from qk_sniffer.verify.against_model import verify_against_model

        quiet_lightning()
        faults = verify_against_model(data_root, trust_code=options.trust_code)
    if faults:
        sys.stdout.write("".join(f"{fault}\n" for fault in faults))
        return 1
    manifest = require_manifest(data_root)
    heads, rows = len(captured_names(manifest)), count_rows(manifest)
    non_finite = warn_of_non_finite(manifest)
    verdict, but = ("the files are whole", f", but {non_finite}") if non_finite else ("all is well", "")
    if nothing := nothing_kept(manifest):
        verdict, but = "the files are as they must be, and they are empty", f"\n{nothing}"
    sys.stdout.write(f"{data_root}: {verdict}, {heads:,} heads, {rows:,} rows{but}\n")
    return 0


def _report(args: list[str]) -> int:
    parser = _Parser("qk-sniffer report", description="Draw a finished run.")
    parser.add_argument("data_root", type=_data_root, help="directory of the run")
    parser.add_argument(
        "--heads",
        nargs="+",
        default=(),
        help="heads to look at closely, such as l02h05q; default: three",
    )
    parser.add_argument("--example", help="source id of the text whose attention is drawn")
    options = parser.parse_args(args)
    from qk_sniffer.report import write_report
    from qk_sniffer.storage import file_progress, owned

    def progress(heads: Any, total: int) -> Any:
        return file_progress(heads, total, "Measuring", unit="head")

    with owned(options.data_root):
        page = write_report(options.data_root, progress, heads=options.heads, example=options.example)
    sys.stdout.write(f"report   {page}\n")
    return 0


def _export_kvpress(args: list[str]) -> int:
    parser = _Parser(
        "qk-sniffer export-kvpress",
        description="Write moments of queries before RoPE as the statistics that kvpress's "
        "ExpectedAttentionStatsPress loads from its stats_folder.",
    )
    parser.add_argument("data_root", type=_data_root, help="directory of the run")
    parser.add_argument("directory", type=Path, help="a new directory for the statistics")
    parser.add_argument(
        "--n_sink",
        type=int,
        default=0,
        help="first positions of each text that are left out, of which kvpress takes 4; default: 0",
    )
    options = parser.parse_args(args)

    from qk_sniffer.export_kvpress import export_kvpress
    from qk_sniffer.reading import Captures

    n_tokens = export_kvpress(Captures(options.data_root), options.directory, options.n_sink)
    sys.stdout.write(f"kvpress  {options.directory}, of {n_tokens:,} tokens\n")
    return 0


def _push(args: list[str]) -> int:
    parser = _Parser("qk-sniffer push", description="Publish a finished run on the Hub.")
    parser.add_argument("data_root", type=_data_root, help="directory of the run")
    parser.add_argument("--hf_repo_id", help="Hub dataset, OWNER/NAME; default: the run's")
    parser.add_argument("--hf_branch", help="its branch; default: from the names of model and dataset")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="whether the dataset is to be private if it is new",
    )
    options = parser.parse_args(args)

    from qk_sniffer.config import require_hub_names
    from qk_sniffer.storage import owned

    require_hub_names(options.hf_repo_id, options.hf_branch)
    with owned(options.data_root):
        return _push_owned(options)


def _push_owned(options: argparse.Namespace) -> int:
    from qk_sniffer.hub import Publication, check_access, push
    from qk_sniffer.storage import published_table, require_manifest

    data_root = options.data_root
    manifest, publication = require_manifest(data_root), Publication.read(data_root)
    if publication is None and not options.hf_repo_id:
        raise UserError(f"push: {data_root} was never published; name a dataset with --hf_repo_id")
    publication = Publication.of_run(
        data_root,
        manifest["settings"],
        options.hf_repo_id or (publication.repo_id if publication else ""),
        options.hf_branch or (publication.branch if publication else None),
        _is_private(options, publication),
    )
    check_access(publication, "push later")
    push(data_root, publication)
    sys.stdout.write(published_table(publication.place, manifest) + "\n")
    return 0


def _is_private(options: argparse.Namespace, publication: "Publication | None") -> bool:
    """What the command line says, or else the earlier push to the same dataset."""
    if options.private is not None or publication is None:
        return bool(options.private)
    return publication.private and options.hf_repo_id in (None, publication.repo_id)


def _convert_config(args: list[str]) -> int:
    parser = _Parser(
        "qk-sniffer convert-config",
        description="Print a config of the original scripts as one for predict; what has no equal is "
        "said on stderr.",
    )
    parser.add_argument("file", type=Path, help="YAML with the sections dataset, model, tokenizer ...")

    from qk_sniffer.convert_config import convert_config

    converted, differences = convert_config(parser.parse_args(args).file)
    sys.stderr.write("".join(f"{line}\n" for line in differences))
    sys.stdout.write(converted)
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "predict": _predict,
    "estimate": _estimate,
    "finalize": _finalize,
    "verify": _verify,
    "report": _report,
    "export-kvpress": _export_kvpress,
    "push": _push,
    "convert-config": _convert_config,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 1 where verify found a fault, 2 for a mistake in the config, the command
        line or the data, 130 after Ctrl-C, or 143 after SIGTERM.
    """
    try:
        with stopping_on_signals():
            return _run(argv)
    except Stopped as stopped:
        if not stopped.is_told:
            sys.stderr.write(f"qk-sniffer: {stopped}\n")
        return int(stopped.code or 0)


def _run(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0 if args else 2
    if args[0] == "--version":
        sys.stdout.write(f"qk-sniffer {importlib.metadata.version('qk-sniffer')}\n")
        return 0
    try:
        if args[0] not in _COMMANDS:
            choices = f"choose {', '.join(_COMMANDS)}"
            if args[0].startswith("-"):
                raise UserError(f"{args[0]}: the first word is a command; {choices}")
            remedy = did_you_mean(args[0], (*_COMMANDS, "--version"), choices)
            raise UserError(f"{args[0]}: no such command; {remedy}")
        return _COMMANDS[args[0]](args[1:])
    except UserError as error:
        # A DataLoader worker wraps the message in its own traceback; the message is the last line.
        if error.is_told:
            return 2
        message = str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]
        sys.stderr.write(f"qk-sniffer: error: {redact(message)}\n")
        return 2
