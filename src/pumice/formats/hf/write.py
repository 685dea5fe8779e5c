"""Write a model as the folder of a LLaVA of transformers: Llava, LlavaNext, LlavaNextVideo or LlavaOnevision.

Tensors have the names of transformers 4.36 to 4.51, which every later version translates when it loads:
`language_model.model.*`, `language_model.lm_head`, `vision_tower.vision_model.*`,
`multi_modal_projector.linear_1/2`, `image_newline`. The token `<image>` stands for a picture in the text, and
`<video>` for a video. If the tokenizer lacks one, it becomes the last token. If the embedding has no row for
it, the embedding grows to a multiple of 64 rows, as in the published models. The new rows are the mean of the
old ones: their logit is the mean of the others', so that greedy decoding never takes one.

A model that pads pictures needs transformers 4.49 or newer, which has LlavaImageProcessor.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor

from pumice.config import (
    DecoderConfig,
    GenerationConfig,
    ImagePolicy,
    ModelConfig,
    RopeScaling,
    VisionConfig,
)
from pumice.formats import names as tensor_names
from pumice.formats.families import FAMILIES
from pumice.formats.hf import idefics3
from pumice.formats.hf.card import model_card
from pumice.formats.hf.config import (
    DECODER_KEYS,
    RESAMPLE_NUMBERS,
    VISION_KEYS,
    layer_types,
    padding,
    stored_sizes,
)
from pumice.formats.hf.refusal import ACTIVATIONS, LINEAR, gemma_fields, image_kind
from pumice.formats.text.chat_template_write import to_jinja
from pumice.storage.json_file import write_json
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict, write_weights
from pumice.templates import get_template

IMAGE, VIDEO = "<image>", "<video>"
_ROW_MULTIPLE = 64  # an embedding that grows gets a multiple of this number of rows
# Keys of vision_config that only one kind of tower has. LLaVA does not use SigLIP's pooling head.
_TOWER_KEYS: dict[str, dict[str, Any]] = {"clip": {}, "siglip": {"vision_use_head": False}}
# model_type -> how the names of transformers' classes begin.
_CLASSES = {
    "llava": "Llava", "llava_next": "LlavaNext", "llava_next_video": "LlavaNextVideo",
    "llava_onevision": "LlavaOnevision",
}  # fmt: skip


def as_mlp(model: LoadedParts) -> LoadedParts:
    """Return the model with its linear connector written as an mlp2x_gelu that computes the same.

    It uses gelu(x) - gelu(-x) = x. Of the D hidden values, C are the features and C the features with the
    opposite sign. The second layer applies the linear connector's weight to their difference. No weight is
    rounded.
    """
    if model.config.connector.kind not in LINEAR or model.config.marks is not None:
        return model
    weight, bias = (model.state[f"connector.layers.0.{part}"] for part in ("weight", "bias"))
    width, features = weight.shape  # D, C

    def both_signs(old: Tensor) -> Tensor:  # (D, C), the first layer
        new, feature = torch.zeros_like(old), torch.arange(features)
        new[feature, feature], new[features + feature, feature] = 1, -1
        return new

    def difference(old: Tensor) -> Tensor:  # (D, D), the second layer; unused hidden values have the weight 0
        return torch.cat((old, -old, old.new_zeros(width, width - 2 * features)), 1)

    state = model.state | {
        "connector.layers.0.weight": weight.map(both_signs),
        "connector.layers.0.bias": bias.map(torch.zeros_like),
        "connector.layers.2.weight": weight.map(difference, (width, width)),
        "connector.layers.2.bias": bias,
    }
    config = replace(model.config, connector=replace(model.config.connector, kind="mlp2x_gelu"))
    return replace(model, config=config, state=state)


def write(folder: Path, model: LoadedParts) -> list[str]:
    """Write the folder of a model without adapters. Returns notes for the user."""
    if model.config.marks is not None:
        return _write_idefics3(folder, model)
    # 1. Tell the user what another program will do differently.
    notes = []
    if model.config.decoder.embed_scale != 1.0:
        notes.append(
            "transformers before 5.0 multiplies image tokens as it does embeddings, so its answers about "
            "pictures differ"
        )
    if model.config.decoder.logit_softcap is not None:
        notes.append(
            "transformers' LLaVA leaves out the cap of the logits: the likeliest token is the same, "
            "probabilities differ"
        )
    if model.config.connector.kind in LINEAR:
        notes.append("the linear connector is written as an mlp2x_gelu that computes the same")
    if _kind(model.config) == "llava_onevision":
        notes += square_notes(model.config.image, "transformers")
    # 2. Change the model to one that transformers can compute: an mlp2x_gelu, and tokens for what it shows.
    model = as_mlp(with_media_tokens(model))
    config, state, tokenizer = model.config, model.state, model.tokenizer
    chat = to_jinja(get_template(config.template, config.chat), config.image_wrap)
    # 3. Write the tensors under transformers' names, then the config and the files that prepare the input.
    table = tensor_names.llava(
        config, tensor_names.HF_NESTINGS[0], tensor_names.hf_connector(True), "vision_model."
    )
    names = tensor_names.inverse(table)
    write_weights(folder, {names[name]: tensor for name, tensor in state.items()})
    _write_config(folder, config, state, tokenizer)
    _write_processor(folder, config)
    _write_text_side(folder, config, tokenizer, chat)
    return notes


def _write_idefics3(folder: Path, model: LoadedParts) -> list[str]:
    """Write the folder of an Idefics3, whose processor puts the marks around pictures."""
    model = with_media_tokens(model)
    config, tokenizer = model.config, model.tokenizer
    nesting, connector = tensor_names.IDEFICS3, tensor_names.IDEFICS3_CONNECTOR
    names = tensor_names.inverse(tensor_names.llava(config, nesting, connector, ""))
    write_weights(folder, {names[name]: tensor for name, tensor in model.state.items()})
    text, dtype = stored_text_config(config, model.state)
    vision = vision_config(config.vision) | {"model_type": "idefics3_vision"}
    vision.pop("vision_use_head")
    parts: dict[str, Any] = {"text_config": text, "vision_config": vision, "torch_dtype": dtype}
    parts["image_token_id"] = tokenizer.token_to_id(IMAGE)
    write_json(folder / "config.json", idefics3.model_config(config, parts))
    write_json(folder / "generation_config.json", generation_config(config))
    chat = to_jinja(get_template(config.template, config.chat))
    idefics3.write_processor(folder, config)
    _write_text_side(folder, config, tokenizer, chat)
    return []


def _write_text_side(folder: Path, config: ModelConfig, tokenizer: Tokenizer, chat: str) -> None:
    """Write the tokenizer, its chat template, and the model card."""
    write_tokenizer(folder, config, tokenizer, chat)
    (folder / "chat_template.jinja").write_text(chat, encoding="utf-8", newline="")
    # transformers before 4.50 reads this file instead.
    write_json(folder / "chat_template.json", {"chat_template": chat})
    bos = None if config.bos_token_id is None else tokenizer.id_to_token(config.bos_token_id)
    (folder / "README.md").write_text(model_card(bos), encoding="utf-8", newline="")


def square_notes(image: ImagePolicy, other: str) -> list[str]:
    """Return notes on how another program shows several pictures in one conversation, if it differs."""
    if image.several == "tiles":
        return [f"{other} shows each of several pictures as one square, this model in tiles"]
    if image.pad_color != padding(image.mean):
        pad_color = padding(image.mean)
        return [f"{other} pads each of several pictures with {pad_color}, this model with {image.pad_color}"]
    return []


def with_media_tokens(model: LoadedParts) -> LoadedParts:
    """Return the model with `<image>`, and `<video>` if it has one, among its tokens, and rows for them."""
    config, state = model.config, model.state
    # Idefics3 shows the frames of a video as pictures.
    names = [IMAGE, VIDEO] if config.video is not None and config.marks is None else [IMAGE]
    tokenizer = Tokenizer.from_str(model.tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed <= config.decoder.vocab_size:
        return replace(model, tokenizer=tokenizer)
    rows = -(-needed // _ROW_MULTIPLE) * _ROW_MULTIPLE

    def grow(weight: Tensor) -> Tensor:
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        return torch.cat((weight, mean.expand(rows - len(weight), -1)))

    # The head has a row for each token as well, unless it is the embedding itself.
    to_grow = {name: state[name] for name in ("decoder.embed.weight", "decoder.head.weight") if name in state}
    state = state | {name: tensor.map(grow, (rows, tensor.shape[1])) for name, tensor in to_grow.items()}
    config = replace(config, decoder=replace(config.decoder, vocab_size=rows))
    return replace(model, config=config, state=state, tokenizer=tokenizer)


def text_config(config: DecoderConfig) -> dict[str, Any]:
    """Return a decoder's config.json, with the keys that transformers has read since 4.43."""
    # 1. What all families have.
    values: dict[str, Any] = {
        "architectures": None,
        "model_type": "llama",
        **stored_sizes(config, DECODER_KEYS),
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
    # 2. The family follows from what the attention has: biases, query norms, a sliding window.
    family = "llama"
    if config.qkv_bias or config.qk_norm:
        family = "qwen3" if config.qk_norm else "qwen2"
        window = config.sliding_window
        values |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
        if config.window_pattern > 1:
            values["layer_types"] = layer_types(config.depth, config.window_pattern)
    elif gemma_fields(config):
        family = "gemma2"
        assert config.attention_scale is not None  # `refusal.text_refusal` refuses it
        values |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": round(config.attention_scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
            "sliding_window": config.sliding_window,
            "layer_types": layer_types(config.depth, config.window_pattern),
        }
    elif config.sliding_window is not None:
        family = "mistral"
        values["sliding_window"] = config.sliding_window
    return values | {"model_type": family, "architectures": [FAMILIES[family].class_name]}


