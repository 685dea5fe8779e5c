"""What benchmarks/laptop.py asks of llama.cpp, by llama-cpp-python's C interface.

It imports neither Pumice nor numpy, so that any Python with llama-cpp-python runs it:

    python benchmarks/laptop_llama.py quantize F16.gguf OUT.gguf Q4_K_M
    python benchmarks/laptop_llama.py measure MODEL.gguf MMPROJ.gguf '{"threads": 2, ...}'
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as library
from llama_cpp import mtmd_cpp as mtmd

TYPES = {
    "Q8_0": library.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K_M": library.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_0": library.LLAMA_FTYPE_MOSTLY_Q4_0,
}


def quantize(source: str, target: str, kind: str) -> None:
    params = library.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    if library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot quantise {source} to {kind}")


class Session:
    """A model with its context, and one sequence in it."""

    def __init__(self, model: str, mmproj: str, threads: int) -> None:
        params = library.llama_model_default_params()
        self._model = library.llama_model_load_from_file(model.encode(), params)
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 4096, 4096, 512
        settings.n_threads = settings.n_threads_batch = threads
        self.context = library.llama_init_from_model(self._model, settings)
        seeing = mtmd.mtmd_context_params_default()
        seeing.use_gpu, seeing.n_threads, seeing.print_timings = False, threads, False
        self._mtmd = mtmd.mtmd_init_from_file(mmproj.encode(), self._model, seeing)
        if not self.context or not self._mtmd:
            raise SystemExit(f"llama.cpp cannot open {model} with {mmproj}")

    def forget(self, first: int = 0) -> None:
        """Forget the tokens from `first` on."""
        library.llama_memory_seq_rm(library.llama_get_memory(self.context), 0, first, -1)

    def read(self, ids: list[int]) -> None:
        """Read tokens behind those that are there, until their logits are computed."""
        array = (library.llama_token * len(ids))(*ids)
        if library.llama_decode(self.context, library.llama_batch_get_one(array, len(ids))):
            raise SystemExit(f"llama.cpp cannot read {len(ids)} tokens")
        library.llama_synchronize(self.context)

    def see(self, text: str, pictures: list[tuple[int, int, bytes]], past: int) -> int:
        """Read text and pictures (width, height, RGB) at position `past`. Return the next position."""
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = [
            mtmd.mtmd_bitmap_init(width, height, (ctypes.c_uint8 * len(rgb)).from_buffer_copy(rgb))
            for width, height, rgb in pictures
        ]
        array = (mtmd.mtmd_bitmap_p_ctypes * max(1, len(bitmaps)))(*bitmaps)
        data = text.encode()
        given = mtmd.mtmd_input_text(data, len(data), past == 0, True)
        reached = library.llama_pos(0)
        failed = mtmd.mtmd_tokenize(self._mtmd, chunks, ctypes.byref(given), array, len(bitmaps))
        failed = failed or mtmd.mtmd_helper_eval_chunks(
            self._mtmd, self.context, chunks, past, 0, 4096, True, ctypes.byref(reached)
        )
        if failed:
            raise SystemExit("llama.cpp cannot read the picture")
        library.llama_synchronize(self.context)
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        mtmd.mtmd_input_chunks_free(chunks)
        return int(reached.value)


def peak_gb() -> float:
    """The process's largest resident memory so far (Linux). `ru_maxrss` would count the parent's, too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6


def measure(model: str, mmproj: str, options: dict[str, Any]) -> dict[str, float]:
    """The figures of laptop.py, in its order."""
    start = time.perf_counter()
    session = Session(model, mmproj, options["threads"])
    figures = {"open": time.perf_counter() - start}
    pick = random.Random(options["seed"])

    def ids(count: int) -> list[int]:
        return [pick.randrange(100, 30_000) for _ in range(count)]

    def timed(work: Any, *given: Any) -> tuple[float, Any]:
        started = time.perf_counter()
        result = work(*given)
        return time.perf_counter() - started, result

    def decode() -> float:
        """Tokens/s, without choosing them: it gets random ones."""
        tokens = ids(options["new"])
        started = time.perf_counter()
        for token in tokens:
            session.read([token])
        return len(tokens) / (time.perf_counter() - started)

    session.read(ids(20))  # memory and threads are there
    session.forget()
    if options["picture"]:
        side = options["side"]
        picture = (side, side, random.Random(0).randbytes(3 * side * side))
        marker = mtmd.mtmd_default_marker().decode()
        figures["picture"], past = timed(
            session.see, f"USER: {marker}\nWhat is this? ASSISTANT:", [picture], 0
        )
        figures["again"], _ = timed(session.see, " USER: Which colours has it? ASSISTANT:", [], past)
        figures["peak"] = peak_gb()
        session.forget()
    session.read(ids(200))
    figures["decode"] = decode()
    session.forget()
    prompt = ids(options["prompt"])
    figures["prefill"] = len(prompt) / timed(session.read, prompt)[0]
    if options["long"]:
        session.read(ids(2000 - len(prompt)))
        figures["decode_long"] = decode()
    if options["long_prompt"]:
        session.forget()
        prompt = ids(options["long_prompt"])
        figures["prefill_long"] = len(prompt) / timed(session.read, prompt)[0]
    return figures


@library.llama_log_callback
def silent(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


def main() -> None:
    command, *arguments = sys.argv[1:]
    library.llama_log_set(silent, ctypes.c_void_p(0))
    mtmd.mtmd_log_set(silent, ctypes.c_void_p(0))
    mtmd.mtmd_helper_log_set(silent, ctypes.c_void_p(0))
    library.llama_backend_init()
    if command == "quantize":
        quantize(*arguments)
    else:
        model, mmproj, options = arguments
        print(json.dumps(measure(model, mmproj, json.loads(options))))


if __name__ == "__main__":
    main()
