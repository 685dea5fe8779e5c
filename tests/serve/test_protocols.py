"""OpenAI's newer protocol, Anthropic's and Ollama's: their own clients get what the chat's protocol gives."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import ollama
import openai
import pydantic
import pytest
from asking import data_uri, picture, post, user_message

from pumice.assistant import load
from pumice.serve import stored
from pumice.serve.anthropic import AnthropicRequest
from pumice.serve.errors import ApiError
from pumice.serve.ollama import OllamaCard, OllamaChatRequest, OllamaGenerateRequest
from pumice.serve.responses import MessageItem, ResponsesRequest
from pumice.serve.stored import StoredItems
from pumice.serve.work import BODY_COPIES, Account, Memory

WORD = {
    "type": "object",
    "properties": {"word": {"enum": ["yes", "no"]}},
    "required": ["word"],
    "additionalProperties": False,
}
IMAGE = picture(3)
BASE64 = base64.b64encode(IMAGE).decode()
WORDS = ({"word": "yes"}, {"word": "no"})


class Word(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    word: Literal["yes", "no"]


@pytest.fixture(scope="module")
def openai_client(roomy: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{roomy}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def anthropic_client(roomy: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=roomy, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def ollama_client(roomy: str) -> ollama.Client:
    return ollama.Client(roomy)


def said(url: str, *messages: dict[str, Any], **more: Any) -> str:
    """Return what the chat's protocol answers."""
    response = post(url, {"messages": messages, "max_tokens": 9, **more})
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


HI = {"role": "user", "content": "hi"}
SEEN = user_message("What?", IMAGE)
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "a", "type": "function", "function": {"name": "say", "arguments": '{"word":"yes"}'}}
AFTER_CALL = [
    HI,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "said"},
    HI,
]


# --- /v1/responses ---


def test_responses(openai_client: openai.OpenAI, roomy: str) -> None:
    create: Any = openai_client.responses.create
    assert create(model="tiny", input="hi", max_output_tokens=9).output_text == said(roomy, HI)
    content = [{"type": "input_image", "image_url": data_uri(IMAGE)}, {"type": "input_text", "text": "What?"}]
    asked = {"model": "tiny", "max_output_tokens": 9, "instructions": "Be brief."}
    seen = create(input=[{"role": "user", "content": content}], **asked)
    assert seen.output_text == said(roomy, SYSTEM, SEEN)
    assert (seen.status, seen.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert seen.usage.output_tokens == 9
    assert seen.usage.total_tokens == seen.usage.input_tokens + 9
    # Its own output comes back as history, as do calls and what they gave.
    turns = [
        {"role": "user", "content": "hi"},
        *seen.model_dump()["output"],
        {"role": "user", "content": "hi"},
    ]
    second = create(model="tiny", input=turns, max_output_tokens=9)
    assert second.output_text == said(roomy, HI, {"role": "assistant", "content": seen.output_text}, HI)
    items = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": None},
        {"type": "function_call", "call_id": "a", "name": "say", "arguments": '{"word": "yes"}'},
        {"type": "function_call_output", "call_id": "a", "output": "said"},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    ]
    assert create(model="tiny", input=items, max_output_tokens=9).output_text == said(roomy, *AFTER_CALL)


def test_responses_as_events(openai_client: openai.OpenAI) -> None:
    """The official client joins the events, and checks their order."""
    whole: Any = openai_client.responses.create(model="tiny", input="hi", max_output_tokens=2000)
    with openai_client.responses.stream(model="tiny", input="hi", max_output_tokens=2000) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert (events[-1].type, whole.status) == ("response.completed", "completed")
    assert final.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens


