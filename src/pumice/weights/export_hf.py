"""Written for transformers: the folder of a Llava-, LlavaNext- or LlavaOnevisionForConditionalGeneration.

Knows: its keys, config.json and the files of its processor. Does not know: where the model comes from.

Tensors have the names of transformers 4.36 to 4.51, which every later version translates when it loads:
`language_model.model.*`, `language_model.lm_head`, `vision_tower.vision_model.*`,
`multi_modal_projector.linear_1/2`, `image_newline`. A picture's place in the text is the token `<image>`.
Where the tokenizer lacks it, it is added behind the last one; an embedding too short for it grows to a
multiple of 64 rows, as the published models have. The new rows are the mean of the old ones: their logit
is the mean of the others', so that greedy decoding never takes one.

Reading a picture: a model that pads needs transformers 4.49 or newer, for LlavaImageProcessor.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor

from pumice.config import DecoderConfig, GenerationConfig, ImagePolicy, ModelConfig, RopeScaling, VisionConfig
from pumice.templates import get_template
from pumice.weights import keymaps
from pumice.weights.chat_template import to_jinja
from pumice.weights.checkpoint import Stocks, write_weights
from pumice.weights.folder import LoadedParts
from pumice.weights.hf_config import RESAMPLE, padding
from pumice.weights.jsonfile import write_json

IMAGE = "<image>"
_ROWS = 64  # an embedding that grows gets a multiple of so many rows
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_OWN_KEYS: dict[str, dict[str, Any]] = {"clip": {}, "siglip": {"vision_use_head": False}}
_CLASSES = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}
_LINEAR = ("linear", "mlp1x_gelu")  # kinds of connector without anything but a matrix and a bias
_RESAMPLE = {name: number for number, name in RESAMPLE.items()}


def refusal(config: ModelConfig) -> str | None:
    """Why transformers' LLaVA cannot compute this model; None when it can."""
    image = config.image
    if reason := tower_refusal(config) or connector_refusal(config):
        return reason
    if image.mode == "anyres" and not image.unpad:
        return "the rows of its tiles do not end with image_newline, there they always do"
    if image.mode == "pad" and image.pad_color != padding(image.mean):
        return f"it pads with {image.pad_color}, there the colour is that of the mean, {padding(image.mean)}"
    return text_refusal(config.decoder)


def tower_refusal(config: ModelConfig) -> str | None:
    """Why the tower is none that others have; None when it is."""
    if config.vision.kind == "none":
        return "it is a language model alone"
    if config.vision.kind not in ("clip", "siglip"):
        return "no other software has its vision tower, an EfficientNet-Lite"
    return None


def connector_refusal(config: ModelConfig) -> str | None:
    """Why the connector is no mlp2x_gelu, nor can be written as one (`as_mlp`); None when it can."""
    kind, reduce = config.connector.kind, config.connector.reduce
    if reduce != "none":
        return f"its connector has {reduce} before it, which no other software has"
    if kind == "mlp2x_gelu":
        return None
    if kind not in _LINEAR:
        return f"its connector is {kind}, there it is always mlp2x_gelu"
    if 2 * config.vision.width > config.decoder.width:
        return (
            f"its connector is {kind}, there it is always mlp2x_gelu, which is a linear one only where the "
            f"LLM ({config.decoder.width}) is twice as wide as the tower ({config.vision.width})"
        )
    return None


def as_mlp(model: LoadedParts) -> LoadedParts:
    """A linear connector as the mlp2x_gelu that computes the same, because gelu(x) - gelu(-x) = x.

    Of D hidden values C are the features, C the features with the opposite sign; the second layer takes their
    difference as the linear one takes the features. Every weight stays as it is, in its type.
    """
    if model.config.connector.kind not in _LINEAR:
        return model
    weight, bias = (model.state[f"connector.layers.0.{part}"] for part in ("weight", "bias"))
    width, features = weight.shape  # D, C

    def both_signs(old: Tensor) -> Tensor:
        new, number = torch.zeros_like(old), torch.arange(features)
        new[number, number], new[features + number, number] = 1, -1
        return new

    def difference(old: Tensor) -> Tensor:
        return torch.cat((old, -old, old.new_zeros(width, width - 2 * features)), 1)

    state = model.state | {
        "connector.layers.0.weight": weight.then(both_signs),
        "connector.layers.0.bias": bias.then(torch.zeros_like),
        "connector.layers.2.weight": weight.then(difference, (width, width)),
        "connector.layers.2.bias": bias,
    }
    config = replace(model.config, connector=replace(model.config.connector, kind="mlp2x_gelu"))
    return replace(model, config=config, state=state)


