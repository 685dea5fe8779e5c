"""Explanations as a whole: what is in them, whatever the model and the pictures, and what is refused."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pumice import InputError
from pumice.assistant import Assistant, explain, load
from pumice.cli import app
from pumice.conversation import Conversation, Message, user_message
from pumice.explain.explanation import Explanation
from pumice.explain.methods import DEFAULT, METHODS
from pumice.explain.page import page as html
from pumice.explain.page import to_json
from pumice.explain.reliance import PLAIN, THRESHOLD, Reliance, likely, plain_picture
from pumice.explain.render import WIDEST, strip
from pumice.serve.explanation import explanation_json

if TYPE_CHECKING:
    from playwright.sync_api import Page

SHORT = {"max_new_tokens": 10}
PAGE_JS = Path(__file__).parents[2] / "src" / "pumice" / "explain" / "page.js"


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Assistant:
    return load(tiny_folder, device="cpu", quantize=None)


def sound(explanation: Explanation) -> None:
    """What holds of every explanation."""
    words, tokens = len(explanation.words), sum(p.tokens[1] - p.tokens[0] for p in explanation.pictures)
    assert explanation.weights.shape == (words, tokens)
    assert explanation.attention.shape[0] == words
    assert explanation.attention.shape[3] == tokens
    assert np.isfinite(explanation.weights).all()
    shares = np.zeros(words)
    for picture in explanation.pictures:
        assert picture.heat.min(initial=0) >= 0
        shares += picture.heat.sum((1, 2)) + picture.padding + picture.placeless
    assert np.allclose(shares, 1, atol=1e-4)
    assert np.isfinite(
        [explanation.reliance.shown, explanation.reliance.grey, explanation.reliance.dropped]
    ).all()
    for word in explanation.words:
        assert explanation.answer[word.start : word.end] == word.text


@pytest.mark.parametrize("method", METHODS)
def test_every_architecture_and_method(models: ModuleType, method: str) -> None:
    names = [name for name in models.ARCHITECTURES if "LoRA" not in name]
    for name in names if method == DEFAULT else names[2:3]:
        assistant = models.assistant(models.tiny(models.ARCHITECTURES[name]))
        question = Conversation((user_message("What is it?", [models.picture(90, 50)]),))
        answer = "".join(assistant.stream(question, **SHORT))
        if not answer.strip():
            answer = "A dog"
        explanation = explain(assistant, question, answer, method=method)
        sound(explanation)
        assert explanation.answer == answer.strip()
        assert method in explanation.by_method


def test_own_answer_and_given_one(tiny: Assistant, models: ModuleType) -> None:
    picture = models.picture(60, 90)
    own = tiny.explain(picture, "What?", **SHORT)
    of_given_answer = tiny.explain(picture, "What?", tiny.ask(picture, "What?", **SHORT))
    assert own.answer == of_given_answer.answer
    assert np.allclose(own.weights, of_given_answer.weights)
    other = tiny.explain(picture, "What?", "A dog runs.")
    assert [word.text for word in other.words] == ["A", "dog", "runs", "."]


def test_several_pictures_each_have_a_map(tiny: Assistant, models: ModuleType) -> None:
    pictures = [models.picture(40, 90), models.picture(90, 40, 1), models.picture(50, 50, 2)]
    explanation = tiny.explain(pictures, "<image> and <image> and <image>?", "A dog.")
    sound(explanation)
    assert [p.tokens for p in explanation.pictures] == [(0, 4), (4, 8), (8, 12)]
    assert [p.heat.shape[1:] for p in explanation.pictures] == [(48, 21), (21, 48), (48, 48)]
    assert strip(explanation).width <= WIDEST


def test_an_earlier_picture_counts(tiny: Assistant, models: ModuleType) -> None:
    talk = Conversation(
        (
            user_message("What?", [models.picture(40, 40)]),
            Message("assistant", ("A dog.",)),
            user_message("Why?"),
        )
    )
    explanation = explain(tiny, talk, "It runs.")
    sound(explanation)
    assert explanation.question == "Why?"
    assert [word.text for word in explanation.words] == ["It", "runs", "."]


def test_occlusion_is_what_a_greyed_region_costs(tiny: Assistant, models: ModuleType) -> None:
    picture = models.picture(80, 60)
    explanation = tiny.explain(picture, "What?", "A dog.", occlusion=2)
    lost = explanation.pictures[0].occlusion
    assert lost is not None
    assert lost.shape == (3, 2, 2)
    greyed = picture.copy()
    greyed.paste(tiny.model.config.image.pad_color, (40, 0, 80, 30))
    other = tiny.explain(greyed, "What?", "A dog.")
    assert np.allclose(lost[:, 0, 1], explanation.reliance.shown - other.reliance.shown, atol=1e-4)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_grey_picture_is_not_leant_on(tiny: Assistant, kind: tuple[float, float]) -> None:
    grey = plain_picture((64, 48), tiny.model.config.image.pad_color, *kind)
    explanation = tiny.explain(grey, "What?", "A dog.")
    assert (
        explanation.reliance.score < 1e-4
    )  # no more than the same picture, or one that suits the answer better
    assert not explanation.reliance.leans
    assert "does not lean" in explanation.reliance.verdict()


def test_the_score_is_the_mean_loss() -> None:
    def reliance(*grey: float) -> Reliance:
        zero = np.zeros(len(grey), np.float32)
        return Reliance(zero, zero - 9, -np.array(grey, np.float32), zero)

    assert reliance(2, 3, -1).score == pytest.approx(4 / 3)
    assert not reliance(THRESHOLD * 0.99).leans
    assert "on average a little more likely;" in reliance(-0.5).verdict()
    assert reliance(THRESHOLD * 1.01).leans
    said = reliance(2.3, 2.3).verdict()
    assert said.endswith("when the picture is blank, a word of it is on average about ten times less likely.")
    assert not any(word in said for word in ("nats", "without", "grey"))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (0, "as likely"), (0.05, "as likely"), (0.4, "a little less likely"), (-0.4, "a little more likely"),
        (0.69, "about half as likely"), (-0.69, "about twice as likely"),
        (1.1, "about three times less likely"),
        (2.3, "about ten times less likely"), (3.8, "about 40 times less likely"),
        (4.6, "about a hundred times less likely"), (50, "more than a thousand times less likely"),
    ],
)  # fmt: skip
def test_what_a_loss_means(loss: float, said: str) -> None:
    assert likely(loss) == said


def test_a_strip_leaves_out_articles_and_full_stops(tiny: Assistant, models: ModuleType) -> None:
    picture = models.picture(60, 60)
    whole, short = (
        strip(tiny.explain(picture, "What?", answer)) for answer in ("The dog, a big one.", "dog big one")
    )
    # One panel for each of three words, on the right of the picture.
    light = [np.asarray(image.convert("L"))[-30] < 250 for image in (whole, short)]
    assert light[0].sum() == light[1].sum() > 0


def test_hundreds_of_words(tiny: Assistant, models: ModuleType) -> None:
    explanation = models.assistant(models.tiny(models.ARCHITECTURES["SigLIP + SmolLM2, pad"])).explain(
        models.picture(60, 40), "What?", " ".join("dogs"[n % 4] for n in range(300))
    )
    sound(explanation)
    assert len(explanation.words) == 300
    assert strip(explanation).width <= WIDEST
    assert strip(explanation).height < 4000
    with pytest.raises(InputError, match="context is 256"):
        tiny.explain(models.picture(60, 40), "What?", "dog " * 300)


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1)])
def test_the_thinnest_pictures(tiny: Assistant, size: tuple[int, int]) -> None:
    explanation = tiny.explain(Image.new("RGB", size, (200, 30, 30)), "What?", "A dog.")
    sound(explanation)
    assert min(strip(explanation).size) > 100
    note_text = " ".join(to_json(explanation)["notes"])
    assert ("so thin" in note_text) == (max(size) > 1)


def test_an_empty_answer_is_a_clear_page(tiny: Assistant, models: ModuleType) -> None:
    class Silent(Assistant):
        def stream(self, messages: Any, **sampling: Any) -> Any:
            return iter(("", " \n"))

    explanation = Silent(tiny.model, tiny.processor).explain(models.picture(40, 40), "What?")
    assert (explanation.answer, explanation.words) == ("", ())
    assert not explanation.reliance.leans
    assert "no words" in explanation.reliance.verdict()
    assert strip(explanation).height > 50
    assert "no words" in html(explanation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "there is no picture to explain"),
        ({"answer": " \n"}, "the answer to explain is empty"),
        ({"answer": 3}, "the answer to explain is empty or no text"),
        ({"layers": "0-1"}, "the layers are '0-1'; give numbers"),
        ({"layers": 1}, "the layers are 1; give numbers"),
        ({"layers": [0.5]}, r"the layers are \[0.5\]; give numbers"),
        ({"occlusion": 2.5}, "occlusion is 2.5"),
        ({"occlusion": True}, "occlusion is True"),
        ({"method": "guess"}, "unknown method 'guess'; use one of mean"),
        ({"layers": [0, 2]}, "the decoder has layers 0 to 1"),
        ({"layers": []}, "the decoder has layers 0 to 1"),
        ({"method": "rollout", "layers": [0]}, "goes through all layers"),
        ({"occlusion": 17}, "occlusion is 17; give the regions on a side, 0"),
        ({"question": ""}, "the question is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_what_is_refused(tiny: Assistant, models: ModuleType, change: dict[str, Any], message: str) -> None:
    explain_arguments = {"images": models.picture(40, 40), "question": "What?", **change}
    with pytest.raises(InputError, match=message):
        tiny.explain(explain_arguments.pop("images"), explain_arguments.pop("question"), **explain_arguments)


class Links(HTMLParser):
    """Addresses that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.addresses += [value for name, value in attributes if name in ("src", "href") and value]


