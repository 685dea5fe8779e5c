"""A tiny language model as GGUF, written by the `gguf` package as llama.cpp's converter would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from pumice.config import DecoderConfig
from pumice.weights import keymaps

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
TOKENS = [
    *SPECIAL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(m.replace(" ", "") for m in MERGES),
    "<think>",
]
CONFIG = DecoderConfig(
    vocab_size=len(TOKENS),
    width=256,
    depth=2,
    heads=4,
    kv_heads=2,
    head_width=64,
    mlp_width=512,
    tied_head=True,
)


def random_state(config: DecoderConfig, seed: int = 0) -> dict[str, Tensor]:
    """Our names -> random tensors, shapes from the config."""
    rows = {"q": config.heads * config.head_width, "k": config.kv_heads * config.head_width}
    rows |= {"v": rows["k"], "o": config.width, "gate": config.mlp_width, "up": config.mlp_width}
    rows |= {"down": config.width, "embed": config.vocab_size, "head": config.vocab_size}
    columns = {"o": rows["q"], "down": config.mlp_width}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in keymaps.inverse(keymaps.gguf_decoder(config)):
        layer = name.split(".")[-2]
        if layer in rows and name.endswith(".weight"):
            shape: tuple[int, ...] = (rows[layer], columns.get(layer, config.width))
        elif layer in ("q_norm", "k_norm"):
            shape = (config.head_width,)
        else:
            shape = (rows.get(layer, config.width),)
        state[name] = torch.randn(shape, generator=generator)
    return state


def permute(weight: Tensor, heads: int) -> Tensor:
    """As in llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


WriteGguf = Callable[..., dict[str, Tensor]]


@pytest.fixture
def write_gguf() -> WriteGguf:
    def write(
        path: Path,
        config: DecoderConfig = CONFIG,
        kind: str = "llama",
        quantised: str = "F32",
        pre: str = "smollm",
        **metadata: int | float | str,
    ) -> dict[str, Tensor]:
        """Write the file; returns the exact tensors that it stands for, under our names."""
        writer = gguf.GGUFWriter(path, kind)
        writer.add_context_length(config.context)
        writer.add_embedding_length(config.width)
        writer.add_block_count(config.depth)
        writer.add_feed_forward_length(config.mlp_width)
        writer.add_head_count(config.heads)
        writer.add_head_count_kv(config.kv_heads)
        writer.add_key_length(config.head_width)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_base)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL) - 1) + [4])
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
        writer.add_chat_template("{{ messages }}")
        for key, value in metadata.items():
            name = key.replace("__", ".")
            if isinstance(value, str):
                writer.add_string(name, value)
            else:
                writer.add_uint32(name, int(value))
        theirs = keymaps.inverse(keymaps.gguf_decoder(config))
        exact = {}
        for name, tensor in random_state(config).items():
            heads = {"q": config.heads, "k": config.kv_heads}.get(name.split(".")[-2])
            permuted = kind == "llama" and heads is not None
            stored = (permute(tensor, heads) if permuted and heads else tensor).numpy().astype(np.float32)
            quant = gguf.GGMLQuantizationType[quantised if tensor.dim() == 2 else "F32"]
            data = gguf.quants.quantize(stored, quant)
            writer.add_tensor(str(theirs[name]), data, raw_dtype=quant)
            # Rows are whole blocks, so quantising commutes with the permutation.
            exact[name] = torch.from_numpy(
                gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), quant), quant).copy()
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return exact

    return write