def text_refusal(config: DecoderConfig) -> str | None:
    """Why none of transformers' Llama, Mistral, Qwen2 and Qwen3 is this decoder; None when one is."""
    if config.qk_norm and config.qkv_bias:
        return "its attention has both biases and query norms, which none of the decoders there has"
    if config.qkv_bias and (inner := config.heads * config.head_width) != config.width:
        return f"its heads take {inner} values, Qwen2's always {config.width}"
    return None


def write(folder: Path, model: LoadedParts) -> list[str]:
    """Write the folder; the model has no adapters. Returns notes."""
    notes = []
    if model.config.connector.kind in _LINEAR:
        notes.append("the linear connector is written as an mlp2x_gelu that computes the same")
    if _kind(model.config) == "llava_onevision":
        notes.append("transformers shows one picture in tiles, but each of several as one square")
    model = as_mlp(with_image_token(model))
    config, state, tokenizer = model.config, model.state, model.tokenizer
    chat = to_jinja(get_template(config.template, config.chat), config.image_wrap)
    table = keymaps.llava(config, keymaps.HF_NESTINGS[0], keymaps.hf_connector(True), "vision_model.")
    names = keymaps.inverse(table)
    write_weights(folder, {str(names[ours]): tensor for ours, tensor in state.items()})
    _write_config(folder, config, state, tokenizer)
    write_tokenizer(folder, config, tokenizer, chat)
    _write_processor(folder, config, chat)
    return notes


def with_image_token(model: LoadedParts) -> LoadedParts:
    """The model with `<image>` among its tokens, and an embedding long enough for it."""
    config, state = model.config, model.state
    tokenizer = Tokenizer.from_str(model.tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed <= config.decoder.vocab_size:
        return replace(model, tokenizer=tokenizer)
    rows = -(-needed // _ROWS) * _ROWS

    def grow(weight: Tensor) -> Tensor:
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        return torch.cat((weight, mean.expand(rows - len(weight), -1)))

    long = {name: state[name] for name in ("decoder.embed.weight", "decoder.head.weight") if name in state}
    state = state | {name: tensor.then(grow, (rows, tensor.shape[1])) for name, tensor in long.items()}
    config = replace(config, decoder=replace(config.decoder, vocab_size=rows))
    return replace(model, config=config, state=state, tokenizer=tokenizer)


def text_config(config: DecoderConfig) -> dict[str, Any]:
    """A decoder's config.json, under keys that transformers has read since 4.43."""
    values: dict[str, Any] = {
        "architectures": None,
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": _rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
    family, classes = "llama", "LlamaForCausalLM"
    if config.qkv_bias or config.qk_norm:
        family, classes = ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("qwen2", "Qwen2ForCausalLM")
        window = config.sliding_window
        values |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    elif config.sliding_window is not None:
        family, classes = "mistral", "MistralForCausalLM"
        values["sliding_window"] = config.sliding_window
    return values | {"model_type": family, "architectures": [classes]}


def vision_config(config: VisionConfig) -> dict[str, Any]:
    """A tower's config.json: of CLIPVisionModel or SiglipVisionModel."""
    return {
        "model_type": f"{config.kind}_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "image_size": config.image_size,
        "patch_size": config.stride,
        "hidden_act": _ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        **_OWN_KEYS[config.kind],
    }


def image_processor(image: ImagePolicy, size: int) -> dict[str, Any]:
    """preprocessor_config.json: of CLIPImageProcessor, or of Llava's, LlavaNext's or LlavaOnevision's own."""
    kind = "LlavaImageProcessor" if image.mode == "pad" else "CLIPImageProcessor"
    if image.mode == "anyres":
        kind = "LlavaNextImageProcessor" if image.max_tiles is None else "LlavaOnevisionImageProcessor"
    values: dict[str, Any] = {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _RESAMPLE[image.resample],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    if image.mode == "squash" or image.max_tiles is not None:
        values |= {"size": {"height": size, "width": size}, "do_center_crop": False}
    if image.mode in ("pad", "anyres"):
        values["do_pad"] = True  # its default for squares is False, which would crop in silence
    if image.mode == "anyres":
        values["image_grid_pinpoints"] = _pinpoints(image)
    return values


def write_tokenizer(folder: Path, config: ModelConfig, tokenizer: Tokenizer, chat: str) -> None:
    """tokenizer.json, which adds the begin-of-text by itself, and the two files beside it."""
    bos = None if config.bos_token_id is None else tokenizer.id_to_token(config.bos_token_id)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    wanted = plain if config.bos_token_id is None else [config.bos_token_id, *plain]
    if tokenizer.encode("a").ids != wanted:
        first = [] if bos is None else [bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A"],
            pair=[*first, "$A", "$B"],
            special_tokens=[] if bos is None else [(bos, config.bos_token_id)],
        )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8", newline="")
    stop = tokenizer.id_to_token(config.stop_token_ids[0]) if config.stop_token_ids else None
    fills = stop if tokenizer.token_to_id("<pad>") is None else "<pad>"
    named = {"bos_token": bos, "eos_token": stop, "pad_token": fills}
    special = {key: token for key, token in named.items() if token is not None}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.decoder.context,
            "model_input_names": ["input_ids", "attention_mask"],  # before 5.0 there would be token_type_ids
            "padding_side": "left",
            "chat_template": chat,
        },
    )


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """generation_config.json: where an answer ends, and how it is drawn."""
    stops = list(config.stop_token_ids)
    values = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": stops or None,
        "pad_token_id": next(iter(stops), None),
    }
    drawn = asdict(config.generation)
    if not drawn["temperature"]:  # greedy: transformers warns of what only a draw would use
        drawn = {"do_sample": False, "repetition_penalty": drawn["repetition_penalty"]}
    else:
        drawn["do_sample"] = True
    usual = asdict(GenerationConfig())
    values |= {key: value for key, value in drawn.items() if value != usual.get(key)}
    return {key: value for key, value in values.items() if value is not None}


def _write_config(folder: Path, config: ModelConfig, state: Stocks, tokenizer: Tokenizer) -> None:
    kind = _kind(config)
    text = text_config(config.decoder)
    if config.bos_token_id is not None:
        text["bos_token_id"] = config.bos_token_id
    if config.stop_token_ids:
        text["eos_token_id"] = config.stop_token_ids[0]
    dtype = str(state["decoder.embed.weight"].dtype).removeprefix("torch.")
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
        "text_config": text | {"torch_dtype": dtype},
        "vision_config": vision_config(config.vision),
    }
    if config.image.mode == "anyres":
        values["image_grid_pinpoints"] = _pinpoints(config.image)
    if kind == "llava_onevision":
        values |= {"vision_aspect_ratio": _aspect_ratio(config.image)}
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", generation_config(config))


