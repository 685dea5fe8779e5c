"""Work on many items in several processes, and find the item that crashes the process it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_parts(
    work: Callable[[Sequence[T]], list[R]],
    parts: Sequence[Sequence[T]],
    workers: int,
    crashed: Callable[[T], R],
) -> Iterator[list[R]]:
    """Yield work(part) for each part in order, from `workers` processes; 0 works in this one.

    work: returns one result for each item; it is pickled once for each process. crashed: gives the result of
    an item whose process ended in the middle, as a decoder ends it on a damaged image.
    """
    if not workers:
        yield from map(work, parts)
        return
    done = 0
    while done < len(parts):
        try:
            with _pool(workers, work) as pool:
                for results in pool.map(_work, parts[done:]):
                    yield results
                    done += 1
        except BrokenProcessPool:
            # All processes of a pool end with the one that crashed. Which item it was shows one by one.
            yield [_alone(work, item, crashed) for item in parts[done]]
            done += 1


def _alone(work: Callable[[Sequence[T]], list[R]], item: T, crashed: Callable[[T], R]) -> R:
    try:
        with _pool(1, work) as pool:
            results: list[R] = pool.submit(_work, [item]).result()
            return results[0]
    except BrokenProcessPool:
        return crashed(item)


def _pool(workers: int, work: Callable[[Sequence[T]], list[R]]) -> ProcessPoolExecutor:
    # Spawned, not forked: a fork would copy other libraries' threads while they hold locks.
    return ProcessPoolExecutor(workers, get_context("spawn"), _start, (work,))


_of_process: list[Callable[[Any], Any]] = []  # what this process does with each part


def _start(work: Callable[[Any], Any]) -> None:
    _of_process[:] = [work]


def _work(part: Any) -> Any:
    return _of_process[0](part)
