"""Ollama's protocol: its own client gets what the chat's protocol gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from asking import AFTER_CALL, HI, SYSTEM, WORD, WORDS, picture, post, said, user_message

from pumice.assistant import load
from pumice.serve.ollama import OllamaCard

IMAGE = picture(3)
SEEN = user_message("What?", IMAGE)


@pytest.fixture(scope="module")
def ollama_client(roomy: str) -> ollama.Client:
    return ollama.Client(roomy)


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
