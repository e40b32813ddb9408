"""One command as several processes, which `accelerate launch` starts: each does a share, the first has the results.

The processes talk on the CPU (gloo), whatever they draw on. A thread of each, its pulse, adds up with those of the others
some times a second: so all know how much is done, whether one of them failed, and why. One that died is known by a
connection that closes; a machine that went away, by one that stays silent.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

from lib_dpo.errors import Cancelled, DpoError, HostError, missing_extra

Item = TypeVar("Item")

_BEAT = 0.2  # seconds between two beats of the pulse
_SILENT = timedelta(minutes=2)  # without a beat of another one, after which it counts as dead
_MEETING = timedelta(minutes=5)  # to find one another at the start, and to hand over all pictures
_LAST_WORDS = 10.0  # seconds that one which fails waits until the others know
_CANCELLED = "cancelled"
_DEAD = (
    "a process of this command died, or its machine went away, and its pictures with it: nothing was written; what accelerate "
    "printed says which one it was. Run the command again"
)
_LOST = (
    "the processes of this command do not find one another; look at the address and the port of the first one that accelerate "
    "launch was given, and whether a firewall lies between the machines"
)


def launched() -> int:
    """How many processes run this command, by what `accelerate launch` says in the environment."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    return max(1, int(os.environ["WORLD_SIZE"])) if all(os.environ.get(name, "").isdecimal() for name in names) else 1


class Processes:
    """The processes of one command, as one of them sees them. Alone it does everything, and nothing of this costs anything."""

    def __init__(self, index: int = 0, count: int = 1, local: int = 0, pulse: _Pulse | None = None) -> None:
        self.index, self.count = index, count
        self._local, self._pulse = local, pulse  # its number on its machine

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, prints and shows progress."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """What this process does of the items: neighbours, for these have most in common."""
        start, stop = (len(items) * n // self.count for n in (self.index, self.index + 1))
        return items[start:stop]

    def device(self, name: str) -> str:
        """The device of this process. `auto` and `cuda` leave the number open: each on a machine takes the next GPU."""
        if self.count == 1 or name.strip().lower() not in ("auto", "cuda"):
            return name
        import torch

        gpus = torch.cuda.device_count()
        return f"cuda:{self._local % gpus}" if gpus else name

    def report(self, done: int) -> int:
        """Say how much this process has done. Returns what all have, as far as is known. Raises as `check`."""
        if self._pulse is None:
            return done
        self._pulse.mine = done
        self.check()
        return max(done, self._pulse.done)

    @property
    def done(self) -> int:
        """What all have done."""
        return self._pulse.done if self._pulse else 0

    def check(self) -> None:
        """Raises HostError where another process failed or died, Cancelled where one was stopped."""
        if self._pulse:
            self._pulse.check()

    def collect(self, mine: Sequence[Item], on_wait: Callable[[], None] = lambda: None) -> list[Item]:
        """The results of all, in the order of the processes, in the first one. The others have done their part: they end.

        Args:
            on_wait: called while others are still at work. May raise.
        """
        if self._pulse is None:
            return list(mine)
        import torch.distributed

        self._pulse.meet(on_wait)
        parts: list[Any] | None = [None] * self.count if self.first else None
        with _connected():  # accelerate's own `gather_object` would give everything to everybody
            torch.distributed.gather_object(list(mine), parts)
        if parts is None:
            sys.exit(0)  # through `together`, which waits there until the first one is done
        return [each for part in parts for each in part]

    def hand_out(self, make: Callable[[], Item]) -> Item:
        """What the first process makes, in all of them."""
        if self._pulse is None:
            return make()
        import torch.distributed

        made: list[Any] = [make() if self.first else None]
        self._pulse.meet()
        with _connected():
            torch.distributed.broadcast_object_list(made, src=0)
        found: Item = made[0]
        return found


ALONE = Processes()


class _Pulse:
    """What the processes know of one another, as long as their command runs."""

    def __init__(self, count: int) -> None:
        import torch.distributed

        self.mine = self.done = 0  # what this process has done, and what all have
        self._count = count
        self._meeting = self._arrived = self._ended = 0  # the last meeting that this process came to; the sum of all of them
        self._trouble = ""  # of this process
        self._troubles: dict[int, str] = {}  # of all, by process
        self._dead = False
        self._group = torch.distributed.new_group(backend="gloo", timeout=_SILENT)
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        import torch

        try:
            while True:
                told = torch.tensor([self.mine, self._meeting, self._ended, bool(self._trouble)])
                torch.distributed.all_reduce(told, group=self._group)
                self.done, self._arrived, ended, troubled = told.tolist()
                if troubled:
                    said: list[Any] = [None] * self._count
                    torch.distributed.all_gather_object(said, self._trouble, group=self._group)
                    self._troubles = {index: words for index, words in enumerate(said) if words}
                if troubled or ended == self._count:
                    return
                time.sleep(_BEAT)
        except RuntimeError:  # gloo's for a connection that is closed or silent
            self._dead = True

    def check(self) -> None:
        """Raises HostError or Cancelled, as it is with the others."""
        for index, words in self._troubles.items():
            if words != _CANCELLED:
                raise HostError(f"process {index} of {self._count}, counted from 0, failed; nothing was written: {words}")
        if self._troubles:
            raise Cancelled("stopped; nothing was left behind")
        if self._dead:
            raise HostError(_DEAD)

    def meet(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Wait until all have come to this point. Raises as `check`."""
        self._meeting += 1
        while self._arrived < self._count * self._meeting:
            self.check()
            on_wait()
            time.sleep(_BEAT / 4)

    def end(self, *, first: bool) -> None:
        """Wait until all are done. The first one has everything, whatever becomes of the others; these raise as `check`."""
        self._ended = 1
        if first:
            self._thread.join(_LAST_WORDS)
            return
        while self._thread.is_alive():
            self.check()
            self._thread.join(_BEAT)
        self.check()

    def fail(self, error: BaseException) -> None:
        """Let the others know why this process ends. Raises as `check` where it was stopped because of another one."""
        stopped = isinstance(error, KeyboardInterrupt | Cancelled)
        words = str(error) if isinstance(error, DpoError) else f"{type(error).__name__}: {error}"
        self._trouble = _CANCELLED if stopped else words
        self._thread.join(_LAST_WORDS)
        if stopped:  # the launcher stops all when one of them ends
            self.check()


