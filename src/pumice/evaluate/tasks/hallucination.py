"""CHAIR (arXiv 1809.02156): which of COCO's 80 things a caption names that are not in the picture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pumice.errors import InputError
from pumice.evaluate.files import Pictures, locate, need, read_json
from pumice.evaluate.task import Answered, Cell, Floats, Question, Score, Source, Task, percent

PROMPT = "Describe this image in detail."

Pairs = list[tuple[str, str]]  # (word, thing)

_DOUBLE = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat",
    "baseball glove", "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear",
    "hair drier", "potted plant", "bow tie", "laptop computer", "stove top oven", "home plate", "train track",
)  # fmt: skip
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub",
)  # fmt: skip
# Two words that are read as one; "baby bird" is no person, "train track" no train.
_TOGETHER = (
    {pair: pair for pair in _DOUBLE}
    | {f"{young} {animal}": animal for young in ("baby", "adult") for animal in _ANIMALS}
    | {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}
    | {"wine glas": "wine glass"}
)
# What NLTK's word_tokenize splits off; "dog/cat" stays one word, which is no thing's name.
_APART = re.compile(
    r"--|\.\.+|[\u2012-\u2015*;@#$%&?!()\[\]{}<>\"“”\u2018’«»„`]|[:,](?!\d)|\.(?=[\s\"')\]}>”’»]|$)"
    r"|(?<=\w)(?:'(?:s|m|d|ll|re|ve)|n't)(?!\w)|(?<!\w)'|'(?!\w)"
)
# The rules of pattern.en's singularize that concern the words of synonyms.txt.
_IRREGULAR = {
    "men": "man", "children": "child", "people": "person", "geese": "goose", "oxen": "ox", "kine": "cow",
    "scissors": "scissors", "doggies": "doggie", "collies": "collie", "mice": "mouse",
}  # fmt: skip
_PLURALS = tuple(
    (re.compile(many), one)
    for many, one in (
        (r"(o|bus|x|ch|ss|sh)es$", r"\1"),
        (r"([^aeiouy]|qu)ies$", r"\1y"),
        (r"([aeo]l)ves$", r"\1f"),
        (r"([nlw]i)ves$", r"\1fe"),
        (r"s$", ""),
    )
)


@lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """As the original's library has it: a "bus" becomes a "bu" (only "buses" count), "ties" become "ty"."""
    for many, one in _IRREGULAR.items():
        if word.endswith(many):
            return word.removesuffix(many) + one
    return next((many.sub(one, word) for many, one in _PLURALS if many.search(word)), word)


class Things:
    """COCO's things and their synonyms, as CHAIR's synonyms.txt lists them.

    The original's slips are kept: those of `singular`, and that a synonym behind two spaces is never found.
    corrected: neither.
    """

    def __init__(self, lines: Iterable[str], *, corrected: bool = False) -> None:
        self.names: dict[str, str] = {}
        self.corrected = corrected
        for line in lines:
            words = [word.strip() if corrected else word for word in line.strip().split(", ")]
            self.names |= {word: words[0] for word in words if word}
        self._listed = self.names.keys() | {part for pair in _TOGETHER for part in pair.split()}

    def _singular(self, word: str) -> str:
        if not self.corrected:
            return singular(word)
        forms = (word, singular(word), word.removesuffix("s"))
        return next((form for form in forms if form in self._listed), word)

    def named(self, text: str) -> Pairs:
        """(word, thing) for each thing that a text names, in order, repetitions included."""
        words = [self._singular(word) for word in _APART.sub(r" \g<0> ", text.lower()).split()]
        read: list[str] = []
        at = 0
        while at < len(words):
            pair = " ".join(words[at : at + 2])
            read.append(_TOGETHER.get(pair, words[at]))
            at += 2 if pair in _TOGETHER else 1
        if "toilet" in read:
            read = [word for word in read if word != "seat"]
        return [(word, self.names[word]) for word in read if word in self.names]


