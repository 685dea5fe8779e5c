"""Sections of gpu.py on random models of LLaVA's sizes: adapters, whole training steps, decoding."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pumice.config import ConnectorConfig, DecoderConfig, LoraConfig, ModelConfig, VisionConfig
from pumice.engine.engine import Engine
from pumice.engine.params import SamplingParams
from pumice.engine.requests import Prompt
from pumice.errors import InputError, WorkError
from pumice.model.adapters import add_lora
from pumice.model.llava import Llava
from pumice.model.packed import Run
from pumice.model.quantized_base import quantize_base
from pumice.train.devices import peak
from pumice.train.features import ImageInput, TowerFeatures
from pumice.train.memory import checkpoint_blocks
from pumice.train.objective import Objective, PackTensors
from pumice.train.plan.estimate import SLACK
from pumice.train.plan.footprint import PackShape, measure
from pumice.train.preflight import check_bitsandbytes
from pumice.train.recipe import Recipe
from pumice.train.setup import trainable_parameters
from pumice.train.sizes import sizes

if TYPE_CHECKING:
    from gpu import Bench

SUPERVISED = 160  # tokens of each sample that have a loss
WARM_UP = 4  # tokens of each answer before steps are timed


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Llava:
    """Return a model whose weights are drawn on the device, small enough that activations stay finite."""
    with torch.device("meta"):
        model = Llava(config)
    model = model.to(dtype).to_empty(device=device)
    for name, tensor in model.state_dict().items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.02)
    return model.requires_grad_(False).eval()


def _pack(bench: Bench, config: ModelConfig) -> tuple[PackTensors, PackShape]:
    """Return a full pack of samples with a picture each."""
    count, image = bench.pack // bench.sample, config.image_tokens
    text = torch.randint(1, 300, (bench.sample - image,))
    ids = torch.cat([torch.full((image,), -200), text]).repeat(count)
    supervised = 16 if bench.small else SUPERVISED
    ends = torch.arange(1, count + 1)[:, None] * bench.sample - supervised - 1 + torch.arange(supervised)
    sources = ends.flatten()
    side = config.vision.image_size
    pack = PackTensors(
        input_ids=ids, positions=torch.arange(bench.sample).repeat(count), runs=[Run(bench.sample)] * count,
        sources=sources, targets=ids[sources].clamp(min=0), weights=torch.ones(len(sources)),
        images=[ImageInput(None, torch.randn(1, 3, side, side), None)] * count, layouts=(),
    )  # fmt: skip
    return pack, PackShape(tuple(pack.runs), count, count * image, len(sources))


def _lora_recipe(bench: Bench, base: str) -> Recipe:
    fields = {"rank": 4, "alpha": 8.0} if bench.small else {"rank": 128, "alpha": 256.0}
    stage = {"learn": {"connector": 2e-5, "lora": 2e-4}, "lora": fields, "base": base}
    return Recipe.model_validate(
        {"name": "lora", "output": "o", "model": "m", "data": [{"rows": "r"}], "stage": stage}
        | {"checkpointing": "full", "pack_tokens": bench.pack}
    )


def _adapters(bench: Bench, recipe: Recipe) -> dict[str, float]:
    """A step of a 7B's LoRA: rows a second, share of the peak, memory beside `plan`."""
    assert recipe.stage.lora is not None
    adapters, base = LoraConfig(**recipe.stage.lora.model_dump()), recipe.stage.base
    config = dataclasses.replace(bench.llava_7b(), lora=adapters)
    # 1. The model as `prepare` sets it up.
    model = random_model(dataclasses.replace(config, lora=None), bench.device, torch.bfloat16)
    add_lora(model.decoder, adapters)
    model.config = config
    if base != "none":
        quantize_base(model.decoder, base, bench.device)
    learning = [*trainable_parameters(model, recipe.stage.learn).values()]
    for parameter in learning:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    checkpoint_blocks(model.decoder.blocks, "full")
    objective = Objective(model.train(), TowerFeatures(model, nn.Identity(), None, False), bf16=True)
    optimizer = torch.optim.AdamW(learning, fused=True)
    pack, shape = _pack(bench, config)
    bench.free()

    # 2. A step of two packs. Whole weights that were quantised on the device are gone.
    def step() -> None:
        for _ in range(2):
            (objective(pack) / len(pack.targets)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = bench.seconds(step, rounds=1) / 2
    # 3. Beside the peak of products, with 4 FLOPs a weight and token, and beside the plan.
    layers = [layer for layer in model.decoder.blocks.modules() if hasattr(layer, "in_features")]
    flops = 4 * bench.pack * sum(layer.in_features * layer.out_features for layer in layers)
    share = flops / seconds / peak(bench.device, torch.bfloat16)
    used = torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else 0
    footprint, held = measure(recipe, config, shape, "cuda"), sizes(recipe, config, "cuda")
    planned = held.model_states + footprint.activations * SLACK["cuda"] + footprint.tower_pass
    return {
        "rows/s": len(pack.images) / seconds, "share of peak": share, "GB": used / 1e9,
        "planned GB": planned / 1e9,
    }  # fmt: skip


def lora(bench: Bench) -> dict[str, Any]:
    """LoRA of a 7B on whole, int8 and nf4 weights. The plan must be within 10 % of the memory."""
    found: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for base in ("none", "int8", "nf4"):
        recipe = _lora_recipe(bench, base)
        try:
            check_bitsandbytes(recipe)
        except InputError as error:
            left_out[f"{base} left out"] = str(error)
            continue
        bench.free()
        found[base] = _adapters(bench, recipe)
    pairs = [(one["planned GB"], one["GB"]) for one in found.values()]
    fits = bench.small or all(abs(plan - used) <= 0.1 * used for plan, used in pairs)
    return {"ok": fits, **found, **left_out}


def _llama(config: DecoderConfig, bench: Bench, dtype: torch.dtype) -> Any:
    """Return transformers' Llama of the same sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, num_hidden_layers=config.depth,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
        intermediate_size=config.mlp_width, max_position_embeddings=config.context,
        tie_word_embeddings=config.tied_head,
    )  # fmt: skip
    with torch.device(bench.device):
        return LlamaForCausalLM(llama).to(dtype)


def _trainer_seconds(bench: Bench, model: nn.Module, ids: Tensor) -> float:
    """Return the time of the faster of two steps of transformers' Trainer on rows of tokens, after one."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            bench.wait()
            ends.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(bench.folder / "trainer"), per_device_train_batch_size=len(ids), max_steps=3,
        max_grad_norm=0.0, bf16=True, optim="adamw_torch_fused", save_strategy="no", logging_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=bench.device.type == "cpu",
    )  # fmt: skip
    rows: Any = [{"input_ids": row, "labels": row} for row in ids] * 3
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return min(end - start for start, end in itertools.pairwise(ends))


