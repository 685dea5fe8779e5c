"""Convert Jinja chat templates of transformers to a ChatFormat; `chat_template_write` is the way back.

A chat template is untrusted code. It runs in Jinja's sandbox, only when a model is imported, on probe
conversations (`isolated` bounds its time and memory). Its output gives the fixed texts of a ChatFormat, which
must write the same; afterwards only these texts are used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pumice.config import ChatFormat
from pumice.conversation import IMAGE_PLACEHOLDER, Conversation, ImagePart, Message
from pumice.errors import CAUSE, wrong_input
from pumice.formats.text.jinja import ANSWERS, QUESTIONS, SYSTEM, Jinja, Turn, Unsupported
from pumice.templates import CALL, OWN, RESULT, TEMPLATES, Template, call_text, result_text, tools_text

# A text that shows whether a template trims, escapes or splits what it is given.
_ODD = " Two\n\nlines, {{ braces }} & 'quotes' <b> é🙂 "


@dataclass(frozen=True)
class Described:
    """A chat format: its name in `pumice.templates`, or "own" with its texts in `chat`.

    writes_bos: whether the chat template itself writes the begin-of-text token, once, before everything.
    """

    template: str
    chat: ChatFormat | None = None
    writes_bos: bool = False


def describe(source: str, *, bos: str | None, eos: str | None, specials: Collection[str]) -> Described:
    """Return the chat format that a template writes, checked on conversations of every shape.

    bos, eos: tokens that the template may write. specials: all special tokens of the tokenizer. Raises
    InputError if the template fails, or writes what no ChatFormat can. For a template that somebody else
    wrote, call `isolated.describe`.
    """
    special_tokens = list(dict.fromkeys([*specials, *filter(None, (bos, eos))]))
    with wrong_input(
        Unsupported,
        f"this chat template cannot be turned into fixed texts around each turn ({CAUSE}); "
        f"name the format with --template, one of: {', '.join(TEMPLATES)}",
    ):
        jinja = Jinja(source, bos, eos, special_tokens)
        writes_bos = bool(bos) and jinja.raw([QUESTIONS[0]]).startswith(bos or "")
        # 1. One of Pumice's own formats, if it writes the same.
        for name, template in TEMPLATES.items():
            if isinstance(template, Template) and not _difference(template, jinja):
                tools = _tools(template, jinja, special_tokens)
                chat = None if tools is None else replace(template.chat, tools=tools)
                return Described(name if chat is None else OWN, chat, writes_bos)
        # 2. A format of fixed texts that are cut out of what the template writes.
        reasons = []
        for fixed in _candidates(jinja, special_tokens, eos):
            chat = _with_pictures(jinja, fixed)
            if not (reason := _difference(Template(OWN, chat), jinja)):
                tools = _tools(Template(OWN, chat), jinja, special_tokens)
                return Described(OWN, replace(chat, tools=tools), writes_bos)
            reasons.append(reason)
        raise Unsupported(reasons[0] if reasons else "its questions do not all begin with the same text")


def image_wrap(
    source: str, *, bos: str | None, eos: str | None, specials: Collection[str]
) -> tuple[str, str] | None:
    """Return the special tokens that a chat template writes around each picture, as LLaVA 1.0 does."""
    try:
        return Jinja(source, bos, eos, specials).wrap
    except Unsupported:
        return None  # `describe` raises the error, if the template is needed


def difference(
    source: str, template: Template, wrap: tuple[str, str] | None, specials: Collection[str]
) -> str:
    """Describe how a chat template that Pumice wrote differs from a format; "" if it writes the same.

    wrap: the special tokens that stand around each picture. specials: all special tokens of the tokenizer.
    """
    try:
        jinja = Jinja(source, None, None, specials)
        if reason := _difference(template, jinja):
            return reason
        tools = _tools(template, jinja, specials)
    except Unsupported as error:
        return str(error)
    if jinja.wrap != wrap:
        return f"it writes {jinja.wrap} around a picture"
    return "" if tools == template.chat.tools else f"it writes {tools} around functions"


def _candidates(jinja: Jinja, specials: list[str], eos: str | None) -> Iterator[ChatFormat]:
    """Yield the formats that could write what the template does.

    They have a system message before the questions, inside the first question, or none.
    """
    # 1. Cut the fixed texts out of a conversation: before the first question, around answers, at the end.
    one, two, three = QUESTIONS
    shapes: list[tuple[str, bool, tuple[str, str]]]  # a question's beginning, system_in_user, system
    before_first, opens, gap, *_ = jinja.gaps(one, ANSWERS[0], two, ANSWERS[1], three, generate=True)
    after_question, end = jinja.gaps(one)[-1], jinja.gaps(one, ANSWERS[0])[-1]
    prompt = jinja.gaps(one, generate=True)[-1]
    # 2. The text after a question must always be the same; then come the beginnings of the newest answer and
    # of earlier ones, of which one may be longer, as with an empty block of thoughts.
    if not (prompt.startswith(after_question) and opens.startswith(after_question)):
        raise Unsupported("a question is not followed by the same text everywhere")
    newest, earlier = prompt[len(after_question) :], opens[len(after_question) :]
    own_earlier = ""
    if not (earlier.startswith(newest) or newest.startswith(earlier)):
        if earlier.split() != newest.split():
            raise Unsupported("earlier answers and the newest one begin differently")
        # llava-hf's templates of Qwen2 differ in a blank: "assistant \\n", and "assistant\\n" of the newest.
        own_earlier, earlier = earlier, newest
    # 3. The end of an answer. Some templates write the stop token only after the newest one.
    before_stop, stop, after_stop, once = _stop(end, specials, eos)
    if gap.startswith(end):
        before_later = gap[len(end) :]
    elif gap.startswith(before_stop) and not after_stop:
        before_later, once = gap[len(before_stop) :], True
    else:
        raise Unsupported("earlier answers and the newest one end differently")
    # 4. What all candidates have in common; `complete` adds what a question begins with.
    base = ChatFormat(
        user=("", after_question),
        assistant=min(newest, earlier, key=len),
        earlier=own_earlier,
        opening=newest[len(earlier) :],
        answer=(earlier[len(newest) :], before_stop),
        stop=stop,
        stop_once=once,
        trim=tuple(role for role in ("system", "user", "assistant") if _trims(jinja, role)),
    )

    def complete(question: str, **more: Any) -> ChatFormat:
        between = after_stop + before_later[: len(before_later) - len(question)]
        chat = replace(base, user=(question, after_question), between=between, **more)
        texts = [*chat.user, chat.assistant, chat.earlier, chat.stop, between, *chat.answer, chat.opening]
        texts += [*(chat.system or ()), chat.default_system or ""]
        return replace(chat, specials=tuple(s for s in specials if any(s in text for text in texts)))

    # 5. Where the system message stands. What precedes a first question and what precedes later ones end
    # alike: that is how a question begins.
    try:
        before, after, _ = jinja.gaps(SYSTEM, one)
    except Unsupported:
        shapes = []
    else:
        question = _common(before_later[::-1], after[::-1], before_first[::-1])[::-1]
        shapes = [(question, False, (before, after[: len(after) - len(question)]))]
        # Inside the first question: the longest end of `before_later` with which both others begin.
        ends = (before_later[cut:] for cut in range(len(before_later) + 1))
        question = next(end for end in ends if before.startswith(end) and before_first.startswith(end))
        shapes.append((question, True, (before[len(question) :], after)))
    for question, inside, around in shapes:
        # 6. Without a system message some templates write a default one.
        default = None
        if before_first != question:
            if len(before_first) < len(before + after) or not (
                before_first.startswith(before) and before_first.endswith(after)
            ):
                continue
            default = before_first[len(before) : len(before_first) - len(after)]
        yield complete(question, system=around, system_in_user=inside, default_system=default)
    if before_later.endswith(before_first):
        yield complete(before_first)


def _with_pictures(jinja: Jinja, chat: ChatFormat) -> ChatFormat:
    """Return the format with what a template writes where a question begins with a picture."""
    text = QUESTIONS[0]
    opening = jinja.gaps(text)[0]
    before, _, after = jinja.pictured(text[1]).partition(IMAGE_PLACEHOLDER)
    if (
        text[1] not in after
        or not opening.startswith(before)
        or not chat.user[0].endswith(opening[len(before) :])
    ):
        return chat  # `_difference` tells how they differ
    text_first = opening[len(before) :]
    question = chat.user[0][: len(chat.user[0]) - len(text_first)]
    line = not after.startswith(text[1])
    # Two pictures have one line together where nothing stands between them.
    shared = line and jinja.pictured(text[1], 2).count(2 * IMAGE_PLACEHOLDER) == 1
    return replace(
        chat, user=(question, chat.user[1]), text_first=text_first, image_line=line, shared_line=shared
    )


def _common(*texts: str) -> str:
    """Return the beginning that all texts have in common."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


