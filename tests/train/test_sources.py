"""A run on rows of any format is the run on LLaVA JSON, and resumes bit for bit wherever it was killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pumice.data import arrays
from pumice.data.convert import convert
from pumice.data.mixture import Mixture
from pumice.data.rows import ImageFinder, Rows
from pumice.errors import InputError
from pumice.train import run
from pumice.train.batches import Batches
from pumice.train.recipe import load_recipe
from pumice.train.report import read_metrics
from pumice.train.setup import prepare

MakeRecipe = Callable[..., Path]


@pytest.fixture
def many(rows: Path, tmp_path: Path) -> Path:
    """Twenty-four rows about the four pictures, in an order without neighbours of one picture."""
    lines = (rows / "rows.jsonl").read_text().splitlines()
    values = [json.loads(lines[(5 * n) % 8]) | {"id": f"r{n}"} for n in range(24)]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def as_messages(source: Path, out: Path) -> Path:
    lines = []
    for line in source.read_text().splitlines():
        value = json.loads(line)
        texts = [turn["value"] for turn in value.pop("conversations")]
        roles = zip(("user", "assistant"), texts, strict=True)
        messages = [{"role": role, "content": text} for role, text in roles]
        lines.append(json.dumps({"id": value["id"], "images": [value["image"]], "messages": messages}) + "\n")
    out.write_text("".join(lines))
    return out


@pytest.fixture
def sources(many: Path, rows: Path, tmp_path: Path) -> dict[str, Path]:
    """The same rows as LLaVA JSON Lines, messages, parquet in three files, and WebDataset in three."""
    pytest.importorskip("pyarrow")
    for form in ("parquet", "webdataset"):
        convert(Rows(many), tmp_path / form, form, ImageFinder(rows), rows_per_file=9)
    return {
        "llava": many,
        "messages": as_messages(many, tmp_path / "messages.jsonl"),
        "parquet": tmp_path / "parquet" / "*.parquet",
        "webdataset": tmp_path / "webdataset" / "*.tar",
    }


@pytest.fixture
def losses(make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., list[float]]:
    def losses(name: str, **changes: Any) -> list[float]:
        run(make_recipe(name, epochs=2, **changes))
        return [e["loss"] for e in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in e]

    return losses


def test_every_format_gives_the_losses_of_llava_json(
    losses: Callable[..., list[float]], sources: dict[str, Path]
) -> None:
    every = {
        name: losses(name, data=[{"rows": str(path)}], shuffle_block=2, order=order)
        for order in ("pack", "length_grouped")
        for name, path in {f"{name}-{order}": path for name, path in sources.items()}.items()
    }
    for name, values in every.items():
        expected = every[f"llava-{name.partition('-')[2]}"]
        assert len(values) >= 4
        assert values == pytest.approx(expected, abs=1e-6), name  # measured: equal
    assert every["llava-pack"] != every["llava-length_grouped"]


def test_the_order_keeps_blocks_together_and_depends_on_nothing_else(many: Path) -> None:
    rows = [Rows(many, "a"), Rows(many, "b")]
    mixture = Mixture([(rows[0], 1), (rows[1], 2)], seed=5, shuffle_block=3)
    order = mixture.order(0)
    assert len(order) == 72 and (order == Mixture([(rows[0], 1), (rows[1], 2)], 5, 3).order(0)).all()
    assert not (order == mixture.order(1)).all()
    # Eight blocks of three rows are shuffled together: each window holds whole blocks.
    for window in mixture.windows(0):
        blocks, counts = np.unique(window[:, 0] * 100 + window[:, 1] // 3, return_counts=True)
        assert len(blocks) <= 8 and set(counts.tolist()) <= {3, 6}
    groups = mixture.groups(0)
    assert sorted(row for group in groups for row in group) == sorted(map(tuple, order.tolist()))
    # It is pinned: a run that is resumed by a later version must see the same rows.
    small = Mixture([(rows[0], 0.25)], seed=1, shuffle_block=3).order(0)
    assert small[:, 1].tolist() == [1, 0, 2, 15, 16, 17]


def test_each_step_has_its_rows_with_any_number_of_processes(
    make_recipe: MakeRecipe, sources: dict[str, Path]
) -> None:
    recipe = load_recipe(make_recipe(data=[{"rows": str(sources["parquet"])}], batch=2, epochs=1))
    processor = prepare(recipe).processor
    batches = [Batches(recipe, processor, processes) for processes in (1, 2, 3)]

    def targets(batch: Any) -> list[tuple[Any, ...]]:
        return sorted(tuple(tree.input_ids.tolist()) for pack, _ in batch.packs for tree in pack.trees)

    assert batches[0].steps == batches[1].steps == batches[2].steps > 1
    for step in range(batches[0].steps):
        one, two, three = (b[step] for b in batches)
        assert targets(one) == targets(two) == targets(three)
        assert len(two.packs) >= 2  # smaller packs, so that no process is without one


def test_what_is_known_of_rows_is_kept_until_they_change(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "SMALLEST_KEPT", 0)
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    first = Rows(many).contents
    read: list[int] = []
    monkeypatch.setattr(Rows, "_summaries", lambda self: read.append(1) or iter(()))
    assert Rows(many).contents.digest == first.digest and not read
    for path in (tmp_path / "cache" / "data").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-50])  # damaged: it is read anew
    assert Rows(many).contents.digest != first.digest and read == [1]
    many.write_text(many.read_text() + "\n")
    assert Rows(many).contents.digest != first.digest and read == [1, 1]


def test_rows_of_a_folder_that_changed_do_not_go_on(
    make_recipe: MakeRecipe, sources: dict[str, Path], many: Path, rows: Path, tmp_path: Path
) -> None:
    data = [{"rows": str(sources["parquet"])}]
    run(make_recipe(data=data, max_steps=3))
    with pytest.raises(InputError, match="shuffle_block: 1000, the recipe now says 2"):
        run(make_recipe(data=data, max_steps=3, shuffle_block=2))
    first = sorted(sources["parquet"].parent.glob("*.parquet"))[0]
    many.write_text(many.read_text().replace("left", "LEFT"))
    convert(Rows(many), tmp_path / "changed", "parquet", ImageFinder(rows), rows_per_file=9)
    first.write_bytes((tmp_path / "changed" / first.name).read_bytes())
    with pytest.raises(InputError, match=r"contents of .*parquet.*another output folder"):
        run(make_recipe(data=data, max_steps=3))


# A run that kills itself after another checkpoint, a number of looks at the folder later. Both happen in one
# process, so that a busy machine slows both.
KILLED = """
import os, pathlib, signal, sys, threading
from pumice.train import run
def kill(folder, seen, looks):
    while looks > 0:
        looks -= any(int(path.name[5:]) > seen for path in folder.glob("step-*"))
    os.kill(os.getpid(), signal.SIGKILL)
