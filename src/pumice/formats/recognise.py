"""Recognise the format of a model file or folder by its contents, never by its name."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from pumice.errors import InputError, some
from pumice.formats.families import FAMILIES, TOWERS, model_type
from pumice.media import PICTURES
from pumice.storage.json_file import Keys

ADAPTER_CONFIG = "adapter_config.json"
_DATA = (*PICTURES, ".jsonl", ".csv", ".tsv", ".parquet")  # never of a model


class FormatKind(Enum):
    """The formats that can be opened. The value is the name for messages, with its article."""

    OWN = "a Pumice model"
    HF = "a LLaVA of transformers"
    ORIGINAL = "a LLaVA of the original code"
    NANOVLM = "a nanoVLM"
    ADAPTER = "a LoRA of PEFT"
    LLM = "a bare language model"
    GGUF = "a model in GGUF"
    TOWER = "a bare vision tower"


HF_LLAVAS = ("llava", "llava_next", "llava_next_video", "llava_onevision", "idefics3", "smolvlm")


def recognise(path: Path) -> FormatKind:
    """Return the format of a file or folder. Raises InputError if it is unknown."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return FormatKind.GGUF
        raise InputError(f"{path} is a file, but not GGUF; {_remedy([path.name])}")
    if (config := path / "config.json").is_file():
        return _by_config(Keys.of(config), adapter=(path / ADAPTER_CONFIG).is_file())
    if (path / ADAPTER_CONFIG).is_file():
        return FormatKind.ADAPTER
    if any(path.glob("*.gguf")):
        return FormatKind.GGUF
    names = sorted((file.name for file in path.iterdir()), key=lambda name: (name.startswith("."), name))
    held = f"it holds {some(names, 3)}, but" if names else "it holds"
    raise InputError(
        f"{path} is no whole model: {held} no config.json, {ADAPTER_CONFIG} or GGUF file; {_remedy(names)}"
    )


def _remedy(names: list[str]) -> str:
    """Return what to do where these files are no model."""
    if any(name.lower().endswith(_DATA) for name in names):
        return "pictures and rows are for `pumice data check` and `pumice train`; give a model's folder here"
    return "give a model's folder (of a hub repository of GGUF files, name the type: owner/model:Q4_K_M)"


def classes(keys: Keys) -> list[str]:
    """Return the class names under `architectures` in a config.json."""
    names = keys.get("architectures", list, [])
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{keys.label}: architectures should be a list of class names, not {names!r}")
    return names


def check_classes(keys: Keys, kind: str) -> tuple[str, ...]:
    """Compare `architectures` with the model_type of one config. Return notes on what is unknown.

    Raises InputError if they contradict each other.
    """
    names = classes(keys)
    known = {name: known_type for name in names if (known_type := model_type(name)) is not None}
    for name, known_type in known.items():
        # A tower alone and a tower in a whole CLIP have two names for one thing.
        if known_type.removesuffix("_vision_model") != kind.removesuffix("_vision_model"):
            raise InputError(
                f"{keys.label}: model_type is {kind!r}, but architectures is {name!r}, whose model_type is "
                f"{known_type!r}; correct the wrong one"
            )
    if known or not names:
        return ()
    return (f"architectures is {', '.join(names)}, which is unknown here; model_type {kind!r} was believed",)


def _by_config(keys: Keys, adapter: bool) -> FormatKind:
    # The order counts. A LoRA of the original code has both files, and its config.json says more.
    if "pumice_format" in keys:
        return FormatKind.OWN
    if "vit_hidden_dim" in keys and "lm_hidden_dim" in keys:  # which names no model_type
        return FormatKind.NANOVLM
    kind = keys.get("model_type", str, "")
    whole = kind in HF_LLAVAS and ("text_config" in keys or "vision_config" in keys)
    if "mm_vision_tower" in keys:
        # With the keys of both codes, the class says which of them wrote the weights.
        types = [model_type(name) or "" for name in classes(keys)]
        if not whole or any(name.startswith("llava_") and name not in HF_LLAVAS for name in types):
            return FormatKind.ORIGINAL
        if any(name in HF_LLAVAS for name in types):
            return FormatKind.HF
        raise InputError(
            f"{keys.label} has mm_vision_tower, as the original code writes it, and text_config, as "
            "transformers does; remove the wrong one"
        )
    if adapter:
        return FormatKind.ADAPTER
    if whole:
        return FormatKind.HF
    if kind in FAMILIES:
        return FormatKind.LLM
    if kind in TOWERS:
        return FormatKind.TOWER
    if kind in HF_LLAVAS:
        raise InputError(
            f"{keys.label} has neither text_config nor mm_vision_tower: it is no LLaVA, or "
            "incomplete; fetch it again"
        )
    known = [name for name in classes(keys) if model_type(name) is not None]
    hint = f" (architectures is {known[0]!r}, whose model_type is {model_type(known[0])!r})" if known else ""
    raise InputError(
        f"{keys.label}: model_type is {kind!r}, which cannot be read{hint}; "
        f"known are {', '.join([*HF_LLAVAS, *FAMILIES, *TOWERS])}"
    )
