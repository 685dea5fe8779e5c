"""Prove on one GPU, in five minutes, what no CPU can show; one JSON line for each section.

    python benchmarks/gpu.py                        every section, at the sizes of an H100 or A100
    python benchmarks/gpu.py --only decode lora     some of them
    python benchmarks/gpu.py --small --device cpu   the same code on small models, to see that it works

Weights are random and made on the device. A line has the section, `ok` (false where a number misses its
bound), its seconds and its budget, and the numbers. A section for which five minutes do not suffice is left
out. Status 1 if a section failed. `Engine(one_call=True, graphs=True)` may become the default once this
passed on a card.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path += [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "pretend")]
from architectures import ARCHITECTURES, OurTokenizer, merged, picture, tiny
from workshop import STAGES, Workshop

from pumice.assistant import Assistant, load
from pumice.config import ConnectorConfig, DecoderConfig, LoraConfig, ModelConfig, VisionConfig
from pumice.engine import native
from pumice.engine.engine import Engine
from pumice.engine.requests import Prompt
from pumice.engine.sampling import SamplingParams
from pumice.errors import InputError, WorkError
from pumice.kernels import compute
from pumice.model.adapters import add_lora
from pumice.model.llava import Llava
from pumice.model.packed import Run
from pumice.model.quantized_base import quantize_base
from pumice.processor import Processor
from pumice.train.devices import peak
from pumice.train.features import ImageInput, TowerFeatures
from pumice.train.loop import Trainer
from pumice.train.memory import checkpoint_blocks
from pumice.train.objective import Objective, PackTensors
from pumice.train.optional import check_bitsandbytes
from pumice.train.parallel import World
from pumice.train.plan.estimate import SLACK
from pumice.train.plan.footprint import PackShape, measure
from pumice.train.recipe import Recipe
from pumice.train.setup import prepare, trainable_parameters
from pumice.train.shapes import published
from pumice.train.sizes import sizes

LIMIT = 300  # seconds of all sections
# Tokens of a pack, of each sample in it, and supervised ones of each.
PACK, SAMPLE, SUPERVISED = 8192, 1024, 160
WARM_UP = 4  # tokens of each answer before steps are timed
TINY = DecoderConfig(320, 64, 2, 4, 4, 16, 96, context=1024)
TINY_TOWER = VisionConfig("clip", 56, 32, 14, depth=3, heads=2, mlp_width=64, activation="quick_gelu")


@dataclass(frozen=True)
class Bench:
    """Where the sections run, and at which size."""

    device: torch.device
    small: bool
    folder: Path

    def llava_7b(self) -> ModelConfig:
        if self.small:
            return ModelConfig(TINY, TINY_TOWER, ConnectorConfig("mlp2x_gelu"))
        return published().llavas["liuhaotian/llava-v1.5-7b"]

    def decoder_1b(self) -> DecoderConfig:
        if self.small:
            return TINY
        # With TinyLlama's depth and vocabulary: the logits of 152,000 tokens would not fit beside the rest.
        qwen = published().decoders["Qwen/Qwen2.5-1.5B-Instruct"]
        return dataclasses.replace(qwen, depth=22, vocab_size=32000)

    @property
    def pack(self) -> int:
        return 256 if self.small else PACK

    @property
    def sample(self) -> int:
        return 64 if self.small else SAMPLE

    def free(self) -> None:
        """Free what is not used any more, and count the peak of memory from here."""
        gc.collect()  # blocks that compute again hold themselves
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], rounds: int = 3) -> float:
        """Return the time of the fastest of some calls, after one that does not count."""
        run()
        times = []
        for _ in range(1 if self.small else rounds):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        return min(times)


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


def rates(bench: Bench) -> dict[str, Any]:
    """Matrix products in TFLOP/s by type, and copies in the device's memory in GB/s."""
    size = 256 if bench.small else 8192
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(size, size, device=bench.device, dtype=dtype)
        seconds = bench.seconds(functools.partial(torch.matmul, matrix, matrix))
        found[f"products {str(dtype).partition('.')[2]}"] = 2 * size**3 / seconds / 1e12
    source = torch.empty(size * size, device=bench.device)
    target = torch.empty_like(source)
    found["copies"] = 2 * source.nbytes / bench.seconds(lambda: target.copy_(source)) / 1e9
    return found


