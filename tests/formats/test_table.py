"""No cell of the table of formats may get worse than it was when it was recorded.

python benchmarks/formats.py --json > tests/golden/formats.json
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GOLDEN: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "golden" / "formats.json").read_text(encoding="utf-8")
)
CELLS = [(name, to) for name, row in GOLDEN.items() for to in row]


def worse(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """What got worse, in words."""
    rows = []
    if now["refused"] is not None and then["refused"] is None:
        rows.append(f"it is refused now: {now['refused']}")
    for key in ("greedy", "bytes"):
        if then[key] and now[key] is not True and not (key == "greedy" and now["skipped"]):
            rows.append(f"{key} was equal and is {now[key]}")
    # Another processor sums up in another order; three times as much is no accident.
    if (
        None not in (now["difference"], then["difference"])
        and now["difference"] > 3 * then["difference"] + 1e-5
    ):
        rows.append(f"logits differ by {now['difference']:.1e}, it was {then['difference']:.1e}")
    return rows


@pytest.mark.parametrize(("name", "to"), CELLS)
def test_no_cell_is_worse(formats: ModuleType, tmp_path: Path, name: str, to: str) -> None:
    now = vars(formats.measure(name, to, tmp_path))
    assert worse(now, GOLDEN[name][to]) == []


def test_every_architecture_is_recorded(models: ModuleType) -> None:
    assert list(GOLDEN) == list(models.ARCHITECTURES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"difference": 2e-5}, []),
        ({"difference": 1e-4}, ["logits differ by 1.0e-04, it was 1.0e-05"]),
        ({"greedy": False}, ["greedy was equal and is False"]),
        ({"greedy": None, "difference": None, "skipped": "peft"}, []),
        ({"bytes": False}, ["bytes was equal and is False"]),
        ({"refused": "why"}, ["it is refused now: why"]),
    ],
)
def test_what_counts_as_worse(change: dict[str, Any], words: list[str]) -> None:
    then = {"refused": None, "difference": 1e-5, "greedy": True, "bytes": True, "skipped": None}
    assert worse(then | change, then) == words
