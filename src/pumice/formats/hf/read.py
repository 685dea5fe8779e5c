"""A LLaVA as transformers keeps it: LlavaForConditionalGeneration, LlavaNext, LlavaOnevision.

Knows: its config.json, its processor's files, and how its tensors are nested. Everything else of the
folder is read by `config` and `text`.
"""

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
from pumice.formats.hf.config import decoder_config, image_policy, vision_config, whole
from pumice.formats.text.read import read_text_side
from pumice.storage.json_file import Keys
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict, open_weights, stored

# What transformers takes for keys that are absent, by model_type.
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
_TEXT = {"llava_onevision": "qwen2"}  # the text_config's model_type when it does not say one; else llama
_CLIP_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
    "patch_size": 14, "num_hidden_layers": 24, "num_attention_heads": 16,
}  # fmt: skip
_SELECT = {
    ("clip", "default"): "patch", ("clip", "full"): "cls_patch", ("siglip", "full"): "full"
}  # fmt: skip


def open_hf(folder: Path, template: str | None = None) -> LoadedParts:
    """The whole folder. template: instead of the one that its chat template describes.

    Raises InputError on anything that our model does not compute, and on tensors that are not the config's.
    """
    given = Keys.of(folder / "config.json")
    kind = given.get("model_type", str)
    keys = Keys(given.values, given.where, _DEFAULTS[kind])
    whole(keys)
    keys.only("projector_hidden_act", ("gelu",), "gelu")
    text = keys.object("text_config")
    tied = keys.get("tie_word_embeddings", bool, False) or text.get("tie_word_embeddings", bool, False)
    text.values.setdefault("model_type", _TEXT.get(kind, "llama"))
    decoder = decoder_config(text, tied)
    vision = _vision(keys)
    processor = _processor(folder)
    image = _image(processor, keys, kind, vision)
    side = read_text_side(folder, keys)
    _check_image_token(keys, side.tokenizer, decoder)
    biases = keys.get("multimodal_projector_bias", bool, True)
    family = FAMILIES[text.get("model_type", str)]
    config, notes = side.model_config(
        template, str(folder), fallback=family.template, decoder=decoder, vision=vision,
        connector=ConnectorConfig("mlp2x_gelu"), image=image, image_wrap=side.image_wrap(),
    )  # fmt: skip
    if image.mode == "crop" and "do_pad" not in processor.values:  # transformers' own conversions lack it
        notes += (f"pictures are cropped, as {Path(processor.where).name} does not ask for do_pad",)
    tensors = open_weights(folder)
    nesting = _nesting(tensors, folder)
    prefix = tensor_names.tower_prefix(tensors, nesting.tower) or ""
    table = tensor_names.llava(config, nesting, tensor_names.hf_connector(biases), prefix)
    state = tensor_names.convert(tensors, table, str(folder))
    if not biases:
        state |= _no_biases(state)
    return LoadedParts(config, state, side.tokenizer, {}, notes=notes, sentencepiece=side.files.sentencepiece)


def _nesting(tensors: LazyStateDict, folder: Path) -> tensor_names.Nesting:
    for nesting in tensor_names.HF_NESTINGS:
        if f"{nesting.text}embed_tokens.weight" in tensors:
            return nesting
    wanted = f"{tensor_names.HF_NESTINGS[0].text}embed_tokens.weight"
    raise InputError(
        f"{folder} has no tensor {wanted}, nor {tensor_names.HF_NESTINGS[1].text}embed_tokens.weight"
    )


def _vision(keys: Keys) -> VisionConfig:
    layer = keys.get("vision_feature_layer", object)
    if not isinstance(layer, int):
        raise InputError(
            f"{keys.where}: vision_feature_layer is {layer!r}; features of one layer can be read"
        )
    given = keys.object("vision_config") if "vision_config" in keys else Keys(_CLIP_336, keys.where)
    vision = vision_config(given, "clip_vision_model", layer=layer)
    strategy = keys.get("vision_feature_select_strategy", str)
    if (vision.kind, strategy) not in _SELECT:
        known = " or ".join(name for kind, name in _SELECT if kind == vision.kind)
        raise InputError(
            f"{keys.where}: vision_feature_select_strategy is {strategy!r}; of {vision.kind} it is {known}"
        )
    return dataclasses.replace(vision, select=_SELECT[vision.kind, strategy])


def _image(processor: Keys, keys: Keys, kind: str, vision: VisionConfig) -> ImagePolicy:
    if kind == "llava":
        return image_policy(processor, vision)
    # do_pad speaks of tiles here: it fills up a batch.
    policy = image_policy(Keys({**processor.values, "do_pad": False}, processor.where), vision)
    pinpoints = keys.get("image_grid_pinpoints", list)
    stated = processor.get("image_grid_pinpoints", list, pinpoints)
    if stated != pinpoints:
        raise InputError(
            f"{processor.where}: image_grid_pinpoints is {stated}, but {pinpoints} in {keys.where}"
        )
    most = None
    if kind == "llava_onevision":
        ratio = keys.get("vision_aspect_ratio", str)
        if (match := re.fullmatch(r"anyres_max_(\d+)", ratio)) is None:
            raise InputError(f"{keys.where}: vision_aspect_ratio is {ratio!r}; only anyres_max_N can be read")
        most = int(match[1])
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pinpoints):
        raise InputError(f"{keys.where}: image_grid_pinpoints is {pinpoints}, not a list of [height, width]")
    sizes = tuple((width, height) for height, width in pinpoints)
    several = "square" if kind == "llava_onevision" else "tiles"
    return dataclasses.replace(
        policy, mode="anyres", pinpoints=sizes, unpad=True, max_tiles=most, several=several
    )


def _processor(folder: Path) -> Keys:
    """The image processor's values: a part of processor_config.json from transformers 5 on."""
    whole_processor = folder / "processor_config.json"
    if whole_processor.is_file() and "image_processor" in (keys := Keys.of(whole_processor)):
        return keys.object("image_processor")
    return Keys.of(folder / "preprocessor_config.json")


def _check_image_token(keys: Keys, tokenizer: Any, decoder: DecoderConfig) -> None:
    """The token that stands for a picture there; ours needs none, but a folder without it is not whole."""
    name = "image_token_id" if "image_token_id" in keys else "image_token_index"
    number = keys.get(name, int)
    if tokenizer.id_to_token(number) is None:
        raise InputError(
            f"{keys.where}: {name} is {number}, which the tokenizer lacks; "
            f"it has {tokenizer.get_vocab_size()} tokens"
        )
    if number >= decoder.vocab_size:
        raise InputError(f"{keys.where}: {name} is {number}, but vocab_size only {decoder.vocab_size}")


def _no_biases(state: LazyStateDict) -> LazyStateDict:
    """Zeros for a projector without biases, which is the same."""
    weights = {name: t for name, t in state.items() if name.startswith("connector.")}
    return {
        name.removesuffix("weight") + "bias": stored(torch.zeros(weight.shape[0], dtype=weight.dtype))
        for name, weight in weights.items()
    }
