"""Whose tensor is called what: tables of names, and the one function that applies them.

Knows: the names of Hugging Face's Llama, Mistral, Qwen2, Qwen3, CLIP, SigLIP and LLaVA, of the original
LLaVA, of GGUF, of the EfficientNet-Lite checkpoints, and ours. Does not know: files, or what the tensors
hold. `{i}` is a block's number; None means dropped on purpose, and such a key need not be there.
Everything else is exact: an unknown or missing key is an error.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import NamedTuple, TypeVar

from pumice.config import DecoderConfig, ModelConfig, VisionConfig
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


class Nesting(NamedTuple):
    """Under which prefixes the parts of a LLaVA stand; `image_newline` has one whole name."""

    text: str
    head: str
    tower: str
    projector: str
    newline: str


HF_NESTINGS = (
    # transformers to 4.51, and what later versions write
    Nesting(
        "language_model.model.", "language_model.lm_head.", "vision_tower.", "multi_modal_projector.",
        "image_newline",
    ),
    # transformers from 4.52, inside
    Nesting(
        "model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector.",
        "model.image_newline",
    ),
)  # fmt: skip
ORIGINAL = Nesting(
    "model.", "lm_head.", "model.vision_tower.vision_tower.", "model.mm_projector.", "model.image_newline"
)
# A language model and a vision tower by themselves: the second row is of the bare network, without a head.
LLM_PREFIXES = ("model.", "")
TOWER_PREFIXES = ("vision_model.", "")
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


def tower(config: VisionConfig) -> Table:
    """Hugging Face's names for the vision model of a CLIP or a SigLIP, without prefix -> ours, likewise."""
    return clip_tower(config) if config.kind == "clip" else siglip_tower(config)


def hf_connector(biases: bool) -> Table:
    """transformers' names in a LLaVA's projector -> ours (without `connector.`)."""
    parts = ("weight", "bias") if biases else ("weight",)
    return {
        f"{theirs}.{part}": f"layers.{ours}.{part}"
        for theirs, ours in (("linear_1", 0), ("linear_2", 2))
        for part in parts
    }


def original_connector(kind: str) -> Table:
    """The original's names in a projector of this kind -> ours (without `connector.`)."""
    if kind == "identity":
        return {}
    if kind == "linear":
        return {part: f"layers.0.{part}" for part in ("weight", "bias")}
    depth = int(kind.removeprefix("mlp").removesuffix("x_gelu"))
    names = [f"{2 * i}.{part}" for i in range(depth) for part in ("weight", "bias")]
    return {name: f"layers.{name}" for name in names}


def llava(config: ModelConfig, nesting: Nesting, connector: Table, tower_prefix: str | None) -> Table:
    """The names of a LLaVA's tensors in files of this nesting -> ours.

    tower_prefix: between the nesting's and the tower's own names; None when the files hold no tower.
    """
    heads = {"model.": nesting.text, "lm_head.": nesting.head}
    table = moved(hf_decoder(config.decoder), heads, "decoder.")
    table |= moved(connector, {"": nesting.projector}, "connector.")
    if tower_prefix is not None:
        table |= moved(tower(config.vision), {"": nesting.tower + tower_prefix}, "tower.")
    table[nesting.newline] = "image_newline" if config.has_newline else None
    return table


def adapted(config: ModelConfig) -> Table:
    """What a LoRA of this model may call its layers, in any nesting -> our names of their weights."""
    table: Table = {}
    for nesting in (*HF_NESTINGS, ORIGINAL):
        projector = (
            hf_connector(False) if nesting in HF_NESTINGS else original_connector(config.connector.kind)
        )
        for prefix in TOWER_PREFIXES if config.vision.kind in ("clip", "siglip") else ():
            table |= moved(tower(config.vision), {"": nesting.tower + prefix}, "tower.")
        table |= llava(config, nesting, projector, None)
    return {
        theirs.removesuffix(".weight"): ours
        for theirs, ours in table.items()
        if ours and theirs.endswith(".weight")
    }


