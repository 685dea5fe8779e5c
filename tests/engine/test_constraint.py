"""Answers held to a JSON schema: a random model writes valid JSON, alone and among others."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from pumice import InputError
from pumice.assistant import Assistant, load
from pumice.conversation import Conversation, user_message
from pumice.engine import grammar_check
from pumice.engine.constraint import _compiled, json_rule
from pumice.engine.generate import naive_generate
from pumice.engine.grammar_check import LARGEST, LEXER_STATES, check_grammars, compile_grammar
from pumice.stopping import Stopped, stoppable

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


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def doubled(levels: int) -> dict[str, Any]:
    """Return a schema of two that are one and the same, and so on."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"anyOf": [schema, schema]}
    return schema


PATTERNS = [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrst"]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objec"}, ""),
        ({"type": object}, "type is not JSON serializable"),
        ({"$ref": "http://a.example/b"}, ""),
        ({"$ref": "#"}, "no answer satisfies it"),
        ({"type": "number", "multipleOf": 982451653}, "fuel exhausted"),
        ({"enum": []}, "Unsatisfiable schema"),
        ({"type": "string", "minLength": 5, "maxLength": 4}, ""),
        ({"allOf": PATTERNS[:6]}, "Unable to determine"),
        ({"allOf": PATTERNS}, "it takes more than 2 s or 2048 MB to compile"),  # a minute
        ({"type": "object", "x-guidance": {"whitespace_flexible": True}}, "x-guidance is not allowed"),
        ({"properties": {"a": {"items": [{"x-guidance": {}}]}}}, "x-guidance is not allowed"),
        ({"description": "x" * 70_000}, "it has 7\\d+ bytes, more than 65536"),
        (nested(40), "it has more than 32 levels"),
        (doubled(15), "it has more than 65536 values"),
        ({"type": "integer", "minimum": 10**400}, ""),
    ],
)
def test_a_schema_that_cannot_be_followed(assistant: Assistant, schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=f"JSON schema cannot be followed .*{reason}") as caught:
        assistant.stream(ASKED, schema=schema)
    assert len(str(caught.value)) < 300


def test_what_is_found_while_the_answer_is_written_ends_only_that_answer(assistant: Assistant) -> None:
    schema = {"type": "array", "minItems": 10**9, "items": {"type": "null"}}  # too many to look ahead at once
    held = assistant.stream(ASKED, schema=schema, max_new_tokens=40).begin()
    free = assistant.stream(ASKED, max_new_tokens=9).begin()
    with pytest.raises(InputError, match=r"JSON schema cannot be followed \(parser error: Too many items"):
        "".join(held)
    assert "".join(free) == "".join(assistant.stream(ASKED, max_new_tokens=9))


def test_schemas_share_what_they_need_of_the_tokenizer(assistant: Assistant) -> None:
    first, second = assistant.json(SCHEMA), assistant.json({"type": "string"})
    _compiled.cache_clear()
    assert _compiled.cache_info().misses == 0
    for _ in range(3):
        assistant.json({"type": "integer"})
    assert _compiled.cache_info().misses == 1
    assert first() is not second()


def test_a_check_that_is_stopped_ends_its_process(started: list[Any]) -> None:
    stop = threading.Event()

    def check() -> None:
        with stoppable(stop):
            check_grammars([f"start: {json_rule({'allOf': PATTERNS})}"])

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(check)
        while not started and not running.done():
            pass
        stop.set()
        with pytest.raises(Stopped):
            running.result(60)
    assert [process.returncode for process in started] == [-9]


@pytest.mark.skipif(not hasattr(signal, "SIGXCPU"), reason="Windows counts no seconds")
def test_a_check_has_its_seconds(monkeypatch: pytest.MonkeyPatch, started: list[Any]) -> None:
    monkeypatch.setattr(grammar_check, "WALL_SECONDS", 1000)
    reasons = check_grammars([f"start: {json_rule({'allOf': PATTERNS})}"])
    assert reasons == ["it takes more than 2 s or 2048 MB to compile"]
    assert [process.returncode for process in started] == [-signal.SIGXCPU]


def test_the_states_of_an_answer_are_bounded() -> None:
    """So many letters that no remainder of a division by one of the primes comes back together."""
    from llguidance import LLTokenizer

    primes = (2, 3, 5, 7, 11, 13, 17)
    rules = [f"L{prime}: /(x{{{prime}}})*y{prime}/" for prime in primes]
    grammar = "\n".join([f"start: {' | '.join(f'L{prime}' for prime in primes)}", *rules])
    matcher, reason = compile_grammar(grammar, LLTokenizer("byte"))
    assert reason == ""
    accepted = 0
    while accepted < 2 * LEXER_STATES and matcher.consume_token(ord("x")):
        accepted += 1
    assert "too many states" in matcher.get_error()
    assert LEXER_STATES // 2 < accepted < LEXER_STATES


def test_several_grammars_are_checked_at_once() -> None:
    good, bad, empty = "start: /[ab]+/", "start: /[ab+/", 'start: ""'
    reasons = check_grammars([good, bad, empty, good])
    assert [bool(reason) for reason in reasons] == [False, True, True, False]
    assert reasons[2] == "no answer satisfies it"


def test_grammars_that_are_too_large_start_no_process(started: list[Any]) -> None:
    large = check_grammars(["x", "x" * (LARGEST + 1)])
    assert large == [f"{LARGEST + 1} characters, more than {LARGEST}"] * 2
    many = check_grammars(["x" * LARGEST] * 5)
    assert many == [f"{5 * LARGEST} characters together, more than {4 * LARGEST}"] * 5
    assert started == []
