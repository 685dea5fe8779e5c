"""Whole runs against an endpoint on this machine: failures, kills, budgets, bad endpoints."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pumice.assistant import load
from pumice.chat_client import judge
from pumice.cli import app
from pumice.errors import InputError
from pumice.synth.endpoint import Endpoint
from pumice.synth.journal import Journal, TeacherRequest
from pumice.synth.settings import read_settings
from pumice.synth.teachers import LocalTeacher, flat

KINDS = ["--kind", "conversation", "--kind", "detail", "--kind", "short-answer"]
FAILURES = ("429", "500", "hang", "truncated", "refusal")


def thirty_percent(key: str, call: int) -> str:
    """30% of all calls fail, in each of the five ways; which ones is settled by the request and its count."""
    roll = int(hashlib.sha256(f"{key}/{call}".encode()).hexdigest(), 16) % 1000
    return FAILURES[roll // 60] if roll < 300 else ""


def command(out: Path, url: str, pictures: Path, *more: str) -> list[str]:
    words = ["data", "generate", str(out), "--teacher", url, "--model", "m", "--jsonl", str(pictures)]
    return [*words, *(["--set", "endpoint.backoff=0.02"] if url != "local" else []), *more]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, command(*arguments))


def refused(result: Any, message: str) -> None:
    """Status 2 and one line with the message, after what was told about the cost."""
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("pumice: ")
    assert message in last


@pytest.fixture
def many_pictures(pictures: Callable[[int], Path]) -> Path:
    return pictures(20)


def files(out: Path) -> tuple[str, str]:
    return (out / "rows.jsonl").read_text(), (out / "rejected.jsonl").read_text()


def test_a_failing_endpoint(endpoint: Any, many_pictures: Path, tmp_path: Path) -> None:
    """The run completes, its count of calls is the endpoint's, and rows come as if nothing had failed."""
    plain = run(tmp_path / "plain", endpoint.url, many_pictures, *KINDS)
    assert plain.exit_code == 0, plain.output
    assert endpoint.total == 60
    endpoint.calls.clear()
    endpoint.fail = thirty_percent
    result = run(
        tmp_path / "out", endpoint.url, many_pictures, *KINDS, "--set", "endpoint.timeout=3", "--json"
    )
    assert result.exit_code == 0, result.output
    calls = json.loads(result.stdout)["calls"]
    assert calls["calls"] == endpoint.total > 70
    assert set(calls["failures"]) >= {"429", "500", "timeout", "truncated", "refusal"}
    assert calls["replies"] == 60
    assert calls["calls"] == 60 + sum(calls["failures"].values()) - calls["failures"].get("unreachable", 0)
    assert files(tmp_path / "out") == files(tmp_path / "plain")
    assert len(files(tmp_path / "out")[0].splitlines()) == 60


def test_no_row_that_survives_is_failed_work(
    endpoint: Any, pictures: Callable[[int], Path], tmp_path: Path
) -> None:
    endpoint.reply = lambda system, user: "Hm."
    few = pictures(2)
    result = run(tmp_path / "out", endpoint.url, few, *KINDS)
    assert result.exit_code == 1
    assert result.stdout.startswith("0 of 6 rows survived")
    last = result.stderr.splitlines()[-1]
    assert last == f"pumice: no row of 6 survived; {tmp_path / 'out' / 'report.html'} says why"
    assert run(tmp_path / "out", endpoint.url, few, *KINDS, "--offline").exit_code == 1


def test_running_again_costs_no_call(endpoint: Any, many_pictures: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "out", endpoint.url, many_pictures).exit_code in (0, 1)
    before, calls = files(tmp_path / "out"), endpoint.total
    strict = run(tmp_path / "out", endpoint.url, many_pictures, "--set", "similar=0.05")
    assert endpoint.total == calls
    assert files(tmp_path / "out") != before, strict.output
    run(tmp_path / "out", endpoint.url, many_pictures)
    assert files(tmp_path / "out") == before


