"""An OpenAI-compatible endpoint: what is sent to it, and what its answers mean."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from pumice.errors import InputError
from pumice.images import data_url
from pumice.synth.checks import is_refusal
from pumice.synth.journal import Cost, TeacherRequest, costs

PER_MESSAGE, PER_REQUEST = 16, 64  # tokens that a chat template may add, generously


@dataclass(frozen=True)
class Endpoint:
    """Where the teacher is and how hard it may be worked. Prices are money per million tokens (in, out)."""

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    parallel: int = 16
    per_minute: float | None = None  # requests
    tokens_per_minute: float | None = None
    timeout: float = 120.0  # seconds, of a whole call
    attempts: int = 10  # calls for one request before it is given up in this run
    refusals: int = 4  # calls that may be declined before the refusal is the reply
    backoff: float = 1.0  # seconds; doubles with each failure, drawn between 0 and that
    longest_wait: float = 600.0  # seconds that an endpoint may ask us to wait
    budget_tokens: int | None = None
    budget_money: float | None = None
    prices: tuple[float, float] | None = None
    image_tokens: int = 1600  # at most, of a picture that is shown
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.7})

    def check(self) -> None:
        """Raise InputError on values that cannot be meant."""
        if not re.match(r"https?://[^/\s]+", self.url):
            raise InputError(
                f"the endpoint is '{self.url}'; write an address such as http://127.0.0.1:8000/v1"
            )
        for name in ("parallel", "attempts", "refusals", "timeout", "per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name.replace('_', ' ')} is {value}; give a number above 0")
        for name in ("budget_tokens", "budget_money", "backoff"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name.replace('_', ' ')} is {value}; give 0 or more")
        if self.prices is not None and not all(math.isfinite(p) and p >= 0 for p in self.prices):
            raise InputError(f"the prices are {self.prices[0]} and {self.prices[1]}; give 0 or more")
        if self.budget_money is not None and self.prices is None:
            raise InputError("a budget in money needs both prices; give --price-in and --price-out")
        if own := {"messages", "model", "n", "stream"} & self.options.keys():
            raise InputError(f"the option '{sorted(own)[0]}' is not one to set; leave it out")
        for name in ("max_tokens", "max_completion_tokens"):
            value = self.options.get(name)
            if value is not None and not (type(value) is int and value > 0):
                raise InputError(f"the option '{name}' is {value!r}; give a whole number above 0")
        self.headers()

    def headers(self) -> dict[str, str]:
        """With the key from the environment, if there is one: it is never written anywhere."""
        key = self._key()
        if not key:
            return {}
        if not key.isascii() or not key.isprintable():
            raise InputError(
                f"the key in ${self.key_variable} holds characters that no key has; set it again"
            )
        return {"Authorization": f"Bearer {key}"}

    def hide(self, text: str) -> str:
        """Without the key, which some endpoints repeat when they refuse it."""
        key = self._key()
        return text.replace(key, "***") if key else text

    def _key(self) -> str:
        return os.environ.get(self.key_variable, "").strip()

    @property
    def address(self) -> str:
        url = self.url.rstrip("/")
        return url if url.endswith("/chat/completions") else f"{url}/chat/completions"

    def body(self, request: TeacherRequest) -> dict[str, Any]:
        """The JSON to post. An option that is null is left out."""
        content: Any = request.user
        if (picture := request.picture()) is not None:
            content = [{"type": "image_url", "image_url": {"url": data_url(picture)}}]
            content += [{"type": "text", "text": request.user}] if request.user else []
        messages = [{"role": role, "content": text} for role, text in request.prompt]
        messages.append({"role": "user", "content": content})
        body = {"model": self.model, "messages": messages, "max_tokens": request.max_tokens, **self.options}
        return {key: value for key, value in body.items() if value is not None}

    def bound(self, request: TeacherRequest) -> Cost:
        """Tokens that a call costs at most: no text has more tokens than bytes."""
        fixed = PER_REQUEST + PER_MESSAGE * (len(request.prompt) + 1)
        picture = self.image_tokens if request.image is not None else 0
        longest = [self.options.get(key) for key in ("max_tokens", "max_completion_tokens")]
        limits = [int(value) for value in longest if isinstance(value, int)]
        return request.size + fixed + picture, max([*limits, *([] if limits else [request.max_tokens])])

    def money(self, cost: Cost) -> float:
        return costs(cost, self.prices or (0.0, 0.0))


@dataclass(frozen=True)
class Outcome:
    """What came of a call. what: how to go on; why: the cause, as it is counted.

    wait: seconds that the endpoint asks everybody to wait. cost None: unknown, so the reservation counts.
    """

    what: Literal["reply", "again", "refused", "leave", "stop", "foreign"]
    why: str = ""
    message: str = ""
    wait: float | None = None
    status: int | None = None
    raw: str = ""
    cost: Cost | None = (0, 0)


def judge(status: int, headers: Mapping[str, str], raw: str, endpoint: Endpoint) -> Outcome:
    """What an HTTP answer means. "foreign" is an answer that no OpenAI-compatible endpoint gives."""
    raw = endpoint.hide(raw)
    values, is_json = _json(raw)
    error = values.get("error") if isinstance(values, dict) else None
    if status == 200 and error:  # some gateways put an error of the model behind them into a 200
        code = error.get("code") if isinstance(error, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
    if status == 200:
        return _completion(values, is_json, raw, endpoint)
    cause = error.get("message") if isinstance(error, dict) else error
    cause = " ".join(str(cause or raw[:120] or "no reason given").split())[:200]
    wait = _retry_after(headers)
    if status in (401, 403):
        text = (
            f"the endpoint {endpoint.url} refuses the key in ${endpoint.key_variable} ({status}: {cause}); "
            "set the right one"
        )
        return Outcome("stop", str(status), text, None, status, raw)
    kind = error.get("code") or error.get("type") if isinstance(error, dict) else None
    if status == 402 or kind == "insufficient_quota":
        text = f"the account at {endpoint.url} has no credit left ({status}: {cause}); add some and run again"
        return Outcome("stop", str(status), text, None, status, raw)
    if status == 404:
        text = f"{endpoint.address} or its model '{endpoint.model}' is not there (404: {cause}); check both"
        return Outcome("stop", "404", text, None, status, raw)
    if status in (408, 409, 425, 429) or status >= 500:
        if wait is not None and wait > endpoint.longest_wait:
            text = (
                f"the endpoint {endpoint.url} asks to wait {wait:.0f} s ({status}: {cause}); run again then"
            )
            return Outcome("stop", str(status), text, None, status, raw)
        return Outcome("again", str(status), cause, wait, status, raw)
    if status < 400:
        target = headers.get("location") or "somewhere else"
        text = (
            f"{endpoint.address} sends calls on to {target} ({status}); give the address that answers itself"
        )
        return Outcome("foreign", str(status), text, None, status, raw)
    text = f"the endpoint {endpoint.url} does not take the request ({status}: {cause}); change the options"
    return Outcome("leave", str(status), text, None, status, raw)


def _completion(values: Any, whole: bool, raw: str, endpoint: Endpoint) -> Outcome:
    if not whole:
        # What begins like JSON was cut off on its way, and the tokens were written all the same.
        cut = raw.lstrip()[:1] in ("{", "")
        return Outcome(
            "again" if cut else "foreign", "truncated" if cut else "not JSON", "", None, 200, raw, None
        )
    message, finish = _message(values)
    if message is None:
        return Outcome("foreign", "not a completion", "", None, 200, raw, None)
    cost = _usage(values)
    text = _text(message)
    if message.get("refusal") or finish == "content_filter" or is_refusal(text):
        return Outcome("refused", "refusal", "", None, 200, raw, cost)
    if not text.strip():
        # Models that think first can use up every token before a word of the answer: so would the next try.
        if finish == "length":
            reason = (
                f"{endpoint.model} at {endpoint.url} used all its tokens before the answer began; "
                "allow more: --options '{\"max_tokens\": 4000}'"
            )
            return Outcome("leave", "no room", reason, None, 200, raw, cost)
        return Outcome("again", "empty", "", None, 200, raw, cost)
    return Outcome("reply", "", "", None, 200, raw, cost)


def _json(raw: str) -> tuple[Any, bool]:
    try:
        return json.loads(raw), True
    except (ValueError, RecursionError):
        return None, False


def _message(values: Any) -> tuple[dict[str, Any] | None, Any]:
    choices = values.get("choices") if isinstance(values, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None, None
    message = choices[0].get("message")
    return (message if isinstance(message, dict) else None), choices[0].get("finish_reason")


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _usage(values: Any) -> Cost | None:
    usage = values.get("usage")
    if not isinstance(usage, dict):
        return None
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        return None
    return int(counts[0] or 0), int(counts[1] or 0)


def text_of(raw: str) -> str:
    """The words of a raw reply, a local teacher's or a chat completion; "" when it has none."""
    values, is_json = _json(raw)
    if is_json and isinstance(values, dict) and isinstance(values.get("text"), str):
        return str(values["text"])
    message, _ = _message(values)
    if message is None:
        return ""
    return _text(message) or str(message.get("refusal") or "")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from `retry-after-ms` or `Retry-After` in either of its forms (RFC 9110, section 10.2.3)."""
    retry_ms = headers.get("retry-after-ms")
    scale = 1000.0
    if retry_ms is None:
        retry_ms, scale = headers.get("retry-after"), 1.0
    if retry_ms is None:
        return None
    try:
        seconds = float(retry_ms) / scale
    except ValueError:
        try:
            when = parsedate_to_datetime(retry_ms)
        except (ValueError, TypeError):
            return None
        if when.tzinfo is None:
            when = when.replace(tzinfo=timezone.utc)
        seconds = (when - datetime.now(timezone.utc)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
