"""Read the folder of a LLaVA of transformers: Llava, LlavaNext, LlavaOnevision, Idefics3 or SmolVLM."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, VisionConfig
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.families import FAMILIES
from pumice.formats.hf import idefics3
from pumice.formats.hf.config import check_unquantised, decoder_config, image_policy, vision_config
from pumice.formats.recognise import check_classes
from pumice.formats.text.read import read_text_side
from pumice.media import VideoPolicy
from pumice.storage.json_file import Keys
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict, as_lazy, open_weights

# The values that transformers gives to absent keys of config.json, by model_type.
_LLAVA: dict[str, Any] = {
    "image_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
}  # fmt: skip
_DEFAULTS = {
    "llava": _LLAVA,
    "llava_next": _LLAVA | {
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "llava_onevision": {
        "image_token_index": 151646, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[384 * high, 384 * wide] for high in range(1, 7) for wide in range(1, 7)],
    },
}  # fmt: skip
# The model_type of a text_config that does not say one; "llama" for the others.
_TEXT_MODEL_TYPE = {"llava_onevision": "qwen2"}
# The vision_config of a config.json that has none.
_CLIP_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
    "patch_size": 14, "num_hidden_layers": 24, "num_attention_heads": 16,
}  # fmt: skip
# (kind of tower, vision_feature_select_strategy) -> our VisionConfig.select.
_SELECT = {
    ("clip", "default"): "patch", ("clip", "full"): "cls_patch", ("siglip", "full"): "full"
}  # fmt: skip


def open_hf(folder: Path, template: str | None = None) -> LoadedParts:
    """Read the model in `folder`. template: a chat format instead of the one that the folder describes.

    Raises InputError on anything that our model does not compute, and on tensors that the config does not
    have.
    """
    # 1. config.json: the language model and the tower, each with the defaults of its model_type.
    source = Keys.of(folder / "config.json")
    kind = source.get("model_type", str)
    if kind in idefics3.KINDS:
        return idefics3.open_idefics3(folder, template)
    keys = Keys(source.values, source.label, _DEFAULTS[kind])
    check_unquantised(keys)
    keys.only("projector_hidden_act", ("gelu",), "gelu")
    said = list(check_classes(keys, kind))
    text = keys.object("text_config")
    ties = [part.get("tie_word_embeddings", bool, None) for part in (keys, text)]
    tied = any(ties)
    if set(ties) == {True, False}:
        outside, inside = (str(tie).lower() for tie in ties)
        said.append(
            f"tie_word_embeddings is {outside} in config.json and {inside} in its text_config; the head is "
            "tied"
        )
    text.values.setdefault("model_type", _TEXT_MODEL_TYPE.get(kind, "llama"))
    decoder = decoder_config(text, tied)
    vision = _vision(keys)
    # 2. How a picture becomes tiles, and how a conversation becomes tokens: the processor's and tokenizer's
    # files.
    processor = _processor(folder)
    _check_processor(folder, keys, vision)
    image = _image(processor, keys, kind, vision)
    text_side = read_text_side(folder, keys)
    _check_image_token(keys, text_side.tokenizer, decoder)
    biases = keys.get("multimodal_projector_bias", bool, True)
    family = FAMILIES[text.get("model_type", str)]
    config, notes = text_side.model_config(
        template, str(folder), fallback=family.template, decoder=decoder, vision=vision,
        connector=ConnectorConfig("mlp2x_gelu"), image=image, image_wrap=text_side.image_wrap(),
        video=VideoPolicy(pool=2) if kind == "llava_onevision" else None,
    )  # fmt: skip
    # The conversions that transformers published lack do_pad, although LLaVA 1.5 was trained with padding.
    if image.mode == "crop" and "do_pad" not in processor.values:
        notes += (f"pictures are cropped, as {Path(processor.label).name} does not ask for do_pad",)
    # 3. The tensors, renamed by a table. The prefixes of the parts depend on transformers' version.
    tensors = open_weights(folder)
    nesting = _nesting(tensors, folder)
    prefix = tensor_names.tower_prefix(tensors, nesting.tower) or ""
    tensor_names.check_family(tensors, f"{nesting.text}layers.0.", decoder, str(folder))
    tensor_names.check_tower(tensors, nesting.tower + prefix, vision, str(folder))
    if kind == "llava" and nesting.newline in tensors:
        raise InputError(
            f"{folder}: model_type is 'llava', but the tensors hold {nesting.newline}, which only llava_next "
            "and llava_onevision have; correct the model_type"
        )
    table = tensor_names.llava(config, nesting, tensor_names.hf_connector(biases), prefix)
    state = tensor_names.convert(tensors, table, str(folder))
    if not biases:
        state |= _zero_biases(state)
    return LoadedParts(
        config,
        state,
        text_side.tokenizer,
        {},
        notes=(*said, *notes),
        sentencepiece=text_side.files.sentencepiece,
    )


def _nesting(tensors: LazyStateDict, folder: Path) -> tensor_names.Nesting:
    """Return the prefixes of the folder's tensors: those of an older or of a newer transformers."""
    for nesting in tensor_names.HF_NESTINGS:
        if f"{nesting.text}embed_tokens.weight" in tensors:
            return nesting
    old, new = (f"{nesting.text}embed_tokens.weight" for nesting in tensor_names.HF_NESTINGS)
    raise InputError(f"{folder} has no tensor {old}, nor {new}; it holds no language model")


