"""Tools, and other things that an answer is held to; several answers to one request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from asking import HI, picture, post, user_message

from pumice import __version__
from pumice.assistant import Assistant, load
from pumice.serve.answers import AnswerPiece, join
from pumice.serve.messages import FunctionDescription
from pumice.serve.tools import CallReader

WORD = {
    "type": "object",
    "properties": {"word": {"$ref": "#/$defs/Word"}},
    "required": ["word"],
    "additionalProperties": False,
    "$defs": {"Word": {"enum": ["yes", "no"]}},
}
NUMBER = {
    "type": "object",
    "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["number"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = WORD, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


SAY, COUNT = tool("say", description="Say a word."), tool("count", NUMBER, strict=True)


def is_right(name: str, arguments: str) -> bool:
    values = json.loads(arguments)
    return values in ({"word": "yes"}, {"word": "no"}) if name == "say" else 1 <= values["number"] <= 9


@pytest.fixture(scope="module")
def client(roomy: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{roomy}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def exact(tiny_folder: Path) -> Assistant:
    return load(tiny_folder, device="cpu", quantize=None)


@pytest.mark.parametrize(
    ("tools", "choice", "names"),
    [
        ([SAY], "required", {"say"}),
        ([SAY, COUNT], named("count"), {"count"}),
        ([SAY, COUNT], named("say"), {"say"}),
        ([SAY, COUNT], "required", {"say", "count"}),
    ],
    ids=["the only one", "the second", "the first", "any"],
)
def test_a_call_of_a_function(client: openai.OpenAI, tools: Any, choice: Any, names: set[str]) -> None:
    """Whole and streamed, as the official client joins the parts."""
    asked: dict[str, Any] = {"model": "tiny", "messages": [user_message("What?", picture(1))]}
    asked |= {"tools": tools, "tool_choice": choice, "max_tokens": 100, "seed": 3, "temperature": 2}
    [choice_given] = client.chat.completions.create(**asked).choices
    assert choice_given.message.content is None
    [call] = choice_given.message.tool_calls or []
    assert choice_given.finish_reason == "tool_calls"
    assert call.type == "function"
    assert call.function.name in names
    assert is_right(call.function.name, call.function.arguments)
    with client.chat.completions.stream(**asked) as stream:
        events = list(stream)
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    [same] = streamed.message.tool_calls or []
    assert (same.function.name, same.function.arguments) == (call.function.name, call.function.arguments)
    assert same.id.startswith("call_")
    assert [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert not streamed.message.content


def test_functions_without_parameters(roomy: str) -> None:
    for parameters in ({}, {"parameters": {}}, {"parameters": {"type": "object", "properties": {}}}):
        tools = [{"type": "function", "function": {"name": "now", **parameters}}]
        body = {"messages": [HI], "tools": tools, "tool_choice": "required", "max_tokens": 30}
        [call] = post(roomy, body).json()["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": "{}"} or parameters != {}


def test_a_call_that_is_cut_off(roomy: str) -> None:
    long = {
        "type": "object",
        "properties": {"text": {"type": "string", "minLength": 50}},
        "required": ["text"],
    }
    for tools in ([tool("write", long)], [tool("write", long), tool("other", long)]):
        body = {"messages": [HI], "tools": tools, "tool_choice": "required", "max_tokens": 24}
        [choice] = post(roomy, body).json()["choices"]
        assert choice["finish_reason"] == "length"
        calls = choice["message"].get("tool_calls") or []
        assert all(call["function"]["arguments"].startswith('{"text":"') for call in calls)


def test_a_form_of_texts_does_not_touch_a_call(roomy: str) -> None:
    """As with OpenAI's: clients send both where only a later answer is a text."""
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": NUMBER}}
    body = {"messages": [HI], "tools": [SAY], "tool_choice": "required", "max_tokens": 100}
    [plain], [held] = (
        post(roomy, {**body, **more}).json()["choices"] for more in ({}, {"response_format": form})
    )
    function = held["message"]["tool_calls"][0]["function"]
    assert is_right("say", function["arguments"])
    assert function == plain["message"]["tool_calls"][0]["function"]


