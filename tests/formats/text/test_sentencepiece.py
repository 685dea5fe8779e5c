"""SentencePiece models as our tokenizers: the same ids, the same text, from the file alone."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pumice.engine.text import Detokenizer
from pumice.errors import InputError
from pumice.formats.text.sentencepiece import SentencePiece
from pumice.tokens import Tokenizer

CORPUS = [
    "What is in the picture? A dog runs.",
    "café 猫 🐕  many   spaces",
    "\uff21\uff22 \ufb01ne 12345",
    "aa abab",
] * 9
# Text that tries: byte tokens, runs of spaces, control characters, the texts of special tokens.
PARTS = [
    "▁", " ", "   ", "\n", "\n\n", "\t", "\r\n", "\0", "\x01", "\x85", "</s>", "<s>", "<unk>", "<0x0A>",
    "[INST]", "é", "e\u0301", "漢字", "🙂", "👩‍👩‍👧", "𓀀", "aaa", "aaaaa", "abab", "the", "\u200b", "\ufeff",
    "\u00a0", "\u3000", "\ufb01", "....", "======", "\ufffd",
]  # fmt: skip
texts = st.lists(
    st.sampled_from(PARTS) | st.text(max_size=6) | st.characters(exclude_categories=["Cs"]), max_size=10
).map("".join)
within = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def trained(folder: Path, **options: object) -> Path:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, hard_vocab_limit=False, minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 400, "byte_fallback": True} | options,
    )  # fmt: skip
    path = folder / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return path


Pair = tuple[sentencepiece.SentencePieceProcessor, Tokenizer]


def pair(path: Path) -> Pair:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return reference, Tokenizer(SentencePiece.read(path).tokenizer(str(path)))


@pytest.fixture(scope="module")
def mistral(sentencepiece_file: Path) -> Pair:
    return pair(sentencepiece_file)


@pytest.fixture(scope="module", params=["mistral", "normalising", "bytes", "unknown"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same model in both libraries. normalising: with its table of characters, single spaces."""
    if request.param == "mistral":
        return request.getfixturevalue("mistral")
    options = {
        "normalising": {},
        "bytes": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        "unknown": {"byte_fallback": False, "vocab_size": 60},
    }[request.param]
    return pair(trained(tmp_path_factory.mktemp(request.param), **options))


@within
@given(text=texts)
@example(text="  two  ")
@example(text="▁")
def test_the_same_ids_and_the_same_text(both: Pair, text: str) -> None:
    reference, actual = both
    ids = reference.encode(text)
    assert [number for number, _ in actual.pieces(text)] == ids
    if reference.unk_id() not in ids:
        assert actual.decode(ids) == reference.decode(ids)


@within
@given(numbers=st.lists(st.integers(3, 258) | st.integers(3, 31999), max_size=12))
@example(numbers=[243, 162, 156, 133, 243, 162])  # a character in bytes, then half of one
@example(numbers=[28705, 28705, 330])
def test_any_ids_decode_alike_at_once_and_bit_by_bit(mistral: Pair, numbers: list[int]) -> None:
    reference, actual = mistral
    text = reference.decode(numbers)
    assert actual.decode(numbers) == text
    stream = Detokenizer(actual.decode)
    assert "".join([*map(stream.add, numbers), stream.finish()]) == text


@within
@given(text=texts.filter(bool))
def test_offsets_lead_back_to_the_text(mistral: Pair, text: str) -> None:
    """Each token says where its first character stands: marks are placed by it."""
    reference, actual = mistral
    pieces = actual.pieces(text)
    starts = [start for _, start in pieces]
    assert starts == sorted(starts)
    assert all(0 <= start < len(text) for start in starts)
    for (number, start), end in zip(pieces, [*starts[1:], len(text)], strict=True):
        piece = reference.id_to_piece(number)
        if end > start > 0 and not reference.is_byte(number):
            assert piece.replace("▁", " ") == text[start:end].replace("▁", " ")


def test_what_stands_first(sentencepiece_file: Path) -> None:
    model = SentencePiece.read(sentencepiece_file)
    assert [model.text_of(n) for n in (model.bos, model.eos)] == ["<s>", "</s>"]
    assert model.tokenizer("m").encode("a").tokens == ["<s>", "▁a"]
    assert model.tokenizer("m", add_bos=False).encode("a").tokens == ["▁a"]
    newer = model.tokenizer("m", legacy=False).encode("a</s>a").tokens
    assert newer == ["<s>", "▁a", "</s>", "a"]
    assert model.tokenizer("m").encode("a</s>a").tokens == ["<s>", "▁a", "</s>", "▁a"]


def test_saved_and_read_again_it_is_the_same(mistral: Pair) -> None:
    actual = mistral[1]
    again = Tokenizer(type(actual.backend).from_str(actual.backend.to_str()))
    text = "  It's 🙂</s>\n▁x"
    assert again.pieces(text) == actual.pieces(text)
    assert again.decode([n for n, _ in again.pieces(text)]) == "  It's 🙂</s>\n x"


def test_users_own_symbols_are_tokens(tmp_path: Path) -> None:
    reference, actual = pair(trained(tmp_path, user_defined_symbols=["<sep>"], control_symbols=["<ctl>"]))
    assert [n for n, _ in actual.pieces("a<sep>")] == reference.encode("a<sep>")
    assert actual.special.keys() == {"<unk>", "<s>", "</s>", "<ctl>"}


def test_unigram_is_refused(tmp_path: Path) -> None:
    path = trained(tmp_path, model_type="unigram")
    with pytest.raises(InputError, match="is a SentencePiece model of the kind Unigram; only BPE is"):
        SentencePiece.read(path).tokenizer(str(path))


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return trained(tmp_path_factory.mktemp("whole")).read_bytes()


def refused(path: Path, contents: bytes) -> None:
    path.write_bytes(contents)
    with pytest.raises(InputError, match=r"tokenizer\.model is no (whole )?SentencePiece model"):
        SentencePiece.read(path)


@within
@given(share=st.floats(0, 0.99))
def test_files_cut_short_are_refused(model_bytes: bytes, tmp_path: Path, share: float) -> None:
    refused(tmp_path / "tokenizer.model", model_bytes[: int(len(model_bytes) * share)])


@within
@given(junk=st.binary(max_size=200))
@example(junk=b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
def test_other_files_are_refused(tmp_path: Path, junk: bytes) -> None:
    refused(tmp_path / "tokenizer.model", junk)
