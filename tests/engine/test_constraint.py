"""Answers held to a JSON schema: a random model writes valid JSON, alone and among others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pumice import InputError
from pumice.assistant import Assistant, load
from pumice.conversation import Conversation, user_message
from pumice.engine.generate import naive_generate

pytest.importorskip("llguidance", reason="llguidance is not installed")

ASKED = [{"role": "user", "content": "What?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["dog", "cat"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["animal", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def assistant(tiny_folder: Path) -> Assistant:
    return load(tiny_folder, device="cpu", quantize=None)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_follows_the_schema(assistant: Assistant, temperature: float) -> None:
    free = "".join(assistant.stream(ASKED, max_new_tokens=40))
    reply = assistant.stream(ASKED, schema=SCHEMA, max_new_tokens=40, temperature=temperature, seed=1)
    answer = json.loads("".join(reply))
    assert set(answer) == {"animal", "count"}
    assert answer["animal"] in ("dog", "cat")
    assert 1 <= answer["count"] <= 9
    assert reply.finish == "stop"
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(free)


def test_it_equals_the_naive_answer_beside_others(assistant: Assistant) -> None:
    prompt = assistant.prompt(Conversation((user_message("What?"),)), schema=SCHEMA, max_new_tokens=40)
    expected = assistant.processor.tokenizer.decode(naive_generate(assistant.model, prompt))
    replies = [
        assistant.stream(ASKED, max_new_tokens=9).begin(),
        assistant.stream(ASKED, schema=SCHEMA, max_new_tokens=40).begin(),
        assistant.stream(ASKED, schema=SCHEMA, max_new_tokens=40).begin(),
    ]
    free, *held = ["".join(reply) for reply in replies]
    assert held == [expected, expected]
    assert free == "".join(assistant.stream(ASKED, max_new_tokens=9))


@pytest.mark.parametrize("schema", [{"type": "objec"}, {"type": object}, {"$ref": "http://a.example/b"}])
def test_a_schema_that_cannot_be_followed(assistant: Assistant, schema: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="JSON schema cannot be followed"):
        assistant.stream(ASKED, schema=schema)
