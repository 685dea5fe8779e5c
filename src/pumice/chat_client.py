"""Ask a chat model at any address that speaks OpenAI's protocol: a hosted model, vLLM, or `pumice serve`.

The openai library sends each attempt once. What is tried again, when, and what ends a run is decided here.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import os
import random
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pumice.conversation import Video
from pumice.errors import InputError, WorkError, counted, install
from pumice.images import data_url, read_image
from pumice.jsonl import parse_json

LONGEST_BACKOFF = 60.0  # seconds
LONGEST_CONNECT = 10.0  # seconds
# Errors of requests that never left this machine, by name, as versions of openai use httpx or httpx2.
_NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "InvalidURL")

Tokens = tuple[int, int]  # in, out
Verdict = Literal["reply", "again", "refused", "leave", "stop", "foreign"]


@dataclass(frozen=True)
class ChatEndpoint:
    """Where a chat model is, and how hard it may be worked."""

    url: str  # up to and with /v1
    model: str
    key_variable: str = "OPENAI_API_KEY"
    parallel: int = 16  # calls at a time
    per_minute: float | None = None  # calls
    tokens_per_minute: float | None = None
    timeout: float = 120.0  # seconds, of a whole call
    attempts: int = 10  # calls for one request before it is given up
    backoff: float = 1.0  # seconds; doubles with each failure, drawn between 0 and that
    longest_wait: float = 600.0  # seconds that an endpoint may ask us to wait

    def check(self) -> None:
        """Raise InputError on values that cannot be meant, and where the openai library is missing."""
        if find_spec("openai") is None:
            raise InputError(f"a model at an address needs the openai library: {install('eval')}")
        try:
            parts = urlsplit(self.url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address or any(character.isspace() for character in self.url):
            raise InputError(
                f"the endpoint {self.url!r} is no address; write an address such as http://127.0.0.1:8000/v1"
            )
        for name in ("parallel", "attempts", "timeout", "per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name.replace('_', ' ')} is {value}; give a number above 0")
        if not (math.isfinite(self.backoff) and self.backoff >= 0):
            raise InputError(f"backoff is {self.backoff}; give 0 or more")
        if not self.key.isascii() or (self.key and not self.key.isprintable()):
            raise InputError(
                f"the key in ${self.key_variable} holds characters that no key has; set it again"
            )

    @property
    def key(self) -> str:
        """The key from the environment, or "": local servers need none. It is never written anywhere."""
        return os.environ.get(self.key_variable, "").strip()

    @property
    def base(self) -> str:
        return self.url.rstrip("/").removesuffix("/chat/completions")

    @property
    def address(self) -> str:
        return f"{self.base}/chat/completions"


@dataclass(frozen=True)
class Outcome:
    """What came of a call. what: how to go on; why: the cause, as it is counted; message: for people.

    "reply" ends a request, and so does "leave", which no further try would change; "stop" ends the run, and
    "foreign" (no OpenAI-compatible endpoint answers so) does unless others were answered. wait: seconds that
    the endpoint asks everybody to wait. cost: tokens; None where they are unknown.
    """

    what: Verdict
    why: str = ""
    message: str = ""
    wait: float | None = None
    status: int | None = None
    raw: str = ""
    cost: Tokens | None = (0, 0)


class ChatClient:
    """Sends chats to an endpoint, `parallel` at a time and evenly over a minute; the first one goes alone.

    So a wrong key or address costs one call. stopped: why nothing more is sent, as (kind, sentence).
    """

    def __init__(self, endpoint: ChatEndpoint) -> None:
        import openai

        self._openai, self._endpoint = openai, endpoint
        key = endpoint.key
        # One connection per call: a kept connection that dies unnoticed leaves open whether a request was
        # sent, and a handshake is nothing beside the seconds that a model writes.
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.base, api_key=key or "none", max_retries=0,
            timeout=openai.Timeout(None, connect=min(LONGEST_CONNECT, endpoint.timeout / 2)),
            default_headers={"Connection": "close"},
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )  # fmt: skip
        self._headers: dict[str, Any] = {} if key else {"Authorization": openai.Omit()}
        self._calls, self._tokens = Pace(endpoint.per_minute), Pace(endpoint.tokens_per_minute)
        self._slots, self._alone = asyncio.Semaphore(1), True
        self._resume_at = 0.0  # when the endpoint wants to hear from us again
        self._stop = asyncio.Event()
        self.stopped = ("", "")
        self.answered = 0

    async def close(self) -> None:
        await self._client.close()

    def end(self, kind: str, sentence: str = "") -> None:
        """Send nothing more; calls under way come to their end."""
        if not self._stop.is_set():
            self.stopped = (kind, sentence)
            self._stop.set()

    async def ask(
        self, attempt: Callable[[], Awaitable[Outcome | None]], tokens: float = 0.0
    ) -> Outcome | None:
        """Repeat `attempt`, which calls `post`, until it brings a reply or is given up; None if stopped.

        tokens: what an attempt counts towards the tokens of a minute.
        """
        failures, answered = 0, -1  # by anybody, when this request failed last
        while True:
            async with self._slots:
                outcome = await attempt() if await self._turn(tokens) else None
                if self._alone:
                    self._alone = False
                    for _ in range(self._endpoint.parallel - 1):
                        self._slots.release()
            if outcome is None:
                return None
            self.answered += outcome.what == "reply"
            if outcome.what in ("stop", "foreign"):
                self.end("input", outcome.message)
            if outcome.what not in ("again", "refused"):
                return outcome
            if outcome.what == "refused":
                continue
            # While others get through, being put off is no failure but a queue.
            failures += outcome.wait is None or self.answered == answered
            if failures >= self._endpoint.attempts:
                return outcome
            answered = self.answered
            if outcome.wait is None:
                longest = min(LONGEST_BACKOFF, self._endpoint.backoff * 2 ** (failures - 1))
                await self._sleep(random.uniform(0, longest))
            else:
                self._resume_at = max(self._resume_at, _now() + outcome.wait)

    async def post(self, body: Mapping[str, Any], key: str) -> Outcome:
        """Send a chat once. key: the same whenever the same request is sent."""
        openai, endpoint = self._openai, self._endpoint
        chat = self._client.chat.completions.with_raw_response.create(
            model=body["model"], messages=body["messages"], extra_body=dict(body),
            extra_headers={"Idempotency-Key": key, **self._headers},
        )  # fmt: skip
        try:
            response: Any = (await asyncio.wait_for(chat, endpoint.timeout)).http_response
        except openai.APIStatusError as error:
            response = error.response
        except asyncio.TimeoutError:
            return Outcome("again", "timeout", cost=None)
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if type(cause).__name__ not in _NEVER_SENT:
                return Outcome("again", "connection broken", str(cause), cost=None)
            text = f"nothing answers at {endpoint.url} ({cause or 'no connection in time'})"
            text += "; start the endpoint or mend the address"
            return Outcome("again" if self.answered else "stop", "unreachable", text)
        raw = response.content.decode("utf-8", "replace")
        outcome = judge(response.status_code, response.headers, raw, endpoint)
        if outcome.what == "foreign" and self.answered:
            return replace(outcome, what="again")  # a gateway's own page; before, it spoke the protocol
        return outcome

    async def first_model(self) -> str:
        """Return the name of the first model that the server lists. Raises WorkError where there is none."""
        try:
            listed = await self._client.models.list(extra_headers=self._headers)
            return str(listed.data[0].id)
        except (self._openai.OpenAIError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            text = f"{self._endpoint.url} did not answer which models it has ({reason}); check the address"
            raise WorkError(text) from error

    async def _turn(self, tokens: float) -> bool:
        """Wait until a call may be made; False when none may be any more."""
        await self._sleep(self._calls.delay())
        await self._sleep(self._tokens.delay(tokens))
        while not self._stop.is_set() and (wait := self._resume_at - _now()) > 0:
            await self._sleep(wait + random.uniform(0, 0.1 * wait))
        return not self._stop.is_set()

    async def _sleep(self, seconds: float) -> None:
        """Sleep, unless the run stops first."""
        if seconds > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)


class Pace:
    """Lets something pass so many times per minute, evenly."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = per_minute
        self._next = 0.0

    def delay(self, amount: float = 1.0) -> float:
        """Return the seconds to wait before passing; the turn is taken."""
        if self.per_minute is None:
            return 0.0
        start = max(_now(), self._next)
        self._next = start + amount * 60 / self.per_minute
        return start - _now()


