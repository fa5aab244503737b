"""The processes that share a run, one for each device: what they tell each other, and how they fail."""

import heapq
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from qk_sniffer.errors import UserError, first_line
from qk_sniffer.processes.lifeline import STOP_SECONDS, Lifeline, stand_in_for_the_observer
from qk_sniffer.processes.signals import Stopped, end_with_another

T = TypeVar("T")

_NO_LIMIT = timedelta(days=365)
"""How long one process waits for another that works longer; a lifeline notices when one has died."""

_SECONDS_TO_LEARN = 10.0

_SECONDS_WITHOUT_US = 5.0
"""How long processes that share a model with one that ends are waited for: they may themselves wait for
it, in the middle of a forward, until its connections close."""


class Ranks:
    """The processes of one run; a run of one process is the plain case.

    Every method but ``leave`` is collective: all processes call it, in the same order, and
    ``gather_in_model`` those that share a model.

    Args:
        rank: Number of this process, from 0.
        size: How many there are.
        local_size: How many of them share this host.
        group: Their process group of torch.distributed; None for one process.
        model_size: How many neighbours share a model, and read the same batches.
        model_group: The process group of those that share this one's; None where it has its own.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_size: int = 1,
        group: Any = None,
        model_size: int = 1,
        model_group: Any = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_size = local_size
        self.model_size = model_size
        self._group = group
        self._model_group = model_group
        self.lifeline: Lifeline | None = None
        """What notices that a process died, from ``watch`` on where there are several."""

    @classmethod
    def of(cls, trainer: Any) -> "Ranks":
        """Those of a trainer's run; one process where there is no trainer or it has not begun."""
        import torch.distributed as dist

        if trainer is None or trainer.world_size == 1 or not dist.is_initialized():
            return ALONE
        if trainer not in _joined:
            # Of gloo whatever the devices are: it shows a closed connection at once.
            group = dist.new_group(backend="gloo", timeout=_NO_LIMIT)
            rank, size = trainer.global_rank, trainer.world_size
            model_size = _model_size(trainer)
            # Every process takes part in the making of every group.
            model_groups = [
                dist.new_group(range(first, first + model_size), backend="gloo", timeout=_NO_LIMIT)
                for first in range(0, size, model_size)
                if model_size > 1
            ]
            model_group = model_groups[rank // model_size] if model_groups else None
            _joined[trainer] = cls(rank, size, trainer.num_devices, group, model_size, model_group)
        return _joined[trainer]

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @property
    def reader(self) -> int:
        """Number of this process's batches: those that share a model read the same."""
        return self.rank // self.model_size

    @property
    def n_readers(self) -> int:
        """How many shares of the batches there are."""
        return self.size // self.model_size

    @property
    def shard(self) -> int:
        """Number of this process among those that share its model."""
        return self.rank % self.model_size

    def gather(self, value: T) -> list[T]:
        """What every process has, by rank; it must be picklable.

        Raises:
            SystemExit: A process died.
        """
        return self._gather(value, self.size, self._group)

    def gather_in_model(self, value: T) -> list[T]:
        """What each of the processes that share this one's model has; those of other models don't wait.

        Raises:
            SystemExit: A process died.
        """
        return self._gather(value, self.model_size, self._model_group)

    def _gather(self, value: T, size: int, group: Any, seconds: float | None = None) -> list[T]:
        if size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * size
        with self.exiting_where_one_died():
            _interruptible(lambda: dist.all_gather_object(values, value, group=group), seconds)
        return values

    @contextmanager
    def exiting_where_one_died(self) -> Iterator[None]:
        """Turn the error of a connection into the end of this process, where the other one has died.

        Raises:
            Stopped: It has, and a signal has come to this one.
            SystemExit: It has.
        """
        try:
            yield
        except RuntimeError:
            if self.lifeline is not None and self.lifeline.wait_for_failure(_SECONDS_TO_LEARN):
                end_with_another()
            raise

    @contextmanager
    def reading_together(self) -> Iterator[None]:
        """Forwards of a model, in which processes that share it wait for each other.

        Raises:
            SystemExit: One of them has died.
        """
        with self.exiting_where_one_died() if self.model_size > 1 else nullcontext():
            yield

    def run(self, task: Callable[[], T], *, together: bool = False) -> T:
        """Do something that may fail, in every process; where it fails in one, it fails in all.

        Args:
            task: What to do.
            together: Whether processes that share a model wait for each other in it. Where it fails in
                one of them alone, that one raises the error and ends, and the others notice.

        Returns:
            What it gave in this process.

        Raises:
            UserError: In the first process, where a user's mistake was found in any.
            SystemExit: In the others.
        """
        error: Exception | None = None
        try:
            result = task()
        except Exception as caught:
            error = caught
        failure = None if error is None else (isinstance(error, UserError), str(error))
        is_awaited = error is not None and together and self.model_size > 1
        try:
            failures = self._gather(
                failure, self.size, self._group, _SECONDS_TO_LEARN if is_awaited else None
            )
        except TimeoutError:
            assert error is not None
            raise error from None
        if not any(failures):
            return result
        self.leave()
        if error is not None and (self.is_first or not isinstance(error, UserError)):
            raise error
        rank, (is_mistake, message) = next((r, f) for r, f in enumerate(failures) if f)
        if not self.is_first:
            raise SystemExit(2 if is_mistake else 1) from error
        if is_mistake:
            raise UserError(message)
        raise RuntimeError(f"rank {rank} failed: {message}")

    def first(self, task: Callable[[], T]) -> T:
        """Do something in the first process alone, and give all of them its picklable result."""
        result = self.run(lambda: task() if self.is_first else None)
        first: T = self.gather(result)[0]  # type: ignore[assignment]
        return first

    def after_first(self, task: Callable[[], T]) -> T:
        """Do something in the first process and then in the others, which find its files in caches."""
        result = self.run(lambda: task() if self.is_first else None)
        others = self.run(lambda: None if self.is_first else task())
        return result if self.is_first else others  # type: ignore[return-value]

    def require_same(self, fingerprint: Mapping[str, Any]) -> None:
        """See that all processes have loaded one model and have one config.

        Args:
            fingerprint: What this one has, by field.

        Raises:
            UserError: A field differs, in the first process.
            SystemExit: In the others.
        """
        found = self.gather(fingerprint)

        def compare() -> None:
            for rank, other in enumerate(found):
                differing = [name for name, value in found[0].items() if other.get(name) != value]
                if differing:
                    raise UserError(
                        f"{differing[0]}: rank {rank} and rank 0 differ in {', '.join(differing)}; "
                        "give all nodes the same config and the same model"
                    )

        self.run(compare)

    def watch(self, main_address: str) -> None:
        """Notice from now on when one of the processes dies, and stop the others.

        Args:
            main_address: Name or number under which the others reach the host of the first process.
        """
        if self.size == 1 or self.lifeline is not None:
            return
        host = f"{socket.gethostname()}, process {os.getpid()}"
        key = self.gather(secrets.token_bytes(32))[0]
        lifeline = Lifeline(self.rank, self.gather(host), key)
        port = self.gather(lifeline.port)[0]
        self.run(lambda: lifeline.connect(main_address, port))
        self.lifeline = lifeline
        stand_in_for_the_observer()

    def leave(self, reason: str | None = None) -> None:
        """End the watch of this process.

        Args:
            reason: Why it stops before the end, for which the others stop too; None where all stop.
        """
        if self.lifeline is not None:
            self.lifeline.close(reason)
            self.lifeline = None
        for trainer in [trainer for trainer, ranks in _joined.items() if ranks is self]:
            del _joined[trainer]


ALONE = Ranks()
"""One process."""

_joined: WeakKeyDictionary[Any, Ranks] = WeakKeyDictionary()


def _model_size(trainer: Any) -> int:
    """How many processes are to share a model; 1 where they can't, which is refused elsewhere."""
    wanted = getattr(trainer.lightning_module, "tensor_parallel", 1)
    return wanted if trainer.num_devices % wanted == 0 else 1


def _interruptible(task: Callable[[], None], seconds: float | None = None) -> None:
    """Run a task that may wait for long outside of Python, where it would keep signals from us.

    Raises:
        TimeoutError: It takes longer than ``seconds``, and goes on.
    """
    errors: list[BaseException] = []

    def work() -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="gather", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]


