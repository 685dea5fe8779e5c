"""What the tests of tests/test_pretend.py measure, on the CPU and on the pretend CUDA device.

Run by run.py: cases.py FOLDER NAME ... writes FOLDER/NAME.json for each case, or FOLDER/NAME.error.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import architectures
import cuda
import numpy as np
import torch
import torch.nn.functional as F
from workshop import STAGES, Workshop

from pumice.assistant import load
from pumice.config import VisionConfig
from pumice.engine import graphs, native
from pumice.engine.engine import Engine
from pumice.engine.requests import Prompt
from pumice.engine.sampling import SamplingParams
from pumice.kernels import compute
from pumice.model.cache import KVCache, Segment
from pumice.model.llava import make_tower
from pumice.model.packed import Run
from pumice.model.varlen import is_recent
from pumice.train import checkpoint, devices, loop
from pumice.train.objective import PackTensors
from pumice.train.setup import prepare

devices.TIMED_SIZE["cuda"] = 64
# These cases share a process, and some of them are deterministic.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def stage(name: str) -> Callable[[Workshop], dict[str, Any]]:
    """Two steps of a stage with held-out rows and sample answers, on both devices."""

    def case(workshop: Workshop) -> dict[str, Any]:
        return {device: workshop.stage(name, device, measure_rows=2) for device in ("cpu", "cuda")}

    return case


def resume(workshop: Workshop) -> dict[str, Any]:
    """A run with dropout in tf32, and the same resumed from the middle. What lives beside the parameters."""
    alive: list[int] = []

    class Watched(loop.Trainer):
        def _train_step(self, prepared: Any) -> dict[str, Any]:
            gc.collect()
            alive.append(sum(isinstance(thing, checkpoint.Checkpoint) for thing in gc.get_objects()))
            return super()._train_step(prepared)

    return {"equal": workshop.resumes("cuda", Watched, precision="tf32"), "alive": alive}


def precision(workshop: Workshop) -> dict[str, Any]:
    """What cuDNN, matrix products and deterministic algorithms are allowed during a run, and after it."""
    seen: dict[str, Any] = {}

    def flags() -> list[Any]:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return [torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), deterministic]

    class Watched(loop.Trainer):
        def _train_step(self, prepared: Any) -> dict[str, Any]:
            seen[self.recipe.name] = flags()
            return super()._train_step(prepared)

    torch.backends.cudnn.allow_tf32 = True
    for name in ("fp32", "tf32"):
        changes = {"precision": name, "max_steps": 1, "deterministic": name == "tf32"}
        loop.train(workshop.recipe(name, "cuda", **changes), Watched)
    return seen | {"after": flags()}


def attention_calls(workshop: Workshop) -> dict[str, Any]:
    """Calls of the variable-length kernel in a pack's forward and backward pass; losses beside the CPU's."""
    models = {"plain": {}, "qk_norm": {"qk_norm": True}, "window": {"sliding_window": 20}}
    results: dict[str, Any] = {}
    for name, fields in models.items():
        for kind in ("none", "selective", "full") if name == "plain" else ("none",):
            losses = {}
            for device in ("cpu", "cuda"):
                changes = {"model": str(workshop.model(**fields)), "precision": "bf16", "checkpointing": kind}
                trainer = workshop.trainer(f"{name}-{kind}", device, **changes)
                [pack, *_] = trainer._prepare_step(0).packs
                with cuda.watch():
                    loss = trainer.objective(pack)
                    loss.backward()
                losses[device] = loss.item() / pack.supervised
                norm = torch.stack([p.grad.float().norm() for p in trainer.trainable.values()]).norm()
                losses[f"{device} gradient"] = norm.item()
            branches = sum(bool(run.before) for run in pack.runs)
            results[f"{name} {kind}"] = {"calls": len(cuda.attention), "branches": branches, **losses}
    return results


def waits(workshop: Workshop) -> dict[str, Any]:
    """How often the host waits in a pack, with 2 and with 4 blocks, and in a tower with shared positions."""
    results: dict[str, Any] = {}

    def listed(seen: Counter[tuple[str, str]]) -> list[list[Any]]:
        return [[*map(str, where), count] for where, count in seen.items()]

    for name in ("full", "lora"):
        for depth in (2, 4):
            changes = {"model": str(workshop.model(depth=depth)), "precision": "bf16", "stage": STAGES[name]}
            changes["checkpointing"] = "full"
            trainer = workshop.trainer(f"waits-{name}-{depth}", "cuda", **changes)
            [pack, *_] = trainer._prepare_step(0).packs
            trainer.objective(pack).backward()
            with cuda.watch() as seen:
                trainer.objective(pack).backward()
            results[f"{name} {depth}"] = listed(seen)
    vision = VisionConfig(
        "siglip", 38, 8, 2, depth=1, heads=1, mlp_width=8, activation="gelu_tanh", layer=-1, select="full",
        fractional=True,
    )  # fmt: skip
    tower = make_tower(vision).to("cuda")
    assert tower.position_ids is not None
    pixels = torch.zeros(1, 3, 38, 38, device="cuda")
    with cuda.watch() as seen:
        tower(pixels)
    return results | {"tower": listed(seen)}


@patch.object(compute, "compiled", lambda name: (None, ""))
@patch.object(native, "compiled", lambda name: (None, ""))
def answers(workshop: Workshop) -> dict[str, Any]:
    """Answers, sampled answers and explanations of every small architecture on both devices.

    Without compiled code, which rounds activations to 8 bits where weights are in few bits; a GPU does not.
    """
    results: dict[str, Any] = {}
    image = architectures.picture(90, 60)
    for name, architecture in architectures.ARCHITECTURES.items():
        parts = architectures.tiny(architecture)
        for bits in (None, "int8", "int4") if "pad" in name or "Qwen2" in name else (None,):
            found: dict[str, Any] = {}
            for device in ("cpu", "cuda"):
                processor = architectures.Processor(parts.config, architectures.OurTokenizer(parts.tokenizer))
                model = architectures.merged(parts, bits, device)
                one = architectures.Assistant(model, processor, cache_tokens=2048)
                questions = [(image, "What?"), (None, "Who is there?"), ([image, image], "Which?")]
                found[device] = {
                    "answers": one.ask_many(questions, max_new_tokens=6),
                    "sampled": one.ask(image, "What?", max_new_tokens=6, temperature=0.8, top_p=0.9, seed=5),
                    "logits": one.logits(image, "What?").cpu().flatten()[::97].tolist(),
                    "weights": one.explain(image, "What?", answer="A dog").weights.ravel()[::7].tolist(),
                }
            results[f"{name} {bits}"] = found
    return results


@patch.object(compute, "compiled", lambda name: (None, ""))
@patch.object(native, "compiled", lambda name: (None, ""))
def quantised(workshop: Workshop) -> dict[str, Any]:
    """A model that is opened in few bits: its bytes, what moved to the device for them, and its logits."""
    results: dict[str, Any] = {}
    image, path = architectures.picture(60, 60), workshop.model(width=64)
    for bits in ("int8", "int4"):
        for device in ("cpu", "cuda"):
            cuda.moved_bytes[0] = 0
            one = load(path, device=device, quantize=bits, dtype=torch.float32, cache_tokens=512)
            found = {"bytes": one.model.sizes()[0], "moved": cuda.moved_bytes[0]}
            found["devices"] = sorted(
                {str(t.device) for t in [*one.model.parameters(), *one.model.buffers()]}
            )
            results[f"{bits} {device}"] = found | {
                "logits": one.logits(image, "What?").cpu().flatten().tolist()
            }
    default = load(path, device="cuda", quantize="int8", cache_tokens=512)
    decoder = default.model.decoder
    tied = decoder.config.tied_head and decoder.head is None  # the embedding is the projection, held once
    return results | {"dtypes": [str(decoder.dtype), str(decoder.embed.dtype)], "tied": tied}


class Capture:
    """Stands for CUDA graphs, which need a GPU: runs a step again where a graph is replayed."""

    def __init__(self, add: float = 0.0) -> None:
        """add: to the logits of a replay, as of a graph that is wrong."""
        self.add, self.captured, self.replays = add, list[int](), 0
        self.devices: set[int] = set()

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        self.devices.add(cuda.current[0])
        out = run()
        self.captured.append(len(out))

        def replay() -> None:
            self.replays += 1
            out.copy_(run() + self.add)

        return replay, out


def decode(workshop: Workshop) -> dict[str, Any]:
    """Answers of the engine in bf16: one call of attention a layer, one for each request, and by graphs."""
    results: dict[str, Any] = {}
    kinds: dict[str, dict[str, Any]] = {"calls": {}, "one call": {"one_call": True}}
    kinds["graphs"] = kinds["wrong graphs"] = kinds["no graphs"] = {"one_call": True, "graphs": True}
    really_capture = graphs.capture
    for name, fields in {"plain": {}, "window": {"sliding_window": 24}}.items():
        model = prepare(workshop.recipe("decode", "cuda", model=str(workshop.model(**fields)))).model
        model = model.bfloat16().eval()
        # A stop token that is drawn by chance would change the steps.
        model.config = dataclasses.replace(model.config, stop_token_ids=())
        for kind, options in kinds.items():
            # PyTorch without CUDA refuses to capture.
            capture = Capture(1.0 if kind == "wrong graphs" else 0.0)
            graphs.capture = really_capture if kind == "no graphs" else capture
            engine = Engine(model, slots=8, cache_tokens=8 * 256, **options)
            texts: list[list[int]] = [[] for _ in range(8)]
            for number, tokens in enumerate(texts):
                ids, new = torch.arange(3 + 5 * number) % 200 + 1, 8 - number % 3
                params = SamplingParams(max_new_tokens=new, temperature=0.7 * (number % 2), top_p=0.9, seed=1)
                engine.submit(Prompt(ids, params=params), lambda delta, to=tokens: to.extend(delta.tokens))
            cuda.current[0] = 1  # of a thread that knows nothing of the model
            for _ in range(6):
                engine.step()
            with cuda.watch() as seen:
                engine.step()
            calls, counted = len(cuda.attention), Counter(seen)
            while engine.step():
                pass
            cuda.current[0] = 0
            results[f"{name} {kind}"] = {
                "texts": texts, "calls": calls, "waits": [[*map(str, w), n] for w, n in counted.items()],
                "devices": [*capture.devices], "captured": capture.captured, "replays": capture.replays,
                "steps": engine.stats().steps,
            }  # fmt: skip
    return results


def unproven(workshop: Workshop) -> dict[str, Any]:
    """Steps of one request by a graph, the first one with logits that are not finite."""
    decoder = prepare(workshop.recipe("unproven", "cuda")).model.decoder.bfloat16().eval()
    cache = KVCache(decoder.config, 256, torch.device("cuda"), torch.bfloat16, one_call=True)
    capture, weight, results = Capture(), decoder.norm.weight.clone(), list[str]()
    with patch.object(graphs, "capture", capture), torch.no_grad():
        decode_graphs = graphs.DecodeGraphs(decoder, cache)
        for token, spoiled in enumerate((True, False, False)):
            decoder.norm.weight.fill_(torch.nan) if spoiled else decoder.norm.weight.copy_(weight)
            logits = decode_graphs.logits(np.array([token]), [Segment(range(cache.blocks), token, 1)])
            results.append("none" if logits is None else f"finite: {bool(logits.isfinite().all())}")
    return {"logits": results, "captured": capture.captured, "replays": capture.replays}


class Even:
    """A constraint: even tokens."""

    def __init__(self, vocabulary: int) -> None:
        self.mask = torch.arange(vocabulary) % 2 == 0

    def allowed(self) -> torch.Tensor:
        return self.mask

    def accept(self, token: int) -> None:
        assert token % 2 == 0


def choosing(workshop: Workshop) -> dict[str, Any]:
    """Answers under penalties and constraints, and how often a step of the engine waits for them."""
    results: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        model = prepare(workshop.recipe("choosing", device)).model.eval()
        engine = Engine(model, slots=4, cache_tokens=512)
        texts: list[list[int]] = [[] for _ in range(4)]
        for number, tokens in enumerate(texts):
            params = SamplingParams(
                max_new_tokens=6, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2,
                temperature=0.7 * (number % 2), seed=number,
            )  # fmt: skip
            even = functools.partial(Even, model.config.decoder.vocab_size)
            prompt = Prompt(torch.arange(3 + number), params=params, constraint=even)
            engine.submit(prompt, lambda delta, to=tokens: to.extend(delta.tokens))
        engine.step()
        with cuda.watch() as seen:
            engine.step()
        results[device] = {"waits": [[*map(str, where), count] for where, count in seen.items()]}
        while engine.step():
            pass
        results[device]["texts"] = texts
    return results


def full_gpu(workshop: Workshop) -> dict[str, Any]:
    """Training with sample answers where the driver has no free memory: PyTorch keeps what was freed."""
    with patch.object(cuda, "free_bytes", [10**3]), patch.object(cuda, "kept_bytes", [10**9]):
        events = workshop.stage("full", "cuda", measure_rows=2)
    return {"answers": sum("answer" in event for event in events)}


def no_flash(workshop: Workshop) -> dict[str, Any]:
    """Calls of the variable-length kernel with a PyTorch that was built without it."""
    trainer = workshop.trainer("no-flash", "cuda", precision="bf16")
    [pack, *_] = trainer._prepare_step(0).packs
    with patch.object(cuda, "flash_attention", [False]), cuda.watch():
        trainer.objective(pack).backward()
        engine = Engine(trainer.model.bfloat16(), cache_tokens=512, one_call=True)
    return {"calls": len(cuda.attention), "one call": engine._cache.one_call}


def shared_heads(workshop: Workshop) -> dict[str, Any]:
    """Calls of PyTorch's attention on the device, with fewer key heads than query heads, or as many."""
    attend, calls = F.scaled_dot_product_attention, Counter[str]()

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        calls["equal" if q.shape[1] == k.shape[1] else "fewer"] += q.is_cuda
        return attend(q, k, v, **options)

    with patch.object(F, "scaled_dot_product_attention", watched):
        workshop.stage("full", "cuda", measure_rows=2, model=str(workshop.model(kv_heads=2)))
    return {"equal": calls["equal"], "fewer": calls["fewer"]}


