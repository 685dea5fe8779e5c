"""Write a tokenizer as GGUF metadata: SentencePiece ("llama") or byte-level BPE ("gpt2")."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models

from pumice.config import ModelConfig
from pumice.errors import InputError
from pumice.formats.gguf.tokenizer import PRE_TOKENIZERS
from pumice.formats.text.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED


def write_vocabulary(writer: Any, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write the vocabulary and the special tokens. Raises InputError if llama.cpp tokenises otherwise."""
    # 1. The vocabulary. llama.cpp needs scores for one kind of BPE and merges for the other.
    values = json.loads(tokenizer.to_str())
    model = values["model"]
    if model.get("type") != "BPE":
        raise InputError(f"the tokenizer is a {model.get('type')}; llama.cpp gets byte-pair encodings only")
    tokens, kinds = _tokens(tokenizer, values, config.decoder.vocab_size)
    merges = list(map(tuple, model["merges"]))
    if model.get("byte_fallback"):
        writer.add_string("tokenizer.ggml.model", "llama")
        writer.add_string("tokenizer.ggml.pre", "default")
        writer.add_array("tokenizer.ggml.tokens", tokens)
        writer.add_array("tokenizer.ggml.scores", _scores(tokens, kinds, merges))
        first = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
        writer.add_bool("tokenizer.ggml.add_space_prefix", "".join(first).startswith(SPACE))
    else:
        if (name := pre_tokenizer_name(values)) is None:
            known = ", ".join(PRE_TOKENIZERS)
            raise InputError(f"llama.cpp has no name for how the tokenizer splits words; known are {known}")
        writer.add_string("tokenizer.ggml.model", "gpt2")
        writer.add_string("tokenizer.ggml.pre", name)
        writer.add_array("tokenizer.ggml.tokens", tokens)
        writer.add_array("tokenizer.ggml.merges", [f"{left} {right}" for left, right in merges])
    writer.add_array("tokenizer.ggml.token_type", kinds)
    # 2. The special tokens. llama.cpp has room for three tokens that end an answer.
    for key, number in zip(("eos", "eot", "eom"), config.stop_token_ids, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", number)
    unknown = None if model.get("unk_token") is None else tokenizer.token_to_id(model["unk_token"])
    if unknown is not None:
        writer.add_uint32("tokenizer.ggml.unknown_token_id", unknown)
    if config.bos_token_id is not None:
        writer.add_uint32("tokenizer.ggml.bos_token_id", config.bos_token_id)
    writer.add_bool("tokenizer.ggml.add_bos_token", config.bos_token_id is not None)
    writer.add_bool("tokenizer.ggml.add_eos_token", False)


def _tokens(tokenizer: Tokenizer, values: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the token and its kind for each row of the embedding."""
    # Rows without a token have the names that llama.cpp's converter gives them.
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [UNUSED] * rows
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        tokens[number], kinds[number] = token, NORMAL
    if values["model"].get("byte_fallback"):
        for byte in range(256):
            if (byte_id := tokenizer.token_to_id(f"<0x{byte:02X}>")) is not None:
                kinds[byte_id] = BYTE
    for added in values["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = values["model"].get("unk_token")
    if unknown is not None and (unknown_id := tokenizer.token_to_id(unknown)) is not None:
        kinds[unknown_id] = UNKNOWN
    return tokens, kinds


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Return SentencePiece's scores: minus the rank of the first merge that makes the token.

    Only their order counts. Raises InputError if the merges are not those that SentencePiece would use.
    """
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(merges)))}
    # SentencePiece merges any two tokens that make a third, so each such pair must be in the list of merges.
    indivisible = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (NORMAL, USER_DEFINED)}
    listed = set(merges)
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == NORMAL:
            for cut in range(1, len(token)):
                pair = token[:cut], token[cut:]
                if pair[0] in indivisible and pair[1] in indivisible and pair not in listed:
                    raise InputError(
                        f"the tokenizer never merges {pair[0]!r} and {pair[1]!r} into {token!r}, llama.cpp "
                        "would: SentencePiece did not make this vocabulary; use --to hf"
                    )
    lowest = float(-len(merges))
    return [-float(ranks[token]) if token in ranks else lowest for token in tokens]


def pre_tokenizer_name(values: dict[str, Any]) -> str | None:
    """Return which of PRE_TOKENIZERS splits words as the tokenizer.json `values` does; None if none does."""
    expected = _essence(values["pre_tokenizer"])
    for name, make in PRE_TOKENIZERS.items():
        sample = Tokenizer(models.BPE())
        sample.pre_tokenizer = make()
        if _essence(json.loads(sample.to_str())["pre_tokenizer"]) == expected:
            if (name == "llama-bpe") != bool(values["model"].get("ignore_merges")):
                continue
            return name
    return None


def _essence(part: Any) -> Any:
    """Return what decides the ids: without offsets, and with the member instead of a sequence of one."""
    if isinstance(part, dict):
        if part.get("type") == "Sequence" and len(part["pretokenizers"]) == 1:
            return _essence(part["pretokenizers"][0])
        return {key: _essence(value) for key, value in part.items() if key != "trim_offsets"}
    return [_essence(p) for p in part] if isinstance(part, list) else part
