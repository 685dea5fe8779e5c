"""Measure whether explanations point at the right place and tell when the picture mattered.

    export PYTHONPATH=projects/pumice-tiny
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
pictures. Each part prints Markdown. With --keep FILE each picture's numbers are kept as they come, and a
second run takes up where the first was ended.
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
from PIL import Image, ImageFilter
from rows.base import Photo, capital, rng, with_article
from rows.composites import INK, SHAPES, SIZE, Thing, draw_shape, read_stamps
from rows.flickr import read_photos, split

import pumice
from pumice.assistant import Assistant, explain
from pumice.conversation import Conversation, user_message
from pumice.evaluate.metrics.bootstrap import interval_of
from pumice.evaluate.task import mean_statistic
from pumice.explain.attention import read
from pumice.explain.explanation import Explanation, PassageBuilder
from pumice.explain.maps import token_boxes
from pumice.explain.methods import METHODS, choose_layers
from pumice.explain.reliance import THRESHOLD
from pumice.explain.words import Word, averages
from pumice.explain.words import split as split_words
from pumice.files import appending, whole_lines

CAPTION = "What is happening in this picture?"
Box = tuple[int, int, int, int]
Row = dict[str, Any]  # of one picture


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
    for index, thing in enumerate(things):
        side = random_.randint(70, 100 if two else 130)
        scale = side / max(thing.picture.size)
        width, height = (max(1, round(n * scale)) for n in thing.picture.size)
        low, high = (index * SIZE // 2, (index + 1) * SIZE // 2) if two else (0, SIZE)
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
    if photos and random_.random() < 0.5:
        with Image.open(root / random_.choice(list(photos)).image) as photo:
            ground = photo.convert("RGB").resize((SIZE, SIZE))
        return ground.filter(ImageFilter.GaussianBlur(4))
    ink = INK[random_.choice(sorted(set(INK) - avoid))]
    return Image.new("RGB", (SIZE, SIZE), tuple((c + 2 * 255) // 3 for c in ink))


def factor(heat: np.ndarray, box: Box) -> float:
    """Heat (S, S) per pixel in the box over heat per pixel of the whole picture; 1 is chance."""
    left, top, right, bottom = box
    mean_heat = float(heat.mean())
    return float(heat[top:bottom, left:right].mean()) / mean_heat if mean_heat > 0 else 1.0


def naming(words: Sequence[Word], noun: str) -> int | None:
    """The word that names the thing."""
    return next((n for n, word in enumerate(words) if word.text.lower() == noun.lower()), None)


def boxes(assistant: Assistant, scene: Composite, answer: str) -> Row | None:
    """Factors by method of the word that names the thing; None where none does."""
    config = assistant.model.config
    conversation = Conversation((user_message(scene.question, [scene.picture]),))
    reader = PassageBuilder(
        assistant.model, assistant.processor, lambda shown: assistant.prompt(shown).encode_images()
    )
    ids, first = reader.answer_ids(conversation, answer)
    _, words = split_words(ids[first:].tolist(), assistant.processor.tokenizer.decode)
    word = naming(words, scene.noun)
    if word is None:
        return None
    passage = reader.passage(conversation, ids, first)
    _, looks = read(assistant.model, [passage], rollout=True, gradient_from=0)
    mean = averages(words, len(passage.answer))[word]
    token_map = token_boxes(config, scene.picture.size, assistant.processor.layouts(conversation.images)[0])
    row: Row = {}
    for name, method in METHODS.items():
        weights = mean @ method.weigh(looks, choose_layers(method, config.decoder.depth, None))
        row[name] = _both(token_map.paint(weights, (SIZE, SIZE)), scene)
    return row


def occlusion(assistant: Assistant, scene: Composite, regions: int) -> Row | None:
    """The same of what is lost where regions are greyed, gains counted as nothing."""
    explanation = assistant.explain(
        scene.picture, scene.question, scene.sentence, method="mean", occlusion=regions
    )
    word, lost = naming(explanation.words, scene.noun), explanation.pictures[0].occlusion
    if word is None or lost is None:
        return None
    heat = Image.fromarray(lost[word].clip(0)).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    return {f"occlusion {regions} × {regions}": _both(np.asarray(heat), scene)}


def _both(heat: np.ndarray, scene: Composite) -> list[float | None]:
    """The factor of the thing named, and of the other one, if there is one."""
    return [factor(heat, scene.box), None if scene.other is None else factor(heat, scene.other)]


def show_boxes(rows: Sequence[Row]) -> None:
    print("| method | factor | 95% interval | hotter than the other's box |\n|---|---|---|---|")
    for name in rows[0] if rows else ():
        values = [row[name][0] for row in rows]
        right = [row[name][0] > row[name][1] for row in rows if row[name][1] is not None]
        low, high = interval_of(mean_statistic(values, 1.0), range(len(values)))
        share = f"{100 * statistics.mean(right):.0f}% of {len(right)}" if right else "-"
        print(f"| `{name}` | {statistics.mean(values):.2f} | {low:.2f}–{high:.2f} | {share} |")
    print(f"\n{len(rows)} pictures")


def caption(assistant: Assistant, photo: Path, number: int) -> Row:
    """What the words of the model's own caption lose; every other time the answer to a plain picture, too."""
    explanation = assistant.explain(photo, CAPTION, method="mean", max_new_tokens=32)
    losses = explanation.reliance.loss_grey, explanation.reliance.loss_dropped, explanation.reliance.share
    words = [
        [word.is_content, *(float(values[n]) for values in losses)]
        for n, word in enumerate(explanation.words)
        if any(map(str.isalnum, word.text))  # punctuation is neither
    ]
    plain = None if number % 2 else _scores(plain_answer(assistant, number))
    return {"words": words, "score": _scores(explanation), "plain": plain}


