"""No cell of the tables of formats may get worse than it was when it was recorded.

python benchmarks/formats.py --json > tests/golden/formats.json
python benchmarks/formats.py --types --json > tests/golden/gguf_types.json
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Table = dict[str, dict[str, dict[str, Any]]]


def recorded(file: str) -> Table:
    table: Table = json.loads((Path(__file__).parents[1] / "golden" / file).read_text(encoding="utf-8"))
    return table


GOLDEN, TYPES = recorded("formats.json"), recorded("gguf_types.json")
CELLS = [(name, to) for name, row in GOLDEN.items() for to in row]
FLOATS = ("f32", "f16", "bf16")  # which `gguf/test_pair.py` reads back
WRITTEN = [
    (name, kind)
    for name, row in TYPES.items()
    for kind, cell in row.items()
    if cell["refused"] is None and kind not in FLOATS
]
HAS_LLAMA = importlib.util.find_spec("llama_cpp") is not None


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


def test_every_architecture_is_recorded(models: ModuleType, formats: ModuleType) -> None:
    assert list(GOLDEN) == list(TYPES) == list(models.ARCHITECTURES)
    assert all(list(row) == formats.GGUF_TYPES for row in TYPES.values())


@pytest.mark.parametrize(("name", "kind"), WRITTEN)
def test_no_type_of_gguf_is_worse(formats: ModuleType, tmp_path: Path, name: str, kind: str) -> None:
    """What is read back, beside the model; and the few bits that Pumice answers from, beside the floats."""
    if kind in formats.gguf_write.BY_LLAMA_CPP and not HAS_LLAMA:
        pytest.skip("llama-cpp-python is not installed")
    now, then = vars(formats.measure_type(name, kind, tmp_path, run_others=False)), TYPES[name][kind]
    for key in ("read_back", "answering"):
        assert now[key] <= 3 * then[key] + 1e-5, key  # as in `worse`


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
