"""Measures a model on the held-out photographs that build.py set aside, beside a grey picture.

    python projects/pumice-tiny/measure.py --model MODEL --rows ROWS/val --photos PHOTOS [--json FILE]
        [--easy-vqa EASY_VQA]

Every photograph is captioned under each prompt (CIDEr against the captions people wrote) and asked
the yes/no questions of presence.jsonl (POPE's way of counting), greedily, through the public interface
alone. The same is asked about a grey picture of the same size: what the words of a question give away.
--easy-vqa asks the test split of easy-vqa too, as `pumice eval easy-vqa` does and counts.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

import pumice
from pumice.errors import InputError
from pumice.evaluate.metrics.bootstrap import interval
from pumice.evaluate.metrics.cider import Cider
from pumice.evaluate.metrics.presence import means_yes, presence_score
from pumice.evaluate.result import AnswerSet, QuestionSet, format_result, make_result, read_questions
from pumice.evaluate.run import check_images
from pumice.evaluate.task import Answered
from pumice.evaluate.tasks import get_task

PROMPTS = (
    "Describe the image concisely.",
    "What is happening in this picture?",
    "Say what this photo shows in a sentence.",  # not a prompt of the training rows
)
GREY = (127, 127, 127)
LONGEST = 64  # tokens of an answer
SLOTS = 16  # answers decoded together

Ask = tuple[str, str]  # (picture's path in the rows, question)


@dataclass(frozen=True)
class HeldOut:
    """captions: {"image", "captions"} per picture; questions: {"image", "question", "answer", "kind"}."""

    captions: list[dict[str, Any]]
    questions: list[dict[str, Any]]
    partial: bool

    @property
    def asks(self) -> list[Ask]:
        """Everything asked of a model, each picture's together, so that it is looked at once."""
        by_picture = {row["image"]: [(row["image"], prompt) for prompt in PROMPTS] for row in self.captions}
        for row in self.questions:
            by_picture.setdefault(row["image"], []).append((row["image"], row["question"]))
        return [ask for asks in by_picture.values() for ask in asks]


def read_held_out(rows: Path, limit: int | None = None) -> HeldOut:
    """The files build.py wrote; with `limit`, of the first pictures only. Raises InputError."""
    try:
        captions = json.loads((rows / "captions.json").read_text(encoding="utf-8"))
        lines = (rows / "presence.jsonl").read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line) for line in lines]
    except OSError as error:
        raise InputError(f"cannot read {error.filename}; give the val folder that build.py wrote") from error
    except ValueError as error:
        raise InputError(f"a file in {rows} is damaged ({error}); run build.py again") from error
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; give 1 or more pictures")
    chosen = captions[:limit]
    pictures = {row["image"] for row in chosen}
    asked = [row for row in questions if limit is None or row["image"] in pictures]
    if not chosen or not asked:
        raise InputError(f"{rows} has {len(chosen)} captioned pictures and {len(asked)} questions on them")
    return HeldOut(chosen, asked, partial=len(chosen) < len(captions))


