"""Messages mean the same to Python, to the server and as a row of training data."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from pumice.assistant import conversation_of
from pumice.conversation import Conversation, ImagePart, Message
from pumice.data.rows import Rows
from pumice.errors import InputError
from pumice.messages import decode_data_url, read_messages
from pumice.serve.history import conversation
from pumice.serve.messages import parse
from pumice.serve.protocol import ChatRequest
from pumice.templates import get_template

PNG = b"\x89PNG of no picture"
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
LOGGED: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be short."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "What is "}, {"type": "image_url", "image_url": {"url": URL}}],
    },
    {"role": "user", "content": "Say it."},
    {"role": "assistant", "content": "A cat."},
    {"role": "system", "content": "In French."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Un chat."},
]


def plain(conversation: Conversation) -> list[tuple[str, list[Any]]]:
    return [
        (m.role, [bytes(p.source) if isinstance(p, ImagePart) else p for p in m.parts])
        for m in conversation.messages
    ]


def test_a_logged_conversation_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"messages": LOGGED}) + "\n")
    row = Rows(tmp_path / "log.jsonl")[0].conversation(None)
    loaded = row.with_sources(lambda source: source.load())
    request = parse(ChatRequest, json.dumps({"messages": LOGGED}).encode())
    served = conversation(request, {"messages.1.content.1.image_url": PNG}, get_template("chatml"))
    assert plain(loaded) == plain(served) == plain(conversation_of(LOGGED))
    assert plain(loaded) == [
        ("system", ["Be short."]),
        ("user", ["What is ", PNG, "Say it."]),
        ("assistant", ["A cat."]),
        ("user", ["In French.", "\n\n", "And now?"]),
        ("assistant", ["Un chat."]),
    ]


def test_pictures_beside_messages_go_to_their_places() -> None:
    ask = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "And "}, {"type": "image"}],
    }
    answer = {"role": "assistant", "content": "Yes."}
    messages, added = read_messages([ask, answer], ["a", "b"])
    assert messages[0] == Message("user", (ImagePart("a"), "And ", ImagePart("b"))) and not added
    messages, added = read_messages([{"role": "user", "content": "Which?"}, answer], ["a", "b"])
    assert messages[0] == Message("user", (ImagePart("a"), ImagePart("b"), "Which?")) and added == 2
    texts = [{"type": "text", "text": "<image>What?"}]
    messages, added = read_messages([{"role": "user", "content": texts}, answer], ["a"])
    assert messages[0] == Message("user", (ImagePart("a"), "What?")) and not added
    for images, message in (
        (["a"], "2 <image> placeholders for 1 picture"),
        (list("abc"), "2 .* for 3 pictures"),
    ):
        with pytest.raises(InputError, match=message):
            read_messages([ask, answer], images)


def test_data_urls() -> None:
    assert decode_data_url(URL) == decode_data_url(URL.rstrip("=")) == PNG
    assert decode_data_url("data:text/plain,a%20b") == b"a b"
    assert decode_data_url("data:;base64,-_%2B\r\n/") == decode_data_url("data:;base64,+/+/")
    for url, message in (("data:image/png;base64,a*b", "is not base64"), ("image.png", "is no data URL")):
        with pytest.raises(InputError, match=message):
            decode_data_url(url)
