"""Requests as common clients send them, without a setting changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import HI, SYSTEM, ask, data_uri, picture, post, user_message

from pumice.assistant import Assistant, load
from pumice.conversation import Conversation, ImagePart, Message
from pumice.engine.generate import naive_generate

PICTURE = {"type": "image_url", "image_url": {"url": data_uri(picture(1))}}
TEXT = {"type": "text", "text": "Hello."}
SHOWN = ImagePart(picture(1))
GREETED = [("user", "hi"), ("assistant", "Hello.")]


@pytest.fixture(scope="module")
def exact(tiny_folder: Path) -> Assistant:
    return load(tiny_folder, device="cpu", quantize=None)


def answer(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "Hello.", **more}


def said(url: str, messages: list[Any], **more: Any) -> str:
    response = post(url, {"messages": messages, "max_tokens": 8, **more})
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def naive(exact: Assistant, *messages: tuple[str, Any], continued: bool = False) -> str:
    """What the model says without a cache, alone. messages: (role, text or parts)."""
    turns = tuple(Message(role, (parts,) if isinstance(parts, str) else parts) for role, parts in messages)
    prompt = exact.prompt(Conversation(turns), continued=continued, max_new_tokens=8)
    text = exact.processor.tokenizer.decode(naive_generate(exact.model, prompt))
    return text if continued else text.removeprefix(" ")


@pytest.mark.parametrize(
    "more",
    [
        {"refusal": None},
        {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None},
        {"provider_specific_fields": {"refusal": None}, "tool_calls": [], "reasoning_content": "So I greet."},
        {"content": None, "refusal": "Hello.", "annotations": [], "reasoning": {"text": "So I greet."}},
        {"content": [{"type": "text", "text": "Hello."}], "name": "model"},
        {"parsed": {"greeting": "Hello."}, "cache_control": {"type": "ephemeral"}},
    ],
    ids=["refusal", "model_dump", "LiteLLM", "refused", "parts", "parsed"],
)
def test_answers_come_back_as_history(server: str, exact: Assistant, more: dict[str, Any]) -> None:
    expected = naive(exact, ("user", "hi"), ("assistant", "Hello."), ("user", "hi"))
    assert said(server, [HI, answer(**more), HI]) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([HI, HI], [("user", ("hi", "\n\n", "hi"))]),
        ([{"role": "user", "content": [PICTURE]}, HI], [("user", (ImagePart(picture(1)), "hi"))]),
        ([{"role": "user", "content": [PICTURE]}], [("user", (ImagePart(picture(1)),))]),
        ([answer(), HI], [("assistant", "Hello."), ("user", "hi")]),
        ([SYSTEM, answer(), HI], [("system", "Be brief."), ("assistant", "Hello."), ("user", "hi")]),
        ([HI, answer(), SYSTEM, HI], [("user", "hi"), ("assistant", "Hello."), ("user", "Be brief.\n\nhi")]),
        ([HI, SYSTEM], [("user", "hi\n\nBe brief.")]),
        ([HI, answer(content=[PICTURE, TEXT]), HI], [*GREETED, ("user", (SHOWN, "hi"))]),
        ([{"role": "system", "content": [PICTURE]}, HI], [("user", (SHOWN, "hi"))]),
    ],
    ids=[
        "two",
        "picture apart",
        "picture alone",
        "greeting",
        "system, greeting",
        "late system",
        "last system",
        "picture in an answer",
        "picture in a system message",
    ],
)
def test_any_order_of_messages(
    server: str, exact: Assistant, messages: list[Any], expected: list[tuple[str, Any]]
) -> None:
    assert said(server, messages) == naive(exact, *expected)


def test_an_answer_is_continued(server: str, exact: Assistant) -> None:
    """The rest of an answer is what the model would have written after its beginning."""
    whole = said(server, [HI], max_tokens=8)
    begun = {"role": "assistant", "content": whole[:4]}
    rest = said(server, [HI, begun], continue_final_message=True, add_generation_prompt=False, max_tokens=8)
    assert rest == naive(exact, ("user", "hi"), ("assistant", whole[:4]), continued=True)
    assert said(server, [HI, {**begun, "prefix": True}], add_generation_prompt=False, max_tokens=8) == rest
    assert said(server, [HI], add_generation_prompt=True, max_tokens=8) == whole
    prompt = exact.prompt(
        Conversation((Message("user", ("hi",)), Message("assistant", (whole[:4],)))), continued=True
    )
    plain = exact.prompt(Conversation((Message("user", ("hi",)),)))
    ids = plain.input_ids.tolist()
    assert prompt.input_ids.tolist()[: len(ids)] == ids
    assert exact.processor.tokenizer.decode(prompt.input_ids.tolist()[len(ids) :]) == whole[:4]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/explain"])
def test_a_picture_in_a_last_answer_is_told(server: str, path: str) -> None:
    """There is no question after it that could show it."""
    answer = {**user_message("A dog", picture()), "role": "assistant"}
    more = {"continue_final_message": True} if path != "/explain" else {}
    error = post(server, {"messages": [HI, answer], **more}, path).json()["error"]
    assert "the last answer has a picture; put it into the question before" in error["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"tools": None, "tool_choice": None},
        {"tools": [], "tool_choice": "none"},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"functions": None, "parallel_tool_calls": None, "reasoning_effort": None, "audio": None},
        {"verbosity": None, "prediction": None, "temperature": None, "stream": None, "banana": None},
        {"stop": [], "logit_bias": {}, "modalities": ["text"], "functions": [], "parallel_tool_calls": True},
        {"prompt_cache_key": "a", "safety_identifier": "b", "top_k": -1, "chat_template_kwargs": {}},
        {"service_tier": "auto", "metadata": {"a": "b"}, "store": True, "user": "me"},
        {"response_format": {"type": "text", "json_schema": None}, "stream_options": None},
        {"stream": False, "stream_options": {"include_usage": False, "continuous_usage_stats": False}},
        {"add_special_tokens": False, "skip_special_tokens": True, "guided_decoding_backend": "auto"},
        {"reasoning_format": "auto", "typ_p": 1, "dynatemp_range": 0, "dynatemp_exponent": 1},
        {"dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "xtc_threshold": 0.1},
        {"repeat_penalty": 1, "backend_sampling": False, "top_p": 0, "n_predict": None},
        {
            "structured_outputs": {"disable_fallback": True},
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {"logprobs": False, "top_logprobs": 0},
        {"tool_choice": "", "stop": "", "guided_regex": "", "grammar": "", "response_format": ""},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_asks_for_nothing_changes_nothing(server: str, more: dict[str, Any]) -> None:
    assert said(server, [HI], **more) == said(server, [HI])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "What?"}),
        ("/v1/messages", {"messages": [HI], "max_tokens": 2}),
        ("/api/chat", {"model": "tiny", "messages": [HI]}),
        ("/api/generate", {"model": "tiny", "prompt": "What?"}),
        ("/v1/chat/completions", {"messages": [HI]}),
        ("/v1/completions", {"prompt": "What?"}),
    ],
)
def test_no_beam_search_is_accepted_everywhere(server: str, path: str, body: dict[str, Any]) -> None:
    response = post(server, body | {"use_beam_search": False, "length_penalty": 1}, path)
    assert response.status_code == 200, response.text


def test_seed_minus_one_is_no_seed(server: str) -> None:
    """llama.cpp's, vLLM's and Ollama's clients ask for other words each time so."""
    assert len({said(server, [HI], temperature=2, max_tokens=8, seed=1) for _ in range(3)}) == 1
    assert len({said(server, [HI], temperature=2, max_tokens=8, seed=-1) for _ in range(3)}) > 1


