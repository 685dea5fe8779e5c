"""A language model in one GGUF file: its config, its state under our names, its tokenizer.

Knows: the metadata keys and tensor layout that llama.cpp's converter writes for llama, qwen2 and
qwen3. Does not know: how the file is laid out (`file`) or how the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from pumice.config import DecoderConfig, RopeScaling, naming
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.families import FAMILIES
from pumice.formats.gguf.file import PLAIN, GgufFile
from pumice.formats.gguf.tokenizer import tokenizer_files
from pumice.formats.text.files import TokenizerFiles
from pumice.kernels.packed import Kind, Packed, from_blocks
from pumice.model.layers import rope_inv_freq
from pumice.storage.tensors import Blocks, LazyStateDict, LazyTensor

ARCHITECTURES = tuple(name for name, family in FAMILIES.items() if family.gguf)
_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF language model holds. `state` has no prefix: `embed.weight`, `blocks.0...`."""

    config: DecoderConfig
    state: LazyStateDict
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
    head_dim = value("attention.key_length", width // heads)
    if value("rope.dimension_count", head_dim) != head_dim:
        raise InputError(
            f"{file.path} rotates {value('rope.dimension_count')} of {head_dim} per head; all must rotate"
        )
    scaling = value("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise InputError(f"{file.path} scales its rotary positions ({scaling}), which is not supported")
    rope_scaling = RopeScaling("linear", value("rope.scaling.factor")) if scaling == "linear" else None
    rope_theta = _shortest(value("rope.freq_base", 10000.0))
    if _FACTORS in file.infos:
        rope_scaling = _slowed(file, head_dim, rope_theta)
    with naming(str(file.path)):
        return DecoderConfig(
            vocab_size=file.infos["token_embd.weight"].shape[0],
            width=width,
            depth=value("block_count"),
            heads=heads,
            kv_heads=value("attention.head_count_kv", heads),
            head_dim=head_dim,
            mlp_width=value("feed_forward_length"),
            context=value("context_length"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=_shortest(value("attention.layer_norm_rms_epsilon")),
            tied_head="output.weight" not in file.infos,
            qkv_bias="blk.0.attn_q.bias" in file.infos,
            qk_norm="blk.0.attn_q_norm.weight" in file.infos,
            sliding_window=metadata.get(f"{kind}.attention.sliding_window"),
        )


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, (heads * head_dim, ...), from GGUF's order to ours.

    llama.cpp's converter interleaves the two halves of each head, so that the values which rotate
    together are neighbours; ours (and Hugging Face's) keeps them half a head apart.
    """
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _slowed(file: GgufFile, head_dim: int, base: float) -> RopeScaling:
    """Llama 3's scaling, of which GGUF keeps only by how much each frequency is divided.

    The largest divisor is its factor; its other numbers are those of every Llama 3 that was published.
    """
    found = file.tensor(_FACTORS)
    scaling = RopeScaling("llama3", round(found.max().item(), 3))
    device = torch.device("cpu")
    expected = rope_inv_freq(head_dim, base, None, device) / rope_inv_freq(head_dim, base, scaling, device)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3):
        raise InputError(f"{file.path}: {_FACTORS} does not hold Llama 3's divisors of rotary frequencies")
    return scaling


def _state(file: GgufFile, config: DecoderConfig) -> LazyStateDict:
    table = tensor_names.gguf_decoder(config) | {_FACTORS: None}
    names = tensor_names.convert({name: name for name in file.infos}, table, str(file.path))
    # Only a llama's queries and keys are permuted by the converter.
    permuted = file.metadata["general.architecture"] == "llama"
    heads = {"q": config.heads, "k": config.kv_heads} if permuted else {}
    return {ours: _stored(file, theirs, heads.get(ours.split(".")[-2])) for ours, theirs in names.items()}


def _stored(file: GgufFile, name: str, heads: int | None) -> LazyTensor:
    def fetch(dtype: torch.dtype) -> Tensor:
        tensor = file.tensor(name, dtype)
        return tensor if heads is None else unpermute(tensor, heads)

    info = file.infos[name]
    dtype = PLAIN.get(info.kind, torch.float32)
    kind = next((kind for kind in Kind if kind.ggml == info.kind), None)

    def packed() -> Packed:
        assert kind is not None
        blocks = file.blocks(name)
        return from_blocks(kind, blocks if heads is None else unpermute(blocks, heads))

    blocks = None if kind is None or len(info.shape) != 2 else Blocks(kind, packed)
    return LazyTensor(info.shape, dtype, fetch, f"{name} in {file.path.name}", blocks)


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 9.99999974e-06 was written as 1e-5."""
    return float(f"{value:.7g}")
