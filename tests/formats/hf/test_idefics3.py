"""Idefics3 and SmolVLM against transformers: small random ones, asked, and exported for it."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pumice import load
from pumice.assistant import Assistant
from pumice.cli import app
from pumice.config import IMAGE_TOKEN
from pumice.conversation import Conversation, ImagePart, Message, Video, user_message
from pumice.errors import InputError
from pumice.formats.export import export
from pumice.formats.hf.idefics3 import FAKE, refusal
from pumice.formats.read import read_model
from pumice.media import VideoPolicy
from pumice.model.vision import fractional_positions
from pumice.video import in_words

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
# SmolVLM's; Idefics3's begins with <|begin_of_text|>.
CHAT = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SIDE = 38  # pixels of a tile: 19 patches of 2, a grid where some positions fall into the bucket before theirs
CLOSE = 1e-4


def write_folder(folder: Path, kind: str, models: ModuleType, **changes: Any) -> Any:
    """A random model of this kind as transformers saves it, with the files of its processor."""
    tokenizer = models.byte_level("smollm", ["<|endoftext|>", "<|im_start|>", *models.SMOLVLM])
    text = {
        "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 48,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 12, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 2,
    }  # fmt: skip
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_id=tokenizer.token_to_id("<image>"),
        scale_factor=19,
    )  # fmt: skip
    model = models.perturbed(lambda: getattr(transformers, f"{name}ForConditionalGeneration")(config))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT, "bos_token": "<|im_start|>",
            "eos_token": "<end_of_utterance>", "pad_token": "<end_of_utterance>",
        },
        "preprocessor_config.json": {
            "image_processor_type": f"{name}ImageProcessor", "size": {"longest_edge": 4 * SIDE},
            "max_image_size": {"longest_edge": SIDE}, "do_image_splitting": True, "resample": 1,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        },
        "processor_config.json": {"processor_class": f"{name}Processor", "image_seq_len": 1},
    }  # fmt: skip
    for file, values in files.items():
        (folder / file).write_text(json.dumps(values | changes.get(file.partition(".")[0], {})))
    return model


def processor_of(folder: Path, splits: bool = True) -> Any:
    """Idefics3's processor, which is SmolVLM's for pictures; that one needs packages that are not here."""
    return transformers.Idefics3Processor(
        transformers.models.idefics3.image_processing_pil_idefics3.Idefics3ImageProcessorPil(
            size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=splits
        ),
        transformers.AutoTokenizer.from_pretrained(folder), image_seq_len=1, chat_template=CHAT,
    )  # fmt: skip


def conversation(models: ModuleType, pictures: int) -> tuple[Conversation, list[Any], list[Image.Image]]:
    """With 0, 1 or 2 pictures: ours, transformers' messages, and the pictures."""
    shown = [models.picture(70, 50), models.picture(20, 90)][:pictures]
    question = "What is in the picture?"
    first = user_message(question, shown)
    ours = Conversation((first, Message("assistant", ("A dog",)), Message("user", ("Is it green?",))))
    content = [*({"type": "image"} for _ in shown), {"type": "text", "text": question}]
    theirs = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "Is it green?"}]},
    ]
    return ours, theirs, shown


