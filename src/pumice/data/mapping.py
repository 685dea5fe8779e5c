"""Map a record, whatever its columns are called, onto a row: pictures, and turns of question and answer."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pumice.conversation import IMAGE_PLACEHOLDER, ImagePart, Message, Objects, check_media
from pumice.data.objects import ask_for, is_objects, read_objects
from pumice.data.pictures import (
    MEDIA,
    Image,
    as_pictures,
    image_of,
    images_of,
    is_stored,
    names_picture,
    place_videos,
    structured,
    videos_of,
)
from pumice.data.sources.json_text import kind
from pumice.data.sources.source import Record
from pumice.errors import InputError, RowError, check_known, some
from pumice.messages import read_messages

Turns = list[tuple[str, str]]

# What a column can be for. `columns` of a recipe names one of these and the column that has it.
ROLES = (
    "id", "image", "video", "conversations", "messages", "question", "answer", "caption", "text", "label",
    "system", "history",
)  # fmt: skip

_QUESTIONS = ("question", "questions", "query", "instruction")
_ANSWERS = ("answer", "answers", "response", "output")
_CAPTIONS = ("caption", "captions", "text", "label")
# Columns that say something about a picture. A row without them is asked for its `objects`.
_WORDS = {*_QUESTIONS, *_ANSWERS, *_CAPTIONS, "conversations", "messages", "prompt", "completion", "texts"}
# What questions and answers are called in sets that name their columns in other ways, for an example.
_ASK = ("prompt", *_QUESTIONS, "user", "problem", "input", "ask")
_REPLY = (*_ANSWERS, "completion", "assistant", "solution", "reply", "target")
_IDS = ("id", "question_id", "__key__")
# Columns that are read, so that a file's name in one is text.
_READ = {*_WORDS, *_IDS, *MEDIA, "input", "system", "history"}

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_MESSAGE_ROLES = {"user", "assistant", "system", "developer", "tool"}
_QWEN_IMAGE = re.compile(r"(?:Picture \d+: ?)?<img>(.*?)</img>\n?")

_DEFAULT_QUESTIONS = {"label": "What is shown in this picture?"}
_DESCRIBE = "Describe the picture."


@dataclass(frozen=True)
class Mapped:
    """A record as a row says it: its pictures and videos, by name or inside the source, and its turns.

    image: in the order of their places. turns: each is (speaker, text). messages: of a row in that form, with
    the pictures in their places. added: pictures for which the row had no `<image>`; it was put in front.
    objects: names and boxes for the placeholders in the turns.
    """

    id: str
    image: tuple[Image, ...]
    turns: tuple[tuple[str, str], ...]
    messages: tuple[Message, ...] = ()
    added: int = field(default=0, compare=False)
    objects: Objects | None = None


@dataclass(frozen=True)
class RowMapping:
    """How the columns of a source become rows.

    columns: role -> the column that has it, for columns whose names do not say it. question: what is asked
    where a row has only a caption, a text or a label.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    question: str | None = None

    def __post_init__(self) -> None:
        for role in self.columns:
            check_known(role, ROLES, f"columns: there is no role {role!r}")

    def read(self, record: Record, place: str, fallback_id: str, form: str = "JSON") -> Mapped:
        """Return the row of a record. place, form: of the record, for messages. Raises InputError."""
        # 1. Name the columns by their roles. A column without a value counts as absent.
        values = {name: value for name, value in record.items() if not _is_absent(value)}
        for role, column in self.columns.items():
            if column not in record:
                raise InputError(
                    f"{place}: columns names {column!r} as {role}, but there are only {_listed(record)}"
                )
            if column in values:
                values[role] = values.pop(column)
        row_id = _id(values, place, fallback_id)
        if row_id != fallback_id or "id" in values:
            place = f"{place} (id {row_id!r})"
        # 2. Pictures, then words. Both may name pictures: Qwen-VL's rows do it inside the text.
        images = images_of(values, place)
        videos = videos_of(values, place)
        unread = {name: value for name, value in values.items() if name not in MEDIA and not is_stored(value)}
        check_media({**unread, "image": images, "video": videos}, place)
        try:
            objects = structured(values.get("objects"))
            if not is_objects(objects):
                mapped = self._words(row_id, values, images, videos, place, form)
                if not mapped.image:
                    _check_unread(values)
                return mapped
            if not values.keys() & _WORDS:
                turns, objects = ask_for(objects, self.question)
                mapped = _finish(row_id, [*_system(values, turns), *turns], images, videos, values)
            else:
                mapped = self._words(row_id, values, images, videos, place, form)
            return replace(mapped, objects=read_objects(objects))
        except InputError as error:
            text = str(error)
            if text.startswith(place):
                raise
            if isinstance(error, RowError):
                raise type(error)(error.kind, f"{place}: {text}") from error
            raise InputError(f"{place}: {text}") from error
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            # Lists and objects where others belong, at any depth: a row must not end a check or a run.
            detail = f"{type(error).__name__}, {error}"
            raise InputError(
                f"{place}: its values are not of its form ({detail}); fix or remove it"
            ) from error

    def _words(
        self, row_id: str, values: Record, images: list[Image], videos: list[Image], place: str, form: str
    ) -> Mapped:
        """Return the row by the first form whose columns are there."""
        if "conversations" in values:
            turns = _conversation(structured(values["conversations"]), place)
            return _finish(row_id, [*_system(values, turns), *turns], images, videos, values)
        if (messages := _messages(values)) is not None:
            if videos and images:
                raise InputError("pictures and videos beside 'messages' have no order; write them as parts")
            read, added = read_messages(as_pictures(messages) if videos else messages, images or videos)
            return _from_messages(row_id, read, added, place)
        if "texts" in values and isinstance(exchanges := structured(values["texts"]), list):
            # The Cauldron: [{"user", "assistant", "source"}]
            turns = [(_SPEAKERS[key], str(e[key])) for e in exchanges for key in ("user", "assistant")]
            return _finish(row_id, turns, images, videos, values)
        turns = self._exchange(values, bool(images or videos), form)
        return _finish(row_id, [*_system(values, turns), *turns], images, videos, values)

    def _exchange(self, values: Record, has_images: bool, form: str) -> Turns:
        """Return the turns of columns with questions and answers, or of one text about a picture."""
        question = next((name for name in _QUESTIONS if name in values), None)
        answer = next((name for name in _ANSWERS if name in values), None)
        if question is not None and answer is not None:
            questions, answers = _many(values, question), _many(values, answer)
            _check_choices(values, answer, answers)
            if question == "instruction" and values.get("input"):  # Alpaca's form, as LLaMA-Factory has it
                questions = f"{questions}\n{values['input']}"
            turns = [
                (speaker, str(text))
                for exchange in structured(values.get("history")) or ()
                for speaker, text in zip(("human", "gpt"), exchange, strict=True)
            ]
            if isinstance(questions, list):
                answers = answers if isinstance(answers, list) else [answers]
                if len(questions) != len(answers):
                    raise InputError(
                        f"{len(questions)} in {question!r} and {len(answers)} in {answer!r}; give each "
                        "question one answer"
                    )
                pairs = zip(questions, answers, strict=True)
                return turns + [turn for q, a in pairs for turn in (("human", _text(q)), ("gpt", _text(a)))]
            return [*turns, ("human", _text(questions)), ("gpt", _most_given(answers))]
        caption = next((name for name in _CAPTIONS if name in values), None)
        if caption is not None and not has_images:
            _check_unread(values)
            raise InputError(
                f"{caption!r} stands without a picture and without a question; add one or the other"
            )
        if caption == "text" and "question_id" in values and question is None:
            raise InputError(
                "'text' beside 'question_id' is a question of LLaVA's without its answer; add a column "
                "'answer' and call this one 'question'"
            )
        if caption is not None:
            asked = self.question or _DEFAULT_QUESTIONS.get(caption, _DESCRIBE)
            asked = _text(values[question]) if question is not None else asked
            given = _many(values, caption)
            return [
                ("human", asked),
                ("gpt", _text(given[0] if isinstance(given, list) and given else given)),
            ]
        raise InputError(_unknown(values, form))


