"""CHAIR (arXiv 1809.02156): which of COCO's 80 objects a caption names though they are not in the image."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pumice.errors import CAUSE, wrong_input
from pumice.evaluate.files import ImageFolders, read_json
from pumice.evaluate.task import Answered, CategoryScore, Floats, Question, Score, Task, mean_percent
from pumice.storage.yaml_file import read_yaml

PROMPT = "Describe this image in detail."

_WORDS = read_yaml(Path(__file__).parent / "chair.yaml", "table of words")
_TWO_WORDS: dict[str, str] = (
    {pair: pair for pair in _WORDS["double"]}
    | {f"{young} {animal}": animal for young in ("baby", "adult") for animal in _WORDS["animals"]}
    | _WORDS["others"]
)
# What NLTK's word_tokenize splits off; "dog/cat" stays one word, which names no object.
_SEPARATORS = re.compile(
    r"--|\.\.+|[\u2012-\u2015*;@#$%&?!()\[\]{}<>\"“”\u2018’«»„`]|[:,](?!\d)|\.(?=[\s\"')\]}>”’»]|$)"
    r"|(?<=\w)(?:'(?:s|m|d|ll|re|ve)|n't)(?!\w)|(?<!\w)'|'(?!\w)"
)
_PLURALS = tuple(
    (re.compile(plural), one)
    for plural, one in (
        (r"(o|bus|x|ch|ss|sh)es$", r"\1"),
        (r"([^aeiouy]|qu)ies$", r"\1y"),
        (r"([aeo]l)ves$", r"\1f"),
        (r"([nlw]i)ves$", r"\1fe"),
        (r"s$", ""),
    )
)


@lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """Return the singular as the original's library does: "bus" becomes "bu", "ties" become "ty"."""
    for plural, one in _WORDS["plurals"].items():
        if word.endswith(plural):
            return word.removesuffix(plural) + one
    return next((plural.sub(one, word) for plural, one in _PLURALS if plural.search(word)), word)


class ObjectNames:
    """The names of COCO's objects and their synonyms, from CHAIR's synonyms.txt.

    Two errors of the original stay: those of `singular`, and that a synonym after two spaces is never found.
    corrected: repair both.
    """

    def __init__(self, lines: Iterable[str], *, corrected: bool = False) -> None:
        self.names: dict[str, str] = {}
        self.corrected = corrected
        for line in lines:
            words = [word.strip() if corrected else word for word in line.strip().split(", ")]
            self.names |= {word: words[0] for word in words if word}
        self._listed = self.names.keys() | {part for pair in _TWO_WORDS for part in pair.split()}

    def _singular(self, word: str) -> str:
        if not self.corrected:
            return singular(word)
        forms = (word, singular(word), word.removesuffix("s"))
        return next((form for form in forms if form in self._listed), word)

    def find(self, text: str) -> list[str]:
        """Return each object that a text names, in order and with repetitions."""
        # 1. Split the text into singular words.
        words = [self._singular(word) for word in _SEPARATORS.sub(r" \g<0> ", text.lower()).split()]
        # 2. Join the pairs that count as one word.
        joined: list[str] = []
        index = 0
        while index < len(words):
            pair = " ".join(words[index : index + 2])
            joined.append(_TWO_WORDS.get(pair, words[index]))
            index += 2 if pair in _TWO_WORDS else 1
        # 3. A toilet seat is no chair, as in the original.
        if "toilet" in joined:
            joined = [word for word in joined if word != "seat"]
        return [self.names[word] for word in joined if word in self.names]


