"""Many jobs in a few processes, each of which has loaded its modules once."""

from __future__ import annotations

import math
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

_SPAWN = get_context("spawn")  # CUDA does not outlive a fork


class Job(NamedTuple):
    """``function(*arguments)``, under a name; all of it can be pickled."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Outcome(NamedTuple):
    """What became of a job: the value it returned, or an error."""

    name: str
    seconds: float
    value: Any
    error: str | None


class Pool:
    """``count`` processes, whose output goes to ``worker-<n>.log`` in the folder ``logs``.

    A process whose job fails, or that dies, is replaced: after an error of the GPU it would be of no use. However the
    parent ends, they end with it, in the middle of a job too.
    """

    def __init__(self, count: int, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.workers = [_Worker(logs / f"worker-{number}.log") for number in range(count)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.connection.close()  # of which all hear at once, so that they end together
        for worker in self.workers:
            worker.end()

    def run(self, jobs: Sequence[Job], begin_by: float = math.inf, end_by: float = math.inf) -> Iterator[Outcome]:
        """The jobs' outcomes, as they come.

        Args:
            begin_by, end_by: of `time.monotonic`; after the one no job is begun, and those that are running at the
                other are killed.
        """
        waiting = deque(jobs)
        while True:
            for worker in self.workers:
                if waiting and worker.job is None and time.monotonic() < begin_by:
                    worker.give(waiting.popleft())
            busy = [worker for worker in self.workers if worker.job is not None]
            if not busy:
                break
            left = end_by - time.monotonic()
            ready = wait([worker.connection for worker in busy], None if left == math.inf else max(0.0, left))
            for worker in busy:
                if worker.connection in ready:
                    yield worker.take()
                elif not ready:
                    yield worker.give_up("out of time")
        for job in waiting:
            yield Outcome(job.name, 0.0, None, "not begun: out of time")


class _Worker:
    def __init__(self, log: Path) -> None:
        self.log = log
        self._start()

    def give(self, job: Job) -> None:
        self.job, self.began = job, time.monotonic()
        with suppress(OSError):  # it died idle, which `take` will find
            self.connection.send(job)

    def take(self) -> Outcome:
        try:
            value, error = self.connection.recv()
        except (EOFError, OSError):
            return self.give_up(f"its process died; see {self.log}")
        if error is not None:
            return self.give_up(error)
        return self._outcome(value, None)

    def give_up(self, error: str) -> Outcome:
        self.end()
        outcome = self._outcome(None, error)
        self._start()
        return outcome

    def end(self) -> None:
        self.connection.close()
        if self.job is None:  # it waits for one, and goes when none can come
            self.process.join(timeout=2)
        self.process.kill()
        self.process.join()

    def _start(self) -> None:
        self.job: Job | None = None
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_work, args=(theirs, str(self.log)), daemon=True)
        self.process.start()
        theirs.close()

    def _outcome(self, value: Any, error: str | None) -> Outcome:
        outcome = Outcome(self.job.name, time.monotonic() - self.began, value, error)
        self.job = None
        return outcome


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _work(connection: Connection, log: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    while True:
        try:
            job = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            answer = job.function(*job.arguments), None
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            answer = None, f"{type(error).__name__}: {error}; see {log}"
        connection.send(answer)
