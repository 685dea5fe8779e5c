"""Write a model as a folder of the original code: haotian-liu/LLaVA 1.0 to 1.6, LLaVA-NeXT with Qwen2.

The tower's weights are in the shards, as in v1.6 (`unfreeze_mm_vision_tower`). That code still builds the
tower from what `mm_vision_tower` names before it reads them. The tower's config and preprocessing are also in
`vision_tower/`, so that the folder describes the complete model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pumice.capability import LLAMA, Capability, fields
from pumice.config import DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.formats import names as tensor_names
from pumice.formats.families import FAMILIES
from pumice.formats.hf.config import WRITTEN, padding
from pumice.formats.hf.refusal import capability, image_kind, text_refusal, tower_refusal
from pumice.formats.hf.write import (
    anyres_max,
    generation_config,
    image_processor,
    square_notes,
    stored_text_config,
    vision_config,
)
from pumice.formats.llava.read import IMAGE_WRAP
from pumice.formats.llava.tokenizer import write_tokenizer
from pumice.storage.json_file import write_json
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict, write_weights

TOWER = "vision_tower"  # the folder beside the weights
CAPABILITY = capability("the original code")
DECODER = Capability("the original code", WRITTEN | {DecoderConfig: fields(LLAMA)})
# (kind, width, depth, patch size, image size) -> the published tower that the original code can build.
_PUBLISHED = {
    ("clip", 1024, 24, 14, 336): "openai/clip-vit-large-patch14-336",
    ("clip", 1024, 24, 14, 224): "openai/clip-vit-large-patch14",
    ("siglip", 1152, 27, 14, 384): "google/siglip-so400m-patch14-384",
}


def refusal(config: ModelConfig) -> str | None:
    """Return why the original code cannot compute this model; None if it can."""
    image, connector = config.image, config.connector
    if reason := tower_refusal(config):
        return reason
    if connector.reduce != "none":
        return f"its connector reduces by {connector.reduce}, which that code cannot"
    if connector.kind not in tensor_names.ORIGINAL_CONNECTORS:
        return f"its connector is {connector.kind}, which that code does not have"
    if config.image_wrap not in (None, IMAGE_WRAP):
        wrap, original_wrap = (" and ".join(pair or ()) for pair in (config.image_wrap, IMAGE_WRAP))
        return f"it puts {wrap} around each picture, that code only {original_wrap}"
    if image.mode == "squash" and config.vision.kind == "clip":
        return "it squashes pictures to a square, which that code does with no CLIP tower"
    if image.mode == "pad" and image.pad_color != padding(image.mean):
        return f"it pads with {image.pad_color}, that code with the mean's colour, {padding(image.mean)}"
    if config.decoder.qk_norm:
        return "its decoder is a Qwen3, which that code does not have"
    return (
        DECODER.unsupported(config.decoder) or text_refusal(config.decoder) or CAPABILITY.unsupported(config)
    )


def write(folder: Path, model: LoadedParts, tower: str | None = None) -> list[str]:
    """Write the folder of a model without adapters. Returns notes for the user.

    tower: a hub name or a path from which the original code can build a tower of this shape; by default the
    published tower of this shape.
    """
    # 1. The tensors under the original's names, its configs, and the tokenizer.
    config, state = model.config, model.state
    tower = tower or tower_name(config.vision)
    connector = tensor_names.ORIGINAL_CONNECTORS[config.connector.kind]
    names = tensor_names.inverse(
        tensor_names.llava(config, tensor_names.ORIGINAL, connector, "vision_model.")
    )
    write_weights(folder, {names[name]: tensor for name, tensor in state.items()})
    write_json(folder / "config.json", _config(config, state, tower))
    write_json(folder / "generation_config.json", generation_config(config))
    notes = write_tokenizer(folder, model)
    # 2. The tower's own folder. Its processor makes one tile: the original code cuts the picture itself.
    (folder / TOWER).mkdir()
    write_json(folder / TOWER / "config.json", vision_config(config.vision))
    tile_policy = ImagePolicy(
        mode="squash" if config.vision.kind == "siglip" else "crop",
        mean=config.image.mean,
        std=config.image.std,
        resample=config.image.resample,
    )
    write_json(
        folder / TOWER / "preprocessor_config.json", image_processor(tile_policy, config.vision.image_size)
    )
    # 3. Tell the user what that code does differently.
    image = config.image
    if image_kind(image) == "llava_onevision":
        notes += square_notes(image, "the original code's training")
    if image.several == "square":
        notes.append(
            "the original code cuts each of several pictures into tiles when it answers, unless "
            "image_aspect_ratio is set to 'pad' for them"
        )
    if config.video is not None:
        notes.append("its files do not say that this model was trained on videos, or how it was shown them")
    if tower == TOWER:
        notes.append(
            "no published vision tower has this shape, so the original code cannot build it from "
            f"mm_vision_tower {TOWER!r}; name one that it can with --tower-name"
        )
    return notes


def _config(config: ModelConfig, state: LazyStateDict, tower: str) -> dict[str, Any]:
    text, _ = stored_text_config(config, state)
    name = FAMILIES[text["model_type"]].original
    assert name is not None  # `refusal` names the families that have none
    values = text | {
        "architectures": [f"Llava{name}ForCausalLM"],
        "model_type": f"llava_{name.lower()}",
        "use_mm_proj": True,
        "mm_hidden_size": config.vision.width,
        "mm_projector_type": config.connector.kind,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": config.image_wrap is not None,
        "mm_vision_select_feature": "cls_patch" if config.vision.select == "cls_patch" else "patch",
        "mm_vision_select_layer": config.vision.layer,
        "mm_vision_tower": tower,
        "unfreeze_mm_vision_tower": True,  # else the tower's weights in the shards are not read
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": _aspect_ratio(config),
        "tokenizer_model_max_length": config.decoder.context,
        "tokenizer_padding_side": "right",
    }
    if config.image.mode == "anyres":
        values["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in config.image.pinpoints]
        values["mm_patch_merge_type"] = "spatial_unpad" if config.image.unpad else "spatial"
    return values


def _aspect_ratio(config: ModelConfig) -> str:
    image = config.image
    if image.mode != "anyres":
        return "pad" if image.mode == "pad" else "square"  # "square" uses the tower's own processor
    return "anyres" if image.max_tiles is None and image.several == "tiles" else anyres_max(config)


def tower_name(vision: VisionConfig) -> str:
    """Return the published tower of this shape, or the folder beside the weights."""
    shape = vision.kind, vision.width, vision.depth, vision.stride, vision.image_size
    return _PUBLISHED.get(shape, TOWER)
