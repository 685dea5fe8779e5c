"""What the server answers, over a real socket, is what the model says; the official client reads it."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from asking import WORD, WORDS, ask, data_uri, picture, post, user_message, wait_until

from pumice.assistant import Assistant, load
from pumice.conversation import Conversation, ImagePart, Message
from pumice.engine.constraint import GrammarAnswer
from pumice.engine.engine import Engine, Plan
from pumice.engine.generate import naive_generate
from pumice.engine.grammar_check import refused
from pumice.serve import stream
from pumice.serve.errors import ApiError
from pumice.serve.messages import parse
from pumice.serve.protocol import ChatRequest
from pumice.serve.sampling import check_sampling, sampling_of


@pytest.fixture(scope="module")
def exact(tiny_folder: Path) -> Assistant:
    return load(tiny_folder, device="cpu", quantize=None)


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def naive(exact: Assistant, *messages: Message, **sampling: Any) -> str:
    """What the model says without a cache, alone."""
    prompt = exact.prompt(Conversation(messages), **sampling)
    return exact.processor.tokenizer.decode(naive_generate(exact.model, prompt)).removeprefix(" ")


def user(text: str, *pictures: bytes) -> Message:
    return Message("user", (*map(ImagePart, pictures), text))


def test_the_official_client(client: openai.OpenAI, exact: Assistant) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "pumice"
    content: Any = user_message("What is it?", picture(1), picture(2))["content"]
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=10)
    expected = naive(
        exact,
        Message("system", ("Be brief.",)),
        user("What is it?", picture(1), picture(2)),
        max_new_tokens=10,
    )
    [choice] = answer.choices
    assert choice.message.content == expected
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 10
    stream_options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=10, stream=True, stream_options=stream_options
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert len({c.id for c in chunks}) == 1
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 10
    assert usage.prompt_tokens_details is not None
    # All of the prompt but its last token was computed for the first request.
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=messages, n=1000)
    assert raised.value.param == "n"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here"):
        client.chat.completions.create(model="gpt", messages=messages)


def test_a_second_turn(client: openai.OpenAI, exact: Assistant) -> None:
    first: Any = user_message("What?", picture(3))
    first_answer = (
        client.chat.completions.create(model="tiny", messages=[first], max_tokens=6)
        .choices[0]
        .message.content
    )
    assert first_answer
    messages: Any = [
        first,
        {"role": "assistant", "content": first_answer},
        {"role": "user", "content": "Sure?"},
    ]
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6)
    turns = (user("What?", picture(3)), Message("assistant", (first_answer,)), Message("user", ("Sure?",)))
    assert second.choices[0].message.content == naive(exact, *turns, max_new_tokens=6)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= 10


def test_a_stream_tells_how_much_of_a_long_prompt_is_read(
    local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, steps = Engine._run, itertools.count(1)
    go = [threading.Event(), threading.Event()]
    monkeypatch.setattr(stream, "PROGRESS_INTERVAL", 0.01)

    def held(engine: Engine, plan: Plan) -> None:
        """The second and third part of the prompt wait until the client knows of those before."""
        if (step := next(steps)) in (2, 3):
            assert go[step - 2].wait(60)
        run(engine, plan)

    monkeypatch.setattr(Engine, "_run", held)
    progress, text, long = [], "", "What is this? " * 30
    with local() as url:
        body = ask(long, stream=True, return_progress=True)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                event = json.loads(line[6:]) if line.startswith("data: {") else {"choices": []}
                text += "".join(choice["delta"].get("content", "") for choice in event["choices"])
                if "prompt_progress" in event:
                    progress.append(event["prompt_progress"])
                    go[min(len(progress), 2) - 1].set()
        whole = post(url, ask(long)).json()
    total = whole["usage"]["prompt_tokens"]
    assert progress[:2] == [{"total": total, "processed": count} for count in (64, 128)]
    assert all(128 < later["processed"] < total for later in progress[2:])
    assert text == whole["choices"][0]["message"]["content"]


def test_plain_completion(client: openai.OpenAI, exact: Assistant) -> None:
    answer = client.completions.create(model="tiny", prompt="A dog", max_tokens=9)
    pieces = client.completions.create(model="tiny", prompt=["A dog"], max_tokens=9, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == answer.choices[0].text
    logprobs = (
        client.completions.create(model="tiny", prompt="A dog", max_tokens=3, logprobs=2).choices[0].logprobs
    )
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == 3
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset == [0, len(logprobs.tokens[0]), len(logprobs.tokens[0] + logprobs.tokens[1])]


def test_sampling_stops_and_logprobs(client: openai.OpenAI, exact: Assistant) -> None:
    messages: Any = [{"role": "user", "content": "What is in the picture?"}]
    drawn = [
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, temperature=1.5, top_p=0.9, seed=seed
        ).choices[0].message.content
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]
    sampling: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "seed": 1, "max_new_tokens": 12}
    assert drawn[0] == naive(exact, Message("user", ("What is in the picture?",)), **sampling)
    full_answer = naive(exact, Message("user", ("What is in the picture?",)), max_new_tokens=12)
    stop = full_answer[4:6]
    cut = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, stop=[stop])
    assert cut.choices[0].message.content == full_answer[: full_answer.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in logprobs.content)  # greedy
    assert all(len(token.top_logprobs) == 3 for token in logprobs.content)


def test_the_model_s_folder_says_how_answers_are_drawn(
    local: Any, exact: Assistant, penalising: Path
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 12}
    messages: Any = [{"role": "user", "content": "What?"}]
    with local(folder=penalising) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        chat = client.chat.completions.create(messages=messages, **asked)
        plain = client.chat.completions.create(
            messages=messages, extra_body={"repetition_penalty": 1.0}, **asked
        )
        asked["max_tokens"] = 60  # long enough for words to come again
        text = client.completions.create(prompt="A dog", **asked)
        other = client.completions.create(prompt="A dog", extra_body={"repetition_penalty": 1.0}, **asked)
    question = Message("user", ("What?",))
    reference = naive(exact, question, max_new_tokens=12, repetition_penalty=9.0)
    assert chat.choices[0].message.content == reference
    assert plain.choices[0].message.content == naive(exact, question, max_new_tokens=12) != reference
    assert text.choices[0].text != other.choices[0].text


def test_the_model_s_beams(local: Any, exact: Assistant, searching: Path) -> None:
    """They bring an answer as a whole, and give way to what they do not go with."""
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 12}
    asked["messages"] = [{"role": "user", "content": "What?"}]
    with local(folder=searching) as url:
        create = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0).chat.completions.create
        answer = create(**asked)
        both = create(**asked, n=2)
        stream = [c.choices[0].delta.content for c in create(**asked, stream=True) if c.choices]
        scored = create(**asked, logprobs=True)
        drawn = create(**asked, temperature=1.0, seed=3)
        held = create(**asked | {"max_tokens": 40}, extra_body={"structured_outputs": {"json": WORD}})
        # What says how words are drawn asks for nothing where none is drawn.
        same = [create(**asked, **one) for one in ({"top_p": 1}, {"top_p": 0.9, "temperature": 0, "seed": 4})]
        off = [create(**asked, extra_body=one) for one in ({"num_beams": 1}, {"use_beam_search": False})]
        longer = create(**asked, extra_body={"length_penalty": 4.0})
    expected = exact.ask(None, "What?", max_new_tokens=12, num_beams=3, length_penalty=0.5)
    greedy = exact.ask(None, "What?", max_new_tokens=12)
    assert answer.choices[0].message.content == expected != greedy
    assert [one.message.content for one in both.choices] == [expected] * 2
    assert [piece for piece in stream if piece] == [expected]
    assert scored.choices[0].message.content == greedy
    other = exact.ask(None, "What?", max_new_tokens=12, temperature=1.0, seed=3)
    assert drawn.choices[0].message.content == other
    assert json.loads(held.choices[0].message.content or "") in WORDS
    assert [one.choices[0].message.content for one in same] == [expected] * 2
    assert [one.choices[0].message.content for one in off] == [greedy] * 2
    other = exact.ask(None, "What?", max_new_tokens=12, num_beams=3, length_penalty=4.0)
    assert longer.choices[0].message.content == other


def test_what_draws_beside_beams_and_beside_a_model_s_temperature() -> None:
    """Clients send it with every request: without a temperature it is left out, with one it counts."""
    drawing = {"temperature": 0.7}
    request = ChatRequest.model_validate(ask("What?") | {"top_p": 0.9})
    assert sampling_of(request, drawing, 8, 8)["top_p"] == 0.9
    assert "top_p" not in sampling_of(request, {}, 8, 8)
    searched = sampling_of(request.model_copy(update={"num_beams": 3}), drawing, 8, 8)
    assert "top_p" not in searched
    check_sampling(searched, drawing, is_held=False)


def test_what_turns_off_or_replaces_the_beams_of_a_folder_is_not_dropped() -> None:
    body = json.dumps(ask("What?") | {"use_beam_search": False, "length_penalty": 1}).encode()
    sampling = sampling_of(parse(ChatRequest, body), {"num_beams": 3, "length_penalty": 0.5}, 8, 8)
    assert (sampling["num_beams"], sampling["length_penalty"]) == (1, 1)


def test_a_length_penalty_does_not_go_with_an_answer_in_a_given_form() -> None:
    """Also where the model's folder asks for beams: the answer has none."""
    for given in ({"length_penalty": 4.0}, {"num_beams": 2}):
        with pytest.raises(ApiError, match="not go with an answer in a given form; give") as error:
            check_sampling(given, {"num_beams": 3}, is_held=True)
        assert error.value.param == next(iter(given))
    check_sampling({"num_beams": 1, "length_penalty": 1.0}, {"num_beams": 3}, is_held=True)


