"""What the server's tests send: pictures, messages, bodies."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import numpy as np
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    random = np.random.default_rng(seed)
    made = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(made, form)
    return made.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def shown(text: str, *pictures: bytes) -> dict[str, Any]:
    """A user's message."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_uri(data)}} for data in pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def post(url: str, body: Any, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=60, **more)


def ask(text: str = "What?", *pictures: bytes, **more: Any) -> dict[str, Any]:
    """The body of a question."""
    return {"messages": [shown(text, *pictures)], "max_tokens": 8, **more}
