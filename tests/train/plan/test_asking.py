"""What answers cost: memory by part as it is held, times that follow from the model's depth and sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pumice.cli import app
from pumice.cli.plan import describe_ask
from pumice.config import DecoderConfig
from pumice.formats.read import read_model
from pumice.formats.sizes import weight_sizes
from pumice.train.plan import asking
from pumice.train.plan.asking import measure_decoder, plan_ask


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


def test_times_are_multiplied_by_the_layers_that_were_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock gives a second to each call, so that what is counted shows."""
    monkeypatch.setattr(asking, "_seconds", lambda *_, **__: 1.0)
    monkeypatch.setattr(asking, "PROBE_BYTES", 1)
    config = DecoderConfig(64, 32, 6, 2, 2, 16, 64, context=2048)
    prefill, token = measure_decoder(config, None, 1024, torch.device("cpu"), torch.float32)
    assert (prefill, token) == (6 * 2 + 1, 6 + 1)  # six layers, two chunks, and the vocabulary once
    prefill, token = measure_decoder(replace(config, depth=1), None, 100, torch.device("cpu"), torch.float32)
    assert (prefill, token) == (2, 2)


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


def test_what_does_not_fit_is_said_and_the_status_is_1(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "available_memory", lambda: 1e6)
    printed = CliRunner().invoke(app, ["plan", "--ask", str(tiny_folder)])
    assert (printed.exit_code, printed.stdout.count("does not fit")) == (1, 3)