@contextmanager
def together() -> Iterator[Processes]:
    """The processes of this command: `ALONE`, or those that `accelerate launch` started.

    An error in one of them ends all: the others raise HostError with its sentence, or Cancelled where it was stopped. SIGTERM,
    by which the launcher stops them, raises KeyboardInterrupt as Ctrl-C does.
    """
    if launched() == 1:
        yield ALONE
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise HostError(
            f"WORLD_SIZE in the environment says {launched()} processes, but {' and '.join(missing)} is not set, which says "
            "where they meet; start the command by `accelerate launch`, or unset WORLD_SIZE for a single process"
        )
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise missing_extra("several processes need", "accelerate") from error

    stop, left = _Stop(), None
    with _connected(_LOST):
        state = PartialState(cpu=True, timeout=_MEETING)  # for what they say to one another; `device` is for pictures
        pulse = _Pulse(state.num_processes)
    try:
        try:
            yield Processes(state.process_index, state.num_processes, state.local_process_index, pulse)
        except SystemExit as done:  # of `collect`
            left = done
        pulse.end(first=state.process_index == 0)
    except BaseException as error:
        stop.ignore()
        pulse.fail(error)
        raise
    state.destroy_process_group()
    stop.restore()
    if left:
        raise left


@contextmanager
def _connected(otherwise: str = _DEAD) -> Iterator[None]:
    """Say it in words where gloo finds a connection closed or silent. Raises HostError."""
    try:
        yield
    except RuntimeError as error:
        raise HostError(otherwise) from error


class _Stop:
    """Has the first SIGINT or SIGTERM raise KeyboardInterrupt. Launcher and terminal may both send one: others are ignored."""

    def __init__(self) -> None:
        self._before = {each: signal.signal(each, self._raise) for each in (signal.SIGINT, signal.SIGTERM)}

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.ignore()
        raise KeyboardInterrupt

    def ignore(self) -> None:
        """From now on, for what is to be told before this process ends."""
        for each in self._before:
            signal.signal(each, signal.SIG_IGN)

    def restore(self) -> None:
        """Have signals do what they did before."""
        for each, handler in self._before.items():
            signal.signal(each, handler)