def reason_of(exception: BaseException) -> str:
    """What the other processes are told of the end of this one."""
    if isinstance(exception, UserError | Stopped):
        return str(exception)
    if isinstance(exception, KeyboardInterrupt | SystemExit):
        return "interrupted" if isinstance(exception, KeyboardInterrupt) else "stopped"
    return f"{type(exception).__name__}: {first_line(exception)}"


def await_launched(trainer: Any, model_size: int = 1) -> None:
    """Let the processes that a trainer has launched end, as all do when one of them does.

    Args:
        trainer: The trainer, in the first process of a host.
        model_size: How many neighbours share a model.
    """
    launched = [*enumerate(getattr(trainer.strategy.launcher, "procs", ()), start=1)]
    for number, process in reversed(launched):
        if isinstance(process, subprocess.Popen):
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS if number >= model_size else _SECONDS_WITHOUT_US)


class Dealer:
    """Deals work to the processes of a run: each piece goes to the one that has the least to do.

    Every process deals all pieces and keeps its own, so that none of them needs to ask another.

    Args:
        size: How many processes there are.
    """

    def __init__(self, size: int) -> None:
        self._loads = [(0, rank) for rank in range(size)]

    def deal(self, cost: int) -> int:
        """The process that does the next piece, given its cost."""
        load, rank = self._loads[0]
        heapq.heapreplace(self._loads, (load + cost, rank))
        return rank
