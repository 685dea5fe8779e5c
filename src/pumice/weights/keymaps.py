"""Whose tensor is called what: tables of names, and the one function that applies them.

Knows: the names of Hugging Face's Llama, Mistral, Qwen2 and Qwen3, of GGUF, of the EfficientNet-Lite
checkpoints, and ours. Does not know: files, or what the tensors hold. `{i}` is a block's number;
None means dropped on purpose, and such a key need not be there. Everything else is exact: an unknown
or missing key is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pumice.config import DecoderConfig
from pumice.errors import InputError

Table = dict[str, str | None]  # their name -> our name
_T = TypeVar("_T")

_HF_ENDS = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
_HF_BLOCK = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_GGUF_ENDS = {"token_embd.weight": "embed.weight", "output_norm.weight": "norm.weight"}
_GGUF_BLOCK = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_output": "attention.o",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def hf_decoder(config: DecoderConfig) -> Table:
    """Hugging Face's names for a Llama, Mistral, Qwen2 or Qwen3 of this shape -> ours."""
    table = _decoder(config, _HF_ENDS, "model.layers.{i}.", _HF_BLOCK, "lm_head.weight")
    # Written by old Llama checkpoints; the rotary frequencies follow from the config.
    return table | expand({"model.layers.{i}.self_attn.rotary_emb.inv_freq": None}, config.depth)


def gguf_decoder(config: DecoderConfig) -> Table:
    """GGUF's names for a llama, qwen2 or qwen3 of this shape -> ours."""
    return _decoder(config, _GGUF_ENDS, "blk.{i}.", _GGUF_BLOCK, "output.weight")


def efficientnet_lite(depth: int) -> Table:
    """The names of an EfficientNet-Lite checkpoint of `depth` blocks -> ours (without `tower.`)."""
    table: Table = {"_fc.weight": None, "_fc.bias": None}  # the ImageNet classes
    layers = [("_conv_stem", "_bn0", "stem"), ("_conv_head", "_bn1", "head")]
    for i in range(depth):
        if i:  # the first block widens nothing
            layers.append((f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", f"blocks.{i}.expand"))
        layers.append((f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", f"blocks.{i}.depthwise"))
        layers.append((f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", f"blocks.{i}.project"))
    for convolution, norm, ours in layers:
        table[f"{convolution}.weight"] = f"{ours}.conv.weight"
        table |= {f"{norm}.{part}": f"{ours}.norm.{part}" for part in _BATCH_NORM}
        table[f"{norm}.num_batches_tracked"] = None  # only used to average without a momentum
    return table


def expand(patterns: Mapping[str, str | None], count: int) -> Table:
    """Write each pattern with `{i}` out for 0 .. count - 1."""
    return {
        theirs.format(i=i): None if ours is None else ours.format(i=i)
        for theirs, ours in patterns.items()
        for i in (range(count) if "{i}" in theirs else (0,))
    }


def convert(state: Mapping[str, _T], table: Table, where: str = "the checkpoint") -> dict[str, _T]:
    """`state` under our names. Raises InputError on a key that the table lacks, or that it wants in vain."""
    unknown = [name for name in state if name not in table]
    missing = [theirs for theirs, ours in table.items() if ours is not None and theirs not in state]
    if unknown or missing:
        problems = [
            f"{label} {some(names)}" for label, names in (("unknown", unknown), ("missing", missing)) if names
        ]
        raise InputError(f"{where} does not have the tensors of its kind of model: {'; '.join(problems)}")
    named = ((table[name], value) for name, value in state.items())
    return {ours: value for ours, value in named if ours is not None}


def inverse(table: Table) -> Table:
    """Our names -> theirs; what they drop is not there."""
    return {ours: theirs for theirs, ours in table.items() if ours is not None}


def some(names: list[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _decoder(
    config: DecoderConfig, ends: Mapping[str, str], prefix: str, block: Mapping[str, str], head: str
) -> Table:
    patterns: Table = dict(ends)
    # A tied head is the embedding; some writers repeat it.
    patterns[head] = None if config.tied_head else "head.weight"
    for theirs, ours in block.items():
        if ours in ("attention.q_norm", "attention.k_norm") and not config.qk_norm:
            continue
        patterns[f"{prefix}{theirs}.weight"] = f"blocks.{{i}}.{ours}.weight"
        if config.qkv_bias and ours in ("attention.q", "attention.k", "attention.v"):
            patterns[f"{prefix}{theirs}.bias"] = f"blocks.{{i}}.{ours}.bias"
    return expand(patterns, config.depth)
