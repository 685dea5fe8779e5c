"""One file per benchmark; being here is all the registration there is (see `pumice.evaluate.task`)."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from pumice.errors import InputError
from pumice.evaluate.task import Task


@cache
def registry() -> dict[str, type[Task]]:
    """All benchmarks by name, the twelve of LLaVA-1.5 first."""
    found: list[type[Task]] = []
    for module in pkgutil.iter_modules(__path__):
        contents = vars(importlib.import_module(f"{__name__}.{module.name}"))
        found += [
            c
            for c in contents.values()
            if isinstance(c, type)
            and issubclass(c, Task)
            and "name" in vars(c)
            and c.__module__.endswith(f".{module.name}")
        ]
    return {task.name: task for task in sorted(found, key=lambda task: (task.rank, task.name))}


def get_task(name: str, split: str | None = None) -> Task:
    """The benchmark of that name. Raises InputError that lists the names."""
    if name not in registry():
        raise InputError(f"there is no task {name!r}; use one of {', '.join(registry())}")
    return registry()[name](split)
