"""The pool of processes that trace a server's jobs, each under a limit of memory and time.

Requests for the same trace share one. The processes are forked from one that has imported the stack (multiprocessing's
forkserver), which takes 60 ms. So a stranger's config is built in a process that can be killed, and a trace that nobody
waits for any more is ended with its process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

from ..errors import Limited, OurFault, PlanError, Unanswered
from ..job import point_of
from ..planning import fault_reports
from ..planning.fingerprint import NotTraced, can_trace
from ..planning.profile_cache import store_trace
from ..planning.tracer import InProcessTracer, TraceRequest
from ..progress import listener

SECONDS = 60.0
"""Seconds that one trace may take; the slowest of 264 published configs takes a tenth of it."""
MEMORY = 1536 << 20
"""Bytes of memory that one trace may take beside what the imported stack takes."""
QUEUE_LIMIT = 16
"""Traces in the queue; with so many, further clients are asked to come back."""
REQUESTS_PER_WORKER = 200
"""Traces after which a process is ended, and with it what transformers and torch cache of each model."""
GROWN = 48 << 20
"""Bytes by which a process may grow; one that has grown more since its start is ended after its trace."""
IDLE = 10.0
"""Seconds after which a process that has nothing to trace is ended. The next one is forked in 60 ms."""
_TICK = 0.02
log = logging.getLogger("vramplan")


class Busy(PlanError):
    """The error of a server whose queue is full."""

    def __init__(self) -> None:
        super().__init__("too many jobs are waiting here", "try again in a few seconds")


class Abandoned(PlanError):
    """The error of a request whose client has left."""

    def __init__(self) -> None:
        super().__init__("nobody waits for this job any more", "ask again")


class Ended(PlanError):
    """The error of a trace whose process was ended from outside, and the second one's too. It says nothing about the
    job, so no search takes it for an answer and no store keeps it."""

    def __init__(self) -> None:
        super().__init__(
            "the process that ran this job was ended from outside, twice",
            "try again: this is the server's trouble; if it is told again, run the job with the command line",
        )


@dataclass(eq=False)
class InFlightTrace:
    """One trace in the queue or running: how many requests wait for it, what it is doing, and its result.

    ``started`` is a time of :func:`time.monotonic`; None: it is still in the queue.
    """

    part: str
    request: TraceRequest
    waiting: int = 0
    started: float | None = None
    doing: str = ""
    result: bytes | PlanError | None = None
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class RequestHandle:
    """One client's request and the trace that it waits for, if any. ``left``: the client has closed the connection."""

    since: float = field(default_factory=time.monotonic)
    in_flight: InFlightTrace | None = None
    left: bool = False


