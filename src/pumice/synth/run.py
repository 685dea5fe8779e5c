"""One generation run: which pictures are asked about in which kind, the calls, and the rows made of replies.

OUT/journal.jsonl     requests and raw replies; only appended to
OUT/rows.jsonl        rows that passed, in the order of pictures and kinds
OUT/rejected.jsonl    the others, each with its reason and the raw words
OUT/report.html       what to look at; OUT/report.json has the same numbers
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pumice.data.rows import ImageFinder
from pumice.errors import CAUSE, InputError, counted, wrong_input
from pumice.files import Lock, hold, replacing
from pumice.images import image_key
from pumice.jsonl import json_text
from pumice.synth.checks import CheckSettings, Rejection, check_language, examine, row
from pumice.synth.context import Context
from pumice.synth.duplicates import SeenRows
from pumice.synth.endpoint import Endpoint, reply_text
from pumice.synth.journal import Journal, TeacherRequest, digest
from pumice.synth.kinds.base import Draft, Kind
from pumice.synth.objects import Vocabulary
from pumice.synth.statistics import Statistics
from pumice.synth.teachers import Progress, Teacher


@dataclass(frozen=True)
class Job:
    """What is to be made. kinds: each with the share of the pictures that it takes."""

    contexts: Sequence[Context]
    kinds: Sequence[tuple[Kind, float]]
    out: Path
    finder: ImageFinder | None = None
    show: bool = False  # whether the teacher sees the picture too
    examples: int | None = None  # worked examples in a prompt, None for all
    told: bool = True  # whether the teacher is told the annotations
    seed: int = 0
    settings: CheckSettings = field(default_factory=CheckSettings)
    similar: float = 0.8  # Jaccard similarity from which a row is a near-duplicate

    def check(self) -> None:
        """Raise InputError on what cannot be meant."""
        if self.show and self.finder is None:
            raise InputError("showing the pictures needs their folder; give --images")
        if not self.told and not self.show:
            raise InputError("a teacher that is told nothing must see the pictures; give --show")
        for kind, share in self.kinds:
            if not 0 < share <= 1:
                raise InputError(f"the share of kind '{kind.name}' is {share}; give more than 0, at most 1")
        names = [kind.name for kind, _ in self.kinds]
        if len(set(names)) < len(names):
            raise InputError(f"a kind is named twice in {', '.join(names)}; name each once")
        if not 0 < self.similar <= 1:
            raise InputError(f"the similarity is {self.similar}; give more than 0, at most 1")
        if self.settings.unsupported is not None and self.settings.unsupported < 0:
            raise InputError(f"unsupported is {self.settings.unsupported}; give 0 or more")
        if self.settings.language is not None:
            check_language(self.settings.language)


def plan(job: Job, teacher: Teacher) -> Iterator[tuple[str, Kind, Context, TeacherRequest]]:
    """(row id, kind, context, request) in the order of the rows: a function of the job alone."""
    for context in job.contexts:
        for kind, share in job.kinds:
            if share < 1 and random.Random(f"{job.seed}/{kind.name}/{context.id}").random() >= share:
                continue
            shown_context = context if job.told else Context(context.id, context.image)
            *before, (_, user) = kind.messages(shown_context, job.examples)
            image = digest_of = None
            if job.show:
                assert job.finder is not None
                image = str(job.finder.find(context.image))
                digest_of = _picture(image, Path(image).stat().st_mtime_ns)
            prompt = tuple(before)
            key = digest(teacher.model, teacher.options, kind.max_tokens, prompt, user, digest_of, job.seed)
            request = TeacherRequest(key, prompt, user, kind.max_tokens, image, digest_of)
            yield f"{context.id}-{kind.name}", kind, context, request


@cache
def _picture(path: str, _: int) -> str:
    return image_key(path)


@dataclass(frozen=True)
class Estimate:
    """What a run will cost, before its first call."""

    requests: int
    answered: int  # of them in the journal already
    tokens_in: int  # likely
    tokens_out: int  # likely
    most: tuple[int, int]  # (in, out) that cannot be exceeded by calls that succeed at once
    money: float | None
    most_money: float | None

    def sentence(self) -> str:
        text = f"{counted(self.requests, 'request')}, {self.answered} of them answered already"
        if not any(self.most):
            return text
        price = ""
        if self.money is not None:
            price = f", about {self.money:.2f} in money (at most {self.most_money:.2f})"
        return (
            f"{text}; the others take about {self.tokens_in:,} tokens in and {self.tokens_out:,} out "
            f"(at most {self.most[0]:,} and {self.most[1]:,}){price}"
        )


BYTES_PER_TOKEN = 3.5  # of English with numbers, until the journal knows better
SHARE_WRITTEN = 0.5  # of max_tokens, likewise


def estimate(job: Job, teacher: Teacher, journal: Journal, endpoint: Endpoint | None) -> Estimate:
    """Add up the plan. Rates learned from the journal's replies replace the guesses."""
    tally = journal.tally
    requests = answered = size = pictures = longest = 0
    max_tokens = [0, 0]
    for _, _, _, request in plan(job, teacher):
        requests += 1
        if request.id in journal:
            answered += 1
            continue
        size += request.size
        pictures += request.image is not None
        longest += request.max_tokens
        if endpoint is not None:
            bound = endpoint.bound(request)
            max_tokens[0] += bound[0]
            max_tokens[1] += bound[1]
    if tally.replied_in:
        likely_in = round(size * tally.replied_in / max(1, tally.prompt_bytes))
        likely_out = round((requests - answered) * tally.replied_out / tally.replies)
    else:
        likely_in = round(size / BYTES_PER_TOKEN) + pictures * (endpoint.image_tokens // 2 if endpoint else 0)
        likely_out = round(longest * SHARE_WRITTEN)
    priced = endpoint is not None and endpoint.prices is not None
    return Estimate(
        requests,
        answered,
        likely_in,
        likely_out,
        (max_tokens[0], max_tokens[1]),
        endpoint.money((likely_in, likely_out)) if priced and endpoint else None,
        endpoint.money((max_tokens[0], max_tokens[1])) if priced and endpoint else None,
    )


def open_journal(out: Path) -> tuple[Journal, Lock]:
    """Return the folder's journal and the lock that keeps other runs out."""
    with wrong_input(OSError, f"the folder '{out}' cannot be made ({CAUSE}); name another"):
        out.mkdir(parents=True, exist_ok=True)
    lock = hold(out / "run.lock", f"using the folder '{out}'")
    journal = Journal(out / "journal.jsonl")
    journal.settle()
    return journal, lock


def call(job: Job, teacher: Teacher, journal: Journal, progress: Progress) -> str:
    """Have every request of the plan answered that the journal does not answer yet; why it stopped, or ""."""
    asked: set[str] = set()

    def missing() -> Iterator[TeacherRequest]:
        for _, _, _, request in plan(job, teacher):
            if request.id not in journal and request.id not in asked:  # two alike are one request
                asked.add(request.id)
                yield request

    try:
        return teacher.answer(missing(), journal, progress)
    finally:
        journal.close()


def finish(job: Job, teacher: Teacher, journal: Journal) -> Statistics:
    """Parse, check and write everything that the journal holds of the plan. No call is made.

    The files appear whole or not at all, and depend on the plan and the replies alone.
    """
    vocabulary = Vocabulary(sorted({box.category for c in job.contexts for box in c.boxes}))
    statistics = Statistics(journal.tally.to_dict())
    seen_rows = SeenRows(job.similar)
    with replacing(job.out / "rows.jsonl") as rows, replacing(job.out / "rejected.jsonl") as rejected:
        for row_id, kind, context, request in plan(job, teacher):
            raw = journal.reply(request.id)
            reply = "" if raw is None else reply_text(raw)
            result: Draft | Rejection
            if raw is None:
                result = Rejection("no reply", journal.why.get(request.id, "it was not asked for"))
            else:
                result = examine(kind, context, reply, vocabulary, job.settings, job.seed)
            if isinstance(result, Draft):
                result = duplicate(result, row_id, seen_rows) or result
            if isinstance(result, Draft):
                llava_row = row(row_id, result)
                rows.write(json_text(llava_row) + "\n")
                statistics.kept(result, llava_row)
            else:
                values = {
                    "id": row_id, "image": context.image, "kind": kind.name, "reason": result.reason,
                    "detail": result.detail, "reply": reply,
                }  # fmt: skip
                rejected.write(json_text(values) + "\n")
                statistics.rejected(kind.name, values)
    return statistics


def duplicate(draft: Draft, row_id: str, seen: SeenRows) -> Rejection | None:
    """A kind whose rows may be alike is compared within a picture, any other within all rows of the kind."""
    if draft.kind.alike:
        text = " ".join(f"{turn.question} {turn.answer}" for turn in draft.turns)
        scope = f"{draft.kind.name}/{draft.context.id}"
    else:
        text, scope = " ".join(turn.answer for turn in draft.turns), draft.kind.name
    other = seen.like(row_id, text, scope)
    return None if other is None else Rejection("near-duplicate", f"of row {other}")
