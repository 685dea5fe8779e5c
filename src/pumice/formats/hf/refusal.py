"""Which models a LLaVA of transformers can be, and why it cannot be the others."""

from __future__ import annotations

from pumice.capability import LLAMA, Capability, fields
from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.formats.hf import idefics3
from pumice.formats.hf.config import WRITTEN, padding
from pumice.media import VideoPolicy

# Our name of an activation -> transformers'.
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
LINEAR = ("linear", "mlp1x_gelu")  # the connectors that are one linear layer
_GEMMA2 = Capability(
    "Gemma 2 in transformers",
    {
        DecoderConfig: fields(
            "vocab_size width depth heads kv_heads head_dim mlp_width context rope_theta norm_eps tied_head "
            "sliding_window window_pattern embed_scale attention_scale attention_softcap logit_softcap",
            activation=("gelu_tanh",),
            post_norms=(True,),
            norm_offset=(1.0,),
        )
    },
)
_QWEN = Capability("Qwen in transformers", WRITTEN | {DecoderConfig: fields(f"{LLAMA} window_pattern")})
_LLAMA = Capability("Llama in transformers", WRITTEN | {DecoderConfig: fields(LLAMA)})
_DECODERS = (_LLAMA, _QWEN, _GEMMA2)


def capability(consumer: str) -> Capability:
    """Return what a LLaVA is written with; `text_refusal` sees to the decoder."""
    return Capability(
        consumer,
        WRITTEN
        | {
            ModelConfig: fields(
                "decoder vision connector image template chat stop_token_ids bos_token_id image_wrap "
                "generation lora trained_pictures video boxes"
            ),
            DecoderConfig: {name: None for decoder in _DECODERS for name in decoder.fields[DecoderConfig]},
            VisionConfig: fields(
                "image_size width stride depth heads mlp_width norm_eps layer select",
                kind=("clip", "siglip"),
                activation=tuple(ACTIVATIONS),
            ),
            ConnectorConfig: fields("kind reduce factor"),
            ImagePolicy: fields(
                "mean std resample pad_color pinpoints unpad max_tiles several",
                mode=("pad", "crop", "squash", "anyres"),
            ),
            VideoPolicy: fields("max_frames", pool=(2,), average=(True, False)),
        },
    )


CAPABILITY = capability("transformers' LLaVA")


def refusal(config: ModelConfig) -> str | None:
    """Return why transformers' LLaVA cannot compute this model; None if it can."""
    image = config.image
    if config.marks is not None:
        return text_refusal(config.decoder) or idefics3.refusal(config)
    if config.video is not None and (reason := _video_refusal(config)):
        return reason
    if reason := tower_refusal(config) or connector_refusal(config, "transformers' LLaVA does not have"):
        return reason
    if image.mode == "anyres" and not image.unpad:
        return "the rows of its tiles do not end with image_newline, there they always do"
    if image.mode == "pad" and image.pad_color != padding(image.mean):
        return f"it pads with {image.pad_color}, there the colour is that of the mean, {padding(image.mean)}"
    return text_refusal(config.decoder) or CAPABILITY.unsupported(config)


def _video_refusal(config: ModelConfig) -> str | None:
    """Return why neither LlavaOnevision nor LlavaNextVideo shows videos as this model does."""
    kind, video = image_kind(config.image), config.video
    assert video is not None
    if kind == "llava" or video.pool != 2:
        return "it was trained on videos, which there only models with anyres show, in half of a tile's rows"
    is_next = kind == "llava_next"
    if is_next != video.average:
        which = ("LlavaNextVideo", "averages") if is_next else ("LlavaOnevision", "does not average")
        return (
            f"it was trained on videos, and there a {which[0]} {which[1]} their features before the connector"
        )
    if is_next and config.vision.select != "patch":
        return "it was trained on videos, of which there a LlavaNextVideo leaves out the class token"
    return None


def image_kind(image: ImagePolicy) -> str:
    """Return the model_type (`llava`, `llava_next`, `llava_onevision`) that prepares pictures in this way."""
    if image.mode != "anyres":
        return "llava"
    return "llava_onevision" if image.max_tiles is not None or image.several == "square" else "llava_next"


def tower_refusal(config: ModelConfig) -> str | None:
    """Return why no other software has this vision tower; None if another program has it."""
    if config.vision.kind == "none":
        return "it is a language model alone"
    if config.vision.kind not in ("clip", "siglip"):
        name = "an EfficientNet-Lite" if config.vision.kind == "efficientnet_lite" else config.vision.kind
        return f"no other software has its vision tower, {name}"
    return None


def connector_refusal(config: ModelConfig, lacking: str) -> str | None:
    """Return why the connector cannot be written as an mlp2x_gelu, as `as_mlp` does; None if it can.

    lacking: says of a reduction before it which files lack it.
    """
    kind, reduce = config.connector.kind, config.connector.reduce
    if reduce != "none":
        return f"its connector has {reduce} before it, which {lacking}"
    if kind == "mlp2x_gelu":
        return None
    if kind not in LINEAR:
        return f"its connector is {kind}, there it is always mlp2x_gelu"
    # as_mlp needs two hidden values for each feature, and an mlp2x_gelu has as many as the LLM is wide.
    if 2 * config.vision.width > config.decoder.width:
        return (
            f"its connector is {kind}, there it is always mlp2x_gelu, which is a linear one only where the "
            f"LLM ({config.decoder.width}) is twice as wide as the tower ({config.vision.width})"
        )
    return None


def text_refusal(config: DecoderConfig) -> str | None:
    """Return why no decoder of transformers computes this one; None if one does."""
    if config.qk_norm and config.qkv_bias:
        return "its attention has both biases and query norms, which none of the decoders there has"
    if config.qkv_bias and (inner := config.heads * config.head_dim) != config.width:
        return f"its heads take {inner} values, Qwen2's always {config.width}"
    if not (gemma := gemma_fields(config)):
        return (_QWEN if config.qkv_bias or config.qk_norm else _LLAMA).unsupported(config)
    if reason := _GEMMA2.unsupported(config):
        return f"{' and '.join(gemma)} make it a Gemma 2 there, and {reason}"
    if abs(config.embed_scale - config.width**0.5) > 1e-6:
        return f"its embeddings are scaled by {config.embed_scale:g}, Gemma 2's by the root of the width"
    scalar = 0.0 if config.attention_scale is None else config.attention_scale**-2
    if scalar < 1 or abs(scalar - round(scalar)) > 1e-6 * scalar:
        return f"its attention_scale is {config.attention_scale}, Gemma 2's is a whole number's ** -0.5"
    return None


def gemma_fields(config: DecoderConfig) -> list[str]:
    """Return the names of the fields that no other family has."""
    values = {"post_norms": False, "norm_offset": 0.0, "activation": "silu"}
    return [name for name, value in values.items() if getattr(config, name) != value]