@patch.object(compute, "compiled", lambda name: (None, ""))
@patch.object(native, "compiled", lambda name: (None, ""))
def parity(bench: Bench) -> dict[str, Any]:
    """Logits and explanations of every small architecture beside the CPU's: fp32 to 1e-4, bf16 to 3e-2.

    The share of the logits' norm. The CPU has no compiled code here: it would round activations to 8 bits.
    """
    image, worst = picture(90, 60), {"fp32": 0.0, "bf16": 0.0, "int8": 0.0, "int4": 0.0, "explain": 0.0}
    for architecture in [*ARCHITECTURES.values()][: 2 if bench.small else None]:
        parts = tiny(architecture)
        processor = Processor(parts.config, OurTokenizer(parts.tokenizer))
        expected: dict[str, Any] = {}
        for device in (torch.device("cpu"), bench.device):
            for kind in ("fp32", "bf16", "int8", "int4"):
                model = merged(parts, kind if kind.startswith("int") else None, device)
                if kind == "bf16":
                    model.to(torch.bfloat16)
                one = Assistant(model, processor, cache_tokens=1024)
                logits = one.logits(image, "What is it?").float().cpu()
                if device.type == "cpu" and kind not in expected:
                    expected[kind] = logits
                    if kind == "fp32":
                        expected["explain"] = one.explain(image, "What is it?", answer="A dog").weights
                    continue
                apart = float((logits - expected[kind]).norm() / expected[kind].norm())
                worst[kind] = max(worst[kind], apart)
                if kind == "fp32":
                    weights = one.explain(image, "What is it?", answer="A dog").weights
                    worst["explain"] = max(worst["explain"], float(abs(weights - expected["explain"]).max()))
    bounds = {"fp32": 1e-4, "bf16": 3e-2, "int8": 1e-4, "int4": 1e-4, "explain": 1e-4}
    return {"ok": all(worst[kind] <= bound for kind, bound in bounds.items()), **worst}


def stages(bench: Bench) -> dict[str, Any]:
    """Three steps of every stage with sample answers in bf16, beside the CPU's losses."""
    workshop, apart = Workshop(bench.folder / "stages"), {}
    for name in [*STAGES] if not bench.small else ["lora"]:
        losses = []
        for device in ("cpu", bench.device.type):
            events = workshop.stage(name, device, max_steps=3, precision="bf16")
            losses.append([event["loss"] for event in events if "loss" in event])
        apart[name] = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    return {"ok": max(apart.values()) <= 3e-2, **apart}


def resume(bench: Bench) -> dict[str, Any]:
    """A run with dropout, and the same resumed from the middle: equal to the bit with `deterministic`."""
    workshop = Workshop(bench.folder / "resume")
    return {"ok": workshop.resumes(bench.device.type, precision="bf16", deterministic=True)}


def fsdp(bench: Bench) -> dict[str, Any]:
    """Two steps with FSDP on a mesh of this one device, beside the same without."""
    import torch.distributed as dist

    if bench.device.type == "cuda" and not dist.is_nccl_available():
        return {"left out": "this PyTorch has no NCCL, as on the pretend device of the tests"}
    workshop, losses = Workshop(bench.folder / "fsdp"), []
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{bench.folder}/group", rank=0, world_size=1)
    try:
        for kind in ("single", "fsdp"):
            recipe = workshop.recipe(kind, bench.device.type, stage=STAGES["lora"], precision="bf16")
            world = World(kind=kind)
            torch.manual_seed(recipe.seed)  # of the new adapters
            trainer = Trainer(recipe, prepare(recipe, load_on=world.load_on), world)
            losses.append([trainer._train_step(trainer._prepare_step(step))["loss"] for step in range(2)])
    finally:
        dist.destroy_process_group()
    apart = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    return {"ok": apart <= 1e-3, "apart": apart}


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
    if find_spec("accelerate"):  # transformers' Trainer needs it
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
    while min(map(len, answers)) < WARM_UP:
        engine.step()
    bench.wait()
    start, steps = time.perf_counter(), 0
    while max(map(len, answers)) < new:  # all of them: fewer would capture another graph
        engine.step()
        steps += 1
    bench.wait()
    milliseconds = (time.perf_counter() - start) / max(steps, 1) * 1000
    while engine.step():
        pass
    one_call = engine._cache.one_call or not options
    graphs = engine._graphs is None or bool(engine._graphs._graphs)
    return milliseconds, answers, one_call and graphs


