"""Requests as they were received, and what goes wrong with them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Request:
    """A request as it was received.

    Attributes:
        path: As sent, with revisions quoted, without the query; a whole URL if meant for another host.
        n_bytes: How much of its body was read.
        headers: By their names in lower case.
        status: Of the answer; None where there was none, or not yet.
    """

    method: str
    path: str
    query: str
    n_bytes: int
    authorization: str | None
    headers: dict[str, str] = field(repr=False)
    status: int | None = None


@dataclass
class Fault:
    """What goes wrong with some requests.

    Attributes:
        method: A pattern of their whole method.
        path: A pattern that is searched in their path, as sent and without the query.
        status: Of an error that is the answer.
        headers: Added to the answer.
        message: Of the error.
        error_code: The Hub's, such as ``RepoNotFound``.
        drop: Closes the connection: ``"before"`` anything is done, with half of the body read;
            ``"halfway"`` through the body of the answer; ``"after"`` it was done, without an answer.
        delay: Seconds before the answer, or before the connection closes.
        times: How often it strikes; None for ever.
        after: How many such requests pass first.
        done: Whether the error is told although what was asked for has been done.
    """

    method: str
    path: str
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = ""
    error_code: str | None = None
    drop: Literal["before", "halfway", "after"] | None = None
    delay: float = 0.0
    times: int | None = None
    after: int = 0
    done: bool = False
    _met: int = field(default=0, init=False)

    def strikes(self, method: str, path: str) -> bool:
        """Whether it strikes this request, which is counted if it is such a one."""
        if not (re.fullmatch(self.method, method) and re.search(self.path, path)):
            return False
        self._met += 1
        return self._met > self.after and (self.times is None or self._met <= self.after + self.times)