def late(workshop: Workshop) -> dict[str, Any]:
    """A deterministic run in a process that has multiplied before, when cuBLAS was not told of it."""
    with patch.object(cuda, "cublas_setting", [None]):
        try:
            workshop.train("late", "cuda", deterministic=True)
        except ValueError as error:
            return {"message": str(error)}
    return {"message": "not refused"}


def old_gpu(workshop: Workshop) -> dict[str, Any]:
    """What a GPU before Ampere, and one with little memory, refuse before anything is loaded."""
    cuda.properties.major, cuda.properties.minor, cuda.properties.name = 7, 5, "Tesla T4"
    is_recent.cache_clear()  # earlier cases asked, of another GPU
    messages: dict[str, Any] = {}

    def refused(name: str, run: Callable[[], Any]) -> None:
        try:
            messages[name] = f"not refused: {run()}"
        except ValueError as error:
            messages[name] = str(error)

    path = workshop.model()
    refused("recipe", lambda: workshop.train("old", "cuda", precision="bf16"))
    refused("load", lambda: load(path, device="cuda", quantize=None, dtype=torch.bfloat16))
    messages["dtype"] = str(load(path, device="cuda", quantize=None).model.dtype)
    refused("cache_tokens", lambda: load(path, device="cuda", quantize=None, cache_tokens=10**9))
    model = prepare(workshop.recipe("small", "cuda")).model
    engine = Engine(model)
    messages["sizes"] = [engine.cache_tokens, engine._scheduler.chunk]
    cuda.free_bytes[0] = 10**5
    refused("cache", lambda: Engine(model))
    return messages


