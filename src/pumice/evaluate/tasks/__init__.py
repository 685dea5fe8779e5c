"""Register every benchmark: each file in this folder holds one (see `pumice.evaluate.task`)."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from pumice.errors import check_known
from pumice.evaluate.task import Task, releases


@cache
def registry() -> dict[str, type[Task]]:
    """Return all benchmarks by name, in the order of benchmarks.yaml and then of names."""
    tasks: dict[str, type[Task]] = {}
    for module in pkgutil.iter_modules(__path__):
        for found in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(found, type) and issubclass(found, Task) and "name" in vars(found):
                tasks[found.name] = found
    return {name: tasks[name] for name in [*releases(), *sorted(tasks.keys() - releases().keys())]}


def register(task: type[Task]) -> None:
    """Add a benchmark that lies outside this folder, for this process."""
    registry()[task.name] = task


def get_task(name: str, split: str | None = None) -> Task:
    """Return the benchmark of that name. Raises InputError that lists the names."""
    check_known(name, registry(), f"there is no task {name!r}")
    return registry()[name](split)