def _stop(end: str, specials: list[str], eos: str | None) -> tuple[str, str, str, bool]:
    """Split what follows an answer: (before the stop, the stop, after it, if only the newest has it)."""
    # The first special token ends the answer; of several at one position, the longest.
    stops = [(end.index(token), -len(token), token) for token in specials if token in end]
    stop = min(stops)[2] if stops else end.strip()
    if stop:
        before, _, after = end.partition(stop)
        return before, stop, after, False
    if eos is None:
        raise Unsupported("nothing says where an answer ends")
    return "", eos, end, True


def _trims(jinja: Jinja, role: str) -> bool:
    """Return whether the template strips the blanks around a role's text."""
    shapes: dict[str, Callable[[str], list[Turn]]] = {
        "system": lambda text: [("system", text), QUESTIONS[0]],
        "user": lambda text: [("user", text)],
        "assistant": lambda text: [QUESTIONS[0], ("assistant", text), QUESTIONS[1]],
    }
    try:
        written = jinja.write(shapes[role]("textpadded  "))
    except Unsupported:
        return False
    return "textpadded" in written and "textpadded  " not in written


def _difference(template: Template, jinja: Jinja) -> str:
    """Describe the first difference between what the two write; "" if they write the same on all probes."""
    # 1. Probe with plain and odd texts, with and without a system message, with one to five turns.
    chat = template.chat
    texts = [("one", "two", "three", "four"), (_ODD, "And \nthis? ", _ODD + "\n", "Last  ")]
    systems: list[str | None] = [None]
    try:
        jinja.gaps(SYSTEM, QUESTIONS[0])
        systems += ["Be brief.", _ODD] if chat.system is not None else []
    except Unsupported:
        pass  # it has no system message, or moves it
    counts = [0]  # of pictures; some templates take one alone
    if jinja.parts:
        counts += [1, 2] if jinja.pictured(QUESTIONS[0][1], 2) else [1]
    for (a, b, c, d), system in itertools.product(texts, systems):
        turns = [("user", a), ("assistant", b), ("user", c), ("assistant", d), ("user", a)]
        first = [("system", system)] if system is not None else []
        for length, images in itertools.product(range(1, 6), counts):
            shown, generate = [*first, *turns[:length]], bool(length % 2)
            actual = jinja.write(shown, generate=generate, images=images)
            expected = _written(template, shown, generate, images)
            accepted = [expected]
            if not generate:
                # 2. An answer that is complete may begin as earlier ones do.
                if chat.earlier:
                    alike = Template(template.name, replace(chat, assistant=chat.earlier))
                    accepted.append(_written(alike, shown, generate, images))
                # 3. After the last answer a template may leave the stop out, or write what precedes a
                # question.
                accepted += [text.removesuffix(chat.stop) for text in accepted] if chat.stop_once else []
                accepted += [text + chat.between for text in accepted]
            if actual not in accepted:
                same = len(_common(expected, actual))
                return f"after {actual[max(same - 20, 0) : same]!r} it writes {actual[same : same + 20]!r}"
    return ""