class TracePool:
    """A pool that runs ``slots`` traces at once, the others in the order in which they were asked for.

    Traces that nobody waits for yet (:meth:`later`) run when there is nothing else to do, and stop when there is.
    """

    def __init__(self, slots: int | None = None, seconds: float = SECONDS, memory: int = MEMORY):
        self.slots, self.seconds, self.memory = slots or os.cpu_count() or 1, seconds, memory
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([f"{__package__}.preload"])
        self._closed = self._idling = self._dismissing = False
        self._workers: list[_Worker] = []
        self._in_flight: dict[tuple, InFlightTrace] = {}
        self._later: deque[InFlightTrace] = deque(maxlen=QUEUE_LIMIT)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(self.slots, "trace")

    @property
    def waiting(self) -> int:
        """Traces in the queue that somebody waits for."""
        return sum(in_flight.started is None and in_flight.waiting > 0 for in_flight in [*self._in_flight.values()])

    def ready(self) -> None:
        """Import the stack now, not when the first job comes; where it is not installed, do nothing."""
        if can_trace():
            self._rest(_Worker(self._context, self.memory))

    def close(self) -> None:
        """End every trace."""
        with self._lock:
            self._closed = True
            self._later.clear()
            for in_flight in self._in_flight.values():
                in_flight.waiting = 0
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.end()

    def trace(self, part: str, request: TraceRequest, handle: RequestHandle) -> bytes:
        """As :meth:`vramplan.planning.tracer.Tracer.trace`. Raises :class:`Busy`; :class:`Abandoned` when the client of
        ``handle`` has left; :class:`PlanError` also for a trace that takes too long or too much memory."""
        if not can_trace():
            raise NotTraced
        name = (part, request.key, *point_of(request.job), request.kernels[1])
        while True:
            in_flight = handle.in_flight = self._join(name, part, request)
            try:
                while not in_flight.done.wait(2 * _TICK):
                    if handle.left:
                        raise Abandoned
            finally:
                handle.in_flight = None
                with self._lock:
                    in_flight.waiting -= 1
            if isinstance(in_flight.result, bytes):
                return in_flight.result
            if not isinstance(in_flight.result, Abandoned):  # all others left just as this one joined
                raise in_flight.result

    def later(self, part: str, request: TraceRequest) -> None:
        """As :meth:`vramplan.planning.tracer.Tracer.later`."""
        if not can_trace():
            return
        with self._lock:
            self._later.append(InFlightTrace(part, request))
        self._threads.submit(self._idle)

    def _join(self, name: tuple, part: str, request: TraceRequest) -> InFlightTrace:
        with self._lock:
            in_flight = self._in_flight.get(name)
            if in_flight is None:
                if self.waiting >= QUEUE_LIMIT:
                    raise Busy
                in_flight = self._in_flight[name] = InFlightTrace(part, request, 1)
                self._threads.submit(self._execute, name, in_flight)
            else:
                in_flight.waiting += 1
            return in_flight

    def _execute(self, name: tuple, in_flight: InFlightTrace) -> None:
        try:
            in_flight.started = time.monotonic()
            in_flight.result = self._run(in_flight, lambda: in_flight.waiting == 0)
        except PlanError as error:
            in_flight.result = error
        except Exception as error:
            in_flight.result = OurFault(error)
        finally:
            with self._lock:
                self._in_flight.pop(name, None)
            in_flight.done.set()
            if self._later:
                self._threads.submit(self._idle)

    def _idle(self) -> None:
        """Run one trace of :meth:`later`, unless somebody waits for another."""
        with self._lock:
            if not self._later or self._in_flight or self._idling:
                return
            self._idling = True
            in_flight = self._later.popleft()
        try:
            store_trace(in_flight.part, in_flight.request, self._run(in_flight, lambda: bool(self._in_flight)))
        except Abandoned:
            self._later.appendleft(in_flight)
        except OurFault as fault:
            fault_reports.write(fault)
        except PlanError as error:
            log.debug("%s cannot be traced ahead: %s", in_flight.part, error.message)
        finally:
            self._idling = False

    def _run(self, in_flight: InFlightTrace, unwanted: Callable[[], bool]) -> bytes:
        """Trace in a process of its own; where that is ended from outside, once more in a new one. Raises
        :class:`PlanError`."""
        try:
            return self._run_in(lambda: self._take() or self._started(), in_flight, unwanted)
        except (EOFError, OSError):
            log.warning("the process that ran a trace was ended from outside: it is run again")
        try:
            return self._run_in(self._started, in_flight, unwanted)
        except (EOFError, OSError):
            raise Ended from None

    def _started(self) -> _Worker:
        return _Worker(self._context, self.memory)

    def _run_in(self, find: Callable[[], _Worker], in_flight: InFlightTrace, unwanted: Callable[[], bool]) -> bytes:
        """Trace in the process that ``find`` gives. Raises :class:`EOFError` or :class:`OSError` where it is ended from
        outside, or the one that it is forked from; :class:`PlanError`."""
        if unwanted():
            raise Abandoned
        worker = find()
        try:
            worker.pipe.send((in_flight.part, in_flight.request))
            result = self._hear(worker, in_flight, unwanted)
        except BaseException:
            worker.end()
            raise
        worker.requests_served += 1
        if worker.requests_served < REQUESTS_PER_WORKER and worker.grown < GROWN:
            self._rest(worker)
        else:
            worker.end()
        if isinstance(result, PlanError):
            raise result
        return result

    def _take(self) -> _Worker | None:
        """The process that was used last, if one is alive."""
        with self._lock:
            while self._workers:
                worker = self._workers.pop()
                if worker.alive:
                    return worker
                worker.end()
        return None

    def _rest(self, worker: _Worker) -> None:
        """Keep a process for :data:`IDLE` seconds, or until it is taken."""
        worker.since = time.monotonic()
        with self._lock:
            if not self._closed:
                self._workers.append(worker)
                if not self._dismissing:
                    self._dismiss_in(IDLE)
                return
        worker.end()

    def _dismiss_in(self, seconds: float) -> None:
        """One timer for all: each is a thread, and there may be tens of traces a second."""
        self._dismissing = True
        timer = threading.Timer(seconds, self._dismiss)
        timer.daemon = True
        timer.start()

    def _dismiss(self) -> None:
        with self._lock:
            since = time.monotonic() - IDLE
            old = [worker for worker in self._workers if worker.since <= since]
            self._workers = [worker for worker in self._workers if worker.since > since]
            self._dismissing = False
            if self._workers:
                self._dismiss_in(min(worker.since for worker in self._workers) - since)
        for worker in old:
            worker.end()

    def _hear(self, worker: _Worker, in_flight: InFlightTrace, unwanted: Callable[[], bool]) -> bytes | PlanError:
        deadline = time.monotonic() + self.seconds
        while not unwanted():
            if time.monotonic() > deadline:
                raise Limited(
                    f"the step of this model runs for more than {self.seconds:.0f} s on the meta device",
                    "run it with the command line, which waits: vramplan estimate",
                    "model",
                )
            if worker.grown > self.memory:
                raise _too_much(self.memory)
            if worker.pipe.poll(_TICK):
                kind, said = worker.pipe.recv()
                if kind != "doing":
                    return said if kind == "done" else _error_of(kind, said)
                in_flight.doing = said
        raise Abandoned


