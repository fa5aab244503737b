"""The command ``qk-sniffer``; heavy imports wait until a command needs them."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qk_sniffer.errors import UserError
from qk_sniffer.secrets import redact

_USAGE = """\
usage: qk-sniffer COMMAND ...

Capture the query and key vectors of every attention head of a causal language model.

commands:
  predict --config FILE   run a model over texts and write one Parquet file per head
  finalize DATA_ROOT      write Parquet files from what an interrupted run captured

`qk-sniffer predict --help` explains every field; `--print_config` prints a commented config.
"""


def _predict(args: list[str]) -> None:
    from qk_sniffer.predict import predict

    predict(args)


def _finalize(args: list[str]) -> None:
    if len(args) != 1:
        raise UserError("finalize: give the data root of the interrupted run, and nothing else")
    from qk_sniffer.storage import finalize
    from qk_sniffer.summary import file_progress, summary_table

    data_root, started = Path(args[0]), time.monotonic()
    manifest = finalize(data_root, file_progress)
    sys.stdout.write(summary_table(data_root, manifest, seconds=time.monotonic() - started) + "\n")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {"predict": _predict, "finalize": _finalize}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, or 2 for a mistake in the config, the command line or the data.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0 if args else 2
    try:
        if args[0] not in _COMMANDS:
            raise UserError(f"{args[0]}: no such command; choose {' or '.join(_COMMANDS)}")
        _COMMANDS[args[0]](args[1:])
    except UserError as error:
        # A DataLoader worker wraps the message in its own traceback; the message is the last line.
        message = str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]
        sys.stderr.write(f"qk-sniffer: error: {redact(message)}\n")
        return 2
    return 0