class ChatReply(NamedTuple):
    """A reply, the name of the model that the server states, and the whole completion."""

    text: str
    model: str
    values: dict[str, Any]


def ask_in_order(
    endpoint: ChatEndpoint, chats: Iterable[Mapping[str, Any] | InputError]
) -> Iterator[ChatReply | InputError]:
    """Yield the reply to each chat (the body of a request, without the model), in order.

    At most twice `parallel` chats are read ahead. An InputError among them comes back in its place, and so
    does one for a chat that the endpoint does not take. Raises InputError when the endpoint cannot be used,
    and WorkError when it keeps failing.
    """
    client, loop = ChatClient(endpoint), asyncio.new_event_loop()

    async def ask(chat: Mapping[str, Any] | InputError) -> ChatReply | InputError:
        if isinstance(chat, InputError):
            return chat
        key = uuid.uuid4().hex
        outcome = await client.ask(lambda: client.post({"model": endpoint.model, **chat}, key))
        if outcome is None or outcome.what in ("stop", "foreign"):
            raise InputError(client.stopped[1])
        if outcome.what == "leave":
            return InputError(outcome.message)
        if outcome.what != "reply":
            reason = f"{outcome.why} {outcome.message}".strip()
            tries = counted(endpoint.attempts, "try")
            raise WorkError(f"{endpoint.address} did not answer in {tries} ({reason})")
        values = parse_json(outcome.raw)
        return ChatReply(text_of(outcome.raw), str(values.get("model") or endpoint.model), values)

    async def close() -> None:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await client.close()

    # The loop runs while the caller waits for the next reply; the calls ahead of it go on meanwhile.
    pending: deque[asyncio.Task[ChatReply | InputError]] = deque()
    try:
        for chat in chats:
            pending.append(loop.create_task(ask(chat)))
            if len(pending) >= 2 * endpoint.parallel:
                yield loop.run_until_complete(pending.popleft())
        while pending:
            yield loop.run_until_complete(pending.popleft())
    finally:
        loop.run_until_complete(close())
        loop.close()


