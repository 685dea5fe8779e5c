"""`pumice check`: two forms of one model, and where each kind of damage shows first."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pumice.cli import app
from pumice.cli.check import _programs
from pumice.cli.options import Opening
from pumice.config import GenerationConfig
from pumice.evaluate import parity
from pumice.formats.export import export
from pumice.formats.gguf import library
from pumice.formats.import_ import import_model
from pumice.formats.pumice.folder import save
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import as_lazy

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
Checked = Callable[..., dict[str, Any]]


@pytest.fixture
def checked(tmp_path: Path) -> Checked:
    """Check one model against another folder or file; return what --json prints."""

    def check(model: LoadedParts, other: LoadedParts | Path, *options: str) -> dict[str, Any]:
        forms = [tmp_path / "own", other if isinstance(other, Path) else tmp_path / "other"]
        for folder, form in zip(forms, (model, other), strict=True):
            if isinstance(form, LoadedParts):
                save(folder, form.config, form.state, tokenizer=form.tokenizer.to_str())
        arguments = ["check", str(forms[0]), "--against", str(forms[1]), "--new-tokens", "3", "--json"]
        result = CliRunner().invoke(app, [*arguments, *options])
        report: dict[str, Any] = json.loads(result.stdout)
        assert result.exit_code == (report["parts"] is not None)
        return report

    return check


def changed(model: LoadedParts, name: str) -> LoadedParts:
    tensor = model.state[name].read()
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    return replace(model, state=model.state | {name: as_lazy(tensor + 0.5 * noise)})


def tiny(models: ModuleType, part: str = "SigLIP + Qwen2") -> LoadedParts:
    [name] = [name for name in models.ARCHITECTURES if part in name]
    loaded: LoadedParts = models.tiny(models.ARCHITECTURES[name])
    return loaded


def stages(report: dict[str, Any]) -> dict[str, bool]:
    """The stages of the question about a picture."""
    return {stage["name"]: stage["same"] for stage in report["questions"][-1]["stages"]}


def test_a_model_and_itself(models: ModuleType, checked: Checked) -> None:
    report = checked(tiny(models), tiny(models))
    assert report["parts"] is None
    assert [question["pictures"] for question in report["questions"]] == [0, 1]
    assert stages(report) == dict.fromkeys(["tokenizer", "image tokens", "tower", "decoder", "answer"], True)


@pytest.mark.parametrize(
    ("name", "parting"),
    [
        ("tower.blocks.0.mlp.up.weight", "tower"),
        ("connector.layers.0.weight", "tower"),
        ("decoder.blocks.1.attention.q.weight", "decoder"),
    ],
)
def test_changed_weights(models: ModuleType, checked: Checked, name: str, parting: str) -> None:
    """The decoder gets the first model's image tokens, so each part is blamed for itself."""
    model = tiny(models)
    report = checked(model, changed(model, name))
    assert report["parts"] == parting
    found = stages(report)
    assert (found["tower"], found["decoder"]) == (parting != "tower", parting != "decoder")
    assert found["answer"] is False


def test_a_quantised_side_is_named(models: ModuleType, checked: Checked, tmp_path: Path) -> None:
    """Also where the other side is quantised; rounding must not pass for a fault."""
    model = tiny(models)
    save(tmp_path / "plain", model.config, model.state, tokenizer=model.tokenizer.to_str())
    import_model(tmp_path / "plain", tmp_path / "int4", quantize="int4")
    report = checked(model, tmp_path / "int4", "--tolerance", "0")
    assert report["parts"] == "decoder"
    said = (
        f"{tmp_path / 'own'} is not quantised and {tmp_path / 'int4'} is quantised to int4, so rounding alone"
    )
    assert report["hint"].startswith(said)
    report = checked(model, changed(model, "decoder.blocks.1.attention.q.weight"))
    assert report["hint"].startswith("the language model computes otherwise")
    # What the decoder is rounded to changes nothing before it.
    other = changed(model, "connector.layers.0.weight")
    save(tmp_path / "another", other.config, other.state, tokenizer=other.tokenizer.to_str())
    import_model(tmp_path / "another", tmp_path / "another-int4", quantize="int4")
    report = checked(model, tmp_path / "another-int4")
    assert report["parts"] == "tower" and report["hint"].startswith("a picture is prepared")
    other = tiny(models, "LLaVA 1.5")
    save(tmp_path / "third", other.config, other.state, tokenizer=other.tokenizer.to_str())
    import_model(tmp_path / "third", tmp_path / "third-int4", quantize="int4")
    report = checked(model, tmp_path / "third-int4")
    assert report["parts"] == "tokenizer" and report["hint"].startswith("the same text becomes other tokens")


