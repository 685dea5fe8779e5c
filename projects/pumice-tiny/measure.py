"""Measures a model on the held-out photographs that build.py set aside, beside a grey picture.

    python projects/pumice-tiny/measure.py --model MODEL --rows ROWS/val --photos PHOTOS [--json FILE]
        [--answers FILE] [--easy-vqa EASY_VQA]

Every photograph is captioned under each prompt (CIDEr against the captions people wrote) and asked
the yes/no questions of presence.jsonl (POPE's way of counting), through the public interface alone and as
the model's folder says. The same is asked about a grey picture of the same size: what the words of a
question give away. Where build.py found COCO's photographs, the same is measured on those, with the
questions of VQA v2 by their official rule. conversations.jsonl tells how often a second answer repeats the
first; the ordinary questions of questions.jsonl are answered for people to judge. --easy-vqa asks the test
split of easy-vqa too, as `pumice eval easy-vqa` does and counts. Prints Markdown tables.
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

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rows.base import read_lines

import pumice
from pumice.errors import InputError
from pumice.evaluate.metrics.bootstrap import interval_of
from pumice.evaluate.metrics.cider import Cider
from pumice.evaluate.metrics.presence import is_unclear, means_yes, presence_score
from pumice.evaluate.metrics.vqa import normalize_m4c, vqa_accuracy
from pumice.evaluate.result import AnswerSet, QuestionSet, format_result, make_result, read_questions
from pumice.evaluate.run import check_images
from pumice.evaluate.task import SHORT, Answered, mean_statistic
from pumice.evaluate.tasks import get_task

PROMPTS = (
    "Describe the image concisely.",
    "What is happening in this picture?",
    "Say what this photo shows in a sentence.",  # not a prompt of the training rows
)
GREY = (127, 127, 127)
LONGEST = 64  # tokens of an answer
SLOTS = 16  # answers decoded together
HERE = Path(__file__).parent

Ask = tuple[str, str]  # (picture's path in the rows, question)


@dataclass(frozen=True)
class HeldOut:
    """captions: {"image", "captions"} per picture; questions: {"image", "question", "answer", "kind"}.

    vqa: {"image", "question", "answers" (ten), "answer_type"}.
    """

    captions: list[dict[str, Any]]
    questions: list[dict[str, Any]]
    partial: bool
    vqa: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def asks(self) -> list[Ask]:
        """Everything asked of a model, each picture's together, so that it is looked at once."""
        by_picture = {row["image"]: [(row["image"], prompt) for prompt in PROMPTS] for row in self.captions}
        for row in self.questions:
            by_picture.setdefault(row["image"], []).append((row["image"], row["question"]))
        for row in self.vqa:
            by_picture.setdefault(row["image"], []).append((row["image"], short(row)))
        return [ask for asks in by_picture.values() for ask in asks]

    @property
    def pictures(self) -> int:
        return len({row["image"] for row in (*self.captions, *self.questions, *self.vqa)})


def short(row: dict[str, Any]) -> str:
    """The question with LLaVA's words for a short answer, as `pumice eval vqav2` asks it."""
    return f"{row['question']}\n{SHORT}"


def read_held_out(rows: Path, limit: int | None = None, of: str = "") -> HeldOut:
    """The files build.py wrote whose names begin with `of`; with `limit`, of the first pictures only.

    Raises InputError.
    """
    try:
        captions = json.loads((rows / f"{of}captions.json").read_text(encoding="utf-8"))
        questions = read_lines(rows / f"{of}presence.jsonl")
        vqa = read_lines(rows / "vqa_test.jsonl") if of else []
    except OSError as error:
        raise InputError(f"cannot read {error.filename}; give the val folder that build.py wrote") from error
    except ValueError as error:
        raise InputError(f"a file in {rows} is damaged ({error}); run build.py again") from error
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; give 1 or more pictures")
    everything = list(dict.fromkeys(row["image"] for row in (*captions, *vqa, *questions)))
    pictures = set(everything[:limit])
    captions, questions, vqa = (
        [row for row in row_list if row["image"] in pictures] for row_list in (captions, questions, vqa)
    )
    if not captions or not questions:
        raise InputError(
            f"{rows} has {len(captions)} captioned pictures and {len(questions)} questions on them"
        )
    return HeldOut(captions, questions, len(pictures) < len(everything), vqa)


