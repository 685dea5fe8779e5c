"""Ask a model behind any OpenAI-compatible server: a hosted model, vLLM, or `pumice serve`."""

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
KEY = "OPENAI_API_KEY"  # the environment variable with the key; local servers need none


class ChatEndpoint:
    """A chat model at `url` (up to and with /v1); httpx is an extra and imported only here.

    timeout: seconds per request. Raises InputError where httpx is missing or `url` is no address.
    """

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
        """Return the reply to one user message, and the name of the model that the server states.

        Busy and failing servers are asked again. Raises WorkError when they keep failing, and InputError
        when they refuse the request.
        """
        # 1. Send the request, with longer and longer pauses: a busy server needs time to recover.
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **options}
        address, pause, last_error = f"{self.url}/chat/completions", PAUSE, ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(pause)
                pause *= 2
            try:
                response = self._client.post(address, json=body)
            except self._errors as error:
                last_error = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 429 or response.status_code >= 500:
                last_error = f"status {response.status_code}"
                continue
            # 2. Refusals do not change with time: report them at once.
            answer = " ".join(response.text.split())[:200]
            if response.status_code in (401, 403):
                raise InputError(
                    f"{address} refuses the key in ${KEY} ({response.status_code}: {answer}); set it"
                )
            if response.status_code >= 400:
                raise InputError(
                    f"{address} refuses the request ({response.status_code}: {answer}); check the address, "
                    "the model's name and the options"
                )
            # 3. Read the reply.
            try:
                completion = response.json()
                reply = completion["choices"][0]["message"]["content"] or ""
                return str(reply), str(completion.get("model", self.model))
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise InputError(
                    f"{address} answered with something other than a chat completion: {answer or 'nothing'}; "
                    "give the address of an OpenAI-compatible server, up to and with /v1"
                ) from error
        raise WorkError(f"{address} did not answer in {TRIES} tries ({last_error})")


def with_images(text: str, images: Sequence[Path | bytes]) -> list[dict[str, Any]]:
    """Return the content of a message with images (as data URLs) before the text.

    Where the text has one `<image>` per image, each image takes the place of its `<image>` instead.
    """
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    pieces = text.split("<image>")
    if len(pieces) != len(parts) + 1:
        return [*parts, {"type": "text", "text": text}]
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        content += [parts[number - 1]] if number else []
        content += [{"type": "text", "text": piece}] if piece.strip() else []
    return content