def test_responses_with_schemas_and_tools(openai_client: openai.OpenAI, roomy: str) -> None:
    parsed = openai_client.responses.parse(model="tiny", input="hi", text_format=Word)
    assert parsed.output_parsed is not None
    create: Any = openai_client.responses.create
    history = [HI, *parsed.model_dump(mode="json", warnings=False)["output"], HI]
    again = create(model="tiny", input=history, max_output_tokens=9)
    answer = {"role": "assistant", "content": parsed.output_text}
    assert again.output_text == said(roomy, HI, answer, HI)
    form: Any = {"format": {"type": "json_schema", "name": "word", "schema": WORD, "strict": True}}
    held = openai_client.responses.create(model="tiny", input="hi", text=form)
    assert json.loads(held.output_text) in WORDS
    tools: Any = [{"type": "function", "name": "say", "parameters": WORD, "strict": True}]
    choices: list[Any] = ["required", {"type": "function", "name": "say"}]
    for choice in choices:
        asked: dict[str, Any] = {"model": "tiny", "input": "hi", "tools": tools, "tool_choice": choice}
        [call] = openai_client.responses.parse(**asked).output
        assert call.type == "function_call"
        given = {"type": "function_call_output", "call_id": call.call_id, "output": "said"}
        assert create(model="tiny", input=[HI, call.model_dump(), given, HI], max_output_tokens=1).output
        assert (call.name, json.loads(call.arguments) in WORDS) == ("say", True)
        with openai_client.responses.stream(**asked) as stream:
            events = list(stream)
            [same] = stream.get_final_response().output
        assert same.type == "function_call"
        assert same.arguments == call.arguments
        deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(deltas) == call.arguments
    for more in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        text = create(model="tiny", input="hi", tools=tools, max_output_tokens=5, **more)
        assert text.output[0].type == "message"
        assert text.tool_choice == more.get("tool_choice", "auto")


def test_answers_that_are_only_referred_to(openai_client: openai.OpenAI, roomy: str) -> None:
    """Vercel's AI SDK sends the ids of an answer's items, and not the items, unless it is told otherwise."""
    create: Any = openai_client.responses.create
    hi: Any = {"role": "user", "content": "hi"}

    def second(item: Any, *more: Any) -> str:
        turns = [hi, {"type": "item_reference", "id": item.id}, *more, hi]
        return str(create(model="tiny", input=turns, max_output_tokens=9).output_text)

    first = create(model="tiny", input="hi", max_output_tokens=9)
    expected = said(roomy, HI, {"role": "assistant", "content": first.output_text}, HI)
    assert (first.store, second(first.output[0])) == (True, expected)
    without_type = [hi, {"id": first.output[0].id}, hi]
    assert create(model="tiny", input=without_type, max_output_tokens=9).output_text == expected
    *_, last = create(model="tiny", input="hi", max_output_tokens=9, stream=True)
    assert second(last.response.output[0]) == expected
    tools: Any = [{"type": "function", "name": "say", "parameters": WORD}]
    [call] = create(model="tiny", input="hi", tools=tools, tool_choice="required").output
    function = {"name": "say", "arguments": call.arguments}
    calls = [{"id": "a", "type": "function", "function": function}]
    history = [HI, {"role": "assistant", "content": None, "tool_calls": calls}, AFTER_CALL[2], HI]
    given = {"type": "function_call_output", "call_id": call.call_id, "output": "said"}
    assert second(call, given) == said(roomy, *history)
    # What the client does not want to be kept is not; nor is a call that is cut off, which is no JSON.
    private = create(model="tiny", input="hi", max_output_tokens=9, store=False)
    assert private.store is False
    cut = create(model="tiny", input="hi", tools=tools, tool_choice="required", max_output_tokens=2)
    for answer in (private, cut):
        with pytest.raises(openai.BadRequestError, match="send it whole") as raised:
            second(answer.output[0])
        assert (raised.value.code, raised.value.param) == ("item_not_found", "input.1.id")


