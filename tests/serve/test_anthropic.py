"""Anthropic's protocol: its own client gets what the chat's protocol gives."""

from __future__ import annotations

import base64
from typing import Any

import anthropic
import pytest
from asking import AFTER_CALL, HI, SYSTEM, WORD, WORDS, picture, post, said, user_message

IMAGE = picture(3)
BASE64 = base64.b64encode(IMAGE).decode()
SEEN = user_message("What?", IMAGE)


@pytest.fixture(scope="module")
def anthropic_client(roomy: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=roomy, api_key="none", max_retries=0)


def test_anthropic(anthropic_client: anthropic.Anthropic, roomy: str) -> None:
    create: Any = anthropic_client.messages.create
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}}
    content = [image, {"type": "text", "text": "What?", "cache_control": {"type": "ephemeral"}}]
    asked = {"model": "tiny", "max_tokens": 9}
    seen = create(system="Be brief.", messages=[{"role": "user", "content": content}], **asked)
    assert seen.content[0].text == said(roomy, SYSTEM, SEEN)
    assert (seen.stop_reason, seen.usage.output_tokens) == ("max_tokens", 9)
    full = said(roomy, HI)
    stop = full[3:5]
    cut = create(messages=[HI], stop_sequences=[stop], **asked)
    assert (cut.content[0].text, cut.stop_reason) == (full[: full.index(stop)], "stop_sequence")
    assert cut.stop_sequence == stop
    system = [{"type": "text", "text": "Be brief."}]
    assert create(system=system, messages=[HI], **asked).content[0].text == said(roomy, SYSTEM, HI)
    # A last answer is continued; an answer comes back as history, as do calls and what they gave.
    begun = {"role": "assistant", "content": full[:4]}
    continued = create(messages=[HI, begun], **asked).content[0].text
    assert continued == said(roomy, HI, begun, continue_final_message=True)
    turns = [HI, {"role": "assistant", "content": seen.content}, HI]
    answer = {"role": "assistant", "content": seen.content[0].text}
    assert create(messages=turns, **asked).content[0].text == said(roomy, HI, answer, HI)
    use = {"type": "tool_use", "id": "a", "name": "say", "input": {"word": "yes"}}
    for given in ("said", [{"type": "text", "text": "said"}]):
        result = {"type": "tool_result", "tool_use_id": "a", "content": given}
        turns = [
            HI,
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result, {"type": "text", "text": "hi"}]},
        ]
        assert create(messages=turns, **asked).content[0].text == said(roomy, *AFTER_CALL)


def test_anthropic_as_events(anthropic_client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "messages": [HI]}
    whole: Any = anthropic_client.messages.create(**asked)
    with anthropic_client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final: Any = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    # Some clients count the prompt by the first event alone.
    begun, *_ = anthropic_client.messages.create(**asked, stream=True)
    assert begun.type == "message_start"
    usages = (begun.message.usage, whole.usage)
    counts = [usage.input_tokens + (usage.cache_read_input_tokens or 0) for usage in usages]
    assert counts[0] == counts[1] > 0


def test_anthropic_with_tools(anthropic_client: anthropic.Anthropic) -> None:
    tools: Any = [{"name": "say", "description": "Say a word.", "input_schema": WORD}]
    choices: list[Any] = [{"type": "any"}, {"type": "tool", "name": "say"}]
    for choice in choices:
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 90, "messages": [HI], "tools": tools}
        whole: Any = anthropic_client.messages.create(**asked, tool_choice=choice)
        [call] = whole.content
        assert (call.type, call.name, call.input in WORDS, whole.stop_reason) == (
            "tool_use", "say", True, "tool_use",
        )  # fmt: skip
        with anthropic_client.messages.stream(**asked, tool_choice=choice) as stream:
            final: Any = stream.get_final_message()
        assert (final.content[0].name, final.content[0].input) == ("say", call.input)
        cut = anthropic_client.messages.create(**{**asked, "max_tokens": 2}, tool_choice=choice)
        assert cut.stop_reason == "max_tokens"
        assert [(block.type, block.name, block.input) for block in cut.content] == [("tool_use", "say", {})]
    for more in ({"tool_choice": {"type": "none"}}, {"tool_choice": {"type": "auto"}}, {}):
        text: Any = anthropic_client.messages.create(
            model="tiny", max_tokens=5, messages=[HI], tools=tools, **more
        )
        assert text.content[0].type == "text"


def test_anthropic_errors(anthropic_client: anthropic.Anthropic, roomy: str, local: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="at least 1 item") as raised:
        anthropic_client.messages.create(model="tiny", max_tokens=5, messages=[])
    body: Any = raised.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    with pytest.raises(anthropic.NotFoundError, match="no model"):
        anthropic_client.messages.create(
            model="claude", max_tokens=5, messages=[{"role": "user", "content": "a"}]
        )
    bad = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "$$"}}
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": [bad]}]}
    error = post(roomy, body, "/v1/messages").json()["error"]
    assert error["param"] == "messages.0.content.0.source"
    tools = [{"name": "a", "input_schema": {"type": "nonsense"}}]
    for wrong, param in (
        (tools, "tools.0.input_schema"),
        ([{**tools[0], "input_schema": {}}] * 2, "tools.1.name"),
    ):
        body = {"max_tokens": 5, "messages": [HI], "tools": wrong}
        assert post(roomy, body, "/v1/messages").json()["error"]["param"] == param
    use = {"type": "tool_use", "id": "a", "name": "say", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "said"}
    for role, block in (("user", use), ("assistant", result)):
        body = {"max_tokens": 5, "messages": [{"role": role, "content": [block]}, HI]}
        error = post(roomy, body, "/v1/messages").json()["error"]
        assert error["param"] == "messages.0.content"
        assert "does not belong to the role" in error["message"]
    for source, field in (
        ({"type": "base64"}, "data"),
        ({"type": "url"}, "url"),
        ({"type": "base64", "data": BASE64, "url": "https://example.com/a.png"}, "url"),
    ):
        turn = {"role": "user", "content": [{"type": "image", "source": source}]}
        error = post(roomy, {"max_tokens": 5, "messages": [turn]}, "/v1/messages").json()["error"]
        assert error["param"] == f"messages.0.content.0.source.{field}"
    for wrong_choice in ({"type": "tool"}, {"type": "any", "name": "a"}):
        body = {"max_tokens": 5, "messages": [HI], "tools": tools, "tool_choice": wrong_choice}
        assert post(roomy, body, "/v1/messages").json()["error"]["param"] == "tool_choice.name"
    body = {"max_tokens": 5, "messages": [HI] * 1025}
    assert post(roomy, body, "/v1/messages").json()["error"]["param"] == "messages"
    with local(api_key=("secret-key",)) as url:
        client = anthropic.Anthropic(base_url=url, api_key="secret-key", max_retries=0)
        assert client.messages.create(model="tiny", max_tokens=2, messages=[{"role": "user", "content": "a"}])
        with pytest.raises(anthropic.AuthenticationError):
            anthropic.Anthropic(base_url=url, api_key="other-key", max_retries=0).messages.create(
                model="tiny", max_tokens=2, messages=[{"role": "user", "content": "a"}]
            )