def with_model(endpoint: ChatEndpoint) -> ChatEndpoint:
    """Return an endpoint that names a model: the first that its server lists, if it names none.

    Raises InputError on a wrong endpoint, and WorkError when its server lists none.
    """
    endpoint.check()
    if endpoint.model:
        return endpoint

    async def first() -> str:
        client = ChatClient(endpoint)
        try:
            return await client.first_model()
        finally:
            await client.close()

    return replace(endpoint, model=asyncio.run(first()))


def with_images(text: str, images: Sequence[Path | bytes | Video]) -> list[dict[str, Any]]:
    """Return the content of a message with images and videos (as data URLs) before the text.

    Where the text has one `<image>` per image, each image takes the place of its `<image>` instead.
    `frames` of a video is not sent: who answers chooses them. Raises InputError if a file cannot be read.
    """
    parts = [_part(image) for image in images]
    pieces = text.split("<image>")
    if len(pieces) != len(parts) + 1:
        return [*parts, *([{"type": "text", "text": text}] if text else [])]
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        content += [parts[number - 1]] if number else []
        content += [{"type": "text", "text": piece}] if piece.strip() else []
    return content


def _part(image: Path | bytes | Video) -> dict[str, Any]:
    if isinstance(image, Video):  # decoders look at the contents, not at the type
        data = base64.b64encode(read_image(image.file)).decode()
        return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def judge(status: int, headers: Mapping[str, str], raw: str, endpoint: ChatEndpoint) -> Outcome:
    """Return what an HTTP answer means; a completion is a reply, whatever it says."""
    raw = raw.replace(endpoint.key, "***") if endpoint.key else raw  # some repeat the key that they refuse
    values = parse_json(raw)
    error = values.get("error") if isinstance(values, dict) else None
    # 1. A completion. Some gateways put an error of the model behind them into a 200.
    if status == 200 and error:
        code = error.get("code") if isinstance(error, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
    if status == 200:
        return _completion(values, raw, endpoint)
    # 2. An error: does it end the run, this request, or only this try?
    cause = error.get("message") if isinstance(error, dict) else error
    cause = " ".join(str(cause or raw[:120] or "no reason given").split())[:200]
    kind = error.get("code") or error.get("type") if isinstance(error, dict) else None
    url, wait = endpoint.url, None
    what: Verdict = "stop"
    if status in (401, 403):
        text = f"the endpoint {url} refuses the key in ${endpoint.key_variable} ({status}: {cause}); "
        text += "set the right one"
    elif status == 402 or kind == "insufficient_quota":
        text = f"the account at {url} has no credit left ({status}: {cause}); add some and run again"
    elif status == 404:
        text = f"{endpoint.address} or its model '{endpoint.model}' is not there (404: {cause}); check both"
    elif status in (408, 409, 425, 429) or status >= 500:
        wait = _retry_after(headers)
        if wait is not None and wait > endpoint.longest_wait:
            text = f"the endpoint {url} asks to wait {wait:.0f} s ({status}: {cause}); run again then"
        else:
            what, text = "again", cause
    elif status < 400:
        what, target = "foreign", headers.get("location") or "somewhere else"
        text = (
            f"{endpoint.address} sends calls on to {target} ({status}); give the address that answers itself"
        )
    else:
        what = "leave"
        text = f"the endpoint {url} does not take the request ({status}: {cause}); "
        text += "check the model's name and the options"
    return Outcome(what, str(status), text, wait, status, raw)


def _completion(values: Any, raw: str, endpoint: ChatEndpoint) -> Outcome:
    if message_of(values)[0] is not None:
        usage = values.get("usage")
        names = ("prompt_tokens", "completion_tokens")
        counts = [usage.get(name) for name in names] if isinstance(usage, dict) else []
        told = [count for count in counts if isinstance(count, int) and count >= 0]
        return Outcome("reply", status=200, raw=raw, cost=(told[0], told[1]) if len(told) == 2 else None)
    # What begins like JSON was cut off on its way, and the tokens were written all the same.
    if values is None and raw.lstrip()[:1] in ("{", ""):
        return Outcome("again", "truncated", status=200, raw=raw, cost=None)
    why, start = "not JSON" if values is None else "not a completion", " ".join(raw[:60].split())
    text = (
        f"{endpoint.address} does not speak the chat completions protocol ({why}, it begins {start!r}); give "
        "the address of an OpenAI-compatible endpoint, usually one that ends in /v1"
    )
    return Outcome("foreign", why, text, status=200, raw=raw, cost=None)


def message_of(values: Any) -> tuple[dict[str, Any] | None, Any]:
    """Return the message of a completion, None in anything else, and why it ended."""
    choices = values.get("choices") if isinstance(values, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None, None
    message = choices[0].get("message")
    return (message if isinstance(message, dict) else None), choices[0].get("finish_reason")


def text_of(raw: str) -> str:
    """Return the words of a completion, or of a refusal; "" when it has none."""
    message = message_of(parse_json(raw))[0] or {}
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if content and isinstance(content, str) else str(message.get("refusal") or "")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return seconds, from `retry-after-ms` or either form of `Retry-After` (RFC 9110, section 10.2.3)."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        if (text := headers.get(name)) is None:
            continue
        try:
            seconds = float(text) / scale
        except ValueError:
            try:
                when = parsedate_to_datetime(text)
            except (ValueError, TypeError):
                return None
            when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
            seconds = (when - datetime.now(timezone.utc)).total_seconds()
        return max(0.0, seconds) if math.isfinite(seconds) else None
    return None


def _now() -> float:
    return asyncio.get_running_loop().time()