def _write_processor(folder: Path, config: ModelConfig, chat: str) -> None:
    name = f"{_CLASSES[_kind(config)]}Processor"
    images = image_processor(config.image, config.vision.image_size) | {"processor_class": name}
    values: dict[str, Any] = {
        "processor_class": name,
        "image_token": IMAGE,
        "vision_feature_select_strategy": _strategy(config),
    }
    if _kind(config) == "llava_onevision":
        values |= {
            "num_image_tokens": config.vision.grid**2 + (config.vision.kind == "clip"),
            "vision_aspect_ratio": _aspect_ratio(config.image),
        }
        videos = {key: value for key, value in images.items() if key != "image_grid_pinpoints"}
        videos |= {"image_processor_type": None, "video_processor_type": "LlavaOnevisionVideoProcessor"}
        write_json(folder / "video_preprocessor_config.json", videos)  # its processor is not made without one
    else:
        class_tokens = int(config.vision.kind == "clip")
        values |= {"patch_size": config.vision.stride, "num_additional_image_tokens": class_tokens}
    write_json(folder / "preprocessor_config.json", images)
    write_json(folder / "processor_config.json", values)
    (folder / "chat_template.jinja").write_text(chat, encoding="utf-8", newline="")
    write_json(folder / "chat_template.json", {"chat_template": chat})  # read before 4.50


def _kind(config: ModelConfig) -> str:
    """Its model_type."""
    if config.image.mode != "anyres":
        return "llava"
    return "llava_next" if config.image.max_tiles is None else "llava_onevision"


def _aspect_ratio(image: ImagePolicy) -> str:
    return f"anyres_max_{image.max_tiles}"


def _strategy(config: ModelConfig) -> str:
    return "default" if config.vision.select == "patch" else "full"


def _pinpoints(image: ImagePolicy) -> list[list[int]]:
    """Height first, which is its order."""
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
