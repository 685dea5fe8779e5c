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
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path += [str(Path(__file__).parents[1] / part) for part in ("benchmarks", "tests", "tests/pretend")]
from architectures import ARCHITECTURES, OurTokenizer, merged, picture, tiny
from gpu_large import decode, full, lora
from workshop import STAGES, Workshop

from pumice.assistant import Assistant, load
from pumice.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
from pumice.engine import native
from pumice.errors import InputError, WorkError
from pumice.kernels import compute
from pumice.processor import Processor
from pumice.train.loop import Trainer
from pumice.train.parallel import World
from pumice.train.setup import prepare
from pumice.train.shapes import published

LIMIT = 300  # seconds of all sections
PACK, SAMPLE = 8192, 1024  # tokens of a pack, and of each sample in it
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


def answers(bench: Bench) -> dict[str, Any]:
    """pumice-tiny's greedy answers about a drawn picture beside the CPU's, in fp32."""
    try:
        options: dict[str, Any] = {"quantize": None, "dtype": torch.float32, "cache_tokens": 2048}
        both = [load(device=device, **options) for device in ("cpu", bench.device.type)]
    except (InputError, WorkError) as error:  # its parts are not in the cache, and there is no network
        return {"left out": str(error)}
    image = picture(320, 240)
    questions = ["What is in the picture?", "What colour is it?"][: 1 if bench.small else 2]
    sampling = {"max_new_tokens": 16, "num_beams": 1}
    texts = [[one.ask(image, question, **sampling) for question in questions] for one in both]
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
