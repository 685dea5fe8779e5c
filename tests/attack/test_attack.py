"""The attacks run, find Pumice right, and find what is wrong."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pumice.engine import engine as engine_module
from pumice.model import cache
from pumice.tokens import Tokenizer


@pytest.fixture(scope="module")
def attacks(load_script: Callable[[Path], ModuleType]) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:  # the scripts put further folders there
        patch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
        yield load_script(Path(__file__).with_name("run.py"))


@pytest.mark.parametrize("name", ["schedules", "requests", "tokens", "files"])
def test_a_try_of_each(attacks: Any, name: str) -> None:
    assert attacks.run(name, 28, 0, 0) == (1, [])


def test_what_is_wrong_is_found(
    attacks: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def attack(_: Path) -> Any:
        while True:
            yield lambda draw: "a fault" if draw.random() < 0.5 else ""

    monkeypatch.setitem(attacks.ATTACKS, "coin", attack)
    tries, wrong = attacks.run("coin", 3, 0, 0.01)
    assert 0 < len(wrong) < tries
    first = int(wrong[0].partition(":")[0].split()[1])
    assert random.Random(f"3/coin/{first}").random() < 0.5
    assert attacks.run("coin", 3, first, 0) == (1, wrong[:1])
    monkeypatch.setattr(sys, "argv", f"run --only coin --seed 3 --first {first} --minutes 0".split())
    assert attacks.main() == 1
    assert f"| coin | 1 | 0 | 1 |\ncoin {first}: a fault" in capsys.readouterr().out


def test_an_answer_that_is_not_the_naive_one_is_found(attacks: Any) -> None:
    schedules = attacks.engine_schedules
    world = schedules.make_world(None, [])
    wrong = schedules.World(world.model, world.prompts, [[*answer[:-1], 1] for answer in world.answers])
    problems = [schedules.schedule([wrong], random.Random(number)) for number in range(3)]
    assert all("expected" in problem for problem in problems)
    assert engine_module.BLOCK == cache.BLOCK  # the schedules' own sizes of blocks end with them
    assert not any(schedules.schedule([world], random.Random(number)) for number in range(3))


def test_a_control_token_of_a_text_is_found(attacks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = attacks.control_tokens
    processors = tokens.worlds()
    assert not any(tokens._conversation(processors, random.Random(number)) for number in range(20))

    def careless(tokenizer: Tokenizer, text: str) -> Any:
        """Tokenize as the library does, unless it is told that special tokens are text."""
        return tokenizer.backend.encode(text, add_special_tokens=False)

    monkeypatch.setattr(Tokenizer, "_encode", careless)
    assert sum(bool(tokens._conversation(processors, random.Random(number))) for number in range(20)) > 5
