"""Read the vision tower and the connector of a LLaVA from an mmproj file of llama.cpp, of any age.

llama.cpp's script of 2023 and 2024 (`convert_image_encoder_to_gguf.py`) and its converter since then differ:

                        script: has `clip.has_llava_projector`     converter, and `pumice export`
    halves of the MLP   `ffn_down` is the first                    `ffn_up` is the first
    feature layer       often unsaid: all blocks are run; those    `clip.vision.feature_layer`; unsaid: the
                        behind it were left out                    last block is not run, as llama.cpp does
    a SigLIP's GELU     said to be CLIP's, wrongly                 as said
    LLaVA-1.6           `model.image_newline`                      `v.image_newline`

Files of both kinds were edited by hand, so the sizes of an MLP's halves come before the age of the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from pumice.config import ConnectorConfig, ImagePolicy, VisionConfig
from pumice.config_json import as_stored, from_dict, naming
from pumice.errors import InputError, wrong_input
from pumice.formats import names as tensor_names
from pumice.formats.gguf.file import GgufFile
from pumice.formats.gguf.llm import lazy_tensor, shortest
from pumice.formats.hf.config import padding
from pumice.storage.json_file import Keys
from pumice.storage.tensors import LazyStateDict, as_lazy

ARCHITECTURE = "clip"
# What Pumice's own files say in one key, as JSON, because llama.cpp has no key for it.
OWN_KEY = "pumice.vision"
CLASS_TOKENS = ("first", "shifted")  # where the positions of a CLIP expect it; see `gguf.write.write`
# Sizes of VisionConfig -> their keys, behind "clip.vision.".
TOWER_KEYS = {
    "image_size": "image_size", "stride": "patch_size", "width": "embedding_length",
    "mlp_width": "feed_forward_length", "depth": "block_count", "heads": "attention.head_count",
}  # fmt: skip
_LEGACY = "clip.has_llava_projector"
_NEWLINES = ("v.image_newline", "model.image_newline")
_UNUSED = "v.head."  # SigLIP's pooling, which a LLaVA does not need


@dataclasses.dataclass(frozen=True)
class Mmproj:
    """A tower and its connector. state: with the prefixes `tower.` and `connector.`, and `image_newline`.

    width: of the image tokens, which is the language model's. image_wrap: as in ModelConfig.
    """

    path: Path
    vision: VisionConfig
    connector: ConnectorConfig
    image: ImagePolicy
    state: LazyStateDict
    width: int
    image_wrap: tuple[str, str] | None
    notes: tuple[str, ...]


def read_mmproj(file: GgufFile) -> Mmproj:
    """Read everything but the tensors. Raises InputError if it is no tower and connector of a LLaVA."""
    # 1. What kind of connector, in which of the two layouts.
    keys = Keys(file.metadata, str(file.path))
    own = _own(keys)
    _check_projector(file, keys)
    notes: list[str] = []
    legacy = keys.get(_LEGACY, bool, False)
    vision = _vision(file, keys, legacy, notes)
    if (activation := own.get("activation", str, "")) != "":
        vision = dataclasses.replace(vision, activation=activation)
    # 2. The connector: one linear layer, or two with a GELU between them.
    connector = ConnectorConfig("mlp2x_gelu" if "mm.2.weight" in file.infos else "linear")
    if connector.kind == "linear":
        notes.append(
            "its connector is a single linear layer; llama.cpp computes a GELU behind it, no LLaVA does"
        )
    # 3. The tensors, under our names.
    image = _image(file, keys, own, notes)
    newline = image.mode == "anyres" and image.unpad
    state = _state(file, vision, connector, _swapped(file, vision, legacy), newline)
    if own.get("class_token", str, "first") == "shifted":
        state["tower.positions"] = state["tower.positions"].map(lambda rows: rows.roll(1, 0))
    width = state[f"connector.layers.{0 if connector.kind == 'linear' else 2}.weight"].shape[0]
    wrap = own.get("image_wrap", list, [])
    return Mmproj(
        file.path, vision, connector, image, state, width, (wrap[0], wrap[1]) if wrap else None, tuple(notes)
    )


def own_values(
    vision: VisionConfig, image: ImagePolicy, image_wrap: tuple[str, str] | None, class_token: str
) -> str:
    """Return the value of OWN_KEY. class_token: of CLASS_TOKENS."""
    values = {"activation": vision.activation, "image": as_stored(image), "class_token": class_token}
    return json.dumps(values | ({"image_wrap": list(image_wrap)} if image_wrap else {}))


def _own(keys: Keys) -> Keys:
    """Return what OWN_KEY says, nothing where it is absent."""
    label = f"{keys.label}: {OWN_KEY}"
    text = keys.get(OWN_KEY, str, "{}")
    with wrong_input((ValueError, RecursionError), f"{label} is not JSON; export the model again"):
        values = json.loads(text)
    own = Keys(values, label)
    if (class_token := own.get("class_token", str, "first")) not in CLASS_TOKENS:
        raise InputError(
            f"{label}: class_token is {class_token!r}; known are {', '.join(CLASS_TOKENS)}; export it again"
        )
    wrap = own.get("image_wrap", list, [])
    if len(wrap) not in (0, 2) or not all(isinstance(text, str) for text in wrap):
        raise InputError(f"{label}: image_wrap should be two texts, not {wrap!r}; export the model again")
    return own


def _check_projector(file: GgufFile, keys: Keys) -> None:
    kind = keys.get("clip.projector_type", str, keys.get("clip.vision.projector_type", str, "mlp"))
    if kind == "mlp_norm" or "mm.3.weight" in file.infos:
        raise InputError(
            f"{file.path}: its projector is mlp_norm, Yi-VL's, which no LLaVA here has; ask it in llama.cpp"
        )
    if kind != "mlp":
        raise InputError(
            f"{file.path}: its projector is {kind!r}; only mlp, LLaVA's own, can be read: ask it in llama.cpp"
        )
    if "mm.0.weight" not in file.infos:
        raise InputError(
            f"{file.path} has no tensor mm.0.weight, so it holds no connector; convert the model again"
        )
    if "v.post_ln.weight" in file.infos:
        raise InputError(
            f"{file.path} holds v.post_ln, a norm behind the tower that no LLaVA has; convert the model "
            "again without it"
        )


def _vision(file: GgufFile, keys: Keys, legacy: bool, notes: list[str]) -> VisionConfig:
    """Read the tower's sizes, its activation and the hidden state that is its feature."""
    kind = "clip" if "v.class_embd" in file.infos else "siglip"
    sizes: dict[str, Any] = {name: keys.get(f"clip.vision.{key}", int) for name, key in TOWER_KEYS.items()}
    depth = sizes["depth"]
    # 1. Which hidden state.
    layers = keys.get("clip.vision.feature_layer", list, [])
    if len(layers) > 1:
        raise InputError(
            f"{file.path}: its features are those of {len(layers)} layers; one can be read: ask it in "
            "llama.cpp"
        )
    if layers:
        state = layers[0]
    elif legacy:
        state = depth
        notes.append(
            f"it does not say which layer gives the features; all of its {depth} blocks are run, as its "
            f"script left out those behind (llama.cpp since May 2025 runs {depth - 1} of such a file)"
        )
    else:
        state = depth - 1
        notes.append(
            f"it does not say which layer gives the features; that before the last of its {depth} blocks was "
            "taken, as llama.cpp does"
        )
    # 2. The activation. The script calls a SigLIP's GELU quick, because it only knows the name of the other.
    gelu = keys.get("clip.use_gelu", bool, False)
    if keys.get("clip.use_silu", bool, False):
        raise InputError(f"{file.path}: its tower computes SiLU; only GELU can be read: ask it in llama.cpp")
    if kind == "siglip":
        activation = "gelu_tanh" if gelu or legacy else "quick_gelu"
    else:
        activation = "gelu" if gelu else "quick_gelu"
    with naming(str(file.path)):
        if not 0 <= state <= depth:
            raise InputError(
                f"its feature layer is {state}, but it has {depth} blocks; convert the model again"
            )
        return VisionConfig(
            kind=kind,
            **sizes,
            activation=activation,
            norm_eps=shortest(keys.get("clip.vision.attention.layer_norm_epsilon", float)),
            layer=state - depth - 1,
            select="patch" if kind == "clip" else "full",
        )


