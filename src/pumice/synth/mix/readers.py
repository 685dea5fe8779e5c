"""Read the official files of each academic task as units of question and answer.

Field names are the publishers'. Prompts are data to be compatible with (arXiv 2310.03744, tables 7 and 9).
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pumice.boxes import FORMS, Box, BoxMap
from pumice.conversation import IMAGE_PLACEHOLDER
from pumice.data.objects import WHERE
from pumice.data.rows import Rows
from pumice.data.sources.coco import most_given
from pumice.errors import InputError, counted
from pumice.storage.plain_pickle import read_plain_pickle
from pumice.synth.files import first_byte, items, pairs, visual_genome_images

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
WHAT = "Please provide a short description for this region: "

REGIONS = 10  # of one picture of Visual Genome, as the paper samples them
REFERRED = 9  # turns in one row of RefCOCO: the paper keeps to fewer than ten


@dataclass(frozen=True)
class Unit:
    """Questions and answers that stay together. Units of the same image and part become one row."""

    image: str | None
    turns: tuple[tuple[str, str], ...]
    part: int = 0


@dataclass
class ReaderInput:
    """What a reader is inputs, and what it counts. files: by role; a role may have several."""

    files: dict[str, list[Path]]
    images: str  # put before each picture's name
    seed: int
    padded: bool = True  # boxes as shares of the square that training pads pictures to
    longest: int = 8000  # characters of a text-only chat, which is cut behind an answer
    items: int = 0  # entries of the official file
    skipped: Counter[str] = field(default_factory=Counter)

    def file(self, role: str) -> Path:
        return self.files[role][0]

    def image(self, name: str) -> str:
        return str(PurePosixPath(self.images) / name) if self.images else name

    def pick(self, *names: Any) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *names))))


def vqav2(inputs: ReaderInput) -> Iterator[Unit]:
    """VQAv2 and OK-VQA: questions and annotations joined by question_id; the answer most people gave."""
    answers: dict[Any, str] = {}
    file, notes = inputs.file("questions"), inputs.file("annotations")
    for note in items(notes, "annotations"):
        answers[note.get("question_id")] = sys.intern(str(most_given(note)))
    for question in items(file, "questions"):
        inputs.items += 1
        key, image = question.get("question_id"), question.get("image_id")
        if key not in answers:
            raise InputError(
                f"'{file}': question {key} has no answer in '{notes}'; give both files of one split"
            )
        if not isinstance(image, int):
            raise InputError(f"'{file}': question {key} has the image_id {image!r}; mend it")
        if answers[key].strip():
            yield Unit(inputs.image(f"{image:012d}.jpg"), ((str(question.get("question")), answers[key]),))
        else:
            inputs.skipped["empty answer"] += 1
    if inputs.items != len(answers):
        raise InputError(
            f"'{file}' has {counted(inputs.items, 'question')} and '{notes}' "
            f"{counted(len(answers), 'answer')}; give both files of one split"
        )


def gqa(inputs: ReaderInput) -> Iterator[Unit]:
    """GQA's train_balanced_questions.json."""
    file = inputs.file("questions")
    for key, question in pairs(file):
        inputs.items += 1
        if "answer" not in question or "imageId" not in question:
            raise InputError(f"'{file}': question {key} lacks answer or imageId; give GQA's file")
        yield Unit(inputs.image(f"{question['imageId']}.jpg"), ((question["question"], question["answer"]),))


def aokvqa(inputs: ReaderInput) -> Iterator[Unit]:
    """A-OKVQA, once per choice: the choices turn round, so that the right one has had every letter."""
    for question in items(inputs.file("questions")):
        inputs.items += 1
        choices, right = question.get("choices"), question.get("correct_choice_idx")
        if not isinstance(choices, list) or not isinstance(right, int) or not 0 <= right < len(choices):
            raise InputError(
                f"'{inputs.file('questions')}': question {question.get('question_id')} has no right choice; "
                "give the train or val file"
            )
        for turn in range(len(choices)):
            turned = choices[turn:] + choices[:turn]
            lines = [f"{chr(65 + n)}. {choice}" for n, choice in enumerate(turned)]
            text = "\n".join([question["question"], *lines]) + LETTER
            letter = chr(65 + (right - turn) % len(choices))
            yield Unit(inputs.image(f"{question['image_id']:012d}.jpg"), ((text, letter),), part=turn)


def ocrvqa(inputs: ReaderInput) -> Iterator[Unit]:
    """OCR-VQA's dataset.json: the books of its train split (1)."""
    for key, book in pairs(inputs.file("dataset")):
        if book.get("split") != 1:
            continue
        inputs.items += 1
        questions, answers = book.get("questions") or [], book.get("answers") or []
        if len(questions) != len(answers):
            raise InputError(
                f"'{inputs.file('dataset')}': book {key} has {counted(len(questions), 'question')} and "
                f"{counted(len(answers), 'answer')}; mend it"
            )
        suffix = PurePosixPath(str(book.get("imageURL") or "")).suffix or ".jpg"
        turns = tuple((q, a) for q, a in zip(questions, answers, strict=True) if str(a).strip())
        if turns:
            yield Unit(inputs.image(f"{key}{suffix}"), turns)
        else:
            inputs.skipped["no answers"] += 1