def ask_all(assistant: Any, asks: Sequence[tuple[Any, str]], label: str) -> list[str]:
    """One answer for each (picture, question), in order. Raises the InputError of the first that failed."""
    answers = assistant.ask_each(asks, slots=SLOTS, max_new_tokens=LONGEST)
    shown = track(
        answers,
        description=label,
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
    answer_of = dict(zip(different, answers, strict=True))
    return {(image, question): answer_of[sizes[image], question] for image, question in held.asks}


def interval(values: Sequence[float], groups: Sequence[str] | None = None) -> tuple[float, float]:
    """The 95% interval of the mean of values; those of one group (a picture) are drawn together."""
    return interval_of(mean_statistic(values, scale=1.0), groups or range(len(values)), samples=2000)


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
    replies = [answers[row["image"], row["question"]] for row in held.questions]
    truths = [row["answer"] == "yes" for row in held.questions]
    right = [means_yes(answer) == truth for answer, truth in zip(replies, truths, strict=True)]
    kinds: dict[str, list[bool]] = {}
    for row, correct in zip(held.questions, right, strict=True):
        kinds.setdefault(row["kind"], []).append(correct)
    predicted = np.array([means_yes(answer) for answer in replies])
    shares = presence_score(predicted, np.array(truths), np.ones(len(truths)))
    presence: dict[str, Any] = {name.replace(" ", "_"): share for name, share in shares.items()}
    presence |= {"questions": len(truths), "unclear": statistics.fmean(map(is_unclear, replies))}
    presence["interval"] = interval(right, [row["image"] for row in held.questions])
    presence["kinds"] = {kind: statistics.fmean(shares) for kind, shares in sorted(kinds.items())}
    result = {"captions": captions, "presence": presence}
    return result | ({"vqa": score_vqa(held.vqa, answers)} if held.vqa else {})


def score_vqa(rows: Sequence[dict[str, Any]], answers: dict[Ask, str]) -> dict[str, Any]:
    """Accuracy by VQA's official rule, of all questions and by type, with 95% bootstraps over pictures."""
    scores = [vqa_accuracy(normalize_m4c(answers[row["image"], short(row)]), row["answers"]) for row in rows]
    types = {"all": set(range(len(rows)))}
    for number, row in enumerate(rows):
        types.setdefault(row["answer_type"], set()).add(number)
    by_type = {}
    for name, numbers in types.items():
        some = [scores[n] for n in sorted(numbers)]
        pictures = [rows[n]["image"] for n in sorted(numbers)]
        by_type[name] = {
            "accuracy": statistics.fmean(some),
            "interval": interval(some, pictures),
            "questions": len(some),
        }
    return by_type


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
        photo_scores = photos["captions"][prompt]
        low, high = photo_scores["interval"]
        other = f"{100 * grey['captions'][prompt]['cider']:.1f}" if grey else ""
        lines.append(
            f'| CIDEr, "{prompt}" | {100 * photo_scores["cider"]:.1f} '
            f"| {100 * low:.1f}–{100 * high:.1f} | {other} |"
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
    for kind, photo_scores in photos.get("vqa", {}).items():
        low, high = photo_scores["interval"]
        other = f"{100 * grey['vqa'][kind]['accuracy']:.1f}" if grey else ""
        lines.append(
            f"| VQA v2, {kind} ({photo_scores['questions']}) | {100 * photo_scores['accuracy']:.1f} "
            f"| {100 * low:.1f}–{100 * high:.1f} | {other} |"
        )
    return "\n".join(lines)


def measure(
    assistant: Any, held: HeldOut, photos: Path, grey: bool = True
) -> tuple[dict[str, Any], dict[Ask, str]]:
    """(numbers, the answers about the photographs)."""
    cider = Cider([row["captions"] for row in held.captions])
    started = time.monotonic()
    answers = look(assistant, held, photos)
    result: dict[str, Any] = {
        "pictures": held.pictures,
        "questions": len(held.questions),
        "partial": held.partial,
        "pumice": pumice.__version__,
        "photographs": score(held, cider, answers),
    }
    if grey:
        result["grey"] = score(held, cider, look_at_grey(assistant, held, photos))
    result["seconds"] = round(time.monotonic() - started, 1)
    return result, answers


def converse(assistant: Any, rows: Sequence[dict[str, Any]], photos: Path) -> list[list[str]]:
    """Both answers of each conversation of {"image", "questions"}."""
    replies = []
    for row in track(rows, "conversations", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        first, second = row["questions"]
        shown = [{"type": "image", "image": photos / row["image"]}, {"type": "text", "text": first}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": shown}]
        answer = "".join(assistant.stream(messages, max_new_tokens=LONGEST))
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": second}]
        replies.append([answer, "".join(assistant.stream(messages, max_new_tokens=LONGEST))])
    return replies


def repeats(answers: Sequence[Sequence[str]]) -> int:
    """How many conversations have a second answer that is the first, whatever its case and full stop."""
    return sum(first.strip(". ").lower() == second.strip(". ").lower() for first, second in answers)


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
    asked = [(row["image"], prompt, row["captions"]) for row in held.captions for prompt in PROMPTS]
    asked += [(row["image"], row["question"], row["answer"]) for row in held.questions]
    asked += [(row["image"], short(row), row["answers"]) for row in held.vqa]
    for image, question, truth in asked:
        yield json.dumps(
            {"image": image, "question": question, "said": answers[image, question], "truth": truth}
        )


def talk(assistant: Any, photos: Path, limit: int | None) -> tuple[dict[str, int], list[str]]:
    """(how many second answers repeat the first, of how many; every answer as JSON lines).

    The ordinary questions are answered too, for people to judge.
    """
    chats, ordinary = (
        [row for row in read_lines(HERE / name)[:limit] if (photos / row["image"]).is_file()]
        for name in ("conversations.jsonl", "questions.jsonl")
    )
    answers = converse(assistant, chats, photos)
    ordinary_answers = ask_all(
        assistant, [(photos / row["image"], row["question"]) for row in ordinary], "ordinary"
    )
    lines = [json.dumps({**row, "said": answer}) for row, answer in zip(chats, answers, strict=True)]
    lines += [
        json.dumps({**row, "said": answer}) for row, answer in zip(ordinary, ordinary_answers, strict=True)
    ]
    return {"conversations": len(chats), "repeated": repeats(answers)}, lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures a model on the held-out photographs.")
    parser.add_argument("--model", default="pumice-tiny", help="a built-in model or a model folder")
    parser.add_argument("--rows", type=Path, required=True, help="the val folder that build.py wrote")
    parser.add_argument("--photos", type=Path, required=True, help="holds flickr8k/ and coco/")
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
        coco = None
        if (options.rows / "coco_captions.json").is_file():
            coco = read_held_out(options.rows, options.limit, "coco_")
        drawn = read_easy_vqa(options.easy_vqa, options.limit) if options.easy_vqa else None
        assistant = pumice.load(
            options.model, quantize=None if options.quantize == "none" else options.quantize
        )
        result, answers = measure(assistant, held, options.photos, options.grey)
        lines = list(answer_lines(held, answers))
        if coco is not None:
            result["coco"], answers = measure(assistant, coco, options.photos, options.grey)
            talked, dialogues = talk(assistant, options.photos, options.limit)
            result |= talked
            lines += [*answer_lines(coco, answers), *dialogues]
        if drawn is not None:
            result["easy_vqa"] = easy_vqa(assistant, drawn, options.model)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.answers:
        options.answers.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if options.json:
        result = {"model": options.model, "quantize": options.quantize, **result}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    if "coco" in result:
        print(f"\nCOCO: {table(result['coco'])}")
        print(f"\n{result['repeated']} of {result['conversations']} second answers repeat the first")
    if "easy_vqa" in result:
        print(format_result(result["easy_vqa"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
