"""What an older version wrote still opens and goes on: models, runs, journals, answers, features."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stored import ENDS, EXACT, FILES, MODEL, Teacher, Watch, inside, read, run_pumice
from torch import Tensor

import pumice

# --- models


def test_a_model_answers_the_same(work: Path) -> None:
    then = read(ENDS / "answers.json")
    assistant = pumice.load("model", device="cpu", quantize=None)
    answers = [assistant.ask(picture, question, max_new_tokens=4) for picture, question in then["rows"]]
    assert answers == then["answers"]
    logits = assistant.logits(*then["rows"][0])[-1]
    # Measured between AVX2 and no vector code: 6e-6 of values up to 4.4 (stored with five places).
    torch.testing.assert_close(logits, torch.tensor(then["logits"]), rtol=0, atol=1e-4)


def test_a_trained_model_answers_the_same(work: Path) -> None:
    then = read(ENDS / "answers.json")
    assistant = pumice.load(ENDS / "run" / "model", device="cpu", quantize=None)
    for row, logits in zip(then["rows"], read(ENDS / "trained.json"), strict=False):
        torch.testing.assert_close(assistant.logits(*row)[-1], torch.tensor(logits), rtol=0, atol=1e-4)


# --- a run of training


@dataclass(frozen=True)
class Resumed:
    folder: Path  # of the run
    watch: Watch


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resumed]:
    """`pumice train` again where a run was killed in its fifth step of six, two after a checkpoint."""
    work = tmp_path_factory.mktemp("resumed") / "work"
    shutil.copytree(FILES, work)
    with inside(work), Watch().watching() as watch, pytest.MonkeyPatch.context() as patch:
        # A picture of the loss would take a second. Another test may have imported the inner module already.
        patch.setitem(sys.modules, "matplotlib.figure", None)
        run_pumice("train", "recipe.yaml")
    yield Resumed(work / "run", watch)


def digests(tensors: Any) -> Counter[tuple[Any, ...]]:
    return Counter((tuple(t.shape), t.contiguous().numpy().tobytes()) for t in tensors if t.dim())


def test_a_run_goes_on_from_its_state(resumed: Resumed) -> None:
    """Weights, the optimiser's moments and the random generator, bit for bit."""
    then = FILES / "run" / "checkpoints" / "step-000003"
    assert resumed.watch.rng is not None
    assert torch.equal(resumed.watch.rng, load_file(then / "rng-00000.safetensors")["cpu"])
    assert digests(resumed.watch.tensors) == digests(load_file(then / "tensors" / "all.safetensors").values())
    assert {float(tensor) for tensor in resumed.watch.tensors if not tensor.dim()} == {3.0}  # steps


def test_a_run_goes_on_with_its_rows(resumed: Resumed) -> None:
    assert resumed.watch.steps == read(ENDS / "steps.json")[3:]


def test_a_run_ends_as_it_would_have(resumed: Resumed) -> None:
    now, then = (read(folder / "metrics.jsonl") for folder in (resumed.folder, ENDS / "run"))
    for event in (*now, *then):
        event.pop("seconds", None)
        event.pop("peak_share", None)
    assert [list(event) for event in now] == [list(event) for event in then]
    for event, before in zip(now, then, strict=True):
        for key, value in event.items():
            # Measured between AVX2 and no vector code: losses 8e-7, norms of gradients 5e-7.
            close = 1e-5 if key.endswith("loss") else 1e-4 if "norm" in key else 0
            assert value == pytest.approx(before[key], abs=close, rel=0), (event, before)
    end, before_end = (folder / "checkpoints" / "step-000006" for folder in (resumed.folder, ENDS / "run"))
    assert read(end / "state.json") == read(before_end / "state.json")
    rng, rng_then = (load_file(folder / "rng-00000.safetensors") for folder in (end, before_end))
    assert torch.equal(rng["cpu"], rng_then["cpu"])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def test_what_is_written_has_the_same_names(resumed: Resumed) -> None:
    """Files, keys and tensors of a new checkpoint and of a new model's folder."""
    old, new = (run / "checkpoints" for run in (FILES / "run", resumed.folder))
    old, new = old / "step-000003", new / "step-000006"
    assert names(new) == names(old)
    assert list(read(new / "manifest.json")) == list(read(old / "manifest.json"))
    old_tensors, new_tensors = (load_file(step / "tensors" / "all.safetensors") for step in (old, new))
    assert shapes(new_tensors) == shapes(old_tensors)
    old, new = ENDS / "run" / "model", resumed.folder / "model"
    assert names(new) == names(old)
    config = read(new / "config.json")
    later = (config.pop("trained_pictures"), config["image"].pop("several"))  # fields that came later
    assert later == (None, "tiles")
    assert config == read(old / "config.json")
    assert (new / "tokenizer.json").read_bytes() == (old / "tokenizer.json").read_bytes()
    assert keys(read(new / "provenance.json")) == keys(read(old / "provenance.json"))
    old_tensors, new_tensors = (load_file(model / "model.safetensors") for model in (old, new))
    assert shapes(new_tensors) == shapes(old_tensors)


