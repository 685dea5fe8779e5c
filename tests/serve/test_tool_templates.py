"""Functions where the model's chat template knows them: told and read in its own form, in every protocol.

The model is random, so a regular expression makes it write what a real one would.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import anthropic
import jinja2
import ollama
import openai
import pytest
from asking import HI, WORD, picture, post, user_message
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from pumice.assistant import load
from pumice.conversation import ImagePart
from pumice.serve.answers import AnswerForm, AnswerPiece, join
from pumice.serve.anthropic import AnthropicAnswer, AnthropicForm, AnthropicRequest
from pumice.serve.history import conversation
from pumice.serve.messages import FunctionDescription
from pumice.serve.ollama import OllamaForm
from pumice.serve.protocol import ChatRequest, PromptDetails, Usage
from pumice.serve.responses import ResponsesRequest
from pumice.serve.responses_form import ResponsesForm
from pumice.serve.stored import StoredItems
from pumice.serve.tools import CLOSE, TextOrCall, tool_use
from pumice.templates import Template, call_text

CHAT_TEMPLATES = Path(__file__).parents[1] / "chat_templates"
SAY = {"type": "function", "function": {"name": "say", "description": "Say <it>.", "parameters": WORD}}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = call_text("say", {"word": "yes"})
PAST = {"id": "a", "type": "function", "function": {"name": "say", "arguments": '{"word": "yes"}'}}


def writes(text: str) -> dict[str, Any]:
    """Return fields by which the model writes this text."""
    return {"guided_regex": re.escape(text).replace(r"\ ", " ").replace("\\\n", "\n"), "max_tokens": 200}


@pytest.fixture(scope="module")
def client(calling: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{calling}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("text", ["", "Let me see.", "a < b\n\n<tool"])
def test_a_call_that_the_model_chose(client: openai.OpenAI, text: str) -> None:
    """A text before it is the content; streamed, as the official client joins the parts."""
    written = f"{text}\n{CALL}" if text else CALL
    asked: dict[str, Any] = {"model": "tiny", "messages": [HI], "tools": [SAY, NOW], "logprobs": True}
    asked["extra_body"] = writes(written)
    [choice] = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == (text or None)
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("say", {"word": "yes"})
    assert choice.logprobs is not None
    assert "".join(token.token for token in choice.logprobs.content or []) == written
    with client.chat.completions.stream(**asked) as stream:
        events = list(stream)
        streamed = stream.get_final_completion().choices[0]
    assert (streamed.finish_reason, streamed.message.content or "") == ("tool_calls", text)
    [same] = streamed.message.tool_calls or []
    assert same.function.name == call.function.name
    assert same.function.arguments == call.function.arguments
    assert [event for event in events if event.type == "tool_calls.function.arguments.delta"]


@pytest.mark.parametrize(
    "text",
    [
        "Only words.",
        "<tool_call>",
        CALL.replace("say", "shout"),
        "x\n\n<tool_call>\nno JSON\n</tool_call>",
        '<tool_call>\n{"name": "say"}\n</tool_call>',
    ],
)
def test_what_is_no_call_is_text(client: openai.OpenAI, text: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [HI], "tools": [SAY], "extra_body": writes(text)}
    [choice] = client.chat.completions.create(**asked).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_a_call_with_wrong_arguments_is_no_finished_call(calling: str) -> None:
    body = {"messages": [HI], "tools": [SAY], **writes(CALL.replace('{"word": "yes"}', "word"))}
    [choice] = post(calling, body).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "say", "arguments": "word"}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "now"}}])
def test_a_call_that_must_be(calling: str, choice: Any) -> None:
    body = {"messages": [user_message("What?", picture(1))], "tools": [SAY, NOW], "tool_choice": choice}
    for seed in range(3):
        sampled = {"temperature": 1.5, "seed": seed, "max_tokens": 200}
        [answer] = post(calling, {**body, **sampled}).json()["choices"]
        [call] = answer["message"]["tool_calls"]
        assert answer["finish_reason"] == "tool_calls"
        assert answer["message"]["content"] is None
        if call["function"]["name"] == "say":
            assert choice == "required"
            assert json.loads(call["function"]["arguments"])["word"] in ("yes", "no")
        else:
            assert json.loads(call["function"]["arguments"]) == {}


def test_only_allowed_tools_are_told_and_called(calling: str) -> None:
    def choice(mode: str) -> dict[str, Any]:
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [NOW]}}

    now = {**NOW, "function": {"name": "now"}}
    body = {"messages": [HI], "tools": [SAY, now], "max_tokens": 60}
    [answer] = post(calling, {**body, "tool_choice": choice("required")}).json()["choices"]
    assert answer["message"]["tool_calls"][0]["function"]["name"] == "now"
    [answer] = post(calling, {**body, "tool_choice": choice("auto"), **writes(CALL)}).json()["choices"]
    assert answer["message"]["content"] == CALL  # a call of another one is text


def test_the_model_reads_what_its_template_writes(calling_folder: Path) -> None:
    """Of functions, calls and results, as transformers' Jinja writes them."""
    given = {"role": "tool", "tool_call_id": "a", "content": "<b>said</b>"}
    messages: list[dict[str, Any]] = [HI, {"role": "assistant", "content": "T", "tool_calls": [PAST, PAST]}]
    messages += [given, given, {"role": "assistant", "content": None, "tool_calls": [PAST]}, given]
    system = {"role": "system", "content": "Be brief."}
    processor = load(calling_folder, device="cpu").processor
    template = processor.template
    assert isinstance(template, Template)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    jinja = environment.from_string((CHAT_TEMPLATES / "qwen2.5.jinja").read_text())
    for shown in (messages, [system, *messages]):
        request = ChatRequest.model_validate({"messages": shown, "tools": [SAY, NOW]})
        tools = tool_use(request, template.chat.tools)
        read = conversation(request, {}, template, tools.told()).check(answered=False)
        spans = template.render(read, generate=True)
        text = "".join(span.text for span in spans if not isinstance(span, ImagePart))
        calls = [{"function": {"name": "say", "arguments": {"word": "yes"}}}]
        written = [
            {**m, "tool_calls": calls * len(m["tool_calls"])} if "tool_calls" in m else m for m in shown
        ]
        assert text == jinja.render(messages=written, tools=[SAY, NOW], add_generation_prompt=True)


