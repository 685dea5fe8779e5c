"""Find a model by name, path or hub name, recognise its format, and read its parts."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from pumice.config import ConnectorConfig, VisionConfig
from pumice.errors import InputError
from pumice.formats.components import open_llm
from pumice.formats.gguf.read import gguf_files, open_pair
from pumice.formats.hf.read import open_hf
from pumice.formats.llava.read import open_original
from pumice.formats.nanovlm import open_nanovlm
from pumice.formats.peft.read import adapt, base_name
from pumice.formats.pumice import folder
from pumice.formats.recognise import ADAPTER_CONFIG, FormatKind, recognise
from pumice.processor import NO_TOWER
from pumice.storage.download import gguf_from_hub, is_gguf_name, is_hub_name, locate
from pumice.storage.json_file import Keys
from pumice.storage.outline import ValuesNotHere, outlines
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import find_weights

BUILT_IN = Path(__file__).parent.parent / "models"
_LOG = logging.getLogger(__name__)


def is_built_in(source: str | os.PathLike[str]) -> bool:
    """Return whether `source` names a model that Pumice itself brings, and nothing on disk."""
    return not _is_here(Path(os.path.expanduser(source))) and str(source) in _built_in()


def _is_here(path: Path) -> bool:
    return (path / folder.CONFIG).is_file() or path.is_file()


def _built_in() -> list[str]:
    return sorted(path.name for path in BUILT_IN.iterdir() if path.is_dir()) if BUILT_IN.is_dir() else []


def find_model(source: str | os.PathLike[str]) -> Path:
    """Return the path of a model: `source` is a folder or file, a built-in model, or a name on the hub.

    Raises InputError if there is none.
    """
    # 1. What exists on disk comes first, then the models that Pumice itself brings.
    path = Path(os.path.expanduser(source))
    if _is_here(path):
        return path
    if is_built_in(source):
        return BUILT_IN / source
    # 2. Folders that hold no model, with a hint; and what may be a name on the hub.
    if (path / "model" / folder.CONFIG).is_file():
        raise InputError(f"{source} is the folder of a training run; use its model, {path / 'model'}")
    if path.is_dir() and str(source):
        return path  # the error on opening it says what is missing
    name = path.as_posix()
    if is_gguf_name(name):
        return gguf_from_hub(name)[0]
    if is_hub_name(str(source)):
        return locate(name)
    raise InputError(
        f"there is no model {name!r}; give a model folder, a name on the hub like 'owner/model', "
        f"or one of: {', '.join(_built_in())}"
    )


def find_pair(
    source: str | os.PathLike[str], mmproj: str | os.PathLike[str] | None
) -> tuple[Path, Path | None]:
    """Return the path of a model in GGUF, and that of its mmproj where it is given or on the hub."""
    if mmproj is None and not Path(source).exists() and is_gguf_name(str(source)):
        return gguf_from_hub(str(source))
    if mmproj is None:
        return find_model(source), None
    if not Path(mmproj).expanduser().exists() and not is_hub_name(str(mmproj)):
        raise InputError(
            f"--mmproj {mmproj} is not there; check the path, or name a file on the hub: owner/model/file"
        )
    return find_model(source), locate(mmproj)


def check_sees(source: str | os.PathLike[str], mmproj: str | os.PathLike[str] | None) -> None:
    """Raise InputError if a model on this machine is a language model alone, which sees no pictures.

    No weight is read. One on the hub is not looked up twice: it is refused once it is read. mmproj: as in
    `read_model`.
    """
    if mmproj is not None or not os.path.exists(source):
        return
    path = find_model(source)
    kind = recognise(path)
    is_blind = kind is FormatKind.LLM
    if kind is FormatKind.OWN:
        is_blind = Keys.of(path / folder.CONFIG).object("vision").values.get("kind") == "none"
    elif kind is FormatKind.GGUF:
        is_blind = gguf_files(*find_pair(source, None))[1] is None
    if is_blind:
        raise InputError(NO_TOWER)


def stored_generation(source: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return how Pumice's own folder on this machine says that answers are sampled, before it is read.

    None for any other model. The values are not checked.
    """
    if not os.path.exists(source) and (is_hub_name(str(source)) or is_gguf_name(str(source))):
        return None
    path = find_model(source)
    if recognise(path) is not FormatKind.OWN:
        return None
    return Keys.of(path / folder.CONFIG).get("generation", dict, {})