def vision_config(config: VisionConfig) -> dict[str, Any]:
    """Return a tower's config.json, of a CLIPVisionModel or a SiglipVisionModel."""
    return {
        "model_type": f"{config.kind}_vision_model",
        **stored_sizes(config, VISION_KEYS),
        "hidden_act": ACTIVATIONS[config.activation],
        **_TOWER_KEYS[config.kind],
    }


def image_processor(image: ImagePolicy, size: int) -> dict[str, Any]:
    """Return preprocessor_config.json. size: the width and height of a tile, in pixels."""
    # 1. The class: CLIP's crops, Llava's pads, the other two cut tiles. LlavaNextVideo has LlavaNext's.
    kind = "LlavaImageProcessor" if image.mode == "pad" else "CLIPImageProcessor"
    if image.mode == "anyres":
        kind = f"{_CLASSES[image_kind(image)]}ImageProcessor"
    # 2. CLIP's own steps, which all classes have: the short side to `size`, crop the middle, normalise.
    values: dict[str, Any] = {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": RESAMPLE_NUMBERS[image.resample],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    # 3. What the mode changes.
    if image.mode == "squash" or image_kind(image) == "llava_onevision":
        values |= {"size": {"height": size, "width": size}, "do_center_crop": False}
    if image.mode in ("pad", "anyres"):
        values["do_pad"] = True  # the default is False, which would crop and say nothing
    if image.mode == "anyres":
        values["image_grid_pinpoints"] = _pinpoints(image)
    return values


def write_tokenizer(folder: Path, config: ModelConfig, tokenizer: Tokenizer, chat: str, **own: Any) -> None:
    """Write tokenizer.json, which adds the begin-of-text token by itself, and the two files beside it.

    own: keys of tokenizer_config.json, in addition to ours or instead of them.
    """
    # 1. Make the tokenizer add the begin-of-text token, and no other, where it does not do so already.
    bos = None if config.bos_token_id is None else tokenizer.id_to_token(config.bos_token_id)
    text_ids = tokenizer.encode("a", add_special_tokens=False).ids
    expected = text_ids if config.bos_token_id is None else [config.bos_token_id, *text_ids]
    if tokenizer.encode("a").ids != expected:
        prefix = [] if bos is None else [bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*prefix, "$A"],
            pair=[*prefix, "$A", "$B"],
            special_tokens=[] if bos is None else [(bos, config.bos_token_id)],
        )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8", newline="")
    # 2. Name the special tokens. A batch needs a padding token. It is masked, so the stop token will do.
    stop = tokenizer.id_to_token(config.stop_token_ids[0]) if config.stop_token_ids else None
    pad = stop if tokenizer.token_to_id("<pad>") is None else "<pad>"
    roles = {"bos_token": bos, "eos_token": stop, "pad_token": pad}
    special = {key: token for key, token in roles.items() if token is not None}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.decoder.context,
            # Without this key, transformers before 5.0 adds token_type_ids.
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
            "chat_template": chat,
            **own,
        },
    )


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """Return generation_config.json: the tokens that end an answer, and how answers are drawn."""
    stops = list(config.stop_token_ids)
    values = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": stops or None,
        "pad_token_id": next(iter(stops), None),
    }
    # Absent keys have transformers' own values; its top_k is 50. It warns of what only a draw would use.
    drawn = config.generation.used
    is_greedy = not drawn.temperature
    usual = GenerationConfig(top_k=0 if is_greedy else 50)
    values["do_sample"] = not is_greedy
    values |= {key: value for key, value in asdict(drawn).items() if value != getattr(usual, key)}
    return {key: value for key, value in values.items() if value is not None}