def test_another_tokenizer_and_other_tiles(models: ModuleType, checked: Checked) -> None:
    model = tiny(models)
    other = replace(model, tokenizer=models.byte_level("gpt-2", models.CHATML))
    values = json.loads(other.tokenizer.to_str())
    values["model"]["merges"] = values["model"]["merges"][:5]
    other = replace(other, tokenizer=type(other.tokenizer).from_str(json.dumps(values)))
    report = checked(model, other)
    assert report["parts"] == "tokenizer"
    assert stages(report)["decoder"], "it gets the first model's ids"
    cut = replace(model.config.image, mode="anyres", pinpoints=models.TILES, unpad=False)
    report = checked(model, replace(model, config=replace(model.config, image=cut)))
    assert report["parts"] == "image tokens"


def test_another_model(models: ModuleType, checked: Checked) -> None:
    report = checked(tiny(models), tiny(models, "LLaVA 1.5"))
    assert report["parts"] == "tokenizer"
    assert stages(report)["decoder"] is False


def test_another_model_may_lack_the_tokens_of_the_answer(models: ModuleType) -> None:
    program = parity.InPumice("other", lambda: models.assistant(tiny(models)), 3)
    larger = parity.Trace(1, (9999,), (1,), logprobs=torch.zeros(2, 10_000))
    trace = program.trace(parity.CheckQuestion("What?"), larger)
    assert trace.shared is None
    assert parity.first_parting(parity.compare(larger, trace, 0.1, str)[1:]) == "decoder"


def test_what_is_compared_is_greedy(models: ModuleType) -> None:
    """Also of a model whose folder asks for beams: another program's likeliest tokens are greedy."""
    question = parity.CheckQuestion("What?")
    assistant = models.assistant(tiny(models))
    greedy = parity.InPumice("greedy", lambda: assistant, 12).trace(question, None).written
    conversation = question.conversation
    found = "".join(assistant.stream(conversation, max_new_tokens=12, num_beams=3))
    assistant.model.config = replace(assistant.model.config, generation=GenerationConfig(num_beams=3))
    assert "".join(assistant.stream(conversation, max_new_tokens=12)) == found
    assert assistant.processor.tokenizer.decode(greedy) != found
    assert parity.InPumice("searching", lambda: assistant, 12).trace(question, None).written == greedy


def trace(logprobs: list[list[float]], ids: tuple[int, ...] = (1,)) -> parity.Trace:
    steps = torch.tensor(logprobs)
    return parity.Trace(len(ids), (0,) * (len(steps) - 1), ids, logprobs=steps, shared=steps)


def test_tokens_that_change_places_within_the_tolerance_are_no_difference() -> None:
    """Only where both are as likely in both programs."""
    first = [-1.0, -1.02, *[-3.0] * 20, -9.0]
    swapped = [-1.03, -1.01, *first[2:]]
    far = [*first[:-1], -0.5]  # a token that is none of the first one's ten likeliest
    own = trace([first, first])
    for step, same in ((first, True), (swapped, True), (far, False)):
        stages = parity.compare(own, trace([first, step]), 0.1, str)
        assert [stage.same for stage in stages] == [True, same, same], step
    [_, decoder, _] = parity.compare(own, trace([first, swapped]), 0.1, str)
    assert "the first 1 of 2 likeliest tokens equal, then two that are nearly as likely" in decoder.says
    [_, decoder, _] = parity.compare(own, trace([first, swapped]), 0.02, str)
    assert decoder.same is False


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ({"0": -1.0, "1": -1.05}, True),
        ({"0": -1.05, "1": -1.0}, True),
        ({"0": -1.5, "1": -1.0}, False),
        ({"0": -1.0, "9": -0.95}, False),  # a token that MODEL does not list
    ],
)
def test_a_server_may_choose_the_other_of_two_like_tokens(words: dict[str, float], same: bool) -> None:
    written = max(words, key=words.__getitem__)
    own = replace(trace([[-1.0, -1.05], [-1.0, -1.05]]), words=({"0": -1.0, "1": -1.05},))
    served = parity.Trace(1, (written,), words=(words,))
    assert [stage.same for stage in parity.compare(own, served, 0.1, str)] == [True, same]


