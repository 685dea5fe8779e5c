"""What the tests of tests/test_pretend.py measure, on the CPU and on the pretend CUDA device.

Run by run.py: cases.py FOLDER NAME ... writes FOLDER/NAME.json for each case, or FOLDER/NAME.error.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import architectures
import cuda
import torch
from workshop import STAGES, Workshop

from pumice.assistant import load
from pumice.engine import graphs, native
from pumice.engine.engine import Engine
from pumice.engine.requests import Prompt
from pumice.engine.sampling import SamplingParams
from pumice.kernels import compute
from pumice.model.packed import Run
from pumice.train import checkpoint, devices, loop
from pumice.train.objective import PackTensors
from pumice.train.setup import prepare

devices.TIMED_SIZE["cuda"] = 64


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
    """How often the host waits in one pack, with 2 and with 4 blocks."""
    results: dict[str, Any] = {}
    for name in ("full", "lora"):
        for depth in (2, 4):
            changes = {"model": str(workshop.model(depth=depth)), "precision": "bf16", "stage": STAGES[name]}
            changes["checkpointing"] = "full"
            trainer = workshop.trainer(f"waits-{name}-{depth}", "cuda", **changes)
            [pack, *_] = trainer._prepare_step(0).packs
            trainer.objective(pack).backward()
            with cuda.watch() as seen:
                trainer.objective(pack).backward()
            results[f"{name} {depth}"] = [[*map(str, where), count] for where, count in seen.items()]
    return results


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


class Capture:
    """Stands for CUDA graphs, which need a GPU: runs a step again where a graph is replayed."""

    def __init__(self, add: float = 0.0) -> None:
        """add: to the logits of a replay, as of a graph that is wrong."""
        self.add, self.captured, self.replays = add, list[int](), 0

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
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
            for _ in range(6):
                engine.step()
            with cuda.watch() as seen:
                engine.step()
            calls, counted = len(cuda.attention), Counter(seen)
            while engine.step():
                pass
            results[f"{name} {kind}"] = {
                "texts": texts, "calls": calls, "waits": [[*map(str, w), n] for w, n in counted.items()],
                "captured": capture.captured, "replays": capture.replays, "steps": engine.stats().steps,
            }  # fmt: skip
    return results


def old_gpu(workshop: Workshop) -> dict[str, Any]:
    """What a GPU before Ampere, and one with little memory, refuse before anything is loaded."""
    cuda.properties.major, cuda.properties.minor, cuda.properties.name = 7, 5, "Tesla T4"
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
    "answers": answers, "decode": decode, "dummy": dummy, "old_gpu": old_gpu,
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
