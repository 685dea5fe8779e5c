"""Do explanations point at the right place, and tell when the picture mattered?

    export PYTHONPATH=recipes/pumice-tiny
    python benchmarks/explain.py boxes     --stamps STAMPS --photos PHOTOS [--asked --count 520]
    python benchmarks/explain.py occlusion --stamps STAMPS --photos PHOTOS --count 50
    python benchmarks/explain.py captions  --photos PHOTOS
    python benchmarks/explain.py cost

boxes: things pasted at known places on blurred photographs or plain grounds, one or two to a picture; the
share of the naming word's heat inside the thing's box over the box's share of the picture (1 is chance).
The sentence is the true one ("A red square."), or, with --asked, the model's own where that names the
thing. occlusion: the same for what is lost when regions are greyed one by one. captions: what content words
and function words lose when the picture is taken away, and which answers are said to lean on it. cost:
seconds, beside those of the answer.

STAMPS is /usr/share/tuxpaint/stamps of Debian's tuxpaint-stamps-default; PHOTOS holds flickr8k/, of which
only the 500 photographs set aside by recipes/pumice-tiny are used. Intervals are 95% bootstraps over
pictures. Each part prints Markdown and, with --json FILE, writes its numbers.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rows.base import Photo, capital, rng, with_article
from rows.composites import INK, SHAPES, SIZE, Thing, draw_shape, read_stamps
from rows.flickr import read_photos, split

import pumice
from pumice.assistant import Assistant
from pumice.conversation import Conversation, user_message
from pumice.evaluate.bootstrap import interval, interval_of
from pumice.explain.attention import read
from pumice.explain.explanation import Explanation, _answer_ids, _passage, explain
from pumice.explain.maps import places
from pumice.explain.methods import METHODS, choose_layers
from pumice.explain.words import Word, averages
from pumice.explain.words import split as split_words

CAPTION = "What is happening in this picture?"
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Composite:
    """A picture, a question about one of its things, that thing, its box, the other's box if there is one."""

    picture: Image.Image
    question: str
    thing: Thing
    box: Box
    other: Box | None

    @property
    def sentence(self) -> str:
        return capital(with_article(self.thing.label)) + "."

    @property
    def noun(self) -> str:
        return self.thing.name.split()[-1]