def textcaps(inputs: ReaderInput) -> Iterator[Unit]:
    """TextCaps with the OCR tokens of TextVQA where that file is given; one of a picture's captions."""
    listed = items(inputs.file("ocr"), "data") if "ocr" in inputs.files else ()
    tokens = {str(one.get("image_id")): [str(t) for t in one.get("ocr_tokens") or ()] for one in listed}
    captions: dict[str, list[str]] = {}
    for entry in items(inputs.file("captions"), "data"):
        inputs.items += 1
        text = " ".join(str(entry.get("caption_str") or "").split())
        if text:
            captions.setdefault(str(entry.get("image_id")), []).append(text)
        else:
            inputs.skipped["empty caption"] += 1
    for image, texts in captions.items():
        prompt = CAPTION
        if "ocr" in inputs.files:
            prompt += f"\nReference OCR token: {', '.join(tokens.get(image, []))}"
        yield Unit(inputs.image(f"{image}.jpg"), ((prompt, inputs.pick(image).choice(texts)),))


def refcoco(inputs: ReaderInput) -> Iterator[Unit]:
    """RefCOCO, RefCOCO+ and RefCOCOg: refs(...).p and COCO's instances.json; the train split."""
    sizes: dict[Any, tuple[str, int, int]] = {}
    boxes: dict[Any, list[float]] = {}
    for file in inputs.files["instances"]:
        for image in items(file, "images"):
            sizes[image["id"]] = (image["file_name"], image["width"], image["height"])
        for note in items(file, "annotations"):
            boxes[note["id"]] = note["bbox"]
    turns: dict[Any, list[tuple[str, str]]] = {}
    for file in inputs.files["refs"]:
        for ref in _refs(file):
            if ref.get("split") != "train":
                continue
            image, box = ref.get("image_id"), boxes.get(ref.get("ann_id"))
            if image not in sizes or box is None:
                raise InputError(
                    f"'{file}': ref {ref.get('ref_id')} names picture {image} and annotation "
                    f"{ref.get('ann_id')}, which the instances file does not have; give the one beside it"
                )
            for sentence in ref.get("sentences") or ():
                inputs.items += 1
                text = " ".join(str(sentence.get("sent") or "").split())
                if (place := _place(box, sizes[image], inputs.padded)) is None or not text:
                    inputs.skipped["no area or no words"] += 1
                    continue
                pick = inputs.pick(file.name, sentence.get("sent_id"))
                turns.setdefault(image, []).append(_region(text, place, pick))
    for image, found in turns.items():
        name = PurePosixPath(sizes[image][0]).name.rpartition("_")[2]  # COCO 2014's name ends as 2017's does
        for start in range(0, len(found), REFERRED):
            yield Unit(inputs.image(name), tuple(found[start : start + REFERRED]), part=start)


def visual_genome(inputs: ReaderInput) -> Iterator[Unit]:
    """Visual Genome's region descriptions, at most ten of a picture, with image_data.json for the sizes."""
    sizes = {
        key: (name, image["width"], image["height"])
        for key, name, image in visual_genome_images(inputs.file("images"))
    }
    for entry in items(inputs.file("regions")):
        inputs.items += 1
        key = entry.get("image_id", entry.get("id"))
        if key not in sizes:
            raise InputError(f"'{inputs.file('regions')}': picture {key} is not in '{inputs.file('images')}'")
        regions = []
        for region in entry.get("regions") or ():
            text = " ".join(str(region.get("phrase") or "").split())
            box = [region.get(n, 0) for n in ("x", "y", "width", "height")]
            corners_text = _place(box, sizes[key], inputs.padded)
            if corners_text is None or not text:
                inputs.skipped["no area or no words"] += 1
            else:
                regions.append((region.get("region_id"), text, corners_text))
        if len(regions) > REGIONS:
            regions = inputs.pick(key).sample(regions, REGIONS)
        if regions:
            turns = (
                _region(text, corners_text, inputs.pick(key, number))
                for number, text, corners_text in regions
            )
            yield Unit(inputs.image(sizes[key][0]), tuple(turns))
        else:
            inputs.skipped["picture without regions"] += 1