def _image(file: GgufFile, keys: Keys, own: Keys, notes: list[str]) -> ImagePolicy:
    """Read how a picture is prepared."""
    if "image" in own:
        return from_dict(ImagePolicy, own.values["image"], f"{own.label}: image")
    means = [keys.get(f"clip.vision.image_{name}", list) for name in ("mean", "std")]
    if any(len(values) != 3 for values in means):
        raise InputError(
            f"{file.path}: image_mean and image_std need 3 numbers each, not {means}; convert the model again"
        )
    mean, std = ((shortest(red), shortest(green), shortest(blue)) for red, green, blue in means)
    policy = ImagePolicy("pad", mean, std, pad_color=padding(mean))
    flat = keys.get("clip.vision.image_grid_pinpoints", list, [])
    if flat:
        if len(flat) % 2:
            raise InputError(
                f"{file.path}: image_grid_pinpoints has {len(flat)} numbers, which are no pairs; convert it "
                "again"
            )
        merge = keys.get("clip.vision.mm_patch_merge_type", str, "flat")
        if merge not in ("spatial_unpad", "spatial"):
            raise InputError(
                f"{file.path}: mm_patch_merge_type is {merge!r}; LLaVA-1.6 joins its tiles by 'spatial_unpad'"
            )
        pinpoints = tuple(zip(flat[::2], flat[1::2], strict=True))
        notes.append(
            "pictures are cut into tiles and joined as LLaVA-1.6 does; llama.cpp joins them otherwise"
        )
        return dataclasses.replace(policy, mode="anyres", pinpoints=pinpoints, unpad=merge == "spatial_unpad")
    if any(name in file.infos for name in _NEWLINES):
        notes.append(
            "it holds an image_newline, as LLaVA-1.6 does, but no image_grid_pinpoints: each picture is one "
            "padded square"
        )
    else:
        notes.append("it does not say how pictures become square; they are padded, as llama.cpp does")
    return policy


