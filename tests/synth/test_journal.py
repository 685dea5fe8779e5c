"""The journal's promises, the budget, the endpoint's words, duplicates, statistics and the report."""

from __future__ import annotations

import asyncio
import base64
import html
import io
import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pumice.chat_client import judge
from pumice.data.rows import ImageFinder
from pumice.errors import InputError
from pumice.images import data_url, image_key
from pumice.synth import kinds, report
from pumice.synth.checks import CheckSettings, examine, row
from pumice.synth.duplicates import SeenRows
from pumice.synth.endpoint import Endpoint, examine_reply, reply_text
from pumice.synth.journal import Journal, TeacherRequest, failed, reply
from pumice.synth.kinds.base import Draft
from pumice.synth.objects import Vocabulary
from pumice.synth.statistics import Statistics, question_type

ASKED = TeacherRequest("r1", (("system", "Be brief."),), "a dog", 100)
PLACE = Endpoint("http://here/v1", "m", budget_tokens=1000)


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append([*journal.sent(ASKED, (50, 100), "m"), reply("r1", "raw", (40, 7))])
    with path.open("ab") as file:
        file.write(b'{"event": "reply", "id": "r2", "ra')
    again = Journal(path)
    assert (again.reply("r1"), "r2" in again, again.tally.damaged) == ("raw", False, 1)
    again.append([reply("r3", "third \u00e9", (1, 1))])
    assert again.reply("r3") == "third \u00e9"
    third = Journal(path)
    assert (third.reply("r3"), third.tally.damaged, third.tally.replies) == ("third \u00e9", 1, 2)
    assert path.read_bytes().count(b'"event": "prompt"') == 1


@pytest.mark.parametrize(
    "line",
    [
        "[]", "1", "null", '{"event": "sent", "id": "r2"}', '{"event": "other", "id": "r2", "cost": [1, 2]}',
        '{"event": "reply", "id": "r2", "cost": [1, 2]}', '{"event": "reply", "id": ["r2"], "cost": "x"}',
        '{"event": "sent", "id": "r2", "reserved": [1], "bytes": 2}',
        '{"event": "failed", "id": 1, "cost": 3}',
        '{"event": "reply", "id": "r2", "raw": "x", "cost": [1e999, 2]}', "[" * 100_000,
        '{"event": "failed", "id": "r2", "why": {}, "cost": [{}, 0]}', "1" * 5000,
    ],
)  # fmt: skip
def test_a_damaged_record_is_counted_and_passed_over(tmp_path: Path, line: str) -> None:
    journal = Journal(tmp_path / "j")
    journal.append([*journal.sent(ASKED, (50, 100), "m"), reply("r1", "raw", (40, 7))])
    with (tmp_path / "j").open("a") as file:
        file.write(line + "\n")
    again = Journal(tmp_path / "j")
    assert (again.tally.damaged, again.tally.replies, again.tally.tokens_in) == (1, 1, 40)
    assert (again.reply("r1"), again.reply("r2"), again.why) == ("raw", None, {})