def test_a_page_needs_nothing_and_no_text_escapes(tiny: Assistant, models: ModuleType) -> None:
    evil = "</script><script src='https://example.org/x.js'></script><img src=x onerror=alert(1)>"
    explanation = tiny.explain(models.picture(40, 40), evil, "A " + evil)
    page_html = html(explanation)
    links = Links()
    links.feed(page_html)
    assert links.addresses == []
    assert page_html.count("</script>") == 2
    assert "default-src 'none'" in page_html
    data = json.loads(page_html.split('type="application/json">')[1].split("</script>")[0])
    assert data["question"] == evil


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(packed["values"]), np.uint8).reshape(-1, packed["width"])
    return values * np.frombuffer(base64.b64decode(packed["scales"]), "<f4")[:, None]


def test_json_holds_the_arrays(tiny: Assistant, models: ModuleType) -> None:
    picture = models.picture(90, 40)
    question = Conversation((user_message("What?", [picture]),))
    data = json.loads(json.dumps(explanation_json(tiny, question, "A 😀 dog.")))
    explanation = tiny.explain(picture, "What?", "A 😀 dog.")
    assert [word["text"] for word in data["words"]] == ["A", "😀", "dog", "."]
    assert [word["start"] for word in data["words"]] == [0, 2, 5, 8]  # UTF-16, as browsers count
    assert "source" not in data["pictures"][0]
    assert data["reliance"]["leans"] == explanation.reliance.leans
    method = next(m for m in data["methods"] if m["name"] == DEFAULT)
    assert np.allclose(unpacked(method["weights"]), explanation.weights, atol=1 / 255)
    attention = unpacked(data["attention"]["packed"]).reshape(explanation.attention.shape)
    assert np.allclose(attention, explanation.attention, atol=explanation.attention.max() / 255)