def _finish(row_id: str, turns: Turns, images: list[Image], videos: list[Image], values: Record) -> Mapped:
    """Return the row, with `<image>` in front of the first question if the turns place no picture.

    A video stands where `<video>` is written, and there is `<image>` in the row; where a row has no pictures,
    `<image>` may stand for a video, as in LLaVA-Video's rows.
    """
    # Qwen-VL names pictures inside the text.
    named: list[Image] = []
    for number, (speaker, text) in enumerate(turns):
        if speaker == "human" and "<img>" in text:
            named += _QWEN_IMAGE.findall(text)
            turns[number] = speaker, _QWEN_IMAGE.sub(f"{IMAGE_PLACEHOLDER}\n", text)
    images = [*named, *images]
    if videos:
        images = place_videos(turns, images, videos)
    added, first = 0, next((n for n, (speaker, _) in enumerate(turns) if speaker == "human"), None)
    if images and first is not None and not any(IMAGE_PLACEHOLDER in text for _, text in turns):
        turns[first] = "human", f"{IMAGE_PLACEHOLDER}\n" * len(images) + turns[first][1]
        # A table of questions has no use for `<image>`, so nothing is missing there.
        added = len(images) if {"conversations", "query", "instruction"} & values.keys() else 0
    return Mapped(row_id, tuple(images), tuple(turns), added=added)


