"""Answers from another OpenAI-compatible server, vLLM or SGLang for instance, behind the same limits.

Knows of a request only what the limits are about: pictures, lengths, numbers of answers. Everything else
passes as it came. Pictures from the web are fetched here, under this server's rules, and sent on as data.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import httpx
from pydantic import ValidationError
from starlette.responses import Response, StreamingResponse

from pumice.errors import InputError
from pumice.images import data_url
from pumice.serve import pictures
from pumice.serve.answers import Shape
from pumice.serve.backend import Call, attended
from pumice.serve.errors import REMEDIES, ApiError
from pumice.serve.fetch import Fetcher
from pumice.serve.metrics import Levels, Metrics
from pumice.serve.protocol import ImageUrl
from pumice.serve.settings import ServerSettings

KEY = "PUMICE_UPSTREAM_KEY"  # the environment's name for the upstream's key
FRESH = 2.0  # seconds for which what the upstream said of its models is believed
_PASSED = ("content-type", "retry-after", "openai-processing-ms")


class Upstream:
    """A backend behind `url` (up to and with /v1). Raises InputError when that is no address."""

    def __init__(self, url: str, settings: ServerSettings) -> None:
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
            raise InputError(f"the upstream {url!r} is no address; write http://HOST:PORT/v1")
        self.url, self.settings = url.rstrip("/"), settings
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"the key in ${KEY} holds characters that no key has; set it again")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._fetcher: Fetcher | None = None
        self._known: tuple[float, list[str] | None] = (float("-inf"), None)

    async def start(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="pumice-pictures")
        room = self.settings.queue + 1
        self._client = httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(self.settings.timeout, connect=10.0),
            limits=httpx.Limits(max_connections=room + 16, max_keepalive_connections=room),
        )
        if self.settings.allow_image_urls:
            self._fetcher = Fetcher(size=self.settings.max_body, seconds=self.settings.image_timeout)

    async def close(self) -> None:
        await self._client.aclose()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._fetcher is not None:
            await self._fetcher.close()

    async def models(self) -> list[str]:
        names = await self._models()
        if names is None:
            raise _away(self.url)
        return names

    async def ready(self) -> bool:
        return await self._models() is not None

    def levels(self) -> Levels:
        return Levels()

    async def chat(self, call: Call) -> Response:
        return await attended(call.request, self._pass_on(call, "/chat/completions"))

    async def complete(self, call: Call) -> Response:
        return await attended(call.request, self._pass_on(call, "/completions"))

    async def explain(self, call: Call) -> Response:
        raise ApiError(
            404, "the answers of an upstream cannot be explained; serve the model here", code="not_explained"
        )

    async def _models(self) -> list[str] | None:
        """Names of the upstream's models, None when it does not answer; asked for at most every FRESH s."""
        asked, names = self._known
        if time.monotonic() - asked < FRESH:
            return names
        try:
            response = await self._client.get(f"{self.url}/models", timeout=5.0)
            found = response.raise_for_status().json()["data"]
            names = [str(entry["id"]) for entry in found]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            names = None
        self._known = (time.monotonic(), names)
        return names

    async def _pass_on(self, call: Call, path: str) -> Response:
        body = await self._apart(_read, call.body)
        self._limit(body)
        await self._show(call, body)
        data = await self._apart(_write, body)
        request = self._client.build_request(
            "POST",
            self.url + path,
            content=data,
            headers={"Content-Type": "application/json", "X-Request-Id": call.record.id},
        )
        left = max(0.1, self.settings.timeout - call.record.seconds)
        try:
            response = await asyncio.wait_for(self._client.send(request, stream=True), left)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            raise ApiError(
                504, f"the upstream did not answer within {self.settings.timeout:g} s", code="timeout"
            ) from None
        except httpx.HTTPError as error:
            call.record.error = error
            raise _away(self.url) from error
        if response.status_code >= 500:
            try:
                call.record.fields["upstream"] = (await response.aread())[:1000].decode("utf-8", "replace")
            finally:
                await response.aclose()
            raise ApiError(
                502, f"the upstream failed with status {response.status_code}", code="upstream_failed"
            )
        headers = {name: response.headers[name] for name in _PASSED if name in response.headers}
        return _Relayed(self._relay(call, response), response, headers, left)

    async def _relay(self, call: Call, response: httpx.Response) -> AsyncIterator[bytes]:
        first = True
        try:
            async for chunk in response.aiter_bytes():
                if first:
                    first = False
                    self._metrics.first.observe(call.record.seconds)
                yield chunk
        except httpx.HTTPError as error:
            call.record.error = error
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                yield b"\n\n" + Shape.error_event(_away(self.url).body())
            else:
                raise

    def _limit(self, body: dict[str, Any]) -> None:
        if body.get("n") not in (None, 1):
            raise ApiError(400, REMEDIES["n"], param="n", code="unsupported_value")
        allowed = self.settings.max_tokens
        names = [name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
        for name in names:
            if not isinstance(body[name], int) or isinstance(body[name], bool) or body[name] < 1:
                raise ApiError(400, f"'{name}' must be a whole number above 0", param=name)
            if body[name] > allowed:
                raise ApiError(
                    400,
                    f"{name} is {body[name]}, this server allows {allowed}; ask for fewer",
                    param=name,
                    code="too_many_tokens",
                )
        if not names:
            body["max_tokens"] = min(self.settings.default_tokens, allowed)

    async def _show(self, call: Call, body: dict[str, Any]) -> None:
        """Check the pictures, and put the files of those from the web in their places."""
        places = list(_places(body))
        given: list[tuple[str, ImageUrl]] = []
        for param, part in places:
            try:
                given.append((param, ImageUrl.model_validate(part["image_url"])))
            except (ValidationError, KeyError) as error:
                raise ApiError(
                    400, f"'{param}' must hold a url", param=param, code="invalid_value"
                ) from error
        files = await pictures.read(given, self.settings, self._fetcher, self._pool)
        call.record.fields["pictures"] = len(files)
        self._metrics.pictures.inc(len(files))
        for (_, part), (_, image), data in zip(places, given, files, strict=True):
            if image.url[:5].lower() != "data:":
                part["image_url"] = {**part["image_url"], "url": await self._apart(data_url, data)}

    async def _apart(self, work: Any, *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *given)


class _Relayed(StreamingResponse):
    """The upstream's answer as it comes; its connection is given back whatever happens."""

    def __init__(
        self, body: AsyncIterator[bytes], response: httpx.Response, headers: dict[str, str], seconds: float
    ) -> None:
        self._upstream, self._seconds = response, seconds
        super().__init__(body, status_code=response.status_code, headers=headers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            with anyio.move_on_after(self._seconds):
                await super().__call__(scope, receive, send)
        finally:
            await self._upstream.aclose()


def _places(body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The picture parts of a chat, each with its field's name."""
    messages = body.get("messages")
    found = []
    for m, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        for p, part in enumerate(content if isinstance(content, list) else []):
            if isinstance(part, dict) and "image_url" in part:
                found.append((f"messages.{m}.content.{p}.image_url", part))
    return found


def _read(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="json_invalid") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body is no JSON object", code="invalid_value")
    return values


def _write(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=True).encode()


def _away(url: str) -> ApiError:
    return ApiError(
        502,
        f"the upstream {url} does not answer; ask again soon",
        code="upstream_away",
        headers={"Retry-After": "5"},
    )
