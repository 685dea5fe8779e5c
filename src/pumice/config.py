"""The configuration of a model, as frozen dataclasses that `config.json` stores.

It holds everything that a checkpoint's behaviour depends on. Nothing is decided from a name or a path.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pumice.config_json import as_stored, from_dict, later
from pumice.errors import InputError, check_known, counted, shorten
from pumice.media import TileMarks, VideoPolicy, check_box_form

FORMAT_VERSION = 1
IMAGE_MODES = ("pad", "crop", "squash", "anyres", "split", "grid")
TILED = ("anyres", "split", "grid")  # the modes that may cut an image into tiles
SEVERAL = ("tiles", "square")
RESAMPLINGS = ("bicubic", "bilinear", "lanczos")
STDS = (1e-6, 1e6)  # the range of a std of pixels: one near 0 makes them infinite
# The lowest and the highest value of each setting of how answers are sampled, and the range in words.
SAMPLING_RANGES = {
    "temperature": (0, math.inf, "0 (greedy) or more"),
    "top_p": (math.ulp(0.0), 1, "more than 0, at most 1"),
    "top_k": (0, math.inf, "0 (off) or more"),
    "repetition_penalty": (0.01, 1e6, "0.01 to 1000000.0"),  # one near 0 makes logits infinite
    "num_beams": (1, 64, "1 (off) to 64"),
    "length_penalty": (-10, 10, "-10 to 10"),
}
# What beam search does without, and the values that turn each off: fields of `SamplingParams`.
WITHOUT_BEAMS: dict[str, Any] = {
    "temperature": 0, "repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0,
    "logprobs": None, "prompt_logprobs": None,
}  # fmt: skip
DECODER_ACTIVATIONS = ("silu", "gelu_tanh")
# How a connector reduces the features of a tile -> their number after it, from the features on a side and the
# config's factor. `model/connector.py` computes them.
REDUCTIONS: dict[str, Callable[[int, int], int]] = {
    "average": lambda grid, factor: (grid // factor) ** 2,
    "pixel_shuffle": lambda grid, factor: (grid // factor) ** 2,
}
IMAGE_TOKEN = -200  # a picture's placeholder in input_ids, LLaVA's own number

# The largest sizes that are read: all blocks are built before weights are compared.
LARGEST = {
    "longest_edge": 8192,
    "depth": 1000,
    "context": 2**24,
    "vocab_size": 2**24,
    "sliding_window": 2**31,
}
LARGEST_OTHER = 2**20
LARGEST_GRID = 32  # tiles on a side of an image


def _at_least(minimum: int, config: Any, names: str) -> None:
    """Raise InputError if a named size of a config is below `minimum` or above its entry in LARGEST."""
    for name in names.split():
        if (value := getattr(config, name)) is None:
            continue
        if value < minimum:
            raise InputError(f"{name} must be {minimum} or more, not {value}")
        if value > (largest := LARGEST.get(name, LARGEST_OTHER)):
            raise InputError(f"{name} must be {largest} or less, not {shorten(value)}")


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: pixels (B, 3, S, S) in, features (B, F, width) out."""

    kind: str = "efficientnet_lite"  # efficientnet_lite | clip | siglip | none (a language model alone)
    image_size: int = 256  # S, pixels on a side
    width: int = 1280  # channels of one feature
    stride: int = 32  # pixels that one feature stands for (a ViT's patch); grid = image_size / stride
    # EfficientNet-Lite only:
    variant: str = "lite2"  # widths and depths of its blocks
    # Finer features (8 or 16 pixels each) that stand beside each feature; 0: none. It has no place in repr(),
    # from which feature caches take their fingerprint: `width` differs with it.
    also_stride: int = later(0, repr=False)
    # A ViT only (clip, siglip):
    depth: int = 0
    heads: int = 0
    mlp_width: int = 0
    activation: str = "quick_gelu"  # quick_gelu | gelu | gelu_tanh
    norm_eps: float = 1e-5
    layer: int = -2  # which hidden state is the feature: 0 the embeddings, 1 the first block's, -1 the last's
    select: str = "patch"  # patch (drops the class token) | cls_patch | full (siglip, which has none)
    final_norm: bool = later(False, repr=False)  # SigLIP only: features after the last norm (Idefics3)
    fractional: bool = later(False, repr=False)  # positions by fractional coordinates, as in transformers

    @property
    def grid(self) -> int:
        return self.image_size // self.stride

    @property
    def features(self) -> int:
        """F: the number of features that the tower gives of one tile."""
        return self.grid**2 + (self.select == "cls_patch")

    def __post_init__(self) -> None:
        _at_least(1, self, "image_size width stride")
        _at_least(0, self, "depth heads mlp_width")
        if self.kind == "efficientnet_lite" and self.image_size % self.stride:
            raise InputError(
                f"image size {self.image_size} is not a multiple of the tower's stride {self.stride}"
            )
        if self.also_stride and self.kind != "efficientnet_lite":
            raise InputError(f"a {self.kind} tower has features of one stride; leave also_stride out")
        if self.also_stride not in (0, 8, 16):
            raise InputError(f"also_stride must be 0, 8 or 16, not {self.also_stride}")


