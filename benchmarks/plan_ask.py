"""Compare what `pumice plan --ask` foretells with what answers then take.

    python benchmarks/plan_ask.py MODEL [--quantize none,int8,int4] [--new 64] [--rounds 2]

The plan and each kind of weights run in processes of their own. An answer is about a picture of noise that
was not asked about before, with stop tokens ignored. Memory is what lies in it at the end.
benchmarks/laptop.py with --keep makes models of LLaVA's sizes, of random weights. Needs Linux and a CPU.
"""

from __future__ import annotations

import argparse
import bisect
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (480, 640, 3)  # of the picture that the plan thinks of


def answer(model: str, quantize: str, new: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token and tokens a second after it, of each round; bytes of memory by part."""
    import pumice
    from pumice.conversation import Conversation, user_message
    from pumice.train.plan.asking import QUESTION

    kind: Any = None if quantize == "none" else quantize
    assistant = pumice.load(model, device="cpu", quantize=kind)
    assistant.engine._stops = frozenset()
    draw = np.random.default_rng(time.time_ns())
    first, rate = [], []
    for _ in range(rounds):
        picture = Image.fromarray(draw.integers(0, 256, SIZE, np.uint8))
        times = [time.perf_counter()]
        asked = Conversation((user_message(QUESTION, [picture]),))
        reply = assistant.stream(asked, max_new_tokens=new, num_beams=1)  # token by token
        reply.begin()
        counted = 0
        while reply.tokens < new:
            assistant.engine.step()
            if reply.tokens > counted:
                counted = reply.tokens
                times.append(time.perf_counter())
        first.append(times[1] - times[0])
        rate.append((new - 1) / (times[-1] - times[1]))
    parts = {"tower": "tower", "connector": "connector", "decoder": "language model"}
    memory = {
        name: sum(tensor.nbytes for tensor in tensors(getattr(assistant.model, part)))
        for part, name in parts.items()
    }
    memory["in all"] = resident(tensor.data_ptr() for tensor in tensors(assistant.model))
    return {"first": first, "rate": rate, "memory": memory}


def tensors(module: Any) -> list[Any]:
    return [*module.parameters(), *module.buffers()]


def resident(addresses: Iterable[int]) -> int:
    """Bytes in memory but those of mapped files of weights that the model, at these addresses, does not use.

    What was read from them to be converted stays in memory until it is needed, and is no need of the model.
    """
    used, size, counts = sorted(addresses), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if region := re.match(r"([0-9a-f]+)-([0-9a-f]+) .{20,} +(.*)$", line):
            start, end = int(region[1], 16), int(region[2], 16)
            place = bisect.bisect_left(used, start)
            counts = place < len(used) and used[place] < end
            counts |= not region[3].startswith("/") or ".so" in region[3] or "/python" in region[3]
        elif counts and line.startswith("Rss:"):
            size += 1024 * int(line.split()[1])
    return size


def run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(cost: dict[str, Any], measured: dict[str, Any]) -> None:
    foretold_sizes = {**cost["memory"], "in all": cost["total"]}
    rows = [
        ("first word, s", cost["first_word"], statistics.median(measured["first"])),
        ("tokens/s", cost["tokens_per_second"], statistics.median(measured["rate"])),
    ]
    rows += [
        (f"{part}, GB", foretold_sizes[part] / 1e9, size / 1e9) for part, size in measured["memory"].items()
    ]
    for name, foretold, found in rows:
        print(f"| {cost['quantize']} | {name} | {foretold:.3g} | {found:.3g} | {foretold / found:.2f} |")
    print(f"{cost['quantize']}: first words {measured['first']}, rates {measured['rate']}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--quantize", default="none,int8,int4")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(answer(arguments.model, arguments.quantize, arguments.new, arguments.rounds)))
        return
    plan = run(["-m", "pumice", "plan", "--ask", arguments.model, "--json"])
    print("| weights | figure | foretold | measured | foretold / measured |\n|---|---|---|---|---|")
    for cost in plan["costs"]:
        if cost["quantize"] in arguments.quantize.split(","):
            sizes = [f"--new={arguments.new}", f"--rounds={arguments.rounds}"]
            child = [__file__, arguments.model, "--child", f"--quantize={cost['quantize']}", *sizes]
            report(cost, run(child))


if __name__ == "__main__":
    main()
