"""Your own file: one line per question, with its image, its answers and the metric."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from glob import has_magic
from pathlib import Path
from typing import Any

from pumice.boxes import BoxMap, check_boxes, picture_boxes, write_boxes
from pumice.conversation import (
    BOX_PLACEHOLDER,
    IMAGE_PLACEHOLDER,
    Objects,
    StoredImage,
    Video,
    check_media,
)
from pumice.data.mapping import unread_picture
from pumice.data.objects import read_objects
from pumice.data.pictures import Image, beside, structured, videos_of
from pumice.data.rows import Row, Rows
from pumice.data.sources.recognise import HUB, format_of
from pumice.errors import CAUSE, InputError, check_known, shorten, wrong_input
from pumice.evaluate.files import DataFile, ImageFile, read_rows, search
from pumice.evaluate.metrics.boxes import best_iou, is_right
from pumice.evaluate.metrics.captions import rouge_l
from pumice.evaluate.metrics.choice import infer_option
from pumice.evaluate.metrics.presence import is_unclear, means_yes
from pumice.evaluate.metrics.vqa import lower_without_period, normalize_m4c, textvqa_accuracy
from pumice.evaluate.task import Answered, Question, Score, Task, add_unread, mean_score
from pumice.explain.words import UNSPACED
from pumice.geometry import Size
from pumice.images import image_size

_KEPT = ("metric", "category", "choices", "prompt", "bbox_type")
_OWN_KEYS = {"question", "answer", "answers", "metric", "choices"}
BoxMaps = Callable[[Size, int], BoxMap]  # of a picture of that size in a question with so many

# A character that is looked for as a word is: also in Tibetan, which marks syllables but not words, and the
# punctuation of Chinese and Japanese.
_WORD_OF_ONE = re.compile(f"[{UNSPACED}\u0f00-\u0fff\u3000-\u303f]")
# What Korean writes behind a noun without a blank: particles, and the forms of "is".
_PARTICLES = (
    "(?:들|은|는|이|가|을|를|의|에|에서|에게|께서?|한테|와|과|이?랑|하고|도|만|으?로|까지|부터|보다|처럼|같은|마다|밖에|뿐|이?나|"
    "이?다|입니다|이에요|예요|이?야|이?고|이?며|이?라|이?라고|이?지만|이?네요|이?죠|인데?|임|요|이?었다|이?었습니다|였다|였습니다){0,4}"
)
_HANGUL = re.compile("[\uac00-\ud7a3]")
_RAISED = re.compile("([\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u215f\u2189])")  # ², ₂ and ½
# Where an answer says its letter: alone, in a box, first, after "answer is", "option" and the like, before
# "is correct", or in brackets.
_ALONE = re.compile(r"\W*(?:option\s+)?([A-Za-z])\W*", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{\s*([A-Za-z])\s*\}")
_FIRST = re.compile(r"[\W_]*([A-Z](?=\s*[).:,\]*]|[ \t]*\n)|[a-z](?=\)))")
_NAMED = re.compile(
    r"(?:\b(?i:answer|ans|option|choice)(?:\s+(?i:is|would\s+be|should\s+be))?"
    r"|答案|回答|答え|正解|选择|选项?|選擇|選項?|정답|답)(?:[\s:=]*[是为為はが은는이])*[\W_]*([A-Z]|[b-z])(?![A-Za-z0-9'])"
)
_IN_BRACKETS = re.compile(r"(?<![A-Za-z0-9])\(([A-Za-z])\)")
_RIGHT = re.compile(r"\b([A-Z])\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b")
# The English article, which is no letter of an option: "A dog", but not "A is right".
_ARTICLE = re.compile(
    r"\bA\s+(?!(?:is|was|would|as|and|or|nor|but|because|since|seems|fits|matches)\b)(?=[a-z])"
)
# Where an answer says that an option is not meant. What stands for the options comes behind the first, and
# before the second.
_DENIES = re.compile(
    r"(?i:\b(?:not|cannot|never|neither|rather|instead|wrong|incorrect|false)\b|n['’]t\b)|不|并非|並非"
)
_NOT = (
    r"(?:(?i:\b(?:not|cannot|never|neither|rather\s+than|instead\s+of)\b|n['’]t\b)|不是|不选|不選|并非|並非)"
    r"(?:\s+(?:be|show|depict|contain|have|see|include|mean|match|look\s+like)\b)?(?:\s+the\b)?"
    r"(?:\s+(?i:option|answer|choice|letter)\b)?\s*[\"'“”’`(\[{*$]{0,3}"
)
_IS_WRONG = r"\s+(?:(?:is|was|can|would\s+be)(?:n['’]t|\s+(?:not|wrong|incorrect|false))|cannot)\b"


def _plain(text: str) -> str:
    return " ".join(lower_without_period(_same_form(text).strip().rstrip("。")).split())


def _same_form(text: str) -> str:
    """Write characters that Unicode has in several forms in one: accents, full-width digits and letters."""
    # NFKC writes 10² as 102, another number, so these stay.
    parts = _RAISED.split(text)
    return "".join(p if _RAISED.fullmatch(p) else unicodedata.normalize("NFKC", p) for p in parts)


def _spaced(text: str) -> str:
    """Make each character of a script without spaces between words a word."""
    return _WORD_OF_ONE.sub(r" \g<0> ", _same_form(text))


def _holds(text: str, answer: str) -> bool:
    # Of an answer such as "A", which M4C drops as an article, nothing would be left to look for.
    form = normalize_m4c if normalize_m4c(_spaced(answer)) else _plain
    whole, part = (" ".join(form(_spaced(words)).split()) for words in (text, answer))
    if not part:
        return False
    end = _PARTICLES if _HANGUL.match(part[-1]) else ""
    return re.search(f" {re.escape(part)}{end} ", f" {whole} ") is not None


def _vqa(text: str, meta: Any) -> float:
    answers = meta["answers"]
    if len(answers) < 4:  # too few answers to leave one out
        forms = [normalize_m4c(part) or _plain(part) for part in (text, *answers)]
        return float(forms[0] in forms[1:])
    return textvqa_accuracy(text, answers)


def read_option(text: str, choices: Mapping[str, str]) -> str | None:
    """Return the option that an answer means; None if no rule reads it.

    VLMEvalKit's rules come first. An own file is bound to no official scorer, so sentences that name one
    letter as the answer, and answers that repeat one option, are read as well, and an option that an answer
    denies is not its answer.
    """
    text = _ARTICLE.sub("a ", _same_form(_without_thoughts(text)).strip())
    options = {letter: _same_form(str(option)) for letter, option in choices.items()}
    # An answer may be the text of an option that holds another's or a "not": "not visible" beside "visible".
    said = text.removesuffix(".").casefold()
    whole = [letter for letter, option in options.items() if option.removesuffix(".").casefold() == said]
    if len(whole) == 1 and text not in options:
        return whole[0]
    text = _without_denied(text, options)
    # An option without text would be found in every answer.
    texts = {letter: option if option.strip() else "\0" for letter, option in options.items()}
    if (option := infer_option(text, texts)) is not None:
        return option
    readings = (
        [_ALONE.fullmatch(text)], _BOXED.finditer(text), _NAMED.finditer(text), [_FIRST.match(text)],
        _RIGHT.finditer(text), _IN_BRACKETS.finditer(text),
    )  # fmt: skip
    for matches in readings:
        letters = {match[1].upper() for match in matches if match is not None} & choices.keys()
        if len(letters) == 1:
            return letters.pop()
    return None


def _without_thoughts(text: str) -> str:
    """Leave out what stands between <think> and </think>."""
    kept, start = "", 0
    while (begin := text.find("<think>", start)) >= 0 and (end := text.find("</think>", begin)) >= 0:
        kept += text[start:begin]
        start = end + len("</think>")
    return kept + text[start:]


def _without_denied(text: str, options: Mapping[str, str]) -> str:
    """Leave out the letters and the texts of options that an answer denies: "not A", "A is wrong"."""
    if not options or _DENIES.search(text) is None:
        return text
    texts = sorted(filter(None, options.values()), key=len, reverse=True)
    names = [*(f"(?i:{re.escape(text)})" for text in texts), *map(re.escape, options)]
    one = rf"(?:{'|'.join(names)})(?![A-Za-z0-9'’])"
    several = rf"{one}(?:(?:\s*,\s*{one})*(?:\s*,)?\s+n?or\s+{one})?"
    return re.sub(rf"{_NOT}{several}|\b{one}{_IS_WRONG}", " ", text).strip()


# Whether no rule reads an answer, and what such an answer counts as.
UNREAD: dict[str, tuple[Callable[[str, Any], bool], str]] = {
    "option": (
        lambda text, meta: read_option(text, meta["choices"]) is None,
        "name no option, which counts as wrong",
    ),
    "box": (lambda text, meta: not meta["box_map"].find(text), "hold no box, which counts as wrong"),
    "yes_no": (lambda text, _: is_unclear(text), "say neither yes nor no, which counts as yes"),
}


METRICS: dict[str, Callable[[str, Any], float]] = {
    # The same text; case and a final full stop do not count.
    "exact": lambda text, meta: float(_plain(text) in map(_plain, meta["answers"])),
    # The text holds an answer as whole words.
    "contains": lambda text, meta: float(any(_holds(text, answer) for answer in meta["answers"])),
    "vqa": _vqa,  # M4C's normalisation; from four answers on, one person is left out
    # The letter of one of "choices".
    "option": lambda text, meta: float(read_option(text, meta["choices"]) in meta["answers"]),
    # As POPE reads yes and no.
    "yes_no": lambda text, meta: float(means_yes(text) == means_yes(meta["answers"][0])),
    "rouge_l": lambda text, meta: rouge_l(_spaced(text), list(map(_spaced, meta["answers"]))),
    # Its first box overlaps one of the right ones by half.
    "box": lambda text, meta: is_right(best_iou(text, meta["box_map"], meta["boxes"])),
}


class OwnFile(Task):
    """Rows {"id", "image", "question", "answers", "metric"}; "video", "category", "choices", "prompt" if any.

    Rows in another format that can be learned from ask their first question; its answer is the right one.
    """

    name = "own"
    title = "Your own file"
    example = '{"id": "1", "image": "dog.png", "question": "What is it?", "answers": ["a dog"]}'
    has_boxes = True
    headline = "score"
    splits = ("all",)
    max_new_tokens = 256

    def questions(self, data: Path) -> Iterator[Question]:
        if (rows := _rows_to_learn(data)) is not None:
            folder = rows.opened.folder or data.parent
            for number, row in enumerate(_values(rows, folder, self.box_map), 1):
                yield _question(row, rows.label, folder, number, self.box_map)
            return
        file = DataFile(data) if data.is_file() else self.locate(data, "questions.jsonl")
        file = replace(file, example=self.example)
        if not file.text().strip():
            raise InputError(
                f"'{file}' is empty; write a table of questions, or one row per line such as {self.example}"
            )
        for number, row in enumerate(read_rows(file, "question"), 1):
            yield _question(row, str(file), file.path.parent, number, self.box_map)

    def score(self, answered: Sequence[Answered]) -> Score:
        values = [METRICS[question.meta["metric"]](text, question.meta) for question, text in answered]
        score = mean_score(answered, {"score": values}, {"category": "category", "metric": "metric"})
        score.categories = {title: cells for title, cells in score.categories.items() if cells}
        for name, (is_unread, outcome) in UNREAD.items():
            texts = [(text, question.meta) for question, text in answered if question.meta["metric"] == name]
            if texts:
                add_unread(score, sum(is_unread(text, meta) for text, meta in texts), outcome)
        if any(question.meta["metric"] == "box" for question, _ in answered):
            score.notes.append(self.box_note())
        return score


def _rows_to_learn(data: Path) -> Rows | None:
    """Return the rows of a source that can be learned from; None where it is this task's own alone."""
    text = str(data)
    if text.startswith("hf:/"):  # a path has lost one of the slashes
        return Rows(text.replace("hf:/", HUB, 1))
    if not data.exists():
        return Rows(data) if has_magic(text) else None
    if data.is_dir():
        return Rows(data) if search(data, ["questions.jsonl"]) is None else None
    if format_of(data) != "json":
        return Rows(data)
    own = True
    try:
        rows = Rows(data)
        record = rows.opened.record(0)
        own = bool(_OWN_KEYS & record.keys())
        images = [*rows[0].image]
    except InputError:
        if own:  # what is wrong with it is told by the own format
            return None
        raise
    names = record.get("image")
    if own and images == ([names] if isinstance(names, str) else names or []):
        with contextlib.suppress(InputError):  # as the list in an object, which the own format is not
            next(read_rows(DataFile(data), "question"), None)
            return None
    return rows


