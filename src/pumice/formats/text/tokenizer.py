"""Read a tokenizer from a folder, a tokenizer.json, a SentencePiece model or a GGUF file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from pumice.errors import InputError, shorten
from pumice.formats.text.files import TokenizerFiles
from pumice.formats.text.sentencepiece import SentencePiece
from pumice.storage.json_file import read_bytes, read_json, read_text
from pumice.tokens import Tokenizer

MODEL = "tokenizer.model"  # SentencePiece's
KINDS = "a tokenizer.json, a tokenizer.model, a GGUF file, or a folder with one of the first two"


def read_tokenizer(
    path: str | Path, read_gguf: Callable[[Path], TokenizerFiles] | None = None
) -> TokenizerFiles:
    """Read the tokenizer at `path`, whose format follows from its contents.

    read_gguf: the reader of GGUF files, as in `pumice.formats.gguf.tokenizer`; None if they are refused.
    Raises InputError if the tokenizer is missing, damaged or of an unknown kind, or if its files contradict
    each other.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InputError(f"there is no tokenizer at {path}; give {KINDS}")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"GGUF"):
        if read_gguf is None:
            raise InputError(f"{path} is a GGUF file, which cannot be read here; give {KINDS}")
        return read_gguf(path)
    if head.lstrip()[:1] in (b"{", b"["):  # a list is JSON as well, and gets an error that says so
        backend = Tokenizer.from_file(path).backend
        bos = _added_first(backend)
        return TokenizerFiles(backend, bos=bos, adds_bos=bos is not None)
    return _sentencepiece(path, {})


def _folder(folder: Path) -> TokenizerFiles:
    # 1. tokenizer.json comes first, because transformers reads it first.
    config = _optional(folder / "special_tokens_map.json") | _optional(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        source = folder / "tokenizer.json"
        backend = Tokenizer.from_file(source).backend
        bos = _added_first(backend)
        files = TokenizerFiles(backend, bos=bos, adds_bos=bos is not None)
    elif (folder / MODEL).is_file():
        source = folder / MODEL
        files = _sentencepiece(source, config)
    else:
        raise InputError(f"there is no tokenizer at {folder}; put a tokenizer.json or tokenizer.model there")
    # 2. The files beside it may add tokens, name the special ones and say whether a text begins with one.
    _add_tokens(files.backend, folder, source, config)
    bos = _text(config.get("bos_token")) or files.bos
    adds = config.get("add_bos_token")
    templates = _chat_templates(folder, config)
    return TokenizerFiles(
        backend=files.backend,
        bos=bos,
        eos=_text(config.get("eos_token")) or files.eos,
        adds_bos=files.adds_bos if not isinstance(adds, bool) else adds and bos is not None,
        chat_template=templates[0] if templates else None,
        other_templates=tuple(dict.fromkeys(source for source in templates[1:] if source != templates[0])),
        sentencepiece=read_bytes(folder / MODEL) if (folder / MODEL).is_file() else None,
    )


def _sentencepiece(path: Path, config: dict[str, Any]) -> TokenizerFiles:
    model = SentencePiece.read(path)
    if config.get("add_prefix_space") is False:
        model = dataclasses.replace(model, add_prefix=False)
    bos, eos = model.text_of(model.bos), model.text_of(model.eos)
    adds = config.get("add_bos_token") is not False and bos is not None
    # As transformers does, take the old treatment of spaces if the key is absent or null.
    backend = model.tokenizer(str(path), legacy=config.get("legacy") is not False, add_bos=adds)
    return TokenizerFiles(backend, bos=bos, eos=eos, adds_bos=adds, sentencepiece=read_bytes(path))


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, source: Path, config: dict[str, Any]) -> None:
    """Add the tokens of the files beside the tokenizer's own, with the ids that those files state."""
    # 1. Collect (id, text, flags, file) from both files that can add tokens.
    additions = [
        (number, text, {"special": True, "normalized": False}, "added_tokens.json")
        for text, number in _optional(folder / "added_tokens.json").items()
    ]
    for number, values in (config.get("added_tokens_decoder") or {}).items():
        text = _text(values)
        is_id = number.isdecimal() and len(number) < 20  # more digits than any id has
        if not is_id or not isinstance(values, dict) or text is None:
            raise InputError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder gives {number!r} "
                f"{shorten(values)}, not the id of a token with its content"
            )
        flags = {key: values[key] for key in _FLAGS if key in values}
        additions.append((int(number), text, flags, "tokenizer_config.json"))
    # 2. Add them by id. The library numbers new tokens itself, so each must be the next free id.
    for number, text, flags, file in sorted(additions, key=lambda item: item[0]):
        old_id, size = backend.token_to_id(text), backend.get_vocab_size()
        if (size if old_id is None else old_id) != number:
            actual = f"{source.name} has {old_id}" if old_id is not None else f"the next free id is {size}"
            raise InputError(
                f"{folder / file} gives {shorten(text)} the id {number}, but {actual}; "
                "take all files from the same model"
            )
        if old_id is None:
            backend.add_tokens([AddedToken(text, **flags)])
    # 3. Mark as special what the configs name as such and the vocabulary has.
    special = Tokenizer(backend).special
    names = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        names += more.values() if isinstance(more, dict) else more
    backend.add_special_tokens([
        AddedToken(text, special=True, normalized=False)
        for text in dict.fromkeys(filter(None, map(_text, names)))
        if text not in special and backend.token_to_id(text) is not None
    ])  # fmt: skip


# The flags of an added token that AddedToken takes.
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _text(token: Any) -> str | None:
    """Return a token's text, which is stored as text or as an object with flags; None for anything else."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _added_first(backend: tokenizers.Tokenizer) -> str | None:
    """Return the token that the tokenizer itself puts before a text; None if it adds none."""
    text = "a"
    with_added, bare = backend.encode(text).ids, backend.encode(text, add_special_tokens=False).ids
    return backend.id_to_token(with_added[0]) if with_added[:1] != bare[:1] else None


def _chat_templates(folder: Path, config: dict[str, Any]) -> list[str]:
    # transformers moved it over the years; a newer file overrides an older one.
    newest = folder / "chat_template.jinja"
    templates: list[Any] = [read_text(newest)] if newest.is_file() else []
    templates += [
        _optional(folder / file).get("chat_template")
        for file in ("chat_template.json", "processor_config.json")
    ]
    templates.append(config.get("chat_template"))
    if isinstance(several := templates[-1], list):  # by name
        named = {item.get("name"): item.get("template") for item in several if isinstance(item, dict)}
        templates[-1] = named.get("default")
    return [template for template in templates if isinstance(template, str)]


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