arguments = pathlib.Path(sys.argv[2]), int(sys.argv[3]), 1 + int(sys.argv[4])
threading.Thread(target=kill, args=arguments, daemon=True).start()
run(sys.argv[1])
"""


def test_a_streamed_run_that_is_killed_ends_as_if_it_were_not(
    make_recipe: MakeRecipe, sources: dict[str, Path], tmp_path: Path
) -> None:
    """kill -9, ten times, at any moment of a run with four sources."""
    data = [{"rows": str(path), "weight": 0.5 + n / 2} for n, path in enumerate(sources.values())]
    changes = {"data": data, "shuffle_block": 4, "epochs": 1, "save_every": 1, "workers": 3, "batch": 2}
    whole = make_recipe("whole", **changes)
    killed = make_recipe("killed", **changes)
    weights = load_file(run(whole) / "model.safetensors")
    steps = len([e for e in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "loss" in e])
    assert steps > 12
    choose, folder, seen = random.Random(3), tmp_path / "killed" / "checkpoints", 0
    for _ in range(10):
        arguments = [str(killed), str(folder), str(seen), str(choose.randrange(2000))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", KILLED, *arguments], capture_output=True, env=environment, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        seen = max(int(p.name[5:]) for p in folder.glob("step-*"))
        assert seen < steps, "the run ended before it was killed ten times"
    run(killed)
    resumed = load_file(tmp_path / "killed" / "model" / "model.safetensors")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
