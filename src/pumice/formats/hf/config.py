"""Read the configs that transformers writes: language models, vision towers, image processors.

The keys are those of config.json and preprocessor_config.json, old and new. An absent key has the value that
transformers gives it. A value that our model cannot compute is an InputError which names the key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pumice.capability import CHAT, LORA, PICTURED, ROPE_SCALING, fields
from pumice.config import (
    ChatFormat,
    DecoderConfig,
    GenerationConfig,
    ImagePolicy,
    LoraConfig,
    RopeScaling,
    VisionConfig,
)
from pumice.config_json import naming
from pumice.errors import InputError, finite, shorten
from pumice.formats.families import FAMILIES, TOWERS, Family, check_rotation
from pumice.formats.recognise import check_classes
from pumice.storage.json_file import Keys

_Number = TypeVar("_Number", int, float)
# What every exporter writes of these parts.
WRITTEN = {
    RopeScaling: fields(ROPE_SCALING),
    GenerationConfig: fields("temperature top_p top_k repetition_penalty num_beams length_penalty"),
    ChatFormat: fields(f"{CHAT} {PICTURED}"),
    LoraConfig: fields(LORA),
}
# Sizes of our configs -> their keys in transformers.
DECODER_KEYS = {
    "vocab_size": "vocab_size", "width": "hidden_size", "mlp_width": "intermediate_size",
    "depth": "num_hidden_layers", "heads": "num_attention_heads", "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}  # fmt: skip
VISION_KEYS = {
    "width": "hidden_size", "mlp_width": "intermediate_size", "depth": "num_hidden_layers",
    "heads": "num_attention_heads", "image_size": "image_size", "stride": "patch_size",
    "norm_eps": "layer_norm_eps",
}  # fmt: skip
# transformers' name of a tower's activation -> ours.
ACTIVATIONS = {
    "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"
}  # fmt: skip

# The activations of a decoder's MLP, transformers' name -> ours.
_SWIGLU = {"silu": "silu", "swish": "silu"}
_GEGLU = {"gelu_pytorch_tanh": "gelu_tanh"}
# Keys with which other decoders scale, cap or skip a part of their computation, and their values that mean
# nothing. A row of FAMILIES for such a model would read all its weights, and answer nonsense.
_OF_OTHER_DECODERS: dict[str, tuple[Any, ...]] = {
    "embedding_multiplier": (1.0,), "attention_multiplier": (), "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,), "logit_scale": (1.0,), "scale_emb": (1.0,), "scale_depth": (), "clip_qkv": (),
    "no_rope_layers": (), "rope_local_base_freq": (), "use_qk_norm": (False,),
    "use_parallel_residual": (False,), "rope_interleave": (False,),
}  # fmt: skip
_LAYER_TYPES = ("full_attention", "sliding_attention")

# Pillow's number of a filter -> our name.
RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
RESAMPLE_NUMBERS = {name: number for number, name in RESAMPLE.items()}
# Mean and standard deviation of the pixels (red, green, blue) that each kind of tower was trained with.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
NORMALISATION = {"clip": (CLIP_MEAN, CLIP_STD), "siglip": (_HALF, _HALF)}


def decoder_config(source: Keys, tied: bool | None = None) -> DecoderConfig:
    """Read a language model's config.json, or the `text_config` of a LLaVA.

    tied: whether the head is the embedding, if the config around this one says it. Raises InputError on
    anything that our decoder does not compute.
    """
    # 1. The family decides the defaults of absent keys.
    kind = source.get("model_type", str)
    if kind not in FAMILIES:
        raise InputError(f"{source.label}: model_type is {kind!r}; {', '.join(FAMILIES)} can be read")
    family = FAMILIES[kind]
    keys = Keys(source.values, source.label, family.defaults)
    check_classes(keys, kind)
    check_unquantised(keys)
    # 2. Refuse what our decoder does not compute; a model without it would answer nonsense and raise nothing.
    check_rotation(kind, keys.label)
    # Gemma 2 computes with hidden_activation, whatever hidden_act says.
    key, allowed = ("hidden_activation", _GEGLU) if kind == "gemma2" else ("hidden_act", _SWIGLU)
    activation = keys.only(key, allowed, next(iter(allowed)))
    keys.only("use_bidirectional_attention", (False,), False, "a token would see later ones")
    keys.only("attention_bias", (False,), False, "the output projection would have a bias as well")
    keys.only("mlp_bias", (False,), False)
    keys.only("partial_rotary_factor", (1.0,), 1.0, "every value of a head must rotate")
    for key, neutral in _OF_OTHER_DECODERS.items():
        if key in keys and keys.values[key] not in neutral:
            raise InputError(
                f"{keys.label}: {key} is {shorten(keys.values[key])}, which Pumice does not compute; set it "
                "to null if the model was trained without it"
            )
    # 3. Sizes. Some configs leave head_dim out, or set it to null, when the heads divide the width.
    sizes = _sizes(keys, DECODER_KEYS)
    width, heads, depth, context = (sizes[name] for name in ("width", "heads", "depth", "context"))
    if (head_dim := _nullable(keys, "head_dim")) is None:
        if width % heads:
            raise InputError(f"{keys.label}: hidden_size {width} is no multiple of {heads} heads")
        head_dim = width // heads
    kv_heads = _nullable(keys, "num_key_value_heads")
    default_tied = bool(keys.defaults.get("tie_word_embeddings", False))
    rope_theta, rope_scaling = _rope(keys, context)
    # 4. What only a Gemma 2 has.
    gemma: dict[str, Any] = {}
    if kind == "gemma2":
        gemma = {
            "embed_scale": width**0.5,
            "attention_scale": keys.get("query_pre_attn_scalar", float) ** -0.5,
            "attention_softcap": _nullable(keys, "attn_logit_softcapping", float),
            "logit_softcap": _nullable(keys, "final_logit_softcapping", float),
        }
    window, pattern = _window(keys, family, depth, context)
    fields = family.fields | gemma | {"window_pattern": pattern}
    with naming(keys.label):
        return DecoderConfig(
            **sizes,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tied_head=keys.get("tie_word_embeddings", bool, default_tied) if tied is None else tied,
            sliding_window=window,
            activation=activation,
            **fields,
        )


def vision_config(source: Keys, kind: str | None = None, **choices: Any) -> VisionConfig:
    """Read a tower's config.json, or the `vision_config` of a LLaVA or a CLIP.

    kind: the model_type, if this config does not say it. choices: the fields of VisionConfig that no tower
    says: `layer` and `select`; `select` is "full" by default for a SigLIP, which has no class token.
    """
    kind = source.get("model_type", str, kind)
    if kind not in TOWERS:
        raise InputError(f"{source.label}: model_type is {kind!r}; {', '.join(TOWERS)} can be read")
    tower_kind, defaults = TOWERS[kind].kind, TOWERS[kind].defaults
    choices = TOWERS[kind].fields | choices
    keys = Keys(source.values, source.label, defaults)
    check_classes(keys, kind)
    check_unquantised(keys)
    keys.only("num_channels", (3,), 3)
    if tower_kind == "siglip":
        choices = {"select": "full"} | choices
    sizes = _sizes(keys, VISION_KEYS)
    size, patch = sizes["image_size"], sizes["stride"]
    if not 0 < patch <= size:
        raise InputError(f"{keys.label}: a patch_size of {patch} does not fit into an image_size of {size}")
    with naming(keys.label):
        return VisionConfig(
            kind=tower_kind, activation=keys.only("hidden_act", ACTIVATIONS, None), **sizes, **choices
        )


def read_processor(folder: Path) -> tuple[Keys, list[str]]:
    """Read the image processor's keys: since transformers 5, a part of processor_config.json.

    Also returns a note if the older file says something else. Raises InputError if both are missing.
    """
    combined, older = folder / "processor_config.json", folder / "preprocessor_config.json"
    if "image_processor" not in (keys := optional(combined)):
        return Keys.of(older), []
    processor, others = keys.object("image_processor"), optional(older).values
    differing = [
        name for name in processor.values.keys() & others.keys() if processor.values[name] != others[name]
    ]
    if not differing:
        return processor, []
    return processor, [f"{older.name} has another {min(differing)} than {combined.name}, which was read"]


def read_video_processor(folder: Path) -> Keys:
    """Read the video processor's keys, of the same files; without any if there is none."""
    combined = optional(folder / "processor_config.json").object("video_processor")
    return combined if combined.values else optional(folder / "video_preprocessor_config.json")


