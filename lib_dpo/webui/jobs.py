"""Long work inside a host, one piece at a time: who asked for what, how far it is, and how to stop it."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lib_dpo.errors import BusyError, Cancelled, DpoError, NotFoundError, printable
from lib_dpo.hosts.base import Host, Job, Silent
from lib_dpo.maths.devices import memory_in_words

logger = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Result = TypeVar("Result")
Work = Callable[[Job], Result]

_AT_ONCE = 0.5  # seconds after which no work is said to have been done before
_KEPT, _RESULTS_KEPT = 32, 4  # finished jobs that can still be asked for; results, which may be whole grids of pictures


@dataclass
class Record:
    """One job as the API shows it."""

    id: str
    title: str
    state: State = "waiting"
    share: float = 0.0  # 0 to 1
    seconds_left: float | None = None
    result: Any = None
    error: str = ""
    kind: str = ""  # class of the error
    stop: bool = False
    beside: bool = False  # whether the host's own work goes on meanwhile
    started: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def as_json(self, *, with_result: bool = True) -> dict[str, Any]:
        """What the API shows; `result` is left out of lists."""
        found = {
            "id": self.id,
            "title": self.title,
            "state": self.state,
            "progress": round(self.share, 4),
            "seconds_left": None if self.seconds_left is None else round(self.seconds_left, 1),
            "error": self.error,
            "error_kind": self.kind,
        }
        return {**found, "result": self.result} if with_result else found


class Jobs:
    """All jobs of one host. They run one after another, in the order in which the host's own queue lets them in."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, title: str, work: Work[Result], *, task_id: str | None = None) -> Result:
        """Do work in this thread, when its turn comes.

        Args:
            task_id: the page's, under which the host shows its progress bar.

        Raises:
            BusyError: a job of this title is waiting or running already (two clicks at once).
            Cancelled: interrupted. Whatever else the work raises.
        """
        record = self.register(title)
        result = self.finish(record, work, task_id)
        record.result = None  # the caller has it
        return result

    def start(self, title: str, work: Work[Any]) -> Record:
        """Do work in a thread of its own; `get` tells how it goes. Raises BusyError as `run`."""
        record = self.register(title)
        self.go_on(record, work)
        return record

    def go_on(self, record: Record, work: Work[Any]) -> None:
        """Do the work of a registered job in a thread of its own; `start` in two steps, for those who need the record first."""
        thread = threading.Thread(target=self._do_quietly, args=(record, work), name=f"dpo {record.title}", daemon=True)
        thread.start()

    def get(self, job_id: str) -> Record:
        """A job that waits, runs, or ended not long ago. Raises NotFoundError."""
        with self._lock:
            record = self._records.get(job_id)
        if record is None:
            raise NotFoundError(f"there is no job {job_id[:40]!r}; it may have ended long ago: ask for `jobs`")
        return record

    def all(self) -> list[Record]:
        """The jobs that can be asked for, the oldest first."""
        with self._lock:
            return list(self._records.values())

    @property
    def busy(self) -> bool:
        """Whether a job of ours is waiting for the host or running in it."""
        return any(not record.is_over and not record.beside for record in self.all())

    def cancel(self, job_id: str) -> Record:
        """Ask a job to stop; it does at the next tensor or picture. Raises NotFoundError."""
        record = self.get(job_id)
        record.stop = True
        return record

    def interrupt(self) -> None:
        """Stop all jobs of ours in the host, at once; what others do in it goes on."""
        mine = [record for record in self.all() if not record.is_over and not record.beside]
        for record in mine:
            record.stop = True
        if any(record.state == "running" for record in mine):
            self._host.interrupt()  # a sampler asks the host only

    def register(self, title: str, *, beside: bool = False) -> Record:
        """A new job that waits for its turn: `finish` or `go_on` does its work. Raises BusyError as `run`.

        Args:
            beside: work that needs nothing of the host, such as a download: it waits for no turn and keeps nobody waiting,
                and `interrupt` leaves it alone.
        """
        with self._lock:
            title = printable(title)
            running = (each for each in self._records.values() if not each.is_over and not each.stop)
            if any(each.title == title for each in running):
                raise BusyError(f"{title}: is running or waiting already; wait for it, or interrupt it")
            for old in [record.id for record in self._records.values() if record.is_over][:-_KEPT]:
                del self._records[old]
            record = Record(secrets.token_hex(6), title, beside=beside)
            self._records[record.id] = record
            return record

    def finish(self, record: Record, work: Work[Result], task_id: str | None = None) -> Result:
        """Do the work of a registered job in this thread; `run` in two steps, for those who want the record too."""
        try:
            place: AbstractContextManager[Job] = (
                nullcontext(Silent()) if record.beside else self._host.job(record.title, task_id)
            )
            with place as job:
                tracked = _Tracked(record, job)
                tracked.check()
                record.state, record.started = "running", time.monotonic()
                with memory_in_words(record.title, "close other programs, or ask for less at once"):
                    result = work(tracked)
                record.result, record.share, record.seconds_left, record.state = result, 1.0, 0.0, "done"
        except Cancelled:
            record.state = "cancelled"
            raise
        except BaseException as error:
            record.state, record.error, record.kind = "failed", str(error) or type(error).__name__, type(error).__name__
            raise
        with self._lock:
            for old in [each for each in self._records.values() if each.result is not None][:-_RESULTS_KEPT]:
                old.result = None
        return result

    def _do_quietly(self, record: Record, work: Work[Any]) -> None:
        try:
            self.finish(record, work)
        except DpoError as error:
            logger.info("%s: %s", record.title, error)
        except Exception:
            logger.exception("%s failed", record.title)


class _Tracked:
    """The host's job, with what happens noted in the record, and stopped when the record says so."""

    def __init__(self, record: Record, job: Job) -> None:
        self._record, self._job = record, job
        self._cells = self._cell = 0
        self._there: float | None = None  # the share that was done before: of a download that goes on

    def progress(self, done: int, total: int, key: str) -> None:
        self.check()
        self._note(done / total if total else 1.0)
        self._job.progress(done, total, key)

    def cells(self, count: int) -> None:
        self._cells, self._cell = count, -1
        self._job.cells(count)

    def check(self) -> None:
        if self._record.stop:
            raise Cancelled(f"{self._record.title}: stopped; nothing was left behind")
        if self._cells:  # asked once before each picture
            self._cell = min(self._cell + 1, self._cells)
            self._note(self._cell / self._cells)
        self._job.check()

    def _note(self, share: float) -> None:
        record, elapsed = self._record, time.monotonic() - self._record.started
        record.share = share
        if self._there is None:
            self._there = share if elapsed < _AT_ONCE else 0.0
        done = share - self._there
        record.seconds_left = elapsed * (1 - share) / done if done > 0 else None
