"""Memory is predicted by a step without contents; what cannot fit is refused before weights are read."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pumice.cli.plan import describe
from pumice.config import DecoderConfig, LoraConfig, ModelConfig, VisionConfig
from pumice.errors import InputError
from pumice.model.llava import Llava
from pumice.model.packed import PackedAttention, Run
from pumice.train import devices, run
from pumice.train.devices import find_gpu, gpu_of_driver, gpus, peak, thread_notes
from pumice.train.plan.estimate import GPU_UTILISATION, describe_device, plan
from pumice.train.plan.footprint import Footprint, PackShape, measure
from pumice.train.recipe import Recipe, load_recipe
from pumice.train.setup import prepare
from pumice.train.shapes import shape
from pumice.train.sizes import sizes

ROOT = Path(__file__).parents[3]
CONFIG = ModelConfig(
    DecoderConfig(256, 64, 6, 4, 2, 16, 128, context=512), VisionConfig(image_size=64, variant="lite0")
)
SHORT = ["pack_tokens=1024"]  # fewer samples to a pack are planned sooner
WORK = PackShape((Run(100), Run(60)), 2, 8, 70)


def recipe(stage: dict[str, Any], **changes: Any) -> Recipe:
    values = {"name": "a", "output": "o", "model": "m", "data": [{"rows": "r"}], "precision": "fp32"}
    return Recipe.model_validate(values | {"stage": stage} | changes)


FULL = {"learn": {"connector": 1e-3, "decoder": 1e-3}}
LORA = {"learn": {"lora": 1e-3}, "lora": {"rank": 4}}


def of(stage: dict[str, Any], config: ModelConfig = CONFIG, **changes: Any) -> Footprint:
    return measure(recipe(stage, **changes), config, WORK, "cpu")


def test_what_is_held_follows_from_the_model() -> None:
    model = Llava(CONFIG)
    parameters = sum(p.numel() for p in model.parameters())
    tower = sum(p.numel() for p in model.tower.parameters())
    memory = sizes(recipe(FULL), CONFIG, "cpu")
    assert memory.learning == parameters - tower == sum(memory.parameters.values()) - tower
    assert memory.gradients == 4 * memory.learning and memory.optimizer == 8 * memory.learning
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert memory.weights == held
    assert sizes(recipe(FULL, optimizer="adamw8bit"), CONFIG, "cpu").optimizer == 2 * memory.learning


def test_a_tower_of_which_some_blocks_learn_is_sharded() -> None:
    whole, blocks = (
        sizes(recipe({"learn": {part: 1e-3, "decoder": 1e-3}}), CONFIG, "cpu").shards
        for part in ("tower", "tower.0-0")
    )
    assert (blocks.whole, blocks.root) == (whole.whole, whole.root)
    assert sizes(recipe(FULL), CONFIG, "cpu").shards.whole > whole.whole  # a frozen one is not


@pytest.mark.parametrize("base", ["none", "int8"])
def test_what_is_held_is_what_a_run_prepares(make_recipe: Callable[..., Path], base: str) -> None:
    stage = {"learn": {"connector": 1e-3, "lora": 1e-3}, "lora": {"rank": 2}, "base": base}
    prepared = prepare(load_recipe(make_recipe(stage=stage, precision="bf16")))
    memory = sizes(prepared.recipe, prepared.model.config, "cpu")
    tensors = (*prepared.model.parameters(), *prepared.model.buffers())
    assert memory.weights == sum(t.numel() * t.element_size() for t in tensors)
    assert memory.learning == sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)


def test_activations_are_those_that_autograd_keeps() -> None:
    """Against tensors that are really saved for the backward pass of the whole depth."""
    torch.manual_seed(0)
    model = Llava(CONFIG)
    activations: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            activations[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, WORK.tokens, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.decoder(x, torch.arange(WORK.tokens)[None], PackedAttention(WORK.runs, CONFIG.decoder))
    saved = sum(activations.values())
    full_activations = of(FULL).activations
    assert hidden.requires_grad and saved < full_activations < 1.5 * saved, (
        saved,
        full_activations,
    )  # measured: 1.16 of it


def test_less_is_kept_the_more_is_computed_again() -> None:
    long = dataclasses.replace(WORK, runs=(Run(1500), Run(1500)))
    kinds = ("none", "selective", "full")
    none, some, full = (measure(recipe(FULL, checkpointing=kind), CONFIG, long, "cpu") for kind in kinds)
    assert none.activations > some.activations > full.activations
    assert none.flops == pytest.approx(some.flops, rel=0.02) and full.flops > 1.2 * none.flops


def test_adapters_and_few_bits_hold_less() -> None:
    adapted = ModelConfig(CONFIG.decoder, CONFIG.vision, lora=LoraConfig(rank=4))
    bases = ("none", "int8", "nf4")
    lora, int8, nf4 = (sizes(recipe(LORA | {"base": base}), adapted, "cpu") for base in bases)
    assert lora.gradients < 0.1 * sizes(recipe(FULL), CONFIG, "cpu").gradients
    assert lora.weights > int8.weights > nf4.weights
    assert int8.parameters == lora.parameters and int8.model == lora.model


def test_operations_are_those_of_the_whole_depth() -> None:
    model = Llava(CONFIG)
    counter = FlopCounterMode(display=False)
    with counter:
        x = torch.randn(1, WORK.tokens, 64, requires_grad=True)
        model.decoder(
            x, torch.arange(WORK.tokens)[None], PackedAttention(WORK.runs, CONFIG.decoder)
        ).sum().backward()
    assert of(FULL).flops == pytest.approx(counter.get_total_flops(), rel=0.15)  # and connector, and logits


def test_a_7b_recipe_is_planned_without_its_weights() -> None:
    path = ROOT / "recipes" / "llava-1.5" / "2-lora-7b.yaml"
    estimate = plan(load_recipe(path, SHORT), path, gpu="a100-80g", rows=665_298)
    assert estimate.fits and estimate.steps == estimate.steps_per_epoch == 5_198
    assert estimate.parameters["decoder"] == pytest.approx(6.738e9, rel=1e-3)
    assert estimate.parameters["lora"] == pytest.approx(319.8e6, rel=1e-3)
    assert estimate.largest_pack is not None and estimate.largest_pack > estimate.pack_tokens
    assert any("1-align-7b.yaml" in note for note in estimate.notes)
    text = "\n".join(describe(estimate))
    assert "6738.4 M" in text and "fits" in text and "steps: 5,198" in text
    # Where rows are short, memory is foretold up to 16 times their largest pack: more may fit.
    short = dataclasses.replace(estimate, planned_pack=113, largest_pack=1792)
    assert "largest pack that fits: at least 1792 tokens" in "\n".join(describe(short))
    exact = dataclasses.replace(estimate, planned_pack=113, largest_pack=960)
    assert "largest pack that fits: 960 tokens" in "\n".join(describe(exact))
    assert json.loads(json.dumps(estimate.to_dict()))["fits"] is True
    parameters = ROOT / "recipes" / "llava-1.5" / "2-instruct-7b.yaml"
    alone = plan(load_recipe(parameters, SHORT), parameters, gpu="rtx4090")
    assert alone.fits is False and alone.largest_pack == 0 and not alone.sharded
    shared = plan(load_recipe(parameters, SHORT), parameters, gpu="a100-80g", processes=8)
    assert shared.sharded and shared.fits
    assert "does not fit, whatever the pack" in "\n".join(describe(alone))


@pytest.mark.parametrize(
    ("gpu_name", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_tells(
    monkeypatch: pytest.MonkeyPatch, gpu_name: str, name: str
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: gpu_name)
    assert peak(torch.device("cuda"), torch.bfloat16) == gpus()[name].rate * 1e12


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_a_part_of_a_gpu_and_a_slower_one_of_its_name_are_measured(name: str) -> None:
    assert gpu_of_driver(name) is None


def test_nothing_without_contents_is_left_behind() -> None:
    of(FULL)
    x = torch.randn(1, 5, 64)
    assert (
        type(
            Llava(CONFIG)
            .decoder(x, torch.arange(5)[None], PackedAttention([Run(5)], CONFIG.decoder))
            .detach()
        )
        is torch.Tensor
    )


def test_threads_on_a_busy_machine_are_told_as_training_does(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pumice.train.devices.fewer_threads", lambda threads: 1)
    recipe = load_recipe(make_recipe())
    (note,) = thread_notes("cpu")
    assert "with OMP_NUM_THREADS=1 training may be" in note
    assert plan(recipe, rows=10).notes == [note]
    assert note not in plan(recipe, rows=10, gpu="rtx4090").notes  # another machine


def test_rows_that_are_here_tell_the_steps(make_recipe: Callable[..., Path]) -> None:
    path = make_recipe()
    estimate = plan(load_recipe(path), path)
    assert (estimate.steps, estimate.steps_per_epoch, estimate.notes) == (12, 2, [])
    assert estimate.device.kind == "cpu" and estimate.seconds is not None and estimate.seconds > 0
    assert estimate.fits


def test_a_model_that_another_recipe_has_still_to_write(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_recipe("first", output="runs/first")
    monkeypatch.chdir(tmp_path)
    for model in ("runs/first/model", str(tmp_path / "runs" / "first" / "model")):
        second = make_recipe("second", model=model)
        known, missing = plan(load_recipe(second), second).notes
        assert known == f"{model} does not exist yet: its shape follows from first.yaml"
        untrained = f"{model} does not exist yet: first.yaml writes it; train that first"
        assert missing == f"the rows were not read ({untrained})"
        with pytest.raises(InputError, match=re.escape(untrained)):
            run(second)
    second = make_recipe("second", model="runs/first")
    for use in (run, lambda path: plan(load_recipe(path), path)):
        with pytest.raises(InputError, match=r"first\.yaml writes its model into runs/first/model; use that"):
            use(second)
    # What lies beside the folders of runs is made between them, such as a mean of models.
    second = make_recipe("second", model="runs/mean")
    for use in (run, lambda path: plan(load_recipe(path), path)):
        with pytest.raises(
            InputError, match=r"a step before this recipe makes it; .* of second\.yaml or check"
        ):
            use(second)


def test_memory_that_cannot_do_is_refused_before_weights_are_read(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "available_memory", lambda: 1e6)
    monkeypatch.setattr("pumice.train.loop.prepare", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(InputError, match=r"weights, gradients and optimiser take 0\.0 GB, cpu has 0\.0 GB"):
        run(make_recipe())


def test_what_nothing_is_known_of_is_refused() -> None:
    path = ROOT / "recipes" / "finetune.yaml"
    with pytest.raises(
        InputError, match=r"GPU 'abacus' are not known here; say its memory in GB with --gpu-memory"
    ):
        plan(load_recipe(path), path, gpu="abacus")
    for memory in (math.inf, math.nan, 0.0):
        with pytest.raises(InputError, match="the memory of a GPU"):
            plan(load_recipe(path), path, gpu_memory=memory)
    with pytest.raises(InputError, match="there is no"):
        shape(load_recipe(path, ["model=nowhere"]), path)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("rtx3060", "rtx3060"), ("RTX 4090", "rtx4090"), ("rtx-4070-ti", "rtx4070ti"),
        ("T4", "t4"), ("v100-32g", "v100-32g"),
        ("NVIDIA GeForce RTX 3080", "rtx3080"), ("Tesla T4", "t4"), ("A100-80G", "a100-80g"),
        ("3090", "rtx3090"), ("a100 80GB", "a100-80g"), ("RTX 3060 Ti", "rtx3060ti"), ("A6000", "rtx-a6000"),
        ("rtx3060-12gb", "rtx3060"), ("RTX 4070 Super", "rtx4070-super"), ("h100-80gb", "h100"),
        ("RTX 4060 Ti", "rtx4060ti-8g"), ("rtx4060ti 16GB", "rtx4060ti-16g"), ("H100 PCIe", "h100-pcie"),
    ],
)  # fmt: skip
def test_gpus_are_known_however_they_are_written(name: str, key: str) -> None:
    assert find_gpu(name) == key


@pytest.mark.parametrize("gpu", ["t4", "V100-32G", "RTX 2080 Ti"])
def test_what_training_refuses_is_not_planned(gpu: str) -> None:
    with pytest.raises(InputError, match="does not compute in bf16; use precision: fp32"):
        describe_device(recipe(LORA, precision="bf16"), gpu)
    plain = describe_device(recipe(LORA, precision="fp32"), gpu)
    assert describe_device(recipe(LORA, precision="tf32"), gpu) == plain  # which has no TF32


@pytest.mark.parametrize(
    ("gpu", "rate"), [("t4", 8.1), ("v100-16g", 15.7), ("a100-80g", 19.5), ("h100", 67), ("rtx3060", 12.7)]
)
def test_plain_fp32_has_its_own_rate(gpu: str, rate: float) -> None:
    """In TFLOP/s, of NVIDIA's data sheets."""
    assert describe_device(recipe(LORA), gpu).rate == pytest.approx(rate * 1e12 * GPU_UTILISATION, rel=0.03)


def test_a_gpu_that_is_not_known_goes_by_its_memory() -> None:
    with pytest.raises(InputError, match=r"GPU 'rtx3061' .*--gpu-memory, or take one like it: .*rtx3060"):
        find_gpu("rtx3061")
    with pytest.raises(InputError, match=r"take one like it: a100-80g"):  # a name that can be given
        find_gpu("a100-81g")


def test_no_name_of_a_gpu_hides_behind_a_shorter_one() -> None:
    """`peak` takes the first whose words are all in the driver's name."""
    for number, gpu in enumerate(gpus().values()):
        earlier = [other.device_name for other in list(gpus().values())[:number] if other != gpu]
        words = set(gpu.device_name.split())
        assert not any(words > set(name.split()) for name in earlier), gpu