def test_no_log_probabilities_of_a_completion(server: str) -> None:
    response = post(server, {"prompt": "a", "max_tokens": 2, "logprobs": False}, "/v1/completions")
    assert response.json()["choices"][0]["logprobs"] is None


def test_fields_of_parts_that_change_nothing(server: str) -> None:
    def show(**more: Any) -> str:
        image = {
            "type": "image_url",
            "image_url": {"url": PICTURE["image_url"]["url"], **more.pop("url", {})},
        }
        return said(server, [{"role": "user", "content": [{**image, **more}, TEXT], "name": "me"}])

    plain = show()
    assert show(uuid="a", cache_control={"type": "ephemeral"}) == plain
    assert show(url={"detail": "low", "format": "image/png"}) == plain
    messages = [{"role": "user", "content": "hi", "cache_control": {"type": "ephemeral"}}]
    assert said(server, messages) == said(server, [HI])


def test_names_that_others_give_a_field(server: str) -> None:
    whole = post(server, {"messages": [HI], "max_tokens": 3}).json()
    assert post(server, {"messages": [HI], "n_predict": 3}).json()["choices"] == whole["choices"]
    penalty = said(server, [HI], repetition_penalty=5, max_tokens=30)
    assert said(server, [HI], repeat_penalty=5, max_tokens=30) == penalty
    assert penalty != said(server, [HI], max_tokens=30)
    greedy = said(server, [HI])
    assert said(server, [HI], temperature=2, top_p=0, seed=1) == greedy


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "'input_image'",
        ),
        (
            "/v1/messages",
            {"max_tokens": 3, "messages": [{"role": "user", "content": [{"type": "document"}]}]},
            "'image'",
        ),
    ],
)
def test_unknown_parts_name_those_of_the_protocol(
    server: str, path: str, body: dict[str, Any], words: str
) -> None:
    response = post(server, body, path)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_null_in_a_schema_stays(server: str) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [None]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    only = {"type": "object", "properties": {"a": {"const": None}}, "required": ["a"]}
    openai_form = {"name": "x", "schema": schema, "strict": None, "title": None}
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": openai_form}},
        {"response_format": {"type": "json", "value": {**only, "additionalProperties": False}}},
        {"json_schema": {**only, "additionalProperties": False}},
    ]
    for form in forms:
        assert said(server, [HI], max_tokens=40, **form) == '{"a":null}'