def full(bench: Bench) -> dict[str, Any]:
    """A full step of a model of 1.1B on text, beside transformers' Trainer on the same tokens."""
    decoder = bench.decoder_1b()
    config = ModelConfig(decoder, VisionConfig("none", width=decoder.width), ConnectorConfig("identity"))
    count = bench.pack // bench.sample
    ids = torch.randint(1, 300, (count, bench.sample))
    rates_of: dict[str, Any] = {}
    model = random_model(config, bench.device, torch.float32).train().requires_grad_(True)
    objective = Objective(model, TowerFeatures(model, nn.Identity(), None, False), bf16=True)
    sources = torch.arange(bench.pack).view(count, -1)[:, :-1].flatten()
    pack = PackTensors(
        input_ids=ids.flatten(), positions=torch.arange(bench.sample).repeat(count),
        runs=[Run(bench.sample)] * count, sources=sources, targets=ids.flatten()[sources + 1],
        weights=torch.ones(len(sources)), images=(), layouts=(),
    )  # fmt: skip

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        (objective(pack) / len(sources)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    rates_of["pumice tokens/s"] = bench.pack / bench.seconds(step, rounds=2)
    if find_spec("transformers") and find_spec("accelerate"):  # its Trainer needs both
        del model, objective, optimizer
        bench.free()
        seconds = _trainer_seconds(bench, _llama(decoder, bench, torch.float32), ids)
        rates_of["transformers tokens/s"] = bench.pack / seconds
    return rates_of


def decode(bench: Bench) -> dict[str, Any]:
    """Prefill, and decode at 1 and 32: with calls of attention, one call, and graphs, beside `generate`."""
    # Without a token that ends an answer early: weights are random.
    config, new = dataclasses.replace(bench.llava_7b(), stop_token_ids=()), 8 if bench.small else 64
    length, found, many = 2 * bench.sample, dict[str, Any](), 8 if bench.small else 32
    model = random_model(
        config, bench.device, torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    )
    kinds: dict[str, dict[str, bool]] = {"calls": {}, "one call": {"one_call": True}}
    kinds["graphs"] = {"one_call": True, "graphs": True}
    texts: dict[str, list[list[int]]] = {}
    refused: list[str] = []
    for kind, options in kinds.items():
        for batch in (1, many):
            bench.free()
            milliseconds, texts[kind], as_asked = _decode(bench, model, batch, new, options)
            found[f"ms a step at {batch}, {kind}"] = milliseconds
            refused += [] if as_asked else [f"{kind} at {batch}"]
    ids = torch.arange(length, device=bench.device)[None] % 300 + 1
    with torch.inference_mode():
        found["prefill tokens/s"] = length / bench.seconds(lambda: model(ids))
    if find_spec("transformers"):
        del model
        bench.free()
        other = _llama(config.decoder, bench, torch.bfloat16).eval()
        for batch in (1, many):
            prompts = (torch.arange(64, device=bench.device) % 300 + 1).expand(batch, -1)
            length_of = {"min_new_tokens": new, "max_new_tokens": new}
            generate = functools.partial(
                other.generate, prompts, do_sample=False, pad_token_id=0, **length_of
            )
            found[f"ms a step at {batch}, generate"] = bench.seconds(generate, rounds=1) / new * 1000
    # Random weights have near ties, which rounding decides. A decoder of 32 blocks gave the same first two
    # tokens 23 times of 32 when attention was changed by 2**-9; with a wrong kernel it would not once.
    alike = {
        kind: sum(a[:2] == b[:2] for a, b in zip(texts["calls"], texts[kind], strict=True))
        for kind in ("one call", "graphs")
    }
    right = min(alike.values()) >= 0.4 * many and (bench.small or not refused)
    return {"ok": right, "alike": alike, "refused": refused, **found}


def _decode(
    bench: Bench, model: Llava, batch: int, new: int, options: dict[str, bool]
) -> tuple[float, list[list[int]], bool]:
    """Return the milliseconds of a step of `batch` answers of `new` tokens, and the answers.

    And whether they came as `options` ask: the engine goes on without what is not right here.
    """
    engine = Engine(model, slots=batch, cache_tokens=batch * (256 + new), prefix_cache=False, **options)
    answers: list[list[int]] = [[] for _ in range(batch)]
    for number, answer in enumerate(answers):
        prompt = Prompt(torch.arange(64 + number) % 300 + 1, params=SamplingParams(max_new_tokens=new))
        engine.submit(prompt, lambda delta, to=answer: to.extend(delta.tokens))
    # The first steps do not count: they load kernels, and capture a graph.
    while min(map(len, answers)) < WARM_UP and engine.step():
        pass
    bench.wait()
    start, steps = time.perf_counter(), 0
    # Only while all are there: fewer would capture another graph.
    while max(map(len, answers)) < new and engine.step():
        steps += 1
    bench.wait()
    milliseconds = (time.perf_counter() - start) / max(steps, 1) * 1000
    while engine.step():
        pass
    if min(map(len, answers)) < new:
        raise WorkError(f"an answer ended after {min(map(len, answers))} tokens of {new}")
    one_call = engine._cache.one_call or not options
    graphs = engine._graphs is None or bool(engine._graphs._graphs)
    return milliseconds, answers, one_call and graphs
