"""What answers cost: memory by part as it is held, times that follow from the model's depth and sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pumice.cli import app
from pumice.cli.plan import describe_ask
from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.engine.engine import Engine, Plan
from pumice.errors import InputError
from pumice.formats.import_ import import_model
from pumice.formats.load import shapes
from pumice.formats.read import read_model
from pumice.formats.sizes import weight_sizes
from pumice.model import quantized_vision
from pumice.storage.tensors import LazyTensor
from pumice.train.plan import asking
from pumice.train.plan.asking import AskCost, AskPlan, measure_decoder, plan_ask
from pumice.train.plan.estimate import plan as plan_training
from pumice.train.recipe import load_recipe


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


def test_memory_and_time_are_summed_by_part(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {False: 3.0, True: 2.0}  # of the picture, also beside a quantised language model
    monkeypatch.setattr(asking, "quantized_shapes", lambda tower: {"a matrix": (1, 32)})
    monkeypatch.setattr(asking, "_measure_image", lambda *_, quantized: (41, 25, seconds[quantized]))
    monkeypatch.setattr(asking, "time_answer", lambda *_: (10.0, 0.5))
    plan = plan_ask(str(tiny_folder), "cpu")
    assert [cost.first_word for cost in plan.costs] == [13.0, 12.0, 12.0]
    assert [cost.tokens_per_second for cost in plan.costs] == [2.0] * 3
    numbers = 256 * 2 * 2 * 2 * 16  # the whole context, keys and values, layers, heads, width of a head
    assert [cost.memory["KV cache"] for cost in plan.costs] == [4 * numbers, 2 * numbers, 2 * numbers]
    step = 41 * (3 * 96 + 8 * 64) * 4
    assert {cost.memory["program and buffers"] for cost in plan.costs} == {asking.PROCESS_BYTES + step}
    for cost in plan.costs:
        assert cost.total == sum(cost.memory.values())


def test_the_page_about_a_7b_tells_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs/llava-7b.md").read_text(encoding="utf-8")
    decoder = DecoderConfig(32064, 4096, 32, 32, 32, 128, 11008, context=4096)
    vision = VisionConfig("clip", image_size=336, width=1024, stride=14, depth=24, heads=16, mlp_width=4096)
    tiny = read_model("pumice-tiny")
    config = ModelConfig(decoder, vision, ConnectorConfig(), ImagePolicy(), template=tiny.config.template)
    state = {name: LazyTensor(shape, torch.float16, torch.zeros) for name, shape in shapes(config).items()}
    loaded = replace(tiny, config=config, state=state)
    monkeypatch.setattr(asking, "read_or_outline", lambda _: (loaded, 0))
    monkeypatch.setattr(quantized_vision, "multiplies_fast", lambda: False)
    monkeypatch.setattr(asking, "_measure_image", lambda *_, quantized: (600, 576, 1.0))
    monkeypatch.setattr(asking, "time_answer", lambda *_: (1.0, 1.0))
    memory = [cost.memory for cost in plan_ask("a 7B", "cpu").costs]
    rows = {
        "tower (CLIP-L/336, fp16) and connector": [one["tower"] + one["connector"] for one in memory],
        **{
            part: [one[part] for one in memory]
            for part in ("language model", "KV cache", "program and buffers")
        },
        "in all": [sum(one.values()) for one in memory],
    }
    for part, sizes in rows.items():
        assert f"| {part} | {' | '.join(f'{size / 1e9:.1f} GB' for size in sizes)} |" in page
    # Fine-tuning.
    whole, few = (
        plan_training(
            load_recipe(Path("pumice:finetune"), changed), Path("pumice:finetune"), gpu_memory=24
        ).total
        for changed in ([], ["stage.base=nf4"])
    )
    assert f"says {whole / 1e9:.0f} GB, which fits 24 GB" in page
    assert f"it says {few / 1e9:.0f} GB" in page


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The kinds of weights that a plan times, which takes no time here."""
    kinds: list[str | None] = []

    def time_answer(config: DecoderConfig, quantize: str | None, *_: object) -> tuple[float, float]:
        kinds.append(quantize)
        return 1.0, 1.0

    monkeypatch.setattr(asking, "time_answer", time_answer)
    return kinds


def test_what_is_stored_in_4_bits_is_timed_so(
    tiny_folder: Path, tmp_path: Path, timed: list[str | None]
) -> None:
    import_model(str(tiny_folder), tmp_path / "few", quantize="int4")
    plan = plan_ask(str(tmp_path / "few"), "cpu")
    assert timed == [None, "int4"]  # in turn, not again for int8
    assert plan.costs[1].memory == plan.costs[2].memory
    assert plan.notes[-1] == "matrices in Q4_1 stay so: int8 cannot bring back what 4 bits lost"


def test_what_is_stored_in_4_bits_with_adapters_is_timed_in_8(timed: list[str | None]) -> None:
    plan = plan_ask("pumice-tiny", "cpu")
    assert set(timed) == {None, "int8", "int4"}
    assert plan.costs[1].memory["language model"] > 1.3 * plan.costs[2].memory["language model"]
    assert not [note for note in plan.notes if "stay so" in note]


def test_a_model_that_sees_no_pictures_is_told_as_such() -> None:
    cost = AskCost("none", {"tower": 0.0, "language model": 1e9}, 2.0, 3.0, True)
    lines = describe_ask(AskPlan("m", "cpu", 2, "AVX2", 8e9, 15, 0, (cost,)))
    assert lines[1] == "a question: 15 tokens; the model sees no pictures"
    assert not any("tower" in line for line in lines)


def test_a_context_with_little_room_is_timed_and_one_without_is_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DecoderConfig(64, 32, 2, 2, 2, 16, 64, context=61)
    assert min(measure_decoder(config, None, 60, torch.device("cpu"), torch.float32)) > 0
    monkeypatch.setattr(asking, "_measure_image", lambda *_, quantized: (256, 250, 1.0))
    with pytest.raises(InputError, match="it takes 256 tokens and the model's context is 256; use another"):
        plan_ask(str(tiny_folder), "cpu")


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
    # Another program disturbed the single layer: no time is less than that.
    monkeypatch.setattr(asking, "PROBE_BYTES", 1)
    monkeypatch.setattr(asking, "time_answer", lambda config, *_: (9.0 / config.depth, 1.0 / config.depth))
    assert measure_decoder(config, None, 1024, torch.device("cpu"), torch.float32) == (9.0, 1.0)


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


@pytest.mark.parametrize("name", ["pumice-tiny", ""])
def test_a_model_in_place_of_a_recipe_is_told_how_to_ask(name: str, tiny_folder: Path) -> None:
    model = name or str(tiny_folder)
    result = CliRunner().invoke(app, ["plan", model])
    assert result.exit_code == 2
    assert f"{model} is no recipe; `pumice plan --ask {model}`" in result.stderr


@pytest.mark.parametrize(
    "option", ["--gpu=t4", "--gpu-memory=24", "--processes=1", "--rows=10", "--set=seed=1"]
)
def test_options_of_recipes_are_not_left_out_without_a_word(option: str) -> None:
    result = CliRunner().invoke(app, ["plan", "--ask", "pumice-tiny", option])
    assert result.exit_code == 2
    assert f"{option.partition('=')[0]} is for recipes" in result.stderr


def test_times_of_a_busy_machine_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "usable_cores", lambda: 2)
    monkeypatch.setattr(asking, "busy_load", lambda: 0.4)
    assert asking.busy_notes() == ()
    monkeypatch.setattr(asking, "busy_load", lambda: 16.2)
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
