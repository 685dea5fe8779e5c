"""Read a LLaVA of the original code: haotian-liu/LLaVA, and LLaVA-NeXT's models for one picture.

Such a folder may lack the vision tower, which its config names, and the LLM, if it holds only a projector or
a LoRA. It does not say the chat format: `template` does, or a default that is stated in the notes.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, VisionConfig
from pumice.errors import CAUSE, InputError, wrong_input
from pumice.formats import names as tensor_names
from pumice.formats.components import describe_tower, open_llm, open_tower, tower_state
from pumice.formats.families import FAMILIES, model_type
from pumice.formats.hf.config import check_unquantised, decoder_config, padding
from pumice.formats.peft.read import adapt, base_name
from pumice.formats.recognise import ADAPTER_CONFIG, FormatKind, classes, recognise
from pumice.formats.text.read import TextSide, read_text_side
from pumice.storage.download import locate
from pumice.storage.json_file import Keys
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict, check_same, find_weights, open_file, open_weights

# The LLM's family -> the template that the published models were trained with. None stands for the
# tokenizer's chat template.
_TEMPLATES: dict[str, str | None] = {"llama": "v1", "mistral": "mistral_instruct", "qwen2": None}
# model_type -> the LLM's family. Training code writes either the LLaVA's own model_type or the LLM's.
_FAMILIES = {
    f"llava_{FAMILIES[family].original or ''}".lower(): family for family in _TEMPLATES
} | {family: family for family in _TEMPLATES}  # fmt: skip
_ANY = "llava"  # the model_type of every published folder, whatever its LLM is
# Files beside or instead of complete weights, which hold what was trained.
_EXTRAS = ("mm_projector.bin", "non_lora_trainables.bin")
# How names in these files begin -> how ours do. It depends on the wrapper in which they were trained. The
# first row that fits counts.
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
    """Read the folder, and what it lacks from `tower` and `base`: folders, files or names on the hub.

    tower: by default what the config names. base: what a projector or a LoRA was trained on; for a LoRA, by
    default what adapter_config.json names. Raises InputError on anything that is missing, or that our model
    does not compute.
    """
    # 1. config.json: refuse what our model does not compute.
    keys = Keys.of(folder / "config.json")
    check_unquantised(keys)
    family, said = _family(folder, keys)
    keys.only("s2", (False,), False)
    keys.only("mm_resampler_type", (None,), None)
    adapter = (folder / ADAPTER_CONFIG).is_file()
    # 2. The language model with all tensors of the folder, then the tower, which may be among them.
    tensors, decoder, text_side, sources = _language(folder, keys, family, base, adapter)
    has_tower = any(name.startswith(tensor_names.ORIGINAL.tower) for name in tensors)
    tower_source = _tower_source(folder, keys, tower)
    vision, published, state, path = _tower(tower_source, keys, tensors, has_tower)
    sources["tower"] = (tower_source, path)
    prefix = tensor_names.tower_prefix(tensors, tensor_names.ORIGINAL.tower)
    if has_tower:
        tensor_names.check_tower(tensors, tensor_names.ORIGINAL.tower + (prefix or ""), vision, str(folder))
        said += _check_second_tower(folder, path, tensors, vision, named=tower is not None)
    tensor_names.check_family(tensors, f"{tensor_names.ORIGINAL.text}layers.0.", decoder, str(folder))
    # 3. The connector, and how pictures were prepared in training.
    connector = _connector(keys)
    image = _image(keys, vision, published)
    wrap = IMAGE_WRAP if keys.get("mm_use_im_start_end", bool, False) else None
    config, notes = text_side.model_config(
        template, str(folder), usual=_TEMPLATES[family], decoder=decoder, vision=vision,
        connector=connector, image=image, image_wrap=wrap,
    )  # fmt: skip
    # 4. Rename the tensors, and apply the adapter last: it changes weights of the complete model.
    projector = tensor_names.ORIGINAL_CONNECTORS[connector.kind]
    table = tensor_names.llava(config, tensor_names.ORIGINAL, projector, prefix)
    state |= tensor_names.convert(tensors, table, str(folder))
    if tensor_names.ORIGINAL.newline in tensors and not config.has_newline:
        said.append("image_newline is stored, but image_aspect_ratio and mm_patch_merge_type do not use it")
    loaded = text_side.parts(config, state, (*said, *notes), sources=sources)
    return adapt(loaded, folder) if adapter else loaded


def _family(folder: Path, keys: Keys) -> tuple[str, list[str]]:
    """Return the LLM's family, and notes on what was assumed.

    model_type and `architectures` both say it; published folders have the model_type "llava" whatever their
    LLM is. Raises InputError if the two contradict each other.
    """
    # 1. What each of the two says; None if nothing.
    kind, names = keys.get("model_type", str), classes(keys)
    by_type = _FAMILIES.get(kind)
    families = list(dict.fromkeys(_FAMILIES[t] for name in names if (t := model_type(name)) in _FAMILIES))
    by_class = families[0] if families else None
    # 2. Both must agree, or one of them must say nothing.
    if by_type is None and kind != _ANY:
        hint = f" (architectures is {', '.join(names)})" if names else ""
        raise InputError(
            f"{keys.label}: model_type is {kind!r}{hint}; {', '.join([_ANY, *_FAMILIES])} can be read"
        )
    if len(families) > 1:
        raise InputError(
            f"{keys.label}: architectures is {', '.join(names)}, of a {' and of a '.join(families)}; correct "
            "the wrong one"
        )
    if by_type and by_class and by_type != by_class:
        raise InputError(
            f"{keys.label}: model_type is {kind!r}, of a {by_type}, but architectures is "
            f"{', '.join(names)}, of a {by_class}; correct the wrong one"
        )
    if by_class:
        differs = kind == _ANY and by_class != "llama"
        note = f"architectures is {', '.join(names)}: it was read as a {by_class}, not as a llama"
        return by_class, [note] if differs else []
    unread = (
        "which the original code does not write" if any(map(model_type, names)) else "which is unknown here"
    )
    unknown = f"architectures is {', '.join(names)}, {unread}; " if names else ""
    if by_type:
        return by_type, [f"{unknown}model_type {kind!r} was believed"] if names else []
    # 3. Nothing says it: only a Qwen2 has biases in its queries.
    tensors = open_weights(folder) if find_weights(folder) else {}
    family = "qwen2" if f"{tensor_names.ORIGINAL.text}layers.0.self_attn.q_proj.bias" in tensors else "llama"
    return family, [f"{unknown}by its tensors it is a {family}"] if names or family != "llama" else []


def _check_second_tower(
    folder: Path, path: Path, tensors: LazyStateDict, vision: VisionConfig, *, named: bool
) -> list[str]:
    """Compare the tower among the tensors with one that the folder holds besides; return notes.

    path: the tower's folder, from which its config was read. named: whether the user named it.
    """
    if path.resolve().is_relative_to(folder.resolve()) and find_weights(path):
        prefix = tensor_names.tower_prefix(tensors, tensor_names.ORIGINAL.tower) or ""
        own, _ = describe_tower(path)
        for name, tensor in tower_state(open_weights(path), own, str(path)).items():
            source = tensor_names.inverse(tensor_names.tower(own))[name]
            stored = tensors.get(f"{tensor_names.ORIGINAL.tower}{prefix}{source}")
            if stored is not None:
                check_same(stored, tensor, str(folder))
    return [f"the tower's weights are those in {folder}, not those of {path}"] if named else []


def _language(
    folder: Path, keys: Keys, family: str, base: str | None, adapter: bool
) -> tuple[LazyStateDict, DecoderConfig, TextSide, Sources]:
    """Return the folder's tensors under the original's names, with a base's LLM if the folder has none.

    Also returns the decoder's config, the text side, and where the base comes from.
    """
    # 1. What the folder itself holds. A tensor may be in several of its files.
    whole = open_weights(folder) if find_weights(folder) else {}
    tensors = dict(whole)
    for file in _EXTRAS:
        for name, tensor in open_file(folder / file).items() if (folder / file).is_file() else ():
            known = tensors.setdefault(_standard_name(name), tensor)
            check_same(known, tensor, str(folder))
    probe = f"{tensor_names.ORIGINAL.text}embed_tokens.weight"
    if probe in tensors and not adapter:
        if base is not None:
            raise InputError(f"{folder} holds its language model already; leave out the base {base}")
        values = keys.values | {"model_type": family, "architectures": None}
        decoder = decoder_config(Keys(values, keys.label))
        return tensors, decoder, read_text_side(folder, keys), {}
    # 2. The LLM from the base. A LoRA may have been trained on a complete LLaVA.
    base_source = base or (base_name(folder) if adapter else "")
    if not base_source:
        hint = keys.get("_name_or_path", str, "")
        hint = f" (its config.json mentions {hint!r})" if hint else ""
        raise InputError(
            f"{folder} holds no language model; name the one it was trained on with --base{hint}"
        )
    path = locate(base_source)
    if recognise(path) is FormatKind.ORIGINAL:
        base_tensors, decoder, text_side, _ = _language(
            path, Keys.of(path / "config.json"), family, None, adapter=False
        )
    else:
        llm = open_llm(base_source)
        table = tensor_names.inverse(tensor_names.hf_decoder(llm.config))
        base_tensors = {str(table[name]): tensor for name, tensor in llm.state.items()}
        decoder, text_side = llm.config, llm.text
    # A LoRA is trained on the base's LLM: a whole LLM beside it must be the same.
    if probe in whole:
        for name in whole.keys() & base_tensors.keys():
            check_same(base_tensors[name], whole[name], f"{folder} on {base_source}")
    # 3. The folder's own tokenizer and tensors override the base's: they may have been trained.
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        text_side = read_text_side(folder, keys)
    return base_tensors | tensors, decoder, text_side, {"base": (base_source, path)}


def _standard_name(name: str) -> str:
    old, new = next(row for row in _BEGINNINGS if name.startswith(row[0]))
    return new + name.removeprefix(old)


def _tower_source(folder: Path, keys: Keys, tower: str | None) -> str:
    """Return what to open as the tower: `tower`, or what the config names, in the folder or elsewhere."""
    if tower is not None:
        return tower
    name = keys.get("mm_vision_tower", str)
    if (folder / name).is_dir():
        return str(folder / name)
    # Pumice's own exports describe the tower here.
    described = folder / "vision_tower"
    return str(described) if (described / "config.json").is_file() else name


def _tower(
    source: str, keys: Keys, tensors: LazyStateDict, has_tower: bool
) -> tuple[VisionConfig, ImagePolicy, LazyStateDict, Path]:
    """Return the tower's config and image policy, its state ({} if `tensors` have it), and its path."""
    # 1. If the folder holds the tower's weights, only its config is fetched.
    with wrong_input(InputError, f"the vision tower of {keys.label}: {CAUSE} (or name one with --tower)"):
        if has_tower:
            path = locate(source, ["config.json", "preprocessor_config.json"])
            vision, policy = describe_tower(path)
            state: LazyStateDict = {}
        else:
            opened = open_tower(source)
            vision, policy, path = opened.config, opened.policy, opened.path
            state = {f"tower.{name}": tensor for name, tensor in opened.state.items()}
    # 2. The config must fit the tower, and says which of its features are used.
    if (width := keys.get("mm_hidden_size", int, vision.width)) != vision.width:
        raise InputError(
            f"{keys.label}: mm_hidden_size is {width}, but the tower {source} has {vision.width}"
        )
    layer = keys.get("mm_vision_select_layer", int, -2)
    select = keys.only("mm_vision_select_feature", ("patch", "cls_patch"), "patch")
    vision = dataclasses.replace(vision, layer=layer, select="full" if vision.kind == "siglip" else select)
    depth = _stored_depth(tensors)
    # 3. LLaVA-NeXT drops the last block of a SigLIP, and uses the features of the block that is then the
    # last.
    if has_tower and vision.kind == "siglip" and depth == vision.depth - 1:
        vision = dataclasses.replace(vision, depth=depth, layer=-1)
    return vision, policy, state, path