def test_a_call_without_an_outcome_counts_as_spent(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(journal.sent(ASKED, (50, 100), "m"))
    assert (journal.tally.tokens_in, journal.tally.lost) == (0, 0)
    assert journal.settle() == ["r1"]
    assert (journal.tally.tokens_in, journal.tally.tokens_out, journal.tally.lost) == (50, 100, 1)
    # Sent again and answered: both are paid for.
    journal.append([*journal.sent(ASKED, (50, 100), "m"), reply("r1", "raw", (40, 7))])
    assert (journal.tally.tokens_in, journal.tally.sent, journal.why) == (90, 2, {})
    again = Journal(tmp_path / "j")
    assert (again.tally.tokens_in, again.tally.lost) == (90, 1)


def test_calls_that_never_left_do_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append([*journal.sent(ASKED, (50, 100), "m"), failed("r1", "unreachable", None, "", (0, 0))])
    assert journal.tally.to_dict()["calls"] == 0
    assert journal.why == {"r1": "unreachable"}


def test_the_budget_waits_for_reservations() -> None:
    from pumice.synth.endpoint import Budget

    async def story() -> None:
        bound = sum(PLACE.bound(ASKED)) + 1
        budget = Budget(PLACE, (1000 - 2 * bound, 0))
        first, second = await budget.reserve(ASKED), await budget.reserve(ASKED)
        assert first is not None and second is not None
        third = asyncio.create_task(budget.reserve(ASKED))
        await asyncio.sleep(0)
        assert not third.done()
        await budget.settle(first, (1, 1))
        await asyncio.sleep(0)
        assert not third.done()  # two tokens too many
        await budget.settle(second, (0, 0))
        assert await third is not None
        await budget.settle(first, (2000, 0))
        assert budget.scale > 1
        assert await budget.reserve(ASKED) is None

    asyncio.run(asyncio.wait_for(story(), 60))


def test_the_bound_holds_for_any_text() -> None:
    odd = TeacherRequest("r", (("system", "\u00e4\U0001f600"),), "\u4e2d", 9)
    assert PLACE.bound(odd)[0] >= 2 + 4 + 3
    limited = Endpoint("http://h/v1", "m", options={"max_tokens": None, "max_completion_tokens": 50})
    assert limited.bound(odd)[1] == 50
    assert "max_tokens" not in limited.body(odd)


def test_pace() -> None:
    from pumice.chat_client import Pace

    async def waits() -> list[float]:
        pace = Pace(120)
        return [pace.delay() for _ in range(3)]

    assert asyncio.run(waits()) == pytest.approx([0, 0.5, 1.0], abs=0.05)


def completion(finish: str = "stop", **message: Any) -> str:
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], "usage": usage})


LATER = "30 seconds from when the test runs, as a date"


@pytest.mark.parametrize(
    ("status", "headers", "raw", "expected_outcome", "reason"),
    [
        (200, {}, completion(content="Hi."), "reply", ""),
        (200, {}, completion(content=[{"type": "text", "text": "Hi."}]), "reply", ""),
        (200, {}, completion(content="", refusal="No."), "refused", "refusal"),
        (200, {}, completion(content="I'm sorry, I can't."), "refused", "refusal"),
        (200, {}, completion(content=""), "again", "empty"),
        (200, {}, completion("length", content=""), "leave", "no room"),
        (200, {}, completion("length", content="Hi."), "reply", ""),
        (200, {}, completion(content="Hi.")[:-9], "again", "truncated"),
        (200, {}, "", "again", "truncated"),
        (200, {}, "<html>", "foreign", "not JSON"),
        (200, {}, '{"ok": true}', "foreign", "not a completion"),
        (200, {}, '{"error": {"code": 429, "message": "slow"}}', "again", "429"),
        (429, {"retry-after": "7"}, "{}", "again", "429"),
        (429, {"retry-after": "7000"}, "{}", "stop", "429"),
        (429, {}, '{"error": {"code": "insufficient_quota"}}', "stop", "429"),
        (503, {"retry-after": LATER}, "busy", "again", "503"),
        (401, {}, "{}", "stop", "401"),
        (403, {}, "{}", "stop", "403"),
        (404, {}, "{}", "stop", "404"),
        (302, {}, "", "foreign", "302"),
        (422, {}, "{}", "leave", "422"),
    ],
)
def test_what_an_answer_means(
    status: int, headers: dict[str, str], raw: str, expected_outcome: str, reason: str
) -> None:
    if headers.get("retry-after") == LATER:
        date = datetime.now(timezone.utc) + timedelta(seconds=30)
        headers = {"retry-after": format_datetime(date, usegmt=True)}
    outcome = examine_reply(judge(status, headers, raw, PLACE), PLACE)
    assert (outcome.what, outcome.why) == (expected_outcome, reason)
    if expected_outcome == "reply":
        assert (reply_text(raw), outcome.cost) == ("Hi.", (5, 3))
    if headers and expected_outcome == "again":
        assert outcome.wait is not None
        assert 6 < outcome.wait <= 30


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"url": "here"}, "write an address such as"),
        ({"timeout": -1.0}, "timeout is -1.0; give a number above 0"),
        ({"budget_tokens": -1}, "budget tokens is -1; give 0 or more"),
        ({"backoff": -1.0}, "backoff is -1.0; give 0 or more"),
        ({"budget_money": 1.0}, "a budget in money needs both prices"),
    ],
)
def test_bad_endpoints(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Endpoint(**{"url": "http://here/v1", "model": "m", **values}).check()


def test_without_the_library_of_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pumice.chat_client.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the openai library: pip install .*\[eval\]'"):
        PLACE.check()


def test_pictures_of_rarer_formats_are_shown_as_jpeg(tmp_path: Path) -> None:
    for suffix, kind in (("png", "png"), ("bmp", "jpeg"), ("tiff", "jpeg")):
        path = tmp_path / f"x.{suffix}"
        Image.new("RGB", (9, 7), "red").save(path)
        head, _, data = data_url(path).partition(",")
        assert head == f"data:image/{kind};base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == kind.upper()


def test_near_duplicates() -> None:
    random = np.random.default_rng(0)
    words = [f"word{n}" for n in range(500)]
    seen_rows = SeenRows(0.8)
    texts = [" ".join(random.choice(words, 60)) for _ in range(50)]
    assert [seen_rows.like(str(n), text) for n, text in enumerate(texts)] == [None] * 50
    changed = texts[7].replace(texts[7].split()[0], "other", 1)
    assert seen_rows.like("x", changed.upper() + "!") == "7"
    assert seen_rows.like("y", texts[7], scope="elsewhere") is None
    half = " ".join([*texts[9].split()[:30], *random.choice(words, 30)])
    assert seen_rows.like("z", half) is None


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("How many dogs are there?", "how many"),
        ("<image>\nWhat color is it?", "what colour"),
        ("What is the man doing?", "what is ... doing"),
        ("Is there a cat?", "is there"),
        ("Name the animal.", "name the"),
        ("?", "other"),
    ],
)
def test_question_types(question: str, name: str) -> None:
    assert question_type(question) == name


