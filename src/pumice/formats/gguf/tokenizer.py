"""Build the tokenizer that the metadata of a GGUF file describes, as llama.cpp does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from pumice.errors import InputError
from pumice.formats.gguf.file import GgufFile
from pumice.formats.text.files import TokenizerFiles
from pumice.formats.text.sentencepiece import BPE, CONTROL, UNUSED, USER_DEFINED, SentencePiece

# How Llama 3 and Qwen 2 split text before BPE; they differ in how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_gguf_tokenizer(path: Path) -> TokenizerFiles:
    """Read the tokenizer of a GGUF file. Raises InputError if it is damaged or of another kind."""
    return tokenizer_files(GgufFile(path))


def tokenizer_files(file: GgufFile) -> TokenizerFiles:
    """Return the tokenizer and chat template; absent keys have llama.cpp's defaults (src/llama-vocab.cpp)."""
    metadata = file.metadata
    tokenizer = build_tokenizer(metadata, str(file.path))
    sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    default_ids: dict[str, int] = {"bos": 1, "eos": 2} if sentencepiece else {}

    def token(name: str) -> str | None:
        number = metadata.get(f"tokenizer.ggml.{name}_token_id", default_ids.get(name))
        return None if number is None else tokenizer.id_to_token(number)

    adds_bos = sentencepiece or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return TokenizerFiles(
        tokenizer,
        bos=token("bos"),
        eos=token("eos"),
        adds_bos=metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def build_tokenizer(metadata: dict[str, Any], label: str) -> Tokenizer:
    """Return the tokenizer that the metadata describes; it adds no special tokens by itself."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        return _sentencepiece(metadata, label)
    if kind != "gpt2":
        raise InputError(f"{label} has a tokenizer of kind {kind!r}; only gpt2 and llama can be read")
    # 1. How words are split: the file has only a name for it.
    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if name not in PRE_TOKENIZERS:
        raise InputError(f"{label} splits words as {name!r}; known are {', '.join(PRE_TOKENIZERS)}")
    # 2. A byte-level BPE.
    tokens = _needed(metadata, "tokenizer.ggml.tokens", label)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    merges = [merge.partition(" ")[::2] for merge in _needed(metadata, "tokenizer.ggml.merges", label)]
    try:
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            ignore_merges=name == "llama-bpe",
        )
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{label} holds no tokenizer that can be built: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]()
    tokenizer.decoder = decoders.ByteLevel()
    # 3. Tokens that are found in text before it is split.
    for token, kind in zip(tokens, metadata.get("tokenizer.ggml.token_type", ()), strict=False):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], label: str) -> Tokenizer:
    """Build a SentencePiece BPE from its pieces, their scores and kinds."""
    tokens = _needed(metadata, "tokenizer.ggml.tokens", label)
    scores = metadata.get("tokenizer.ggml.scores", ())
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    if not len(tokens) == len(scores) == len(kinds):
        raise InputError(
            f"{label} has {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} token types"
        )
    special_ids = {
        name: metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    pieces = list(zip(tokens, scores, kinds, strict=True))
    # Unused pieces at the end only fill the vocabulary up to a round number.
    while pieces and pieces[-1][2] == UNUSED:
        pieces.pop()
    model = SentencePiece(pieces, BPE, add_prefix=prefix, remove_spaces=False, **special_ids)
    return model.tokenizer(label, add_bos=False)


def _needed(metadata: dict[str, Any], key: str, label: str) -> list[str]:
    if key not in metadata:
        raise InputError(f"{label} does not say {key}, so it holds no whole tokenizer")
    values: list[str] = metadata[key]
    return values


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _regex(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# llama.cpp's names for ways to split words.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": _digits,
    "llama-bpe": lambda: _regex(_WORDS % "{1,3}"),
    "qwen2": lambda: _regex(_WORDS % ""),
}
