"""Pumice as a model of lmms-eval; most tests run where that is installed (`pip install lmms-eval`)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pumice.errors import InputError

DOCS = [{"seed": seed} for seed in range(3)]


def visual(doc: dict[str, int]) -> list[Image.Image]:
    noise = np.random.default_rng(doc["seed"]).integers(0, 256, (30, 40, 3), np.uint8)
    return [Image.fromarray(noise)]  # the random model sees all plain colours alike


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from lmms_eval.models import get_model

    model = get_model("pumice").create_from_arg_string(
        f"pretrained={tiny_folder},quantize=none", {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    )
    model.task_dict = {"colours": {"test": DOCS}}
    return model


def requests(kind: str, argument: Any, show: Any = visual) -> list[Any]:
    from lmms_eval.api.instance import Instance

    about = {"task": "colours", "doc_id": 0, "repeats": 1}
    return [
        Instance(kind, ("What colour?", argument, show, n, "colours", "test"), 0, about)
        for n in range(len(DOCS))
    ]


def test_answers_as_the_assistant_does(model: Any) -> None:
    kwargs = {"max_new_tokens": 5, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    answers = model.generate_until(requests("generate_until", kwargs))
    asked = [model.assistant.ask(visual(doc), "What colour?", max_new_tokens=5) for doc in DOCS]
    assert answers == [answer.partition("\n\n")[0] for answer in asked]


def test_beams_are_those_of_the_task(model: Any) -> None:
    answers = model.generate_until(requests("generate_until", {"num_beams": 5, "max_new_tokens": 5}))
    options = {"num_beams": 5, "max_new_tokens": 5}
    assert answers == [model.assistant.ask(visual(doc), "What colour?", **options) for doc in DOCS]


def test_the_options_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("lmms_eval") is None:  # they need no more of it than names to import
        for name in ("", ".api", ".api.model", ".models", ".models.registry_v2"):
            stand_in: Any = SimpleNamespace(lmms=object, ModelManifest=object)
            monkeypatch.setitem(sys.modules, f"lmms_eval{name}", stand_in)
        monkeypatch.setitem(sys.modules, adapter := "pumice.evaluate.lmms_adapter", None)
        del sys.modules[adapter]  # what is imported now is forgotten after the test
    from pumice.evaluate.lmms_adapter import sampling

    assert sampling({"num_beams": 3, "length_penalty": 0.0})["length_penalty"] == 0
    # What would do nothing is left out, as tasks name it all the same.
    assert "length_penalty" not in sampling({"num_beams": 1, "length_penalty": 0.5})
    assert "top_p" not in sampling({"do_sample": True, "temperature": 0.0, "top_p": 0.9})
    # None of the task is none, whatever the model's folder says.
    assert sampling({"num_beams": None, "do_sample": True, "temperature": 0.0})["num_beams"] == 1


def test_the_loss_is_that_of_the_logits(model: Any) -> None:
    losses = model.loglikelihood(requests("loglikelihood", "red and blue"))
    assert len({loss for loss, _ in losses}) == len(DOCS)  # the picture counts
    logprobs = model.assistant.logits(visual(DOCS[0]), "What colour?")[-1].log_softmax(-1)
    tokens = [model.assistant.processor.tokenizer.backend.encode(letter).ids[0] for letter in "abz"]
    for letter, token in zip("abz", tokens, strict=True):
        loss, is_greedy = model.loglikelihood(requests("loglikelihood", letter)[:1])[0]
        assert loss == pytest.approx(-float(logprobs[token]), abs=1e-4)
        assert is_greedy == (int(logprobs.argmax()) == token)


def test_what_it_cannot_do_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="sees pictures alone"):
        model.generate_until(requests("generate_until", {}, lambda doc: ["film.mp4"]))
    with pytest.raises(InputError, match="num_beams is 5, which does not go with temperature"):
        model.generate_until(requests("generate_until", {"num_beams": 5, "temperature": 1.0}))
    with pytest.raises(InputError, match="one round only"):
        model.generate_until_multi_round([])
