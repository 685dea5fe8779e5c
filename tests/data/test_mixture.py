"""Epochs: determinism, weights, and rows grouped by picture."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.data.mixture import Mixture
from pumice.data.rows import Rows
from pumice.errors import InputError


def make(path: Path, images: list[str | list[str] | None]) -> Rows:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    lines = [json.dumps({"id": str(n), "image": i, "conversations": turns}) for n, i in enumerate(images)]
    path.write_text("\n".join(lines))
    return Rows(path)


def shown(order: np.ndarray, source: int) -> Counter[int]:
    return Counter(order[order[:, 0] == source, 1].tolist())


def test_order_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    sources = [(make(tmp_path / "a", ["x"] * 30), 1.5), (make(tmp_path / "b", [None] * 20), 0.5)]
    one, same, other = Mixture(sources, seed=3), Mixture(sources, seed=3), Mixture(sources, seed=4)
    later = same.order(5)
    assert (one.order(0) == same.order(0)).all(), "asking for epoch 5 first changes nothing"
    assert (one.order(5) == later).all()
    assert not (one.order(0) == one.order(1)).all()
    assert not (one.order(0) == other.order(0)).all()
    assert one.order(0).dtype == np.int64 and one.order(0).shape == (55, 2) == (len(one), 2)
    assert list(one.groups(2)) == list(same.groups(2)) != list(one.groups(3))


def test_order_is_pinned(tmp_path: Path) -> None:
    """A run that is resumed by a later version must see the same rows."""
    mixture = Mixture([(make(tmp_path / "a", ["x"] * 4), 1), (make(tmp_path / "b", ["x"] * 3), 1.34)], seed=7)
    assert mixture.order(1).tolist() == [[1, 1], [0, 0], [0, 2], [1, 2], [1, 2], [0, 1], [0, 3], [1, 0]]


def test_weights(tmp_path: Path) -> None:
    rows = [make(tmp_path / n, [None] * 100) for n in "abc"]
    mixture = Mixture([(rows[0], 1), (rows[1], 0.5), (rows[2], 2.3)])
    order = mixture.order(0)
    assert len(order) == len(mixture) == 380
    assert shown(order, 0) == Counter(range(100))
    assert len(shown(order, 1)) == 50 and max(shown(order, 1).values()) == 1
    assert Counter(shown(order, 2).values()) == {2: 70, 3: 30}
    assert shown(order, 1) != shown(mixture.order(1), 1)
    covered = set().union(*(shown(mixture.order(e), 1) for e in range(12)))
    assert len(covered) > 95, "the half is another one each epoch"
    first = order[:, 0][:190]
    assert 60 < (first == 2).sum() < 170 and (first == 1).sum() > 5, "sources are shuffled together"


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    rows = make(tmp_path / "captions.jsonl", [None] * 3)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="the weight of 'captions' is"):
            Mixture([(rows, weight)])
    for sources in ([], [(rows, 0.01)]):
        with pytest.raises(InputError, match="shows no row"):
            Mixture(sources)


def test_groups_share_pictures(tmp_path: Path) -> None:
    a = make(tmp_path / "a", ["x", "y", "x", None, ["x", "y"], None, ["x"]])
    b = make(tmp_path / "b", ["y", ["x", "y"], ["y", "x"]])
    groups = Mixture([(a, 1), (b, 1)]).groups(0)
    assert sorted(sorted(g) for g in groups) == [
        [(0, 0), (0, 2), (0, 6)],
        [(0, 1), (1, 0)],
        [(0, 3)],
        [(0, 4), (1, 1)],
        [(0, 5)],
        [(1, 2)],
    ]


@settings(max_examples=40, deadline=None)
@given(
    images=st.lists(st.sampled_from([None, "x", "y", "z"]), min_size=1, max_size=12),
    weight=st.floats(1, 3.5),
    epoch=st.integers(0, 3),
)
def test_groups_hold_the_epoch(
    tmp_path_factory: pytest.TempPathFactory, images: list[str | None], weight: float, epoch: int
) -> None:
    rows = make(tmp_path_factory.getbasetemp() / "rows", images)
    mixture = Mixture([(rows, weight)], seed=1)
    groups = mixture.groups(epoch)
    assert Counter(r for g in groups for r in g) == Counter(map(tuple, mixture.order(epoch).tolist()))
    for group in groups:
        assert len({images[i] for _, i in group}) == 1
        assert len(set(group)) == len(group), "a repeated row goes to another group"
        assert len(group) == 1 or images[group[0][1]] is not None
    keys = [images[g[0][1]] for g in groups]
    max_count = max(Counter(r for g in groups for r in g).values())
    assert all(keys.count(k) <= max_count for k in set(keys) if k is not None)