def _swapped(file: GgufFile, vision: VisionConfig, legacy: bool) -> bool:
    """Return whether the halves of the MLPs have each other's names."""
    down = file.infos.get("v.blk.0.ffn_down.weight")
    if down is None or vision.mlp_width == vision.width:
        return legacy
    return down.shape == (vision.mlp_width, vision.width)


def _state(
    file: GgufFile, vision: VisionConfig, connector: ConnectorConfig, swapped: bool, newline: bool
) -> LazyStateDict:
    table = tensor_names.gguf_tower(vision, swapped=swapped)
    if connector.kind == "linear":
        table = {name: param for name, param in table.items() if not name.startswith("mm.2.")}
    table |= dict.fromkeys(_NEWLINES, "image_newline" if newline else None)
    tensors = {
        name: dataclasses.replace(lazy_tensor(file, name), blocks=None)  # towers compute with floats
        for name in file.infos
        if not name.startswith(_UNUSED)
    }
    state = tensor_names.convert(tensors, table, str(file.path))
    # The script drops dimensions of 1; a class token has one, its width.
    for name in ("tower.class_token", "image_newline"):
        if name in state:
            tensor = state[name]
            state[name] = tensor.map(torch.Tensor.flatten, (math.prod(tensor.shape),))
    # No file has the final norm, which is never computed; our tower has it.
    ones = {"weight": torch.ones, "bias": torch.zeros}
    return state | {f"tower.post_norm.{part}": as_lazy(make(vision.width)) for part, make in ones.items()}