def ask_all(assistant: Any, asks: Sequence[tuple[Any, str]], what: str) -> list[str]:
    """One answer for each (picture, question), in order. Raises the InputError of the first that failed."""
    answers = assistant.ask_each(asks, slots=SLOTS, max_new_tokens=LONGEST)
    shown = track(
        answers,
        description=what,
        total=len(asks),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    texts = []
    for answer in shown:
        if isinstance(answer, InputError):
            raise answer
        texts.append(answer)
    return texts


def look(assistant: Any, held: HeldOut, photos: Path) -> dict[Ask, str]:
    """Answers about the photographs."""
    asks = held.asks
    answers = ask_all(assistant, [(photos / image, question) for image, question in asks], "photographs")
    return dict(zip(asks, answers, strict=True))


def look_at_grey(assistant: Any, held: HeldOut, photos: Path) -> dict[Ask, str]:
    """Answers about grey pictures of the same sizes; pictures of one size share them."""
    sizes = {}
    for image in dict.fromkeys(image for image, _ in held.asks):
        with Image.open(photos / image) as photo:
            sizes[image] = photo.size
    grey = {size: Image.new("RGB", size, GREY) for size in set(sizes.values())}
    different = list(dict.fromkeys((sizes[image], question) for image, question in held.asks))
    answers = ask_all(assistant, [(grey[size], question) for size, question in different], "grey")
    found = dict(zip(different, answers, strict=True))
    return {(image, question): found[sizes[image], question] for image, question in held.asks}


def score(held: HeldOut, cider: Cider, answers: dict[Ask, str]) -> dict[str, Any]:
    """CIDEr per prompt and presence, with 95% bootstrap intervals over pictures."""
    captions = {}
    for prompt in PROMPTS:
        texts = [answers[row["image"], prompt] for row in held.captions]
        scores = cider.score(texts)
        captions[prompt] = {
            "cider": statistics.fmean(scores),
            "interval": interval(scores),
            "words": statistics.fmean(len(text.split()) for text in texts),
            "different": len(set(texts)),
        }
    given = [answers[row["image"], row["question"]] for row in held.questions]
    truths = [row["answer"] == "yes" for row in held.questions]
    right = [means_yes(answer) == truth for answer, truth in zip(given, truths, strict=True)]
    kinds: dict[str, list[bool]] = {}
    for row, correct in zip(held.questions, right, strict=True):
        kinds.setdefault(row["kind"], []).append(correct)
    presence: dict[str, Any] = dataclasses.asdict(presence_score(given, truths))
    presence["interval"] = interval(right, [row["image"] for row in held.questions])
    presence["kinds"] = {kind: statistics.fmean(found) for kind, found in sorted(kinds.items())}
    return {"captions": captions, "presence": presence}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    photos, grey = result["photographs"], result.get("grey")
    partial = " (PARTIAL: --limit)" if result["partial"] else ""
    lines = [
        f"{result['pictures']} photographs, {result['questions']} yes/no questions{partial}",
        "",
        "| measure | photographs | 95% interval | grey picture |",
        "|---|---|---|---|",
    ]
    for prompt in PROMPTS:
        found = photos["captions"][prompt]
        low, high = found["interval"]
        other = f"{100 * grey['captions'][prompt]['cider']:.1f}" if grey else ""
        lines.append(
            f'| CIDEr, "{prompt}" | {100 * found["cider"]:.1f} | {100 * low:.1f}–{100 * high:.1f} | {other} |'
        )
    names = ("accuracy", "precision", "recall", "f1", "yes_rate", "unclear")
    for name in names:
        value = photos["presence"][name]
        low, high = photos["presence"]["interval"]
        span = f"{100 * low:.1f}–{100 * high:.1f}" if name == "accuracy" else ""
        other = f"{100 * grey['presence'][name]:.1f}" if grey else ""
        lines.append(f"| presence, {name.replace('_', ' ')} | {100 * value:.1f} | {span} | {other} |")
    for kind, value in photos["presence"]["kinds"].items():
        other = f"{100 * grey['presence']['kinds'][kind]:.1f}" if grey else ""
        lines.append(f"| presence, accuracy on {kind!r} | {100 * value:.1f} | | {other} |")
    return "\n".join(lines)


def measure(
    assistant: Any, held: HeldOut, photos: Path, grey: bool = True
) -> tuple[dict[str, Any], dict[Ask, str]]:
    """(numbers, the answers about the photographs)."""
    cider = Cider([row["captions"] for row in held.captions])
    started = time.monotonic()
    answers = look(assistant, held, photos)
    result: dict[str, Any] = {
        "pictures": len(held.captions),
        "questions": len(held.questions),
        "partial": held.partial,
        "pumice": pumice.__version__,
        "photographs": score(held, cider, answers),
    }
    if grey:
        result["grey"] = score(held, cider, look_at_grey(assistant, held, photos))
    result["seconds"] = round(time.monotonic() - started, 1)
    return result, answers


def read_easy_vqa(data: Path, limit: int | None = None) -> QuestionSet:
    """The questions of easy-vqa's test split. Raises InputError, for missing pictures too."""
    asked = read_questions(get_task("easy-vqa"), data, limit)
    check_images(asked.questions, allow_missing=False)
    return asked


def easy_vqa(assistant: Any, asked: QuestionSet, name: str) -> dict[str, Any]:
    """The result of those questions, as `pumice eval` has it."""
    answers = ask_all(assistant, [(q.images[0].source(), q.prompt) for q in asked.questions], "easy-vqa")
    answered = [Answered(question, text) for question, text in zip(asked.questions, answers, strict=True)]
    task = get_task("easy-vqa")
    return make_result(task, asked, AnswerSet(answered, [], name, ""), task.score(answered))


def answer_lines(held: HeldOut, answers: dict[Ask, str]) -> Iterable[str]:
    """Every answer beside its truth, as JSON lines."""
    for row in held.captions:
        for prompt in PROMPTS:
            said = answers[row["image"], prompt]
            yield json.dumps(
                {"image": row["image"], "question": prompt, "said": said, "truth": row["captions"]}
            )
    for row in held.questions:
        said = answers[row["image"], row["question"]]
        yield json.dumps(
            {"image": row["image"], "question": row["question"], "said": said, "truth": row["answer"]}
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures a model on the held-out photographs.")
    parser.add_argument("--model", default="pumice-tiny", help="a built-in model or a model folder")
    parser.add_argument("--rows", type=Path, required=True, help="the val folder that build.py wrote")
    parser.add_argument("--photos", type=Path, required=True, help="holds flickr8k/")
    parser.add_argument("--easy-vqa", type=Path, help="unpacked easy_vqa package; its test split too")
    parser.add_argument(
        "--limit", type=int, help="the first N pictures (drawn: questions) only; marked as partial"
    )
    parser.add_argument("--grey", action=argparse.BooleanOptionalAction, default=True, help="the baseline")
    parser.add_argument("--quantize", choices=("auto", "int8", "none"), default="auto")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--answers", type=Path, help="write every answer here, as JSON lines")
    options = parser.parse_args(arguments)
    try:
        for path in (options.json, options.answers):
            if path and not path.absolute().parent.is_dir():
                raise InputError(f"cannot write {path}: there is no folder {path.parent}; make it first")
        held = read_held_out(options.rows, options.limit)
        drawn = read_easy_vqa(options.easy_vqa, options.limit) if options.easy_vqa else None
        assistant = pumice.load(
            options.model, quantize=None if options.quantize == "none" else options.quantize
        )
        result, answers = measure(assistant, held, options.photos, options.grey)
        if drawn is not None:
            result["easy_vqa"] = easy_vqa(assistant, drawn, options.model)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.answers:
        options.answers.write_text(
            "".join(f"{line}\n" for line in answer_lines(held, answers)), encoding="utf-8"
        )
    if options.json:
        result = {"model": options.model, "quantize": options.quantize, **result}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    if "easy_vqa" in result:
        print(format_result(result["easy_vqa"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
