"""Write a tokenizer of the `tokenizers` library as a SentencePiece model.

The original LLaVA reads nothing else. The file's protobuf layout is in google/sentencepiece,
src/sentencepiece_model.proto.
"""

from __future__ import annotations

import base64
import itertools
import json
import struct
from typing import Any

from tokenizers import Tokenizer

from pumice.formats.text.sentencepiece import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, SentencePiece

_FLOAT, _BYTES = 5, 2  # protobuf's wire types; 0 is a varint


def cuts_by_sentencepiece(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer is a BPE with byte tokens, as those that SentencePiece makes for Llama."""
    model = json.loads(tokenizer.to_str())["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def fits(model: SentencePiece, tokenizer: Tokenizer) -> bool:
    """Return whether every piece of the model is the tokenizer's token of the same id."""
    return all(tokenizer.id_to_token(number) == text for number, (text, _, _) in enumerate(model.pieces))


def from_tokenizer(tokenizer: Tokenizer, bos: int | None, eos: int | None) -> SentencePiece | None:
    """Return a SentencePiece model that cuts text into the same ids; None if there is none.

    The scores are the order of the merges, which is all that BPE uses. Tokens that were added after the
    vocabulary are left out.
    """
    values = json.loads(tokenizer.to_str())
    model = values["model"]
    # 1. Each id of the vocabulary needs a piece, and one piece stands for unknown characters.
    size = 1 + max(model["vocab"].values())
    tokens = [tokenizer.id_to_token(number) for number in range(size)]
    texts = [text for text in tokens if text is not None]
    unknown = model["vocab"].get(model.get("unk_token") or "")
    if unknown is None or len(texts) < size:
        return None
    # 2. Scores: a piece has the rank of its first merge. A piece that no merge makes comes last.
    merges = list(map(tuple, model["merges"]))
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(merges)))}
    kinds = {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    kinds |= {
        token["content"]: CONTROL if token["special"] else USER_DEFINED for token in values["added_tokens"]
    }
    kinds[texts[unknown]] = UNKNOWN
    pieces = [(text, -float(ranks.get(text, len(merges))), kinds.get(text, NORMAL)) for text in texts]
    # 3. Spaces and replaced characters: SentencePiece has only these few ways, so try each.
    charsmap = _charsmap(values["normalizer"])
    for legacy, add_prefix, remove_spaces in itertools.product((True, False), repeat=3):
        candidate = SentencePiece(
            pieces, BPE, unk=unknown, bos=_within(bos, size), eos=_within(eos, size),
            charsmap=charsmap, add_prefix=add_prefix, remove_spaces=remove_spaces,
        )  # fmt: skip
        if candidate.spaces(legacy) == (values["normalizer"], values["pre_tokenizer"]):
            break
    else:
        return None
    # 4. SentencePiece merges any two pieces that make a third; the tokenizer must have exactly these merges.
    model_merges = candidate.merges()
    same = set(model_merges) == set(merges) and _merged_pieces(model_merges) == _merged_pieces(merges)
    return candidate if same and not model.get("ignore_merges") else None


def to_bytes(model: SentencePiece) -> bytes:
    """Return the bytes of tokenizer.model, which SentencePiece itself reads."""
    # The numbers are those of the fields in sentencepiece_model.proto. 43 is the padding token, which is
    # absent.
    kinds = {kind for _, _, kind in model.pieces}
    trainer = [(3, model.model_type), (4, len(model.pieces)), (35, int(BYTE in kinds))]
    trainer += [(40, model.unk), (41, model.bos), (42, model.eos), (43, -1)]
    roles = [(45, model.unk), (46, model.bos), (47, model.eos)]
    texts = [(field, text.encode()) for field, number in roles if (text := model.text_of(number)) is not None]
    normalizer: list[tuple[int, Any]] = [(1, b"identity")]
    if model.charsmap:
        normalizer = [(1, b"nmt_nfkc"), (2, model.charsmap)]
    normalizer += [(3, int(model.add_prefix)), (4, int(model.remove_spaces)), (5, 1)]
    pieces = [
        (1, _message([(1, text.encode()), (2, score), (3, kind)])) for text, score, kind in model.pieces
    ]
    return _message([*pieces, (2, _message([*trainer, *texts])), (3, _message(normalizer))])


def _within(number: int | None, size: int) -> int:
    return number if number is not None and number < size else -1


def _merged_pieces(merges: list[Any]) -> list[str]:
    """Return the pieces that the merges make, in order; a piece that several merges make is listed once."""
    return list(dict.fromkeys("".join(pair) for pair in merges))


def _charsmap(normalizer: dict[str, Any] | None) -> bytes:
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    maps = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
    return base64.b64decode(maps[0]) if maps else b""


def _message(fields: list[tuple[int, Any]]) -> bytes:
    """Return a protobuf message of integers, floats and bytes."""
    written = bytearray()
    for number, value in fields:
        if isinstance(value, bytes):
            written += _varint(number << 3 | _BYTES) + _varint(len(value)) + value
        elif isinstance(value, float):
            written += _varint(number << 3 | _FLOAT) + struct.pack("<f", value)
        else:
            written += _varint(number << 3) + _varint(value)
    return bytes(written)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative number takes ten bytes
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes([*written, value])
