"""A tokenizer's files for the original code, which opens them with transformers 4.37 and `use_fast=False`.

Knows: which class that code expects, and which files each class reads. Does not know: tensors, pictures.

Llama's class reads tokenizer.model alone, Qwen2's vocab.json and merges.txt. Any other tokenizer is opened
from tokenizer.json, as Llama 3's is; its `tokenizers` library reads merges that are written as text.
tokenizer.json stands there in each case, and is what newer software reads.
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
from pumice.formats.text.chat_template import to_jinja
from pumice.formats.text.sentencepiece import SentencePiece
from pumice.formats.text.sentencepiece_write import cuts_by_sentencepiece, fits, from_tokenizer, to_bytes
from pumice.formats.text.tokenizer import MODEL
from pumice.storage.json_file import write_json
from pumice.storage.parts import LoadedParts
from pumice.templates import get_template


def write_tokenizer(folder: Path, model: LoadedParts) -> list[str]:
    """Write the files of the class that opens this tokenizer there. Returns notes."""
    config, tokenizer = model.config, model.tokenizer
    chat = to_jinja(get_template(config.template, config.chat))
    values = json.loads(tokenizer.to_str())
    if (data := sentencepiece(model)) is not None:
        (folder / MODEL).write_bytes(data)
        own = _llama(config, tokenizer, data)
    elif values["model"].get("type") == "BPE" and pre_tokenizer_name(values) == "qwen2":
        vocabulary = dict(sorted(values["model"]["vocab"].items(), key=lambda item: item[1]))
        write_json(folder / "vocab.json", vocabulary)
        lines = ["#version: 0.2", *_merges(values)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
        own = {"tokenizer_class": "Qwen2Tokenizer", "unk_token": None, "errors": "replace"}
    else:
        own = {}
    if own:
        own["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in values["added_tokens"]
        }
    hf_write.write_tokenizer(folder, config, tokenizer, chat, **own)
    _write_merges_as_text(folder / "tokenizer.json")
    notes = []
    if not own and cuts_by_sentencepiece(tokenizer):
        notes.append("no SentencePiece model cuts text as this tokenizer does: tokenizer.json stands for it")
    if values["model"].get("ignore_merges"):
        notes.append(
            "the original code's tokenizers library does not know ignore_merges: a word that stands in the "
            "vocabulary but is not what its merges make becomes several tokens there"
        )
    return notes


def sentencepiece(model: LoadedParts) -> bytes | None:
    """tokenizer.model: the source's own where it is this tokenizer's, else one that cuts text alike.

    None for a tokenizer that SentencePiece did not make.
    """
    config, tokenizer = model.config, model.tokenizer
    if not cuts_by_sentencepiece(tokenizer):
        return None
    own = None
    if model.sentencepiece is not None:
        try:
            own = SentencePiece.from_bytes(model.sentencepiece, MODEL)
        except InputError:  # another format has a file of this name; the vocabulary says everything
            own = None
    if own is not None and fits(own, tokenizer):
        return model.sentencepiece
    stop = config.stop_token_ids[0] if config.stop_token_ids else None
    made = from_tokenizer(tokenizer, config.bos_token_id, stop)
    return None if made is None else to_bytes(made)


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


def _merges(values: dict[str, Any]) -> list[str]:
    merges = values["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _write_merges_as_text(path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["model"].get("type") == "BPE":
        values["model"]["merges"] = _merges(values)
    write_json(path, values)