def keys(value: Any) -> Any:
    """A JSON value without what stands at its leaves."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    return [keys(inner) for inner in value] if isinstance(value, list) else None


def test_features_are_read_and_not_computed_again(resumed: Resumed) -> None:
    assert resumed.watch.looks == 0
    for name in ("features.bin", "keys.txt", "cache.json"):
        now = resumed.folder.parent / "features" / name
        assert now.read_bytes() == (FILES / "features" / name).read_bytes()


def test_without_features_the_tower_looks(work: Path) -> None:
    """So that the test above can fail."""
    with Watch().watching() as watch:
        run_pumice("ask", "pictures/0.png", "Who?", *MODEL, *EXACT, "--max-new-tokens", "1")
    assert watch.looks == 1


# --- answers

STOOD = "what stood here"


def alter_first(path: Path) -> None:
    """Another first answer than the model gives: where it stays, the question was not asked again."""
    first, _, remaining = path.read_text(encoding="utf-8").partition("\n")
    line = json.dumps({**json.loads(first), "answer": STOOD}, ensure_ascii=False)
    path.write_text(f"{line}\n{remaining}", encoding="utf-8")


def expected(name: str) -> list[Any]:
    rows: list[Any] = read(ENDS / name)
    rows[0]["answer"] = STOOD
    return rows


def test_a_batch_goes_on(work: Path) -> None:
    alter_first(work / "out.jsonl.partial")
    limits = ("--max-new-tokens", "4")
    result = run_pumice("ask", "--batch", "questions.jsonl", "--out", "out.jsonl", *MODEL, *EXACT, *limits)
    assert "2 of 6" in result.stderr
    assert read(work / "out.jsonl") == expected("out.jsonl")
    assert not (work / "out.jsonl.partial").exists()


def test_ask_many_goes_on(work: Path) -> None:
    alter_first(work / "asked.jsonl")
    rows = read(ENDS / "answers.json")["rows"]
    assistant = pumice.load("model", device="cpu", quantize=None)
    answers = assistant.ask_many([tuple(row) for row in rows], out="asked.jsonl", max_new_tokens=4)
    assert read(work / "asked.jsonl") == expected("asked.jsonl")
    assert answers == [row["answer"] for row in expected("asked.jsonl")]


def evaluate(predictions: Path, *more: str) -> Any:
    result = run_pumice(
        "eval", "own", "--data", "own", "--predictions", str(predictions), "--json", "-", *more
    )
    return json.loads(result.stdout)


def test_predictions_go_on(work: Path) -> None:
    alter_first(work / "predictions.jsonl")
    evaluate(Path("predictions.jsonl"), *MODEL, "--max-new-tokens", "4")
    assert read(work / "predictions.jsonl") == expected("predictions.jsonl")


@pytest.mark.parametrize("path", [ENDS / "predictions.jsonl", Path("own", "llava.jsonl")])
def test_predictions_are_scored_again(work: Path, path: Path) -> None:
    """Every answer was right, ours and in a file of LLaVA's form."""
    result = evaluate(path)
    assert (result["metrics"], result["answered"], result["partial"]) == ({"score": 100.0}, 6, False)


# --- a teacher's rows


def test_a_generation_goes_on(work: Path) -> None:
    """Nothing that has a reply is sent again, by a kind of the user's own; then nothing at all."""
    journal = work / "generated" / "journal.jsonl"
    before = journal.read_bytes()
    with Teacher() as teacher:
        run_pumice(*teacher.command())
        # The reply about the horse was torn off: the model may have been asked, but what it said is lost.
        assert [text.split()[1] for text in teacher.asked] == ["horse", "cow"]
        for name in ("rows.jsonl", "rejected.jsonl"):
            assert (work / "generated" / name).read_bytes() == (ENDS / "generated" / name).read_bytes()
        assert journal.read_bytes().startswith(before)
        run_pumice(*teacher.command())
        assert len(teacher.asked) == 2