def read(text: str, *, pieces: int = 1, finish: Any = "stop") -> list[AnswerPiece]:
    """Return what is read of an answer that came in so many pieces."""
    stop = CLOSE if text.endswith(CLOSE) else None
    text = text.removesuffix(CLOSE) if stop else text
    size = -(-len(text) // pieces) or 1
    parts = [text[n : n + size] for n in range(0, len(text), size)] or [""]
    reader = TextOrCall([FunctionDescription(name="say"), FunctionDescription(name="now")])
    ends = [(None, None)] * (len(parts) - 1) + [(finish, stop)]
    return [
        reader(AnswerPiece(text=part, finish=end, stop=found))
        for part, (end, found) in zip(parts, ends, strict=True)
    ]


@pytest.mark.parametrize("text", [f"Let me see.\n\n{CALL}", CALL, CALL.replace(": ", ":"), "No <tool."])
def test_a_text_and_a_call_are_read_alike_however_they_are_cut(text: str) -> None:
    whole = join(read(text))
    assert (whole.name, whole.finish) == (("say", "tool_calls") if CLOSE in text else ("", "stop"))
    assert whole.text == ("Let me see." if text.startswith("Let") else text * (CLOSE not in text))
    for pieces in range(2, len(text) + 1):
        parts = read(text, pieces=pieces)
        joined = join(parts)
        assert (joined.text, joined.name, joined.arguments, joined.finish) == (
            whole.text, whole.name, whole.arguments, whole.finish,
        )  # fmt: skip
        called = [bool(part.name or part.arguments) for part in parts]
        assert not any(part.text for part in parts[called.index(True) :]) if any(called) else True


USAGE = Usage(
    prompt_tokens=3, completion_tokens=4, total_tokens=7, prompt_tokens_details=PromptDetails(cached_tokens=1)
)


def events(form: AnswerForm, pieces: list[AnswerPiece]) -> list[dict[str, Any]]:
    parts = [form.begin(USAGE), *(form.piece(piece) for piece in pieces), form.end(USAGE)]
    return [
        json.loads(line.removeprefix("data: "))
        for line in b"".join(parts).decode().splitlines()
        if line and not line.startswith("event:")
    ]


@pytest.mark.parametrize("before", ["", "Let me see."])
def test_items_of_responses(before: str) -> None:
    """A message, if there is a text, and a call; each event is one that the official client knows."""
    pieces = read(f"{before}\n{CALL}" if before else CALL, pieces=9)
    request = ResponsesRequest(input="hi")
    sent = events(ResponsesForm("tiny", request, StoredItems(), b""), pieces)
    known: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    assert [known.validate_python(event).sequence_number for event in sent] == list(range(len(sent)))
    output = sent[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message"] * bool(before) + ["function_call"]
    assert all(item["status"] == "completed" for item in output)
    if before:
        assert output[0]["content"][0]["text"] == before
    assert (output[-1]["name"], output[-1]["arguments"]) == ("say", '{"word": "yes"}')
    for index, item in enumerate(output):
        own = [event for event in sent if event.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added"
        assert own[-1]["type"] == "response.output_item.done"
        assert own[-1]["item"] == item
        deltas = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        assert deltas == (item["arguments"] if item["type"] == "function_call" else before)
    whole = ResponsesForm("tiny", request, StoredItems(), b"").response([join(pieces)], USAGE).model_dump()
    for item, streamed in zip(whole["output"], output, strict=True):
        assert {**item, "id": 0, "call_id": 0} == {**streamed, "id": 0, "call_id": 0}


@pytest.mark.parametrize("before", ["", "Let me see."])
def test_blocks_of_anthropic(before: str) -> None:
    pieces = read(f"{before}\n{CALL}" if before else CALL, pieces=9)
    request = AnthropicRequest.model_validate({"max_tokens": 9, "messages": [HI]})
    sent = events(AnthropicForm("tiny", request), pieces)
    starts = [event["content_block"]["type"] for event in sent if event["type"] == "content_block_start"]
    assert starts == ["text"] * bool(before) + ["tool_use"]
    steps = [(event["type"], event["index"]) for event in sent if "index" in event]
    assert steps == sorted(steps, key=lambda step: step[1])
    for index in range(len(starts)):
        assert steps.count(("content_block_stop", index)) == 1
    parts = "".join(event["delta"].get("partial_json", "") for event in sent if "delta" in event)
    assert json.loads(parts) == {"word": "yes"}
    assert sent[-2]["delta"]["stop_reason"] == "tool_use"
    whole = AnthropicForm("tiny", request).response([join(pieces)], USAGE)
    assert isinstance(whole, AnthropicAnswer)
    assert [block.type for block in whole.content] == starts


@pytest.mark.parametrize("finish", ["length", "stop"])
def test_a_call_that_is_cut_off_is_a_block_without_input(finish: str) -> None:
    """By the limit, or by a stop text of the client's: whole as in a stream."""
    pieces = read(CALL[: CALL.index("yes")], pieces=9, finish=finish)
    request = AnthropicRequest.model_validate({"max_tokens": 9, "messages": [HI]})
    sent = events(AnthropicForm("tiny", request), pieces)
    [started] = [event["content_block"] for event in sent if event["type"] == "content_block_start"]
    whole = AnthropicForm("tiny", request).response([join(pieces)], USAGE).model_dump()
    assert whole["content"] == [started]
    assert started == {"type": "tool_use", "id": pieces[-1].call_id, "name": "say", "input": {}}


def test_messages_of_ollama() -> None:
    pieces = read(f"Let me see.\n{CALL}", pieces=9)
    *texts, last = events(OllamaForm("tiny", is_chat=True), pieces)
    assert "".join(line["message"]["content"] for line in texts) == "Let me see."
    assert not any("tool_calls" in line["message"] for line in texts)
    calls = [{"function": {"name": "say", "arguments": {"word": "yes"}}}]
    assert last["message"] == {"role": "assistant", "content": "", "tool_calls": calls}
    whole = OllamaForm("tiny", is_chat=True).response([join(pieces)], USAGE).model_dump()
    assert whole["message"] == {"role": "assistant", "content": "Let me see.", "tool_calls": calls}


def test_other_clients_call(calling: str) -> None:
    """Forced in the protocols that can; told in Ollama's, which has no way to force."""
    model = openai.OpenAI(base_url=f"{calling}/v1", api_key="none")
    tool: Any = {"type": "function", "strict": False, **SAY["function"]}
    output = model.responses.create(model="tiny", input="hi", tools=[tool], tool_choice="required").output
    assert [item.type for item in output] == ["function_call"]
    other = anthropic.Anthropic(base_url=calling, api_key="none")
    tools: Any = [{"name": "say", "input_schema": WORD}]
    message = other.messages.create(
        model="tiny",
        max_tokens=100,
        messages=[{"role": "user", "content": "hi"}],
        tools=tools,
        tool_choice={"type": "any"},
    )
    assert [block.type for block in message.content] == ["tool_use"]
    ollama_client = ollama.Client(calling)
    assert "tools" in (ollama_client.show("tiny").capabilities or [])
    told = ollama_client.chat("tiny", [HI], tools=[SAY])
    assert (told.prompt_eval_count or 0) > 50 + (ollama_client.chat("tiny", [HI]).prompt_eval_count or 0)