def _scores(explanation: Explanation) -> list[float]:
    """Of a whole answer: nats per word with grey pictures, which it is judged by, and with none."""
    return [explanation.reliance.score, float(explanation.reliance.loss_dropped.mean())]


def plain_answer(assistant: Assistant, number: int) -> Explanation:
    """The answer to a grey picture: of another grey than the mean colour, most of them with noise."""
    random_ = np.random.default_rng(number)
    values = np.full((224, 224, 3), random_.integers(96, 160), np.float32)
    if number % 8:
        values += random_.normal(0, 4, values.shape)
    picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return assistant.explain(picture, CAPTION, method="mean", max_new_tokens=32)


def show_captions(rows: Sequence[Row]) -> None:
    print("| measure | content words | function words | Cohen's d | 95% interval |\n|---|---|---|---|---|")
    groups = [number for number, row in enumerate(rows) for _ in row["words"]]
    table = np.array([word for row in rows for word in row["words"]], np.float64)
    content = table[:, 0] > 0
    for column, name in enumerate(("loss, grey", "loss, dropped", "share of attention"), 1):
        values = table[:, column]

        def effect(weights: np.ndarray, values: np.ndarray = values) -> float:
            return cohen(values, content, weights)

        low, high = interval_of(effect, groups)
        means = values[content].mean(), values[~content].mean()
        d = effect(np.ones(len(values)))
        print(f"| {name} | {means[0]:.3f} | {means[1]:.3f} | {d:.2f} | {low:.2f}–{high:.2f} |")
    print(f"\n{len(rows)} captions, {content.sum()} content words, {(~content).sum()} function words")
    for kind, key in (("photographs", "score"), ("plain pictures", "plain")):
        scores = np.array([row[key] for row in rows if row[key] is not None])
        quantiles = [np.quantile(column, [0, 0.05, 0.5, 0.95, 1]).round(2).tolist() for column in scores.T]
        print(f"{kind}: {(scores[:, 0] >= THRESHOLD).sum()} of {len(scores)} lean; at 0, 5, 50, 95 and 100%:")
        print(f"  grey {quantiles[0]}, dropped {quantiles[1]}")


def cohen(values: np.ndarray, first: np.ndarray, weights: np.ndarray) -> float:
    """Cohen's d of two groups of weighted values: the difference of means in pooled standard deviations."""
    parts = []
    for chosen in (first, ~first):
        v, w = values[chosen], weights[chosen]
        mean = np.average(v, weights=w)
        parts.append((mean, np.average((v - mean) ** 2, weights=w), w.sum()))
    (a, var_a, n_a), (b, var_b, n_b) = parts
    return float((a - b) / np.sqrt((n_a * var_a + n_b * var_b) / (n_a + n_b - 2)))


def cost(assistant: Assistant, picture: Path) -> None:
    """Median seconds of an answer to a new picture, and of explaining it."""
    rows: dict[str, list[float]] = {"answer": [], **{name: [] for name in METHODS}}
    conversation = Conversation((user_message("Describe this picture in detail.", [picture]),))
    answer, tokens = "", 0
    for _ in range(5):
        assistant._image_tokens.clear()
        start = time.perf_counter()
        reply = assistant.stream(conversation, num_beams=1)
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


def read_rows(path: Path | None) -> dict[int, Row | None]:
    if path is None or not path.exists():
        return {}
    return dict(map(json.loads, whole_lines(path)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("boxes", "occlusion", "captions", "cost"))
    parser.add_argument("--model", default="pumice-tiny")
    parser.add_argument("--stamps", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--regions", type=int, default=4)
    parser.add_argument("--asked", action="store_true", help="the model's own answers")
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent.parent / "examples" / "dog.jpg")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    assistant = pumice.load(options.model)
    if options.part == "cost":
        cost(assistant, options.picture)
        return
    photos = split(read_photos(options.photos))[1] if options.photos else []
    root = options.photos or Path()
    stamps = read_stamps(options.stamps) if options.stamps else []
    finished_rows = read_rows(options.keep)
    for number in range(options.count):
        if number in finished_rows:
            continue
        if options.part == "captions":
            row: Row | None = caption(assistant, root / photos[number].image, number)
        else:
            scene = composite(number, options.seed, photos, root, stamps)
            if options.part == "occlusion":
                row = occlusion(assistant, scene, options.regions)
            else:
                greedy = {"max_new_tokens": 16, "num_beams": 1}
                own = assistant.ask(scene.picture, scene.question, **greedy) if options.asked else None
                row = boxes(assistant, scene, own or scene.sentence)
        finished_rows[number] = row
        if options.keep is not None:
            with appending(options.keep) as file:
                file.write(json.dumps([number, row]) + "\n")
    rows = [row for _, row in sorted(finished_rows.items()) if row is not None]
    (show_captions if options.part == "captions" else show_boxes)(rows)


if __name__ == "__main__":
    main()