def composite(
    number: int, seed: int, photos: Sequence[Photo], root: Path, stamps: Sequence[Thing]
) -> Composite:
    """One or two things at random places; the question asks for one of them by its side."""
    random_ = rng(seed, "explain", str(number))
    two = random_.random() < 0.5
    things = _things(random_, stamps, 2 if two else 1)
    ground = _ground(random_, photos, root, {thing.colour for thing in things})
    boxes: list[Box] = []
    for place, thing in enumerate(things):
        side = random_.randint(70, 100 if two else 130)
        scale = side / max(thing.picture.size)
        width, height = (max(1, round(n * scale)) for n in thing.picture.size)
        low, high = (place * SIZE // 2, (place + 1) * SIZE // 2) if two else (0, SIZE)
        left, top = random_.randint(low, high - width), random_.randint(0, SIZE - height)
        small = thing.picture.resize((width, height), Image.Resampling.LANCZOS)
        ground.paste(small, (left, top), small)
        boxes.append((left, top, left + width, top + height))
    asked = random_.randrange(len(things))
    question = f"What is on the {('left', 'right')[asked]}?" if two else "What is in the picture?"
    return Composite(ground, question, things[asked], boxes[asked], boxes[1 - asked] if two else None)


def _things(random_: random.Random, stamps: Sequence[Thing], count: int) -> list[Thing]:
    if stamps and random_.random() < 0.6:
        return random_.sample(list(stamps), count)
    names, colours = random_.sample(SHAPES, count), random_.sample(list(INK), count)
    return [Thing(n, c, draw_shape(n, c, 120)) for n, c in zip(names, colours, strict=True)]


def _ground(random_: random.Random, photos: Sequence[Photo], root: Path, avoid: set[str]) -> Image.Image:
    from PIL import ImageFilter

    if photos and random_.random() < 0.5:
        with Image.open(root / random_.choice(list(photos)).image) as photo:
            ground = photo.convert("RGB").resize((SIZE, SIZE))
        return ground.filter(ImageFilter.GaussianBlur(4))
    ink = INK[random_.choice(sorted(set(INK) - avoid))]
    return Image.new("RGB", (SIZE, SIZE), tuple((c + 2 * 255) // 3 for c in ink))


def factor(heat: np.ndarray, box: Box) -> float:
    """Heat (S, S) per pixel in the box over heat per pixel of the whole picture; 1 is chance."""
    left, top, right, bottom = box
    whole = float(heat.mean())
    return float(heat[top:bottom, left:right].mean()) / whole if whole > 0 else 1.0


def naming(words: Sequence[Word], noun: str) -> int | None:
    """The word that names the thing."""
    return next((n for n, word in enumerate(words) if word.text.lower() == noun.lower()), None)


def boxes(assistant: Assistant, scenes: Sequence[Composite], answers: Sequence[str]) -> dict[str, Any]:
    """Factors by method, for scenes whose answer names the thing."""
    config = assistant.model.config
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    right: dict[str, list[float]] = {name: [] for name in METHODS}
    for scene, answer in zip(scenes, answers, strict=True):
        conversation = Conversation((user_message(scene.question, [scene.picture]),))
        ids, first = _answer_ids(assistant, conversation, answer)
        _, words = split_words(ids[first:].tolist(), assistant.processor.tokenizer.decode)
        word = naming(words, scene.noun)
        if word is None:
            continue
        passage = _passage(assistant, conversation, ids, first)
        _, looks = read(assistant.model, [passage], rollout=True, gradient=True)
        mean = averages(words, len(passage.answer))[word]
        where = places(config, scene.picture.size, assistant.processor.layout(conversation.images[0]))
        for name, method in METHODS.items():
            weights = mean @ method.weigh(looks, choose_layers(method, config.decoder.depth, None))
            heat = where.paint(weights, (SIZE, SIZE))
            found[name].append(factor(heat, scene.box))
            if scene.other is not None:
                right[name].append(float(factor(heat, scene.box) > factor(heat, scene.other)))
    return {"factor": found, "right": right}


def show_boxes(found: dict[str, Any], sentences: str) -> dict[str, Any]:
    rows = {}
    print(
        f"| method | factor, {sentences} | 95% interval | own box hotter than the other's |\n|---|---|---|---|"
    )
    for name, values in found["factor"].items():
        low, high = interval(values)
        right = found["right"][name]
        rows[name] = {"factor": statistics.mean(values), "interval": [low, high], "pictures": len(values),
                      "right": statistics.mean(right) if right else None, "pairs": len(right)}  # fmt: skip
        told = f"{100 * statistics.mean(right):.0f}% of {len(right)}" if right else "-"
        print(f"| `{name}` | {statistics.mean(values):.2f} | {low:.2f}–{high:.2f} | {told} |")
    print(f"\n{len(values)} pictures")
    return rows


def occlusion(assistant: Assistant, scenes: Sequence[Composite], regions: int) -> dict[str, Any]:
    """The factor of the map of losses, negative ones counted as none."""
    values = []
    for scene in scenes:
        found = assistant.explain(scene.picture, scene.question, scene.sentence, occlusion=regions)
        word = naming(found.words, scene.noun)
        lost = found.pictures[0].occlusion
        if word is None or lost is None:
            continue
        heat = Image.fromarray(lost[word].clip(0)).resize((SIZE, SIZE), Image.Resampling.NEAREST)
        values.append(factor(np.asarray(heat), scene.box))
    low, high = interval(values)
    print(
        f"occlusion, {regions} x {regions}: {statistics.mean(values):.2f} ({low:.2f}–{high:.2f}), {len(values)}"
    )
    return {"factor": statistics.mean(values), "interval": [low, high], "pictures": len(values)}


def captions(assistant: Assistant, photos: Sequence[Photo], root: Path) -> dict[str, Any]:
    """What words of the model's own captions lose, and the scores of answers to photographs and to plain ones."""
    losses: dict[str, list[tuple[int, bool, float]]] = {"grey": [], "dropped": [], "share": []}
    scores, plain = [], []
    for number, photo in enumerate(photos):
        found = assistant.explain(root / photo.image, CAPTION, max_new_tokens=32)
        scores.append(found.reliance.score)
        for n, word in enumerate(found.words):
            if word.is_content or word.is_function:
                kind = word.is_content
                losses["grey"].append((number, kind, float(found.reliance.loss_grey[n])))
                losses["dropped"].append((number, kind, float(found.reliance.loss_dropped[n])))
                losses["share"].append((number, kind, float(found.reliance.share[n])))
        if number % 2 == 0:
            plain.append(plain_answer(assistant, number).reliance.score)
    result: dict[str, Any] = {"captions": len(scores), "threshold": pumice.explain.reliance.THRESHOLD}
    print("| taken away | content words | function words | Cohen's d | 95% interval |\n|---|---|---|---|---|")
    for name, rows in losses.items():
        groups = [row[0] for row in rows]
        content, values = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])

        def effect(weights: np.ndarray, content: np.ndarray = content, values: np.ndarray = values) -> float:
            return cohen(values, content, weights)

        low, high = interval_of(effect, groups)
        d = effect(np.ones(len(values)))
        means = values[content].mean(), values[~content].mean()
        result[name] = {"d": d, "interval": [low, high], "content": means[0], "function": means[1],
                        "words": [int(content.sum()), int((~content).sum())]}  # fmt: skip
        print(f"| {name} | {means[0]:.3f} | {means[1]:.3f} | {d:.2f} | {low:.2f}–{high:.2f} |")
    for name, values in (("photographs", scores), ("plain pictures", plain)):
        leaning = sum(value >= result["threshold"] for value in values)
        quantiles = [round(float(q), 3) for q in np.quantile(values, [0, 0.05, 0.5, 0.95, 1])]
        result[name] = {"leaning": leaning, "of": len(values), "quantiles": quantiles}
        print(f"{name}: {leaning} of {len(values)} lean; score at 0, 5, 50, 95, 100%: {quantiles}")
    return result


def plain_answer(assistant: Assistant, number: int) -> Explanation:
    """The answer to a grey picture: of another grey than the mean colour, every other one with noise."""
    random_ = np.random.default_rng(number)
    level = int(random_.integers(96, 160))
    values = np.full((224, 224, 3), level, np.float32)
    if number % 4:
        values += random_.normal(0, 4, values.shape)
    return assistant.explain(
        Image.fromarray(values.clip(0, 255).astype(np.uint8)), CAPTION, max_new_tokens=32
    )


def cohen(values: np.ndarray, first: np.ndarray, weights: np.ndarray) -> float:
    """Cohen's d of two groups of weighted values: the difference of means in pooled standard deviations."""
    parts = []
    for chosen in (first, ~first):
        v, w = values[chosen], weights[chosen]
        mean = np.average(v, weights=w)
        parts.append((mean, np.average((v - mean) ** 2, weights=w), w.sum()))
    (a, var_a, n_a), (b, var_b, n_b) = parts
    return float((a - b) / np.sqrt((n_a * var_a + n_b * var_b) / (n_a + n_b - 2)))


def cost(assistant: Assistant, picture: Path) -> dict[str, Any]:
    """Median seconds of an answer to a new picture, and of explaining it."""
    rows: dict[str, list[float]] = {"answer": [], **{name: [] for name in METHODS}}
    conversation = Conversation((user_message("Describe this picture in detail.", [picture]),))
    answer, tokens = "", 0
    for _ in range(5):
        assistant._seen.clear()
        start = time.perf_counter()
        reply = assistant.stream(conversation)
        answer = "".join(reply)
        rows["answer"].append(time.perf_counter() - start)
        tokens = reply.tokens
        for name in METHODS:
            start = time.perf_counter()
            explain(assistant, conversation, answer, method=name)
            rows[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in rows.items()}
    print(f"an answer of {tokens} tokens: {medians['answer']:.3f} s")
    for name in METHODS:
        print(f"| `{name}` | {medians[name]:.3f} s | {medians[name] / medians['answer']:.2f} |")
    return {"tokens": tokens, "seconds": medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("boxes", "occlusion", "captions", "cost"))
    parser.add_argument("--model", default="pumice-tiny")
    parser.add_argument("--stamps", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="where to begin, to measure in pieces")
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--regions", type=int, default=4)
    parser.add_argument("--asked", action="store_true")
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent.parent / "examples" / "dog.jpg")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    assistant = pumice.load(options.model)
    photos = split(read_photos(options.photos))[1] if options.photos else []
    root = options.photos or Path()
    stamps = read_stamps(options.stamps) if options.stamps else []
    numbers = range(options.first, options.first + options.count)
    start = time.perf_counter()
    if options.part in ("boxes", "occlusion"):
        scenes = [composite(number, options.seed, photos, root, stamps) for number in numbers]
    if options.part == "boxes" and options.asked:
        answers = list(
            assistant.ask_batch(((s.picture, s.question) for s in scenes), slots=16, max_new_tokens=16)
        )
        result = show_boxes(boxes(assistant, scenes, [str(a) for a in answers]), "own sentence")
    elif options.part == "boxes":
        result = show_boxes(boxes(assistant, scenes, [s.sentence for s in scenes]), "true sentence")
    elif options.part == "occlusion":
        result = occlusion(assistant, scenes, options.regions)
    elif options.part == "captions":
        result = captions(assistant, photos[numbers.start : numbers.stop], root)
    else:
        result = cost(assistant, options.picture)
    print(f"{time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