def test_the_earliest_stage_of_all_questions_is_named() -> None:
    """That of the picture, though the question without one comes first."""
    plain = [parity.CheckStage("tokenizer", True, ""), parity.CheckStage("decoder", False, "")]
    pictured = [plain[0], parity.CheckStage("image tokens", False, "16 and 36"), *plain[1:]]
    assert parity.first_parting([*plain, *pictured]) == "image tokens"
    assert parity.first_parting(plain) == "decoder"
    assert parity.first_parting(plain[:1]) is None


def test_llama_cpp_runs_no_folder_without_gguf(tiny_folder: Path) -> None:
    options = ["check", str(tiny_folder), "--against", str(tiny_folder), "--llama-cpp"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert "holds no GGUF file; give a .gguf file" in result.stderr


@needs_llama_cpp
@pytest.mark.parametrize(
    ("part", "parting"), [("SigLIP + Qwen2", None), ("SigLIP + SmolLM2", None), ("LLaVA 1.5", "tower")]
)
def test_a_pair_in_llama_cpp(
    models: ModuleType, checked: Checked, tmp_path: Path, part: str, parting: str | None
) -> None:
    """A SigLIP answers there as here; a CLIP's class token stands in the wrong place (its issue 25814)."""
    model = tiny(models, part)
    export(model, "gguf", tmp_path / "pair", kind="f32")
    report = checked(model, tmp_path / "pair", "--llama-cpp")
    assert report["parts"] == parting
    assert stages(report)["decoder"]


def test_no_model_is_opened_before_it_is_asked(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So one model is in memory at a time; the prompt's template needs no weights."""
    opened: list[Any] = []
    export(tiny(models), "gguf", tmp_path / "pair")
    monkeypatch.setattr(parity, "mtmd_library", lambda purpose: None)
    monkeypatch.setattr(parity, "LlamaCpp", lambda *files: opened.append(files))
    monkeypatch.setattr("pumice.assistant.load", lambda *a, **named: opened.append(a))
    exact = Opening(quantize="none")
    first, second = _programs("own", str(tmp_path / "pair"), exact, None, True, None, 3, False)
    assert isinstance(second, parity.InLlamaCpp) and not opened
    first.close()
    second.close()
    assert not opened


def test_one_callback_silences_llama_cpp() -> None:
    """C code calls it for as long as the process lives, so it must stay, but one is enough."""

    class Library:
        llama_log_callback = staticmethod(lambda function: [function])

    assert library._silence(Library) is library._silence(Library)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "http://127.0.0.1:9/v1", "--llama-cpp"], "not an address such as"),
        (["--against", "nowhere"], "there is no model 'nowhere'"),
        (["--against", "ftp://a/b"], "there is no"),
        (["none.png", "--against", "pumice-tiny"], "there is no picture none.png"),
    ],
)
def test_wrong_input(tiny_folder: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["check", str(tiny_folder), *options])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed")
def test_without_llama_cpp(models: ModuleType, tiny_folder: Path, tmp_path: Path) -> None:
    export(tiny(models), "gguf", tmp_path / "pair")
    result = CliRunner().invoke(
        app, ["check", str(tiny_folder), "--against", str(tmp_path / "pair"), "--llama-cpp"]
    )
    assert result.exit_code == 2
    assert "running a GGUF pair by llama.cpp needs llama-cpp-python: pip install" in result.stderr