def _write_config(folder: Path, config: ModelConfig, state: LazyStateDict, tokenizer: Tokenizer) -> None:
    # 1. The language model, with the tokens that begin a text and end an answer.
    kind = _kind(config)
    text, dtype = stored_text_config(config, state)
    # 2. The LLaVA around it: token for pictures, connector, and which of the tower's features are used.
    values: dict[str, Any] = {
        "architectures": [f"{_CLASSES[kind]}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_index": tokenizer.token_to_id(IMAGE),
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision.layer,
        "vision_feature_select_strategy": _strategy(config),
        "tie_word_embeddings": config.decoder.tied_head,
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": vision_config(config.vision),
    }
    # 3. How a picture is cut into tiles.
    if config.image.mode == "anyres":
        values["image_grid_pinpoints"] = _pinpoints(config.image)
    if kind == "llava_onevision":
        values |= {"vision_aspect_ratio": anyres_max(config)}
    if config.video is not None:
        values["video_token_index"] = tokenizer.token_to_id(VIDEO)
        if config.video.average:
            values |= {"spatial_pool_mode": "average", "spatial_pool_stride": config.video.pool}
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", generation_config(config))


def stored_text_config(config: ModelConfig, state: LazyStateDict) -> tuple[dict[str, Any], str]:
    """Return text_config with the tokens that begin a text and end an answer, and the type of the tensors."""
    text = text_config(config.decoder)
    if config.bos_token_id is not None:
        text["bos_token_id"] = config.bos_token_id
    if config.stop_token_ids:
        text["eos_token_id"] = config.stop_token_ids[0]
    dtype = str(state["decoder.embed.weight"].dtype).removeprefix("torch.")
    return text | {"torch_dtype": dtype}, dtype


def _write_processor(folder: Path, config: ModelConfig) -> None:
    kind = _kind(config)
    name = f"{_CLASSES[kind]}Processor"
    images = image_processor(config.image, config.vision.image_size) | {"processor_class": name}
    values: dict[str, Any] = {
        "processor_class": name,
        "image_token": IMAGE,
        "vision_feature_select_strategy": _strategy(config),
    }
    if kind == "llava_onevision":
        values |= {
            "num_image_tokens": config.vision.grid**2 + (config.vision.kind == "clip"),
            "vision_aspect_ratio": anyres_max(config),
        }
    else:
        class_tokens = int(config.vision.kind == "clip")
        values |= {"patch_size": config.vision.stride, "num_additional_image_tokens": class_tokens}
    if kind in ("llava_onevision", "llava_next_video"):  # whose processors need the file
        images_only = ("image_grid_pinpoints", "do_pad")
        videos = {key: value for key, value in images.items() if key not in images_only}
        videos |= {"image_processor_type": None, "video_processor_type": f"{_CLASSES[kind]}VideoProcessor"}
        if config.video is not None:
            values["video_token"] = VIDEO
            videos["num_frames"] = config.video.max_frames
        write_json(folder / "video_preprocessor_config.json", videos)
    write_json(folder / "preprocessor_config.json", images)
    write_json(folder / "processor_config.json", values)


def _kind(config: ModelConfig) -> str:
    """Return the model_type, one of `_CLASSES`, that prepares pictures and videos as this model does."""
    kind = image_kind(config.image)
    return "llava_next_video" if kind == "llava_next" and config.video is not None else kind


def anyres_max(config: ModelConfig) -> str:
    """Return LlavaOnevision's name for the largest number of tiles whose features are not shrunk.

    Without a limit in our config it is the number of tiles in the largest size, which is never exceeded.
    """
    side = config.vision.image_size
    max_tiles = max(width * height for width, height in config.image.pinpoints) // side**2
    return f"anyres_max_{config.image.max_tiles or max_tiles}"


def _strategy(config: ModelConfig) -> str:
    return "default" if config.vision.select == "patch" else "full"


def _pinpoints(image: ImagePolicy) -> list[list[int]]:
    """Return [height, width] pairs, which is the order of transformers."""
    return [[height, width] for width, height in image.pinpoints]


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        values |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return values
