"""One run on one process and on many: the same losses; and killed at random moments: the same bits.

    python benchmarks/processes.py spread [--only NAME ...]     one, DDP, FSDP2, resumed on another number
    python benchmarks/processes.py kill [--times 10]            kill -9, then the same command again

A tiny random LLaVA on the CPU (gloo), rows with and without a picture in one step, and steps with fewer
packs than processes. `spread` prints the largest difference of a loss, relative, against one process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from train import make_model, make_rows

from pumice.train import parallel
from pumice.train import run as train
from pumice.train.report import read_metrics

STEPS = 6
# Frozen embeddings and weights in few bits, where a process may have no picture.
ADAPTERS: dict[str, Any] = {
    "stage": {"learn": {"connector": 1e-3, "lora": 1e-3}, "lora": {"rank": 4}, "base": "int8"},
    "max_steps": 20, "epochs": 7, "save_every": 100, "measure_every": 20,
}  # fmt: skip
# name: processes, how the model is spread, and the run that it goes on from after half of the steps
RUNS: dict[str, tuple[int, str, str | None]] = {
    "one": (1, "auto", None),
    "ddp 2": (2, "ddp", None),
    "fsdp 2": (2, "fsdp", None),
    "fsdp 4": (4, "fsdp", None),
    "ddp 2, then 3": (3, "ddp", "ddp 2"),
    "fsdp 2, then 3": (3, "fsdp", "fsdp 2"),
    "fsdp 2, then one": (1, "auto", "fsdp 2"),
}


def prepare(folder: Path) -> None:
    """A model and rows under `folder`: 3 pictures of 4 rows each step, and two rows of text."""
    make_model(folder, "tiny")
    make_rows(folder, STEPS, 0.2)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    text = [{"from": "human", "value": "w1 w2 w3"}, {"from": "gpt", "value": "w4 w5 w6 w7"}]
    lines += [json.dumps({"id": f"text {n}", "conversations": text}) for n in range(12)]
    (folder / "mixed.jsonl").write_text("\n".join(lines) + "\n")


def recipe(folder: Path, name: str, **changes: Any) -> Path:
    values = {
        "name": name, "output": str(folder / name), "model": str(folder / "ours"),
        "stage": {"learn": {"connector": 1e-3, "decoder": 1e-3, "embeddings": 1e-3}},
        "data": [{"rows": str(folder / "mixed.jsonl")}], "held_out": [{"rows": str(folder / "mixed.jsonl")}],
        "pictures": [str(folder)], "batch": 6, "pack_tokens": 160, "precision": "fp32", "device": "cpu",
        "max_steps": STEPS, "epochs": 2, "save_every": 1, "measure_every": 3, "measure_rows": 5,
        "sample_answers": 1, "keep_last": 10,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def run(path: Path, processes: int) -> None:
    """Train as a user would start it. RuntimeError with the end of its messages."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "pumice", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if completed.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{completed.stderr[-4000:]}")


def run_forked(path: Path, processes: int) -> None:
    """The same without torchrun: processes that share one import of what they run. Not on Windows."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["pumice.train.loop", "torch._dynamo", "torch.distributed.fsdp"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = [context.Process(target=_member, args=(path, n, processes, port)) for n in range(processes)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    if any(member.exitcode for member in members):
        raise RuntimeError(f"{path}: the processes ended with {[member.exitcode for member in members]}")


def _member(path: Path, rank: int, processes: int, port: int) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    parallel.WAIT = datetime.timedelta(minutes=3)  # a process that waits in vain must not wait for hours
    train(path)


def losses(output: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(output / "metrics.jsonl") if "loss" in event]


def held_out(output: Path) -> list[float]:
    events = read_metrics(output / "metrics.jsonl")
    return [event["held_out_loss"] for event in events if "held_out_loss" in event]


def spread(
    folder: Path, names: list[str], start: Callable[[Path, int], None] = run, **changes: Any
) -> dict[str, float]:
    """Largest relative difference of a loss, held-out losses included, from those of one process.

    changes: fields of every recipe.
    """
    differences: dict[str, float] = {}
    expected: list[float] = []
    for name in names:
        print(name, file=sys.stderr, flush=True)
        processes, parallel, before = RUNS[name]
        path = recipe(folder, name, parallel=parallel, **changes)
        if before is not None:
            continue_from(folder / before, folder / name)
        start(path, processes)
        run_losses = losses(folder / name) + held_out(folder / name)
        if name == "one":
            expected = run_losses
        if len(run_losses) != len(expected):
            raise RuntimeError(f"{name} tells {len(run_losses)} losses, one process {len(expected)}")
        differences[name] = max(abs(a - b) / b for a, b in zip(run_losses, expected, strict=True))
    return differences


def continue_from(finished: Path, output: Path) -> None:
    """Make `output` look as `finished` did half-way: its metrics, and its checkpoints up to there."""
    (output / "checkpoints").mkdir(parents=True)
    shutil.copy(finished / "metrics.jsonl", output)
    half = f"step-{STEPS // 2:06d}"
    shutil.copytree(finished / "checkpoints" / half, output / "checkpoints" / half)


def kill(folder: Path, times: int) -> tuple[int, bool]:
    """(kills, whether the final weights are those of a run left alone, bit for bit)."""
    stage = {"learn": {"connector": 1e-3, "lora": 1e-3}, "lora": {"rank": 4, "dropout": 0.1}}
    changes = {"stage": stage, "max_steps": 60, "epochs": 100, "save_every": 3, "keep_last": 2}
    changes |= {"held_out": [], "workers": 2}
    complete_recipe, killed_recipe = (recipe(folder, name, **changes) for name in ("whole", "broken"))
    run(complete_recipe, 1)
    chance = random.Random(0)
    metrics, command = folder / "broken" / "metrics.jsonl", [sys.executable, "-m", "pumice", "train"]
    kills = 0
    while kills < times:
        process = subprocess.Popen(
            [*command, str(killed_recipe)],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        # half of them while it starts or goes on, half at some step of what is left
        start = time.monotonic()
        steps_done = len(losses(folder / "broken"))
        while (
            len(losses(folder / "broken")) < steps_done + 1 + chance.randrange(3) and process.poll() is None
        ):
            time.sleep(0.002)
        time.sleep(chance.random() * min(0.5, (time.monotonic() - start) / 10))
        if process.poll() is not None:
            break  # done before it could be killed again
        process.kill()
        process.wait()
        kills += 1
    run(killed_recipe, 1)
    one, other = (load_file(folder / n / "model" / "model.safetensors") for n in ("whole", "broken"))
    same = one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    return kills, same and losses(folder / "whole") == losses(metrics.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("spread", "kill"))
    parser.add_argument("--only", action="append", choices=tuple(RUNS), default=[])
    parser.add_argument("--times", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        if arguments.what == "kill":
            kills, same = kill(folder, arguments.times)
            verdict = "equal" if same else "NOT equal"
            print(f"killed {kills} times: the final weights and all losses are {verdict}")
            raise SystemExit(not same)
        for name, apart in spread(folder, ["one", *arguments.only] if arguments.only else [*RUNS]).items():
            print(f"{name:<18} losses differ by {apart:.1e} at most", flush=True)


if __name__ == "__main__":
    main()
