"""Processors, tokenizers and chat templates that contradict the config: each is told or refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import InputError
from pumice.formats.hf.read import open_hf
from pumice.formats.llava.read import open_original

Change = Callable[..., None]
CHAT = (  # as the LLaVAs of these tests have it
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    ("kind", "file", "values", "message"),
    [
        (
            "llava",
            PREPROCESSOR,
            {"image_processor_type": "LlavaNextImageProcessorFast"},
            "model_type is 'llava'",
        ),
        ("next", PREPROCESSOR, {"image_processor_type": "LlavaOnevisionImageProcessor"}, "is 'llava_next'"),
        ("onevision", PROCESSOR, {"vision_aspect_ratio": "anyres_max_9"}, "but 'anyres_max_4' in .*config"),
        ("llava", PROCESSOR, {"image_token": "<pad>"}, "'<pad>', whose id is 4, but image_token_index is 3"),
        ("llava", "tokenizer_config.json", {"image_token": "<picture>"}, "which the tokenizer lacks, but"),
    ],
)
def test_a_processor_of_another_model(
    hf: Callable[[str], Path], kind: str, file: str, values: dict[str, Any], message: str, change: Change
) -> None:
    folder = hf(kind)
    change(folder / file, **values)
    with pytest.raises(InputError, match=message):
        open_hf(folder)


@pytest.mark.parametrize(
    ("file", "values", "note"),
    [
        (PROCESSOR, {"processor_class": "LlavaNextProcessor"}, "LlavaNextProcessor in processor_config.json"),
        (
            "tokenizer_config.json",
            {"processor_class": "LlavaOnevisionProcessor"},
            "OnevisionProcessor in token",
        ),
        (
            PROCESSOR,
            {"num_additional_image_tokens": 0},
            "tokens is 0 in processor_config.json, but a clip has 1",
        ),
        ("config.json", {"vision_aspect_ratio": "anyres_max_9"}, "which model_type 'llava' does not use"),
        ("config.json", {"image_grid_pinpoints": [[16, 32]]}, "config.json has image_grid_pinpoints, which"),
        (PROCESSOR, {"image_processor": {"do_pad": True, "size": 16}}, "another size than processor_config"),
        ("tokenizer_config.json", {"bos_token": "<nope>"}, "name '<nope>' as its bos token, but"),
        ("tokenizer_config.json", {"eos_token": "<nope>"}, "name '<nope>' as its eos token, but"),
        (
            "tokenizer_config.json",
            {"chat_template": CHAT.replace("<|im_end|>", "<|eot|>")},
            r"ends answers with '<\|eot\|>', which is no token",
        ),
    ],
)
def test_what_the_other_files_contradict_is_told(
    hf: Callable[[str], Path], file: str, values: dict[str, Any], note: str, change: Change
) -> None:
    folder = hf("llava")
    change(folder / PREPROCESSOR, do_pad=True)
    assert open_hf(folder).notes == ()
    change(folder / file, **values)
    (told,) = open_hf(folder).notes
    assert re.search(note, told)


@pytest.mark.parametrize(("name", "value"), [("patch_size", 14), ("vision_feature_select_strategy", "full")])
def test_the_processor_must_repeat_the_config(
    hf: Callable[[str], Path], name: str, value: Any, change: Change
) -> None:
    folder = hf("llava")
    change(folder / "processor_config.json", patch_size=4, vision_feature_select_strategy="default")
    open_hf(folder)
    change(folder / "processor_config.json", **{name: value})
    with pytest.raises(InputError, match=rf"processor_config\.json: {name} is .*, but .* in .*config\.json"):
        open_hf(folder)


# Chat templates

OTHER = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"


def test_chat_templates_that_differ_are_told(hf: Callable[[str], Path], change: Change) -> None:
    folder = hf("llava")
    own = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(own + "{# the same #}")
    assert not any("chat templates" in note for note in open_hf(folder).notes)
    change(folder / "chat_template.json", chat_template=OTHER)
    loaded = open_hf(folder)
    assert loaded.config.template == "chatml"
    assert any("hold chat templates that write different formats" in note for note in loaded.notes)


def test_the_assumed_format_of_the_original_code_is_told_truly(
    original: Callable[..., Path], change: Change
) -> None:
    folder = original()
    (note,) = open_original(folder).notes
    assert note.startswith("the tokenizer's chat template writes another format (chatml, --template own")
    change(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    (note,) = open_original(folder).notes
    assert note.startswith("v1 was assumed; the tokenizer's chat template, which is no such format")
    change(folder / "tokenizer_config.json", chat_template=None)
    assert open_original(folder).notes == ("no file says the chat format; v1 was assumed",)


def test_the_place_of_an_error_is_named_once(hf: Callable[[str], Path], change: Change) -> None:
    folder = hf("onevision")
    change(folder / "config.json", **{
        "text_config__use_sliding_window": True, "text_config__sliding_window": 8,
        "text_config__layer_types": ["full_attention", "sliding_attention"],
    })  # fmt: skip
    with pytest.raises(InputError, match="layer_types gives a sliding_window") as caught:
        open_hf(folder)
    assert str(caught.value).count("config.json") == 1
