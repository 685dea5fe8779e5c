"""The backend that passes requests to another OpenAI-compatible server, such as vLLM or SGLang.

It checks the limits of this server: pictures, tokens and the number of answers. It passes all other fields
unchanged. It downloads pictures from the web itself, under the rules of this server, and sends them as data.
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
from pumice.serve.answers import AnswerForm
from pumice.serve.backend import Call, run_while_connected
from pumice.serve.errors import REMEDIES, ApiError
from pumice.serve.fetch import Fetcher
from pumice.serve.images import read_images
from pumice.serve.metrics import BackendStats, Metrics
from pumice.serve.protocol import ImageUrl
from pumice.serve.settings import ServerSettings

KEY = "PUMICE_UPSTREAM_KEY"  # the environment's name for the upstream's key
FRESH = 2.0  # seconds for which the upstream's list of models is kept
_PASSED_HEADERS = ("content-type", "retry-after", "openai-processing-ms")


class UpstreamBackend:
    """A backend at `url`, which ends in /v1. Raises InputError when it is not an address."""

    def __init__(self, url: str, settings: ServerSettings) -> None:
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
            raise InputError(f"the upstream {url!r} is not an address; write http://HOST:PORT/v1")
        self.url, self.settings = url.rstrip("/"), settings
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"the key in ${KEY} holds a character that is not printable ASCII; set it again")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._fetcher: Fetcher | None = None
        self._models_cache: tuple[float, list[str] | None] = (float("-inf"), None)

    async def start(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="pumice-pictures")
        max_requests = self.settings.queue + 1
        self._client = httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(self.settings.timeout, connect=10.0),
            limits=httpx.Limits(max_connections=max_requests + 16, max_keepalive_connections=max_requests),
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
            raise _unreachable(self.url)
        return names

    async def ready(self) -> bool:
        return await self._models() is not None

    def stats(self) -> BackendStats:
        return BackendStats()

    async def chat(self, call: Call) -> Response:
        return await run_while_connected(call.request, self._forward(call, "/chat/completions"))

    async def complete(self, call: Call) -> Response:
        return await run_while_connected(call.request, self._forward(call, "/completions"))

    async def explain(self, call: Call) -> Response:
        raise ApiError(
            404, "the answers of an upstream cannot be explained; serve the model here", code="not_explained"
        )

    async def _models(self) -> list[str] | None:
        """Return the names of the upstream's models, or None when it does not answer. Kept for FRESH s."""
        fetched_at, names = self._models_cache
        if time.monotonic() - fetched_at < FRESH:
            return names
        try:
            response = await self._client.get(f"{self.url}/models", timeout=5.0)
            entries = response.raise_for_status().json()["data"]
            names = [str(entry["id"]) for entry in entries]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            names = None
        self._models_cache = (time.monotonic(), names)
        return names

    async def _forward(self, call: Call, path: str) -> Response:
        # 1. Check the limits, and replace pictures from the web by their data.
        body = await self._run_in_pool(_parse_json, call.body)
        self._check_limits(body)
        await self._embed_images(call, body)
        # 2. Send the request. Wait for the headers of the answer only.
        data = await self._run_in_pool(_to_json, body)
        request = self._client.build_request(
            "POST",
            self.url + path,
            content=data,
            headers={"Content-Type": "application/json", "X-Request-Id": call.record.id},
        )
        seconds_left = max(0.1, self.settings.timeout - call.record.seconds)
        try:
            response = await asyncio.wait_for(self._client.send(request, stream=True), seconds_left)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            raise ApiError(
                504, f"the upstream did not answer within {self.settings.timeout:g} s", code="timeout"
            ) from None
        except httpx.HTTPError as error:
            call.record.error = error
            raise _unreachable(self.url) from error
        # 3. Log what the upstream writes about its own failure. Pass every other answer to the client.
        if response.status_code >= 500:
            try:
                call.record.fields["upstream"] = (await response.aread())[:1000].decode("utf-8", "replace")
            finally:
                await response.aclose()
            raise ApiError(
                502, f"the upstream failed with status {response.status_code}", code="upstream_failed"
            )
        headers = {name: response.headers[name] for name in _PASSED_HEADERS if name in response.headers}
        return _UpstreamResponse(self._relay(call, response), response, headers, seconds_left)

    async def _relay(self, call: Call, response: httpx.Response) -> AsyncIterator[bytes]:
        first = True
        try:
            async for chunk in response.aiter_bytes():
                if first:
                    first = False
                    self._metrics.first_token.observe(call.record.seconds)
                yield chunk
        except httpx.HTTPError as error:
            call.record.error = error
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                yield b"\n\n" + AnswerForm.error_event(_unreachable(self.url).body())
            else:
                raise

    def _check_limits(self, body: dict[str, Any]) -> None:
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

    async def _embed_images(self, call: Call, body: dict[str, Any]) -> None:
        """Check the pictures, and replace the URL of each picture from the web by its data."""
        parts = _image_parts(body)
        images: list[tuple[str, ImageUrl]] = []
        for param, part in parts:
            try:
                images.append((param, ImageUrl.model_validate(part["image_url"])))
            except (ValidationError, KeyError) as error:
                raise ApiError(
                    400, f"'{param}' must be an object with a 'url'", param=param, code="invalid_value"
                ) from error
        files = await read_images(images, self.settings, self._fetcher, self._pool)
        call.record.fields["pictures"] = len(files)
        self._metrics.images.inc(len(files))
        for (_, part), (_, image), data in zip(parts, images, files, strict=True):
            if image.url[:5].lower() != "data:":
                part["image_url"] = {**part["image_url"], "url": await self._run_in_pool(data_url, data)}

    async def _run_in_pool(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)


class _UpstreamResponse(StreamingResponse):
    """Streams the upstream's answer. It always closes the connection to the upstream."""

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


def _image_parts(body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (field name, part) for each picture of a chat."""
    messages = body.get("messages")
    parts = []
    for m, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        for p, part in enumerate(content if isinstance(content, list) else []):
            if isinstance(part, dict) and "image_url" in part:
                parts.append((f"messages.{m}.content.{p}.image_url", part))
    return parts


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="json_invalid") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object; send {...}", code="invalid_value")
    return values


def _to_json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=True).encode()


def _unreachable(url: str) -> ApiError:
    return ApiError(
        502,
        f"the upstream {url} does not answer; ask again soon",
        code="upstream_away",
        headers={"Retry-After": "5"},
    )
