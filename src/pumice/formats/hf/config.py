"""The configs that transformers writes -> ours: language models, vision towers, image processors.

Knows: the keys of its config.json and preprocessor_config.json, old and new, and what transformers
takes when one is absent. Does not know: tensors or tokenizers. What our model cannot compute is
refused by the key that asks for it.
"""

from __future__ import annotations

from typing import Any

from pumice.config import DecoderConfig, ImagePolicy, RopeScaling, VisionConfig, naming
from pumice.errors import InputError
from pumice.formats.families import FAMILIES, TOWERS
from pumice.storage.json_file import Keys

ACTIVATIONS = {
    "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"
}  # fmt: skip

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
NORMALISATION = {"clip": (CLIP_MEAN, CLIP_STD), "siglip": (_HALF, _HALF)}


def decoder_config(given: Keys, tied: bool | None = None) -> DecoderConfig:
    """A language model's config.json, or the `text_config` of a LLaVA.

    tied: whether the head is the embedding, where the config around this one says so. Raises InputError
    on anything that our decoder does not compute.
    """
    kind = given.get("model_type", str)
    if kind not in FAMILIES:
        raise InputError(f"{given.where}: model_type is {kind!r}; {', '.join(FAMILIES)} can be read")
    keys = Keys(given.values, given.where, FAMILIES[kind].defaults)
    whole(keys)
    keys.only("hidden_act", ("silu", "swish"), "silu")
    keys.only("attention_bias", (False,), False, "the output projection would have a bias as well")
    keys.only("mlp_bias", (False,), False)
    keys.only("partial_rotary_factor", (1.0,), 1.0, "every value of a head must rotate")
    width, heads = keys.get("hidden_size", int), keys.get("num_attention_heads", int)
    depth, context = keys.get("num_hidden_layers", int), keys.get("max_position_embeddings", int)
    if (head_dim := _nullable(keys, "head_dim")) is None:
        if width % heads:
            raise InputError(f"{keys.where}: hidden_size {width} is no multiple of {heads} heads")
        head_dim = width // heads
    shared = _nullable(keys, "num_key_value_heads")
    base, scaling = _rope(keys, context)
    with naming(keys.where):
        return DecoderConfig(
            vocab_size=keys.get("vocab_size", int),
            width=width,
            depth=depth,
            heads=heads,
            kv_heads=heads if shared is None else shared,
            head_dim=head_dim,
            mlp_width=keys.get("intermediate_size", int),
            context=context,
            rope_theta=base,
            rope_scaling=scaling,
            norm_eps=keys.get("rms_norm_eps", float),
            tied_head=keys.get("tie_word_embeddings", bool, False) if tied is None else tied,
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            sliding_window=_window(keys, kind, depth, context),
        )


def vision_config(given: Keys, kind: str | None = None, **choices: Any) -> VisionConfig:
    """A tower's config.json, or the `vision_config` of a LLaVA or a CLIP.

    kind: model_type, where the config around this one says it. choices: fields of VisionConfig that the
    tower does not say: `layer`, and `select`, which is "full" for a SigLIP when not given.
    """
    kind = given.get("model_type", str, kind)
    if kind not in TOWERS:
        raise InputError(f"{given.where}: model_type is {kind!r}; {', '.join(TOWERS)} can be read")
    ours, defaults = TOWERS[kind].kind, TOWERS[kind].defaults
    keys = Keys(given.values, given.where, defaults)
    whole(keys)
    keys.only("num_channels", (3,), 3)
    if ours == "siglip":
        choices = {"select": "full"} | choices
    size, patch = keys.get("image_size", int), keys.get("patch_size", int)
    if not 0 < patch <= size:
        raise InputError(f"{keys.where}: a patch_size of {patch} does not fit into an image_size of {size}")
    with naming(keys.where):
        return VisionConfig(
            kind=ours,
            image_size=size,
            width=keys.get("hidden_size", int),
            stride=patch,
            depth=keys.get("num_hidden_layers", int),
            heads=keys.get("num_attention_heads", int),
            mlp_width=keys.get("intermediate_size", int),
            activation=keys.only("hidden_act", ACTIVATIONS, None),
            norm_eps=keys.get("layer_norm_eps", float),
            **choices,
        )