def dummy(workshop: Workshop) -> dict[str, Any]:
    """A pack without anything to learn from, in a stage whose tower learns."""
    trainer = workshop.trainer("dummy", "cuda", stage=STAGES["tower"], precision="bf16")
    trainer.objective.use_all_parts = True
    loss = trainer.objective(PackTensors.dummy())
    loss.backward()
    one = PackTensors.dummy()
    text = dataclasses.replace(
        one, input_ids=torch.arange(6), positions=torch.arange(6), runs=[Run(6)], sources=torch.arange(3),
        targets=torch.arange(3), weights=torch.ones(3),
    )  # fmt: skip
    return {
        "loss": loss.item(),
        "without gradient": sum(p.grad is None for p in trainer.trainable.values()),
        "text": trainer.objective(text).item(),
    }


CASES: dict[str, Callable[[Workshop], dict[str, Any]]] = {
    **{f"stage-{name}": stage(name) for name in STAGES},
    "resume": resume, "precision": precision, "attention": attention_calls, "waits": waits,
    "answers": answers, "decode": decode, "unproven": unproven, "choosing": choosing, "full_gpu": full_gpu,
    "quantised": quantised, "no_flash": no_flash, "shared_heads": shared_heads, "late": late, "dummy": dummy,
    "old_gpu": old_gpu,
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in sys.argv[2:] or CASES:
        try:
            result = CASES[name](Workshop(folder / name))
            (folder / f"{name}.json").write_text(json.dumps(result))
        except Exception:
            (folder / f"{name}.error").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