@dataclass(frozen=True)
class RopeScaling:
    """Slower rotary positions, for contexts longer than those of the LLM's first training."""

    kind: str  # linear | llama3
    factor: float
    low_freq_factor: float = 1.0  # llama3: what turns fewer times than this in original_context is slowed
    high_freq_factor: float = 4.0  # llama3: what turns more often than this is not
    original_context: int = 8192  # llama3: tokens

    def __post_init__(self) -> None:
        check_known(self.kind, ("linear", "llama3"), f"unknown kind {self.kind!r}")
        if self.factor <= 0:
            raise InputError(f"the factor must be more than 0, not {self.factor}")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder with rotary positions: Llama, Mistral, Qwen2, Qwen3 and Gemma 2 are settings of it."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context: int = 2048  # longest sequence, tokens
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_head: bool = False  # the vocabulary projection is the embedding's transpose
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    sliding_window: int | None = None  # Mistral: a token sees this many positions, itself included
    # Gemma 2 only:
    window_pattern: int = later(1)  # n > 1: every n-th layer has no sliding window
    activation: str = later("silu")  # silu | gelu_tanh, of the gate of the MLP
    post_norms: bool = later(False)  # the outputs of attention and MLP are normalised as well
    norm_offset: float = later(0.0)  # added to the weight of every norm
    embed_scale: float = later(1.0)  # multiplies the embeddings of text
    attention_scale: float | None = later(None)  # multiplies scores; None: head_dim ** -0.5
    attention_softcap: float | None = later(None)  # scores become softcap * tanh(scores / softcap)
    logit_softcap: float | None = later(None)  # the same of the logits

    def window(self, layer: int) -> int | None:
        """Return how many positions a token sees in this layer, itself included; None: all."""
        full = self.window_pattern > 1 and (layer + 1) % self.window_pattern == 0
        return None if full else self.sliding_window

    def __post_init__(self) -> None:
        problem = f"the decoder's activation {self.activation!r} is unknown"
        check_known(self.activation, DECODER_ACTIVATIONS, problem)
        for name in ("embed_scale", "attention_scale", "attention_softcap", "logit_softcap"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise InputError(f"{name} must be more than 0, not {value}")
        _at_least(0, self, "vocab_size depth")
        _at_least(1, self, "width heads kv_heads mlp_width context head_dim window_pattern sliding_window")
        if self.head_dim < 2 or self.head_dim % 2:
            raise InputError(f"rotary positions turn pairs; a head_dim of {self.head_dim} has none")
        if self.heads % self.kv_heads:
            raise InputError(
                f"{counted(self.heads, 'head')} cannot share {self.kv_heads} key/value heads evenly"
            )


@dataclass(frozen=True)
class ConnectorConfig:
    """Tower features (B, grid * grid, vision width) to image tokens (B, N, decoder width)."""

    kind: str = "mlp2x_gelu"  # linear | mlpNx_gelu | identity
    reduce: str = "none"  # none | average | pixel_shuffle: how a block of features becomes one token
    factor: int = 1  # features on a side of that block
    bias: bool = later(True)  # of each linear layer

    def __post_init__(self) -> None:
        _at_least(1, self, "factor")
        check_known(self.reduce, ("none", *REDUCTIONS), f"unknown reduction {self.reduce!r}")
        if self.reduce == "none" and self.factor != 1:
            raise InputError(
                f"a connector with factor {self.factor} must say how it joins {self.factor} x {self.factor} "
                "features; set reduce to average or pixel_shuffle"
            )

    def tokens(self, grid: int) -> int:
        """Return the tokens that grid x grid features become. Raises InputError if `factor` is no divisor."""
        if grid % self.factor:
            raise InputError(
                f"a grid of {grid} x {grid} features cannot be reduced by {self.factor}; give a divisor of "
                f"{grid}"
            )
        return REDUCTIONS[self.reduce](grid, self.factor)


@dataclass(frozen=True)
class ImagePolicy:
    """How an image of any size becomes the tower's input of S x S pixels."""

    # pad (to a square, then resize) | crop (shortest edge, centre) | squash | anyres, split, grid (tiles)
    mode: str = "pad"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resample: str = "bicubic"  # bicubic | bilinear | lanczos
    pad_color: tuple[int, int, int] = (124, 116, 104)  # int(mean * 255)
    # anyres only (LLaVA-NeXT): the (width, height) in pixels that an image may be resized to before it is cut
    # into tiles. The first of equally good ones is used, so the checkpoint's order matters.
    pinpoints: tuple[tuple[int, int], ...] = ()
    unpad: bool = True  # drop features of the tiles' padding, end each row with `image_newline`
    max_tiles: int | None = None  # LLaVA-OneVision's anyres_max_9: more features than that many tiles' shrink
    # Tiles only: how each of several images in a conversation is shown: in "tiles", as a single image is
    # (LLaVA-NeXT), or as one "square" tile, padded as by "pad" (LLaVA-OneVision). None becomes "square" if
    # max_tiles is given, else "tiles". Feature caches take their fingerprint from repr(). This field is not
    # in it, because a cache has different keys for an image's tiles and for its square.
    several: str | None = field(default=None, repr=False)
    longest_edge: int = later(0, repr=False)  # squash, split, grid: of the longer side at first
    enlarge: bool = later(True, repr=False)  # grid only: smaller images grow to longest_edge

    def __post_init__(self) -> None:
        for name, allowed in (("mode", IMAGE_MODES), ("resample", RESAMPLINGS)):
            check_known(value := getattr(self, name), allowed, f"unknown {name} {value!r}")
        if not all(0 <= part <= 1 for part in self.mean):  # which also refuses nan
            raise InputError(f"a mean of {shorten(self.mean)} cannot be that of pixels from 0 to 1")
        low, high = STDS
        if not all(low <= part <= high for part in self.std):
            std = shorten(self.std)
            raise InputError(f"pixels cannot be divided by a std of {std}; use {low:g} to {high:g}")
        if not all(0 <= part <= 255 for part in self.pad_color):
            raise InputError(f"pad_color is {shorten(self.pad_color)}; each part must be from 0 to 255")
        _at_least(1, self, "max_tiles")
        if self.mode in ("split", "grid"):
            _at_least(1, self, "longest_edge")
        if self.mode in TILED and self.several is None:
            object.__setattr__(self, "several", "tiles" if self.max_tiles is None else "square")
        if self.several is not None:
            check_known(self.several, SEVERAL, f"unknown several {self.several!r}")

    def uses_tiles(self, images: int) -> bool:
        """Return whether each image of a conversation with this many images is cut into tiles."""
        return self.mode in TILED and (images == 1 or self.several == "tiles")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates (arXiv 2106.09685) of the decoder's linear layers: W + alpha / rank * B @ A."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    def __post_init__(self) -> None:
        _at_least(1, self, "rank")
        if not 0 <= self.dropout < 1:
            raise InputError(
                f"dropout is {self.dropout:g}, but must be at least 0 and less than 1: "
                "at 1 the adapters would learn nothing"
            )


def asked_for(settings: Mapping[str, Any], offs: Mapping[str, Any]) -> list[str]:
    """Return the settings that ask for something. offs: the values that ask for nothing, also if left out."""
    return [name for name, off in offs.items() if settings.get(name, off) != off]


def check_beams(settings: Mapping[str, Any]) -> None:
    """Raise InputError if settings of sampling ask for beams and for what beam search does without."""
    others = asked_for(settings, WITHOUT_BEAMS)
    if (beams := settings["num_beams"]) > 1 and others:
        offs = (f"no {name}" if (off := WITHOUT_BEAMS[name]) is None else f"{name} {off}" for name in others)
        raise InputError(
            f"num_beams is {beams}, which does not go with {' and '.join(others)}; "
            f"give num_beams 1, or {' and '.join(offs)}"
        )


@dataclass(frozen=True)
class GenerationConfig:
    """How a model's answers are sampled by default. These fields' own defaults are greedy.

    The fields are some of those of `SamplingParams`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    num_beams: int = later(1)
    length_penalty: float = later(1.0)

    def __post_init__(self) -> None:
        for name, (low, high, words) in SAMPLING_RANGES.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise InputError(f"{name} is {shorten(value)}; give {words}")
        check_beams(vars(self))

    @property
    def used(self) -> GenerationConfig:
        """The same without the values that have no effect, such as top_p where the temperature is 0."""
        if self.temperature:
            return replace(self, length_penalty=1.0)
        penalty, beams = self.repetition_penalty, self.num_beams
        length_penalty = self.length_penalty if beams > 1 else 1.0
        return GenerationConfig(repetition_penalty=penalty, num_beams=beams, length_penalty=length_penalty)


_GREEDY = GenerationConfig()


@dataclass(frozen=True)
class ChatFormat:
    """The fixed texts of a chat format; between them stands what people and the model say."""

    user: tuple[str, str]  # before and after a question
    assistant: str  # opens an answer; a prompt ends with it
    stop: str  # ends an answer, and is learned with it
    answer: tuple[str, str] = ("", "")  # around an answer's text, and learned with it
    between: str = ""  # after an answer's stop, before the next question
    system: tuple[str, str] | None = None  # before and after a system message; None: it has no place
    default_system: str | None = None  # used if a conversation has no system message
    system_in_user: bool = False  # the system message stands inside the first question, before its text
    specials: tuple[str, ...] = ()  # special tokens in these texts: a tokenizer must have them
    trim: tuple[str, ...] = ()  # roles whose text loses the blanks around it
    opening: str = ""  # after `assistant` before the newest answer only (Qwen3's empty thought)
    stop_once: bool = False  # only the newest answer ends with `stop` (LLaVA-1.5 in transformers)
    text_first: str = later("")  # after user[0] of a question that begins with text, not with a picture
    image_line: bool = later(True)  # each picture at the front of a question has a line of its own
    shared_line: bool = later(False)  # pictures at the front of a question have one line together
    earlier: str = later("")  # opens answers before the newest, where `assistant` opens only that one
    # Around the descriptions of functions, one a line, after the system message. Calls are in Qwen's form.
    tools: tuple[str, str] | None = later(None)


@dataclass(frozen=True)
class ModelConfig:
    """A complete LLaVA, and how text and images become its input."""

    decoder: DecoderConfig
    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    image: ImagePolicy = field(default_factory=ImagePolicy)
    template: str = "chatml"  # one template, for training and serving alike
    chat: ChatFormat | None = None  # the format that the template "own" stands for
    stop_token_ids: tuple[int, ...] = ()  # any of these ends an answer
    bos_token_id: int | None = None  # stands once, before everything
    image_wrap: tuple[str, str] | None = None  # special tokens around each picture (LLaVA 1.0's <im_start>)
    marks: TileMarks | None = field(default=None, metadata={"later": True})  # around pictures and tiles
    video: VideoPolicy | None = field(default=None, metadata={"later": True})  # None: not trained on any
    generation: GenerationConfig = field(default=_GREEDY, metadata={"later": True})
    boxes: str = later("padded")  # how boxes are written in texts and answers: one of media.BOX_FORMS
    lora: LoraConfig | None = None  # adapters beside the parts; merged when loaded to answer
    trained_pictures: int | None = None  # the most pictures in one training conversation; None: not known

    def __post_init__(self) -> None:
        check_box_form(self.boxes)
        if self.vision.kind != "none":
            _ = self.image_tokens  # raises if the connector's blocks do not fit the tower's grid
        side = self.vision.image_size
        if (longest := self.image.longest_edge) > LARGEST_GRID * side:
            raise InputError(f"longest_edge {longest} is more than {LARGEST_GRID} tiles of {side} pixels")
        if self.image.mode != "anyres":
            return
        if not self.image.pinpoints:
            raise InputError("anyres needs image.pinpoints: the widths and heights that tiles may fill")
        for width, height in self.image.pinpoints:
            if width % side or height % side or not width * height:
                raise InputError(f"pinpoint {width} x {height} is not a whole number of {side}-pixel tiles")
        if self.vision.select == "cls_patch":
            raise InputError("anyres joins the patches of its tiles; vision.select cannot be cls_patch")

    @property
    def has_newline(self) -> bool:
        """Whether the rows of a picture's tiles end with the learned token `image_newline`."""
        return self.image.mode == "anyres" and self.image.unpad

    @property
    def image_tokens(self) -> int:
        """N: the tokens of one tile, which is the whole image unless the mode is anyres."""
        if self.connector.reduce == "none":
            return self.vision.features
        if self.vision.select == "cls_patch":
            raise InputError("a class token cannot be reduced; set vision.select to patch")
        return self.connector.tokens(self.vision.grid)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON values of config.json."""
        return {"pumice_format": FORMAT_VERSION, **as_stored(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], location: str = "config.json") -> ModelConfig:
        """Inverse of `to_dict`; raises InputError on an unknown or missing key and a wrong type or value."""
        values = dict(values)
        version = values.pop("pumice_format", None)
        if version != FORMAT_VERSION:
            raise InputError(
                f"{location} has pumice_format {json.dumps(version)}, this version reads {FORMAT_VERSION}; "
                "update Pumice, or write the folder anew with a version that reads it"
            )
        return typing.cast(ModelConfig, from_dict(cls, values, location))