def test_kill_at_five_moments(endpoint: Any, pictures: Callable[[int], Path], tmp_path: Path) -> None:
    """SIGKILL five times: only what was under way is sent again, and the files are as of a run in one go."""
    endpoint.delay, few = 0.1, pictures(16)
    options = (*KINDS, "--parallel", "3")
    assert run(tmp_path / "whole", endpoint.url, few, *options).exit_code == 0
    endpoint.calls.clear()
    out, moments, sent = tmp_path / "out", random.Random(7), [Counter[str]()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for number in range(5):
        # The next kill comes after some more calls, and then at any point within the time of one. Later calls
        # get no reply, so that the run never ends before the kill.
        enough = endpoint.total + moments.randrange(1, 5)
        endpoint.fail = lambda _, __, last=enough + 3: "hang" if endpoint.total > last else ""
        process = subprocess.Popen(
            [sys.executable, "-m", "pumice", *command(out, endpoint.url, few, *options)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while endpoint.total < enough and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (number, process.stderr and process.stderr.read())
        assert not (out / "rows.jsonl").exists()
        sent.append(Counter(endpoint.calls))
    assert len(endpoint.calls) < 48
    endpoint.fail = lambda *_: ""
    done = run(out, endpoint.url, few, *options, "--json")
    assert done.exit_code == 0, done.output
    sent.append(Counter(endpoint.calls))
    # A kill repeats the calls under way, three at most, and no call that was answered before.
    for before, after in pairwise(sent):
        again = [key for key in after - before if key in before]
        assert len(again) <= 3
    calls = json.loads(done.stdout)["calls"]
    assert len(endpoint.calls) == calls["replies"] == 48
    # What a kill cut off before it was sent is in the journal as well, and counts as lost.
    assert endpoint.total - 48 <= calls["lost"] <= 15
    assert calls["calls"] == 48 + calls["lost"]
    assert files(out) == files(tmp_path / "whole")


def test_the_budget_is_kept(endpoint: Any, many_pictures: Path, tmp_path: Path) -> None:
    endpoint.fail = lambda key, call: "refusal" if thirty_percent(key, call) else ""
    result = run(tmp_path / "out", endpoint.url, many_pictures, *KINDS, "--budget-tokens", "20000")
    assert result.exit_code == 1
    assert "have no reply: the budget holds no further call; raise it" in result.stderr
    assert 10_000 < sum(endpoint.tokens) <= 20_000
    # A later run may still make a call that is smaller than the one that did not fit, whichever that was.
    again = run(tmp_path / "out", endpoint.url, many_pictures, *KINDS, "--budget-tokens", "20000")
    assert again.exit_code == 1
    assert sum(endpoint.tokens) <= 20_000
    more = run(tmp_path / "out", endpoint.url, many_pictures, *KINDS, "--budget-tokens", "200000")
    assert more.exit_code == 0, more.output
    assert sum(endpoint.tokens) > 20_000


def test_a_budget_in_money(endpoint: Any, many_pictures: Path, tmp_path: Path) -> None:
    prices = ("--set", "endpoint.prices=[1000, 4000]")
    result = run(
        tmp_path / "out", endpoint.url, many_pictures, *KINDS, *prices, "--set", "endpoint.budget_money=15"
    )
    assert result.exit_code == 1
    assert "in money (at most" in result.stderr
    spent = (endpoint.tokens[0] * 1000 + endpoint.tokens[1] * 4000) / 1e6
    assert 5 < spent <= 15
    refused(
        run(tmp_path / "other", endpoint.url, many_pictures, "--set", "endpoint.budget_money=1"),
        "a budget in money needs both prices; give --set 'endpoint.prices=[IN, OUT]'",
    )


def test_estimate_makes_no_call(endpoint: Any, many_pictures: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "out", endpoint.url, many_pictures, *KINDS, "--estimate", "--json")
    guess = json.loads(result.stdout)
    assert (result.exit_code, endpoint.total, guess["requests"]) == (0, 0, 60)
    assert run(tmp_path / "out", endpoint.url, many_pictures, *KINDS).exit_code == 0
    assert guess["most"][0] >= endpoint.tokens[0]
    assert 0.5 < guess["tokens_in"] / endpoint.tokens[0] < 2


def test_retry_after_is_honoured(endpoint: Any, pictures: Callable[[int], Path], tmp_path: Path) -> None:
    """Once the endpoint asks for a pause, nobody calls before it is over."""
    times: list[float] = []

    def fail(key: str, call: int) -> str:
        times.append(time.monotonic())
        return "429" if len(times) == 3 else ""

    endpoint.fail = fail
    sent = endpoint.send
    endpoint.send = lambda handler, status, text, headers: sent(
        handler, status, text, {"Retry-After": "0.6"} if status == 429 else headers
    )
    result = run(tmp_path / "out", endpoint.url, pictures(6), *KINDS, "--parallel", "1")
    assert result.exit_code == 0, result.output
    assert times[3] - times[2] >= 0.6
    assert len(times) == 19


def test_a_crowded_endpoint_is_no_reason_to_give_up(
    endpoint: Any, many_pictures: Path, tmp_path: Path
) -> None:
    """One call in three gets through, the others are put off: some more often than failures are allowed."""
    put_off: Counter[str] = Counter()

    def fail(key: str, call: int) -> str:
        if endpoint.total % 3 == 0:
            return ""
        put_off[key] += 1
        return "429"

    endpoint.fail = fail
    result = run(
        tmp_path / "out", endpoint.url, many_pictures, "--kind", "detail", "--set", "endpoint.attempts=3"
    )
    assert result.exit_code == 0, result.output
    assert (endpoint.modes["429"], endpoint.total) == (40, 60)
    assert max(put_off.values()) > 3


def test_many_at_once_but_no_more(endpoint: Any, pictures: Callable[[int], Path], tmp_path: Path) -> None:
    endpoint.delay = 0.1
    assert run(tmp_path / "out", endpoint.url, pictures(8), *KINDS, "--parallel", "8").exit_code == 0
    assert 4 <= endpoint.most_under_way <= 8


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("401", "refuses the key in $OPENAI_API_KEY (401: made up 401); set the right one"),
        ("404", "or its model 'm' is not there (404: made up 404); check both"),
        ("400", "does not take the request (400: made up 400); check the model's name and the options"),
        ("html", "does not speak the chat completions protocol (not JSON, it begins '<html><body>Welcome"),
    ],
)
def test_a_wrong_endpoint_costs_one_call(
    endpoint: Any, pictures: Callable[[int], Path], tmp_path: Path, mode: str, message: str
) -> None:
    endpoint.fail = lambda key, call: mode
    refused(run(tmp_path / "out", endpoint.url, pictures(2)), message)
    assert endpoint.total == 1
    journal = Journal(tmp_path / "out" / "journal.jsonl")
    assert (journal.tally.sent, journal.tally.damaged, journal.settle()) == (1, 0, [])


def test_nobody_there(pictures: Callable[[int], Path], tmp_path: Path) -> None:
    refused(
        run(tmp_path / "out", "http://127.0.0.1:9/v1", pictures(2)),
        "nothing answers at http://127.0.0.1:9/v1",
    )


def test_the_key_goes_into_the_header_alone(
    endpoint: Any, pictures: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    run(tmp_path / "out", endpoint.url, pictures(1), "--set", "endpoint.key_variable=MY_KEY", *KINDS)
    assert {headers["authorization"] for headers in endpoint.headers} == {"Bearer sk-secret"}
    assert len({headers["idempotency-key"] for headers in endpoint.headers}) == 3
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"sk-secret" not in written
    other_endpoint = Endpoint("http://127.0.0.1/v1", "m", "MY_KEY")
    assert (
        judge(401, {}, '{"error": "no such key: sk-secret"}', other_endpoint).raw
        == '{"error": "no such key: ***"}'
    )
    monkeypatch.setenv("MY_KEY", "sk-\u00e9")
    refused(
        run(tmp_path / "out", endpoint.url, pictures(1), "--set", "endpoint.key_variable=MY_KEY"),
        "the key in $MY_KEY holds",
    )


def test_a_local_teacher_knows_its_options() -> None:
    with pytest.raises(InputError, match="no sampling option 'max_tokens'; did you mean 'max_new_tokens'"):
        LocalTeacher("pumice-tiny", options={"max_tokens": 5}).check()


def test_a_local_teacher_s_options_are_checked_before_anything_is_sent(
    searching: Path, drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = "top_p does nothing where no word is drawn; give a temperature"
    useless = "length_penalty is 2, which does nothing without beams; give num_beams 2"
    for options, message in (({"top_p": 0.9}, idle), ({"length_penalty": 2}, useless)):
        with pytest.raises(InputError, match=message):
            LocalTeacher(str(searching), options=options).check()
    LocalTeacher(str(drawing), options={"top_p": 0.9}).check()
    # Of a model on the hub, it is known once that is opened.
    monkeypatch.setattr("pumice.formats.read.stored_generation", lambda _: None)
    teacher = LocalTeacher(str(searching), "cpu", options={"top_p": 0.9})
    teacher.check()
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(InputError, match=idle):
        teacher.answer([TeacherRequest("a", (), "What?", 8)], journal, lambda _: None)
    assert journal.tally.sent == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"repetition_penalty": 1.1}),
        ({"num_beams": 3, "length_penalty": 0.5}, {"num_beams": 3, "length_penalty": 0.5}),
        ({"repetition_penalty": 9.0}, {"repetition_penalty": 9.0}),
    ],
)
def test_beams_that_a_local_teacher_is_asked_for_turn_off_its_penalty(
    tiny_folder: Path, searching: Path, tmp_path: Path, options: Any, expected: Any
) -> None:
    """Those of the model's folder give way to the penalty."""
    request = TeacherRequest("a", (), "What?", 40)
    teacher, journal = LocalTeacher(str(searching), "cpu", options=options), Journal(tmp_path / "journal")
    teacher.check()
    teacher.answer([request], journal, lambda _: None)
    answer = load(tiny_folder, device="cpu").ask(None, flat(request), max_new_tokens=40, **expected)
    assert json.loads(journal.reply("a") or "") == {"text": answer}


