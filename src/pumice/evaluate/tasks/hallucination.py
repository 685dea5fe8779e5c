"""CHAIR (arXiv 1809.02156): which of COCO's 80 things a caption names that are not in the picture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from pumice.errors import InputError
from pumice.evaluate.files import Pictures, locate, need, read_json
from pumice.evaluate.task import Answered, Cell, Floats, Question, Score, Source, Task

PROMPT = "Describe this image in detail."

_DOUBLE = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat",
    "baseball glove", "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear",
    "hair drier", "potted plant", "bow tie", "laptop computer", "stove top oven", "home plate",
)  # fmt: skip
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub",
)  # fmt: skip
# Two words that are read as one; "baby bird" is no person.
_TOGETHER = (
    {pair: pair for pair in _DOUBLE}
    | {f"{young} {animal}": animal for young in ("baby", "adult") for animal in _ANIMALS}
    | {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}
    | {"wine glas": "wine glass"}
)
_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "people", "mice": "mouse",
    "geese": "goose",
    "knives": "knife", "wolves": "wolf", "calves": "calf", "policemen": "policeman", "firemen": "fireman",
    "gentlemen": "gentleman", "ladies": "lady", "oxen": "ox", "feet": "foot", "teeth": "tooth",
    "scarves": "scarf", "loaves": "loaf", "shelves": "shelf", "leaves": "leaf", "servicemen": "serviceman",
    "grandchildren": "grandchild", "thieves": "thief",
}  # fmt: skip
_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*|[^\w\s]")


class Things:
    """COCO's things and their synonyms, as CHAIR's synonyms.txt lists them."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.names: dict[str, str] = {}
        for line in lines:
            words = [word.strip() for word in line.strip().split(", ")]
            self.names |= {word: words[0] for word in words if word}
        parts = {part for name in (*self.names, *_TOGETHER) for part in name.split()}
        self._words = frozenset(parts | {"seat"})
        self._single = lru_cache(maxsize=None)(self._singular)

    def _singular(self, word: str) -> str:
        """A plural whose singular is one of the words that matter; anything else as it is."""
        if word in _IRREGULAR:
            return _IRREGULAR[word]
        if word in self.names or not word.endswith("s"):
            return word
        endings = (word[:-1], word[:-2], f"{word[:-3]}y", f"{word[:-3]}f", f"{word[:-3]}fe")
        return next((short for short in endings if short in self._words), word)

    def named(self, text: str) -> list[tuple[str, str]]:
        """(word, thing) for each thing that a text names, in order, repetitions included."""
        words = [
            self._single(word.removesuffix("'s").removesuffix("’s")) for word in _WORD.findall(text.lower())
        ]
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
    The original finds singulars with a library of rules; here a plural counts when its singular is one
    of the words of synonyms.txt, which is where the two can differ.
    """

    name = "chair"
    title = "CHAIR"
    headline = "CHAIRi"
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
        things = Things(locate(data, ("synonyms.txt",), self.source.files).text().splitlines())
        masks = locate(data, ("instances_val2014.json", "instances_all2014.json"), self.source.files)
        written = locate(data, ("captions_val2014.json", "captions_all2014.json"), self.source.files)
        boxes, captions = read_json(masks), read_json(written)
        need(boxes, ("images", "annotations", "categories"), f"'{masks}'")
        need(captions, ("annotations",), f"'{written}'")
        names = {row["id"]: things.names.get(row["name"], row["name"]) for row in boxes["categories"]}
        there: dict[int, set[str]] = {}
        for row in boxes["annotations"]:
            there.setdefault(row["image_id"], set()).add(names[row["category_id"]])
        for row in captions["annotations"]:
            found = (thing for _, thing in things.named(row["caption"]))
            there.setdefault(row["image_id"], set()).update(found)
        chosen = self._chosen(data)
        pictures = Pictures(data, "val2014", "images/val2014")
        for row in boxes["images"]:
            if chosen is not None and row["id"] not in chosen:
                continue
            meta = {"question": PROMPT, "answers": sorted(there.get(row["id"], ())), "things": things}
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
        said = [question.meta["things"].named(text) for question, text in answered]
        wrong = [
            [pair for pair in named if pair[1] not in question.meta["answers"]]
            for named, (question, _) in zip(said, answered, strict=True)
        ]
        named_counts = np.array([len(named) for named in said], dtype=np.float64)
        wrong_counts = np.array([len(pairs) for pairs in wrong], dtype=np.float64)

        def share(weights: Floats) -> float:
            total = float((weights * named_counts).sum())
            return 100 * float((weights * wrong_counts).sum()) / total if total else float("nan")

        covered = sum(
            len({thing for _, thing in named} & set(question.meta["answers"]))
            for named, (question, _) in zip(said, answered, strict=True)
        )
        present = sum(len(question.meta["answers"]) for question, _ in answered)
        metrics = {
            "CHAIRi": share(np.ones(len(answered))),
            "CHAIRs": 100 * float((wrong_counts > 0).mean()),
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


def _most(counts: Mapping[str, int], total: int) -> dict[str, Cell]:
    """The share of each thing in all that were invented, the commonest first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {name: Cell(100 * count / total, count) for name, count in ordered[:20]}
