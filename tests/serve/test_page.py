"""The page in a real browser: upload, ask, stream, stop, second turn, a server that dies and comes back."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from asking import picture

from pumice.engine.engine import Engine, Plan
from pumice.serve.page import files

if TYPE_CHECKING:
    from playwright.sync_api import Page

PATIENT = 120_000  # milliseconds


def write(page: Page, text: str) -> None:
    page.get_by_label("Your question", exact=True).last.fill(text)
    page.keyboard.press("Enter")


def answers(page: Page) -> list[str]:
    return page.locator(".assistant .said").all_inner_texts()


def answered(page: Page, count: int) -> list[str]:
    page.locator(".assistant .tools").nth(count - 1).wait_for()
    return answers(page)


def visit(page: Page, url: str, **choices: Any) -> None:
    page.goto(url)
    page.locator("body[data-ready]").wait_for()
    page.get_by_text("tiny", exact=True).wait_for()
    if choices:
        page.locator("#parameters > summary").click()
        for name, value in choices.items():
            page.locator(f"#{name}").fill(str(value))
        page.locator("#parameters > summary").click()


def test_a_conversation(page: Page, server: str, tmp_path: Path) -> None:
    asked: list[Any] = []
    page.on("request", lambda r: asked.append(r.post_data_json) if r.url.endswith("completions") else None)
    visit(page, server, max_tokens=8, seed=3)
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    page.locator("#files").set_input_files([tmp_path / "1.png", tmp_path / "2.png"])
    page.get_by_text("This conversation will show 2 pictures").wait_for()  # of which no folder says anything
    page.get_by_role("button", name="Remove 2.png").click()
    page.get_by_role("button", name="Remove 1.png").wait_for()
    assert page.locator("#many").is_hidden()
    write(page, "What is it?")
    [first] = answered(page, 1)
    assert page.locator(".user img").count() == 1
    write(page, "Sure?")
    answered(page, 2)
    body = asked[-1]
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert (
        body["messages"][1]["content"].strip() == first.strip()
        or first.strip() in body["messages"][1]["content"]
    )
    assert (body["max_tokens"], body["seed"], body["temperature"]) == (8, 3, 0)
    # a reload finds everything again
    page.reload()
    answered(page, 2)
    assert page.locator(".user img").count() == 1
    assert page.locator("#max_tokens").input_value() == "8"
    # changing the first question takes back what followed it
    page.locator(".user").first.hover()
    page.get_by_role("button", name="Edit the question: What is it?").click()
    page.get_by_text("You are changing an earlier question").wait_for()
    write(page, "Who is it?")
    answered(page, 1)
    page.get_by_text("Who is it?").wait_for()
    assert page.locator(".assistant").count() == 1
    page.get_by_role("button", name="Regenerate").click()
    answered(page, 1)
    assert asked[-1] == asked[-2]
    # and away with it
    page.locator("#menu > summary").click()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download as JSON").click()
    saved_chat = json.loads(Path(saved.value.path()).read_text(encoding="utf-8"))
    assert saved_chat["messages"][0]["content"][1]["text"] == "Who is it?"
    page.locator("#menu > summary").click()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download as Markdown").click()
    assert "**You**" in Path(saved.value.path()).read_text(encoding="utf-8")
    page.get_by_role("button", name="New", exact=True).click()
    page.get_by_text("Show a picture, ask about it.").wait_for()


HEAT = """canvas => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]
          .filter((value, place) => place % 4 === 3).some(Boolean)"""


def test_an_answer_is_explained(page: Page, server: str, tmp_path: Path) -> None:
    visit(page, server, max_tokens=8)
    (tmp_path / "1.png").write_bytes(picture(1))
    write(page, "Who?")
    answered(page, 1)
    assert (
        page.get_by_role("button", name="Explain").count() == 0
    )  # without a picture there is nothing to show
    page.get_by_role("button", name="New", exact=True).click()
    page.locator("#files").set_input_files(tmp_path / "1.png")
    write(page, "What is it?")
    answered(page, 1)
    write(page, "Sure?")
    answered(page, 2)
    page.get_by_role("button", name="Explain").first.click()  # any answer, not only the last
    heat, words = page.locator(".explained canvas"), page.locator(".px-word")
    words.first.wait_for()
    assert page.locator(".explained img").get_attribute("src") == page.locator(".user img").get_attribute(
        "src"
    )
    assert not heat.evaluate(HEAT)
    words.last.hover()
    page.get_by_text(re.compile("of the heat of")).wait_for()
    assert heat.evaluate(HEAT)
    page.mouse.move(0, 0)
    page.get_by_text(re.compile("of the heat of")).wait_for(state="detached")
    words.first.focus()
    page.get_by_text(re.compile("of the heat of")).wait_for()
    page.get_by_role("button", name="Explain").first.click()
    page.locator(".explained").wait_for(state="detached")
    assert page.locator(".assistant .said").first.is_visible()


def test_stopping_keeps_what_was_said(
    page: Page, local: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps, go = Engine.step, itertools.count(), threading.Event()

    def held(engine: Engine) -> bool:
        """Some steps, and no more until the test says so: the answer cannot end before it is stopped."""
        if next(steps) == 20:
            assert go.wait(PATIENT / 1000)
        return step(engine)

    monkeypatch.setattr(Engine, "step", held)
    with local() as url:
        visit(page, url, max_tokens=2000, temperature=1)
        write(page, "What is in the picture?")
        page.locator(".assistant .said p").first.wait_for()  # it streams
        page.get_by_role("button", name="Stop").click()
        [text] = answered(page, 1)
        assert text.strip()
        page.get_by_text(re.compile("stopped")).first.wait_for()
        go.set()
        page.locator("#max_tokens").evaluate("field => { field.value = 4 }")
        write(page, "Sure?")
        answered(page, 2)


def test_a_long_question_shows_how_much_of_it_is_read(
    page: Page, local: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, steps, go = Engine._run, itertools.count(1), threading.Event()

    def held(engine: Engine, plan: Plan) -> None:
        if next(steps) == 2:
            assert go.wait(PATIENT / 1000)
        run(engine, plan)

    monkeypatch.setattr(Engine, "_run", held)
    with local() as url:
        visit(page, url, max_tokens=4)
        write(page, "What is this? " * 30)
        page.get_by_text(re.compile(r"^64 of \d+ tokens read$")).wait_for()
        go.set()
        [text] = answered(page, 1)
        assert "tokens read" not in text


def test_an_answer_that_breaks_off_is_asked_for_again(page: Page, server: str) -> None:
    visit(page, server, max_tokens=6)
    piece = {"choices": [{"index": 0, "delta": {"content": "half of an ans"}, "finish_reason": None}]}
    broken = f"data: {json.dumps(piece)}\n\n"  # and no data: [DONE]
    kind = {"Content-Type": "text/event-stream"}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=broken, headers=kind), times=1)
    write(page, "What?")
    page.get_by_text("in the middle of its answer").wait_for()
    [text] = answered(page, 1)
    assert "half of an ans" not in text
    page.locator("#away").wait_for(state="hidden")


def test_an_example_and_a_wrong_file(page: Page, server: str, tmp_path: Path) -> None:
    visit(page, server, max_tokens=4)
    (tmp_path / "notes.txt").write_text("no picture")
    page.locator("#files").set_input_files(tmp_path / "notes.txt")
    page.get_by_text("notes.txt is not a picture").wait_for()
    page.get_by_role("button", name="What animals are these?").click()
    answered(page, 1)
    assert page.locator(".user img").get_attribute("alt") == "Horses in a meadow.jpg"


@pytest.mark.parametrize("shown", [True, False])
def test_the_limits_of_pumice_tiny_are_told_of_it_alone(page: Page, server: str, shown: bool) -> None:
    card = {"id": "any", "object": "model", "max_pictures": None, "built_in": shown}
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": [card]}))
    page.goto(server)
    page.get_by_text("any", exact=True).wait_for()
    for text in ("It takes them for cows.", "It knows everyday scenes"):
        assert page.get_by_text(text).is_visible() is shown


def test_what_the_server_refuses_is_told(page: Page, local: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture(1))
    with local(cache_tokens=60) as url:
        visit(page, url)
        page.locator("#files").set_input_files(tmp_path / "1.png")
        page.get_by_role("button", name="Remove 1.png").wait_for()
        write(page, "What is this? " * 30)
        page.get_by_text("maximum context length is 60 tokens", exact=False).wait_for()
        page.get_by_role("button", name="Try again").wait_for()
        # The next question takes the place of this one, whose picture does not count any more.
        page.locator("#files").set_input_files(tmp_path / "1.png")
        page.get_by_role("button", name="Remove 1.png").wait_for()
        assert page.locator("#many").is_hidden()


def test_a_key_is_asked_for(page: Page, local: Callable[..., Any]) -> None:
    with local(api_key=("sesame-open",)) as url:
        page.goto(url)
        page.locator("body[data-ready]").wait_for()
        page.locator("#key").wait_for()  # the parameters have opened by themselves
        page.locator("#key").fill("sesame-open")
        page.keyboard.press("Tab")
        page.get_by_text("tiny", exact=True).wait_for()
        page.locator("#max_tokens").fill("4")
        write(page, "What?")
        answered(page, 1)


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_a_server_that_dies_and_comes_back(page: Page, process: Callable[..., Any]) -> None:
    first = process()
    visit(page, first.url, max_tokens=6)
    write(page, "What is it?")
    answered(page, 1)
    first.process.send_signal(signal.SIGSTOP)  # it hears the next question and cannot answer
    write(page, "What is in the picture?")
    page.get_by_label("An answer is on its way").wait_for()
    port = first.port
    first.process.kill()
    page.get_by_text("The server is away; trying again.").wait_for()
    page.reload()  # the page is still there, with everything, and goes on
    page.get_by_text("The server is away; trying again.").wait_for()
    page.get_by_text("What is in the picture?").wait_for()
    process("--port", port).wait_for("listening")
    assert answered(page, 2)[1].strip()
    page.locator("#away").wait_for(state="hidden")


def test_the_keyboard_reaches_everything(page: Page, server: str) -> None:
    visit(page, server)
    assert page.evaluate("document.activeElement.id") == "question"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, summary, select")].filter((node) =>
             !node.getAttribute("aria-label") && !node.textContent.trim() &&
             !(node.labels && node.labels.length && node.labels[0].textContent.trim()))
             .map((node) => node.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("button").count() > 10
    assert page.evaluate("[...document.images].every((image) => image.hasAttribute('alt'))")


def test_nothing_comes_from_elsewhere(server: str) -> None:
    response = httpx.get(server)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for address, file in files().items():
        if file.suffix in (".html", ".css", ".js"):
            named = file.read_bytes().replace(b"http://www.w3.org/2000/svg", b"")  # a name, not an address
            assert not re.findall(rb"https?://[^\s\"'<>]+", named), address
    again = httpx.get(server, headers={"If-None-Match": response.headers["etag"]})
    assert again.status_code == 304