def test_answers_are_kept_for_the_key_that_asked(local: Any) -> None:
    keys = ("first-key", "second-key")
    with local(api_key=keys) as url:
        first, second = (openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in keys)
        [item] = first.responses.create(model="tiny", input="hi", max_output_tokens=3).output
        turns: Any = [HI, {"type": "item_reference", "id": item.id}, HI]
        assert first.responses.create(model="tiny", input=turns, max_output_tokens=3).output
        with pytest.raises(openai.BadRequestError, match="send it whole"):
            second.responses.create(model="tiny", input=turns, max_output_tokens=3)


def test_answers_are_kept_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_BYTES", 3 * stored.ITEM_BYTES + 1500)
    items, room = StoredItems(), Account(Memory(10**6))

    def are_kept(*ids: str) -> bool:
        request = ResponsesRequest.model_validate(
            {"input": [{"type": "item_reference", "id": item} for item in ids]}
        )
        try:
            filled = items.filled(b"", request, room).input
        except ApiError as error:
            if error.code != "item_not_found":
                raise
            return False
        return [item.content for item in filled if isinstance(item, MessageItem)] == [*ids]

    for item in "abc":
        items.add_text(b"", item, item)
    assert are_kept("a", "b", "c")
    items.add_text(b"", "d", "d")  # one more item than there is room for
    assert (are_kept("a"), are_kept("b", "c", "d")) == (False, True)
    room.memory.limit = room.memory.taken + 2 * BODY_COPIES * (stored.ITEM_BYTES + 100)
    assert are_kept("d", "d")
    with pytest.raises(ApiError, match="ask for less at once"):  # they count as if they were sent
        are_kept("d", "d")
    other = Account(room.memory)
    with pytest.raises(ApiError, match="ask again soon"):  # there is room once the first one is answered
        other.take(room.memory.limit)
    room.close()
    other.take(room.memory.limit)
    other.close()
    items.add_text(b"", "e", "x" * 1400)  # text takes room, too
    assert (are_kept("b"), are_kept("c")) == (False, False)
    items.add_text(b"", "f", "x" * 100_000)  # larger than all the room
    assert not are_kept("f")
    assert not items._items
    assert items._bytes == 0


def test_responses_give_metadata_back(openai_client: openai.OpenAI) -> None:
    most = {f"{number:064}": "x" * 512 for number in range(16)}
    answer = openai_client.responses.create(model="tiny", input="hi", metadata=most, max_output_tokens=1)
    assert answer.metadata == most