def test_a_page_leaves_out_heads_then_layers(
    tiny: Assistant, models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    explanation = tiny.explain(models.picture(40, 40), "What?", "A dog.")
    for limit, heads in ((4 * 2**20, 4), (4 * 2 * 8, 1), (1, None)):
        monkeypatch.setattr("pumice.explain.page.LIMIT", limit)
        data = to_json(explanation)
        assert (data["attention"] and data["attention"]["heads"]) == heads
        assert bool(data["notes"]) == (heads != 4)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node to run the page's script")
def test_the_browser_paints_the_same_map(tiny: Assistant, models: ModuleType) -> None:
    explanation = tiny.explain(models.picture(90, 40), "What?", "A dog.")
    data = to_json(explanation)["pictures"][0]
    weights = explanation.weights[1].tolist()
    script = f"""
    import {{ paint }} from {json.dumps(PAGE_JS.as_uri())};
    const bytes = Uint8Array.from(Buffer.from({json.dumps(data["boxes"])}, 'base64'));
    const boxes = new Float32Array(bytes.buffer);
    console.log(JSON.stringify([...paint({weights}, boxes, {json.dumps(data["grid"])})]));
    """
    process = subprocess.run(
        ["node", "--input-type=module", "-"], input=script, capture_output=True, text=True, check=True
    )
    heat = explanation.pictures[0].heat[1]
    assert np.allclose(np.array(json.loads(process.stdout)).reshape(heat.shape), heat, atol=1e-5)


def test_the_page_in_a_browser(tiny: Assistant, models: ModuleType, page: Page, tmp_path: Path) -> None:
    explanation = tiny.explain(
        [models.picture(90, 40), models.picture(1, 4000)], "What?", "A dog.", occlusion=2
    )
    (tmp_path / "page.html").write_text(html(explanation), encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    assert not page.locator(".px-controls").is_visible()
    assert not page.locator("body").get_by_text("nats").first.is_visible()
    page.get_by_text("How this was found").click()
    caption, word = page.locator("figcaption").first, page.locator(".px-word")
    assert word.all_inner_texts() == ["A", "dog", "."]
    heat = page.get_by_label("heat")
    decoded = []
    for method in (DEFAULT, "raw", "occlusion"):
        heat.select_option(method)
        word.nth(1).hover()
        page.wait_for_function("() => document.querySelector('figcaption').textContent !== ''")
        assert "“dog”" in caption.inner_text()
        decoded.append(caption.inner_text())
        page.mouse.move(0, 0)
        page.wait_for_function("() => document.querySelector('figcaption').textContent === ''")
    lost = explanation.pictures[0].occlusion
    assert lost is not None
    assert decoded[2].startswith("when one region of picture 1 is blank, “dog” is at most ")
    assert likely(float(lost[1].max(initial=0))) in decoded[2]
    assert "so thin" in page.locator(".px-note").last.inner_text()
    word.first.focus()
    for key in ("End", "Enter", "ArrowLeft"):
        page.keyboard.press(key)
    assert [word.nth(n).get_attribute("aria-pressed") for n in range(3)] == ["false", "false", "true"]
    assert page.evaluate("document.activeElement.textContent") == "dog"
    assert page.locator(".px-facts dd").first.inner_text() == "“dog”"


@pytest.fixture
def run(tiny_folder: Path, models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    models.picture(64, 40).save(tmp_path / "a.png")
    command = ["explain", "--model", str(tiny_folder), "--device", "cpu", "--max-new-tokens", "8"]
    return lambda *arguments: CliRunner().invoke(app, [*command, *arguments])


def test_command_writes_each_kind(run: Any, tmp_path: Path) -> None:
    for name in ("page.html", "picture.png", "data.json"):
        result = run("a.png", "What?", "--out", name, "--answer", "A dog.")
        assert (result.exit_code, result.stdout) == (0, "A dog.\n"), result.output
        assert "on the picture" in result.stderr
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG"
    assert json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))["answer"] == "A dog."
    assert not list(tmp_path.glob(".*"))


def test_command_prints_json_alone(run: Any) -> None:
    result = run(
        "a.png", "a.png", "Same?", "--json", "--method", "mean", "--layers", "0-1", "--occlusion", "2"
    )
    data = json.loads(result.stdout)
    assert data["images"] == ["a.png", "a.png"]
    assert data["method"] == "mean"
    assert np.array(data["pictures"][0]["occlusion"]).shape == (len(data["words"]), 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["What?", "--json"], "there is no picture before the question 'What?'"),
        (["a.png", ""], "there is no question"),
        (["a.png", "What?"], "say where it goes: --out page.html"),
        (["a.png", "What?", "--out", "x.pdf"], "must end in .html, .png or .json"),
        (["a.png", "What?", "--out", "a.png"], "is a folder or the picture itself"),
        (["a.png", "What?", "--out", "no/x.png"], "the folder 'no' of --out does not exist"),
        (["b.png", "What?", "--out", "x.png"], "'b.png' does not exist"),
        (["a.png", "What?", "--json", "--method", "x"], "unknown method 'x'"),
        (["a.png", "What?", "--json", "--layers", "2-x"], "--layers is '2-x'"),
        (["a.png", "What?", "--json", "--layers", "5-3"], "--layers is '5-3'"),
        (["a.png", "What?", "--json", "--layers", "1-"], "--layers is '1-'"),
        (
            ["a.png", "What?", "--json", "--layers", "0-9"],
            "layer 9 was chosen, the decoder has layers 0 to 1",
        ),
        (["a.png", "What?", "--json", "--layers", "²"], "--layers is '²'"),
        (["a.png", "What?", "--out", "x.png", "--occlusion", "2"], "a strip does not show --occlusion"),
        (["a.png", "What?", "--json", "--answer", " "], "the answer to explain is empty"),
    ],
)
def test_command_refuses(run: Any, arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png"]