def _tools(template: Template, jinja: Jinja, specials: Collection[str]) -> tuple[str, str] | None:
    """Return what the template writes around descriptions of functions; None if it has no place for them.

    Calls and what they gave must be in the one form that is known, and its marks must be ordinary text, not
    special tokens: a decoder leaves those out.
    """
    marks = {mark.strip() for mark in (*CALL, *RESULT)}
    if template.chat.system is None or not marks.isdisjoint(specials):
        return None
    ask, answer = QUESTIONS[0], ANSWERS[0][1]
    functions = [{"name": name, "parameters": {"type": "object"}} for name in ("textofcall", "other")]
    tools = [{"type": "function", "function": function} for function in functions]
    call = {"name": "textofcall", "arguments": {"a": ["é<", 1]}}
    calls = [{"id": "a", "type": "function", "function": call}] * 2
    called = "\n".join([call_text("textofcall", {"a": ["é<", 1]})] * 2)
    given = [{"role": "tool", "name": "textofcall", "tool_call_id": "a", "content": _ODD}] * 2
    results = "\n".join([result_text(_ODD)] * 2)
    asked, system = [{"role": ask[0], "content": ask[1]}], [{"role": SYSTEM[0], "content": SYSTEM[1]}]

    def told(system: str | None) -> list[Turn]:
        return [("system", f"{system}\n\n{said}" if system else said), ask]

    try:
        # 1. Cut out what stands around the descriptions, after the system message.
        written = jinja.called([*system, *asked], tools)
        head, _, tail = written.partition(tools_text(("", ""), tools))
        before, text, after = _written(template, [SYSTEM, ask], True).partition(SYSTEM[1])
        before += f"{text}\n\n"
        if not (head.startswith(before) and tail.endswith(after)):
            return None
        around = (head[len(before) :], tail[: len(tail) - len(after)])
        said = tools_text(around, tools)
        # 2. Check that conversations of several shapes are written alike.
        shapes: list[tuple[list[Any], list[Turn]]] = [
            ([*system, *asked], told(SYSTEM[1])),
            (asked, told(template.chat.default_system)),
        ]
        for content, expected in (("", called), (answer, f"{answer}\n{called}")):
            turns = [("assistant", expected), ("user", results)]
            answers = [{"role": "assistant", "content": content, "tool_calls": calls}, *given]
            shapes.append(([*system, *asked, *answers], [*told(SYSTEM[1]), *turns]))
        same = all(
            jinja.called(shown, tools) == _written(template, expected, True) for shown, expected in shapes
        )
    except Unsupported:
        return None
    return around if same else None


def _written(template: Template, turns: Sequence[Turn], generate: bool, images: int = 0) -> str:
    messages = []
    for role, text in turns:
        shown = images if role == "user" else 0
        messages.append(Message(role, (*[ImagePart(IMAGE_PLACEHOLDER)] * shown, text)))
        images -= shown
    spans = template.render(Conversation(tuple(messages)), generate=generate)
    return "".join(IMAGE_PLACEHOLDER if isinstance(span, ImagePart) else span.text for span in spans)
