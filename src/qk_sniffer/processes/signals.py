"""Ctrl-C and SIGTERM: a command ends in order, once, with the status that a shell expects of them."""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_USUAL: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
"""The signals that stop a command, and what Python does with them by itself."""

_SECONDS_TO_RETURN = 0.01
"""How long a function has to return in which Python drops whatever is raised."""


class Stopped(SystemExit):
    """A signal has come: what is running ends, and the exit status is 128 and the signal's number.

    It is no ``KeyboardInterrupt``, which Lightning would turn into a status of 1.
    """

    is_told = False
    """Whether another process of the run tells of it."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum

    def __str__(self) -> str:
        if self.signum == signal.SIGINT:
            return "interrupted"
        return f"stopped by {signal.Signals(self.signum).name}"


class _Interrupt(KeyboardInterrupt):
    """What a signal raises where libraries tidy up after a ``KeyboardInterrupt`` alone."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


class _Handler:
    """Raises where the command is, until it is ending."""

    is_installed = is_ending = False
    raised: type[Stopped] | type[_Interrupt] = Stopped
    signum: int | None = None
    """The signal that has come."""
    deferred: "DeferredSigterm | None" = None
    """Of the run at work."""
    usual_hook = staticmethod(sys.__unraisablehook__)
    """What Python does elsewhere with what it drops."""

    def __call__(self, signum: int, frame: Any) -> None:
        # A library may swallow what is raised: the next signal is heard too.
        if not self.is_ending:
            self.signum = signum
            raise self.raised(signum)

    def stopped(self, error: BaseException) -> Stopped | None:
        """The end that an error stands for, where it came of a signal; None for other errors."""
        if isinstance(error, Stopped):
            return error
        return None if self.signum is None else Stopped(self.signum)

    def deliver_again(self, unraisable: Any) -> None:
        """Send a signal anew that came in a ``__del__`` or in the callback of a weak reference.

        Python drops what is raised there, and the command would go on.
        """
        dropped = unraisable.exc_value
        if isinstance(dropped, Stopped | _Interrupt):
            # One of threading's own locks may be held here.
            _thread.start_new_thread(_send_soon, (dropped.signum,))
        else:
            self.usual_hook(unraisable)


def _send_soon(signum: int) -> None:
    time.sleep(_SECONDS_TO_RETURN)
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signum)


_handler = _Handler()


def end_with_another() -> NoReturn:
    """End this process, since another of its run has ended: by the same signal, where it came here too.

    Raises:
        Stopped: It did.
        SystemExit: It did not.
    """
    if _handler.signum is not None:
        raise Stopped(_handler.signum)
    if _handler.deferred is not None:
        _handler.deferred.raise_where_it_came()
    raise SystemExit(1)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise ``Stopped`` in the main thread, within a block.

    What was ignored before, as a shell does for its background, stays ignored. After a block that was
    stopped neither has an effect: the process is at its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _handler.is_installed, _handler.is_ending, _handler.signum = True, False, None
    installed = [s for s, usual in _USUAL.items() if signal.getsignal(s) == usual]
    for signum in installed:
        signal.signal(signum, _handler)
    _handler.usual_hook, sys.unraisablehook = sys.unraisablehook, _handler.deliver_again
    stopped: Stopped | None = None
    try:
        yield
    except BaseException as error:
        if (stopped := _handler.stopped(error)) is None:
            raise
        end_in_order()
        raise stopped from None
    finally:
        if stopped is None:
            _handler.is_installed = _handler.is_ending = False
            sys.unraisablehook = _handler.usual_hook
            for signum in installed:
                signal.signal(signum, _USUAL[signum])


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a block, which is short and must be done whole or not at all."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    came: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if came:
        usual(*came[-1])


def end_in_order() -> None:
    """Let further signals change nothing: the command is ending, and loses nothing if it is let."""
    _handler.is_ending = _handler.is_installed


class DeferredSigterm:
    """A SIGTERM that waits until the batch at work is done.

    Lightning's own handler would let a run go on to its end, and wait in a handler for all processes to
    receive the signal, which hangs where one of them does not.
    """

    def __init__(self) -> None:
        self.is_deferred = False
        """Whether one waits for ``raise_where_it_came``; else it stops the command at once."""
        self._came = False

    def handle(self, launcher: Any) -> None:
        """Handle the signal from now on.

        Args:
            launcher: Of the trainer's strategy; it passes the signal on to the processes that it has
                launched. None where there are none.
        """

        _handler.deferred = self

        def note(signum: int, frame: Any) -> None:
            if not self.is_deferred:
                if not _handler.is_ending:
                    raise Stopped(signum)
                return
            self._came = True
            if launcher is not None:
                launcher.kill(signal.SIGTERM)

        # Elsewhere Python takes no handlers; the trainer puts back the earlier one when it ends.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, note)

    @property
    def has_come(self) -> bool:
        """Whether one waits."""
        return self._came

    def raise_where_it_came(self) -> None:
        """Stop the command.

        Raises:
            Stopped: A SIGTERM has come.
        """
        if self._came:
            raise Stopped(signal.SIGTERM)


@contextmanager
def tidied_up() -> Iterator[None]:
    """Let signals raise a ``KeyboardInterrupt`` within a block: libraries remove their files after it.

    Raises:
        Stopped: One has come.
    """
    _handler.raised = _Interrupt
    try:
        yield
    except BaseException as error:
        # With several processes datasets raises an error of its own instead.
        if (stopped := _handler.stopped(error)) is None:
            raise
        raise stopped from None
    finally:
        _handler.raised = Stopped


def _let_go() -> None:
    """A forked process, a data loader's for example, ends without a word where the command does."""
    for signum, handler in ((signal.SIGINT, _leave), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(signum) is _handler:
            signal.signal(signum, handler)


def _leave(signum: int, frame: Any) -> None:
    raise SystemExit(0)


os.register_at_fork(after_in_child=_let_go)
