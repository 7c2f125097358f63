"""Rows in parallel: a small pool of threads for kernels that release the GIL.

As many threads as torch has (``torch.set_num_threads``), the caller's own among them, and only for work that is worth
waking one. A process made by fork starts without threads and makes its own. Rows are independent, so that answers do
not depend on the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch

WORTH = 20_000  # items a thread: below, waking it (some 50 us) costs as much as it saves

Task = Callable[[int, int], Any]


class _Call:
    """A part of somebody's work, run by whichever thread takes it."""

    def __init__(self, task: Task, begin: int, end: int) -> None:
        self.task, self.begin, self.end = task, begin, end
        self.done = threading.Event()
        self.answer: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.answer = self.task(self.begin, self.end)
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()

    def result(self) -> Any:
        self.done.wait()
        if self.error is not None:
            raise self.error
        return self.answer


class _Pool:
    def __init__(self) -> None:
        self.calls: SimpleQueue[_Call] = SimpleQueue()
        self.lock = threading.Lock()
        self.size = 0

    def _work(self) -> None:
        while True:
            self.calls.get().run()

    def submit(self, calls: list[_Call]) -> None:
        with self.lock:
            for _ in range(self.size, len(calls)):
                threading.Thread(target=self._work, name="smoothops", daemon=True).start()
                self.size += 1
        for call in calls:
            self.calls.put(call)


_pool = _Pool()


def _forget() -> None:
    """After a fork the threads are gone, and the lock may be held by one of them."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def over_rows(task: Task, rows: int, items: int) -> list[Any]:
    """``task(begin, end)`` over parts of range(rows), a part a thread; ``items`` is the amount of work in all."""
    parts = max(min(torch.get_num_threads(), rows, items // WORTH), 1)
    if parts == 1:
        return [task(0, rows)]
    edges = [rows * p // parts for p in range(parts + 1)]
    others = [_Call(task, edges[p], edges[p + 1]) for p in range(1, parts)]
    _pool.submit(others)
    own = _Call(task, 0, edges[1])
    own.run()  # its error, too, must wait for the others: they write into the caller's memory
    for call in others:
        call.done.wait()
    return [call.result() for call in (own, *others)]