def _values(rows: Rows, folder: Path, box_map: BoxMaps) -> Iterator[dict[str, Any]]:
    """Yield rows as this task writes them; columns that only it has are kept."""
    for index, row in enumerate(rows):
        given: dict[str, Any] = {}
        if row.objects is not None:
            row, given = _with_boxes(row, folder, box_map)
        record = rows.opened.record(index)
        texts = [text for speaker, text in row.turns if speaker != "system"]
        own = {name: record[name] for name in _KEPT if record.get(name)}
        # Of several questions the first is asked; `answers` are then of all.
        answers = (structured(record.get("answers")) if len(texts) == 2 else None) or texts[1:2]
        if isinstance(answers, list):  # VQA's sets hold what each person answered
            answers = [a.get("answer") if isinstance(a, dict) else a for a in answers]
        question = texts[0].replace(IMAGE_PLACEHOLDER, "").strip() if texts else ""
        yield {
            "id": row.id, "image": list(row.image), "question": question, "answers": answers, **given, **own,
        }  # fmt: skip


def _with_boxes(row: Row, folder: Path, box_map: BoxMaps) -> tuple[Row, dict[str, Any]]:
    """Return a row with its boxes in its texts; and, if its first answer has some, what is right instead."""
    conversation, objects = row.conversation(None), row.objects or Objects()
    sizes = [_size(_image(folder, image)) for image in row.image]
    messages = write_boxes(conversation, [box_map(size, len(sizes)) for size in sizes]).messages
    turns = tuple(("gpt" if m.role == "assistant" else m.role, m.text) for m in messages)
    answer = next(n for n, message in enumerate(messages) if message.role == "assistant")
    texts = [message.text for message in conversation.messages[: answer + 1]]
    asked, right = sum(text.count(BOX_PLACEHOLDER) for text in texts[:-1]), texts[-1].count(BOX_PLACEHOLDER)
    row = replace(row, turns=turns)
    if not right:
        return row, {}
    corners = [list(box.corners) for box in picture_boxes(objects, sizes)[asked : asked + right]]
    return row, {"answers": corners, "bbox_type": "real", "metric": "box"}


