"""Any OpenAI-compatible chat endpoint: a hosted model, vLLM, or `pumice serve`.

Knows: HTTP and its failures. Does not know: questions and judges. httpx is an extra and loaded late.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pumice.errors import InputError, WorkError
from pumice.images import data_url

TRIES = 5
PAUSE = 2.0  # seconds before the second try; each further pause is twice as long
KEY = "OPENAI_API_KEY"  # the environment's name for it; local servers need none


class ChatEndpoint:
    """`url` up to and with /v1. Raises InputError where httpx is missing or the address is none."""

    def __init__(self, url: str, model: str, *, timeout: float = 120.0, transport: Any = None) -> None:
        try:
            import httpx
        except ImportError as error:
            raise InputError("an endpoint needs httpx; install it: pip install 'pumice[eval]'") from error
        if not url.startswith(("http://", "https://")):
            raise InputError(f"the endpoint {url!r} is no address; write http://HOST:PORT/v1")
        key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url, self.model = url.rstrip("/"), model
        self._errors = (httpx.TransportError,)
        self._client = httpx.Client(timeout=timeout, headers=headers, transport=transport)

    def chat(self, content: str | list[dict[str, Any]], **options: Any) -> tuple[str, str]:
        """(reply, the model's own name for itself) to one user message.

        Busy and failing servers are tried again; raises WorkError when they stay so, and InputError
        when they refuse the request.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **options}
        address, pause, last = f"{self.url}/chat/completions", PAUSE, ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(pause)
                pause *= 2
            try:
                response = self._client.post(address, json=body)
            except self._errors as error:
                last = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 429 or response.status_code >= 500:
                last = f"status {response.status_code}"
                continue
            said = " ".join(response.text.split())[:200]
            if response.status_code in (401, 403):
                raise InputError(
                    f"{address} refuses the key in ${KEY} ({response.status_code}: {said}); set it"
                )
            if response.status_code >= 400:
                raise InputError(
                    f"{address} refuses the request ({response.status_code}: {said}); check the address, "
                    "the model's name and the options"
                )
            try:
                found = response.json()
                reply = found["choices"][0]["message"]["content"] or ""
                return str(reply), str(found.get("model", self.model))
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise InputError(
                    f"{address} answered something else than a chat completion: {said or 'nothing'}; "
                    "give the address of an OpenAI-compatible server, up to and with /v1"
                ) from error
        raise WorkError(f"{address} did not answer in {TRIES} tries ({last})")


def with_images(text: str, images: Sequence[Path | bytes]) -> list[dict[str, Any]]:
    """A message of pictures, as data addresses, and the text after them.

    `<image>` in the text says where a picture goes, when there is one for each.
    """
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    pieces = text.split("<image>")
    if len(pieces) != len(parts) + 1:
        return [*parts, {"type": "text", "text": text}]
    message: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        message += [parts[number - 1]] if number else []
        message += [{"type": "text", "text": piece}] if piece.strip() else []
    return message
