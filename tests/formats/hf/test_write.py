"""A folder for transformers: what its files say, and that transformers answers from it as we do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from pumice.assistant import conversation_of, load
from pumice.config import IMAGE_TOKEN, GenerationConfig
from pumice.errors import InputError
from pumice.formats.export import export
from pumice.formats.hf.config import decoder_config
from pumice.formats.hf.read import read_generation
from pumice.formats.hf.write import as_mlp, generation_config, image_processor, text_config
from pumice.formats.read import read_model
from pumice.model.connector import Connector
from pumice.storage.json_file import Keys
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import open_weights

PAD, ANYRES = "CLIP + Llama, pad (LLaVA 1.5)", "CLIP + Mistral, anyres (LLaVA 1.6)"
SIGLIP, ONEVISION = "SigLIP + Qwen2, squash", "LLaVA-OneVision, anyres_max"


@pytest.fixture(scope="module")
def folder(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hf") / "out"
    export(models.tiny(models.ARCHITECTURES[PAD]), "hf", target)
    return target


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_processor_carries_what_the_model_needs(folder: Path) -> None:
    processor = _json(folder / "processor_config.json")
    assert processor["patch_size"] == 14
    assert processor["num_additional_image_tokens"] == 1
    assert processor["vision_feature_select_strategy"] == "default"
    images = _json(folder / "preprocessor_config.json")
    assert images["image_processor_type"] == "LlavaImageProcessor"
    assert images["do_pad"] is True, "without it transformers crops in silence"
    assert images["crop_size"] == {"height": 56, "width": 56}
    assert images["resample"] == 3


def test_the_image_token_is_added_and_the_embedding_grows(models: ModuleType, folder: Path) -> None:
    model = models.tiny(models.ARCHITECTURES[PAD])
    old = model.config.decoder.vocab_size
    config = _json(folder / "config.json")
    tensors = open_weights(folder)
    assert config["image_token_index"] == old
    rows = config["text_config"]["vocab_size"]
    assert rows % 64 == 0
    assert old < rows <= old + 64
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weight = tensors[name].read()
        assert weight.shape[0] == rows
        # Their logit is the mean of the others', so that greedy decoding never takes them.
        assert torch.equal(weight[old:], weight[:old].mean(0).expand(rows - old, -1))


def test_an_image_token_that_is_there_is_used(formats: ModuleType, folder: Path, tmp_path: Path) -> None:
    back = read_model(folder)
    export(back, "hf", tmp_path / "again")
    for file in sorted(path.name for path in folder.iterdir()):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes(), file


def test_a_large_model_is_written_in_shards(
    models: ModuleType, formats: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pumice.formats.hf import write as hf_write
    from pumice.storage import tensors

    def small(folder: Path, state: tensors.LazyStateDict) -> None:
        tensors.write_weights(folder, state, limit=200_000)

    monkeypatch.setattr(hf_write, "write_weights", small)
    model = models.tiny(models.ARCHITECTURES[PAD])
    export(model, "hf", tmp_path / "out")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert set(_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"].values()) == set(shards)
    assert formats.same_bytes(model, tmp_path / "out")


@pytest.mark.parametrize("name", ["Llama 3", "Mistral, pad", "Qwen2", "Qwen3", "SmolLM2"])
def test_a_decoder_comes_back_as_it_was(models: ModuleType, name: str) -> None:
    [architecture] = [a for full, a in models.ARCHITECTURES.items() if name in full and "pumice" not in full]
    decoder = replace(architecture.config.decoder, vocab_size=320)
    assert decoder_config(Keys(text_config(decoder), "config.json")) == decoder


def test_image_policies_in_their_words(models: ModuleType) -> None:
    crop = image_processor(replace(models.PAD, mode="crop", resample="bilinear"), 56)
    assert (crop["image_processor_type"], crop["resample"]) == ("CLIPImageProcessor", 2)
    assert "do_pad" not in crop
    squash = image_processor(replace(models.PAD, mode="squash"), 56)
    assert squash["size"] == {"height": 56, "width": 56}
    assert squash["do_center_crop"] is False
    tiles = image_processor(replace(models.PAD, mode="anyres", pinpoints=((112, 56),)), 56)
    assert tiles["image_grid_pinpoints"] == [[56, 112]], "height first"
    shrunk = replace(models.PAD, mode="anyres", pinpoints=((112, 56),), max_tiles=9)
    assert image_processor(shrunk, 56)["image_processor_type"] == "LlavaOnevisionImageProcessor"


def test_how_answers_are_drawn_travels(models: ModuleType) -> None:
    config = next(iter(models.ARCHITECTURES.values())).config

    def settings(**fields: float) -> dict[str, object]:
        return generation_config(replace(config, generation=GenerationConfig(**fields)))

    plain = generation_config(config)
    assert plain["do_sample"] is False
    assert settings(repetition_penalty=1.2) == plain | {"repetition_penalty": 1.2}
    # Without a top_k, transformers takes the 50 likeliest tokens.
    drawn = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0}
    assert settings(temperature=0.5, top_p=0.9) == plain | drawn
    beams = {"num_beams": 3, "length_penalty": 0.5}
    assert settings(**beams) == plain | beams
    # transformers warns of values that have no effect.
    assert settings(length_penalty=0.5, top_k=9) == plain


@pytest.mark.parametrize(
    "fields",
    [{"num_beams": 3, "length_penalty": 0.5}, {"repetition_penalty": 1.2}, {"temperature": 0.5, "top_k": 7}],
)
def test_how_answers_are_drawn_comes_back(fields: dict[str, Any], models: ModuleType, tmp_path: Path) -> None:
    config = next(iter(models.ARCHITECTURES.values())).config
    generation = GenerationConfig(**fields)
    written = generation_config(replace(config, generation=generation))
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    assert read_generation(tmp_path) == generation


def test_beams_beside_a_penalty_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"num_beams": 3, "repetition_penalty": 1.2}')
    assert read_generation(tmp_path) == GenerationConfig(repetition_penalty=1.2)


@pytest.mark.parametrize("value", ["true", '"never"'])
def test_another_end_of_a_search_is_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(f'{{"num_beams": 3, "early_stopping": {value}}}')
    with pytest.raises(InputError, match=f"early_stopping is {value}; only false can be read"):
        read_generation(tmp_path)
    path.write_text(f'{{"early_stopping": {value}}}')  # which does nothing without beams
    assert read_generation(tmp_path) == GenerationConfig()


LLAVA_1 = "CLIP + Llama, linear, crop (LLaVA 1.0)"


def test_a_linear_connector_is_the_mlp_that_computes_the_same(models: ModuleType) -> None:
    model = models.tiny(models.ARCHITECTURES[LLAVA_1])
    mlp_model = as_mlp(model)
    features = torch.randn(1, 16, model.config.vision.width)
    mlp_connector, connector = (
        Connector(m.config.connector, m.config.vision.width, m.config.decoder.width)
        for m in (mlp_model, model)
    )
    for module, parts in ((mlp_connector, mlp_model), (connector, model)):
        tensors = {n.removeprefix("connector."): t.read() for n, t in parts.state.items()}
        module.load_state_dict({name: tensors[name] for name in module.state_dict()})
    # worst case measured: 2.4e-7 of values up to 2
    torch.testing.assert_close(mlp_connector(features), connector(features), rtol=0, atol=1e-6)


def test_what_stands_around_a_picture_comes_back(models: ModuleType, tmp_path: Path) -> None:
    model = models.tiny(models.ARCHITECTURES[LLAVA_1])
    notes = export(model, "hf", tmp_path / "out").notes
    assert notes == ("the linear connector is written as an mlp2x_gelu that computes the same",)
    assert "'<im_start><image><im_end>'" in (tmp_path / "out" / "chat_template.jinja").read_text()
    for template in ("v0", None):  # as named, and as the chat template says it
        config = read_model(tmp_path / "out", template=template).config
        assert (config.image_wrap, config.template) == (("<im_start>", "<im_end>"), "v0")


# Of logits up to 10; measured: none in all nine cases, on one thread.
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", [PAD, ANYRES, SIGLIP])
@pytest.mark.parametrize("size", [(200, 120), (56, 56), (90, 301)])
def test_transformers_answers_the_same_from_a_raw_picture(
    models: ModuleType, formats: ModuleType, tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    model: LoadedParts = models.tiny(models.ARCHITECTURES[name])
    shown: Image.Image = models.picture(*size)
    export(model, "hf", tmp_path / "out")
    cell = formats.run(model, shown, lambda: formats.transformers(tmp_path / "out", shown), True)
    assert cell.difference < TOLERANCE
    assert cell.greedy


@pytest.mark.parametrize("name", [PAD, ANYRES])
def test_one_begin_of_text_token(models: ModuleType, formats: ModuleType, tmp_path: Path, name: str) -> None:
    """In two steps and in one as in Pumice; without special tokens, as in vLLM's chat endpoint, none."""
    model: LoadedParts = models.tiny(models.ARCHITECTURES[name])
    bos = model.config.bos_token_id
    assert bos is not None
    export(model, "hf", tmp_path / "out")
    processor = formats._processor(tmp_path / "out")
    shown = models.picture(56, 56)
    messages = _talk([shown], 0)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    two_steps = processor(images=[shown], text=[text])["input_ids"][0]
    one_step = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    without = processor(images=[shown], text=[text], add_special_tokens=False)["input_ids"][0]
    prompt = load(tmp_path / "out", device="cpu", quantize=None).prompt(conversation_of(messages))
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    ids = [image if number == IMAGE_TOKEN else number for number in prompt.input_ids.tolist()]
    assert list(two_steps) == list(one_step) == [bos, *without] == ids
    assert bos not in without
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"begins with `{processor.tokenizer.bos_token}`, once" in card
    assert '"add_special_tokens": true' in card


