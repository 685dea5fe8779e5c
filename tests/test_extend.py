"""The examples of docs/extending.md, each run as its first lines say, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from pumice.assistant import load
from pumice.config import REDUCTIONS, VisionConfig
from pumice.errors import InputError
from pumice.evaluate.tasks import registry
from pumice.formats.export import export
from pumice.formats.pumice.folder import save
from pumice.formats.read import read_model
from pumice.model.connector import KINDS, REDUCE
from pumice.model.llava import TOWERS, Llava
from pumice.storage.parts import LoadedParts
from pumice.train.loop import train
from pumice.train.recipe import load_recipe
from pumice.train.report import read_metrics

EXAMPLES = Path(__file__).parents[1] / "examples" / "extend"


@pytest.fixture
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Import one of the examples; what it registers is gone after the test."""
    kinds, towers, tasks = dict(KINDS), dict(TOWERS), dict(registry())

    def imported(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"extend_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    yield imported
    for kind in KINDS.keys() - kinds.keys():
        del KINDS[kind]
    for kind in TOWERS.keys() - towers.keys():
        del TOWERS[kind]
    for task in registry().keys() - tasks.keys():
        del registry()[task]


@pytest.fixture(scope="module")
def model(models: ModuleType) -> LoadedParts:
    return models.tiny(models.ARCHITECTURES["EfficientNet + SmolLM2 (pumice-tiny)"])


@pytest.fixture
def recipe(model: LoadedParts, tmp_path: Path) -> Path:
    state = {name: tensor.read() for name, tensor in model.state.items()}
    save(tmp_path / "tiny", model.config, state, tokenizer=model.tokenizer.to_str())
    rows = []
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": colour}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    values = {
        "name": "extended",
        "output": str(tmp_path / "run"),
        "model": str(tmp_path / "tiny"),
        "stage": {"learn": {"connector": 1e-3, "decoder": 1e-3}},
        "data": [{"rows": str(tmp_path / "rows.json")}],
        "pictures": [str(tmp_path)],
        "epochs": 4,
        "batch": 2,
        "precision": "fp32",
        "device": "cpu",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def pumice(module: ModuleType, *arguments: str) -> None:
    """Run an example that is the command with something added."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pumice", *arguments])
        with pytest.raises(SystemExit) as end:
            module.main()
    assert end.value.code in (0, None)


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(folder / "metrics.jsonl") if "loss" in event]


def test_a_connector(example: Callable[[str], ModuleType], recipe: Path, tmp_path: Path) -> None:
    module = example("connector")
    values = yaml.safe_load(recipe.read_text())
    values["model"] = {"base": values["model"], "connector": {"kind": "mlp2x_gelu"}}
    recipe.write_text(yaml.safe_dump(values))
    pumice(module, "train", str(recipe), "--set", "model.connector.kind=mlp2x_silu")
    assert read_model(tmp_path / "run" / "model").config.connector.kind == "mlp2x_silu"
    assistant = load(tmp_path / "run" / "model", device="cpu", quantize=None)
    assert isinstance(assistant.model.connector.layers[1], torch.nn.SiLU)
    assert assistant.ask(tmp_path / "0.png", "What?", max_new_tokens=3)


def test_the_reduction_of_the_page(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (REDUCTIONS, REDUCE):
        monkeypatch.setitem(table, "strongest", None)  # so that it is gone after the test
    text = (EXAMPLES.parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    exec(compile(code, "extending.md", "exec"), {})
    values = yaml.safe_load(recipe.read_text())
    connector = {"kind": "mlp2x_gelu", "reduce": "strongest", "factor": 2}
    values["model"] = {"base": values["model"], "connector": connector}
    recipe.write_text(yaml.safe_dump(values))
    train(load_recipe(recipe, ["max_steps=1"]))
    trained = read_model(tmp_path / "run" / "model").config
    assert (trained.connector.reduce, trained.image_tokens) == ("strongest", 1)


def test_a_tower(
    example: Callable[[str], ModuleType], recipe: Path, models: ModuleType, tmp_path: Path
) -> None:
    module = example("tower")
    export(models.tiny(models.ARCHITECTURES["SigLIP + SmolLM2, pad"]), "gguf", tmp_path / "llm", kind="f32")
    weights = tmp_path / "tower.safetensors"
    vision = {"kind": "patches", "image_size": 64, "stride": 16, "width": 32}
    save_file(module.Patches(VisionConfig(**vision)).state_dict(), weights)
    values = yaml.safe_load(recipe.read_text())
    values["model"] = {
        "tower": str(weights), "decoder": str(tmp_path / "llm" / "model-f32.gguf"), "vision": vision,
        "connector": {"kind": "mlp2x_gelu"}, "template": "chatml",
    }  # fmt: skip
    values["stage"]["learn"] = {"connector": 1e-3, "tower": 1e-3}
    recipe.write_text(yaml.safe_dump(values))
    pumice(module, "train", str(recipe), "--set", "max_steps=4")
    trained = read_model(tmp_path / "run" / "model")
    assert (trained.config.vision.kind, trained.config.image_tokens) == ("patches", 16)
    assert not torch.equal(trained.state["tower.project.weight"].read(), load_file(weights)["project.weight"])
    assistant = load(tmp_path / "run" / "model", device="cpu", quantize=None)
    assert assistant.ask(tmp_path / "0.png", "What?", max_new_tokens=3)
    # A field that the class does not use, and weights of another shape, are refused by name.
    with pytest.raises(InputError, match="a tower of kind patches does not implement depth = 3"):
        Llava(replace(trained.config, vision=replace(trained.config.vision, depth=3)))
    values["model"]["vision"] = vision | {"width": 48}
    recipe.write_text(yaml.safe_dump(values | {"output": str(tmp_path / "other")}))
    with pytest.raises(InputError, match=r"tower\.project\.(weight|bias)"):
        train(load_recipe(recipe))


def test_a_loss(example: Callable[[str], ModuleType], recipe: Path, tmp_path: Path) -> None:
    """Larger than the plain one by the term, in the first step."""
    module = example("loss")
    train(load_recipe(recipe))
    plain = losses(tmp_path / "run")[0]
    train(load_recipe(recipe, [f"output={tmp_path / 'z'}"]), module.ZLossTrainer)
    with_term = losses(tmp_path / "z")[0]
    assert 0 < with_term - plain < 0.1


def test_a_schedule(example: Callable[[str], ModuleType], recipe: Path, tmp_path: Path) -> None:
    """In the first quarter of the steps, the decoder keeps its weights and the connector does not."""
    module = example("schedule")
    before = read_model(tmp_path / "tiny").state
    for steps, decoder_moves in ((1, False), (8, True)):
        output = tmp_path / f"{steps} steps"
        model = train(load_recipe(recipe, [f"output={output}", f"max_steps={steps}"]), module.ConnectorFirst)
        after = read_model(model).state
        moved = {
            name: not torch.equal(after[name].read(), before[name].read())
            for name in ("decoder.norm.weight", "connector.layers.0.bias")
        }
        assert moved == {"decoder.norm.weight": decoder_moves, "connector.layers.0.bias": True}


def test_a_schedule_of_adapters(example: Callable[[str], ModuleType], recipe: Path, tmp_path: Path) -> None:
    """While adapters rest, half of them get no gradient; that is no fault."""
    module = example("schedule")
    stage = {"learn": {"connector": 1e-3, "lora": 1e-3}, "lora": {"rank": 2}}
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"stage": stage}))
    model = train(load_recipe(recipe, ["epochs=8", "max_steps=16"]), module.ConnectorFirst)
    adapters = [tensor.read() for name, tensor in read_model(model).state.items() if "lora_b" in name]
    assert adapters and all(adapter.any() for adapter in adapters)


def test_a_probe(example: Callable[[str], ModuleType], models: ModuleType, tmp_path: Path) -> None:
    """Cutting all layers' attention to the picture, one by one, changes the answer's probability."""
    module = example("probe")
    assistant = models.assistant(models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"]))
    models.picture(56, 56).save(tmp_path / "picture.png")
    lost = module.losses(assistant, str(tmp_path / "picture.png"), "What is in the picture?")
    assert len(lost) == assistant.model.config.decoder.depth
    assert all(abs(loss) > 1e-3 for loss in lost)


def test_a_benchmark(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module = example("benchmark")
    assert [module.number_in(text) for text in ("Three dogs", "12", "None of them", "no")] == [3, 12, None, 0]
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    rows = []
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(data / "images" / f"{number}.png")
        rows.append({"id": number, "image": f"{number}.png", "question": "How many dogs?", "count": number})
    (data / "counting.json").write_text(json.dumps(rows))
    answers = tmp_path / "answers.jsonl"
    lines = [{"question_id": str(n), "text": text} for n, text in enumerate(("no", "2", "two dogs", "many"))]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pumice(
        module,
        "eval",
        "counting",
        "--data",
        str(data),
        "--predictions",
        str(answers),
        "--json",
        str(tmp_path / "r.json"),
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["headline"]["value"] == pytest.approx((0 + 1 + 0 + 10) / 4)
    assert result["headline"]["interval"] is not None