def test_an_answer_is_as_long_as_fits(local: Any, exact: Assistant) -> None:
    context = exact.model.config.decoder.context

    def usage(url: str, **more: Any) -> tuple[dict[str, Any], str]:
        body = {"messages": [HI], "logit_bias": None, **more}
        values = post(url, body).json()
        return values["usage"], values["choices"][0]["finish_reason"]

    with local() as url:
        for more in ({"max_tokens": 10**6}, {"max_tokens": -1}, {"max_completion_tokens": context}):
            counts, finish = usage(url, **more)
            assert finish in ("length", "stop")
            assert finish == "stop" or counts["total_tokens"] == context
    with local(cache_tokens=60, default_tokens=5) as url:
        counts, finish = usage(url, max_tokens=-1)
        assert finish == "stop" or counts["total_tokens"] == 61  # the last token needs no cell
        assert usage(url)[0]["completion_tokens"] <= 5
    with local(max_tokens=3) as url:
        assert [usage(url, **more)[0]["completion_tokens"] for more in ({}, {"max_tokens": 9})] == [3, 3]


def test_too_long_in_openai_s_words(server: str, exact: Assistant) -> None:
    context = exact.model.config.decoder.context
    body = {"messages": [{"role": "user", "content": "word " * 900}]}
    error = post(server, body).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert error["message"].startswith(f"This model's maximum context length is {context} tokens.")
    error = post(server, {"prompt": "word " * 900}, "/v1/completions").json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize(
    ("path", "instead"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/models", "/v1/models"),
        ("/v1/", "/v1/models"),
        ("/completions/", "/v1/completions"),
        ("/generate", "/v1/chat/completions"),
    ],
)
def test_wrong_addresses_name_the_right_one(server: str, path: str, instead: str) -> None:
    response = post(server, ask(), path)
    assert response.status_code == 404
    assert response.json()["error"]["message"].endswith(f"ask at {instead}")


def test_the_list_of_models_with_a_slash(server: str) -> None:
    models = httpx.get(f"{server}/v1/models").json()
    assert httpx.get(f"{server}/v1/models/").json() == models
    assert models["data"][0]["max_pictures"] == 1  # of a folder that does not say it


def test_bytes_of_parts_of_a_character(exact: Assistant) -> None:
    tokenizer = exact.processor.tokenizer
    for text in ("A dog.", "é", "😀"):
        ids = [number for number, _ in tokenizer.pieces(text, first=False)]
        parts = [tokenizer.token_bytes(number) for number in ids]
        assert b"".join(part or b"" for part in parts) == text.encode()
        assert None not in parts
