"""Write a tokenizer's files for the original code, which uses transformers 4.37 and `use_fast=False`.

Llama's class reads only tokenizer.model, Qwen2's reads vocab.json and merges.txt. Other tokenizers, as Llama
3's, are read from tokenizer.json, in which the old `tokenizers` library needs merges as text. tokenizer.json
is always written, because newer programs read it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pumice.config import ModelConfig
from pumice.errors import InputError
from pumice.formats.gguf.vocab import pre_tokenizer_name
from pumice.formats.hf import write as hf_write
from pumice.formats.text.chat_template_write import to_jinja
from pumice.formats.text.sentencepiece import SentencePiece
from pumice.formats.text.sentencepiece_write import cuts_by_sentencepiece, fits, from_tokenizer, to_bytes
from pumice.formats.text.tokenizer import MODEL
from pumice.storage.json_file import write_json
from pumice.storage.parts import LoadedParts
from pumice.templates import get_template

# Options of a byte-pair encoding that change ids and that Qwen2's class does not read.
_BPE_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def write_tokenizer(folder: Path, model: LoadedParts) -> list[str]:
    """Write the files of the class that reads this tokenizer there. Returns notes for the user."""
    # 1. The files of the slow class, and the keys of tokenizer_config.json that it needs.
    config, tokenizer = model.config, model.tokenizer
    chat = to_jinja(get_template(config.template, config.chat))
    values = json.loads(tokenizer.to_str())
    if (data := sentencepiece(model)) is not None:
        (folder / MODEL).write_bytes(data)
        class_keys = _llama(config, tokenizer, data)
    elif _is_qwen2(config, values):
        vocabulary = dict(sorted(values["model"]["vocab"].items(), key=lambda item: item[1]))
        write_json(folder / "vocab.json", vocabulary)
        lines = ["#version: 0.2", *map(" ".join, values["model"]["merges"])]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
        class_keys = {"tokenizer_class": "Qwen2Tokenizer", "unk_token": None, "errors": "replace"}
    else:
        class_keys = {}
    if class_keys:
        class_keys["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in values["added_tokens"]
        }
    # 2. tokenizer.json and the files beside it.
    hf_write.write_tokenizer(folder, config, tokenizer, chat, **class_keys)
    _write_merges_as_text(folder / "tokenizer.json")
    # 3. Tell the user where the ids may differ.
    notes = []
    if not class_keys and cuts_by_sentencepiece(tokenizer):
        notes.append("no SentencePiece model cuts text as this tokenizer does: tokenizer.json stands for it")
    if values["model"].get("ignore_merges"):
        notes.append(
            "the original code's tokenizers library does not know ignore_merges: a word that stands in the "
            "vocabulary but is not what its merges make becomes several tokens there"
        )
    return notes


def sentencepiece(model: LoadedParts) -> bytes | None:
    """Return tokenizer.model: the source's if it fits this tokenizer, or a new one that cuts text alike.

    None if SentencePiece did not make this tokenizer.
    """
    config, tokenizer = model.config, model.tokenizer
    if not cuts_by_sentencepiece(tokenizer):
        return None
    source_model = None
    if model.sentencepiece is not None:
        try:
            source_model = SentencePiece.from_bytes(model.sentencepiece, MODEL)
        except InputError:  # another format uses the same file name
            source_model = None
    if source_model is not None and fits(source_model, tokenizer):
        return model.sentencepiece
    stop = config.stop_token_ids[0] if config.stop_token_ids else None
    new_model = from_tokenizer(tokenizer, config.bos_token_id, stop)
    return None if new_model is None else to_bytes(new_model)


def _is_qwen2(config: ModelConfig, values: dict[str, Any]) -> bool:
    """Return whether Qwen2's class cuts text alike: it normalizes to NFC, merges, adds no begin-of-text."""
    model = values["model"]
    return (
        config.bos_token_id is None
        and values["normalizer"] == {"type": "NFC"}
        and model["type"] == "BPE"
        and not any(model.get(option) for option in _BPE_OPTIONS)
        and pre_tokenizer_name(values) == "qwen2"
    )


def _llama(config: ModelConfig, tokenizer: Tokenizer, data: bytes) -> dict[str, Any]:
    pieces = SentencePiece.from_bytes(data, MODEL)
    names = {"bos_token": pieces.bos, "eos_token": pieces.eos, "unk_token": pieces.unk}
    texts = {key: pieces.text_of(number) for key, number in names.items()}
    if config.bos_token_id is not None:
        texts["bos_token"] = tokenizer.id_to_token(config.bos_token_id)
    if config.stop_token_ids:
        texts["eos_token"] = tokenizer.id_to_token(config.stop_token_ids[0])
    return {
        "tokenizer_class": "LlamaTokenizer",
        **{key: text for key, text in texts.items() if text is not None},
        "add_bos_token": config.bos_token_id is not None,
        "add_eos_token": False,
        "legacy": '"prepend_scheme":"first"' not in tokenizer.to_str(),
        "sp_model_kwargs": {},
    }


def _write_merges_as_text(path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["model"].get("type") == "BPE":
        values["model"]["merges"] = list(map(" ".join, values["model"]["merges"]))
    write_json(path, values)