def optional(path: Path) -> Keys:
    """Read the keys of a JSON file; without any if the file is missing."""
    return Keys.of(path) if path.is_file() else Keys({}, str(path))


def image_policy(keys: Keys, vision: VisionConfig) -> ImagePolicy:
    """Read a preprocessor_config.json as the policy for a picture that is not cut into tiles.

    Raises InputError if its pictures have another size than the tower takes.
    """
    # 1. Pixels are scaled to 0..1, then normalised. A mean of 0 and a std of 1 change nothing.
    keys.only("do_resize", (True,), True)
    keys.only("do_rescale", (True,), True)
    if abs((factor := keys.get("rescale_factor", float, 1 / 255)) * 255 - 1) > 1e-6:
        raise InputError(f"{keys.label}: rescale_factor is {factor}; only 1/255 can be read")
    mean, std = NORMALISATION[vision.kind]
    if keys.get("do_normalize", bool, True):
        mean, std = _three(keys, "image_mean", mean), _three(keys, "image_std", std)
    else:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    # 2. Every size in the file must be the tower's: width and height of a square, in pixels.
    crop = keys.get("do_center_crop", bool, vision.kind == "clip")
    pad = keys.get("do_pad", bool, False)
    sides = _sides(keys, "size", vision.image_size)
    if crop:
        sides |= _sides(keys, "crop_size", vision.image_size)
    if sides - {vision.image_size}:
        raise InputError(
            f"{keys.label}: pictures become {' or '.join(map(str, sorted(sides)))} pixels wide and high, "
            f"the tower takes {vision.image_size}"
        )
    # 3. With shortest_edge alone, a picture keeps its aspect ratio and is not square.
    size = keys.values.get("size")
    named = size if isinstance(size, dict) else {}
    if "shortest_edge" in named and not crop and not pad:
        raise InputError(f"{keys.label}: shortest_edge without do_center_crop does not make pictures square")
    with naming(keys.label):
        return ImagePolicy(
            # Resizing to a height and a width leaves nothing to crop.
            mode="pad" if pad else "crop" if crop and "height" not in named else "squash",
            mean=mean,
            std=std,
            resample=keys.only("resample", RESAMPLE, 3),
            pad_color=padding(mean),
        )


