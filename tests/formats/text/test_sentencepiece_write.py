"""SentencePiece models written from tokenizers: SentencePiece itself cuts text into the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE

from pumice.formats.text.sentencepiece import SentencePiece
from pumice.formats.text.sentencepiece_write import from_tokenizer, to_bytes

PARTS = [
    "▁", " ", "   ", "\n", "\t", "\0", "é", "e\u0301", "漢字", "🙂", "aaaaa", "abab", "the ", "picture",
    "\u00a0", "\u3000", "\ufb01", "....", "======", "12345", "USER: What is in it? ASSISTANT:",
]  # fmt: skip
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=6), max_size=10).map("".join)
within = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
Pair = tuple[sentencepiece.SentencePieceProcessor, Tokenizer]


def written(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    """A model made of tokenizer.json alone, as SentencePiece reads it."""
    model = from_tokenizer(Tokenizer.from_str(tokenizer.to_str()), 1, 2)
    assert model is not None
    return sentencepiece.SentencePieceProcessor(model_proto=to_bytes(model))


@pytest.fixture(scope="module", params=["mistral", "tiny", "newer"])
def both(request: pytest.FixtureRequest, sentencepiece_file: Path, models: ModuleType) -> Pair:
    if request.param == "mistral":
        tokenizer = SentencePiece.read(sentencepiece_file).tokenizer("it", add_bos=False)
    else:
        tokenizer = models.sentencepiece(legacy=request.param == "tiny")
    return written(tokenizer), tokenizer


@within
@given(text=texts)
@example(text="  two  ")
@example(text="")
def test_the_same_ids_and_the_same_text(both: Pair, text: str) -> None:
    reference, actual = both
    actual.encode_special_tokens = True
    if json.loads(actual.to_str())["pre_tokenizer"] is not None:
        text = text.lstrip(" ▁")  # `tokenizers` puts no second space before such a text
    ids = reference.encode(text)
    assert actual.encode(text, add_special_tokens=False).ids == ids


def test_ids_and_kinds_are_the_source_s(sentencepiece_file: Path) -> None:
    source = SentencePiece.read(sentencepiece_file)
    model = from_tokenizer(source.tokenizer("it"), 1, 2)
    assert model is not None
    again = SentencePiece.from_bytes(to_bytes(model), "it")
    assert [(text, kind) for text, _, kind in again.pieces] == [(t, kind) for t, _, kind in source.pieces]
    numbers = [(m.unk, m.bos, m.eos, m.add_prefix, m.remove_spaces) for m in (again, source)]
    assert numbers[0] == numbers[1]
    reference = sentencepiece.SentencePieceProcessor(model_proto=to_bytes(model))
    assert (reference.unk_id(), reference.bos_id(), reference.eos_id(), reference.pad_id()) == (0, 1, 2, -1)


def test_what_sentencepiece_cannot_cut_is_not_written() -> None:
    words = {"<unk>": 0, "<0x41>": 1, "a": 2, "b": 3, "ab": 4, "aab": 5, "aa": 6}

    def converted(merges: list[tuple[str, str]], lower: bool = False) -> SentencePiece | None:
        tokenizer = Tokenizer(BPE(words, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        changes = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence([*changes, normalizers.Lowercase()] if lower else changes)
        return from_tokenizer(tokenizer, None, None)

    merges = [("a", "b"), ("a", "a"), ("aa", "b"), ("a", "ab")]
    assert converted(merges) is not None
    assert converted(merges[:-1]) is None, "SentencePiece would join a and ab, too"
    assert converted(merges, lower=True) is None