SIZES = [(200, 120), (56, 56), (90, 301)]
# Of logits up to 11; measured worst of all ten cases, on one thread: 2e-5.
SEVERAL_TOLERANCE = 1e-4


def _talk(shown: list[Image.Image], later: int) -> list[dict[str, Any]]:
    """A question about pictures, the last `later` of which a second turn adds."""
    first, second = shown[: len(shown) - later], shown[len(shown) - later :]

    def asked(pictures: list[Image.Image], text: str) -> dict[str, Any]:
        parts = [{"type": "image", "image": picture} for picture in pictures]
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    turns = [asked(first, "What is this?")]
    if later:
        answer_message = {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}
        turns += [answer_message, asked(second, "And this?")]
    return turns


@pytest.fixture(scope="module", params=[ANYRES, ONEVISION])
def exported(request: pytest.FixtureRequest, models: ModuleType, tmp_path_factory: Any) -> Path:
    target = tmp_path_factory.mktemp("several") / "out"
    assert not export(models.tiny(models.ARCHITECTURES[request.param]), "hf", target).notes
    return target


@pytest.mark.parametrize(("pictures", "later"), [(0, 0), (1, 0), (2, 0), (3, 0), (2, 1)])
@torch.inference_mode()
def test_any_number_of_pictures_has_the_tokens_and_logits_of_transformers(
    models: ModuleType, formats: ModuleType, exported: Path, pictures: int, later: int
) -> None:
    """ONEVISION shows one picture in tiles and several as squares; ANYRES always in tiles."""
    import transformers

    hf_model = transformers.AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    processor = formats._processor(exported)
    shown = [models.picture(*size) for size in SIZES[:pictures]]
    messages = _talk(shown, later)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[shown] if shown else None, text=[text], return_tensors="pt")
    assistant = load(exported, device="cpu", quantize=None)
    prompt = assistant.prompt(conversation_of(messages))
    marked = prompt.input_ids.masked_fill(prompt.input_ids == IMAGE_TOKEN, hf_model.config.image_token_id)
    assert marked.tolist() == inputs["input_ids"][0].tolist()
    logits = assistant.model.decoder.logits(assistant.model(prompt.input_ids[None], prompt.encode_images()))
    expected = hf_model(**inputs).logits
    rows = min(logits.shape[-1], expected.shape[-1])
    assert (logits[..., :rows] - expected[..., :rows]).abs().max() < SEVERAL_TOLERANCE