def _from_messages(row_id: str, messages: tuple[Message, ...], added: int, place: str) -> Mapped:
    """Return the row of messages. Its turns say the same, with `<image>` in the places of pictures."""
    images: list[Image] = []
    turns: Turns = []
    placed = []
    for message in messages:
        parts: list[str | ImagePart] = []
        for part in message.parts:
            if isinstance(part, str):
                parts.append(part)
                continue
            images.append(image_of(part.source, place))
            parts.append(ImagePart(images[-1]))
        text = "".join(part if isinstance(part, str) else IMAGE_PLACEHOLDER for part in parts)
        turns.append((_SPEAKERS.get(message.role, message.role), text))
        placed.append(Message(message.role, tuple(parts)))
    if not any(message.role == "assistant" for message in messages):
        raise InputError("no message is from 'assistant', so there is nothing to learn")
    return Mapped(row_id, tuple(images), tuple(turns), tuple(placed), added)


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # which pandas writes


def _id(values: Record, place: str, fallback: str) -> str:
    known = "conversations" in values  # LLaVA's rows have `id`, or their number
    names = [name for name in _IDS if name in values and not (known and name == "question_id")]
    row_id = values[names[0]] if names else fallback
    if isinstance(row_id, float) and row_id.is_integer():  # pandas writes whole numbers so
        row_id = int(row_id)
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        found = json.dumps(row_id) if isinstance(row_id, float) else kind(row_id)
        raise InputError(f"{place}: 'id' must be text or a whole number, found {found}")
    return str(row_id)


def _conversation(turns: Any, place: str) -> Turns:
    """Return the turns of LLaVA's and ShareGPT's `conversations`, speakers named as LLaVA does."""
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{place}: 'conversations' must be a list of turns, found {kind(turns)}")
    pairs: Turns = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise InputError(f"{place}: turn {number} must be an object, found {kind(turn)}")
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise InputError(f"{place}: turn {number} must have the texts 'from' and 'value'")
        pairs.append((_SPEAKERS.get(speaker.lower(), speaker), text))
    if not any(speaker == "gpt" for speaker, _ in pairs):
        speakers = ", ".join(repr(name) for name in dict.fromkeys(speaker for speaker, _ in pairs))
        known = {speaker for speaker, _ in pairs} <= {"human", "system"}
        raise InputError(
            f"{place}: no turn is from 'gpt' (they are from {speakers}), so there is nothing to learn; "
            + ("add an answer or remove the row" if known else "speakers are written 'human' and 'gpt'")
        )
    return pairs


def _messages(values: Record) -> list[Any] | None:
    """Return the messages of a row, also where TRL's form has them in `prompt` and `completion`."""
    if "messages" in values:
        messages = structured(values["messages"])
    elif "prompt" in values and "completion" in values:
        messages = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            said = structured(values[name])
            messages += [{"role": role, "content": said}] if isinstance(said, str) else said
    else:
        return None
    if not isinstance(messages, list) or not messages:
        raise InputError(f"'messages' must be a list of messages, found {kind(messages)}")
    written = [message.get("role") for message in messages if isinstance(message, dict)]
    said = dict.fromkeys(role for role in written if isinstance(role, str))
    if "assistant" not in said and not said.keys() <= _MESSAGE_ROLES:
        raise InputError(
            f"no message is from 'assistant' (they are from {', '.join(map(repr, said))}), so there is "
            "nothing to learn; roles are written 'user' and 'assistant'"
        )
    # Arrow writes every key that any message of the file has, without a value where one has it not.
    return [_without_nulls(message) for message in messages]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _system(values: Record, turns: Turns) -> Turns:
    text = values.get("system")
    return [("system", text)] if isinstance(text, str) and text and turns[0][0] != "system" else []


