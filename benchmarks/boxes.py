"""Teach boxes to pumice-tiny with recipes/boxes.yaml, and measure it before and after on other photographs.

    python benchmarks/boxes.py PHOTOS --steps 60 --folder runs/boxes

The same command continues in the same folder.

PHOTOS holds `images/` and `objects.jsonl`, a photograph per line, with boxes in shares of its sides:

    {"image": "1.jpg", "objects": [{"name": "dog", "box": [left, top, right, bottom]}, ...]}

Every thing that its photograph has once, and that takes two hundredths of it, is asked for in LLaVA-1.5's
words. One photograph in four is never learned. Guesses that look at no picture stand beside the model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pumice.assistant import load
from pumice.boxes import Box, BoxMap
from pumice.data.objects import WHERE
from pumice.evaluate.metrics.boxes import best_iou, is_right
from pumice.evaluate.task import Answered
from pumice.evaluate.tasks import get_task
from pumice.train.loop import train
from pumice.train.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "boxes.yaml"
LEAST = 0.02  # of the photograph


def rows_of(photos: Path, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of three in four photographs, and those of the others."""
    pictures = [json.loads(line) for line in (photos / "objects.jsonl").read_text("utf-8").splitlines()]
    random.Random(seed).shuffle(pictures)
    rows: list[list[dict[str, Any]]] = []
    for picture in pictures:
        counts = Counter(thing["name"] for thing in picture["objects"])
        rows.append([])
        for number, thing in enumerate(picture["objects"]):
            if counts[thing["name"]] > 1 or Box(*thing["box"]).area < LEAST:
                continue
            turns = [
                {"from": "human", "value": f"<image>\n{WHERE}<ref-object>"},
                {"from": "gpt", "value": "<bbox>"},
            ]
            objects = {"ref": [thing["name"]], "bbox": [thing["box"]], "bbox_type": "norm1"}
            rows[-1].append(
                {"id": f"{picture['image']}-{number}", "image": picture["image"], "conversations": turns,
                 "objects": objects}
            )  # fmt: skip
    rows = [own for own in rows if own]
    learned = len(rows) * 3 // 4
    return list(itertools.chain(*rows[:learned])), list(itertools.chain(*rows[learned:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/boxes"))
    parser.add_argument("--set", action="append", default=[], help="another setting of the recipe: batch=8")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = arguments.folder.resolve()
    measure(arguments.photos.resolve(), arguments.steps, arguments.seed, folder, arguments.set)


def measure(photos: Path, steps: int, seed: int, folder: Path, settings: list[str]) -> None:
    # 1. Rows to learn, and rows to ask.
    for name, rows in zip(("learned", "asked"), rows_of(photos, seed), strict=True):
        lines = [json.dumps({**row, "image": str(photos / "images" / row["image"])}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    overrides = [
        f"output={folder / 'run'}", f"data=[{{rows: {folder / 'learned.jsonl'}, mirror: true}}]",
        f"held_out=[{{rows: {folder / 'asked.jsonl'}}}]", f"pictures=[{folder}]", f"max_steps={steps}",
        "epochs=1000", f"measure_every={steps}", "sample_answers=0", f"seed={seed}", "save_every=10",
        *settings,
    ]  # fmt: skip
    finished = train(load_recipe(RECIPE, overrides))
    # 2. The same questions before and after, and guesses.
    before, after = answers("pumice-tiny", folder), answers(str(finished), folder)
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["held_out_loss"] for line in metrics if "held_out_loss" in line]
    print(f"held-out loss: {', '.join(f'{loss:.3f}' for loss in losses)}")
    learned = list(get_task("own").questions(folder / "learned.jsonl"))
    middle = mean_box([(question.meta["boxes"][0], question.meta["box_map"]) for question in learned])
    guesses: dict[str, Callable[[BoxMap], str]] = {
        "the whole photograph": lambda boxes: boxes.write(Box(0, 0, *boxes.size)),
        "the mean box": lambda boxes: boxes.write(middle.scaled(*boxes.size)),
    }
    tables = {"pumice-tiny": before, f"after {steps} steps": after}
    tables |= {
        name: [Answered(question, guess(question.meta["box_map"])) for question, _ in after]
        for name, guess in guesses.items()
    }
    print(f"{len(after)} questions about photographs that were not learned; {len(learned)} were learned")
    for name, answered in tables.items():
        ious = [best_iou(text, q.meta["box_map"], q.meta["boxes"]) for q, text in answered]
        share = sum(map(is_right, ious)) / len(ious)
        mean = sum(iou or 0 for iou in ious) / len(ious)
        boxes = sum(iou is not None for iou in ious)
        print(f"{name:>22}: {boxes} answers with a box, mean IoU {mean:.3f}, Acc@0.5 {share:.1%}")


def answers(model: str, folder: Path) -> list[Answered]:
    """Let a model answer the questions about photographs that it did not learn."""
    assistant = load(model)
    questions = list(get_task("own").questions(folder / "asked.jsonl"))
    rows = [([image.source() for image in question.images], question.prompt) for question in questions]
    texts = assistant.ask_many(rows, max_new_tokens=40, num_beams=1)
    for question, text in list(zip(questions, texts, strict=True))[:3]:
        print(f"{model}: {question.prompt.removeprefix(WHERE)}: {text}")
    return [Answered(question, str(text)) for question, text in zip(questions, texts, strict=True)]


def mean_box(boxes: list[tuple[Box, BoxMap]]) -> Box:
    """Return the mean of boxes, in shares of the sides of their pictures."""
    shares = [box.scaled(1 / each.size[0], 1 / each.size[1]).corners for box, each in boxes]
    return Box(*(sum(corner) / len(shares) for corner in zip(*shares, strict=True)))


if __name__ == "__main__":
    main()