class Chair(Task):
    """Headline: CHAIRi, the share of named objects that are not in the image. Lower is better.

    CHAIRs is the share of captions that name such an object. An object is in the image if it has a mask or
    if a person's caption names it. The headline keeps the errors of the original's singulars ("a bus" is
    never found, "buses" are), as published numbers do; the result also holds the corrected scores.
    """

    name = "chair"
    title = "CHAIR"
    headline = "CHAIRi"
    lower_is_better = True
    splits = ("val",)
    max_new_tokens = 512

    def questions(self, data: Path) -> Iterator[Question]:
        lines = self.locate(data, "synonyms.txt").text().splitlines()
        masks = self.locate(data, "instances_val2014.json", "instances_all2014.json")
        captions_file = self.locate(data, "captions_val2014.json", "captions_all2014.json")
        annotations = read_json(masks, "images", "annotations", "categories")
        captions = read_json(captions_file, "annotations")
        vocabularies = [ObjectNames(lines), ObjectNames(lines, corrected=True)]
        objects_by_image = [
            _objects_in_images(names, annotations, captions["annotations"]) for names in vocabularies
        ]
        selected_ids = self._selected_ids(data)
        images = ImageFolders(data, "val2014", "images/val2014")
        for row in annotations["images"]:
            if selected_ids is not None and row["id"] not in selected_ids:
                continue
            truths = [sorted(objects.get(row["id"], ())) for objects in objects_by_image]
            meta = {
                "question": PROMPT,
                "answers": truths[0],
                "corrected": truths[1],
                "vocabularies": vocabularies,
            }
            yield Question(str(row["id"]), (images.get(row["file_name"]),), PROMPT, meta, row["file_name"])

    def _selected_ids(self, data: Path) -> set[int] | None:
        path = data / "chair_images.txt"
        if not path.is_file():
            return None
        with wrong_input(ValueError, f"'{path}' must hold one COCO image id per line ({CAUSE}); correct it"):
            return {int(line) for line in path.read_text(encoding="utf-8").split()}

    def score(self, answered: Sequence[Answered]) -> Score:
        # 1. Count the objects that each caption names, and those that are not in the image.
        named, wrong = _mentions(answered, corrected=False)
        named_counts = np.array([len(objects) for objects in named], dtype=np.float64)
        wrong_counts = np.array([len(objects) for objects in wrong], dtype=np.float64)

        def share(weights: Floats) -> float:
            total = float((weights * named_counts).sum())
            return 100 * float((weights * wrong_counts).sum()) / total if total else float("nan")

        # 2. Compute the metrics.
        covered = sum(
            len(set(objects) & set(question.meta["answers"]))
            for objects, (question, _) in zip(named, answered, strict=True)
        )
        present = sum(len(question.meta["answers"]) for question, _ in answered)
        named_corrected, wrong_corrected = _mentions(answered, corrected=True)
        total = sum(map(len, named_corrected))
        metrics = {
            "CHAIRi": share(np.ones(len(answered))),
            "CHAIRs": 100 * float((wrong_counts > 0).mean()),
            "CHAIRi_corrected": 100 * sum(map(len, wrong_corrected)) / total if total else float("nan"),
            "CHAIRs_corrected": mean_percent([float(bool(objects)) for objects in wrong_corrected]),
            "recall": 100 * covered / present if present else 0.0,
            "words": float(np.mean([len(text.split()) for _, text in answered])),
        }
        # 3. List the objects that were invented most often.
        invented = Counter(name for objects in wrong for name in objects)
        ordered = sorted(invented.items(), key=lambda item: (-item[1], item[0]))[:20]
        cells = {name: CategoryScore(100 * n / invented.total(), n) for name, n in ordered}
        parts = {"invented things": cells} if cells else {}
        values: list[float | None] = [float(not objects) for objects in wrong]
        notes = [] if named_counts.any() else ["no caption names any of COCO's things"]
        return Score(metrics, parts, values, share, notes)


def _objects_in_images(
    vocabulary: ObjectNames, annotations: Mapping[str, Any], captions: Iterable[Any]
) -> dict[int, set[str]]:
    """Return the objects in each image, from its masks and from people's captions."""
    names = {row["id"]: vocabulary.names.get(row["name"], row["name"]) for row in annotations["categories"]}
    objects: dict[int, set[str]] = {}
    for row in annotations["annotations"]:
        objects.setdefault(row["image_id"], set()).add(names[row["category_id"]])
    for row in captions:
        objects.setdefault(row["image_id"], set()).update(vocabulary.find(row["caption"]))
    return objects


def _mentions(answered: Sequence[Answered], *, corrected: bool) -> tuple[list[list[str]], list[list[str]]]:
    """Return the objects that each caption names, and those of them that are not in the image."""
    truth_key = "corrected" if corrected else "answers"
    named = [question.meta["vocabularies"][corrected].find(text) for question, text in answered]
    wrong = [
        [name for name in objects if name not in question.meta[truth_key]]
        for objects, (question, _) in zip(named, answered, strict=True)
    ]
    return named, wrong
