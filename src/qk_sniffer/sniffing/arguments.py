"""Mistakes in the arguments of ``sniff``, which a run has in fields of its config."""

import operator
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from qk_sniffer.errors import UserError
from qk_sniffer.kinds import KINDS

T = TypeVar("T")

_ARGUMENTS = {
    "sniffer.capture.sampler.type": "sampler",
    "sniffer.capture.sampler.": "",
    "sniffer.capture.capture_pre_rope": "pre_rope",
    "sniffer.capture.capture_softmax": "softmax",
    **{f"sniffer.capture.{KINDS[kind].setting}": "kinds" for kind in KINDS},
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
            text = re.sub(rf"(?<!\w){re.escape(field)}", argument, text)
        raise UserError(text) from None


def integers(name: str, numbers: int | Iterable[int] | None) -> list[int] | None:
    """One number or some as a list; None stays.

    Raises:
        UserError: They are something else.
    """
    if numbers is None:
        return None
    try:
        some = numbers if isinstance(numbers, Iterable) else [numbers]
        return [operator.index(number) for number in some]
    except TypeError:
        raise UserError(f"{name}: expected integers, got {numbers!r}") from None


def require_integer(name: str, number: int) -> None:
    """See that an argument is an integer.

    Raises:
        UserError: It is not.
    """
    if not isinstance(number, int) or isinstance(number, bool):
        raise UserError(f"{name}: expected an integer, got {number!r}")
