"""Helpers of the server's tests that make pictures, messages and request bodies, and what they ask."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
from PIL import Image

HI = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
WORD = {
    "type": "object",
    "properties": {"word": {"enum": ["yes", "no"]}},
    "required": ["word"],
    "additionalProperties": False,
}
WORDS = ({"word": "yes"}, {"word": "no"})  # all that WORD allows
CALL = {"id": "a", "type": "function", "function": {"name": "say", "arguments": '{"word":"yes"}'}}
AFTER_CALL = [
    HI,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "said"},
    HI,
]


def wait_until(holds: Callable[[], Any], seconds: float = 180) -> None:
    """Wait until something holds, and fail if it does not within so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def picture(seed: int = 0, size: tuple[int, int] = (40, 30), file_format: str = "PNG") -> bytes:
    random = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(buffer, file_format)
    return buffer.getvalue()


def data_uri(data: bytes, image_type: str = "png") -> str:
    return f"data:image/{image_type};base64,{base64.b64encode(data).decode()}"


def user_message(text: str, *images: bytes) -> dict[str, Any]:
    """Return a user's message with pictures before the text."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_uri(data)}} for data in images
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def post(url: str, body: Any, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=60, **more)


def ask(text: str = "What?", *images: bytes, **more: Any) -> dict[str, Any]:
    """Return the body of a chat request with one question."""
    return {"messages": [user_message(text, *images)], "max_tokens": 8, **more}


def said(url: str, *messages: dict[str, Any], **more: Any) -> str:
    """Return what the chat's protocol answers."""
    response = post(url, {"messages": messages, "max_tokens": 9, **more})
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])
