"""A LLaVA of the sizes that people have, on a CPU: Pumice beside llama.cpp, the same random weights in both.

    pip install llama-cpp-python --no-binary llama-cpp-python -C cmake.args="-DGGML_NATIVE=ON"
    python benchmarks/laptop.py [--size 1b|3b|7b] [--generation 1.5|1.6] [--rounds 3] [--keep FOLDER]

It makes a random LLaVA-1.5 (CLIP-L/336, two-layer connector, a llama) or LLaVA-1.6 (tiles, a Mistral) in a
temporary folder and imports it with --quantize int8 and int4. llama.cpp gets GGUF of the same weights: Q8_0,
Q4_K_M and Q4_0, by its own quantiser. It is that of the package llama-cpp-python, which pip compiles for this
processor (it needs a C++ compiler); --llama names another Python that has it. A 7B takes 60 GB of disk.

Each measurement is a process of its own, with its model in the page cache. Contenders take turns, and all
have the same threads. Measured are: opening; a picture and a question to the first word, then a second
question about it; the peak of memory up to there; reading 600 tokens (LLaVA-1.6: also 2,880); writing after
200 and after 2,000 tokens. Shown are medians and ranges, and at the end Pumice's medians over llama.cpp's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.storage.parts import LoadedParts
from pumice.threads import usable_cores

# width, depth, heads, kv_heads, mlp_width
SIZES = {
    "tiny": (512, 4, 8, 8, 1536),
    "1b": (2048, 22, 32, 4, 5632),
    "3b": (3072, 28, 24, 8, 8192),
    "7b": (4096, 32, 32, 32, 11008),
}
WIDE_MISTRAL = 14336  # the MLP's width of LLaVA-1.6-Mistral-7B, which has 8 heads of keys and values
BITS = ("int8", "int4")
PEERS = {"int8": ("Q8_0",), "int4": ("Q4_K_M",)}
UNITS = {
    "open": "s", "peak": "GB", "picture": "s", "again": "s", "decode": "tokens/s", "decode_long": "tokens/s",
    "prefill": "tokens/s", "prefill_long": "tokens/s",
}  # fmt: skip
TILES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
LLAMA = Path(__file__).with_name("laptop_llama.py")


def make(folder: Path, size: str, generation: str) -> Path:
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
    image = ImagePolicy()
    if generation == "1.6":
        image = replace(image, mode="anyres", pinpoints=TILES)
        if size == "7b":
            kv_heads, mlp_width = 8, WIDE_MISTRAL
    decoder = DecoderConfig(
        vocab_size=tiny.config.decoder.vocab_size, width=width, depth=depth, heads=heads, kv_heads=kv_heads,
        head_dim=width // heads, mlp_width=mlp_width, context=4096,
    )  # fmt: skip
    vision = VisionConfig(
        kind="clip", image_size=336, width=1024, stride=14, depth=24, heads=16, mlp_width=4096
    )
    config = ModelConfig(
        decoder=decoder, vision=vision, connector=ConnectorConfig(), image=image,
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


def prepare(folder: Path, cli_options: argparse.Namespace) -> None:
    """Quantised folders, and GGUF files of the same fp16 weights by llama.cpp's own quantiser."""
    from pumice.formats.export import export
    from pumice.formats.import_ import import_model
    from pumice.formats.read import read_model

    source = make(folder, cli_options.size, cli_options.generation)
    for bits in BITS:
        if not (folder / bits).exists():
            start = time.perf_counter()
            import_model(str(source), folder / bits, quantize=bits)
            taken, size_gb = time.perf_counter() - start, held(folder / bits) / 1e9
            print(f"import --quantize {bits}: {taken:.1f} s, {size_gb:.2f} GB", file=sys.stderr)
    missing = [kind for kind in cli_options.kinds.split(",") if not (folder / f"{kind}.gguf").exists()]
    if not missing:
        return
    whole = folder / "gguf"
    if not whole.exists():
        export(exportable(read_model(source)), "gguf", whole, kind="f16")
    [f16] = whole.glob("model-*.gguf")
    for kind in missing:
        command = [cli_options.llama, str(LLAMA), "quantize", str(f16), str(folder / f"{kind}.gguf"), kind]
        subprocess.run(command, check=True)
    f16.unlink()


def exportable(model: LoadedParts) -> LoadedParts:
    """GGUF cannot hold LLaVA-1.6's tiles, so llama.cpp gets its language model and a single tile."""
    state = {name: tensor for name, tensor in model.state.items() if name != "image_newline"}
    return replace(model, config=replace(model.config, image=ImagePolicy()), state=state)


