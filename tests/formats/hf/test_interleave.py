"""A LLaVA-Interleave as llava-hf publishes it: a SigLIP and a Qwen2, each picture one square."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pumice import load
from pumice.assistant import conversation_of
from pumice.config import IMAGE_TOKEN
from pumice.formats.export import export
from pumice.formats.read import read_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
SIDE = 32
# All pictures of a message stand on one line, before its text.
CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, its files as `llava-hf/llava-interleave-qwen-0.5b-hf` has them."""
    target: Path = tmp_path_factory.mktemp("interleave")
    tokenizer = models.byte_level("qwen2", [*models.CHATML, "<image>"])
    text = {
        "vocab_size": tokenizer.get_vocab_size() + 3, "hidden_size": 48, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.Qwen2Config(**text), vision_config=transformers.SiglipVisionConfig(**vision),
        image_token_index=tokenizer.token_to_id("<image>"), vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    model = models.perturbed(lambda: transformers.LlavaForConditionalGeneration(config))
    model.save_pretrained(target)
    tokenizer.save(str(target / "tokenizer.json"))
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
        "chat_template.json": {"chat_template": CHAT},
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor", "processor_class": "LlavaProcessor",
            "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 3, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": 8,
            "num_additional_image_tokens": 0, "vision_feature_select_strategy": "full",
        },
    }  # fmt: skip
    for name, values in files.items():
        (target / name).write_text(json.dumps(values))
    return target


def talk(models: ModuleType, pictures: int, later: int) -> list[dict[str, Any]]:
    """A question about pictures of several shapes, the last `later` of which a second turn adds."""
    shown = [models.picture(*size) for size in ((70, 50), (20, 90), (32, 32))][:pictures]

    def asked(some: list[Any], text: str) -> dict[str, Any]:
        parts = [{"type": "image", "image": picture} for picture in some]
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    answer = {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}
    first, second = shown[: pictures - later], shown[pictures - later :]
    return [asked(first, "What is this?"), *([answer, asked(second, "And this?")] if later else [])]


def compare(folder: Path, messages: list[dict[str, Any]], pictures: int) -> float:
    """Assert that ids, pixels and greedy tokens are transformers'. Return the logits' largest difference."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    parts = [part for message in messages for part in message["content"]]
    shown = [part["image"] for part in parts if part["type"] == "image"]
    assert len(shown) == pictures
    inputs = processor(images=shown or None, text=[text], return_tensors="pt")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assistant = load(folder, device="cpu", quantize=None)
    prompt = assistant.prompt(conversation_of(messages), max_new_tokens=8)
    ids = prompt.input_ids.masked_fill(prompt.input_ids == IMAGE_TOKEN, model.config.image_token_id)
    assert ids.tolist() == inputs["input_ids"][0].tolist()
    sample = assistant.processor.prompt(conversation_of(messages))
    pixels = torch.from_numpy(assistant.processor.pixels(sample.images, sample.layouts))
    if shown:
        assert [layout.tokens for layout in sample.layouts] == [16] * pictures
        torch.testing.assert_close(pixels, inputs["pixel_values"])
    with torch.inference_mode():
        hidden = assistant.model(prompt.input_ids[None], prompt.encode_images())
        expected = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    answer = "".join(assistant.stream(messages, temperature=0.0, max_new_tokens=8))
    assert answer == assistant.processor.tokenizer.decode(generated)
    return (assistant.model.decoder.logits(hidden) - expected).abs().max().item()


@pytest.mark.parametrize("exported", [False, True], ids=["as it is", "exported"])
@pytest.mark.parametrize(("pictures", "later"), [(0, 0), (1, 0), (2, 0), (3, 0), (3, 2)])
def test_it_is_that_of_transformers(
    exported: bool, pictures: int, later: int, folder: Path, models: ModuleType, tmp_path: Path
) -> None:
    source = folder
    if exported:
        source = tmp_path / "out"
        export(read_model(folder), "hf", source)
    difference = compare(source, talk(models, pictures, later), pictures)
    print(f"{pictures} pictures, {later} later, exported {exported}: {difference:.1e}")
    assert difference < 1e-4  # measured worst: 3.7e-06


def test_what_is_read(folder: Path) -> None:
    config = read_model(folder).config
    assert (config.image.mode, config.vision.layer, config.vision.select) == ("squash", -1, "full")
    assert config.chat is not None
    assert config.chat.shared_line and config.chat.earlier == "<|im_start|>assistant \n"
