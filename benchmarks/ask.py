"""Measure `pumice ask`: time to the first word, tokens per second, peak memory, and what beams cost.

    python benchmarks/ask.py [--model M] [--image PATH] [--runs 5] [--only process,decoding,beams]

Each run of `process` is a process of its own, as a person starts it. The first word counts from the start of
the process to the first byte on its standard output. `decoding` is greedy, in one warm process. `beams` takes
turns: each photograph of examples/ is asked about greedily and with 3 beams, with empty caches, and the
processor time of each answer is taken, for it does not count what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "dog.jpg"
QUESTION = "Describe this picture."
TOKENS = 128  # of a long answer; stop tokens are ignored
WAYS: dict[str, dict[str, float]] = {
    "greedy": {"num_beams": 1},
    "3 beams": {"num_beams": 3, "length_penalty": 0.5},
}


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
    question = Conversation((user_message(QUESTION, [image]),))
    prompt = assistant.prompt(question, temperature=0.0, num_beams=1, max_new_tokens=TOKENS)
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


def beams(model: str, runs: int) -> None:
    """Processor time of an answer in each of WAYS, and the ratio of both in each run."""
    import pumice
    from pumice.conversation import Conversation, user_message

    assistant = pumice.load(model)
    questions = [
        Conversation((user_message(QUESTION, [path]),)) for path in sorted(EXAMPLE.parent.glob("*.jpg"))
    ]
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    tokens: dict[str, list[int]] = {name: [] for name in WAYS}
    for run in range(runs + 1):  # the first does not count
        totals = dict.fromkeys(WAYS, 0.0)
        for number, question in enumerate(questions):
            for name in sorted(WAYS, reverse=bool((run + number) % 2)):
                assistant.forget()
                start = time.process_time()
                reply = assistant.stream(question, temperature=0.0, **WAYS[name])
                "".join(reply)
                totals[name] += time.process_time() - start
                if run == 0:
                    tokens[name].append(reply.tokens)
        if run:
            for name, total in totals.items():
                seconds[name].append(total / len(questions))
    for name, values in seconds.items():
        lengths = f"answers of {min(tokens[name])} to {max(tokens[name])} tokens"
        print(f"{name}: {spread(values)} s of processor time, {lengths}")
    first, second = seconds.values()
    ratios = [searched / greedy for greedy, searched in zip(first, second, strict=True)]
    print(f"{' / '.join(reversed(WAYS))}: {spread(ratios)}; {len(questions)} photographs, {runs} runs")


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} (from {min(values):.2f} to {max(values):.2f})"


def process(model: str, image: Path, runs: int) -> None:
    times = [first_word(model, image) for _ in range(runs)]
    firsts, wholes = zip(*times, strict=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # kB on Linux
    print(f"first word: {spread(firsts)} s")
    print(f"whole answer: {statistics.median(wholes):.2f} s; peak memory {peak:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pumice-tiny")
    parser.add_argument("--image", type=Path, default=EXAMPLE)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="process,decoding,beams")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    if "process" in only:
        process(arguments.model, arguments.image, arguments.runs)
    if "decoding" in only:
        print(f"decoding: {decoding(arguments.model, arguments.image):.1f} tokens/s")
    if "beams" in only:
        beams(arguments.model, arguments.runs)


if __name__ == "__main__":
    main()
