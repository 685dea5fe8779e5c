"""Read a SentencePiece model as a tokenizer of the `tokenizers` library that gives the same ids.

The file's protobuf layout is in google/sentencepiece, src/sentencepiece_model.proto. That library is not
needed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pumice.errors import CAUSE, InputError, wrong_input

# Kinds of piece; GGUF has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2  # trainer_spec.model_type
_TYPES = {1: "Unigram", BPE: "BPE", 3: "word", 4: "character"}
SPACE = "▁"  # how a piece writes a space


@dataclass(frozen=True)
class SentencePiece:
    """The contents of a SentencePiece model; the defaults are those of the format.

    pieces: (text, score, kind), by id. unk, bos, eos: -1 if there is no such token.
    """

    pieces: Sequence[tuple[str, float, int]]
    model_type: int = 1
    unk: int = 0
    bos: int = 1
    eos: int = 2
    charsmap: bytes = b""  # a compiled table of character replacements
    add_prefix: bool = True  # a space before the text
    remove_spaces: bool = True  # those at both ends, and all but one of several in a row

    @classmethod
    def read(cls, path: str | Path) -> SentencePiece:
        """Read a file. Raises InputError if it is no SentencePiece model, or damaged."""
        with wrong_input(OSError, f"{path} cannot be read: {CAUSE}"):
            data = Path(path).read_bytes()
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> SentencePiece:
        """Read the bytes of a file. `path` names it in errors."""
        # Fields of the model: 1 is a piece, 2 the trainer's settings, 3 the normalizer's.
        with wrong_input(
            (ValueError, TypeError, struct.error),
            f"{path} is no SentencePiece model, or damaged ({CAUSE}); copy it again",
        ):
            fields = list(_fields(data))
            pieces = [_piece(value) for number, value in fields if number == 1]
            trainer = {number: value for spec in _all(fields, 2) for number, value in _fields(spec)}
            normalizer = {number: value for spec in _all(fields, 3) for number, value in _fields(spec)}
        if not pieces or not trainer or not normalizer:
            raise InputError(f"{path} is no whole SentencePiece model; copy it again")
        return cls(
            pieces=pieces,
            model_type=_int(trainer.get(3), 1),
            unk=_int(trainer.get(40), 0),
            bos=_int(trainer.get(41), 1),
            eos=_int(trainer.get(42), 2),
            charsmap=bytes(normalizer.get(2, b"")),
            add_prefix=bool(normalizer.get(3, True)),
            remove_spaces=bool(normalizer.get(4, True)),
        )

    def text_of(self, number: int) -> str | None:
        """Return the text of a token such as `bos`; None if the model has no such token."""
        return self.pieces[number][0] if 0 <= number < len(self.pieces) else None

    def tokenizer(self, label: str, *, legacy: bool = True, add_bos: bool = True) -> Tokenizer:
        """Return a tokenizer that cuts text as this model does, and finds control tokens in text as well.

        legacy: as in the original Llama code, every stretch of text between special tokens begins with the
        added space; otherwise only the first one does. add_bos: whether `encode` puts the bos token first.
        label: names the model in errors. Raises InputError on a model that is no BPE.
        """
        # 1. Only BPE follows from the pieces alone. The library's BPE has no unused pieces.
        kinds = {kind for _, _, kind in self.pieces}
        if self.model_type != BPE or UNUSED in kinds:
            kind = _TYPES.get(self.model_type, "unknown") if UNUSED not in kinds else "BPE with unused pieces"
            raise InputError(
                f"{label} is a SentencePiece model of the kind {kind}; only BPE is read from one: "
                "put the tokenizer.json that transformers writes beside it"
            )
        # 2. Vocabulary and merges. Characters without a piece become bytes, or one unknown token.
        tokenizer = Tokenizer(
            models.BPE(
                vocab={text: number for number, (text, _, _) in enumerate(self.pieces)},
                merges=self.merges(),
                unk_token=self.text_of(self.unk),
                fuse_unk=True,
                byte_fallback=BYTE in kinds,
            )
        )
        # 3. Spaces before text is cut, and back when ids become text.
        self._set_spaces(tokenizer, legacy)
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        strips = [decoders.Strip(" ", 1, 0)] if self.add_prefix else []
        tokenizer.decoder = decoders.Sequence([*steps, *strips])
        # 4. Tokens that are found in text before it is cut.
        tokenizer.add_special_tokens(
            [_token(text, True) for text, _, kind in self.pieces if kind in (CONTROL, UNKNOWN)]
        )
        tokenizer.add_tokens([_token(text, False) for text, _, kind in self.pieces if kind == USER_DEFINED])
        if add_bos and (bos := self.text_of(self.bos)) is not None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos)]
            )
        return tokenizer

    def _set_spaces(self, tokenizer: Tokenizer, legacy: bool) -> None:
        """Make the tokenizer replace characters and write spaces as this model does, before it cuts text."""
        changes: list[normalizers.Normalizer] = []
        if self.charsmap:
            changes.append(normalizers.Precompiled(self.charsmap))
        if self.remove_spaces:
            changes += [
                normalizers.Replace(Regex(r"\A +| +\z"), ""),
                normalizers.Replace(Regex(" {2,}"), " "),
            ]
        if legacy:
            changes += [normalizers.Prepend(SPACE)] if self.add_prefix else []
            changes.append(normalizers.Replace(" ", SPACE))
        else:
            scheme = "first" if self.add_prefix else "never"
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
        if changes:
            tokenizer.normalizer = normalizers.Sequence(changes)

    def spaces(self, legacy: bool) -> tuple[Any, Any]:
        """Return the normalizer and the pre-tokenizer of `tokenizer`, as they are in tokenizer.json."""
        empty = Tokenizer(models.BPE())
        self._set_spaces(empty, legacy)
        values = json.loads(empty.to_str())
        return values["normalizer"], values["pre_tokenizer"]

    def merges(self) -> list[tuple[str, str]]:
        """Return the pairs of pieces that merge into a piece, best score first."""
        # The file stores scores but no merges: any two pieces whose texts make a third one are a merge.
        scores = {text: score for text, score, kind in self.pieces if kind == NORMAL}
        candidates = [
            (-score, -cut, text)
            for text, score in scores.items()
            for cut in range(1, len(text))
            if text[:cut] in scores and text[cut:] in scores
        ]
        return [(text[:-negative_cut], text[-negative_cut:]) for _, negative_cut, text in sorted(candidates)]


def _token(text: str, special: bool) -> AddedToken:
    return AddedToken(text, special=special, normalized=False)


def _piece(data: int | bytes) -> tuple[str, float, int]:
    values = dict(_fields(data))
    (score,) = struct.unpack("<f", bytes(values.get(2, bytes(4))))
    return bytes(values.get(1, b"")).decode(), score, _int(values.get(3), NORMAL)


def _all(fields: list[tuple[int, int | bytes]], number: int) -> list[int | bytes]:
    return [value for field, value in fields if field == number]


def _int(value: int | bytes | None, default: int) -> int:
    """Return a protobuf int32; a negative one is stored as a 64-bit number."""
    if value is None:
        return default
    if not isinstance(value, int):
        raise ValueError("a field should be a number")
    return value - (1 << 64) if value >> 63 else value


def _fields(data: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of one protobuf message: (number, value), a value other than a varint as bytes."""
    if isinstance(data, int):
        raise ValueError("a field should be a message")
    # A key is number << 3 | kind. Kind 0 is a varint, 1 and 5 are 8 and 4 bytes, 2 is a length and then
    # bytes.
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(data, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if position + size > len(data):
            raise ValueError("it is cut short")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("it is cut short")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