def default_policy(vision: VisionConfig) -> ImagePolicy:
    """Return the policy of a ViT without a preprocessor_config.json: the usual one of its kind."""
    mean, std = NORMALISATION[vision.kind]
    mode = "crop" if vision.kind == "clip" else "squash"
    return ImagePolicy(mode=mode, mean=mean, std=std, pad_color=padding(mean))


def padding(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """Return LLaVA's colour around a padded picture: the mean, as 0..255, rounded down."""
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue


def check_unquantised(keys: Keys) -> None:
    """Raise InputError on a quantised checkpoint: its tensors are not the model's weights."""
    if "quantization_config" in keys:
        method = keys.object("quantization_config").values.get("quant_method", "an unknown way")
        raise InputError(
            f"{keys.label}: quantization_config says that the weights are quantised by {method}; "
            "give the checkpoint that was quantised"
        )


def _sizes(keys: Keys, names: dict[str, str]) -> dict[str, Any]:
    """Read the sizes of a config. names: field -> key."""
    return {name: keys.get(key, float if name == "norm_eps" else int) for name, key in names.items()}


def stored_sizes(config: DecoderConfig | VisionConfig, names: dict[str, str]) -> dict[str, Any]:
    """Return the sizes of a config by the keys of transformers. names: field -> key."""
    return {key: getattr(config, name) for name, key in names.items()}


def _nullable(keys: Keys, key: str, kind: type[_Number] = int) -> _Number | None:
    """Read a key for which null is a value: None, not the family's default as for an absent key."""
    if key in keys.values and keys.values[key] is None:
        return None
    return keys.get(key, kind, keys.defaults.get(key))


def _rope(keys: Keys, context: int) -> tuple[float, RopeScaling | None]:
    """Read rope_theta and its scaling: `rope_parameters`, or as before `rope_theta` and `rope_scaling`.

    Raises InputError if a config has both and they differ, as versions of transformers read one or the other.
    """
    rope = keys.object("rope_parameters" if "rope_parameters" in keys else "rope_scaling")
    scaling = _scaling(rope, context)
    default = keys.defaults.get("rope_theta", 10000.0)
    rope_theta = rope.get("rope_theta", float, keys.get("rope_theta", float, default))
    older = keys.object("rope_scaling")
    for place in (keys, older):
        if (stated := place.values.get("rope_theta")) not in (None, rope_theta):
            raise InputError(
                f"{rope.label}: rope_theta is {rope_theta:g}, but {shorten(stated)} in {place.label}; "
                "correct the wrong one"
            )
    if older.values and _scaling(older, context) != scaling:
        raise InputError(f"{rope.label} and rope_scaling differ; correct the wrong one")
    return rope_theta, scaling


def _scaling(rope: Keys, context: int) -> RopeScaling | None:
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise InputError(f"{rope.label} differs between layers, which cannot be read")
    rope.only("partial_rotary_factor", (1.0,), 1.0, "every value of a head must rotate")
    name = "rope_type" if "rope_type" in rope else "type"
    kind = rope.only(name, ("default", "linear", "llama3"), "default")
    if kind == "default":
        return None
    factor = rope.get("factor", float)
    if kind == "linear":
        return RopeScaling("linear", factor)
    original = rope.get("original_max_position_embeddings", int, context)
    low, high = rope.get("low_freq_factor", float), rope.get("high_freq_factor", float)
    return RopeScaling("llama3", factor, low, high, original)


def _window(keys: Keys, family: Family, depth: int, context: int) -> tuple[int | None, int]:
    """Return the sliding window in tokens, and the pattern of layers without one (1: all layers have it).

    Raises InputError if the layers without one have no such pattern.
    """
    switched_off = family.window == "use_sliding_window" and not keys.get("use_sliding_window", bool, False)
    if family.window == "never" or switched_off:
        return None, 1
    # A window as long as the context hides nothing, so it counts as none.
    window = _nullable(keys, "sliding_window")
    if window is None or window >= context:
        return None, 1
    if family.window == "all":
        return window, 1
    # Configs older than layer_types have the family's pattern, or full attention in the first
    # max_window_layers layers.
    layers = keys.get("layer_types", list, None)
    if layers is None:
        full_layers = min(
            keys.get("max_window_layers", int, keys.defaults.get("max_window_layers", 0)), depth
        )
        sliding = layer_types(depth, family.fields.get("window_pattern", 1))
        layers = [_LAYER_TYPES[False]] * full_layers + sliding[full_layers:]
    if layers == [_LAYER_TYPES[False]] * depth:
        return None, 1
    for pattern in range(1, depth + 1):
        if layers == layer_types(depth, pattern):
            return window, pattern
    name = "layer_types" if "layer_types" in keys else "max_window_layers"
    raise InputError(
        f"{keys.label}: {name} gives a sliding_window to {layers.count('sliding_attention')} of {depth} "
        "layers; only all, none, or all but every n-th can be read"
    )


def layer_types(depth: int, pattern: int) -> list[str]:
    """Return `layer_types` of transformers: every `pattern`-th layer lacks the sliding window (1: none)."""
    return [_LAYER_TYPES[pattern == 1 or bool((layer + 1) % pattern)] for layer in range(depth)]


def _three(keys: Keys, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = keys.get(key, list, list(default))
    if len(value) != 3 or not all(type(number) in (int, float) for number in value):
        raise InputError(f"{keys.label}: {key} should be three numbers, not {shorten(value)}")
    red, green, blue = (finite(number, f"{keys.label}: {key}") for number in value)
    return red, green, blue


def _sides(keys: Keys, key: str, default: int) -> set[int]:
    """Return the sides of a size in pixels: a number, {"shortest_edge": n} or {"height": n, "width": n}."""
    value = keys.values.get(key, default)
    sides = list(value.values()) if isinstance(value, dict) else [value]
    if not sides or not all(isinstance(side, int) for side in sides):
        raise InputError(f"{keys.label}: {key} should be one or two numbers of pixels, not {shorten(value)}")
    return set(sides)
