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

from pumice.config import DecoderConfig
from pumice.errors import InputError
from pumice.weights import keymaps
from pumice.weights.gguf import GgufFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF language model holds. `state` has no prefix: `embed.weight`, `blocks.0...`."""

    config: DecoderConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer
    bos: int | None
    eos: int | None
    pad: int | None
    add_bos: bool  # a conversation begins with bos, which the tokenizer itself does not add
    chat_template: str | None


def load_gguf(path: str | PathLike[str], dtype: torch.dtype = torch.float32) -> GgufModel:
    """Read a whole model, dequantised to `dtype`.

    Raises InputError when the file is damaged, or is of a kind that our decoder or tokenizer is not.
    """
    file = GgufFile(path)
    metadata = file.metadata
    config = decoder_config(file)
    return GgufModel(
        config=config,
        state=_state(file, config, dtype),
        tokenizer=build_tokenizer(metadata, str(path)),
        bos=metadata.get("tokenizer.ggml.bos_token_id"),
        eos=metadata.get("tokenizer.ggml.eos_token_id"),
        pad=metadata.get("tokenizer.ggml.padding_token_id"),
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", False),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


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

    scaling = value("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.infos:
        raise InputError(f"{file.path} scales its rotary positions ({scaling}), which is not supported")
    if "token_embd.weight" not in file.infos:
        raise InputError(f"{file.path} has no tensor token_embd.weight, so it is not a language model")
    width, heads = value("embedding_length"), value("attention.head_count")
    head_width = value("attention.key_length", width // heads)
    if value("rope.dimension_count", head_width) != head_width:
        raise InputError(
            f"{file.path} rotates {value('rope.dimension_count')} of {head_width} per head; all must rotate"
        )
    return DecoderConfig(
        vocab_size=file.infos["token_embd.weight"].shape[0],
        width=width,
        depth=value("block_count"),
        heads=heads,
        kv_heads=value("attention.head_count_kv", heads),
        head_width=head_width,
        mlp_width=value("feed_forward_length"),
        context=value("context_length"),
        rope_base=_shortest(value("rope.freq_base", 10000.0)),
        norm_eps=_shortest(value("attention.layer_norm_rms_epsilon")),
        tied_head="output.weight" not in file.infos,
        qkv_bias="blk.0.attn_q.bias" in file.infos,
        qk_norm="blk.0.attn_q_norm.weight" in file.infos,
        sliding_window=metadata.get(f"{kind}.attention.sliding_window"),
    )


def build_tokenizer(metadata: dict[str, Any], where: str) -> Tokenizer:
    """The byte-level BPE tokenizer that the metadata describes; adds no special tokens by itself."""
    if (kind := metadata.get("tokenizer.ggml.model")) != "gpt2":
        raise InputError(f"{where} has a tokenizer of kind {kind!r}; only byte-level BPE (gpt2) can be read")
    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if name not in _PRE_TOKENIZERS:
        raise InputError(f"{where} splits words as {name!r}; known are {', '.join(_PRE_TOKENIZERS)}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[_pair(merge) for merge in metadata["tokenizer.ggml.merges"]],
            unk_token=None if unknown is None else tokens[unknown],
            ignore_merges=name == "llama-bpe",
        )
    )
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, metadata.get("tokenizer.ggml.token_type", ()), strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    return tokenizer


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, (heads * head_width, ...), from GGUF's order to ours.

    llama.cpp's converter interleaves the two halves of each head, so that the values which rotate
    together are neighbours; ours (and Hugging Face's) keeps them half a head apart.
    """
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _state(file: GgufFile, config: DecoderConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    names = keymaps.convert({name: name for name in file.infos}, keymaps.gguf_decoder(config), str(file.path))
    state = {ours: file.tensor(theirs, dtype) for ours, theirs in names.items()}
    if file.metadata["general.architecture"] == "llama":  # the only one that the converter permutes
        for i in range(config.depth):
            for part, heads in (("q", config.heads), ("k", config.kv_heads)):
                name = f"blocks.{i}.attention.{part}.weight"
                state[name] = unpermute(state[name], heads)
    return state


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


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": _digits,
    "llama-bpe": lambda: _regex(_WORDS % "{1,3}"),
    "qwen2": lambda: _regex(_WORDS % ""),
}