def sharegpt(inputs: ReaderInput) -> Iterator[Unit]:
    """Text-only chats: [{id, conversations: [{from, value}]}]; those that do not take turns are left out."""
    names = {"user": "human", "chatgpt": "gpt", "assistant": "gpt", "bing": "gpt"}
    for chat in items(inputs.file("chats")):
        inputs.items += 1
        messages = [
            (names.get(str(t.get("from")), str(t.get("from"))), str(t.get("value") or ""))
            for t in chat.get("conversations") or ()
        ]
        while messages and messages[0][0] != "human":
            del messages[0]
        pairs_of_texts = _in_turn(messages[: len(messages) // 2 * 2])
        if not pairs_of_texts or any(
            not text.strip() or IMAGE_PLACEHOLDER in text for pair in pairs_of_texts for text in pair
        ):
            inputs.skipped["does not take turns"] += 1
            continue
        turns: list[tuple[str, str]] = []
        length = 0
        for question, answer in pairs_of_texts:
            length += len(question) + len(answer)
            if length > inputs.longest:
                break
            turns.append((question, answer))
        if turns:
            yield Unit(None, tuple(turns))
        else:
            inputs.skipped["too long"] += 1


def llava(inputs: ReaderInput) -> Iterator[Unit]:
    """Rows in LLaVA's own format, taken as they are: LLaVA-Instruct, or what `data generate` wrote."""
    for file in inputs.files["rows"]:
        rows = Rows(file)
        for number in range(len(rows)):
            inputs.items += 1
            row = rows[number]
            turns = _in_turn([(speaker, text) for speaker, text in row.turns if speaker != "system"])
            names = [image for image in row.image if isinstance(image, str)]
            if turns is None or len(row.image) > 1 or len(names) != len(row.image):
                inputs.skipped["does not take turns"] += 1
                continue
            image = inputs.image(names[0]) if names else None
            texts = tuple((q.replace(IMAGE_PLACEHOLDER, "").strip(), a) for q, a in turns)
            yield Unit(image, texts, part=number)


def _in_turn(messages: Sequence[tuple[str, str]]) -> list[tuple[str, str]] | None:
    """Return (question, answer) of messages that a human and a model write in turn; None of others."""
    if [speaker for speaker, _ in messages] != ["human", "gpt"] * (len(messages) // 2):
        return None
    return [(q, a) for (_, q), (_, a) in zip(messages[::2], messages[1::2], strict=True)]


def _region(text: str, place: str, pick: random.Random) -> tuple[str, str]:
    return (WHAT + place, text) if pick.random() < 0.5 else (WHERE + text, place)


def _place(box: list[Any], size: tuple[str, int, int], padded: bool) -> str | None:
    """A box of pixels (left, top, width, height) as text with two decimals; None when nothing is left of it.

    padded: shares of the square with the picture in its middle, as LLaVA-1.5's boxes are (its issue 606).
    """
    _, width, height = size
    left, top, wide, high = box
    placed = Box(left, top, left + wide, top + high)
    if placed.meet(Box(0, 0, width, height)).area <= 0:
        return None
    return BoxMap(FORMS["padded" if padded else "picture"], (width, height)).write(placed)


def _refs(file: Path) -> list[dict[str, Any]]:
    """RefCOCO's refs, which are published as pickles of plain data, or the same list as JSON."""
    if first_byte(file) == "[":
        return list(items(file))
    refs = read_plain_pickle(file.read_bytes(), str(file))
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise InputError(f"'{file}' holds no list of refs; give RefCOCO's own file")
    return refs


@dataclass(frozen=True)
class Reader:
    """A task: how it is read, which files it needs, and what is known of LLaVA-1.5's share of it.

    merge: units of a picture become one row. suffix: put behind the first question of a row.
    full: entries of the whole official file, rows: of LLaVA-1.5's mixture; exact: the one implies the other.
    """

    read: Callable[[ReaderInput], Iterator[Unit]]
    needs: tuple[str, ...]
    rows: int
    full: int | None = None
    exact: bool = False
    may: tuple[str, ...] = ()
    merge: bool = True
    suffix: str = ""


READERS = {
    "llava": Reader(llava, ("rows",), 157_712, 157_712, True, merge=False),
    "sharegpt": Reader(sharegpt, ("chats",), 40_688, merge=False),
    "vqav2": Reader(vqav2, ("questions", "annotations"), 82_783, 443_757, True, suffix=SHORT),
    "gqa": Reader(gqa, ("questions",), 72_140, 943_000, True, suffix=SHORT),
    "okvqa": Reader(vqav2, ("questions", "annotations"), 8_998, 9_009, True, suffix=SHORT),
    "ocrvqa": Reader(ocrvqa, ("dataset",), 80_000, suffix=SHORT),
    "aokvqa": Reader(aokvqa, ("questions",), 66_160, 17_056, True),
    "textcaps": Reader(textcaps, ("captions",), 21_953, 109_765, True, may=("ocr",)),
    "refcoco": Reader(refcoco, ("refs", "instances"), 48_447),
    "vg": Reader(visual_genome, ("regions", "images"), 86_417),
}