class _Worker:
    """One process that runs traces, one after the other."""

    def __init__(self, context: BaseContext, memory: int):
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, memory), daemon=True)
        self._process.start()
        theirs.close()
        self._start = _resident(self._process.pid)
        self.requests_served, self.since = 0, time.monotonic()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    @property
    def grown(self) -> int:
        """Bytes of memory that the process has taken since its start."""
        return _resident(self._process.pid) - self._start

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _resident(pid: int) -> int:
    """Resident bytes of a process, on systems that tell them; else 0."""
    try:
        with open(f"/proc/{pid}/statm") as pages:
            return int(pages.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _too_much(memory: int) -> Limited:
    return Limited(
        f"building this model takes more than {memory >> 20} MiB of this server's memory",
        "check the sizes in the config, or run it with the command line",
        "model",
    )


def _sent(error: PlanError) -> tuple[str, dict]:
    """An error as a worker sends it; of a fault of ours, its report goes along."""
    if isinstance(error, OurFault):
        return "fault", {"what": error.what, "report": error.report}
    return ("limited" if isinstance(error, Limited) else "refused"), error.as_dict()


_SENT = {"fault": OurFault, "limited": Limited, "refused": PlanError}


def _error_of(kind: str, sent: dict) -> PlanError:
    """The error that a worker sent."""
    return _SENT[kind](**sent)


_OUT = "DefaultCPUAllocator: can't allocate memory"
"""What PyTorch says where it finds no more (c10/core/impl/alloc_cpu.cpp), as a RuntimeError."""


def _work(pipe: Connection, memory: int) -> None:
    """The body of a worker process: run each trace that is asked for, tell what is being done, send back the result."""
    with suppress(OSError), open("/proc/self/statm") as pages:  # the parent looks every 20 ms: one allocation is faster
        limit = int(pages.read().split()[0]) * resource.getpagesize() + 2 * memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    listener.set(lambda words: pipe.send(("doing", words)))
    with suppress(EOFError):  # nobody is there any more
        while True:
            request = pipe.recv()
            try:
                pipe.send(("done", InProcessTracer().trace(*request)))
            except PlanError as error:
                out = _OUT in error.message  # the dry run told it as the model's own failure
                pipe.send(_sent(_too_much(memory) if out else error))
            except MemoryError:
                pipe.send(_sent(_too_much(memory)))
            except Unanswered as given_up:
                pipe.send(_sent(given_up.error))
            except Exception as error:
                pipe.send(_sent(OurFault(error)))