def make_statistics(pictures: int, shown: int) -> Statistics:
    statistics = Statistics({"calls": 3, "failures": {"500": 1}, "tokens_in": 9, "tokens_out": 4}, shown)
    kind = kinds.get("conversation")
    draft = examine(kind, kind.examples[0].context, kind.examples[0].reply, Vocabulary(), CheckSettings())
    assert isinstance(draft, Draft)
    for number in range(pictures):
        image = f"{number}.jpg"
        values = {"id": f"bad-{number}", "image": image, "kind": "detail", "reason": "length"}
        statistics.rejected("detail", {**values, "detail": "short", "reply": "<script>alert(1)</script>"})
        shot = Draft(
            kind, type(draft.context)(str(number), image), draft.turns, draft.vocabulary, draft.known
        )
        statistics.kept(shot, row(f"good-{number}", shot))
    return statistics


def test_statistics_are_bounded() -> None:
    statistics = make_statistics(50, 5)
    assert len(statistics.sample) == 5
    assert all(len(rows) == 2 for rows in statistics.sample.values())
    values = statistics.to_dict()
    assert (values["requests"], values["rows"]) == (100, 50)
    assert values["kinds"]["detail"]["rejected"] == {"length": 50}
    assert values["nouns"]["boat"] == 50


def test_the_report_is_one_safe_file(tmp_path: Path) -> None:
    Image.new("RGB", (900, 600), "blue").save(tmp_path / "0.jpg")
    report.write(tmp_path / "r.html", make_statistics(2, 5), "Rows </script> by m", ImageFinder(tmp_path))
    page = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("</script>") == 1
    assert page.count("data:image/jpeg;base64,") == 1  # the other picture is not there, which is said
    assert "picture '1.jpg' is not in" in html.unescape(page)
    assert page.count('<section class="row"') == 4
    assert "prefers-color-scheme: dark" in page and 'download = "marks.json"' in page
    assert "http://" not in page and "https://" not in page
    assert "{{" not in page


def test_a_picture_that_changed_since_the_request_was_made_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "latest.png"
    Image.new("RGB", (4, 4), "red").save(file)
    asked = replace(ASKED, image=str(file), image_key=image_key(file))
    assert asked.picture() == file.read_bytes()
    Image.new("RGB", (4, 4), "blue").save(file)
    with pytest.raises(InputError, match=r"latest\.png' has changed since the run began"):
        asked.picture()
    file.unlink()
    with pytest.raises(InputError, match=r"latest\.png' does not exist"):
        Endpoint("http://127.0.0.1:1/v1", "teacher").body(asked)
    assert ASKED.picture() is None
