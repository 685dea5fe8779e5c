"""Measure `pumice ask`: time to the first word, tokens per second, and peak memory.

    python benchmarks/ask.py [--model M] [--image PATH] [--runs 5]

Each run is a process of its own, as a person starts it. The first word counts from the start of the
process to the first byte on its standard output. Decoding is measured in one warm process.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "dog.jpg"
QUESTION = "Describe this picture."
TOKENS = 128  # of a long answer; stop tokens are ignored


def first_word(model: str, image: Path) -> tuple[float, float]:
    """Seconds to the first byte of an answer and to the end of the process."""
    command = [sys.executable, "-m", "pumice", "ask", str(image), QUESTION, "--model", model]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        first = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise SystemExit(process.returncode)
    return first, time.perf_counter() - start


def decoding(model: str, image: Path) -> float:
    """Tokens per second of a long answer, prefill excluded."""
    import torch

    import pumice
    from pumice.conversation import Conversation, user_message
    from pumice.engine.generate import generate

    assistant = pumice.load(model)
    assistant.model.config = assistant.model.config.__class__(
        **{**vars(assistant.model.config), "stop_token_ids": ()}
    )
    prompt = assistant.prompt(Conversation((user_message(QUESTION, [image]),)), max_new_tokens=TOKENS)
    speeds = []
    for _ in range(3):
        events = generate(assistant.model, [prompt])
        next(events)
        start = time.perf_counter()
        count = sum(token is not None for _, token in events)
        speeds.append(count / (time.perf_counter() - start))
    print(
        f"threads {torch.get_num_threads()}, OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'not set')}"
    )
    return max(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pumice-tiny")
    parser.add_argument("--image", type=Path, default=EXAMPLE)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    times = [first_word(arguments.model, arguments.image) for _ in range(arguments.runs)]
    firsts, wholes = zip(*times, strict=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # kB on Linux
    print(f"first word: {statistics.median(firsts):.2f} s (from {min(firsts):.2f} to {max(firsts):.2f})")
    print(f"whole answer: {statistics.median(wholes):.2f} s; peak memory {peak:.2f} GB")
    print(f"decoding: {decoding(arguments.model, arguments.image):.1f} tokens/s")


if __name__ == "__main__":
    main()