def test_calls_in_the_history(roomy: str) -> None:
    """The model sees calls and what they gave; nothing depends on how clients write them."""
    call = {"id": "a", "type": "function", "function": {"name": "say", "arguments": '{"word": "yes"}'}}
    given = {"role": "tool", "tool_call_id": "a", "content": "said"}

    def answer(calls: Any, *more: Any, **fields: Any) -> str:
        messages = [HI, {"role": "assistant", "content": None, "tool_calls": calls, **fields}, *more]
        response = post(roomy, {"messages": messages, "tools": [SAY, COUNT], "max_tokens": 8})
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    expected = answer([call], given)
    assert answer([{**call, "index": 0}], given, refusal=None) == expected
    assert answer([call], {**given, "content": [{"type": "text", "text": "said"}], "name": "say"}) == expected
    assert answer([{**call, "function": {"name": "say", "arguments": {"word": "yes"}}}], given) == expected
    assert answer([call], {**given, "content": "other"}) != expected
    changed = {**call, "function": {"name": "say", "arguments": '{"word":"no"}'}}
    assert answer([changed], given) != expected
    assert answer([{**call, "function": {"name": "say", "arguments": ""}}], given)


def test_auto_answers_in_text(roomy: str) -> None:
    """The template of this model knows no tools."""
    plain = post(roomy, {"messages": [HI], "max_tokens": 8}).json()["choices"][0]
    for more in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}, {"tool_choice": "none"}):
        [choice] = post(roomy, {"messages": [HI], "max_tokens": 8, "tools": [SAY], **more}).json()["choices"]
        assert choice == plain


BAD_CALL = {"id": "a", "type": "function", "function": {"name": "say", "arguments": "{word: yes"}}


@pytest.mark.parametrize(
    ("more", "param", "code", "message"),
    [
        (
            {"tools": [COUNT, tool("say", {"type": "nonsense"})], "tool_choice": "required"},
            "tools.1.function.parameters",
            "invalid_function_parameters",
            "schema cannot be followed (Invalid type: nonsense)",
        ),
        (
            {"tools": [tool("say", {"type": "nonsense", "title": "alone"})], "tool_choice": "required"},
            "tools.0.function.parameters",
            "invalid_function_parameters",
            "schema cannot be followed",
        ),
        (
            {"tools": [tool("say", {"type": "object", "x-guidance": {"lenient": True}})]},
            "tools.0.function.parameters",
            "invalid_function_parameters",
            "x-guidance is not allowed",
        ),
        (
            {"tools": [tool("say", {"type": "nonsense"})]},
            "tools.0.function.parameters",
            "invalid_function_parameters",
            "schema cannot be followed",
        ),
        (
            {"tools": [SAY, COUNT, SAY]},
            "tools.2.function.name",
            "duplicate_tool",
            "two tools are called 'say'",
        ),
        (
            {"tools": [SAY, COUNT], "tool_choice": named("shout")},
            "tool_choice",
            "unknown_tool",
            "names 'shout', the tools are 'say', 'count'",
        ),
        ({"tool_choice": "required"}, "tool_choice", "missing_tools", "needs tools"),
        ({"tools": [SAY], "tool_choice": "any"}, "tool_choice", "invalid_value", "'required'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value", "'function'"),
        ({"tools": [tool("a b")]}, "tools.0.function.name", "invalid_value", "pattern"),
        (
            {"messages": [HI, {"role": "tool", "tool_call_id": "a", "content": "x"}]},
            "messages.1.tool_call_id",
            "unknown_tool_call",
            "must be a response to a preceding message with 'tool_calls'",
        ),
        (
            {"messages": [HI, {"role": "assistant", "tool_calls": [BAD_CALL]}, HI]},
            "messages.1.tool_calls.0.function.arguments",
            "invalid_value",
            "should be a JSON object",
        ),
        ({"functions": [{"name": "say"}]}, "functions", "unsupported_value", "use tools"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json", "invalid_json_schema", "cannot be followed"),
        (
            {"guided_json": "{"},
            "guided_json",
            "invalid_json_schema",
            "guided_json is no JSON Schema (line 1, column 2: it ends too early)",
        ),
        ({"guided_json": "[1]"}, "guided_json", "invalid_json_schema", "it should be an object, not [1]"),
        ({"guided_regex": "(["}, "guided_regex", "invalid_regex", "cannot be followed"),
        (
            {"guided_choice": ["a"], "structured_outputs": {"regex": "a"}},
            "guided_choice",
            "invalid_value",
            "exclude each other",
        ),
        (
            {"tools": [SAY], "tool_choice": "required", "guided_json": WORD},
            "guided_json",
            "invalid_value",
            "and a tool_choice that requires a call exclude each other",
        ),
        (
            {"tools": [SAY], "tool_choice": named("say"), "structured_outputs": {"choice": ["a"]}},
            "structured_outputs.choice",
            "invalid_value",
            "and a tool_choice that requires a call exclude each other",
        ),
    ],
)
def test_wrong_tools(roomy: str, more: dict[str, Any], param: str, code: str, message: str) -> None:
    response = post(roomy, {"messages": [HI], **more})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert message in error["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"structured_outputs": {"json": WORD}},
        {"structured_outputs": {"json": json.dumps(WORD)}},
        {"guided_json": WORD},
        {"response_format": {"type": "json", "value": WORD}},
        {"response_format": {"type": "json_object", "value": WORD}},
        {"response_format": {"type": "json_schema", "value": {"name": "word", "schema": WORD}}},
        {"response_format": {"type": "json_object", "schema": WORD}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "word", "schema": WORD}}},
        {"structured_outputs": {"regex": r'\{"word":"(yes|no)"\}'}},
        {"guided_choice": ['{"word":"yes"}', '{"word":"no"}']},
    ],
    ids=json.dumps,
)
def test_every_name_of_a_schema(roomy: str, more: dict[str, Any]) -> None:
    for path, body in (("chat/completions", {"messages": [HI]}), ("completions", {"prompt": "a"})):
        response = post(roomy, {**body, "max_tokens": 40, **more}, f"/v1/{path}")
        assert response.status_code == 200, response.text
        [choice] = response.json()["choices"]
        assert is_right("say", choice["message"]["content"] if "message" in choice else choice["text"])