def compare(folder: Path, model: Any, assistant: Assistant, models: ModuleType, pictures: int) -> float:
    """Assert that ids, tiles, logits and greedy tokens are transformers'. Return the largest difference."""
    ours, theirs, shown = conversation(models, pictures)
    processor = processor_of(folder)
    text = processor.apply_chat_template(theirs, add_generation_prompt=True)
    inputs = processor(
        text=text, images=[shown] if shown else None, return_tensors="pt", add_special_tokens=False
    )
    sample = assistant.processor.prompt(ours)
    image_id = processor.image_token_id
    ids = np.where(sample.input_ids == IMAGE_TOKEN, image_id, sample.input_ids)
    assert ids.tolist() == inputs["input_ids"][0].tolist()
    if shown:
        tiles = assistant.processor.pixels(sample.images, sample.layouts)
        np.testing.assert_allclose(tiles, inputs["pixel_values"][0].numpy(), atol=1e-6)
    prompt = assistant.prompt(ours, max_new_tokens=6, temperature=0.0)
    with torch.inference_mode():
        expected = model(**inputs).logits[0]
        hidden = assistant.model(prompt.input_ids[None], prompt.encode_images())
        logits = assistant.model.decoder.logits(hidden)[0]
    difference = (logits - expected).abs().max().item()
    assert difference < CLOSE
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = "".join(assistant.stream(ours, max_new_tokens=6, temperature=0.0))
    # The space before an answer belongs to the format.
    assert answer == processor.decode(tokens, skip_special_tokens=True).removeprefix(" ")
    return float(difference)


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_ids_tiles_logits_and_greedy_tokens_are_those_of_transformers(
    kind: str, models: ModuleType, tmp_path: Path
) -> None:
    """Without, with one and with two pictures; then the same of what is exported."""
    model = write_folder(tmp_path / "hf", kind, models)
    assistant = load(tmp_path / "hf", quantize=None)
    for pictures in (0, 1, 2):
        compare(tmp_path / "hf", model, assistant, models, pictures)
    export(read_model(tmp_path / "hf"), "hf", tmp_path / "out")
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    compare(tmp_path / "out", again, assistant, models, 2)


def test_how_videos_are_shown_is_read_and_written(models: ModuleType, tmp_path: Path) -> None:
    sampling = {"fps": 2, "max_frames": 5, "video_size": {"longest_edge": SIDE}}
    write_folder(tmp_path / "hf", "smolvlm", models, preprocessor_config={"video_sampling": sampling})
    loaded = read_model(tmp_path / "hf")
    # transformers overwrites `video_size` by `size`, which both of its processors read.
    policy = VideoPolicy(5, 2.0, 4 * SIDE, timestamps=True)
    assert loaded.config.video == policy
    export(loaded, "hf", tmp_path / "out")
    assert read_model(tmp_path / "out").config.video == policy
    changed = replace(loaded.config, video=replace(policy, longest_edge=SIDE))
    assert "first resized to 38 pixels, there as pictures are, to 152" in str(refusal(changed))
    # As transformers 5 saves it.
    saved = {"num_frames": 6, "fps": 1, "size": {"longest_edge": 2 * SIDE}}
    write_folder(tmp_path / "new", "smolvlm", models, processor_config={"video_processor": saved})
    assert read_model(tmp_path / "new").config.video == VideoPolicy(6, 1.0, 2 * SIDE, timestamps=True)
    unknown = {"video_processor": saved | {"num_frames": None, "fps": None}}
    write_folder(tmp_path / "first", "smolvlm", models, processor_config=unknown)
    assert read_model(tmp_path / "first").config.video is None


