"""Written for the original code, haotian-liu/LLaVA: its config.json, its names of tensors, its tokenizer.

Knows: the layout of its published checkpoints (v1.0 to v1.6) and of LLaVA-NeXT's Qwen2 ones. Does not
know: where the model comes from. Nothing here was ever run by that code; it is written as it reads.

The tower's weights stand in the shards, as in v1.6 (`unfreeze_mm_vision_tower`). That code still builds
the tower from what `mm_vision_tower` names, before it reads them. The shape and the preprocessing of the
tower stand in `vision_tower/`, so that the folder says everything.

That code reads Llama's tokenizer from `tokenizer.model` alone (`use_fast=False`), which cannot be made
out of a tokenizer.json: where the model came without one, put the LLM's own into the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pumice.config import ImagePolicy, ModelConfig, VisionConfig
from pumice.formats import names as tensor_names
from pumice.formats.hf.config import padding
from pumice.formats.hf.write import (
    generation_config,
    image_processor,
    text_config,
    text_refusal,
    tower_refusal,
    vision_config,
    write_tokenizer,
)
from pumice.formats.llava.read import IMAGE_WRAP
from pumice.formats.text.chat_template import to_jinja
from pumice.storage.json_file import write_json
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import Stocks, write_weights
from pumice.templates import get_template

TOWER = "vision_tower"  # the folder beside the weights
_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen"}
# Published towers by kind, width, depth, patch and picture: which name the original code can build.
_PUBLISHED = {
    ("clip", 1024, 24, 14, 336): "openai/clip-vit-large-patch14-336",
    ("clip", 1024, 24, 14, 224): "openai/clip-vit-large-patch14",
    ("siglip", 1152, 27, 14, 384): "google/siglip-so400m-patch14-384",
}


def refusal(config: ModelConfig) -> str | None:
    """Why the original code cannot compute this model; None when it can."""
    image, connector = config.image, config.connector
    if reason := tower_refusal(config):
        return reason
    if connector.reduce != "none":
        return f"its connector reduces by {connector.reduce}, which that code cannot"
    if config.image_wrap not in (None, IMAGE_WRAP):
        around, theirs = (" and ".join(wrap or ()) for wrap in (config.image_wrap, IMAGE_WRAP))
        return f"it puts {around} around each picture, that code only {theirs}"
    if image.mode == "squash" and config.vision.kind == "clip":
        return "it squashes pictures to a square, which that code does with no CLIP tower"
    if image.mode == "pad" and image.pad_color != padding(image.mean):
        return f"it pads with {image.pad_color}, that code with the mean's colour, {padding(image.mean)}"
    if config.decoder.qk_norm:
        return "its decoder is a Qwen3, which that code has not"
    return text_refusal(config.decoder)


def write(folder: Path, model: LoadedParts, tower: str | None = None) -> list[str]:
    """Write the folder; the model has no adapters. Returns notes.

    tower: a hub name or a path from which the original code can build a tower of this shape; that of the
    published one when not given.
    """
    config, state = model.config, model.state
    tower = tower or tower_name(config.vision)
    connector = tensor_names.original_connector(config.connector.kind)
    names = tensor_names.inverse(
        tensor_names.llava(config, tensor_names.ORIGINAL, connector, "vision_model.")
    )
    write_weights(folder, {str(names[ours]): tensor for ours, tensor in state.items()})
    write_json(folder / "config.json", _config(config, state, tower))
    write_json(folder / "generation_config.json", generation_config(config))
    write_tokenizer(folder, config, model.tokenizer, to_jinja(get_template(config.template, config.chat)))
    (folder / TOWER).mkdir()
    write_json(folder / TOWER / "config.json", vision_config(config.vision))
    squares = ImagePolicy(
        mode="squash" if config.vision.kind == "siglip" else "crop",
        mean=config.image.mean,
        std=config.image.std,
        resample=config.image.resample,
    )
    write_json(
        folder / TOWER / "preprocessor_config.json", image_processor(squares, config.vision.image_size)
    )
    notes = []
    if tower == TOWER:
        notes.append(
            "no published vision tower has this shape, so the original code cannot build it from "
            f"mm_vision_tower {TOWER!r}; name one that it can with --tower-name"
        )
    if not config.decoder.qkv_bias:
        notes.append("the original code reads the tokenizer from tokenizer.model alone; add that of the LLM")
    return notes


def _config(config: ModelConfig, state: Stocks, tower: str) -> dict[str, Any]:
    text = text_config(config.decoder)
    family = text["model_type"]
    if config.bos_token_id is not None:
        text["bos_token_id"] = config.bos_token_id
    if config.stop_token_ids:
        text["eos_token_id"] = config.stop_token_ids[0]
    values = text | {
        "architectures": [f"Llava{_FAMILIES[family]}ForCausalLM"],
        "model_type": f"llava_{_FAMILIES[family].lower()}",
        "torch_dtype": str(state["decoder.embed.weight"].dtype).removeprefix("torch."),
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
        "image_aspect_ratio": _aspect_ratio(config.image),
        "tokenizer_model_max_length": config.decoder.context,
        "tokenizer_padding_side": "right",
    }
    if config.image.mode == "anyres":
        values["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in config.image.pinpoints]
        values["mm_patch_merge_type"] = "spatial_unpad" if config.image.unpad else "spatial"
    return values


def _aspect_ratio(image: ImagePolicy) -> str:
    if image.mode != "anyres":
        return "pad" if image.mode == "pad" else "square"  # which leaves the picture to the tower's own
    return "anyres" if image.max_tiles is None else f"anyres_max_{image.max_tiles}"


def tower_name(vision: VisionConfig) -> str:
    """The published tower of this shape, or the folder beside the weights."""
    shape = vision.kind, vision.width, vision.depth, vision.stride, vision.image_size
    return _PUBLISHED.get(shape, TOWER)