def _question(row: dict[str, Any], label: str, folder: Path, number: int, box_map: BoxMaps) -> Question:
    error_prefix = f"'{label}', row {number}"
    # 1. Read the answers and the metric.
    if not isinstance(row["question"], str):
        raise InputError(f"{error_prefix}: 'question' must be a text, found {shorten(row['question'])}")
    answers = row.get("answers", row.get("answer"))
    if answers is None:
        raise InputError(f"{error_prefix}: 'answers' is missing; write a text or a list of texts")
    answers = [answers] if isinstance(answers, str | int | float) else answers
    is_list = isinstance(answers, list) and answers
    if not is_list or any(answer is None or isinstance(answer, dict) for answer in answers):
        raise InputError(
            f"{error_prefix}: 'answers' must be a text or a list of texts, found {shorten(answers)}"
        )
    metric = row.get("metric", "option" if row.get("choices") else "exact")
    check_known(metric, METRICS, f"{error_prefix}: there is no metric {metric!r}")
    choices = structured(row.get("choices"))
    if isinstance(choices, list):
        choices = {chr(ord("A") + n): str(text) for n, text in enumerate(choices)}
    if metric == "option" and not isinstance(choices, dict):
        raise InputError(f"{error_prefix}: the metric 'option' needs 'choices', a list of texts")
    answers = [_plain(str(answer)) if metric == "yes_no" else str(answer) for answer in answers]
    possible = {"yes_no": ("yes", "no"), "option": tuple(choices or ())}.get(metric)
    if possible and not set(answers) <= set(possible):  # otherwise no reply could be right
        raise InputError(
            f"{error_prefix}: 'answers' of '{metric}' are of {', '.join(possible)}, found {answers!r}"
        )
    # 2. Read the images, the videos and the prompt.
    check_media(row, error_prefix)
    names = row.get("image", [])
    names = [names] if isinstance(names, str) else names or []
    if not isinstance(names, list) or not all(isinstance(name, str | StoredImage | Video) for name in names):
        raise InputError(f"{error_prefix}: 'image' must be a path or a list of paths, found {names!r}")
    prompt = row.get("prompt", row["question"])
    if choices and "prompt" not in row:
        prompt = "\n".join([prompt, *(f"{letter}. {text}" for letter, text in choices.items())])
    if videos := videos_of(row, error_prefix):
        with wrong_input(InputError, f"{error_prefix}: {CAUSE}"):
            names, prompt = beside(names, videos, prompt)
    meta = {
        "question": row["question"],
        "answers": answers,
        "choices": choices,
        "metric": metric,
        "category": row.get("category"),
    }
    images = tuple(_image(folder, name) for name in names)
    if not names and (column := unread_picture(row)):
        raise InputError(
            f"{error_prefix}: {column!r} names a picture, and is not read as one; call it 'image'"
        )
    if metric == "box":
        meta |= _right_boxes(row, images, box_map, error_prefix)
    return Question(str(row.get("id", number)), images, prompt, meta)


