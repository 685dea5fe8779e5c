"""A field that is set is used, or refused by name: every field of every config, in every mode and kind."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pumice.config import (
    IMAGE_MODES,
    ChatFormat,
    ConnectorConfig,
    DecoderConfig,
    ImagePolicy,
    ModelConfig,
    RopeScaling,
    VisionConfig,
)
from pumice.conversation import Conversation, ImagePart, Message
from pumice.errors import InputError
from pumice.geometry import image_layout
from pumice.images import to_tiles
from pumice.media import TileMarks, VideoPolicy
from pumice.model.connector import KINDS, Connector
from pumice.model.decoder import Decoder
from pumice.model.layers import rope_inv_freq
from pumice.model.llava import TOWERS, make_tower
from pumice.processor import check_used
from pumice.templates import OWN, get_template

DECODER = DecoderConfig(52, 32, 2, 4, 2, 8, 40)
VISION = VisionConfig("siglip", 28, 32, 14, depth=1, heads=2, mlp_width=64, layer=-1, select="full")
# A size that every mode treats in its own way, and one smaller than two tiles.
SIZES = ((100, 40), (30, 40))
NEEDED: dict[str, dict[str, Any]] = {
    "anyres": {"pinpoints": ((56, 28), (28, 56), (56, 56))},
    "split": {"longest_edge": 84},
    "grid": {"longest_edge": 84},
}
IMAGE: dict[str, Any] = {
    "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "resample": "lanczos", "pad_color": (1, 2, 3),
    "pinpoints": ((84, 28),), "unpad": False, "max_tiles": 1, "several": "square", "longest_edge": 56,
    "enlarge": False,
}  # fmt: skip


def model(image: ImagePolicy, **parts: Any) -> ModelConfig:
    return ModelConfig(DECODER, VISION, ConnectorConfig(), image, **parts)


def shown(config: ModelConfig) -> list[Any]:
    """What the decoder gets of pictures: pixels and layouts, of one picture and of two."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    result: list[Any] = []
    for size in SIZES:
        picture = Image.fromarray(noise).resize(size)
        for images in (1, 2):
            tiles = config.image.uses_tiles(images)
            result.append(image_layout(config, size, images))
            result.append(to_tiles(picture, config.vision.image_size, config.image, tiles=tiles).tobytes())
    return result


@pytest.mark.parametrize("mode", IMAGE_MODES)
@pytest.mark.parametrize("name", IMAGE)
def test_a_field_of_the_image_policy(mode: str, name: str) -> None:
    plain = ImagePolicy(mode, **NEEDED.get(mode, {}))
    config, changed = model(plain), model(replace(plain, **{name: IMAGE[name]}))
    check_used(config)
    # The colour behind which explanations hide a picture is used in every mode.
    if name == "pad_color" or shown(config) != shown(changed):
        check_used(changed)
    else:
        with pytest.raises(InputError, match=f"the image mode '{mode}' does not implement {name} = "):
            check_used(changed)


def test_every_field_of_the_image_policy_is_tried() -> None:
    assert {"mode", *IMAGE} == {field.name for field in dataclasses.fields(ImagePolicy)}


@pytest.mark.parametrize("mode", IMAGE_MODES)
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TileMarks)])
def test_a_mark(mode: str, name: str) -> None:
    """Marks between tiles need tiles, and tiles that are joined have no marks."""
    used = {"split": 6, "grid": 5, "anyres": 0}.get(mode, 3)
    names = ("whole", "end", "number", "tile", "row", "between")[:used]
    config = model(ImagePolicy(mode, **NEEDED.get(mode, {})), marks=TileMarks(**{name: "x"}))
    if name in names:
        check_used(config)
    else:
        with pytest.raises(InputError, match=f"the image mode '{mode}' does not implement {name} = 'x'"):
            check_used(config)


def test_empty_marks_beside_joined_tiles() -> None:
    """With marks a picture stands in the text once for each tile, but joined tiles are one picture."""
    policy = ImagePolicy("anyres", **NEEDED["anyres"])
    check_used(model(policy))
    with pytest.raises(InputError, match="the image mode 'anyres' joins its tiles and has no marks; leave"):
        check_used(model(policy, marks=TileMarks()))


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_frames_are_pooled_only_where_tiles_are_joined(mode: str) -> None:
    """Elsewhere it would be counted and not computed, and end in the first video."""
    config = model(ImagePolicy(mode, **NEEDED.get(mode, {})), video=VideoPolicy(8, 1.0, 56, True))
    check_used(config)
    for name, policy in (("pool = 2", VideoPolicy(pool=2)), ("average = True", VideoPolicy(average=True))):
        pooled = replace(config, video=policy)
        if mode == "anyres":
            check_used(pooled)
        else:
            with pytest.raises(InputError, match=f"the image mode '{mode}' does not implement {name}"):
                check_used(pooled)


CHAT = ChatFormat(("<u>", "</u>"), "<a>", "</a>")
CHAT_FIELDS: dict[str, Any] = {
    "user": ("U:", "\n"), "assistant": "A:", "stop": "!", "answer": (" ", " "), "between": "\n",
    "system": ("[", "]"), "default_system": "Be brief.", "system_in_user": True, "specials": ("<u>",),
    "trim": ("user",), "opening": "<think>", "stop_once": True, "text_first": " ", "image_line": False,
    "shared_line": True, "earlier": "B:", "tools": ("<t>", "</t>"),
}  # fmt: skip