def compare_frames(tiles: np.ndarray, frames: list[Image.Image]) -> None:
    """Assert that tiles (F, 3, S, S) are a video's frames as transformers prepares them.

    Its video processor needs torchvision. Where that is not installed, its image processor in Pillow does the
    same two steps, without cutting: the longer side becomes `size`, then the frame a square.
    """
    sizes = {"size": {"longest_edge": 4 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    if importlib.util.find_spec("torchvision") is not None:
        from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

        video = np.stack([np.asarray(frame) for frame in frames])
        processor = SmolVLMVideoProcessor(**sizes, do_sample_frames=False)
        expected = processor(videos=[video], return_tensors="np")["pixel_values"][0]
        # torchvision may resize columns before rows, and rounds in between. Measured worst, of 256 levels: 2,
        # and 0.24 on average, in upright frames.
        level = 2 / 255
        np.testing.assert_allclose(tiles, expected, atol=2.1 * level)
        assert abs(tiles - expected).mean() < 0.3 * level
        return
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    processor = Idefics3ImageProcessorPil(**sizes, do_image_splitting=False)
    expected = processor(images=[frames], return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(tiles, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(70, 50), (27, 90), (300, 40)])
def test_a_video_is_shown_as_transformers_shows_it(
    size: tuple[int, int], models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames, times, sizes, pixels, ids, logits and greedy tokens of a small random SmolVLM2."""
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
    from transformers.video_utils import VideoMetadata

    # 1. A model, and an animation that it is asked about.
    sampling = {"fps": 1, "max_frames": 3, "video_size": {"longest_edge": 4 * SIDE}}
    model = write_folder(tmp_path / "hf", "smolvlm", models, preprocessor_config={"video_sampling": sampling})
    assistant = load(tmp_path / "hf", quantize=None)
    # Of middle brightness: what overshoots white or black would be cut off in between.
    noise = np.random.default_rng(0).integers(64, 192, (6, size[1], size[0], 3), np.uint8)
    first, *others = map(Image.fromarray, noise)
    first.save(tmp_path / "a.webp", save_all=True, append_images=others, duration=15_000, lossless=True)
    video = ImagePart(Video(tmp_path / "a.webp"))
    ours = Conversation((Message("user", (video, "What happens?")),))
    sample = assistant.processor.prompt(ours)
    # 2. Which frames, and their pixels: each is one tile.
    metadata = VideoMetadata(total_num_frames=6, fps=1 / 15, duration=90)
    numbers = SmolVLMVideoProcessor.sample_frames(SimpleNamespace(num_frames=3, fps=1), metadata).tolist()
    metadata.frames_indices = numbers
    tiles = assistant.processor.pixels(sample.images, sample.layouts)
    assert [layout.tiles for layout in sample.layouts] == [1, 1, 1]
    compare_frames(tiles, [Image.fromarray(noise[number]) for number in numbers])
    pixel_values = torch.from_numpy(tiles)[None]
    # 3. Ids, by the half of their processor that does not decode; num2words need not be installed.
    monkeypatch.setattr(processing_smolvlm, "num2words", in_words, raising=False)
    owner: Any = SimpleNamespace(
        image_seq_len=1, image_token="<image>", fake_image_token=FAKE, global_image_token="<global-img>"
    )
    inputs = {"pixel_values": pixel_values, "video_metadata": [metadata]}
    text = processing_smolvlm.SmolVLMProcessor.replace_video_token(owner, inputs, 0)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}]
    chat = jinja2.Template(processing_smolvlm.DEFAULT_CHAT_TEMPLATE)
    prompt = chat.render(messages=messages, add_generation_prompt=True).replace("<video>", text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert np.where(sample.input_ids == IMAGE_TOKEN, image_id, sample.input_ids).tolist() == ids[0].tolist()
    # 4. Logits and the answer.
    with torch.inference_mode():
        expected = model(input_ids=ids, pixel_values=pixel_values).logits[0]
        image_tokens = assistant.model.encode(torch.from_numpy(tiles), sample.layouts)
        hidden = assistant.model(torch.from_numpy(sample.input_ids)[None], image_tokens)
        difference = (assistant.model.decoder.logits(hidden)[0] - expected).abs().max().item()
        answer = model.generate(
            input_ids=ids, pixel_values=pixel_values, max_new_tokens=6, do_sample=False,
            attention_mask=torch.ones_like(ids),
        )[0, ids.shape[1] :]  # fmt: skip
    print(f"{size}: {difference:.1e} of {expected.abs().max():.1f}")
    assert difference < CLOSE
    words = "".join(assistant.stream(ours, max_new_tokens=6, temperature=0.0))
    assert words == tokenizer.decode(answer, skip_special_tokens=True).removeprefix(" ")


def test_a_model_that_never_cuts_pictures_is_read_too(models: ModuleType, tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", "idefics3", models, preprocessor_config={"do_image_splitting": False})
    assistant = load(tmp_path / "hf", quantize=None)
    picture = models.picture(70, 50)
    inputs = processor_of(tmp_path / "hf", splits=False)(
        text="<image>", images=[picture], return_tensors="np"
    )
    sample = assistant.processor.prompt(Conversation((user_message("", [picture]),)))
    tiles = assistant.processor.pixels(sample.images, sample.layouts)
    np.testing.assert_allclose(tiles, inputs["pixel_values"][0], atol=1e-6)
    export(read_model(tmp_path / "hf"), "hf", tmp_path / "out")
    assert read_model(tmp_path / "out").config == assistant.model.config


def test_a_newer_processor_is_read_and_an_older_one_that_differs_is_told(
    models: ModuleType, tmp_path: Path
) -> None:
    size = {"longest_edge": 2 * SIDE}
    newer = {"image_processor": {"size": size, "max_image_size": {"longest_edge": SIDE}}}
    write_folder(tmp_path / "hf", "smolvlm", models, processor_config=newer)
    loaded = read_model(tmp_path / "hf")
    assert loaded.config.image.longest_edge == 2 * SIDE
    told = "preprocessor_config.json has another size than processor_config.json, which was read"
    assert loaded.notes.count(told) == 1
    newer["image_processor"]["size"] = {"longest_edge": 4 * SIDE}
    write_folder(tmp_path / "hf", "smolvlm", models, processor_config=newer)
    assert not any("has another" in note for note in read_model(tmp_path / "hf").notes)


def test_the_tokens_around_pictures_are_special_also_as_the_first_of_the_vocabulary(
    models: ModuleType, tmp_path: Path
) -> None:
    write_folder(tmp_path, "smolvlm", models)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary, added = values["model"]["vocab"], values["added_tokens"]
    old = vocabulary[FAKE]
    new_ids = {FAKE: 0, next(token for token, number in vocabulary.items() if number == 0): old}
    vocabulary.update(new_ids)
    for token in added:
        token |= {"id": new_ids.get(token["content"], token["id"]), "special": False}
    values["added_tokens"] = sorted(added, key=lambda token: token["id"])
    path.write_text(json.dumps(values))
    special = load(tmp_path, quantize=None).processor.tokenizer.special
    assert special.keys() >= {*models.SMOLVLM} - {"<image>"}
    assert special[FAKE] == 0


def test_positions_are_sorted_into_the_buckets_of_transformers() -> None:
    """Most grids of published models are in order, 19 is not; the reference is the module itself."""
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionEmbeddings

    for grid in (5, 19, 26, 27, 31, 32):
        config = Idefics3VisionConfig(hidden_size=1, image_size=grid, patch_size=1)
        embeddings = Idefics3VisionEmbeddings(config)
        torch.nn.init.zeros_(embeddings.patch_embedding.weight)
        torch.nn.init.zeros_(embeddings.patch_embedding.bias)
        embeddings.position_embedding.weight.data.copy_(torch.arange(grid**2.0)[:, None])
        mask = torch.ones(1, grid, grid, dtype=torch.bool)
        expected = embeddings(torch.zeros(1, 3, grid, grid), mask)[0, :, 0].long().tolist()
        assert (fractional_positions(grid) or list(range(grid**2))) == expected


@pytest.mark.parametrize(
    "file, values, words",
    [
        (
            "preprocessor_config",
            {"max_image_size": {"longest_edge": 40}},
            "is 40 pixels, but .* is 38",
        ),
        ("processor_config", {"image_seq_len": 4}, "image_seq_len is 4, but .* makes 1 tokens of a tile"),
        ("config", {"image_token_id": 7}, "image_token_id is 7, but the tokenizer gives it 4"),
        (
            "config",
            {"scale_factor": 4},
            "config.json: scale_factor: a grid of 19 x 19 .* reduced by 4; give a divisor",
        ),
        ("tokenizer", None, "marks names '<row_1_col_4>', which is no special token"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    file: str, values: dict[str, Any] | None, words: str, models: ModuleType, tmp_path: Path
) -> None:
    write_folder(tmp_path, "smolvlm", models)
    path = tmp_path / f"{file}.json"
    text = path.read_text()
    changed = (
        text.replace("<row_1_col_4>", "<row_9>") if values is None else json.dumps(json.loads(text) | values)
    )
    path.write_text(changed)
    with pytest.raises(InputError, match=words):
        load(tmp_path)
    told = CliRunner().invoke(app, ["ask", "--model", str(tmp_path), "--device", "cpu", "What?"])
    assert told.exit_code == 2 and re.search(words, told.stderr) and told.stderr.count("\n") == 1
