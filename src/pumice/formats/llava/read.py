"""A LLaVA as its original code keeps it (haotian-liu/LLaVA, and LLaVA-NeXT's single-picture models).

Knows: that config.json, which files hold which part, and how they are named. What the folder lacks comes
from elsewhere: the LLM (`base`) of a projector or a LoRA, and the vision tower that the config names.
The config does not say the chat format either; `template` does, or a default that is told in `notes`.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, VisionConfig
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.components import describe_tower, open_llm, open_tower
from pumice.formats.hf.config import decoder_config, padding, whole
from pumice.formats.peft.read import adapt, base_name
from pumice.formats.recognise import ADAPTER_CONFIG, Kind, recognise
from pumice.formats.text.read import TextSide, read_text_side
from pumice.storage.download import locate
from pumice.storage.json_file import Keys
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict, find_weights, open_file, open_weights

# model_type -> the LLM's, and the template that its published models were trained with; None: the
# tokenizer's own chat template.
_FAMILIES: dict[str, tuple[str, str | None]] = {
    "llava": ("llama", "v1"),
    "llava_llama": ("llama", "v1"),
    "llava_mistral": ("mistral", "mistral_instruct"),
    "llava_qwen": ("qwen2", None),
}
# Files beside or instead of whole weights, and how the names in them begin, depending on what they were
# trained inside: the first fitting row of each is exchanged.
_EXTRAS = ("mm_projector.bin", "non_lora_trainables.bin")
_BEGINNINGS = (
    ("base_model.model.model.", "model."),
    ("base_model.model.", ""),
    ("model.", "model."),
    ("lm_head.", "lm_head."),
    ("", "model."),
)
IMAGE_WRAP = ("<im_start>", "<im_end>")  # around each picture where mm_use_im_start_end says so
Sources = dict[str, tuple[str, Path]]


def open_original(
    folder: Path, template: str | None = None, tower: str | None = None, base: str | None = None
) -> LoadedParts:
    """The whole folder, with what it lacks from `tower` and `base`: folders, files or names on the hub.

    tower: what the config names when not given. base: needed by a projector; of a LoRA, what
    adapter_config.json names when not given. Raises InputError on anything that is missing, or that our
    model does not compute.
    """
    keys = Keys.of(folder / "config.json")
    whole(keys)
    kind = keys.get("model_type", str)
    if kind not in _FAMILIES:
        raise InputError(f"{keys.where}: model_type is {kind!r}; {', '.join(_FAMILIES)} can be read")
    family, usual = _FAMILIES[kind]
    keys.only("s2", (False,), False)
    keys.only("mm_resampler_type", (None,), None)
    adapter = (folder / ADAPTER_CONFIG).is_file()
    tensors, decoder, side, sources = _language(folder, keys, family, base, adapter)
    inside = any(name.startswith(tensor_names.ORIGINAL.tower) for name in tensors)
    named = _tower_name(folder, keys, tower)
    vision, published, state, path = _tower(named, keys, tensors, inside)
    sources["tower"] = (named, path)
    connector = _connector(keys)
    image = _image(keys, vision, published)
    wrap = IMAGE_WRAP if keys.get("mm_use_im_start_end", bool, False) else None
    config, notes = side.model_config(
        template, str(folder), usual=usual, decoder=decoder, vision=vision, connector=connector, image=image,
        image_wrap=wrap,
    )  # fmt: skip
    prefix = tensor_names.tower_prefix(tensors, tensor_names.ORIGINAL.tower)
    projector = tensor_names.original_connector(connector.kind)
    table = tensor_names.llava(config, tensor_names.ORIGINAL, projector, prefix)
    state |= tensor_names.convert(tensors, table, str(folder))
    loaded = LoadedParts(
        config,
        state,
        side.tokenizer,
        {},
        notes=notes,
        sources=sources,
        sentencepiece=side.files.sentencepiece,
    )
    return adapt(loaded, folder) if adapter else loaded


def _language(
    folder: Path, keys: Keys, family: str, base: str | None, adapter: bool
) -> tuple[LazyStateDict, DecoderConfig, TextSide, Sources]:
    """Everything that the folder stores, with a base's LLM where it has none, under the original's names."""
    tensors = open_weights(folder) if find_weights(folder) else {}
    for name in _EXTRAS:
        if (folder / name).is_file():
            tensors |= {_begun(theirs): tensor for theirs, tensor in open_file(folder / name).items()}
    probe = f"{tensor_names.ORIGINAL.text}embed_tokens.weight"
    if probe in tensors and not adapter:
        if base is not None:
            raise InputError(f"{folder} holds its language model already; leave out the base {base}")
        decoder = decoder_config(Keys({**keys.values, "model_type": family}, keys.where))
        return tensors, decoder, read_text_side(folder, keys), {}
    named = base or (base_name(folder) if adapter else "")
    if not named:
        hint = keys.get("_name_or_path", str, "")
        hint = f" (its config.json mentions {hint!r})" if hint else ""
        raise InputError(
            f"{folder} holds no language model; name the one it was trained on with --base{hint}"
        )
    path = locate(named)
    if recognise(path) is Kind.ORIGINAL:  # a LoRA that was trained on a whole LLaVA
        found, decoder, side, _ = _language(path, Keys.of(path / "config.json"), family, None, adapter=False)
    else:
        llm = open_llm(named)
        table = tensor_names.inverse(tensor_names.hf_decoder(llm.config))
        found = {str(table[ours]): tensor for ours, tensor in llm.state.items()}
        decoder, side = llm.config, llm.text
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        side = read_text_side(folder, keys)
    return found | tensors, decoder, side, {"base": (named, path)}


def _begun(name: str) -> str:
    old, new = next(row for row in _BEGINNINGS if name.startswith(row[0]))
    return new + name.removeprefix(old)


def _tower_name(folder: Path, keys: Keys, tower: str | None) -> str:
    """What is to be opened as the tower: as given, else what the config names, in the folder or elsewhere."""
    if tower is not None:
        return tower
    named = keys.get("mm_vision_tower", str)
    if (folder / named).is_dir():
        return str(folder / named)
    described = folder / "vision_tower"  # where Pumice's own exports say what the name stands for
    return str(described) if (described / "config.json").is_file() else named


def _tower(
    source: str, keys: Keys, tensors: LazyStateDict, inside: bool
) -> tuple[VisionConfig, ImagePolicy, LazyStateDict, Path]:
    """The tower's config, its own image policy, its state unless the folder itself holds it, its place."""
    try:
        if inside:
            path = locate(source, ["config.json", "preprocessor_config.json"])
            vision, policy = describe_tower(path)
            state: LazyStateDict = {}
        else:
            opened = open_tower(source)
            vision, policy, path = opened.config, opened.policy, opened.path
            state = {f"tower.{name}": tensor for name, tensor in opened.state.items()}
    except InputError as error:
        raise InputError(f"the vision tower of {keys.where}: {error} (or name one with --tower)") from error
    if (width := keys.get("mm_hidden_size", int, vision.width)) != vision.width:
        raise InputError(
            f"{keys.where}: mm_hidden_size is {width}, but the tower {source} has {vision.width}"
        )
    layer = keys.get("mm_vision_select_layer", int, -2)
    select = keys.only("mm_vision_select_feature", ("patch", "cls_patch"), "patch")
    vision = dataclasses.replace(vision, layer=layer, select="full" if vision.kind == "siglip" else select)
    depth = _stored_depth(tensors)
    if inside and vision.kind == "siglip" and depth == vision.depth - 1:
        # LLaVA-NeXT cuts a SigLIP's last block off and takes what then comes last.
        vision = dataclasses.replace(vision, depth=depth, layer=-1)
    return vision, policy, state, path