def test_responses_give_log_probabilities(openai_client: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    answer: Any = openai_client.responses.create(
        model="tiny", input="hi", include=include, top_logprobs=2, max_output_tokens=3
    )
    logprobs = answer.output[0].content[0].logprobs
    assert [len(token.top_logprobs) for token in logprobs] == [2, 2, 2]


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        (
            {"previous_response_id": "resp_1"},
            "previous_response_id",
            "continues no earlier response; send the whole",
        ),
        ({"max_tokens": 9}, "max_tokens", "did you mean 'max_output_tokens'?"),
        ({"conversation": "conv_1"}, "conversation", "keeps no conversations"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "object should have at most 16 items"),
        ({"metadata": {"k" * 65: ""}}, f"metadata.{'k' * 65}.[key]", "at most 64 characters"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "at most 512 characters"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'function'"),
        ({"background": True}, "background", "background is not supported; leave it out"),
        ({"input": []}, "input", "at least 1 item"),
        (
            {"input": [{"type": "item_reference", "id": "x"}]},
            "input.0.id",
            "the item 'x' is not here any more; send it whole",
        ),
        (
            {"input": [{"type": "web_search_call", "id": "x"}]},
            "input.0.type",
            "there is no item 'web_search_call' here; give 'message', 'function_call'",
        ),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "needs a schema"),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}},
            "text.format",
            "cannot be followed",
        ),
        (
            {"tools": [{"type": "function", "name": "a", "parameters": {"type": "nonsense"}}]},
            "tools.0.parameters",
            "cannot be followed",
        ),
        ({"tools": [{"type": "function", "name": "a"}] * 2}, "tools.1.name", "two tools are called 'a'"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema", "belongs to the type"),
        ({"input": [{"role": "user", "content": "a"}] * 1025}, "input", "at most 1024 items"),
        (
            {"instructions": "b", "input": [{"role": "user", "content": "a"}] * 1024},
            "input",
            "at most 1024 items",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]},
            "input",
            "must be a response to a preceding message",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]},
            "input.0.arguments",
            "should be a JSON object",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "cat.jpg"}]}]},
            "input.0.content.0.image_url",
            "give a picture as data:",
        ),
        ({"input": "word " * 9000}, "input", "maximum context length is 4096"),
    ],
)
def test_wrong_responses(roomy: str, more: dict[str, Any], param: str, message: str) -> None:
    response = post(roomy, {"input": "hi", **more}, "/v1/responses")
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("kind", "path", "body"),
    [
        (ResponsesRequest, "/v1/responses", {"input": "hi"}),
        (AnthropicRequest, "/v1/messages", {"messages": [HI], "max_tokens": 1}),
        (OllamaChatRequest, "/api/chat", {"model": "tiny", "messages": [HI]}),
        (OllamaGenerateRequest, "/api/generate", {"model": "tiny", "prompt": "hi"}),
    ],
)
def test_requests_are_translated_beside_the_event_loop(
    roomy: str, monkeypatch: pytest.MonkeyPatch, kind: Any, path: str, body: dict[str, Any]
) -> None:
    """A conversation of 20,000 parts takes 0.3 s, in which nobody else would be answered."""
    threads: list[str] = []
    translate = kind.chat

    def chat(request: Any) -> Any:
        threads.append(threading.current_thread().name)
        return translate(request)

    monkeypatch.setattr(kind, "chat", chat)
    assert post(roomy, body, path).status_code == 200
    assert [name.startswith("pumice-parse") for name in threads] == [True]


# --- /v1/messages ---


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
    counts = [
        usage.input_tokens + (usage.cache_read_input_tokens or 0)
        for usage in (
            begun.message.usage,
            whole.usage,
        )
    ]
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


# --- /api ---


