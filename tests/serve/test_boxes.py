"""The boxes of an answer: at /boxes, and drawn on the page."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from asking import post
from PIL import Image
from test_limits import error_of

from pumice.serve import backend, boxes

if TYPE_CHECKING:
    from playwright.sync_api import Page

ANSWER = "The dog is at [0.25, 0.50, 0.75, 0.75], and a bird at [0.00, 0.25, 0.20, 0.40]."


def test_boxes_of_an_answer_are_shares_of_its_picture(server: str) -> None:
    body = {"text": ANSWER, "width": 400, "height": 200}
    # The tiny model pads to a square: of 400, in which the picture begins at 100.
    assert post(server, body, "/boxes").json() == {
        "boxes": [
            {"label": "The dog", "left": 0.25, "top": 0.5, "right": 0.75, "bottom": 1.0},
            {"label": "a bird", "left": 0.0, "top": 0.0, "right": 0.2, "bottom": pytest.approx(0.3)},
        ]
    }
    assert post(server, {**body, "text": "A dog [0.25, 0.9, 0.75, 0.95]."}, "/boxes").json() == {"boxes": []}
    assert post(server, {**body, "text": "A dog."}, "/boxes").json() == {"boxes": []}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"width": 0}, "width"),
        ({"height": 1 << 20}, "height"),
        ({"text": 3}, "text"),
        ({"text": "a" * 70000}, "text"),
        ({"pictures": 0}, "pictures"),
        ({"size": 3}, "size"),
    ],
)
def test_wrong_requests_name_their_field(server: str, changes: dict[str, Any], param: str) -> None:
    body = {"text": ANSWER, "width": 400, "height": 200, **changes}
    assert error_of(post(server, body, "/boxes"), 400)["param"] == param


def test_an_answer_is_searched_beside_the_event_loop(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 64 kB that is full of boxes takes 0.05 s, in which nobody else would be answered."""
    threads: list[str] = []

    def search(*arguments: Any) -> boxes.BoxesBody:
        threads.append(threading.current_thread().name)
        return boxes.boxes_in(*arguments)

    monkeypatch.setattr(backend, "boxes_in", search)
    assert post(server, {"text": ANSWER, "width": 400, "height": 200}, "/boxes").status_code == 200
    assert [name.startswith("pumice-parse") for name in threads] == [True]


def test_a_key_opens_it(local: Any) -> None:
    with local(api_key=("first-key",)) as url:
        body = {"text": ANSWER, "width": 400, "height": 200}
        error_of(post(url, body, "/boxes"), 401)
        assert post(url, body, "/boxes", headers={"Authorization": "Bearer first-key"}).status_code == 200


def test_the_page_draws_the_boxes_of_an_answer(page: Page, server: str, tmp_path: Path) -> None:
    """The model's words are replaced on their way; what they mean is the server's answer."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": ANSWER}, "finish_reason": "stop"}]}]
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=stream),
    )
    page.goto(server)
    page.locator("body[data-ready]").wait_for()
    Image.new("RGB", (400, 200), (60, 120, 60)).save(tmp_path / "meadow.png")
    page.locator("#files").set_input_files(tmp_path / "meadow.png")
    page.get_by_role("button", name="Remove meadow.png").wait_for()
    page.locator("#question").fill("Where is the dog?")
    page.keyboard.press("Enter")
    drawn = page.locator(".assistant svg.boxed")
    drawn.wait_for()
    assert drawn.get_attribute("viewBox") == "0 0 400 200"
    assert drawn.get_attribute("aria-label") == "The picture with 2 boxes: The dog, a bird"
    assert (drawn.bounding_box() or {})["width"] > 300  # pixels on the screen: no icon
    names = ("x", "y", "width", "height")
    boxes = [[float(rect.get_attribute(n) or -1) for n in names] for rect in drawn.locator("rect").all()]
    assert boxes == [[100, 100, 200, 100], [0, 0, 80, pytest.approx(60)]]
    assert drawn.locator("image").get_attribute("href") == page.locator(".user img").get_attribute("src")
    # A reload finds it again, and words alone draw nothing.
    page.reload()
    page.locator(".assistant svg.boxed").wait_for()
    assert page.locator("svg.boxed").count() == 1


def test_a_label_on_the_right_ends_at_its_box(page: Page, server: str) -> None:
    """Names of things at the right edge would be cut off if they began at the box."""
    page.goto(server)
    page.locator("body[data-ready]").wait_for()
    sides = page.evaluate("""async () => {
      const { drawing } = await import("/page/boxes.js");
      const box = { label: "a white sailing boat", top: 0.5, bottom: 0.9 };
      const drawn = drawing({ url: "", width: 400, height: 200 },
        [{ ...box, left: 0.05, right: 0.2 }, { ...box, left: 0.9, right: 0.98 }]);
      document.body.append(drawn);
      return [...drawn.querySelectorAll("text")].map((text) => {
        const { x, width } = text.getBBox();
        return [x, x + width];
      });
    }""")
    assert sides[0][0] == pytest.approx(22, abs=1) and sides[1][1] == pytest.approx(390, abs=1)
    assert all(0 <= left < right <= 400 for left, right in sides)


def test_an_answer_of_many_blanks_takes_the_page_no_time(page: Page, server: str) -> None:
    page.goto(server)
    page.locator("body[data-ready]").wait_for()
    found, milliseconds = page.evaluate("""async () => {
      const { mayHoldBoxes } = await import("/page/boxes.js");
      const start = performance.now();
      const blanks = mayHoldBoxes(`(1, 2)${" ".repeat(60000)}`);
      const others = ["(1, 2), (3, 4)", "[ .1, 0.2,0.3 , 1 ]"].map(mayHoldBoxes);
      return [[blanks, ...others], performance.now() - start];
    }""")
    assert found == [False, True, True] and milliseconds < 1000  # it was seven seconds