def answers(bench: Bench) -> dict[str, Any]:
    """pumice-tiny's answers about a drawn picture beside the CPU's, in fp32."""
    try:
        options: dict[str, Any] = {"quantize": None, "dtype": torch.float32, "cache_tokens": 2048}
        both = [load(device=device, **options) for device in ("cpu", bench.device.type)]
    except (InputError, WorkError) as error:  # its parts are not in the cache, and there is no network
        return {"left out": str(error)}
    image = picture(320, 240)
    questions = ["What is in the picture?", "What colour is it?"][: 1 if bench.small else 2]
    texts = [[one.ask(image, question, max_new_tokens=16) for question in questions] for one in both]
    return {"ok": texts[0] == texts[1], "answers": texts[1]}


def compiled(bench: Bench) -> dict[str, Any]:
    """A step with `compile: true`, beside the same without: the losses, and the seconds of a later step."""
    # Small: traced, but not compiled, which takes longer than all other sections.
    compile_ = functools.partial(torch.compile, backend="eager") if bench.small else torch.compile
    workshop = Workshop(bench.folder / "compiled")
    runs = {}
    for compiles in (False, True):
        changes = {"compile": compiles, "precision": "bf16", "max_steps": 3}
        with patch.object(torch, "compile", compile_):
            runs[compiles] = workshop.train(f"compile {compiles}", bench.device.type, **changes)
    losses = [[event["loss"] for event in run if "loss" in event] for run in runs.values()]
    apart = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    return {"ok": apart <= 1e-2, "apart": apart, "seconds": [run[-1]["seconds"] for run in runs.values()]}


# Each section with its budget in seconds on an H100.
SECTIONS: dict[str, tuple[Callable[[Bench], dict[str, Any]], float]] = {
    "rates": (rates, 5), "parity": (parity, 40), "stages": (stages, 40), "resume": (resume, 15),
    "fsdp": (fsdp, 15), "lora": (lora, 60), "full": (full, 25), "decode": (decode, 50),
    "answers": (answers, 15), "compiled": (compiled, 35),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small models, for a CPU")
    parser.add_argument("--only", nargs="*", choices=tuple(SECTIONS), default=[])
    arguments = parser.parse_args()
    began, failed = time.perf_counter(), False
    # Once a process has multiplied, cuBLAS does not become deterministic any more: see `resume`.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # transformers' Trainer would use all
    torch.backends.cudnn.allow_tf32 = False  # fp32 is compared with the CPU's
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(torch.device(arguments.device), arguments.small, Path(scratch))
        for name in arguments.only or SECTIONS:
            section, budget = SECTIONS[name]
            line: dict[str, Any] = {"section": name, "ok": True}
            start = time.perf_counter()
            if start - began + budget > LIMIT and not arguments.small:
                line |= {"left out": f"{LIMIT} s are nearly over"}
            else:
                try:
                    bench.free()
                    torch.manual_seed(0)
                    with contextlib.redirect_stdout(sys.stderr):  # of what libraries print
                        line |= section(bench)
                except Exception as error:
                    traceback.print_exc()
                    line |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
                line |= {"seconds": time.perf_counter() - start, "budget": budget}
            failed = failed or not line["ok"]
            print(json.dumps(line), flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
