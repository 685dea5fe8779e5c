"""Lets the engine's tests import `small` and `kit`; a model, and engines of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pumice.engine.engine import Engine
from pumice.model.llava import Llava

if TYPE_CHECKING:
    from kit import Kit

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def kit() -> Kit:
    from kit import Kit  # its right answers take seconds

    return Kit()


@pytest.fixture(scope="session")
def model() -> Llava:
    from small import small_model

    return small_model()


@pytest.fixture
def make_engine(model: Llava) -> Callable[..., Engine]:
    return lambda **options: Engine(model, **options)