def read_model(
    source: str | os.PathLike[str],
    *,
    template: str | None = None,
    tower: str | None = None,
    base: str | None = None,
    mmproj: str | os.PathLike[str] | None = None,
) -> LoadedParts:
    """Read a Pumice folder, a LLaVA, an Idefics3, a nanoVLM, a LoRA on one of them, GGUF, or an LLM alone.

    template: the chat format, to override the source's or if it has none. tower: the vision tower of an
    original LLaVA. base: what a LoRA or a projector was trained on. Both override the names in the source's
    config. mmproj: the half of a LLaVA in GGUF that sees. Raises InputError.
    """
    # An option that the format does not use is an error: it would be ignored in silence.
    path = find_model(source)
    kind = recognise(path)
    if kind is not FormatKind.ORIGINAL and tower is not None:
        raise InputError(f"{path} is {kind.value}, which takes no other vision tower; leave --tower out")
    if kind not in (FormatKind.ORIGINAL, FormatKind.ADAPTER) and base is not None:
        raise InputError(f"{path} is {kind.value}, which needs no base; leave --base out")
    if kind is FormatKind.OWN and template is not None:
        raise InputError(f"{path} is {kind.value}, whose config.json says its template; leave --template out")
    if kind is not FormatKind.GGUF and mmproj is not None:
        raise InputError(f"{path} is {kind.value}, which takes no mmproj; leave --mmproj out")
    if kind is FormatKind.GGUF:
        loaded = open_pair(*find_pair(source, mmproj), template)
    else:
        loaded = _read(path, kind, template, tower, base)
    return dataclasses.replace(loaded, sources={"model": (str(source), path)} | loaded.sources)


def read_or_outline(
    source: str | os.PathLike[str],
    *,
    template: str | None = None,
    tower: str | None = None,
    base: str | None = None,
    mmproj: str | os.PathLike[str] | None = None,
) -> tuple[LoadedParts, int]:
    """Return what `read_model` does, without fetching the weights of models on the hub, and their bytes.

    If there are bytes to fetch, config and shapes are all that is known, and no tensor can be read. 0: all is
    here, or was fetched because the values decide how the model is read.
    """

    def read() -> LoadedParts:
        return read_model(source, template=template, tower=tower, base=base, mmproj=mmproj)

    with outlines() as fetched:
        try:
            return read(), fetched.missing
        except ValuesNotHere as error:
            _LOG.warning("%s: %s cannot be read in parts, so that all weights are downloaded", source, error)
        except InputError as error:
            if not fetched.missing:
                raise
            # Outlines lie in a folder that nobody knows, each under its name on the hub.
            raise InputError(str(error).replace(f"{fetched.folder}{os.sep}", "")) from error
    return read(), 0


def _read(
    path: Path, kind: FormatKind, template: str | None, tower: str | None, base: str | None
) -> LoadedParts:
    if kind is FormatKind.OWN:
        return folder.open_parts(path)
    if kind is FormatKind.HF:
        return open_hf(path, template)
    if kind is FormatKind.NANOVLM:
        return open_nanovlm(path, template)
    if kind is FormatKind.ORIGINAL:
        return open_original(path, template, tower, base)
    if kind is FormatKind.ADAPTER:
        return _adapted(path, template, base)
    if kind is FormatKind.TOWER:
        raise InputError(
            f"{path} is {kind.value}, which says nothing by itself; join it to a language model: "
            "`pumice import LLM DST --tower TOWER`, or model.tower and model.decoder of a recipe"
        )
    return language_only(path, template)


def _adapted(path: Path, template: str | None, base: str | None) -> LoadedParts:
    if weights := find_weights(path):
        raise InputError(
            f"{path} holds a whole model ({weights[0].name}) and a LoRA ({ADAPTER_CONFIG}); nothing says "
            "whether the LoRA is in the weights already: move one of them to a folder of its own"
        )
    base_source = base or base_name(path)
    if not base_source:
        raise InputError(f"{path / ADAPTER_CONFIG} names no base; give it with --base")
    base_model = read_model(base_source, template=template)
    # "model" is the adapter itself, so that the model under it is recorded as "base".
    sources = {"base" if role == "model" else role: origin for role, origin in base_model.sources.items()}
    return dataclasses.replace(adapt(base_model, path), sources=sources)


def language_only(path: Path, template: str | None) -> LoadedParts:
    """Read a language model alone as a model without a vision tower."""
    model = open_llm(path)
    config, notes = model.text.model_config(
        template,
        str(path),
        decoder=model.config,
        vision=VisionConfig(kind="none", width=model.config.width),
        connector=ConnectorConfig("identity"),
    )
    state = {f"decoder.{name}": tensor for name, tensor in model.state.items()}
    notes = (*model.notes, *notes, "it has no vision tower and answers without pictures")
    return model.text.parts(config, state, notes)