def _many(values: Record, name: str) -> Any:
    """Return a column's value; a list that a table holds as text only where the name is a plural."""
    value = values[name]
    return structured(value) if name.endswith("s") else value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    raise InputError(f"expected a text, found {kind(value)}")


def _most_given(answers: Any) -> str:
    """Return an answer; of several, as VQA sets have them, the one that most people gave."""
    if not isinstance(answers, list):
        return _text(answers)
    texts = [_text(a.get("answer") if isinstance(a, dict) else a) for a in answers]
    if not texts:
        raise InputError("the list of answers is empty; give one")
    return Counter(texts).most_common(1)[0][0]


def unread_picture(values: Record) -> str | None:
    """Return the column of a row that names a picture and is not read as one; None if there is none."""
    for name, value in values.items():
        if name not in _READ and names_picture(structured(value)):
            return name
    return None


def _check_unread(values: Record) -> None:
    if (name := unread_picture(values)) is not None:
        raise InputError(
            f"{name!r} names a picture, and is not read as one; write columns: {{image: {name}}}"
        )


def _check_choices(values: Record, name: str, answer: Any) -> None:
    """Raise InputError if an answer is only the number of one of its row's choices, as in ScienceQA.

    A text of digits that is itself one of the choices, or larger than their number, is the answer's text.
    """
    columns = [column for column in ("choices", "options") if column in values]
    if not columns or re.fullmatch(r"\d{1,4}", str(answer)) is None:
        return
    for column in columns:
        choices = structured(values[column])
        if not isinstance(choices, list | dict) or not choices or int(answer) > len(choices):
            continue
        texts = choices.values() if isinstance(choices, dict) else choices
        if not isinstance(answer, str) or answer not in map(str, texts):
            raise InputError(
                f"{name!r} is {answer}, the number of one of the {column!r}; write the answer's text, and "
                f"the {column} into the question"
            )


def _unknown(values: Record, form: str) -> str:
    """Say which columns there are, and how a recipe would name them."""
    words = {name: value for name, value in values.items() if name not in ("id", "image", "images")}
    if not words:
        return "'conversations' is missing; write at least a question and its answer"
    for name, value in words.items():
        items = structured(value)
        if isinstance(items, list) and items and isinstance(items[0], dict):
            if {"role", "content"} <= items[0].keys():
                return f"this looks like OpenAI messages in {form}; write columns: {{messages: {name}}}"
            if {"from", "value"} <= items[0].keys():
                return f"this looks like ShareGPT turns in {form}; write columns: {{conversations: {name}}}"
    if {"chosen", "rejected"} <= words.keys():
        asked = next((name for name in _ASK if name in words), "...")
        return (
            "these are preferences, and one answer is learned; write columns: "
            f"{{question: {asked}, answer: chosen}}"
        )
    # The columns that are left, the last as the answer: tables have the question before it.
    texts = [n for n, v in words.items() if isinstance(v, str) and n not in _IDS and n[:2] != "__"]
    pictures = [name for name in texts if names_picture(words[name])]
    texts = [name for name in texts if name not in pictures]
    has_picture = bool(pictures) or any(is_stored(v) or n in MEDIA for n, v in values.items())
    if texts and {*texts} <= {*_QUESTIONS}:
        return f"{texts[0]!r} has no answer beside it; add one or remove the row"
    if not texts and has_picture:
        return "there is a picture, but no question, answer, caption, text or label beside it; add one"
    answer = next((name for name in _REPLY if name in texts), texts[-1] if texts else None)
    rest = [name for name in texts if name != answer]
    question = next((name for name in _ASK if name in rest), rest[-1] if rest else None)
    roles = {"image": pictures[0] if pictures else None, "question": question, "answer": answer}
    if question is None and has_picture:
        roles = {"image": roles["image"], "caption": answer}
    example = ", ".join(f"{role}: {name}" for role, name in roles.items() if name)
    return (
        f"'conversations' is missing, and no known form has the columns {_listed(values)}; say what they are "
        f"in the recipe, for example columns: {{{example or 'question: ..., answer: ...'}}}, or rename them"
    )


def _listed(values: Mapping[str, Any]) -> str:
    return some([repr(name) for name in values], 12)
