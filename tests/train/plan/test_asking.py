"""What answers cost: memory by part as it is held, times that follow from the model's depth and sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pumice.cli import app
from pumice.cli.plan import describe_ask
from pumice.config import DecoderConfig
from pumice.engine.engine import Engine, Plan
from pumice.formats.read import read_model
from pumice.formats.sizes import weight_sizes
from pumice.model import quantized_vision
from pumice.train.plan import asking
from pumice.train.plan.asking import AskCost, AskPlan, measure_decoder, plan_ask


def test_a_model_is_planned_with_weights_of_each_kind(tiny_folder: Path) -> None:
    plan = plan_ask(str(tiny_folder), "cpu")
    loaded = read_model(tiny_folder)
    assert [cost.quantize for cost in plan.costs] == ["none", "int8", "int4"]
    for cost in plan.costs:
        kind = None if cost.quantize == "none" else cost.quantize
        weights = weight_sizes(loaded, kind, torch.device("cpu"), torch.float32)
        assert {part: cost.memory[part] for part in weights} == weights
        assert cost.first_word > 0
        assert cost.tokens_per_second > 0
        assert cost.fits
    assert plan.image_tokens == loaded.config.image_tokens < plan.prompt_tokens
    text = "\n".join(describe_ask(plan))
    for name in ("tower", "KV cache", "in all", "first word", "tokens/s", "int4"):
        assert name in text
    assert json.loads(json.dumps(plan.to_dict()))["costs"][1]["total"] == plan.costs[1].total
    table, paragraphs = (describe_ask(plan, columns)[2:] for columns in (80, 40))
    assert max(map(len, table)) > 40 >= max(map(len, paragraphs))
    assert set(" ".join(table).split()) == set(" ".join(paragraphs).split())


def test_layers_that_are_not_timed_count_too_and_what_comes_once_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def time_answer(config: DecoderConfig, *_: object) -> tuple[float, float]:
        return 5.0 + 2 * config.depth, 0.5 + config.depth

    config = DecoderConfig(64, 32, 6, 2, 2, 16, 64, context=2048)
    layer_bytes = 4 * 32 * (4 * 32 + 3 * 64)
    monkeypatch.setattr(asking, "time_answer", time_answer)
    for probe_bytes in (1, 2 * layer_bytes, 1 << 30):
        monkeypatch.setattr(asking, "PROBE_BYTES", probe_bytes)
        assert measure_decoder(config, None, 1024, torch.device("cpu"), torch.float32) == (17, 6.5)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_engine_answers_what_is_timed(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round computes the whole prompt, a step each token, and no answer ends early."""
    steps: list[list[int]] = []

    class CountingEngine(Engine):
        def _run(self, plan: Plan) -> None:
            steps.append([count for _, count in plan])
            super()._run(plan)

    monkeypatch.setattr(asking, "Engine", CountingEngine)
    monkeypatch.setattr(asking, "PROBE_SECONDS", 60.0)
    config = DecoderConfig(64, 32, depth, 2, 2, 16, 64, context=2048)
    prefill, token = asking.time_answer(config, "int8", 700, torch.device("cpu"), torch.float32)
    prompt = 5 * [[128]] + [[60]]
    assert steps == [[16], [1]] + asking.ROUNDS * (prompt + (asking.TIMED_TOKENS - 1) * [[1]])
    assert prefill > token > 0


def test_the_command(tiny_folder: Path) -> None:
    run = CliRunner().invoke
    printed = run(app, ["plan", "--ask", str(tiny_folder), "--json"])
    assert printed.exit_code == 0
    assert {cost["quantize"] for cost in json.loads(printed.stdout)["costs"]} == {"none", "int8", "int4"}


@pytest.mark.parametrize("arguments", [[], ["recipe.yaml", "--ask", "pumice-tiny"]])
def test_a_recipe_or_a_model(arguments: list[str]) -> None:
    from pumice import InputError
    from pumice.cli.plan import plan

    recipe, ask = (Path(arguments[0]), arguments[2]) if arguments else (None, None)
    with pytest.raises(InputError, match="give a recipe, or --ask MODEL, and not both"):
        plan(recipe, ask)


@pytest.mark.parametrize(
    "option", ["--gpu=t4", "--gpu-memory=24", "--processes=2", "--rows=10", "--set=seed=1"]
)
def test_options_of_recipes_are_not_left_out_without_a_word(option: str) -> None:
    result = CliRunner().invoke(app, ["plan", "--ask", "pumice-tiny", option])
    assert result.exit_code == 2
    assert f"{option.partition('=')[0]} is for recipes" in result.stderr


def test_times_of_a_busy_machine_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(asking.os, "getloadavg", lambda: (0.4, 9.0, 9.0), raising=False)
    assert asking.busy_notes() == ()
    monkeypatch.setattr(asking.os, "getloadavg", lambda: (16.2, 0.0, 0.0), raising=False)
    (note,) = asking.busy_notes()
    assert "other programs use the cores (load 16.2)" in note
    cost = AskCost("none", {"tower": 1e9}, 2.0, 3.0, True)
    plan = AskPlan("pumice-tiny", "cpu", 2, "AVX2", 8e9, 41, 25, (cost,), (note,))
    assert f"note: {note}" in " ".join(describe_ask(plan, 40))
    assert max(map(len, describe_ask(plan, 40)[2:])) <= 40
    assert plan.to_dict()["notes"] == (note,)


def test_a_tower_that_nothing_quantises_is_timed_once(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = asking._measure_image, list[bool]()

    def counted(*args: Any, quantized: bool) -> Any:
        calls.append(quantized)
        return measure(*args, quantized=quantized)

    monkeypatch.setattr(asking, "_measure_image", counted)
    monkeypatch.setattr(quantized_vision, "multiplies_fast", lambda: True)
    plan_ask(str(tiny_folder), "cpu")
    assert calls == [False]


def test_what_does_not_fit_is_said_and_the_status_is_1(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "free_on", lambda _: 1e6)
    printed = CliRunner().invoke(app, ["plan", "--ask", str(tiny_folder)])
    assert (printed.exit_code, printed.stdout.count("does not fit")) == (1, 3)