def _right_boxes(
    row: dict[str, Any], images: tuple[ImageFile, ...], box_map: BoxMaps, error_prefix: str
) -> dict[str, Any]:
    """Return what the metric `box` compares: the right boxes in pixels, and how answers write boxes."""
    boxes = row.get("answers", row.get("answer"))
    if isinstance(boxes, list) and boxes and not any(isinstance(box, list | tuple) for box in boxes):
        boxes = [boxes]
    if len(images) != 1:
        raise InputError(f"{error_prefix}: the metric 'box' needs one picture, found {len(images)}")
    with wrong_input(InputError, f"{error_prefix}: {CAUSE}"):
        size = _size(images[0])
        objects = read_objects({"bbox": boxes, "bbox_type": row.get("bbox_type")})
        check_boxes(objects, 1)
        return {"boxes": picture_boxes(objects, [size]), "box_map": box_map(size, 1)}


def _size(image: ImageFile) -> Size:
    """Return the size (width, height) of a picture. Raises InputError, also for a video."""
    source = image.source()
    if isinstance(source, Video):
        raise InputError("the metric 'box' needs one picture, found a video")
    return image_size(source)


def _image(folder: Path, image: Image) -> ImageFile:
    """Return a picture or a video of a row with its file, or with its place inside the rows."""
    name = image if isinstance(image, str) else image.name
    if isinstance(image, StoredImage):
        return ImageFile(name, image.load)
    if isinstance(image, Video) and isinstance(image.source, StoredImage):
        return ImageFile(name, lambda: image)
    path = folder / name

    def problem() -> str:
        if path.is_file():
            return ""
        what = "video" if isinstance(image, Video) else "picture"
        return f"{what} '{name}' is not beside '{folder}'; write its path relative to the file"

    def load() -> Path | Video:
        if text := problem():
            raise InputError(text)
        return Video(path) if isinstance(image, Video) else path

    return ImageFile(name, load, problem)