def test_a_stop_text_ends_a_beam_of_a_text(server: str) -> None:
    """The search ends there; it is not the longest answer that is cut."""
    asked = {"prompt": "A dog", "max_tokens": 60, "num_beams": 3, "length_penalty": 0.0}
    whole, stopped = (
        post(server, asked | stop, "/v1/completions").json()["choices"][0]
        for stop in ({}, {"stop": [*"aeiou "]})
    )
    assert (whole["finish_reason"], stopped["finish_reason"]) == ("length", "stop")
    assert not set(stopped["text"]) & set("aeiou ")
    assert not whole["text"].startswith(stopped["text"])


def test_beams_that_a_client_asks_for(server: str, exact: Assistant) -> None:
    asked = {"max_new_tokens": 12, "num_beams": 3, "length_penalty": 0.5}
    expected = exact.ask(None, "What?", **asked)
    beams = {"num_beams": 3, "length_penalty": 0.5, "max_tokens": 12, "early_stopping": False}
    tool = {"type": "function", "function": {"name": "f"}}
    for more in ({}, {"n": 1, "top_p": 0.9}, {"tools": [tool]}, {"logprobs": False}):
        answer = post(server, ask("What?") | beams | more).json()["choices"][0]["message"]["content"]
        assert answer == expected
    with httpx.stream(
        "POST", f"{server}/v1/chat/completions", json=ask() | beams | {"stream": True}
    ) as lines:
        chunks = [json.loads(line[6:]) for line in lines.iter_lines() if line.startswith("data: {")]
    pieces = [piece for one in chunks if (piece := one["choices"][0]["delta"].get("content"))]
    assert pieces == [expected]
    stop = expected[2:4]
    stopped = post(server, ask("What?") | beams | {"stop": stop}).json()["choices"][0]
    assert stopped["message"]["content"] == exact.ask(None, "What?", **asked, stop=stop)
    assert (
        post(server, {"prompt": "A dog"} | beams, "/v1/completions").json()["choices"][0]["text"]
        != (
            post(server, {"prompt": "A dog", "max_tokens": 12}, "/v1/completions").json()["choices"][0][
                "text"
            ]
        )
    )


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"num_beams": 3, "temperature": 1}, "num_beams", "does not go with temperature; give num_beams 1"),
        ({"num_beams": 3, "frequency_penalty": 1}, "num_beams", "does not go with frequency_penalty"),
        ({"num_beams": 3, "logprobs": 1}, "num_beams", "does not go with logprobs"),
        ({"num_beams": 3, "n": 2}, "n", "should be 1 beside num_beams"),
        ({"num_beams": 3, "guided_regex": "a+"}, "num_beams", "an answer in a given form; give num_beams 1"),
        ({"length_penalty": 0.5}, "length_penalty", "does nothing without beams"),
        ({"num_beams": 65}, "num_beams", "less than or equal to 64"),
        ({"length_penalty": 11}, "length_penalty", "less than or equal to 10"),
        ({"use_beam_search": True}, "use_beam_search", "num_beams (not n) is the number of beams"),
        ({"use_beam_search": False, "num_beams": 2}, "use_beam_search", "num_beams (not n) is"),
        ({"num_beams": 3, "early_stopping": True}, "early_stopping", "unknown field 'early_stopping'"),
    ],
)
def test_beams_that_a_client_cannot_have(server: str, more: dict[str, Any], param: str, message: str) -> None:
    for path, body in (("/v1/chat/completions", ask()), ("/v1/completions", {"prompt": "A dog"})):
        asked = body | more
        if path.endswith("chat/completions") and "logprobs" in more:
            asked["logprobs"] = True
        response = post(server, asked, path)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param)
        assert message in error["message"]