def into_page_cache(path: Path) -> None:
    """Read a GGUF or a folder's files once, so that no contender waits for the disk."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def pumice(folder: Path, options: dict[str, Any]) -> dict[str, float]:
    import torch

    torch.set_num_threads(options["threads"])
    from PIL import Image

    import pumice as package
    from pumice.assistant import Assistant
    from pumice.conversation import Conversation, user_message
    from pumice.engine.params import SamplingParams
    from pumice.engine.requests import Prompt

    _ = package.load
    start = time.perf_counter()
    assistant = package.load(folder, device="cpu")
    figures = {"open": time.perf_counter() - start}
    # Answers as long as is asked for. An engine notes at its start which tokens end them.
    object.__setattr__(assistant.model.config, "stop_token_ids", ())
    assistant = Assistant(assistant.model, assistant.processor)

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

    pick = random.Random(options["seed"])

    def ids(count: int) -> list[int]:
        return [pick.randrange(100, 30_000) for _ in range(count)]

    timed(ids(20), 2)  # memory and threads are there
    if options["picture"]:
        side = options["side"]
        noise = Image.frombytes("RGB", (side, side), random.Random(0).randbytes(3 * side * side))
        figures["picture"] = first("What is this?", noise)
        figures["again"] = first("Which colours has it?", noise)
        figures["peak"] = peak_gb()
    figures["decode"] = 1 / timed(ids(200), options["new"] + 1)[1]
    prompt = ids(options["prompt"])
    figures["prefill"] = len(prompt) / timed(prompt, 1)[0]
    if options["long"]:  # the first tokens are still in the cache
        figures["decode_long"] = 1 / timed(prompt + ids(2000 - len(prompt)), options["new"] + 1)[1]
    if options["long_prompt"]:
        prompt = ids(options["long_prompt"])
        figures["prefill_long"] = len(prompt) / timed(prompt, 1)[0]
    return figures


def peak_gb() -> float:
    """The process's largest resident memory so far (Linux). `ru_maxrss` would count the parent's, too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6


def contenders(folder: Path, cli_options: argparse.Namespace) -> dict[str, list[str]]:
    """The command that measures each."""
    mmproj = next((folder / "gguf").glob("mmproj-*.gguf"))
    own = {f"Pumice {bits}": [sys.executable, __file__, "--child", str(folder / bits)] for bits in BITS}
    theirs = {
        f"llama.cpp {kind}": [
            cli_options.llama,
            str(LLAMA),
            "measure",
            str(folder / f"{kind}.gguf"),
            str(mmproj),
        ]
        for kind in cli_options.kinds.split(",")
    }
    turns = [*zip_longest(own.items(), theirs.items())]
    return dict(pair for turn in turns for pair in turn if pair and cli_options.only in pair[0])


def report(results: dict[str, list[dict[str, float]]]) -> None:
    medians: dict[str, dict[str, float]] = {}
    for name, rows in results.items():
        for key, unit in UNITS.items():
            if values := [row[key] for row in rows if key in row]:
                medians.setdefault(name, {})[key] = statistics.median(values)
                spread = f"{min(values):.2f} to {max(values):.2f}"
                print(f"{name:<16} {key:<12} {statistics.median(values):8.2f} {unit} ({spread})")
    # Pumice's medians over llama.cpp's: writing and memory beside as many bits, the rest beside the best.
    for bits in BITS:
        own = medians.get(f"Pumice {bits}", {})
        for key, figure in own.items():
            kinds = PEERS[bits] if key in ("peak", "decode", "decode_long") else tuple(cli_kinds(medians))
            peers = [
                medians[name][key] for kind in kinds if key in medians.get(name := f"llama.cpp {kind}", {})
            ]
            if not peers:
                continue
            best = max(peers) if UNITS[key] == "tokens/s" else min(peers)
            print(f"{bits} {key}: {figure / best:.2f} of llama.cpp's {' or '.join(kinds)}")


def cli_kinds(medians: dict[str, dict[str, float]]) -> list[str]:
    return [name.removeprefix("llama.cpp ") for name in medians if name.startswith("llama.cpp")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--generation", choices=("1.5", "1.6"), default="1.5")
    parser.add_argument("--prompt", type=int, default=600)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--keep", type=Path, help="where the models are kept from run to run")
    parser.add_argument("--only", default="", help="contenders whose names hold this text")
    parser.add_argument("--kinds", default="Q8_0,Q4_K_M,Q4_0", help="llama.cpp's files")
    parser.add_argument("--llama", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--no-picture", action="store_true")
    parser.add_argument("--no-long", action="store_true", help="leave writing after 2,000 tokens out")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="?", help=argparse.SUPPRESS)
    cli_options = parser.parse_args()
    if cli_options.child:
        print(json.dumps(pumice(cli_options.child, json.loads(cli_options.options))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        run(cli_options.keep or Path(scratch), cli_options)


def run(folder: Path, cli_options: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, cli_options)
    tiles = cli_options.generation == "1.6"
    options = {
        "threads": cli_options.threads, "prompt": cli_options.prompt, "new": cli_options.new,
        "picture": not cli_options.no_picture, "side": 672 if tiles else 336,
        "long": not cli_options.no_long, "long_prompt": 2880 if tiles else 0,
    }  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(cli_options.threads)}
    results: dict[str, list[dict[str, Any]]] = {}
    commands = contenders(folder, cli_options)
    for number in range(cli_options.rounds):
        for name, command in list(commands.items()):
            for path in command[3:]:
                into_page_cache(Path(path))
            given = json.dumps({**options, "seed": number})
            process = subprocess.run([*command, given], env=environment, stdout=subprocess.PIPE, check=False)
            if process.returncode:
                print(f"{name} is left out", file=sys.stderr)
                del commands[name]
                continue
            results.setdefault(name, []).append(json.loads(process.stdout.splitlines()[-1]))
            print(name, results[name][-1], file=sys.stderr)
    report(results)


if __name__ == "__main__":
    main()
