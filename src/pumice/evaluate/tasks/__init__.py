"""Register every benchmark: each file in this folder holds one (see `pumice.evaluate.task`)."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from pumice.errors import InputError
from pumice.evaluate.task import Task


@cache
def registry() -> dict[str, type[Task]]:
    """Return all benchmarks by name, the twelve of LLaVA-1.5 first."""
    tasks: list[type[Task]] = []
    for module in pkgutil.iter_modules(__path__):
        contents = vars(importlib.import_module(f"{__name__}.{module.name}"))
        tasks += [
            c
            for c in contents.values()
            if isinstance(c, type)
            and issubclass(c, Task)
            and "name" in vars(c)
            and c.__module__.endswith(f".{module.name}")
        ]
    return {task.name: task for task in sorted(tasks, key=lambda task: (task.rank, task.name))}


def get_task(name: str, split: str | None = None) -> Task:
    """Return the benchmark of that name. Raises InputError that lists the names."""
    if name not in registry():
        raise InputError(f"there is no task {name!r}; use one of {', '.join(registry())}")
    return registry()[name](split)