def test_two_runs_at_once(endpoint: Any, pictures: Callable[[int], Path], tmp_path: Path) -> None:
    from pumice.files import Lock

    (tmp_path / "out").mkdir()
    lock = Lock(tmp_path / "out" / "run.lock")
    assert lock.acquire()
    refused(run(tmp_path / "out", endpoint.url, pictures(1)), "another run is using")


def test_the_picture_is_shown(endpoint: Any, pictures: Callable[[int], Path], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "p00000.jpg")
    show_options = ("--images", str(tmp_path), "--show", "--kind", "conversation")
    result = run(tmp_path / "out", endpoint.url, pictures(1), *show_options)
    assert result.exit_code == 0, result.output
    shown = endpoint.bodies[0]["messages"][-1]["content"][0]["image_url"]["url"]
    assert shown.startswith("data:image/jpeg;base64,")
    assert shown not in (tmp_path / "out" / "journal.jsonl").read_text()
    assert "data:image/jpeg;base64," in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "poem"], "there is no kind 'poem'; use one of conversation, detail"),
        (["--kind", "detail=2"], "the share of kind 'detail' is 2.0"),
        (["--kind", "detail=x"], "the share must be a number; write detail=0.5"),
        (["--parallel", "0"], "parallel is 0; give a number above 0"),
        (["--show"], "showing the pictures needs their folder; give --images"),
        (["--set", "options={"], "the value is not YAML"),
        (["--set", "similr=1"], "the settings have an unknown key 'similr'; did you mean 'similar'?"),
        (["--set", "endpoint.timeot=1"], "unknown key 'endpoint.timeot'; did you mean 'timeout'?"),
        (["--set", "endpoint.parallel=1"], "endpoint.parallel is no setting; write it one level up"),
        (["--set", "seed=many"], "the setting seed: Input should be a valid integer"),
        (["--set", "examples=-1"], "examples is -1; give 0 or more"),
        (["--settings", "nowhere.yaml"], "cannot read the settings nowhere.yaml"),
        (["--images", "nowhere"], "the image folder 'nowhere' does not exist"),
        (["--set", "endpoint.prices=[1]"], "the setting endpoint.prices.1: Field required"),
        (["--set", "options.max_tokens=-3"], "the option 'max_tokens' is -3; give a whole number above 0"),
        (["--set", "options.messages=[]"], "the option 'messages' is not one to set"),
    ],
)
def test_wrong_options(
    endpoint: Any, pictures: Callable[[int], Path], tmp_path: Path, options: list[str], message: str
) -> None:
    refused(run(tmp_path / "out", endpoint.url, pictures(1), *options), message)
    assert endpoint.total == 0