def _stored_depth(tensors: LazyStateDict) -> int:
    pattern = re.compile(re.escape(tensor_names.ORIGINAL.tower) + r".*encoder\.layers\.(\d+)\.")
    return 1 + max((int(match[1]) for name in tensors if (match := pattern.match(name))), default=-1)


def _connector(keys: Keys) -> ConnectorConfig:
    kind = keys.get("mm_projector_type", str, "linear")  # v1.0 had no other
    if not re.fullmatch(r"linear|identity|mlp[1-9]x_gelu", kind):
        raise InputError(
            f"{keys.where}: mm_projector_type is {kind!r}; linear, mlpNx_gelu and identity can be read"
        )
    return ConnectorConfig(kind)


def _image(keys: Keys, vision: VisionConfig, published: ImagePolicy) -> ImagePolicy:
    """The tower's own policy as the model was trained with it."""
    ratio = keys.get("image_aspect_ratio", str, "square")
    policy = dataclasses.replace(published, pad_color=padding(published.mean))
    if ratio == "square":
        return policy
    if ratio == "pad":
        return dataclasses.replace(policy, mode="pad")
    match = re.fullmatch(r"anyres(?:_max_(\d+))?", ratio)
    if match is None:
        raise InputError(
            f"{keys.where}: image_aspect_ratio is {ratio!r}; square, pad, anyres and anyres_max_N can be read"
        )
    merge = keys.only("mm_patch_merge_type", ("spatial_unpad", "spatial"), "flat", "the tiles must be joined")
    return dataclasses.replace(
        policy,
        mode="anyres",
        pinpoints=_pinpoints(keys, vision.image_size),
        unpad=merge == "spatial_unpad",
        max_tiles=int(match[1]) if match[1] else None,
        several="square" if match[1] else "tiles",  # LLaVA-NeXT's training and LLaVA 1.6, which has no _max
    )


def _pinpoints(keys: Keys, size: int) -> tuple[tuple[int, int], ...]:
    """Width first; a list, its text, or LLaVA-NeXT's "(1x1),...,(6x6)": all grids of so many tiles."""
    value = keys.get("image_grid_pinpoints", object)
    try:
        if isinstance(value, str) and (match := re.fullmatch(r"\((\d)x(\d)\),\.\.\.,\((\d)x(\d)\)", value)):
            first, second, third, last = map(int, match.groups())
            return tuple(
                (i * size, j * size) for i in range(first, third + 1) for j in range(second, last + 1)
            )
        pairs: Any = ast.literal_eval(value) if isinstance(value, str) else value
        return tuple((int(width), int(height)) for width, height in pairs)
    except (ValueError, TypeError, SyntaxError) as error:
        raise InputError(
            f"{keys.where}: image_grid_pinpoints is {value!r}, not a list of [width, height]"
        ) from error
