"""A language model in one GGUF file: its config, its state under our names, its tokenizer.

Knows: the metadata keys and tensor layout that llama.cpp's converter writes for llama, qwen2 and
qwen3. Does not know: how the file is laid out (`gguf`) or how the model runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from pumice.config import DecoderConfig, RopeScaling, naming
from pumice.errors import InputError
from pumice.model.layers import frequencies
from pumice.weights import keymaps
from pumice.weights.checkpoint import Stocks, Stored
from pumice.weights.gguf import PLAIN, GgufFile
from pumice.weights.sentencepiece import BPE, CONTROL, UNUSED, USER_DEFINED, SentencePiece
from pumice.weights.tokenizer import TokenizerFiles

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_FACTORS = "rope_freqs.weight"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF language model holds. `state` has no prefix: `embed.weight`, `blocks.0...`."""

    config: DecoderConfig
    state: Stocks
    text: TokenizerFiles


def open_gguf(path: str | PathLike[str]) -> GgufModel:
    """Everything but the tensors, which are dequantised when they are read.

    Raises InputError when the file is damaged, or is of a kind that our decoder or tokenizer is not.
    """
    file = GgufFile(path)
    config = decoder_config(file)
    return GgufModel(config, _state(file, config), tokenizer_files(file))


def decoder_config(file: GgufFile) -> DecoderConfig:
    """The decoder that the file's metadata describes."""
    metadata = file.metadata
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{file.path} holds the architecture {kind!r}; {', '.join(ARCHITECTURES)} can be read"
        )

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{kind}.{key}", default)
        if found is None:
            raise InputError(f"{file.path} does not say {kind}.{key}, so the model's size is unknown")
        return found

    if "token_embd.weight" not in file.infos:
        raise InputError(f"{file.path} has no tensor token_embd.weight, so it is not a language model")
    width, heads = value("embedding_length"), value("attention.head_count")
    head_width = value("attention.key_length", width // heads)
    if value("rope.dimension_count", head_width) != head_width:
        raise InputError(
            f"{file.path} rotates {value('rope.dimension_count')} of {head_width} per head; all must rotate"
        )
    scaling = value("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise InputError(f"{file.path} scales its rotary positions ({scaling}), which is not supported")
    rope_scaling = RopeScaling("linear", value("rope.scaling.factor")) if scaling == "linear" else None
    rope_base = _shortest(value("rope.freq_base", 10000.0))
    if _FACTORS in file.infos:
        rope_scaling = _slowed(file, head_width, rope_base)
    with naming(str(file.path)):
        return DecoderConfig(
            vocab_size=file.infos["token_embd.weight"].shape[0],
            width=width,
            depth=value("block_count"),
            heads=heads,
            kv_heads=value("attention.head_count_kv", heads),
            head_width=head_width,
            mlp_width=value("feed_forward_length"),
            context=value("context_length"),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            norm_eps=_shortest(value("attention.layer_norm_rms_epsilon")),
            tied_head="output.weight" not in file.infos,
            qkv_bias="blk.0.attn_q.bias" in file.infos,
            qk_norm="blk.0.attn_q_norm.weight" in file.infos,
            sliding_window=metadata.get(f"{kind}.attention.sliding_window"),
        )


def tokenizer_files(file: GgufFile) -> TokenizerFiles:
    """What the metadata says of text; what it leaves out is as in llama.cpp (src/llama-vocab.cpp)."""
    metadata = file.metadata
    tokenizer = build_tokenizer(metadata, str(file.path))
    sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    usual: dict[str, int] = {"bos": 1, "eos": 2} if sentencepiece else {}

    def token(name: str) -> str | None:
        number = metadata.get(f"tokenizer.ggml.{name}_token_id", usual.get(name))
        return None if number is None else tokenizer.id_to_token(number)

    adds_bos = sentencepiece or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return TokenizerFiles(
        tokenizer,
        bos=token("bos"),
        eos=token("eos"),
        adds_bos=metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def build_tokenizer(metadata: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer that the metadata describes; it adds no special tokens by itself."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        return _sentencepiece(metadata, where)
    if kind != "gpt2":
        raise InputError(f"{where} has a tokenizer of kind {kind!r}; only gpt2 and llama can be read")
    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if name not in PRE_TOKENIZERS:
        raise InputError(f"{where} splits words as {name!r}; known are {', '.join(PRE_TOKENIZERS)}")
    tokens = _needed(metadata, "tokenizer.ggml.tokens", where)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[_pair(merge) for merge in _needed(metadata, "tokenizer.ggml.merges", where)],
            unk_token=None if unknown is None else tokens[unknown],
            ignore_merges=name == "llama-bpe",
        )
    )
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, metadata.get("tokenizer.ggml.token_type", ()), strict=False):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], where: str) -> Tokenizer:
    """A SentencePiece BPE, of which GGUF keeps the pieces, their scores and kinds."""
    tokens = _needed(metadata, "tokenizer.ggml.tokens", where)
    scores = metadata.get("tokenizer.ggml.scores", ())
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    if not len(tokens) == len(scores) == len(kinds):
        raise InputError(
            f"{where} has {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} token types"
        )
    numbers = {
        name: metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    pieces = list(zip(tokens, scores, kinds, strict=True))
    while pieces and pieces[-1][2] == UNUSED:  # they fill up a vocabulary to a round number
        pieces.pop()
    model = SentencePiece(pieces, BPE, add_prefix=prefix, remove_spaces=False, **numbers)
    return model.tokenizer(where, add_bos=False)


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, (heads * head_width, ...), from GGUF's order to ours.

    llama.cpp's converter interleaves the two halves of each head, so that the values which rotate
    together are neighbours; ours (and Hugging Face's) keeps them half a head apart.
    """
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _slowed(file: GgufFile, head_width: int, base: float) -> RopeScaling:
    """Llama 3's scaling, of which GGUF keeps only by how much each frequency is divided.

    The largest divisor is its factor; its other numbers are those of every Llama 3 that was published.
    """
    found = file.tensor(_FACTORS)
    scaling = RopeScaling("llama3", round(found.max().item(), 3))
    device = torch.device("cpu")
    expected = frequencies(head_width, base, None, device) / frequencies(head_width, base, scaling, device)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3):
        raise InputError(f"{file.path}: {_FACTORS} does not hold Llama 3's divisors of rotary frequencies")
    return scaling


def _state(file: GgufFile, config: DecoderConfig) -> Stocks:
    table = keymaps.gguf_decoder(config) | {_FACTORS: None}
    names = keymaps.convert({name: name for name in file.infos}, table, str(file.path))
    # Only a llama's queries and keys are permuted by the converter.
    permuted = file.metadata["general.architecture"] == "llama"
    heads = {"q": config.heads, "k": config.kv_heads} if permuted else {}
    return {ours: _stored(file, theirs, heads.get(ours.split(".")[-2])) for ours, theirs in names.items()}


def _stored(file: GgufFile, name: str, heads: int | None) -> Stored:
    def fetch(dtype: torch.dtype) -> Tensor:
        tensor = file.tensor(name, dtype)
        return tensor if heads is None else unpermute(tensor, heads)

    info = file.infos[name]
    dtype = PLAIN.get(info.kind, torch.float32)
    return Stored(info.shape, dtype, fetch, f"{name} in {file.path.name}")


def _needed(metadata: dict[str, Any], key: str, where: str) -> list[str]:
    if key not in metadata:
        raise InputError(f"{where} does not say {key}, so it holds no whole tokenizer")
    found: list[str] = metadata[key]
    return found


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 9.99999974e-06 was written as 1e-5."""
    return float(f"{value:.7g}")


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _regex(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": _digits,
    "llama-bpe": lambda: _regex(_WORDS % "{1,3}"),
    "qwen2": lambda: _regex(_WORDS % ""),
}
