"""Recognise the format of a model file or folder by its contents, never by its name."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from pumice.errors import InputError
from pumice.formats.families import FAMILIES, TOWERS
from pumice.storage.json_file import Keys

ADAPTER_CONFIG = "adapter_config.json"


class Kind(Enum):
    """The formats that can be opened. The value is the name for messages, with its article."""

    OWN = "a Pumice model"
    HF = "a LLaVA of transformers"
    ORIGINAL = "a LLaVA of the original code"
    ADAPTER = "a LoRA of PEFT"
    LLM = "a bare language model"
    GGUF = "a bare language model in GGUF"
    TOWER = "a bare vision tower"


HF_LLAVAS = ("llava", "llava_next", "llava_onevision")


def recognise(path: Path) -> Kind:
    """Return the format of a file or folder. Raises InputError if it is unknown."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return Kind.GGUF
        raise InputError(f"{path} is a file, but not GGUF; give a model's folder")
    if (config := path / "config.json").is_file():
        return _by_config(Keys.of(config), adapter=(path / ADAPTER_CONFIG).is_file())
    if (path / ADAPTER_CONFIG).is_file():
        return Kind.ADAPTER
    gguf_names = sorted(p.name for p in path.glob("*.gguf"))
    if len(gguf_names) == 1:
        return Kind.GGUF
    if gguf_names:
        listed = ", ".join(gguf_names)
        raise InputError(f"{path} holds {len(gguf_names)} GGUF files; name one of them: {listed}")
    raise InputError(f"{path / 'config.json'} is missing; the folder is not a whole model")


def gguf_file(path: Path) -> Path:
    """Return the GGUF file at a path that `recognise` calls GGUF: the path, or the file in it."""
    return path if path.is_file() else next(path.glob("*.gguf"))


def _by_config(keys: Keys, adapter: bool) -> Kind:
    # The order counts. A LoRA of the original code has both files, and its config.json says more.
    if "pumice_format" in keys:
        return Kind.OWN
    if "mm_vision_tower" in keys:
        return Kind.ORIGINAL
    if adapter:
        return Kind.ADAPTER
    kind = keys.get("model_type", str, "")
    if kind in HF_LLAVAS and ("text_config" in keys or "vision_config" in keys):
        return Kind.HF
    if kind in FAMILIES:
        return Kind.LLM
    if kind in TOWERS:
        return Kind.TOWER
    if kind in HF_LLAVAS:
        raise InputError(
            f"{keys.label} has neither text_config nor mm_vision_tower: it is no LLaVA, or "
            "incomplete; fetch it again"
        )
    raise InputError(
        f"{keys.label}: model_type is {kind!r}, which cannot be read; "
        f"known are {', '.join([*HF_LLAVAS, *FAMILIES, *TOWERS])}"
    )
