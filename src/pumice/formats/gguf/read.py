"""Read a model from GGUF files: a language model alone, or one with its mmproj, the half that sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pumice.config import ConnectorConfig, VisionConfig
from pumice.errors import InputError
from pumice.formats.families import FAMILIES
from pumice.formats.gguf.file import GgufFile
from pumice.formats.gguf.llm import open_gguf
from pumice.formats.gguf.mmproj import ARCHITECTURE, read_mmproj
from pumice.storage.parts import LoadedParts


def language_file(path: Path) -> GgufFile:
    """Return the language model at `path`, a GGUF file or a folder with some. Raises InputError."""
    return gguf_files(path, None)[0]


def open_pair(path: Path, mmproj: Path | None = None, template: str | None = None) -> LoadedParts:
    """Read the GGUF file `path`, or the files in the folder `path`, as a model.

    mmproj: the half that sees, where `path` is a file, or a folder with several of them. template: a chat
    format instead of the one that the file describes. Raises InputError if the files do not belong together.
    """
    # 1. The language model, and the half that sees.
    llm_file, seeing_file = gguf_files(path, mmproj)
    llm = open_gguf(llm_file)
    seeing = None if seeing_file is None else read_mmproj(seeing_file)
    if seeing is not None and seeing.width != llm.config.width:
        raise InputError(
            f"{seeing.path} gives features of width {seeing.width}, {llm_file.path} takes "
            f"{llm.config.width}: they are of two models; give the mmproj that came with the language model"
        )
    # 2. The config. LLaVA's own code wrote no chat templates, so old files have none.
    parts: dict[str, Any] = {"connector": ConnectorConfig("identity")}
    parts["vision"] = VisionConfig(kind="none", width=llm.config.width)
    fallback: str | None = None
    notes: tuple[str, ...] = ("it has no vision tower and answers without pictures; --mmproj gives one",)
    if seeing is not None:
        parts = {name: getattr(seeing, name) for name in ("vision", "connector", "image", "image_wrap")}
        fallback, notes = FAMILIES["llama"].template, seeing.notes
    label = str(llm_file.path)
    config, assumed = llm.text.model_config(template, label, fallback=fallback, decoder=llm.config, **parts)
    if fallback is not None and assumed:
        assumed = (*assumed, "--template names another")
    # 3. The tensors, which are read later.
    state = {f"decoder.{name}": tensor for name, tensor in llm.state.items()}
    sources = {} if mmproj is None else {"mmproj": (str(mmproj), mmproj)}
    state |= {} if seeing is None else seeing.state
    return llm.text.parts(config, state, (*assumed, *notes), sources=sources)


def gguf_files(path: Path, mmproj: Path | None) -> tuple[GgufFile, GgufFile | None]:
    """Return the language model and its mmproj, told apart by what they hold.

    path: a file, or a folder with both. mmproj: a file that lies elsewhere. Raises InputError.
    """
    files = [GgufFile(file) for file in ([path] if path.is_file() else sorted(path.glob("*.gguf")))]
    models = [file for file in files if not _sees(file)]
    seeing = [file for file in files if _sees(file)]
    if mmproj is not None:
        seeing = [GgufFile(mmproj)]
        if not _sees(seeing[0]):
            architecture = seeing[0].metadata.get("general.architecture")
            raise InputError(
                f"--mmproj {mmproj} is no mmproj: its general.architecture is {architecture!r}, not "
                f"{ARCHITECTURE!r}; give the smaller file, whose name usually has mmproj in it"
            )
    if not files:
        raise InputError(f"{path} holds no GGUF file; give a .gguf file, or a folder that holds one")
    if not models:
        raise InputError(
            f"{files[0].path} is an mmproj, the half of a model that sees, without a language model; give "
            "that as the model and this file with --mmproj"
        )
    for kind, found, option in (("language models", models, "--model"), ("mmproj files", seeing, "--mmproj")):
        if len(found) > 1:
            listed = ", ".join(file.path.name for file in found)
            raise InputError(f"{path} holds {len(found)} {kind}; name one of them with {option}: {listed}")
    return models[0], seeing[0] if seeing else None


def _sees(file: GgufFile) -> bool:
    return bool(file.metadata.get("general.architecture") == ARCHITECTURE)