def test_the_documented_settings_are_settings(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "instruction-data.md"
    (block,) = re.findall(r"^```yaml\n(visual_genome:.*?)^```", page.read_text(), re.M | re.S)
    (tmp_path / "settings.yaml").write_text(block)
    teacher = {"teacher": "http://localhost:1/v1", "model": "m"}
    settings = read_settings(teacher, tmp_path / "settings.yaml", [])
    assert (settings.max_spoiled, settings.make_endpoint().per_minute) == (20, 500)


def test_settings_of_a_file(
    endpoint: Any, pictures: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option counts before --set, and that before the file; what none of them names has its default."""
    monkeypatch.setenv("MY_KEY", "of-my-own")
    file = tmp_path / "settings.yaml"
    file.write_text(
        "show: true\nkind: [conversation]\nlimit: 2\noptions: {temperature: 0.1, top_p: 0.5}\n"
        "endpoint: {key_variable: MY_KEY}\n"
    )
    more = ("--settings", file, "--kind", "detail", "--set", "show=false", "--set", "options.top_p=null")
    result = run(tmp_path / "out", endpoint.url, pictures(3), *map(str, more))
    assert result.exit_code == 0, result.output
    assert endpoint.total == 2
    asked = endpoint.bodies[0]
    assert (asked["temperature"], "top_p" in asked) == (0.1, False)
    assert endpoint.headers[0]["authorization"] == "Bearer of-my-own"
    rows = [json.loads(line) for text in files(tmp_path / "out") for line in text.splitlines()]
    assert {row["id"].rpartition("-")[2] for row in rows} == {"detail"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_lets_calls_end(
    endpoint: Any, many_pictures: Path, tmp_path: Path, number: signal.Signals
) -> None:
    endpoint.delay = 0.2
    options = (*KINDS, "--parallel", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "pumice", *command(tmp_path / "out", endpoint.url, many_pictures, *options)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while endpoint.total < 3:
        time.sleep(0.005)
    process.send_signal(number)
    _, output = process.communicate(timeout=60)
    assert (process.returncode, output.splitlines()[-1]) == (130, "pumice: interrupted")
    sent = endpoint.total
    journal = Journal(tmp_path / "out" / "journal.jsonl")
    assert (journal.tally.sent, journal.tally.replies, journal.settle()) == (sent, sent, [])
    assert sent < 60  # all that there were to send


def test_a_local_teacher(
    tiny_folder: Path, pictures: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of our own writes; what it writes is checked like anybody's, and is not asked for again."""
    (tmp_path / "say.py").write_text(
        "from pumice.synth.kinds.base import Kind, whole\n"
        "KIND = Kind('say', 'Say it.', (), whole(['What?']), words=(1, 50), max_tokens=8)\n"
    )
    kind_options = ["--kind", str(tmp_path / "say.py"), "--set", "device=cpu", "--language", "any", "--json"]
    arguments = command(tmp_path / "out", "local", pictures(3), *kind_options)
    arguments[arguments.index("m")] = str(tiny_folder)
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["requests"] == 3
    before = files(tmp_path / "out")
    assert sum(text.count("\n") for text in before) == 3
    monkeypatch.setattr("pumice.assistant.load", None)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert files(tmp_path / "out") == before


def test_a_prompt_that_a_local_model_cannot_hold(
    tiny_folder: Path, pictures: Callable[[int], Path], tmp_path: Path
) -> None:
    """Its context of 256 tokens is less than any worked example: one sentence, at the first answer."""
    arguments = command(tmp_path / "out", "local", pictures(3), "--set", "device=cpu")
    arguments[arguments.index("m")] = str(tiny_folder)
    refused(CliRunner().invoke(app, arguments), "256")
