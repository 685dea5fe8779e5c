"""Count what a run made, and keep a bounded sample of pictures to look at."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

from pumice.synth.checks import REASONS
from pumice.synth.journal import digest
from pumice.synth.kinds.base import Draft

SHOWN = 60  # pictures
LENGTHS = (1, 3, 6, 11, 21, 41, 81, 161, 321)  # words; each begins a class of answers
MOST_TYPES = 5_000  # question types are counted up to so many; later ones count as "other"

# The words that say what a question asks for; the second one tells "what" from "what colour".
_OPENINGS = re.compile(
    r"(how many|how much|how|what colou?r|what (?:is|are) .*? doing|what kind|what|where|who|whose|"
    r"which|why|when|is there|are there|is|are|does|do|did|can|could|would|should|will|has|have|was|were|"
    r"describe)\b"
)


def question_type(question: str) -> str:
    """How a question begins, as far as that says what it asks for."""
    text = question.lower().removeprefix("<image>").strip()
    match = _OPENINGS.match(text)
    if match is None:
        return " ".join(re.findall(r"\w+", text)[:2]) or "other"
    words = match.group(1)
    if words.endswith("doing"):
        return "what is ... doing"
    return words.replace("color", "colour")


class Statistics:
    """Counts of a run and a sample of its pictures, the same for the same rows."""

    def __init__(self, calls: dict[str, Any] | None = None, shown: int = SHOWN) -> None:
        self.calls, self.shown = calls or {}, shown
        self.rows: Counter[str] = Counter()  # kept, by kind
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)  # kind -> reason -> number
        self.questions: Counter[str] = Counter()
        self.lengths: dict[str, Counter[int]] = defaultdict(Counter)  # kind -> first of the class -> answers
        self.turns: Counter[int] = Counter()
        self.nouns: Counter[str] = Counter()
        self.sample: dict[str, list[dict[str, Any]]] = {}  # picture -> its rows, kept and rejected
        self._rank: dict[str, str] = {}

    @property
    def total(self) -> int:
        return sum(self.rows.values()) + sum(sum(c.values()) for c in self.reasons.values())

    @property
    def accepted(self) -> int:
        return sum(self.rows.values())

    def kept(self, draft: Draft, row: dict[str, Any]) -> None:
        kind = draft.kind.name
        self.rows[kind] += 1
        self.turns[len(draft.turns)] += 1
        for turn in draft.turns:
            name = question_type(turn.question)
            self.questions[
                name if name in self.questions or len(self.questions) < MOST_TYPES else "other"
            ] += 1
            words = len(turn.answer.split())
            self.lengths[kind][max(n for n in LENGTHS if n <= max(1, words))] += 1
            self.nouns.update(draft.vocabulary.named(turn.answer))
        self._show(draft.context.image, {**row, "kind": kind})

    def rejected(self, kind: str, values: dict[str, Any]) -> None:
        self.reasons[kind][values["reason"]] += 1
        self._show(values["image"], values)

    def _show(self, image: str, values: dict[str, Any]) -> None:
        """Keep the rows of the pictures whose names hash lowest: a fixed random sample, found in one pass."""
        if image in self.sample:
            self.sample[image].append(values)
            return
        rank = digest(image)
        if len(self.sample) >= self.shown:
            last = max(self._rank, key=lambda name: self._rank[name], default=None)
            if last is None or rank > self._rank[last]:
                return
            del self.sample[last], self._rank[last]
        self.sample[image], self._rank[image] = [values], rank

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        kinds = sorted({*self.rows, *self.reasons})
        return {
            "requests": self.total,
            "rows": self.accepted,
            "kinds": {
                kind: {
                    "rows": self.rows[kind],
                    "rejected": {r: self.reasons[kind][r] for r in REASONS if self.reasons[kind][r]},
                    "answer_words": {str(n): c for n, c in sorted(self.lengths[kind].items())},
                }
                for kind in kinds
            },
            "turns": {str(n): count for n, count in sorted(self.turns.items())},
            "question_types": dict(self.questions.most_common(40)),
            "nouns": dict(self.nouns.most_common(60)),
            "calls": self.calls,
        }