def test_ollama(ollama_client: ollama.Client, roomy: str) -> None:
    options = {"num_predict": 9, "num_ctx": 2048, "seed": 1}
    hints = {"truncate": True, "shift": True}
    body = {"model": "tiny", "messages": [HI], "stream": False, "options": options}
    answers = [post(roomy, {**body, **more}, "/api/chat").json()["message"] for more in ({}, hints)]
    assert answers[0] == answers[1]
    seen = ollama_client.chat(
        "tiny",
        [SYSTEM, {"role": "user", "content": "What?", "images": [IMAGE]}],
        options=options,
    )
    assert seen.message.content == said(roomy, SYSTEM, SEEN)
    assert (seen.done, seen.done_reason, seen.eval_count) == (True, "length", 9)
    generated = ollama_client.generate("tiny", "What?", images=[IMAGE], system="Be brief.", options=options)
    assert generated.response == seen.message.content
    pieces = list(ollama_client.chat("tiny:latest", [HI], options=options, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == said(roomy, HI)
    assert [piece.done for piece in pieces][-2:] == [False, True]
    assert pieces[-1].prompt_eval_count
    assert min(pieces[-1].prompt_eval_duration or 0, pieces[-1].eval_duration or 0) > 1
    assert (seen.prompt_eval_duration, seen.eval_duration) == (None, None)  # not known of a whole answer
    lines = list(ollama_client.generate("tiny", "hi", options=options, stream=True))
    assert "".join(line.response for line in lines) == said(roomy, HI)
    turns: Any = [HI, seen.message, HI]
    answer = {"role": "assistant", "content": seen.message.content}
    assert ollama_client.chat("tiny", turns, options=options).message.content == said(roomy, HI, answer, HI)


def test_ollama_with_schemas_and_tools(ollama_client: ollama.Client, roomy: str) -> None:
    held = ollama_client.chat("tiny", [HI], format=WORD)
    assert json.loads(held.message.content or "") in WORDS
    assert json.loads(ollama_client.generate("tiny", "hi", format=WORD).response) in WORDS
    tools: Any = [{"type": "function", "function": {"name": "say", "parameters": WORD}}]
    assert ollama_client.chat("tiny", [HI], tools=tools, options={"num_predict": 9}).message.content
    call: Any = {"function": {"name": "say", "arguments": {"word": "yes"}}}
    turns: Any = [
        HI,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "said", "tool_name": "say"},
        HI,
    ]
    answer = ollama_client.chat("tiny", turns, options={"num_predict": 9})
    assert answer.message.content == said(roomy, *AFTER_CALL)


def test_ollama_s_models(ollama_client: ollama.Client, roomy: str) -> None:
    [model] = ollama_client.list().models
    assert model.model == "tiny"
    shown = ollama_client.show("tiny")
    assert {"completion", "vision"} == set(shown.capabilities or ())
    assert (shown.modelinfo or {})["llava.context_length"] == 4096
    assert httpx.get(f"{roomy}/api/version").json()["version"]
    loaded = ollama_client.generate("tiny")
    assert (loaded.done, loaded.done_reason) == (True, "load")


def test_the_card_counts_quantized_weights(tiny_folder: Path) -> None:
    whole, packed = (load(tiny_folder, device="cpu", quantize=kind).model for kind in (None, "int8"))
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    assert sum(parameter.numel() for parameter in packed.parameters()) < parameters
    cards = [OllamaCard(["tiny"], model.config, *model.sizes()) for model in (whole, packed)]
    assert {card.show().model_info["general.parameter_count"] for card in cards} == {parameters}
    exact, smaller = (card.models().models[0].size for card in cards)
    assert smaller < exact
    assert exact == sum(tensor.nbytes for tensor in (*whole.parameters(), *whole.buffers()))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda client: client.chat("other", [HI]), "there is no model 'other' here"),
        (lambda client: client.show("other"), "there is no model 'other' here"),
        (lambda client: client.chat("tiny", [HI], think=True), "think is not supported; leave it out"),
        (lambda client: client.generate("tiny", "a", raw=True), "raw is not supported; leave it out"),
        (lambda client: client.generate("tiny", "a", template="b"), "template is not supported"),
        (lambda client: client.generate("tiny", "a", context=[1]), "context is not supported"),
        (lambda client: client.chat("tiny", [HI] * 1025), "at most 1024 items"),
        (lambda client: client.generate("tiny", "a", suffix="b"), "suffix"),
        (lambda client: client.chat("tiny", [HI], options={"temperature": 9}), "'options.temperature'"),
        (lambda client: client.chat("tiny", [{"role": "tool", "content": "x"}]), "must be a response to"),
        (lambda client: client.chat("tiny", [HI], format={"type": "nonsense"}), "cannot be followed"),
        (lambda client: client.generate("tiny", "a", images=[b"no picture"]), "not a picture"),
    ],
)
def test_ollama_errors(ollama_client: ollama.Client, ask: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ollama.ResponseError, match=message):
        ask(ollama_client)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            {"content": [{"type": "text", "text": "a"}]},
            "'messages.0.content': give text; pictures belong in 'images'",
        ),
        ({"images": ["./a.jpg"]}, "'messages.0.images.0': './a.jpg' is not base64"),
        ({"images": ["https://a.b/c.jpg"]}, "'messages.0.images.0': 'https://a.b/c.jpg' is not base64"),
    ],
)
def test_messages_that_ollama_s_client_does_not_send(roomy: str, message: dict[str, Any], words: str) -> None:
    response = post(roomy, {"model": "tiny", "messages": [{"role": "user", **message}]}, "/api/chat")
    assert response.status_code == 400
    assert response.json()["error"].startswith(words)
