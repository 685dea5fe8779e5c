"""Streaming text: equal to decoding everything at once, never half a character, nothing after a stop."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from pumice.engine.text import Detokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level() -> tokenizers.Tokenizer:
    """One token per byte, and a few of several bytes."""
    vocabulary = {token: number for number, token in enumerate([*ALPHABET, "th", "the", "Ġthe", "ab"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "b")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama's: a space marker that vanishes at the beginning of a text, and bytes to fall back on."""
    pieces = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *"abcdehrt", "▁t", "▁th", "▁the"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    vocabulary = {token: number for number, token in enumerate(pieces)}
    backend = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(backend)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}


def stream(ids: Sequence[int], tokenizer: tokenizers.Tokenizer, stop: Sequence[str] = ()) -> list[str]:
    text = Detokenizer(tokenizer.decode, stop)
    pieces = []
    for number in ids:
        pieces.append(text.add(number))
        if text.stopped:
            return pieces
    return [*pieces, text.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(max_size=40))
def test_stream_equals_the_whole(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text).ids
    assert "".join(stream(ids, tokenizer)) == tokenizer.decode(ids)


@given(text=st.text(alphabet="é€😀漢", max_size=12))
def test_no_piece_holds_half_a_character(text: str) -> None:
    tokenizer = TOKENIZERS["byte level"]
    pieces = stream(tokenizer.encode(text).ids, tokenizer)
    assert [piece for piece in pieces if piece] == list(text)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("first", [b"", b"\xe9"])
@pytest.mark.parametrize("repeated", ["\ufffd".encode(), b"\xe9", "漢".encode()])
def test_what_is_no_text_is_not_decoded_again_and_again(kind: str, first: bytes, repeated: bytes) -> None:
    """U+FFFD itself, and the first of three bytes: alone, again and again, and before characters."""
    tokenizer = TOKENIZERS[kind]
    name = {"byte level": "{0:c}", "sentencepiece": "<0x{0:02X}>"}[kind]  # of the token of one of these bytes
    ids = [tokenizer.token_to_id(name.format(byte)) for byte in first + repeated * 100]
    decoded: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return tokenizer.decode(ids)

    detokenizer = Detokenizer(decode)
    text = "".join([*map(detokenizer.add, ids), detokenizer.finish()])
    assert max(decoded) < 80
    # SentencePiece writes U+FFFD for all bytes beside a wrong one, however many there are.
    if kind == "byte level" or not first or repeated == first:
        assert text == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, len(ALPHABET) - 1), max_size=60))
def test_bytes_that_are_no_text_come_out_as_the_decoder_writes_them(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte level"]
    assert "".join(stream(ids, tokenizer)) == tokenizer.decode(ids)


@given(
    text=st.text(alphabet="abc ", max_size=30),
    stop=st.lists(st.text(alphabet="abc ", min_size=1, max_size=4), max_size=3),
)
def test_the_first_stop_string_to_be_complete_ends_the_text(text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS["byte level"]
    ends = [text.find(s) + len(s) for s in stop if s in text]
    starts = [text.find(s) for s in stop if s in text and text.find(s) + len(s) == min(ends)]
    expected = text[: min(starts)] if ends else text
    assert "".join(stream(tokenizer.encode(text).ids, tokenizer, stop)) == expected


def test_nothing_that_may_begin_a_stop_string_comes_out_early() -> None:
    tokenizer = TOKENIZERS["byte level"]
    assert stream(tokenizer.encode("xEN!END").ids, tokenizer, ["END"]) == ["x", "", "", "EN!", "", "", ""]


def test_what_was_held_back_comes_out_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte level"]
    assert stream(tokenizer.encode("xEN").ids, tokenizer, ["END"]) == ["x", "", "", "EN"]
    assert stream(tokenizer.encode("é").ids[:1], tokenizer) == ["", "\ufffd"]


def test_words_appear_with_their_own_token() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    pieces = stream(tokenizer.encode("the the cab").ids, tokenizer)
    assert pieces == ["the", " the", " ", "c", "a", "b", ""]
    assert all(len(b) <= 4 for _, b in pairwise(pieces))