def _vision(keys: Keys) -> VisionConfig:
    """Read the tower's config, and which of its features the LLaVA uses."""
    layer = keys.get("vision_feature_layer", object)
    if not isinstance(layer, int):
        raise InputError(
            f"{keys.label}: vision_feature_layer is {layer!r}; features of one layer can be read"
        )
    source = keys.object("vision_config") if "vision_config" in keys else Keys(_CLIP_336, keys.label)
    vision = vision_config(source, "clip_vision_model", layer=layer)
    strategy = keys.get("vision_feature_select_strategy", str)
    if (vision.kind, strategy) not in _SELECT:
        choices = " or ".join(strategy for kind, strategy in _SELECT if kind == vision.kind)
        raise InputError(
            f"{keys.label}: vision_feature_select_strategy is {strategy!r}; of {vision.kind} it is {choices}"
        )
    return dataclasses.replace(vision, select=_SELECT[vision.kind, strategy])


def _image(processor: Keys, keys: Keys, kind: str, vision: VisionConfig) -> ImagePolicy:
    """Read how a picture is prepared. kind: model_type, of which LlavaNext and LlavaOnevision cut tiles."""
    if kind == "llava":
        return image_policy(processor, vision)
    # Of these two, do_pad fills up a batch of pictures with empty tiles; it does not pad a picture.
    policy = image_policy(Keys({**processor.values, "do_pad": False}, processor.label), vision)
    # Both files list the sizes that a picture may be resized to; the model was trained with only one list.
    pinpoints = keys.get("image_grid_pinpoints", list)
    stated = processor.get("image_grid_pinpoints", list, pinpoints)
    if stated != pinpoints:
        raise InputError(
            f"{processor.label}: image_grid_pinpoints is {stated}, but {pinpoints} in {keys.label}"
        )
    # LlavaOnevision shrinks the features of a picture that has more than max_tiles tiles.
    max_tiles = None
    if kind == "llava_onevision":
        ratio = keys.get("vision_aspect_ratio", str)
        if (match := re.fullmatch(r"anyres_max_(\d+)", ratio)) is None:
            raise InputError(f"{keys.label}: vision_aspect_ratio is {ratio!r}; only anyres_max_N can be read")
        max_tiles = int(match[1])
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pinpoints):
        raise InputError(f"{keys.label}: image_grid_pinpoints is {pinpoints}, not a list of [height, width]")
    # transformers writes the height first; we write the width first.
    sizes = tuple((width, height) for height, width in pinpoints)
    several = "square" if kind == "llava_onevision" else "tiles"
    return dataclasses.replace(
        policy, mode="anyres", pinpoints=sizes, unpad=True, max_tiles=max_tiles, several=several
    )


def _processor(folder: Path) -> Keys:
    """Read the image processor's keys: since transformers 5, a part of processor_config.json."""
    combined = folder / "processor_config.json"
    if combined.is_file() and "image_processor" in (keys := Keys.of(combined)):
        return keys.object("image_processor")
    return Keys.of(folder / "preprocessor_config.json")


def _check_processor(folder: Path, keys: Keys, vision: VisionConfig) -> None:
    """Compare what processor_config.json repeats of config.json, where there is such a file."""
    if not (file := folder / "processor_config.json").is_file():
        return
    processor = Keys.of(file)
    strategy = keys.get("vision_feature_select_strategy", str)
    for name, kind, value in (
        ("patch_size", int, vision.stride),
        ("vision_feature_select_strategy", str, strategy),
    ):
        if (stated := processor.get(name, kind, value)) != value:
            raise InputError(
                f"{processor.label}: {name} is {stated!r}, but {value!r} in {keys.label}; correct the wrong "
                "one"
            )


def _check_image_token(keys: Keys, tokenizer: Any, decoder: DecoderConfig) -> None:
    """Check the id of the token that stands for a picture in transformers.

    Our model does not need the token, but a tokenizer without it belongs to another model.
    """
    name = "image_token_id" if "image_token_id" in keys else "image_token_index"
    number = keys.get(name, int)
    if "image_token_index" in keys and (other := keys.get("image_token_index", int)) != number:
        raise InputError(
            f"{keys.label}: {name} is {number}, but image_token_index is {other}; correct the wrong one"
        )
    if tokenizer.id_to_token(number) is None:
        raise InputError(
            f"{keys.label}: {name} is {number}, which the tokenizer lacks; "
            f"it has {tokenizer.get_vocab_size()} tokens"
        )
    if number >= decoder.vocab_size:
        raise InputError(f"{keys.label}: {name} is {number}, but vocab_size only {decoder.vocab_size}")


def _zero_biases(state: LazyStateDict) -> LazyStateDict:
    """Return biases of zero for a projector that has none, because our connector always has them."""
    weights = {name: weight for name, weight in state.items() if name.startswith("connector.")}
    return {
        name.removesuffix("weight") + "bias": as_lazy(torch.zeros(weight.shape[0], dtype=weight.dtype))
        for name, weight in weights.items()
    }
