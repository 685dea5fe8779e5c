"""Read the folder of a LLaVA of transformers, of any model_type in `recognise.HF_LLAVAS`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from pumice.config import ConnectorConfig, DecoderConfig, GenerationConfig, ImagePolicy, VisionConfig
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.families import FAMILIES, model_type
from pumice.formats.hf import idefics3
from pumice.formats.hf.config import (
    check_unquantised,
    decoder_config,
    image_policy,
    optional,
    read_processor,
    read_video_processor,
    vision_config,
)
from pumice.formats.recognise import HF_LLAVAS, check_classes
from pumice.formats.text.read import read_text_side
from pumice.media import VideoPolicy
from pumice.storage.json_file import Keys
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict, as_lazy, open_weights

# The values that transformers gives to absent keys of config.json, by model_type.
_LLAVA: dict[str, Any] = {
    "image_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
}  # fmt: skip
_NEXT = _LLAVA | {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}
_DEFAULTS = {
    "llava": _LLAVA,
    "llava_next": _NEXT,
    "llava_next_video": _NEXT | {"image_token_index": 32001, "spatial_pool_stride": 2},
    "llava_onevision": {
        "image_token_index": 151646, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[384 * high, 384 * wide] for high in range(1, 7) for wide in range(1, 7)],
    },
}  # fmt: skip
# The keys of config.json that only some model_types use.
_ONLY_IN = {
    "image_grid_pinpoints": ("llava_next", "llava_next_video", "llava_onevision"),
    "vision_aspect_ratio": ("llava_onevision",),
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
    processor, more_notes = read_processor(folder)
    said += more_notes
    said += _check_processor(folder, keys, kind, vision)
    image = _image(processor, keys, kind, vision)
    text_side = read_text_side(folder, keys)
    _check_image_token(folder, keys, text_side.tokenizer, decoder)
    biases = keys.get("multimodal_projector_bias", bool, True)
    family = FAMILIES[text.get("model_type", str)]
    config, notes = text_side.model_config(
        template, str(folder), fallback=family.template, decoder=decoder, vision=vision,
        connector=ConnectorConfig("mlp2x_gelu"), image=image, image_wrap=text_side.image_wrap(),
        video=_video(folder, keys, kind, vision),
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
            "and its like have; correct the model_type"
        )
    table = tensor_names.llava(config, nesting, tensor_names.hf_connector(biases), prefix)
    state = tensor_names.convert(tensors, table, str(folder))
    if not biases:
        state |= _zero_biases(state)
    return text_side.parts(config, state, (*said, *notes))


def read_generation(folder: Path) -> GenerationConfig:
    """Read generation_config.json: how transformers draws answers, with its values of absent keys."""
    keys = Keys.of(folder / "generation_config.json")
    penalty = keys.get("repetition_penalty", float, 1.0)
    if not keys.get("do_sample", bool, False):
        if penalty != 1:  # Pumice's beam search has no penalty
            return GenerationConfig(repetition_penalty=penalty)
        beams, length_penalty = keys.get("num_beams", int, 1), keys.get("length_penalty", float, 1.0)
        if beams > 1:  # Pumice's search ends as with false
            keys.only("early_stopping", (False,), False)
        return GenerationConfig(num_beams=beams, length_penalty=length_penalty).used
    temperature, top_p = keys.get("temperature", float, 1.0), keys.get("top_p", float, 1.0)
    return GenerationConfig(temperature, top_p, keys.get("top_k", int, 50), penalty)


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
    """Read how a picture is prepared. kind: model_type, of which all but Llava cut tiles."""
    prepared_by = processor.get("image_processor_type", str, "")
    processor_type = model_type(prepared_by)
    # LlavaNextVideo has the image processor of LlavaNext.
    allowed = {"llava_next_video": ("llava_next", kind)}.get(kind, (kind,))
    if processor_type in HF_LLAVAS and processor_type not in allowed:
        raise InputError(
            f"{processor.label}: image_processor_type is {prepared_by!r}, but model_type is {kind!r} in "
            f"{keys.label}; correct the wrong one"
        )
    if kind == "llava":
        return image_policy(processor, vision)
    # Of these, do_pad fills up a batch of pictures with empty tiles; it does not pad a picture.
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


def _video(folder: Path, keys: Keys, kind: str, vision: VisionConfig) -> VideoPolicy | None:
    """Read how videos are shown; None for a kind that was not trained on any.

    Raises InputError if frames become other squares than the tower takes, or are pooled in another way.
    """
    frames = read_video_processor(folder)
    if kind == "llava_onevision":
        return VideoPolicy(frames.get("num_frames", int, VideoPolicy.max_frames), pool=2)
    if kind != "llava_next_video":
        return None
    keys.only("spatial_pool_mode", ("average",), "average")
    if vision.select != "patch":
        raise InputError(f"{keys.label}: frames can only be pooled without a class token")
    policy = image_policy(frames, vision)  # raises unless the tower takes what it makes
    if policy.mode != "crop":
        raise InputError(f"{frames.label}: do_center_crop must be true, as in LlavaNextVideo's processor")
    # Published folders do not say how many frames; the model card shows eight.
    count = frames.get("num_frames", int, 8)
    return VideoPolicy(count, pool=keys.get("spatial_pool_stride", int), average=True)


def _check_processor(folder: Path, keys: Keys, kind: str, vision: VisionConfig) -> list[str]:
    """Compare what the files beside config.json repeat of it; return notes on what has no effect here.

    kind: model_type. Raises InputError where they contradict what is computed.
    """
    # 1. What decides the number of image tokens.
    repeated = optional(path := folder / "processor_config.json")
    values: dict[str, Any] = {
        "patch_size": vision.stride,
        "vision_feature_select_strategy": keys.get("vision_feature_select_strategy", str),
    }
    if kind == "llava_onevision":
        values["vision_aspect_ratio"] = keys.get("vision_aspect_ratio", str)
    for name, value in values.items():
        if (stated := repeated.get(name, type(value), value)) != value:
            raise InputError(
                f"{repeated.label}: {name} is {stated!r}, but {value!r} in {keys.label}; correct the wrong "
                "one"
            )
    # 2. What only other programs read.
    notes = []
    if (stated := repeated.get("num_additional_image_tokens", int, None)) not in (
        None,
        vision.kind == "clip",
    ):
        notes.append(
            f"num_additional_image_tokens is {stated} in {path.name}, but a {vision.kind} has "
            f"{int(vision.kind == 'clip')}; transformers counts other image tokens"
        )
    for name in ("preprocessor_config.json", path.name, "tokenizer_config.json"):
        file = optional(folder / name).values
        processor_type = model_type(str(file.get("processor_class")))
        if processor_type in HF_LLAVAS and processor_type != kind:
            notes.append(
                f"processor_class is {file['processor_class']} in {name}, but model_type {kind!r} was "
                "believed"
            )
    notes += [
        f"config.json has {name}, which model_type {kind!r} does not use"
        for name, kinds in _ONLY_IN.items()
        if keys.values.get(name) is not None and kind not in kinds
    ]
    return notes


def _check_image_token(folder: Path, keys: Keys, tokenizer: Any, decoder: DecoderConfig) -> None:
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
    # The other files name the token by its text; where none does, it is <image>, if the tokenizer has that.
    named = False
    for file in ("processor_config.json", "tokenizer_config.json"):
        text = optional(folder / file).values.get("image_token")
        named |= isinstance(text, str)
        if isinstance(text, str) and (stated := tokenizer.token_to_id(text)) != number:
            what = "which the tokenizer lacks" if stated is None else f"whose id is {stated}"
            raise InputError(
                f"{folder / file}: image_token is {text!r}, {what}, but {name} is {number} in {keys.label}; "
                "correct the wrong one"
            )
    if not named and (stated := tokenizer.token_to_id(idefics3.IMAGE)) not in (None, number):
        raise InputError(
            f"{keys.label}: {name} is {number}, but the tokenizer gives {idefics3.IMAGE} the id {stated}; "
            "correct the wrong one"
        )


def _zero_biases(state: LazyStateDict) -> LazyStateDict:
    """Return biases of zero for a projector that has none, because our connector always has them."""
    weights = {name: weight for name, weight in state.items() if name.startswith("connector.")}
    return {
        name.removesuffix("weight") + "bias": as_lazy(torch.zeros(weight.shape[0], dtype=weight.dtype))
        for name, weight in weights.items()
    }