def written(chat: ChatFormat) -> list[Any]:
    template = get_template(OWN, chat)
    shown = Message("user", (ImagePart("a"), ImagePart("b"), " What? "))
    turns = [shown, Message("assistant", ("This.",)), Message("user", (" And? ",))]
    rendered: list[Any] = []
    for system in ([], [Message("system", ("Be brief.",))]):
        if system and chat.system is None:
            continue
        rendered.append(template.render(Conversation((*system, *turns)), generate=True))
    return [*rendered, chat.tools if chat.system else None, chat.specials]


@pytest.mark.parametrize("system", [None, ("<s>", "</s>")])
@pytest.mark.parametrize("name", CHAT_FIELDS)
def test_a_field_of_the_chat_format(name: str, system: tuple[str, str] | None) -> None:
    plain = replace(CHAT, system=system)
    changed = replace(plain, **{name: CHAT_FIELDS[name]})
    config = model(ImagePolicy(), template=OWN, chat=changed)
    if written(plain) != written(changed):
        check_used(config)
    else:
        with pytest.raises(InputError, match=f"a chat format without `system` does not implement {name} = "):
            check_used(config)


def test_other_chat_formats_that_say_what_is_not_used() -> None:
    assert CHAT_FIELDS.keys() == {field.name for field in dataclasses.fields(ChatFormat)}
    with pytest.raises(InputError, match="the template is 'v1', which does not use the fields of `chat`"):
        check_used(model(ImagePolicy(), template="v1", chat=CHAT))
    shared = replace(CHAT, shared_line=True, image_line=False)
    with pytest.raises(InputError, match=r"chat\.shared_line is of a format whose pictures have lines"):
        check_used(model(ImagePolicy(), template=OWN, chat=shared))
    with pytest.raises(InputError, match=r"chat\.trim names 'human'; the roles are system, user and"):
        check_used(model(ImagePolicy(), template=OWN, chat=replace(CHAT, trim=("human",))))


TOWER: dict[str, VisionConfig] = {
    "siglip": VISION,
    "clip": replace(VISION, kind="clip", select="patch"),
    "efficientnet_lite": VisionConfig(image_size=64, variant="lite0"),
    "none": VisionConfig("none", width=32),
}
VISION_FIELDS: dict[str, Any] = {
    "image_size": 56, "width": 16, "stride": 7, "variant": "lite1", "also_stride": 8, "depth": 2,
    "heads": 4, "mlp_width": 32, "activation": "gelu", "norm_eps": 1e-2, "layer": 0, "select": "cls_patch",
    "final_norm": True, "fractional": True,
}  # fmt: skip


def seen(config: VisionConfig) -> Any:
    """The features of noise, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = make_tower(config).eval()
        for parameter in tower.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.3
        side = config.image_size
        return tower(torch.randn(1, 3, side, side)).tolist()


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("name", VISION_FIELDS)
@torch.no_grad()
def test_a_field_of_the_tower(kind: str, name: str) -> None:
    value = 288 if kind == "efficientnet_lite" and name == "image_size" else VISION_FIELDS[name]
    plain = TOWER[kind]
    if name == "fractional" and kind == "siglip":
        plain = replace(plain, image_size=19 * 14)  # the first grid in which patches share a position
    try:
        changed = replace(plain, **{name: value})
        features = seen(changed)
    except InputError as error:
        assert ("stride" if name == "also_stride" else name) in str(error)
    else:
        if kind == "none":  # the width of nothing
            assert name == "width"
        else:
            assert features != seen(plain)


def test_every_field_of_the_tower_is_tried() -> None:
    assert {"kind", *VISION_FIELDS} == {field.name for field in dataclasses.fields(VisionConfig)}


SCALING: dict[str, Any] = {
    "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 8.0, "original_context": 64,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "llama3"])
@pytest.mark.parametrize("name", SCALING)
def test_a_field_of_rope_scaling(kind: str, name: str) -> None:
    plain = RopeScaling(kind, 4.0, original_context=32) if kind == "llama3" else RopeScaling(kind, 4.0)
    changed = replace(plain, **{name: SCALING[name]})
    frequencies = [rope_inv_freq(64, 500.0, scaling, torch.device("cpu")) for scaling in (plain, changed)]
    config = replace(DECODER, rope_scaling=changed)
    if torch.equal(*frequencies):
        with pytest.raises(InputError, match=f"{kind} scaling does not implement {name} = "):
            Decoder(config)
    else:
        Decoder(config)


def test_a_pattern_of_no_window_is_refused() -> None:
    with pytest.raises(InputError, match="window_pattern is 2, but no layer has a window; set "):
        Decoder(replace(DECODER, window_pattern=2))


@pytest.mark.parametrize("kind", ["identity", "linear", "mlp2x_gelu", "own"])
def test_a_bias_of_a_connector(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "own", lambda in_width, width: torch.nn.Sequential())
    config = ConnectorConfig(kind, bias=False)
    if kind in ("identity", "own"):
        with pytest.raises(InputError, match=f"a connector of kind '{kind}' does not implement bias = False"):
            Connector(config, 8, 8)
    else:
        assert not any("bias" in name for name, _ in Connector(config, 8, 8).named_parameters())
    Connector(ConnectorConfig(kind), 8, 8)
