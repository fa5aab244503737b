"""Mistakes in the arguments of ``sniff``, which a run has in fields of its config."""

from collections.abc import Callable
from typing import TypeVar

from qk_sniffer.errors import UserError

T = TypeVar("T")

_ARGUMENTS = {
    "sniffer.capture.sampler.type": "sampler",
    "sniffer.capture.sampler.": "",
    "sniffer.capture.capture_pre_rope": "pre_rope",
    "sniffer.capture.": "",
    "sniffer.output.": "",
}


def as_arguments(make: Callable[[], T]) -> T:
    """What ``make`` gives.

    Raises:
        UserError: The same that it raises, with names of arguments in place of fields.
    """
    try:
        return make()
    except UserError as error:
        text = str(error)
        for field, argument in _ARGUMENTS.items():
            text = text.replace(field, argument)
        raise UserError(text) from None