def test_several_answers(client: openai.OpenAI, roomy: str) -> None:
    """The prompt is computed once; each answer is what its own seed gives alone."""
    asked: dict[str, Any] = {"model": "tiny", "messages": [user_message("What?", picture(7))]}
    asked |= {"max_tokens": 12, "temperature": 1.5}
    before = hits(roomy)
    several = client.chat.completions.create(**asked, n=3, seed=5)
    found = hits(roomy) - before
    assert several.usage is not None
    alone = [client.chat.completions.create(**asked, seed=seed).choices[0] for seed in (5, 6, 7)]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert [choice.message.content for choice in several.choices] == [c.message.content for c in alone]
    assert len({choice.message.content for choice in several.choices}) > 1
    assert several.usage.completion_tokens == 36
    details = several.usage.prompt_tokens_details
    assert details is not None
    # The first answer computes the prompt; the others compute its last token alone.
    assert found == (details.cached_tokens or 0) + 2 * (several.usage.prompt_tokens - 1)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, n=3, seed=5, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in several.choices]


def hits(url: str) -> int:
    """Return how many tokens of prompts the engine did not compute again."""
    [line] = [
        line
        for line in httpx.get(f"{url}/metrics").text.splitlines()
        if line.startswith("pumice_prefix_hits_total ")
    ]
    return int(float(line.split()[1]))


def test_penalties_change_the_answer(roomy: str) -> None:
    def said(**more: Any) -> str:
        response = post(roomy, {"messages": [HI], "max_tokens": 30, **more})
        return str(response.json()["choices"][0]["message"]["content"])

    plain = said()
    assert said(frequency_penalty=0, presence_penalty=0) == plain
    assert said(frequency_penalty=2, presence_penalty=2) == said(frequency_penalty=2.0, presence_penalty=2.0)
    assert said(frequency_penalty=-2, presence_penalty=-2) != said(frequency_penalty=2, presence_penalty=2)