def image_policy(keys: Keys, vision: VisionConfig) -> ImagePolicy:
    """A preprocessor_config.json as the policy of a picture that is not cut into tiles.

    Raises InputError where it makes other squares than the tower takes.
    """
    keys.only("do_resize", (True,), True)
    keys.only("do_rescale", (True,), True)
    if abs((factor := keys.get("rescale_factor", float, 1 / 255)) * 255 - 1) > 1e-6:
        raise InputError(f"{keys.where}: rescale_factor is {factor}; only 1/255 can be read")
    mean, std = NORMALISATION[vision.kind]
    if keys.get("do_normalize", bool, True):
        mean, std = _three(keys, "image_mean", mean), _three(keys, "image_std", std)
    else:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    crop = keys.get("do_center_crop", bool, vision.kind == "clip")
    pad = keys.get("do_pad", bool, False)
    sides = _sides(keys, "size", vision.image_size)
    if crop:
        sides |= _sides(keys, "crop_size", vision.image_size)
    if sides - {vision.image_size}:
        raise InputError(
            f"{keys.where}: makes squares of {' or '.join(map(str, sorted(sides)))} pixels, "
            f"the tower takes {vision.image_size}"
        )
    shortest = isinstance(keys.values.get("size"), dict) and "shortest_edge" in keys.values["size"]
    if shortest and not crop and not pad:
        raise InputError(f"{keys.where}: shortest_edge without do_center_crop makes no squares")
    return ImagePolicy(
        mode="pad" if pad else "crop" if crop and _crops(keys) else "squash",
        mean=mean,
        std=std,
        resample=keys.only("resample", RESAMPLE, 3),
        pad_color=padding(mean),
    )


def default_policy(vision: VisionConfig) -> ImagePolicy:
    """Of a ViT that comes without a preprocessor_config.json: as its kind is published."""
    mean, std = NORMALISATION[vision.kind]
    mode = "crop" if vision.kind == "clip" else "squash"
    return ImagePolicy(mode=mode, mean=mean, std=std, pad_color=padding(mean))


def padding(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """LLaVA's colour around a picture that is padded: the mean's, rounded down."""
    red, green, blue = (int(part * 255) for part in mean)
    return red, green, blue


def whole(keys: Keys) -> None:
    """Refuse a checkpoint that was quantised: its tensors are not the model's weights."""
    if "quantization_config" in keys:
        method = keys.object("quantization_config").values.get("quant_method", "an unknown way")
        raise InputError(
            f"{keys.where}: quantization_config says that the weights are quantised by {method}; "
            "give the checkpoint that they were made of"
        )


def _nullable(keys: Keys, key: str) -> int | None:
    """A key for which null says something else than absence: no value, instead of the family's default."""
    if key in keys.values and keys.values[key] is None:
        return None
    return keys.get(key, int, keys.defaults.get(key))


def _rope(keys: Keys, context: int) -> tuple[float, RopeScaling | None]:
    """The rotary base and its scaling: `rope_parameters`, or before it `rope_theta` and `rope_scaling`."""
    rope = keys.object("rope_parameters" if "rope_parameters" in keys else "rope_scaling")
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise InputError(f"{rope.where} differs between layers, which cannot be read")
    base = rope.get("rope_theta", float, keys.get("rope_theta", float, 10000.0))
    rope.only("partial_rotary_factor", (1.0,), 1.0, "every value of a head must rotate")
    name = "rope_type" if "rope_type" in rope else "type"
    kind = rope.only(name, ("default", "linear", "llama3"), "default")
    if kind == "default":
        return base, None
    factor = rope.get("factor", float)
    if kind == "linear":
        return base, RopeScaling("linear", factor)
    original = rope.get("original_max_position_embeddings", int, context)
    low, high = rope.get("low_freq_factor", float), rope.get("high_freq_factor", float)
    return base, RopeScaling("llama3", factor, low, high, original)


def _window(keys: Keys, kind: str, depth: int, context: int) -> int | None:
    """The sliding window of all layers. InputError where only some layers have one that matters."""
    if kind == "llama" or (kind != "mistral" and not keys.get("use_sliding_window", bool, False)):
        return None
    window = _nullable(keys, "sliding_window")
    if window is None or window >= context or kind == "mistral":
        return window if window is not None and window < context else None
    layers = keys.get("layer_types", list, None)
    if layers is None:
        full = min(keys.get("max_window_layers", int), depth)
        layers = ["full_attention"] * full + ["sliding_attention"] * (depth - full)
    if len(set(layers)) > 1:
        name = "layer_types" if "layer_types" in keys else "max_window_layers"
        raise InputError(
            f"{keys.where}: {name} gives a sliding_window to {layers.count('sliding_attention')} of {depth} "
            "layers; only all or none can be read"
        )
    return window if layers[0] == "sliding_attention" else None


def _three(keys: Keys, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = keys.get(key, list, list(default))
    if len(value) != 3 or not all(isinstance(part, int | float) for part in value):
        raise InputError(f"{keys.where}: {key} should be three numbers, not {value!r}")
    red, green, blue = map(float, value)
    return red, green, blue


def _sides(keys: Keys, key: str, default: int) -> set[int]:
    """The sides that a size names: a number, {"shortest_edge": n} or {"height": n, "width": n}."""
    value = keys.values.get(key, default)
    sides = set(value.values()) if isinstance(value, dict) else {value}
    if not sides or not all(isinstance(side, int) for side in sides):
        raise InputError(f"{keys.where}: {key} should be one or two numbers of pixels, not {value!r}")
    return sides


def _crops(keys: Keys) -> bool:
    """Whether resizing leaves anything to crop: a size of height and width ignores the aspect ratio."""
    size = keys.values.get("size")
    return not (isinstance(size, dict) and "height" in size)