class Chair(Task):
    """Headline: CHAIRi, the share of named things that are not there; CHAIRs is the share of such captions.

    Lower is better. A thing is there when it has a mask or when one of the people's captions names it.
    The headline keeps the slips of the original's singulars ("a bus" is never named, "buses" are), as
    published numbers do; corrected beside it.
    """

    name = "chair"
    title = "CHAIR"
    headline = "CHAIRi"
    lower_is_better = True
    rank = 35
    splits = ("val",)
    max_new_tokens = 512
    source = Source(
        url="https://github.com/LisaAnne/Hallucination (data/synonyms.txt), https://cocodataset.org",
        version="COCO 2014",
        licence="annotations CC BY 4.0; pictures under COCO's terms; synonyms.txt BSD-2-Clause",
        layout=(
            "synonyms.txt",
            "instances_val2014.json, captions_val2014.json (in annotations_trainval2014.zip)",
            "val2014/; a file chair_images.txt with one image id per line chooses pictures",
        ),
    )

    def questions(self, data: Path) -> Iterator[Question]:
        lines = locate(data, ("synonyms.txt",), self.source.files).text().splitlines()
        masks = locate(data, ("instances_val2014.json", "instances_all2014.json"), self.source.files)
        written = locate(data, ("captions_val2014.json", "captions_all2014.json"), self.source.files)
        boxes, captions = read_json(masks), read_json(written)
        need(boxes, ("images", "annotations", "categories"), f"'{masks}'")
        need(captions, ("annotations",), f"'{written}'")
        readings = [Things(lines), Things(lines, corrected=True)]
        there = [_there(things, boxes, captions["annotations"]) for things in readings]
        chosen = self._chosen(data)
        pictures = Pictures(data, "val2014", "images/val2014")
        for row in boxes["images"]:
            if chosen is not None and row["id"] not in chosen:
                continue
            truths = [sorted(found.get(row["id"], ())) for found in there]
            meta = {"question": PROMPT, "answers": truths[0], "corrected": truths[1], "things": readings}
            yield Question(str(row["id"]), (pictures.get(row["file_name"]),), PROMPT, meta, row["file_name"])

    def _chosen(self, data: Path) -> set[int] | None:
        path = data / "chair_images.txt"
        if not path.is_file():
            return None
        try:
            return {int(line) for line in path.read_text(encoding="utf-8").split()}
        except ValueError as error:
            raise InputError(f"'{path}' must hold one COCO image id per line ({error}); mend it") from error

    def score(self, answered: Sequence[Answered]) -> Score:
        named, wrong = _named(answered, corrected=False)
        named_counts = np.array([len(pairs) for pairs in named], dtype=np.float64)
        wrong_counts = np.array([len(pairs) for pairs in wrong], dtype=np.float64)

        def share(weights: Floats) -> float:
            total = float((weights * named_counts).sum())
            return 100 * float((weights * wrong_counts).sum()) / total if total else float("nan")

        covered = sum(
            len({thing for _, thing in pairs} & set(question.meta["answers"]))
            for pairs, (question, _) in zip(named, answered, strict=True)
        )
        present = sum(len(question.meta["answers"]) for question, _ in answered)
        named_again, wrong_again = _named(answered, corrected=True)
        total = sum(map(len, named_again))
        metrics = {
            "CHAIRi": share(np.ones(len(answered))),
            "CHAIRs": 100 * float((wrong_counts > 0).mean()),
            "CHAIRi_corrected": 100 * sum(map(len, wrong_again)) / total if total else float("nan"),
            "CHAIRs_corrected": percent([float(bool(pairs)) for pairs in wrong_again]),
            "recall": 100 * covered / present if present else 0.0,
            "words": float(np.mean([len(text.split()) for _, text in answered])),
        }
        invented: dict[str, int] = {}
        for pairs in wrong:
            for _, thing in pairs:
                invented[thing] = invented.get(thing, 0) + 1
        parts = {"invented things": _most(invented, int(wrong_counts.sum()))} if invented else {}
        values: list[float | None] = [float(not pairs) for pairs in wrong]
        notes = [] if named_counts.any() else ["no caption names any of COCO's things"]
        return Score(metrics, parts, values, share, notes)


def _there(things: Things, boxes: Mapping[str, Any], captions: Iterable[Any]) -> dict[int, set[str]]:
    """The things in each picture, by its masks and by people's captions."""
    names = {row["id"]: things.names.get(row["name"], row["name"]) for row in boxes["categories"]}
    found: dict[int, set[str]] = {}
    for row in boxes["annotations"]:
        found.setdefault(row["image_id"], set()).add(names[row["category_id"]])
    for row in captions:
        named = (thing for _, thing in things.named(row["caption"]))
        found.setdefault(row["image_id"], set()).update(named)
    return found


def _named(answered: Sequence[Answered], *, corrected: bool) -> tuple[list[Pairs], list[Pairs]]:
    """The things that each caption names, and those of them that are not there."""
    truth = "corrected" if corrected else "answers"
    named = [question.meta["things"][corrected].named(text) for question, text in answered]
    wrong = [
        [pair for pair in pairs if pair[1] not in question.meta[truth]]
        for pairs, (question, _) in zip(named, answered, strict=True)
    ]
    return named, wrong


def _most(counts: Mapping[str, int], total: int) -> dict[str, Cell]:
    """The share of each thing in all that were invented, the commonest first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {name: Cell(100 * count / total, count) for name, count in ordered[:20]}