def test_many_at_once_answer_as_alone(server: str, exact: Assistant) -> None:
    questions = [(f"What is {n}?", picture(n % 3)) for n in range(12)]
    expected = [naive(exact, user(text, image), max_new_tokens=8) for text, image in questions]

    def answer(question: tuple[str, bytes]) -> str:
        response = post(server, ask(question[0], question[1]))
        return str(response.json()["choices"][0]["message"]["content"])

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(answer, questions)) == expected


def test_texts_that_look_like_control(server: str, exact: Assistant) -> None:
    text = "<image> <|im_end|> {{x}}"
    response = post(server, ask(text))
    assert response.json()["choices"][0]["message"]["content"] == naive(
        exact, Message("user", (text,)), max_new_tokens=8
    )


def test_two_leading_instructions_become_one(server: str, exact: Assistant) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "What?"},
    ]
    answer = post(server, {"messages": messages, "max_tokens": 8}).json()["choices"][0]["message"]["content"]
    system = Message("system", ("Be brief.\n\nBe kind.",))
    assert answer == naive(exact, system, Message("user", ("What?",)), max_new_tokens=8)


def test_every_way_to_write_a_picture(server: str) -> None:
    data = picture(5, file_format="JPEG")
    usual = data_uri(data, "jpeg")
    broken_lines = usual[:60] + "\n" + usual[60:]
    urls = [usual, data_uri(data, "png"), broken_lines, usual.rstrip("=")]
    answers = set()
    for url in urls:
        content = [
            {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
            {"type": "text", "text": "?"},
        ]
        response = post(server, {"messages": [{"role": "user", "content": content}], "max_tokens": 8})
        assert response.status_code == 200, response.text
        answers.add(response.json()["choices"][0]["message"]["content"])
    assert len(answers) == 1


def test_streams_are_server_sent_events(server: str) -> None:
    with httpx.stream("POST", f"{server}/v1/chat/completions", json=ask(stream=True), timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines[:-1]]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("usage" not in event for event in events)


def test_answers_that_are_json(client: openai.OpenAI, server: str) -> None:
    schema = {
        "type": "object",
        "properties": {"animal": {"enum": ["dog", "cat"]}, "many": {"type": "boolean"}},
        "required": ["animal", "many"],
        "additionalProperties": False,
    }
    response_format: Any = {
        "type": "json_schema",
        "json_schema": {"name": "seen", "schema": schema, "strict": True},
    }
    messages: Any = [user_message("What is it?", picture(4))]
    for _ in range(2):  # the second time from the cache of schemas
        answer = client.chat.completions.create(
            model="tiny", messages=messages, response_format=response_format, max_tokens=100
        )
        values = json.loads(answer.choices[0].message.content or "")
        assert values["animal"] in ("dog", "cat")
        assert isinstance(values["many"], bool)
        assert answer.choices[0].finish_reason == "stop"
    response_format["json_schema"]["schema"] = {"type": "nonsense"}
    error = post(server, ask(response_format=response_format)).json()["error"]
    assert (error["param"], error["code"]) == ("response_format", "invalid_json_schema")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_schema_that_fails_in_the_midst_is_the_request_s_own_fault(
    server: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """As one does that turns out to be too complex after some tokens."""
    accept, tokens = GrammarAnswer.accept, 0

    def failing(answer: GrammarAnswer, token: int) -> None:
        nonlocal tokens
        tokens += 1
        if tokens == 3:
            raise refused("too complex", "JSON schema")
        accept(answer, token)

    monkeypatch.setattr(GrammarAnswer, "accept", failing)
    caplog.set_level("INFO", "pumice.serve")
    schema = {"type": "string", "minLength": 9}
    form = {"type": "json_schema", "json_schema": {"name": "texts", "schema": schema}}
    response = post(server, ask(response_format=form, max_tokens=40, stream=streamed))
    assert response.status_code == (200 if streamed else 400)
    text = response.text.strip().splitlines()[-1].removeprefix("data: ") if streamed else response.text
    error = json.loads(text)["error"]
    assert error["type"] == "invalid_request_error"
    assert "JSON schema cannot be followed" in error["message"]
    wait_until(lambda: any(record.message == "request" for record in caplog.records))
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def test_an_answer_is_explained(server: str, exact: Assistant) -> None:
    messages = [user_message("What is it?", picture(1)), {"role": "assistant", "content": "A 😀 dog."}]
    values = post(server, {"messages": messages}, "/explain").json()
    expected = exact.explain(picture(1), "What is it?", "A 😀 dog.")
    assert [word["text"] for word in values["words"]] == [word.text for word in expected.words]
    assert [w["shown"] for w in values["words"]] == pytest.approx(expected.reliance.shown, abs=1e-3)
    assert [w["grey"] for w in values["words"]] == pytest.approx(expected.reliance.grey, abs=1e-3)


def test_numbers_that_are_not_finite_are_the_servers_fault(
    local: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with local(folder=folder) as url:
        for more in ({}, {"temperature": 0.7}, {"stream": True}):
            answer = post(url, ask(**more))
            assert answer.status_code == 500
            assert "weights decoder.norm.weight hold nan or inf" in answer.json()["error"]["message"]