def test_lists_of_prompts(client: openai.OpenAI, roomy: str) -> None:
    """Texts, token ids and lists of them; `echo`; `n`."""

    def texts(prompt: Any, **more: Any) -> list[str]:
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, **more)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    [first], [second] = texts("A dog"), texts("Two cats")
    assert texts(["A dog", "Two cats"]) == [first, second]
    assert texts(["A dog", "Two cats"], n=2) == [first, first, second, second]
    assert texts(["A dog", "Two cats"], echo=True) == [f"A dog{first}", f"Two cats{second}"]
    ids = [5, 6, 7, 8]
    [of_ids] = texts(ids)
    assert texts([ids, [9, 10]])[0] == of_ids
    pieces = ["", ""]
    for chunk in client.completions.create(
        model="tiny", prompt=["A dog", "Two cats"], max_tokens=5, stream=True, echo=True
    ):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [f"A dog{first}", f"Two cats{second}"]
    for body, param in (
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [[1], "a"]}, "prompt.1"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
    ):
        response = post(roomy, body, "/v1/completions")
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_log_probabilities_of_a_prompt(client: openai.OpenAI, exact: Assistant) -> None:
    """As lm-eval asks: each token's is what the whole model gives, however the prompt is cut and cached."""
    ids = torch.randint(3, 300, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        hidden = exact.model(torch.tensor([ids]))
        expected = exact.model.decoder.logits(hidden)[0].float().log_softmax(-1)
    asked: dict[str, Any] = {"model": "tiny", "echo": True, "logprobs": 2, "temperature": 0}
    client.completions.create(model="tiny", prompt=ids, max_tokens=1)  # it is in the cache now
    for more in ({"max_tokens": 1}, {"max_tokens": 0}, {"max_tokens": 2, "n": 2}):
        answer = client.completions.create(prompt=[ids, ids[:2]], **asked, **more)
        for choice, prompt in zip(answer.choices[:: more.get("n", 1)], (ids, ids[:2]), strict=True):
            logprobs = choice.logprobs
            assert logprobs is not None
            assert logprobs.token_logprobs is not None
            assert logprobs.top_logprobs is not None
            assert len(logprobs.token_logprobs) == len(prompt) + more["max_tokens"]
            first, *given = logprobs.token_logprobs[: len(prompt)]
            assert first is None
            chosen = expected[range(len(prompt) - 1), prompt[1:]]
            assert given == pytest.approx(chosen.tolist(), abs=1e-3)
            best = expected[: len(prompt) - 1].max(-1).values.tolist()
            for highest, top in zip(best, logprobs.top_logprobs[1 : len(prompt)], strict=True):
                if len(top or {}) == 2:  # else both tokens have one text, such as a part of a character
                    assert max((top or {}).values()) == pytest.approx(highest, abs=1e-3)
            assert choice.text.startswith(exact.processor.tokenizer.decode(prompt))
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2 * more["max_tokens"] * more.get("n", 1)
    chunks = list(client.completions.create(prompt=ids, **asked, max_tokens=2, stream=True))
    streamed = [
        value
        for chunk in chunks
        if (logprobs := chunk.choices[0].logprobs) is not None
        for value in logprobs.token_logprobs or []
    ]
    assert streamed[1 : len(ids)] == pytest.approx(expected[range(149), ids[1:]].tolist(), abs=1e-3)
    text = client.completions.create(prompt="A dog.", **asked, max_tokens=0).choices[0]
    assert (text.text, text.finish_reason) == ("A dog.", "length")


def test_every_answer_names_the_server(roomy: str) -> None:
    assert (
        post(roomy, {"messages": [HI], "max_tokens": 1}).json()["system_fingerprint"]
        == f"pumice-{__version__}"
    )


@pytest.mark.parametrize("several", [False, True])
def test_a_call_is_read_alike_however_it_is_cut(several: bool) -> None:
    """Every cut into two pieces, and letter by letter; whole, cut off, and cut off where it is whole."""
    functions = [FunctionDescription(name="say"), FunctionDescription(name="count")][: 1 + several]
    arguments = '{"word":"}\\"{","more":{"a":[1]}}'
    text = f'{{"name":"say","arguments":{arguments}}}' if several else arguments
    cut_off = text[: text.index("more")]
    for whole, finish, expected in (
        (text, "stop", ("say", arguments, "tool_calls")),
        (text, "length", ("say", arguments, "tool_calls")),
        (cut_off, "length", ("say", arguments[: arguments.index("more")], "length")),
        (cut_off, "stop", ("say", arguments[: arguments.index("more")], "stop")),  # by a stop text
    ):
        cuts = [[whole[:n], whole[n:]] for n in range(len(whole) + 1)]
        for parts in [*cuts, list(whole), [*whole, ""]]:
            reader = CallReader(functions)
            finishes: list[Any] = [*[None] * (len(parts) - 1), finish]
            read = [
                reader(AnswerPiece(text=part, finish=end)) for part, end in zip(parts, finishes, strict=True)
            ]
            answer = join(read)
            assert (answer.name, answer.arguments, answer.finish) == expected
            assert not answer.text
            assert [piece.name for piece in read if piece.name] == ["say"]


@pytest.mark.usefixtures("bounded_work")
@pytest.mark.parametrize(
    ("before", "after", "arguments"),
    [('{"name":"say","arguments":', "{}}", "{}"), ('{"name":"say","arguments":{', "}}", "{}"), ("", "x", "")],
)
def test_long_blanks_in_a_call(before: str, after: str, arguments: str) -> None:
    functions = [FunctionDescription(name="say"), FunctionDescription(name="count")]
    reader, blanks = CallReader(functions), " \n" * 50_000
    pieces = [AnswerPiece(text=before + blanks + after), AnswerPiece(text=blanks, finish="stop")]
    answer = join([reader(piece) for piece in pieces])
    assert answer.arguments.replace(blanks, "") == arguments
    assert answer.finish == ("tool_calls" if arguments else "stop")


def test_a_call_that_ends_before_its_name() -> None:
    functions = [FunctionDescription(name="say"), FunctionDescription(name="count")]
    answer = join([CallReader(functions)(AnswerPiece(text='{"na', finish="length"))])
    assert (answer.name, answer.text, answer.finish) == ("", '{"na', "length")
