"""Workers: processes that perform the runs of a sweep, one at a time each."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection, resource_tracker
from typing import Any

from experiments.performance import Failure, Job, perform

Watch = Callable[[int, int | None], None]
"""Told of a job's index and of how many of its requests are over; None when the job is."""


def perform_all(jobs: Sequence[Job], processes: int, watch: Watch) -> Iterator[tuple[int, Failure | None]]:
    """Perform all jobs; index and outcome of each as it ends, in any order."""
    if min(processes, len(jobs)) > 1:
        yield from _in_processes(jobs, min(processes, len(jobs)), watch)
        return
    for index, job in enumerate(jobs):
        yield index, perform(job, partial(watch, index))


def _in_processes(jobs: Sequence[Job], processes: int, watch: Watch) -> Iterator[tuple[int, Failure | None]]:
    waiting = list(range(len(jobs)))[::-1]
    context = _context(jobs)
    workers: list[_Worker] = []
    try:
        for _ in range(processes):
            workers.append(_Worker(context))
        while True:
            for worker in workers:
                if worker.job is None and waiting:
                    worker.begin(waiting.pop(), jobs)
            busy = {worker.pipe: worker for worker in workers if worker.job is not None}
            if not busy:
                return
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]
                index = worker.job
                assert index is not None
                try:
                    message = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    workers[workers.index(worker)] = _Worker(context)
                    yield index, worker.obituary()
                    continue
                if isinstance(message, int):
                    watch(index, message)
                else:
                    worker.job = None
                    yield index, message[0]
    finally:
        for worker in workers:
            worker.stop()


def _context(jobs: Sequence[Job]) -> Any:
    """How processes start: forked, where that is possible, from one that has imported what all of them need.

    So torch, which a probe needs, is imported once in a sweep.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    probing = any(job.settings["probe"] is not False for job in jobs)
    context.set_forkserver_preload(
        ["experiments.build", "experiments.recording", *(["attention.comparison"] if probing else [])]
    )
    return context


class _Worker:
    """A process and the pipe to it.

    It is not forked from this process, and so holds no end of any other pipe: however its parent dies, it finds
    its own pipe closed, and goes too.
    """

    def __init__(self, context: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _deaf_to_interrupts():
            self.process.start()
        theirs.close()
        self.job: int | None = None

    def begin(self, index: int, jobs: Sequence[Job]) -> None:
        """Hand it a job."""
        self.job = index
        with suppress(ConnectionError):  # it has died; that shows when its answer is read
            self.pipe.send(jobs[index])

    def obituary(self) -> Failure:
        """How it died."""
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        why = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        return Failure(f"its process {how}{why}", False, "")

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.terminate()
        self.process.join()
        self.pipe.close()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that start in here never hear of Ctrl-C, which a terminal sends to all; their parent decides.

    A mask is inherited where a handler would be lost, and this process is told at the end of what came meanwhile.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which, to start, lifts such a mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Any) -> None:
    """What a worker does: jobs from the pipe, numbers of finished requests and outcomes into it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    try:
        while True:
            job = pipe.recv()
            pipe.send((perform(job, pipe.send),))
    except (EOFError, ConnectionError):
        return
