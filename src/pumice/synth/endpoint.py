"""A teacher's endpoint: its budget, what is sent to it, and which completions are no reply."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from pumice.chat_client import ChatEndpoint, Outcome, Tokens, message_of, text_of, with_images
from pumice.errors import InputError
from pumice.jsonl import parse_json
from pumice.synth.checks import is_refusal
from pumice.synth.journal import TeacherRequest

PER_MESSAGE, PER_REQUEST = 16, 64  # tokens that a chat template may add, generously


@dataclass(frozen=True)
class Endpoint(ChatEndpoint):
    """Where the teacher is, and what it may cost. Prices are money per million tokens (in, out)."""

    refusals: int = 4  # calls that may be declined before the refusal is the reply
    budget_tokens: int | None = None
    budget_money: float | None = None
    prices: tuple[float, float] | None = None
    image_tokens: int = 1600  # at most, of a picture that is shown
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.7})

    def check(self) -> None:
        """Raise InputError on values that cannot be meant, and where the openai library is missing."""
        super().check()
        for name in ("budget_tokens", "budget_money"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name.replace('_', ' ')} is {value}; give 0 or more")
        if self.prices is not None and not all(math.isfinite(p) and p >= 0 for p in self.prices):
            raise InputError(f"the prices are {self.prices[0]} and {self.prices[1]}; give 0 or more")
        if self.budget_money is not None and self.prices is None:
            raise InputError(
                "a budget in money needs both prices; give --set 'endpoint.prices=[IN, OUT]', for a million"
            )
        if own := {"messages", "model", "n", "stream"} & self.options.keys():
            raise InputError(f"the option '{sorted(own)[0]}' is not one to set; leave it out")
        for name in ("max_tokens", "max_completion_tokens"):
            value = self.options.get(name)
            if value is not None and not (type(value) is int and value > 0):
                raise InputError(f"the option '{name}' is {value!r}; give a whole number above 0")

    def body(self, request: TeacherRequest) -> dict[str, Any]:
        """Return the JSON to post, without options that are null. Raises InputError without the picture."""
        picture = request.picture()
        content: Any = request.user if picture is None else with_images(request.user, [picture])
        messages = [{"role": role, "content": text} for role, text in (*request.prompt, ("user", content))]
        body = {"model": self.model, "messages": messages, "max_tokens": request.max_tokens, **self.options}
        return {key: value for key, value in body.items() if value is not None}

    def bound(self, request: TeacherRequest) -> Tokens:
        """Return the tokens that a call costs at most: no text has more tokens than bytes."""
        fixed = PER_REQUEST + PER_MESSAGE * (len(request.prompt) + 1)
        picture = self.image_tokens if request.image is not None else 0
        limits = [self.options.get(key) or 0 for key in ("max_tokens", "max_completion_tokens")]
        return request.size + fixed + picture, max(limits) or request.max_tokens

    def money(self, cost: Tokens) -> float:
        prices = self.prices or (0.0, 0.0)
        return (cost[0] * prices[0] + cost[1] * prices[1]) / 1e6


def examine_reply(outcome: Outcome, endpoint: Endpoint) -> Outcome:
    """Return what came of a call: a completion that declines, or that has no words, is no reply."""
    if outcome.what != "reply":
        return outcome
    message, finish = message_of(parse_json(outcome.raw))
    text = text_of(outcome.raw)
    if (message or {}).get("refusal") or finish == "content_filter" or is_refusal(text):
        return replace(outcome, what="refused", why="refusal")
    if text.strip():
        return outcome
    if finish != "length":
        return replace(outcome, what="again", why="empty")
    # Models that think first can use up every token before a word of the answer: so would the next try.
    reason = (
        f"{endpoint.model} at {endpoint.url} used all its tokens before the answer began; "
        "allow more: --set options.max_tokens=4000"
    )
    return replace(outcome, what="leave", why="no room", message=reason)


def reply_text(raw: str) -> str:
    """Return the words of a raw reply, a local teacher's or a completion; "" when it has none."""
    values = parse_json(raw)
    text = values.get("text") if isinstance(values, dict) else None
    return text if isinstance(text, str) else text_of(raw)


class Budget:
    """Tokens and money: what is spent, and what calls under way may still cost at most."""

    def __init__(self, endpoint: Endpoint, spent: Tokens) -> None:
        self.endpoint, self.spent = endpoint, spent
        self.reserved: Counter[Tokens] = Counter()
        self.scale = 1.0  # grows when an endpoint counts more tokens than the bound allows for
        self._changed = asyncio.Condition()

    def _fits(self, more: Tokens) -> bool:
        held = [(self.spent, 1), (more, 1), *self.reserved.items()]
        total = sum(cost[0] * number for cost, number in held), sum(cost[1] * number for cost, number in held)
        tokens, money = self.endpoint.budget_tokens, self.endpoint.budget_money
        return (tokens is None or sum(total) <= tokens) and (
            money is None or self.endpoint.money(total) <= money
        )

    async def reserve(self, request: TeacherRequest) -> Tokens | None:
        """Set aside what the call may cost; None when the budget cannot hold it any more.

        When it would fit but for the reservations of others, wait for their real cost.
        """
        async with self._changed:
            while True:
                bound = self.endpoint.bound(request)
                cost = int(bound[0] * self.scale) + 1, bound[1]
                if self._fits(cost):
                    self.reserved[cost] += 1
                    return cost
                if not +self.reserved:
                    return None
                await self._changed.wait()

    async def settle(self, reserved: Tokens, real: Tokens) -> None:
        async with self._changed:
            self.reserved[reserved] -= 1
            self.spent = self.spent[0] + real[0], self.spent[1] + real[1]
            if real[0] > reserved[0]:
                self.scale *= real[0] / reserved[0]
            self._changed.notify_all()
