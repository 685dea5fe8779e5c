"""YAML files that are wrong or hostile end in one sentence, at once."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import InputError
from pumice.storage.yaml_file import LARGEST_FILE, read_yaml, set_key
from pumice.train.recipe import load_recipe

resource: Any = pytest.importorskip("resource")  # of POSIX
RECIPE = Path("recipes/finetune.yaml").read_text()


def doubling(levels: int, item: str, line: str) -> str:
    """Return lines of which each names the one before it twice."""
    lines = [f"a0: &a0 {item}"]
    lines += [line.format(n=n, last=f"*a{n - 1}") for n in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "lists that multiply": doubling(60, "[x]", "a{n}: &a{n} [{last}, {last}]"),
    "mappings that multiply": doubling(60, "{x: 1}", "a{n}: &a{n} {{p: {last}, q: {last}}}"),
    "merges that multiply": doubling(60, "{x: 1}", "a{n}: &a{n} {{<<: [{last}, {last}]}}"),
    "many of many": f"a: &a [{'x, ' * 1000}]\nb: [{'*a, ' * 1000}]",
    "a list in itself": "a: &a [*a]",
    "a mapping in itself": "a: &a {b: {c: *a}}",
    "a merge of itself": "a: &a {<<: *a}",
    "a long chain": doubling(400, "[x]", "a{n}: &a{n} [{last}]"),
    "nested lists": "a: " + "[" * 50_000,
    "nested mappings": "a: " + "{a: " * 50_000,
    "nested lists, closed": "a: " + "[" * 50_000 + "]" * 50_000,
    "nested blocks": "\n".join(" " * n + "a:" for n in range(300)),
    "an impossible date": "a: 2025-02-30",
    "an impossible time": "a: 2025-02-03 25:61:00",
    "digits": "a: " + "1" * 5000,
    "fewer digits": "a: " + "1" * 30,
    "hexadecimal digits": "a: 0x" + "f" * 5000,
    "sixties": "a: 1" + ":59" * 3000,
    "a wrong number": "a: !!int x",
    "no number": "a: !!int ''",
    "a wrong float": "a: !!float x",
    "a wrong truth": "a: !!bool perhaps",
    "a wrong date": "a: !!timestamp x",
    "wrong bytes": "a: !!binary é",
    "a Python object": "a: !!python/object/apply:os.system [true]",
    "an unknown tag": "a: !x y",
    "an unhashable key": "? [a]\n: b",
    "a null character": "a: \0",
    "two documents": "a: 1\n---\nb: 2",
    "an unknown anchor": "a: *b",
    "too large": "a: 1\n" + "# \n" * LARGEST_FILE,
    "nothing": "",
    "a list": "[1]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(HOSTILE[name], encoding="utf-8")
    before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 500
    assert time.process_time() - before[0] < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[1] < 100_000


def test_the_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: 1\nb: 2025-02-30\n")
    with pytest.raises(InputError, match=r"r\.yaml, line 2: .*'2025-02-30' cannot be read: day is out of"):
        read_yaml(path)
    with pytest.raises(InputError, match=r"--set a=2025-02-30: the value is not YAML"):
        set_key({}, "a=2025-02-30")


def test_aliases_and_merges_within_bounds_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: &a {x: 1, y: [2, 3]}\nb: {<<: *a, x: 4}\nc: [*a, *a]\nd: 18446744073709551615\n")
    first = {"x": 1, "y": [2, 3]}
    assert read_yaml(path) == {"a": first, "b": {"x": 4, "y": [2, 3]}, "c": [first, first], "d": 2**64 - 1}


def test_recipes_that_extend_each_other_without_end(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    with pytest.raises(InputError, match=r"0\.yaml: more than 50 recipes extend each other; join some"):
        load_recipe(tmp_path / "0.yaml")


@pytest.mark.parametrize("seed", range(3))
def test_any_change_of_a_recipe(tmp_path: Path, seed: int) -> None:
    pieces = ["[", "]", "{", "}", ": ", "- ", "&a ", "*a", "<<: *a", "!!int ", "\n", "  ", "'", "\t", "1e999"]
    pieces += [
        "!!float ",
        "!!timestamp ",
        "2025-99-99",
        "9" * 5000,
        ".nan",
        "~",
        "? ",
        "%",
        "|",
        ">",
        "\x85",
        "é",
    ]
    rng, path, refused = random.Random(seed), tmp_path / "r.yaml", 0
    for _ in range(150):
        text = RECIPE
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.randrange(len(text))
            text = text[:place] + rng.choice(pieces) + text[place + rng.choice((0, 0, 1, 9)) :]
        path.write_text(text, encoding="utf-8")
        try:
            load_recipe(path)
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 30