def test_how_several_pictures_are_shown_survives_or_is_told(models: ModuleType, tmp_path: Path) -> None:
    model = models.tiny(models.ARCHITECTURES[ONEVISION])

    def exported(number: int, video: bool = True, **policy: Any) -> tuple[tuple[str, ...], LoadedParts]:
        config = replace(model.config, image=replace(model.config.image, **policy))
        changed = replace(model, config=config if video else replace(config, video=None))
        notes = export(changed, "hf", tmp_path / str(number)).notes
        return notes, read_model(tmp_path / str(number))

    notes, back = exported(0)
    assert (notes, back.config.image) == ((), model.config.image)
    # No picture has more tiles than the largest of the pinpoints (112 x 112, 168 x 56): none ever shrinks.
    notes, back = exported(1, max_tiles=None, several="square")
    assert (notes, back.config.image.max_tiles, back.config.image.several) == ((), 4, "square")
    notes, back = exported(2, several="tiles")
    assert notes == ("transformers shows each of several pictures as one square, this model in tiles",)
    assert back.config.image.several == "square"
    notes, _ = exported(3, pad_color=(1, 2, 3))
    assert notes == (
        "transformers pads each of several pictures with (127, 127, 127), this model with (1, 2, 3)",
    )
    notes, back = exported(4, video=False, max_tiles=None, several="tiles")  # becomes a LlavaNext
    assert (notes, back.config.image.several) == ((), "tiles")
