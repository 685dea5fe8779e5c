"""Read a language model from a GGUF file of llama.cpp's converter: llama, qwen2 or qwen3."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pumice.config import DecoderConfig, RopeScaling
from pumice.config_json import naming
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.families import FAMILIES, INTERLEAVED
from pumice.formats.gguf.file import PLAIN, GgufFile, kind_name
from pumice.formats.gguf.metadata import check_metadata
from pumice.formats.gguf.tokenizer import tokenizer_files
from pumice.formats.text.read import TextSide
from pumice.kernels.packed import BlockFormat, PackedMatrix, from_blocks
from pumice.model.layers import rope_inv_freq
from pumice.storage.tensors import Blocks, LazyStateDict, LazyTensor
from pumice.tokens import Tokenizer

# The divisors of the rotary frequencies, which only Llama 3 has.
_FACTORS = "rope_freqs.weight"
# Sizes of DecoderConfig -> their keys, behind the name of the architecture.
DECODER_KEYS = {
    "context": "context_length", "width": "embedding_length", "depth": "block_count",
    "mlp_width": "feed_forward_length", "heads": "attention.head_count",
}  # fmt: skip
# Metadata with which other decoders scale or cap a part of their computation, or choose between experts.
_OF_OTHER_DECODERS = (
    "embedding_scale", "residual_scale", "logit_scale", "attention.scale", "attn_logit_softcapping",
    "final_logit_softcapping", "expert_count",
)  # fmt: skip


@dataclass(frozen=True)
class GgufModel:
    """A language model in a GGUF file. The names in `state` have no prefix: `embed.weight`, `blocks.0...`."""

    config: DecoderConfig
    state: LazyStateDict
    text: TextSide


def open_gguf(source: str | PathLike[str] | GgufFile) -> GgufModel:
    """Read everything but the tensors, which are dequantised when they are read.

    Raises InputError if the file is damaged, or if our decoder or tokenizer cannot do what it asks for.
    """
    file = source if isinstance(source, GgufFile) else GgufFile(source)
    if (pieces := file.metadata.get("split.count", 1)) > 1:
        raise InputError(
            f"{file.path} is one of {pieces} pieces of a model; join them with `llama-gguf-split --merge`"
        )
    config = decoder_config(file)
    text = tokenizer_files(file)
    if (tokens := Tokenizer(text.backend).rows) > config.vocab_size:
        raise InputError(f"{file.path} has {tokens} tokens, but embeddings of {config.vocab_size} only")
    ends = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    stop_ids = tuple(dict.fromkeys(number for number in ends if number is not None))
    return GgufModel(config, _state(file, config), TextSide(text, stop_ids))


def decoder_config(file: GgufFile) -> DecoderConfig:
    """Return the config of the decoder that the file's metadata describes."""
    # 1. The architecture, whose name begins the keys of all sizes.
    metadata = file.metadata
    kind = metadata.get("general.architecture")
    known = [name for name, family in FAMILIES.items() if family.gguf is not None]
    if kind not in known:
        raise InputError(f"{file.path} holds the architecture {kind!r}; {', '.join(known)} can be read")

    check_metadata(metadata, str(file.path), kind)

    def value(key: str, default: Any = None) -> Any:
        number = metadata.get(f"{kind}.{key}", default)
        if number is None:
            raise InputError(f"{file.path} does not say {kind}.{key}, so the model's size is unknown")
        return number

    if "token_embd.weight" not in file.infos:
        raise InputError(f"{file.path} has no tensor token_embd.weight, so it is not a language model")
    for key in _OF_OTHER_DECODERS:
        if metadata.get(f"{kind}.{key}"):
            raise InputError(
                f"{file.path}: {kind}.{key} is {metadata[f'{kind}.{key}']}, which Pumice does not compute"
            )
    # 2. Rotary positions: refuse what our decoder does not compute.
    sizes = {name: value(key) for name, key in DECODER_KEYS.items()}
    width, heads = sizes["width"], sizes["heads"]
    head_dim = value("attention.key_length", width // heads)
    if value("rope.dimension_count", head_dim) != head_dim:
        raise InputError(
            f"{file.path} rotates {value('rope.dimension_count')} of {head_dim} per head; all must rotate"
        )
    # As llama.cpp reads them: a factor without a type is linear, and files of 2023 have a key of their own.
    scaling = value("rope.scaling.type", "linear")
    factor = value("rope.scaling.factor", value("rope.scale_linear", 1.0))
    if scaling not in ("none", "linear"):
        raise InputError(f"{file.path} scales its rotary positions ({scaling}), which is not supported")
    rope_scaling = RopeScaling("linear", factor) if scaling == "linear" and factor != 1 else None
    rope_theta = shortest(value("rope.freq_base", 10000.0))
    if _FACTORS in file.infos:
        rope_scaling = _llama3_scaling(file, head_dim, rope_theta)
    # 3. Biases, query norms and a head of its own show only in the tensors that the file has.
    with naming(str(file.path)):
        config = DecoderConfig(
            vocab_size=file.infos["token_embd.weight"].shape[0],
            **sizes,
            kv_heads=value("attention.head_count_kv", heads),
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=shortest(value("attention.layer_norm_rms_epsilon")),
            tied_head="output.weight" not in file.infos,
            qkv_bias="blk.0.attn_q.bias" in file.infos,
            qk_norm="blk.0.attn_q_norm.weight" in file.infos,
            sliding_window=metadata.get(f"{kind}.attention.sliding_window"),
        )
    # llama.cpp's llama may have biases; the other families differ by their tensors.
    has = (config.qkv_bias, config.qk_norm)
    own = FAMILIES[kind].fields
    biases = config.qkv_bias if kind == "llama" else own.get("qkv_bias", False)
    if has != (biases, own.get("qk_norm", False)):
        found = [name for name, there in zip(("attn_q.bias", "attn_q_norm"), has, strict=True) if there]
        raise InputError(
            f"{file.path}: general.architecture is {kind!r}, but its blocks hold "
            f"{' and '.join(found) or 'neither attn_q.bias nor attn_q_norm'}, as no {kind} does; convert it "
            "again"
        )
    return config


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection, (heads * head_dim, ...), from GGUF's order to ours.

    llama.cpp's converter interleaves the two halves of each head, so that the values which rotate
    together are neighbours; ours (and Hugging Face's) keeps them half a head apart.
    """
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _llama3_scaling(file: GgufFile, head_dim: int, base: float) -> RopeScaling:
    """Return Llama 3's scaling, of which GGUF stores only the divisor of each frequency.

    The largest divisor is the factor; the other numbers are the same in every published Llama 3. Raises
    InputError if the divisors are not those of this scaling.
    """
    divisors = file.tensor(_FACTORS)
    scaling = RopeScaling("llama3", round(divisors.max().item(), 3))
    device = torch.device("cpu")
    expected = rope_inv_freq(head_dim, base, None, device) / rope_inv_freq(head_dim, base, scaling, device)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise InputError(f"{file.path}: {_FACTORS} does not hold Llama 3's divisors of rotary frequencies")
    return scaling


def _state(file: GgufFile, config: DecoderConfig) -> LazyStateDict:
    table = tensor_names.gguf_decoder(config) | {_FACTORS: None}
    # The converter permutes queries and keys of the architectures that rotate neighbours.
    permuted = FAMILIES[file.metadata["general.architecture"]].gguf == INTERLEAVED
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads} if permuted else {}
    tensors = {name: lazy_tensor(file, name, heads.get(name.split(".")[-2:][0])) for name in file.infos}
    return tensor_names.convert(tensors, table, str(file.path))


def lazy_tensor(file: GgufFile, name: str, heads: int | None = None) -> LazyTensor:
    """Return a tensor that is read later. heads: of a query or key projection whose rows are permuted."""

    def load(dtype: torch.dtype) -> Tensor:
        tensor = file.tensor(name, dtype)
        return tensor if heads is None else unpermute(tensor, heads)

    info = file.infos[name]
    dtype = PLAIN.get(info.kind, torch.float32)
    kind = next((kind for kind in BlockFormat if kind.ggml == info.kind), None)

    def packed() -> PackedMatrix:
        assert kind is not None
        blocks = file.blocks(name)
        return from_blocks(kind, blocks if heads is None else unpermute(blocks, heads))

    blocks = None if kind is None or len(info.shape) != 2 else Blocks(kind, packed)
    origin = f"{name} in {file.path.name}"
    return LazyTensor(info.shape, dtype, load, origin, blocks, kind_name(info.kind), info.size)


def shortest(value: float) -> float:
    """Return the shortest decimal of a float32: GGUF stores 1e-5 as 9.99999974e-06."""
    return float(str(np.float32(value)))
