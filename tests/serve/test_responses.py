"""OpenAI's newer protocol: its own client gets what the chat's protocol gives."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pydantic
import pytest
from asking import AFTER_CALL, HI, SYSTEM, WORD, WORDS, data_uri, picture, post, said, user_message

from pumice.serve import stored
from pumice.serve.errors import ApiError
from pumice.serve.responses import MessageItem, ResponsesRequest
from pumice.serve.stored import StoredItems
from pumice.serve.work import BODY_COPIES, Account, Memory

IMAGE = picture(3)
SEEN = user_message("What?", IMAGE)


class Word(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    word: Literal["yes", "no"]


@pytest.fixture(scope="module")
def openai_client(roomy: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{roomy}/v1", api_key="none", max_retries=0)


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
        ({"input": [{"type": "item_reference", "id": "x" * 999}]}, "input.0.id", "xx... (1001 characters)"),
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
