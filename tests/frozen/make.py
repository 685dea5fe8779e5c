"""Write what the tests of this folder read, with the code as it stands: `python tests/frozen/make.py`.

`--only surface` writes what commands, server and Python offer, and nothing else. It is recorded again in the
commit that means to change it. The rest is data of an older version, and is never written anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: results to the last bit depend on the number of threads

import numpy as np
import torch
import yaml
from PIL import Image
from stored import (
    ENDS,
    EXACT,
    FILES,
    MODEL,
    OUTPUTS,
    SURFACE,
    Teacher,
    Watch,
    command,
    helps,
    imports,
    inside,
    openapi,
    output,
    read,
    run_pumice,
    signatures,
)  # fmt: skip
from torch.nn.modules.module import register_module_forward_pre_hook

import pumice

HALF = 3  # of 6 steps
COLOURS = {"red": (200, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 200), "yellow": (230, 220, 30)}
ANIMALS = ("dog", "cat", "horse", "cow")
SIZES = ((24, 24), (40, 20), (20, 40), (48, 30))  # so that they are seen in different tiles
RECIPE: dict[str, Any] = {
    "name": "frozen",
    "output": "run",
    "model": "model",
    "stage": {
        "learn": {"connector": 1e-3, "lora": 2e-3},
        "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ["q", "v", "down"]},
    },
    "data": [{"rows": "rows.jsonl", "mirror": True}],
    "held_out": [{"rows": "held-out.jsonl"}],
    "pictures": ["pictures"],
    "epochs": 3,
    "batch": 2,
    "pack_tokens": 128,
    "precision": "fp32",
    "device": "cpu",
    "feature_cache": "features",
    "save_every": HALF,
    "measure_every": HALF,
    "sample_answers": 0,
}
# A kind of rows as a user writes one: it imports what documents promise, and nothing else of Pumice.
MINE = '''"""A kind of rows of my own."""

from pumice.generate.kinds.base import MARKET, Draft, Example, Kind, pairs


def rests(draft: Draft) -> str | None:
    return None if "rests" in draft.turns[0].answer else "nothing rests"


KIND = Kind(
    name="mine",
    system="Write a question about the picture and its answer.",
    examples=(Example(MARKET, "Question: What is sold?\\nAnswer: Apples, at rest."),),
    parse=pairs,
    turns=(1, 2),
    words=(1, 20),
    max_tokens=64,
    alike=True,
    unsupported=5,
    checks=(rests,),
)
'''


def lines(path: str, rows: list[Any]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_inputs() -> None:
    """What a user brings, into the current folder."""
    Path("pictures").mkdir()
    rows: list[dict[str, Any]] = []
    for number, (colour, value) in enumerate(COLOURS.items()):
        width, height = SIZES[number]
        noise = np.random.default_rng(number).integers(0, 90, (height, width, 3), np.uint8)
        picture = Image.fromarray(noise)
        picture.paste(value, (0, 0, width // 2, height))
        picture.save(f"pictures/{number}.png")
        for question, answer in (("Its colour?", colour), ("What is it?", f"A {colour} wall.")):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"id": f"{number}-{len(rows)}", "image": f"{number}.png", "conversations": turns})
    lines("rows.jsonl", rows)
    lines("held-out.jsonl", rows[:3:2])
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    lines("annotations.jsonl", [
        {
            "image": f"{n}.png",
            "captions": [f"A {animal} rests."],
            "boxes": [{"category": animal, "box": [0, 0, 0.5, 1]}],
        }
        for n, animal in enumerate(ANIMALS)
    ])  # fmt: skip
    Path("mine.py").write_text(MINE)
    Path("mix.yaml").write_text(yaml.safe_dump(
        {"sources": [{"task": "llava", "files": {"rows": "mix.json"}, "rows": 5}], "seed": 1}
    ))  # fmt: skip
    Path("mix.json").write_text(json.dumps(rows))
    Path("own").mkdir()
    for number in range(len(COLOURS)):
        shutil.copy(f"pictures/{number}.png", "own")


def sure_questions() -> list[tuple[str, str]]:
    """(picture, question) whose answers are the same in fp32, bf16 and 8 bits: they will be everywhere."""
    opened = [
        pumice.load("model", device="cpu", quantize=quantize, dtype=dtype)
        for quantize, dtype in ((None, torch.float32), (None, torch.bfloat16), ("int8", torch.bfloat16))
    ]
    words = ["What is it?", "Its colour?", "Who?", "Where?", "How many?", "Is it?", "Why?", "A cat?", "And?"]
    rows = [(f"pictures/{n % 4}.png", text) for n, text in enumerate(words * 3)]
    all_answers = [assistant.ask_many(rows, max_new_tokens=6) for assistant in opened]
    return [
        row for row, *answers in zip(rows, *all_answers, strict=True) if len(set(map(str, answers))) == 1
    ][:6]


def torn(path: Path, target: Path, whole_lines: int) -> None:
    """The beginning of an append-only file as a process leaves it that is killed: its last line is cut."""
    data = path.read_bytes().splitlines(keepends=True)
    remaining = data[whole_lines]
    target.write_bytes(b"".join(data[:whole_lines]) + remaining[: len(remaining) // 2])


@contextlib.contextmanager
def interrupted_at_picture(number: int) -> Iterator[None]:
    """Ctrl-C when the tower begins with this one of the pictures."""
    looks = 0

    def hook(module: torch.nn.Module, _: Any) -> None:
        nonlocal looks
        looks += isinstance(module, torch.nn.Conv2d)
        if looks == number:
            raise KeyboardInterrupt

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def keep(*names: str, to: Path) -> None:
    for name in names:
        source = Path(name)
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, to / name)
        else:
            shutil.copy(source, to / name)


def make_training() -> None:
    """A run that was killed in its fifth step, and where the same run ends."""
    run_pumice("train", "recipe.yaml", "--set", "output=before")  # sees every picture, so the cache is whole
    with Watch().watching() as watch:
        run_pumice("train", "recipe.yaml")
    assert watch.looks == 0
    last = f"run/checkpoints/step-{2 * HALF:06d}"
    keep("run/recipe.yaml", f"run/checkpoints/step-{HALF:06d}", "features", to=FILES)
    events = Path("run/metrics.jsonl").read_text().splitlines(keepends=True)
    events_to_keep = [line for line in events if json.loads(line)["step"] <= HALF + 1]
    (FILES / "run" / "metrics.jsonl").write_text("".join(events_to_keep))
    keep("run/metrics.jsonl", "run/model", f"{last}/state.json", f"{last}/rng-00000.safetensors", to=ENDS)
    provenance = ENDS / "run" / "model" / "provenance.json"
    values = read(provenance)
    for stage in values["stages"]:
        stage["versions"]["machine"] = "any"
    provenance.write_text(json.dumps(values, indent=1))
    (ENDS / "steps.json").write_text(json.dumps(watch.steps))
    (FILES / "features" / ".lock").unlink(missing_ok=True)


def make_answers() -> None:
    """Answers of a batch, of `ask_many` and of a benchmark, each killed after two or so."""
    rows = sure_questions()
    assert len(rows) == 6, rows
    lines("questions.jsonl", [{"id": n, "image": p, "question": q} for n, (p, q) in enumerate(rows)])
    assistant = pumice.load("model", device="cpu", quantize=None)
    answers = assistant.ask_many(rows, out="asked.jsonl", max_new_tokens=4)
    logits = assistant.logits(*rows[0])[-1]
    record = {"rows": rows, "answers": answers, "logits": [round(x, 5) for x in logits.tolist()]}
    (ENDS / "answers.json").write_text(json.dumps(record, indent=1))
    trained = pumice.load("run/model", device="cpu", quantize=None)
    (ENDS / "trained.json").write_text(json.dumps([trained.logits(*row)[-1].tolist() for row in rows[:2]]))

    batch = [
        "ask",
        "--batch",
        "questions.jsonl",
        "--out",
        "out.jsonl",
        *MODEL,
        *EXACT,
        "--max-new-tokens",
        "4",
    ]
    with interrupted_at_picture(3):
        result = command(*batch, "--slots", "1")
    assert result.exit_code == 130, (result.exit_code, result.output)
    partial = Path("out.jsonl.partial")
    shutil.copy(partial, FILES)
    run_pumice(*batch)
    torn(Path("asked.jsonl"), FILES / "asked.jsonl", 2)
    keep("questions.jsonl", to=FILES)
    keep("out.jsonl", "asked.jsonl", to=ENDS)

    own = [
        {
            "id": n,
            "image": Path(p).name,
            "question": q,
            "answers": str(answers[n]),
            "category": "odd" if n % 2 else "even",
        }
        for n, (p, q) in enumerate(rows)
    ]
    lines("own/questions.jsonl", own)
    for name, wrong in (("one", (0, 3)), ("two", (3,))):
        texts = ["no" if n in wrong else answer for n, answer in enumerate(answers)]
        lines(f"own/{name}.jsonl", [{"id": n, "answer": t, "model": name} for n, t in enumerate(texts)])
    lines("own/llava.jsonl", [
        {"question_id": n, "prompt": q, "text": answers[n], "answer_id": f"a{n}", "model_id": "llava"}
        for n, (_, q) in enumerate(rows)
    ])  # fmt: skip
    run_pumice(
        "eval", "own", "--data", "own", "--predictions", "predictions.jsonl", *MODEL, "--max-new-tokens", "4"
    )
    keep("own", to=FILES)
    torn(Path("predictions.jsonl"), FILES / "predictions.jsonl", 2)
    keep("predictions.jsonl", to=ENDS)


def make_generation() -> None:
    """A journal that ends in the middle of the reply to the third request, and where it leads."""
    with Teacher() as teacher:
        run_pumice(*teacher.command())
    assert len(teacher.asked) == 4
    (FILES / "generated").mkdir()
    # prompt, then sent and reply of each: the third reply is torn
    torn(Path("generated/journal.jsonl"), FILES / "generated" / "journal.jsonl", 6)
    keep("generated/rows.jsonl", "generated/rejected.jsonl", to=ENDS)


def make_surface() -> None:
    SURFACE.mkdir(exist_ok=True)
    promised = SURFACE / "imports.json"
    before = read(promised) if promised.exists() else []  # what was shown once is promised for good
    outputs = {}
    for name in OUTPUTS:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder) / "work"
            shutil.copytree(FILES, work)
            with inside(work):
                outputs[name] = output(name)
    values = {
        "help": helps(), "openapi": openapi(), "json": outputs, "signatures": signatures(),
        "imports": sorted([*before, *(pair for pair in imports() if pair not in before)]),
    }  # fmt: skip
    for name, value in values.items():
        text = json.dumps(value, indent=1, ensure_ascii=False)
        (SURFACE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def make_files() -> None:
    import first_model

    for folder in (FILES, ENDS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    with tempfile.TemporaryDirectory() as folder, inside(Path(folder)):
        first_model.write(Path("first"))
        run_pumice("import", "first", "model", "--template", "chatml")
        write_inputs()
        make_training()
        make_answers()
        make_generation()
        keep(
            "model", "pictures", "rows.jsonl", "held-out.jsonl", "recipe.yaml", "annotations.jsonl",
            "mine.py", "mix.yaml", "mix.json", to=FILES,
        )  # fmt: skip
    for path in HERE.rglob("*.lock"):
        path.unlink()


HERE = Path(__file__).parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["surface"], help="write this alone")
    if parser.parse_args().only is None:
        make_files()
    make_surface()
    sizes = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    print(f"{sizes / 1e3:.0f} kB in {HERE}", file=sys.stderr)