def _stored_depth(tensors: LazyStateDict) -> int:
    """Return the number of the tower's blocks among the tensors; 0 if there are none."""
    pattern = re.compile(re.escape(tensor_names.ORIGINAL.tower) + r".*encoder\.layers\.(\d+)\.")
    return 1 + max((int(match[1]) for name in tensors if (match := pattern.match(name))), default=-1)


def _connector(keys: Keys) -> ConnectorConfig:
    kind = keys.get("mm_projector_type", str, "linear")  # v1.0 has no other
    if not re.fullmatch(r"linear|identity|mlp[1-9]x_gelu", kind):
        raise InputError(
            f"{keys.label}: mm_projector_type is {kind!r}; linear, mlpNx_gelu and identity can be read"
        )
    return ConnectorConfig(kind)


def _image(keys: Keys, vision: VisionConfig, published: ImagePolicy) -> ImagePolicy:
    """Return the tower's image policy, changed as it was for training the model."""
    ratio = keys.get("image_aspect_ratio", str, "square")
    policy = dataclasses.replace(published, pad_color=padding(published.mean))
    if ratio == "square":
        return policy
    if ratio == "pad":
        return dataclasses.replace(policy, mode="pad")
    match = re.fullmatch(r"anyres(?:_max_(\d+))?", ratio)
    if match is None:
        raise InputError(
            f"{keys.label}: image_aspect_ratio is {ratio!r}; square, pad, anyres and anyres_max_N can be read"
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
    """Return the sizes (width, height) to which a picture may be resized, in pixels.

    They are stored as a list, as its text, or as LLaVA-NeXT's "(1x1),...,(6x6)": all grids of tiles between
    the two.
    """
    value = keys.get("image_grid_pinpoints", object)
    with wrong_input(
        (ValueError, TypeError, SyntaxError),
        f"{keys.label}: image_grid_pinpoints is {value!r}, not a list of [width, height]",
    ):
        if isinstance(value, str) and (match := re.fullmatch(r"\((\d)x(\d)\),\.\.\.,\((\d)x(\d)\)", value)):
            first, second, third, last = map(int, match.groups())
            return tuple(
                (i * size, j * size) for i in range(first, third + 1) for j in range(second, last + 1)
            )
        pairs: Any = ast.literal_eval(value) if isinstance(value, str) else value
        return tuple((int(width), int(height)) for width, height in pairs)
