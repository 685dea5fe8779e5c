"""The examples of docs/extending.md, each run as its first lines say, on tiny models."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import runpy
import shutil
import sqlite3
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
from pumice.data.sources.recognise import MAGIC, OPENERS, open_source
from pumice.errors import InputError
from pumice.evaluate.tasks import registry
from pumice.formats.components import open_llm
from pumice.formats.export import export
from pumice.formats.families import FAMILIES
from pumice.formats.pumice.folder import save
from pumice.formats.read import read_model
from pumice.model.connector import KINDS, REDUCE
from pumice.model.decoder import Decoder
from pumice.model.layers import Causal
from pumice.model.llava import TOWERS, Llava
from pumice.storage.parts import LoadedParts
from pumice.train.loop import Trainer, train
from pumice.train.objective import Objective
from pumice.train.recipe import load_recipe
from pumice.train.report import read_metrics
from pumice.train.setup import prepare
from pumice.train.shapes import processor_of

EXAMPLES = Path(__file__).parents[1] / "examples" / "extend"


@pytest.fixture
def example(load_script: Callable[[Path], ModuleType]) -> Iterator[Callable[[str], ModuleType]]:
    """Import one of the examples; what it registers is gone after the test."""
    tables = KINDS, TOWERS, FAMILIES, MAGIC, OPENERS, registry()
    before = [set(table) for table in tables]

    yield lambda name: load_script(EXAMPLES / f"{name}.py")
    for table, names in zip(tables, before, strict=True):
        for name in table.keys() - names:
            del table[name]


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
    example: Callable[[str], ModuleType], recipe: Path, models: ModuleType, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    module = example("tower")
    forward = module.Patches.forward
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
    # So is a class that gives another number of features than is counted.
    for changed, words in (
        (lambda x: x[:, 1:], "gives 15 features of a tile, 16 are counted"),
        (lambda x: x[..., :8], "gives features of width 8, the config says 32"),
    ):
        monkeypatch.setattr(
            module.Patches, "forward", lambda self, x, change=changed: change(forward(self, x))
        )
        uses = (lambda: processor_of(load_recipe(recipe)), lambda: Llava(trained.config))
        for use in uses:
            with pytest.raises(InputError, match=f"a tower of kind 'patches' {words}"):
                use()
    monkeypatch.setattr(module.Patches, "forward", forward)
    values["model"]["vision"] = vision | {"width": 48}
    recipe.write_text(yaml.safe_dump(values | {"output": str(tmp_path / "other")}))
    with pytest.raises(InputError, match=r"tower\.project\.(weight|bias)"):
        train(load_recipe(recipe))


def test_an_llm(
    example: Callable[[str], ModuleType], recipe: Path, models: ModuleType, tmp_path: Path
) -> None:
    """The row alone: logits of transformers to 1e-5, beyond the window, and a run."""
    import transformers

    tokenizer = models.byte_level("smollm", models.CHATML)
    rows = tokenizer.get_vocab_size()
    config = transformers.MinistralConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.MinistralForCausalLM(config).eval()
    folder = tmp_path / "ministral"
    reference.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match="model_type is 'ministral', which cannot be read"):
        open_llm(folder)
    example("llm")
    opened = open_llm(folder)
    assert (opened.config.sliding_window, opened.config.window_pattern) == (5, 2)
    decoder = Decoder(opened.config).eval()
    decoder.load_state_dict({name: tensor.read() for name, tensor in opened.state.items()})
    ids = torch.randint(rows, (2, 19), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(19).expand_as(ids)
    with torch.no_grad():
        hidden = decoder(decoder.embed(ids), positions, Causal(opened.config))
        torch.testing.assert_close(decoder.logits(hidden), reference(ids).logits, atol=1e-5, rtol=0)
    tower = example("tower")
    vision = {"kind": "patches", "image_size": 64, "stride": 16, "width": 32}
    save_file(tower.Patches(VisionConfig(**vision)).state_dict(), tmp_path / "tower.safetensors")
    values = yaml.safe_load(recipe.read_text())
    values["model"] = {
        "tower": str(tmp_path / "tower.safetensors"), "decoder": str(folder), "vision": vision,
        "connector": {"kind": "linear"}, "template": "chatml",
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(values))
    pumice(example("llm"), "train", str(recipe), "--set", "max_steps=2")
    assert read_model(tmp_path / "run" / "model").config.decoder == opened.config


def test_a_data_format(
    example: Callable[[str], ModuleType], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE rows (image TEXT, question TEXT, answer TEXT)")
        colours = ("red", "green", "blue", "white")
        rows = [(f"{number}.png", "What?", colour) for number, colour in enumerate(colours)]
        database.executemany("INSERT INTO rows VALUES (?, ?, ?)", rows)
        database.commit()
    module = example("data_format")
    pumice(module, "data", "check", str(path), "--images", str(tmp_path))
    assert "4 of 4 rows can be used" in capsys.readouterr().out
    train(load_recipe(recipe, [f"output={tmp_path / 'json'}"]))
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"data": [{"rows": str(path)}]}))
    pumice(module, "train", str(recipe))
    # The same rows as in the JSON, so the same losses.
    assert losses(tmp_path / "run") == losses(tmp_path / "json")
    (tmp_path / "empty.sqlite").write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"empty\.sqlite' cannot be read: .*; write the table `rows` anew"):
        open_source(tmp_path / "empty.sqlite")


def test_a_loss(example: Callable[[str], ModuleType], recipe: Path, tmp_path: Path) -> None:
    """Larger than the plain one by the term, in the first step."""
    module = example("loss")
    train(load_recipe(recipe))
    plain = losses(tmp_path / "run")[0]
    train(load_recipe(recipe, [f"output={tmp_path / 'z'}"]), module.ZLossTrainer)
    with_term = losses(tmp_path / "z")[0]
    assert 0 < with_term - plain < 0.1


def test_the_loss_has_the_cap_of_the_logits(
    example: Callable[[str], ModuleType], recipe: Path, tmp_path: Path
) -> None:
    """Of a decoder with a cap, the term is that of the capped logits."""
    setup = prepare(load_recipe(recipe))
    config = setup.model.config
    objective = example("loss").WithZLoss(setup.model, None, bf16=False)
    hidden = torch.randn(5, config.decoder.width, generator=torch.Generator().manual_seed(0)) * 20
    targets, weights = torch.arange(5), torch.tensor([1.0, 0.0, 1.0, 2.0, 0.5])
    terms = []
    for softcap in (None, 2.0):
        decoder = replace(config.decoder, logit_softcap=softcap)
        setup.model.config = replace(config, decoder=decoder)
        setup.model.decoder.config = decoder
        plain = Objective.loss(objective, hidden, targets, weights)
        terms.append((objective.loss(hidden, targets, weights) - plain).item())
        logits = hidden @ setup.model.decoder.head_weight.T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        expected = 1e-4 * (weights * logits.logsumexp(-1) ** 2).sum().item()
        assert terms[-1] == pytest.approx(expected, rel=1e-2)  # a difference of sums in fp32
    assert terms[0] > 2 * terms[1]


@pytest.mark.parametrize(
    ("name", "given", "usage"),
    [
        ("loss", ["gone.yaml"], "RECIPE [KEY=VALUE ...]"),
        ("schedule", ["gone.yaml"], "RECIPE [KEY=VALUE ...]"),
        ("probe", ["gone", "dog.jpg", "Who?"], "MODEL PICTURE QUESTION"),
    ],
)
def test_wrong_input_ends_without_a_traceback(
    name: str, given: list[str], usage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(EXAMPLES / f"{name}.py")
    for words, message in (([], f"write: python {path} {usage}"), (given, "gone")):
        monkeypatch.setattr(sys, "argv", [path, *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(path, run_name="__main__")
        assert message in str(end.value.code)


@pytest.mark.parametrize("learn", [{"decoder": 1e-3}, {"connector": 1e-3}])
def test_a_schedule_without_its_parts_is_refused(
    learn: dict[str, float], example: Callable[[str], ModuleType], recipe: Path
) -> None:
    """In a quarter of the steps nothing would learn, or it would be no other schedule."""
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"stage": {"learn": learn}}))
    names = next(iter(learn))
    with pytest.raises(InputError, match=rf"names {names}; this schedule needs the connector and another"):
        train(load_recipe(recipe), example("schedule").ConnectorFirst)


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


def test_a_run_continues_with_its_own_classes_only(
    example: Callable[[str], ModuleType], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another schedule or loss would change the run halfway, as another recipe would.

    So would a class of a user's own that has the name of Pumice's.
    """
    schedule, loss = example("schedule").ConnectorFirst, example("loss").ZLossTrainer
    own_trainer, no_loss = type("Trainer", (schedule,), {}), type("ZLossTrainer", (Trainer,), {})
    for began, then, message in (
        (Trainer, schedule, r"made with trainer: 'Trainer', this run has 'ConnectorFirst'; set it back"),
        (schedule, Trainer, "made with trainer: 'ConnectorFirst', this run has 'Trainer'"),
        (own_trainer, Trainer, "made with trainer: 'own Trainer', this run has 'Trainer'"),
        (no_loss, loss, "made with objective: 'Objective', this run has 'WithZLoss'"),
    ):
        output = tmp_path / " ".join(code.__name__ for code in (began, then, began.objective_class))
        overrides = [f"output={output}", "max_steps=4", "save_every=2"]
        train(load_recipe(recipe, overrides), began)
        shutil.rmtree(output / "checkpoints" / "step-000004")
        with pytest.raises(InputError, match=message):
            train(load_recipe(recipe, overrides), then)
        capsys.readouterr()
        train(load_recipe(recipe, overrides), began)
        assert "has changed since" not in capsys.readouterr().err
        assert losses(output)[:4] == losses(output)


def test_that_the_file_of_a_trainer_changed_is_told(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    code = "from pumice.train.loop import Trainer\nPEAK = 1.0\n\n\nclass Mine(Trainer):\n"
    code += "    def rate(self, part):\n        return PEAK\n"
    monkeypatch.syspath_prepend(tmp_path)
    told = []
    for text in (code, code, code.replace("1.0", "0.5")):
        path.write_text(text)
        importlib.invalidate_caches()
        sys.modules.pop("mine", None)
        capsys.readouterr()
        train(load_recipe(recipe, ["max_steps=4", "save_every=2"]), importlib.import_module("mine").Mine)
        told.append("The file of Mine has changed since this run was saved" in capsys.readouterr().err)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    assert told == [False, False, True]


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


def test_every_row_of_the_map_was_tried() -> None:
    """The last column of "To add something" in CONTRIBUTING.md; a probe adds nothing."""
    text = (EXAMPLES.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## To add something")[2].partition("\n## ")[0]
    named = set(re.findall(r"`examples/extend/(\w+)\.py` ?[|,]", section))
    assert named == {path.stem for path in EXAMPLES.glob("*.py")} - {"probe"}