def moved(table: Table, prefixes: Mapping[str, str], ours: str) -> Table:
    """The table of names that stand under other prefixes: the first fitting one of each is exchanged.

    ours: what stands before our names.
    """
    found: Table = {}
    for theirs, name in table.items():
        old = next(prefix for prefix in prefixes if theirs.startswith(prefix))
        found[prefixes[old] + theirs.removeprefix(old)] = None if name is None else ours + name
    return found


def tower_prefix(names: Container[str], before: str = "") -> str | None:
    """What stands between `before` and a ViT's own names; None when there is no ViT."""
    probe = f"{before}%sembeddings.patch_embedding.weight"
    return next((prefix for prefix in TOWER_PREFIXES if probe % prefix in names), None)


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


_VIT_ENDS: Table = {
    "embeddings.patch_embedding.weight": "patch.weight",
    "embeddings.position_embedding.weight": "positions",
    "embeddings.position_ids": None,  # written by old checkpoints; 0, 1, 2, ...
    "post_layernorm.weight": "post_norm.weight",
    "post_layernorm.bias": "post_norm.bias",
}
_VIT_BLOCK = {
    "layer_norm1": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.out_proj": "attention.o",
    "layer_norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
_SIGLIP_HEAD = ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")


def clip_tower(config: VisionConfig) -> Table:
    """Hugging Face's names for CLIP's vision model, without `vision_model.`, -> ours, without `tower.`."""
    own: Table = {
        "embeddings.class_embedding": "class_token",
        "pre_layrnorm.weight": "pre_norm.weight",
        "pre_layrnorm.bias": "pre_norm.bias",
    }
    return _vit(config) | own


def siglip_tower(config: VisionConfig) -> Table:
    """Hugging Face's names for SigLIP's or SigLIP 2's vision model, as in `clip_tower`, -> ours."""
    own: Table = {"embeddings.patch_embedding.bias": "patch.bias"}
    # What pools the features into one vector.
    own |= {f"head.{name}": None for name in ("probe", "attention.in_proj_weight", "attention.in_proj_bias")}
    own |= {f"head.{layer}.{part}": None for layer in _SIGLIP_HEAD for part in ("weight", "bias")}
    return _vit(config) | own


def _vit(config: VisionConfig) -> Table:
    patterns = dict(_VIT_ENDS)
    for theirs, ours in _VIT_BLOCK.items():
        for part in ("weight", "bias"):
            patterns[f"encoder.layers.{{i}}.{theirs}.{part}"] = f"blocks.{{i}}.{ours}.{part}"
    return expand(patterns, config.depth)


_GGUF_TOWER_ENDS: Table = {
    "v.class_embd": "tower.class_token",
    "v.patch_embd.weight": "tower.patch.weight",
    "v.patch_embd.bias": "tower.patch.bias",
    "v.position_embd.weight": "tower.positions",
    "v.pre_ln.weight": "tower.pre_norm.weight",
    "v.pre_ln.bias": "tower.pre_norm.bias",
    "mm.0.weight": "connector.layers.0.weight",
    "mm.0.bias": "connector.layers.0.bias",
    "mm.2.weight": "connector.layers.2.weight",
    "mm.2.bias": "connector.layers.2.bias",
}
_GGUF_TOWER_BLOCK = {
    "ln1": "attention_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_out": "attention.o",
    "ln2": "mlp_norm",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}


def gguf_tower(config: VisionConfig) -> Table:
    """The names of llama.cpp's mmproj files for LLaVA 1.5 -> ours: tower without final norm, connector."""
    lacking = "tower.patch.bias" if config.kind == "clip" else "tower.class_token"
    patterns = {theirs: ours for theirs, ours in _GGUF_TOWER_ENDS.items() if ours != lacking}
    if config.kind == "siglip":
        patterns = {theirs: ours for theirs, ours in patterns.items() if not theirs.startswith("v.pre_ln")}
    for theirs, ours in _GGUF_TOWER_BLOCK.items():
        for part in ("weight", "bias"):
            patterns[f"v.blk.{{i}}.{theirs}.{part}"] = f"tower.blocks.{{i}}.{ours}.{part}"
    return expand(patterns, config.depth)
