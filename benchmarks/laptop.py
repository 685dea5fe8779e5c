"""A LLaVA of the sizes that people have, on a CPU: Pumice beside llama.cpp, the same random weights in both.

    python benchmarks/laptop.py [--size tiny|1b|3b|7b] [--rounds 3] [--prompt 600] [--new 32] [--keep FOLDER]

It makes a random LLaVA-1.5 (CLIP-L/336, two-layer connector, a llama) in a temporary folder and imports it
with --quantize int8 and int4. llama.cpp gets the same blocks as GGUF: Q8_0, and Q4_K with Q8_0 for the
vocabulary, from `pumice export --type keep`. It is that of the package xllamacpp, which is prebuilt for AVX2.

Each measurement is a process of its own, contenders take turns, and all have the same threads. Shown are
medians and ranges, and at the end Pumice's medians over llama.cpp's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.storage.parts import LoadedParts

# width, depth, heads, kv_heads, mlp_width
SIZES = {
    "tiny": (512, 4, 8, 8, 1536),
    "1b": (2048, 22, 32, 4, 5632),
    "3b": (3072, 28, 24, 8, 8192),
    "7b": (4096, 32, 32, 32, 11008),
}
BITS = ("int8", "int4")
KEYS = ("open", "peak", "picture", "again", "prefill", "decode")
UNITS = {
    "open": "s", "peak": "GB", "picture": "s to the first word", "again": "s to the first word",
    "prefill": "tokens/s", "decode": "tokens/s",
}  # fmt: skip


def make(folder: Path, size: str) -> Path:
    """The random model in fp16; one tensor at a time is in memory."""
    import torch

    from pumice.formats.load import shapes
    from pumice.formats.pumice.folder import save
    from pumice.formats.read import read_model
    from pumice.storage.tensors import LazyTensor

    target = folder / "fp16"
    if target.exists():
        return target
    tiny = read_model("pumice-tiny")
    width, depth, heads, kv_heads, mlp_width = SIZES[size]
    decoder = DecoderConfig(
        vocab_size=tiny.config.decoder.vocab_size, width=width, depth=depth, heads=heads, kv_heads=kv_heads,
        head_dim=width // heads, mlp_width=mlp_width, context=4096,
    )  # fmt: skip
    vision = VisionConfig(
        kind="clip", image_size=336, width=1024, stride=14, depth=24, heads=16, mlp_width=4096
    )
    config = ModelConfig(
        decoder=decoder, vision=vision, connector=ConnectorConfig(), image=ImagePolicy(),
        template=tiny.config.template, stop_token_ids=tiny.config.stop_token_ids,
    )  # fmt: skip

    def tensor(name: str, shape: tuple[int, ...]) -> LazyTensor:
        def fetch(dtype: torch.dtype) -> torch.Tensor:
            generator = torch.Generator().manual_seed(len(name) + shape[0])
            values = torch.empty(shape).normal_(0, shape[-1] ** -0.5, generator=generator)
            return (values if len(shape) > 1 else values + 1).to(dtype)

        return LazyTensor(shape, torch.float16, fetch)

    state = {name: tensor(name, shape) for name, shape in shapes(config).items()}
    save(target, config, state, tokenizer=tiny.tokenizer.to_str())
    return target


def prepare(folder: Path, size: str) -> None:
    """Quantised folders and GGUF files."""
    from pumice.formats.export import export
    from pumice.formats.import_ import import_model
    from pumice.formats.read import read_model

    source = make(folder, size)
    for bits in BITS:
        if not (folder / bits).exists():
            start = time.perf_counter()
            import_model(str(source), folder / bits, quantize=bits)
            taken, size_gb = time.perf_counter() - start, held(folder / bits) / 1e9
            print(f"import --quantize {bits}: {taken:.1f} s, {size_gb:.2f} GB", file=sys.stderr)
        if not (folder / f"{bits}-gguf").exists():
            export(language_alone(read_model(folder / bits)), "gguf", folder / f"{bits}-gguf", kind="keep")


def language_alone(model: LoadedParts) -> LoadedParts:
    """llama.cpp reads the language model from a file of its own."""
    vision = VisionConfig(kind="none", width=model.config.decoder.width)
    config = replace(model.config, vision=vision, connector=ConnectorConfig("identity"))
    state = {name: tensor for name, tensor in model.state.items() if name.startswith("decoder.")}
    return replace(model, config=config, state=state)


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def pumice(folder: Path, prompt: int, new: int, threads: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    import numpy as np
    from PIL import Image

    import pumice as package
    from pumice.conversation import Conversation, user_message
    from pumice.engine.requests import Prompt
    from pumice.engine.sampling import SamplingParams

    _ = package.load
    start = time.perf_counter()
    assistant = package.load(folder, device="cpu")
    figures = {"open": time.perf_counter() - start}
    object.__setattr__(assistant.model.config, "stop_token_ids", ())

    def first(question: str, picture: Image.Image) -> float:
        started = time.perf_counter()
        asked = Conversation((user_message(question, [picture]),))
        reply = assistant.stream(asked, max_new_tokens=2)
        next(reply, None)
        while not reply.tokens:
            next(reply, None)
        taken = time.perf_counter() - started
        reply.close()
        return taken

    def timed(ids: list[int], count: int) -> tuple[float, float]:
        """Seconds to the first token, and of each further one."""
        times: list[float] = []
        asked = Prompt(torch.tensor(ids), params=SamplingParams(max_new_tokens=count))
        started = time.perf_counter()
        assistant.engine.submit(asked, lambda delta: times.append(time.perf_counter()))
        while assistant.engine.step():
            pass
        return times[0] - started, (times[-1] - times[0]) / max(1, len(times) - 1)

    pick = random.Random(os.getpid())
    ids = [pick.randrange(100, 40_000) for _ in range(prompt)]
    timed(ids[:20], 2)  # memory and threads are there
    figures["prefill"] = prompt / timed(ids, 1)[0]
    figures["decode"] = 1 / timed(ids[:200][::-1], new)[1]
    noise = np.random.default_rng(0).integers(0, 256, (336, 336, 3), np.uint8)
    figures["picture"] = first("What is this?", Image.fromarray(noise))
    figures["again"] = first("Which colours has it?", Image.fromarray(noise))
    figures["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kB on Linux
    return figures


def llama(file: Path, prompt: int, new: int, threads: int) -> dict[str, float]:
    """Its own clocks, without Python's share."""
    import xllamacpp as library

    start = time.perf_counter()
    params = library.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.verbosity = 4096, 1, 0
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = library.Server(params)
    figures = {"open": time.perf_counter() - start}

    def timings(ids: list[int], count: int) -> dict[str, float]:
        settings = {"temperature": 0, "ignore_eos": True, "cache_prompt": False}
        completion: dict[str, float] = server.handle_completions(
            {"prompt": ids, "n_predict": count, **settings}
        )["timings"]
        return completion

    pick = random.Random(os.getpid())
    ids = [pick.randrange(100, 40_000) for _ in range(prompt)]
    timings(ids[:20], 2)
    figures["prefill"] = 1e3 * prompt / timings(ids, 1)["prompt_ms"]
    figures["decode"] = timings(ids[:200][::-1], new)["predicted_per_second"]
    figures["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return figures


def measure(name: str, folder: Path, cli_options: argparse.Namespace) -> dict[str, float]:
    library, bits = name.split()
    if library == "Pumice":
        return pumice(folder / bits, cli_options.prompt, cli_options.new, cli_options.threads)
    [file] = (folder / f"{bits}-gguf").glob("model-*.gguf")
    return llama(file, cli_options.prompt, cli_options.new, cli_options.threads)


def report(results: dict[str, list[dict[str, float]]]) -> None:
    medians: dict[str, dict[str, float]] = {}
    for name, rows in results.items():
        for key in KEYS:
            if values := [row[key] for row in rows if key in row]:
                medians.setdefault(name, {})[key] = statistics.median(values)
                spread = f"{min(values):.2f} to {max(values):.2f}"
                print(f"{name:<14} {key:<8} {statistics.median(values):8.2f} {UNITS[key]} ({spread})")
    for bits in BITS:
        own_figures, llama_figures = medians.get(f"Pumice {bits}", {}), medians.get(f"llama.cpp {bits}", {})
        for key in own_figures.keys() & llama_figures.keys():
            print(f"{bits} {key}: {own_figures[key] / llama_figures[key]:.2f} of llama.cpp's")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--prompt", type=int, default=600)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="where the models are kept from run to run")
    parser.add_argument("--only", default="", help="contenders whose names hold this text")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    cli_options = parser.parse_args()
    if cli_options.child:
        print(json.dumps(measure(cli_options.child, cli_options.keep, cli_options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        run(cli_options.keep or Path(scratch), cli_options)


def run(folder: Path, cli_options: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, cli_options.size)
    names = [f"{library} {bits}" for bits in BITS for library in ("Pumice", "llama.cpp")]
    names = [name for name in names if cli_options.only in name]
    options = [f"--{key}={getattr(cli_options, key)}" for key in ("prompt", "new", "threads")]
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(cli_options.rounds):
        for name in list(names):
            command = [sys.executable, __file__, "--keep", str(folder), *options, "--child", name]
            environment = {**os.environ, "OMP_NUM_THREADS": str(cli_options.threads)}
            process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
            if process.returncode:
                print(f"{name} is left out", file=sys.stderr)
                names.remove(name)
                continue
            results.setdefault(name, []).append(json.loads(process.stdout.splitlines()[-1]))
            print(name, results[name][-1], file=sys.stderr)
    report(results)


if __name__ == "__main__":
    main()
