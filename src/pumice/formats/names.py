"""Tables that map the tensor names of other formats to the names in `pumice.model`.

In a table `{i}` stands for the number of a block. None means that a tensor is dropped on purpose, `Derived`
that it is compared with the config and dropped; both may be missing. Two names of one parameter are copies:
one of them must be there, and both must be equal. Everything else is exact: an unknown or missing name is an
error.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import NamedTuple

from pumice.config import DecoderConfig, ModelConfig, VisionConfig
from pumice.errors import InputError, some
from pumice.formats.derived import Derived, position_numbers, rotary_frequencies
from pumice.storage.tensors import LazyStateDict, check_same

Target = str | Derived | None
Table = dict[str, Target]  # name in the source -> name in pumice.model

# What stands outside a decoder's blocks: in Hugging Face's Llama, Mistral, Qwen2 and Qwen3, and in GGUF.
_HF_ENDS = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
_GGUF_ENDS = {"token_embd.weight": "embed.weight", "output_norm.weight": "norm.weight"}
# The layers of a decoder's block: our name, Hugging Face's, and GGUF's.
_DECODER_LAYERS = (
    ("attention_norm", "input_layernorm", "attn_norm"),
    ("attention.q", "self_attn.q_proj", "attn_q"),
    ("attention.k", "self_attn.k_proj", "attn_k"),
    ("attention.v", "self_attn.v_proj", "attn_v"),
    ("attention.o", "self_attn.o_proj", "attn_output"),
    ("attention.q_norm", "self_attn.q_norm", "attn_q_norm"),
    ("attention.k_norm", "self_attn.k_norm", "attn_k_norm"),
    ("mlp_norm", "post_attention_layernorm", "ffn_norm"),
    ("mlp.gate", "mlp.gate_proj", "ffn_gate"),
    ("mlp.up", "mlp.up_proj", "ffn_up"),
    ("mlp.down", "mlp.down_proj", "ffn_down"),
)
_HF_BLOCK = {theirs: ours for ours, theirs, _ in _DECODER_LAYERS}
_GGUF_BLOCK = {theirs: ours for ours, _, theirs in _DECODER_LAYERS}
# With four norms a block (Gemma 2), the same name stands for another one.
_HF_POST_NORMS = {
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


class Nesting(NamedTuple):
    """The prefixes of the parts of a LLaVA in a checkpoint; `newline` is the complete name of one tensor."""

    text: str
    head: str
    tower: str
    projector: str
    newline: str


HF_NESTINGS = (
    # transformers up to 4.51, and what later versions write
    Nesting(
        "language_model.model.", "language_model.lm_head.", "vision_tower.", "multi_modal_projector.",
        "image_newline",
    ),
    # the modules of transformers since 4.52
    Nesting(
        "model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector.",
        "model.image_newline",
    ),
)  # fmt: skip
IDEFICS3 = Nesting(
    "model.text_model.", "lm_head.", "model.vision_model.", "model.connector.modality_projection.",
    "model.image_newline",
)  # fmt: skip
IDEFICS3_CONNECTOR: Table = {"proj.weight": "layers.0.weight"}
ORIGINAL = Nesting(
    "model.", "lm_head.", "model.vision_tower.vision_tower.", "model.mm_projector.", "model.image_newline"
)
# A language model or a vision tower alone. "" is the prefix of a bare network, which has no head.
LLM_PREFIXES = ("model.", "")
TOWER_PREFIXES = ("vision_model.", "")
# The tensors of a batch norm that inference needs.
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def hf_decoder(config: DecoderConfig) -> Table:
    """Return the table of Hugging Face's names for a decoder of one of `FAMILIES` of this shape."""
    block = _HF_BLOCK | (_HF_POST_NORMS if config.post_norms else {})
    table = _decoder(config, _HF_ENDS, "model.layers.{i}.", block, "lm_head.weight")
    # Old Llama checkpoints store the rotary frequencies.
    frequencies: Table = {"model.layers.{i}.self_attn.rotary_emb.inv_freq": rotary_frequencies(config)}
    return table | expand(frequencies, config.depth)


def gguf_decoder(config: DecoderConfig) -> Table:
    """Return the table of GGUF's names for a llama, qwen2 or qwen3 of this shape."""
    return _decoder(config, _GGUF_ENDS, "blk.{i}.", _GGUF_BLOCK, "output.weight")


def efficientnet_lite(depth: int) -> Table:
    """Return the table of an EfficientNet-Lite checkpoint of `depth` blocks, our names without `tower.`."""
    # The tower gives features, so the classifier of ImageNet's classes is dropped.
    table: Table = {"_fc.weight": None, "_fc.bias": None}
    layers = [("_conv_stem", "_bn0", "stem"), ("_conv_head", "_bn1", "head")]
    for i in range(depth):
        if i:  # the first block has no expanding convolution
            layers.append((f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", f"blocks.{i}.expand"))
        layers.append((f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", f"blocks.{i}.depthwise"))
        layers.append((f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", f"blocks.{i}.project"))
    for convolution, norm, layer in layers:
        table[f"{convolution}.weight"] = f"{layer}.conv.weight"
        table |= {f"{norm}.{part}": f"{layer}.norm.{part}" for part in _BATCH_NORM}
        table[f"{norm}.num_batches_tracked"] = None  # batch norm reads it only without a momentum
    return table


def tower(config: VisionConfig) -> Table:
    """Return the table of a CLIP's or SigLIP's vision model in Hugging Face's names, without prefixes."""
    return clip_tower(config) if config.kind == "clip" else siglip_tower(config)


def hf_connector(biases: bool) -> Table:
    """Return the table of a LLaVA's projector in transformers, our names without `connector.`."""
    parts = ("weight", "bias") if biases else ("weight",)
    return {
        f"{source_layer}.{part}": f"layers.{number}.{part}"
        for source_layer, number in (("linear_1", 0), ("linear_2", 2))
        for part in parts
    }


def _mlp(depth: int) -> Table:
    # A GELU stands between two linear layers, so the linear layers have the even numbers.
    names = [f"{2 * i}.{part}" for i in range(depth) for part in ("weight", "bias")]
    return {name: f"layers.{name}" for name in names}


# The projectors of the original LLaVA: kind -> its table, our names without `connector.`.
ORIGINAL_CONNECTORS: dict[str, Table] = {
    "identity": {},
    "linear": {part: f"layers.0.{part}" for part in ("weight", "bias")},
    **{f"mlp{depth}x_gelu": _mlp(depth) for depth in range(1, 10)},
}


def llava(config: ModelConfig, nesting: Nesting, connector: Table, tower_prefix: str | None) -> Table:
    """Return the table of all tensors of a LLaVA in files of this nesting.

    tower_prefix: what stands between the nesting's prefix and the tower's own names; None if the files hold
    no tower.
    """
    heads = {"model.": nesting.text, "lm_head.": nesting.head}
    table = with_prefixes(hf_decoder(config.decoder), heads, "decoder.")
    table |= with_prefixes(connector, {"": nesting.projector}, "connector.")
    if tower_prefix is not None:
        table |= with_prefixes(tower(config.vision), {"": nesting.tower + tower_prefix}, "tower.")
    table[nesting.newline] = "image_newline" if config.has_newline else None
    return table


def adapted(config: ModelConfig) -> dict[str, str]:
    """Return the table of what a LoRA may adapt: a layer's name, in any nesting -> our weight's name."""
    # An adapter does not say with which code it was trained, so the names of all nestings are accepted.
    table: Table = {}
    for nesting in (*HF_NESTINGS, ORIGINAL, IDEFICS3):
        if nesting is IDEFICS3:
            projector = IDEFICS3_CONNECTOR
        else:
            hf = nesting in HF_NESTINGS
            projector = hf_connector(False) if hf else ORIGINAL_CONNECTORS[config.connector.kind]
        for prefix in TOWER_PREFIXES if config.vision.kind in ("clip", "siglip") else ():
            table |= with_prefixes(tower(config.vision), {"": nesting.tower + prefix}, "tower.")
        table |= llava(config, nesting, projector, None)
    return {
        source_name.removesuffix(".weight"): param_name
        for source_name, param_name in table.items()
        if isinstance(param_name, str) and source_name.endswith(".weight")
    }


def with_prefixes(table: Table, prefixes: Mapping[str, str], added: str) -> Table:
    """Return the table with other prefixes.

    prefixes: old -> new, for the source's names; the first old prefix that fits is replaced. added: what to
    put before our names.
    """
    result: Table = {}
    for source_name, param_name in table.items():
        old = next(prefix for prefix in prefixes if source_name.startswith(prefix))
        new_name = prefixes[old] + source_name.removeprefix(old)
        result[new_name] = added + param_name if isinstance(param_name, str) else param_name
    return result


def tower_prefix(names: Container[str], before: str = "") -> str | None:
    """Return what stands between `before` and a ViT's own names; None if there is no ViT in `names`."""
    probe = f"{before}%sembeddings.patch_embedding.weight"
    return next((prefix for prefix in TOWER_PREFIXES if probe % prefix in names), None)


def expand(patterns: Mapping[str, Target], count: int) -> Table:
    """Return the table with `{i}` replaced by 0 .. count - 1 in each pattern."""
    return {
        source_name.format(i=i): param_name.format(i=i) if isinstance(param_name, str) else param_name
        for source_name, param_name in patterns.items()
        for i in (range(count) if "{i}" in source_name else (0,))
    }


def convert(state: LazyStateDict, table: Table, label: str = "the checkpoint") -> LazyStateDict:
    """Return `state` under our names. label: names the source in errors.

    Raises InputError on a name that the table lacks, on one that the table needs and `state` lacks, on copies
    of one parameter that differ, and on a tensor that is not what the config says.
    """
    sources: dict[str, list[str]] = {}
    for name, param_name in table.items():
        if isinstance(param_name, str):
            sources.setdefault(param_name, []).append(name)
    unknown = [name for name in state if name not in table]
    missing = [names[0] for names in sources.values() if not any(name in state for name in names)]
    if unknown or missing:
        problems = [
            f"{problem} {some(names)}"
            for problem, names in (("unknown", unknown), ("missing", missing))
            if names
        ]
        raise InputError(f"{label} does not have the tensors of its kind of model: {'; '.join(problems)}")
    renamed: LazyStateDict = {}
    for name, tensor in state.items():
        param_name = table[name]
        if isinstance(param_name, Derived):
            param_name.check(tensor, label)
            continue
        if param_name is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise InputError(
                f"{label}: {tensor.origin} holds whole numbers ({str(tensor.dtype).removeprefix('torch.')}), "
                "no weights; convert the model again, without quantising it"
            )
        if param_name in renamed:
            check_same(
                renamed[param_name], tensor, label, "a head of its own needs tie_word_embeddings false"
            )
        else:
            renamed[param_name] = tensor
    return renamed


def check_family(names: Container[str], block: str, config: DecoderConfig, label: str) -> None:
    """Raise InputError if the tensors of an LLM are those of another family than its config says.

    block: what stands before the names of the first block.
    """
    for tensor, expected, family in (
        ("self_attn.q_proj.bias", config.qkv_bias, "qwen2"),
        ("self_attn.q_norm.weight", config.qk_norm, "qwen3"),
        ("pre_feedforward_layernorm.weight", config.post_norms, "gemma2"),
    ):
        if (f"{block}{tensor}" in names) != expected:
            stored = "do not hold" if expected else "hold"
            raise InputError(
                f"{label}: by its config the language model is {'a' if expected else 'no'} {family}, but its "
                f"tensors {stored} {block}{tensor}, which only a {family} has; correct the model_type"
            )


def check_tower(names: Container[str], before: str, config: VisionConfig, label: str) -> None:
    """Raise InputError if the tensors of a ViT are those of another kind than its config says.

    before: what stands before the tower's own names.
    """
    name = f"{before}embeddings.class_embedding"
    if (name in names) != (config.kind == "clip"):
        stored = "hold" if name in names else "do not hold"
        raise InputError(
            f"{label}: by its config the vision tower is of kind {config.kind}, but its tensors {stored} "
            f"{name}, which only a clip has; correct the model_type"
        )


def inverse(table: Table) -> dict[str, str]:
    """Return the table from our names to the source's, without the names that are dropped, and copies."""
    names: dict[str, str] = {}
    for source_name, param_name in table.items():
        if isinstance(param_name, str):
            names.setdefault(param_name, source_name)
    return names


def _decoder(
    config: DecoderConfig, top_level: Mapping[str, str], prefix: str, block: Mapping[str, str], head: str
) -> Table:
    patterns: Table = dict(top_level)
    # A tied head is the embedding; some writers store it twice.
    patterns[head] = "embed.weight" if config.tied_head else "head.weight"
    for source_layer, layer in block.items():
        if layer in ("attention.q_norm", "attention.k_norm") and not config.qk_norm:
            continue
        patterns[f"{prefix}{source_layer}.weight"] = f"blocks.{{i}}.{layer}.weight"
        if config.qkv_bias and layer in ("attention.q", "attention.k", "attention.v"):
            patterns[f"{prefix}{source_layer}.bias"] = f"blocks.{{i}}.{layer}.bias"
    return expand(patterns, config.depth)


# What CLIP's and SigLIP's vision models have in common.
_VIT_ENDS: Table = {
    "embeddings.patch_embedding.weight": "patch.weight",
    "embeddings.position_embedding.weight": "positions",
    "post_layernorm.weight": "post_norm.weight",
    "post_layernorm.bias": "post_norm.bias",
}
# The layers of a tower's block: our name, Hugging Face's, and GGUF's.
_TOWER_LAYERS = (
    ("attention_norm", "layer_norm1", "ln1"),
    ("attention.q", "self_attn.q_proj", "attn_q"),
    ("attention.k", "self_attn.k_proj", "attn_k"),
    ("attention.v", "self_attn.v_proj", "attn_v"),
    ("attention.o", "self_attn.out_proj", "attn_out"),
    ("mlp_norm", "layer_norm2", "ln2"),
    ("mlp.up", "mlp.fc1", "ffn_up"),
    ("mlp.down", "mlp.fc2", "ffn_down"),
)
_SIGLIP_HEAD = ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")


def clip_tower(config: VisionConfig) -> Table:
    """Return the table of CLIP's vision model: names without `vision_model.` -> ours without `tower.`."""
    extra: Table = {
        "embeddings.class_embedding": "class_token",
        "pre_layrnorm.weight": "pre_norm.weight",
        "pre_layrnorm.bias": "pre_norm.bias",
    }
    return _vit(config) | extra


def siglip_tower(config: VisionConfig) -> Table:
    """Return the table of SigLIP's or SigLIP 2's vision model, with the prefixes of `clip_tower`."""
    extra: Table = {"embeddings.patch_embedding.bias": "patch.bias"}
    # The head pools the features into one vector; a LLaVA needs every feature.
    extra |= {
        f"head.{name}": None for name in ("probe", "attention.in_proj_weight", "attention.in_proj_bias")
    }
    extra |= {f"head.{layer}.{part}": None for layer in _SIGLIP_HEAD for part in ("weight", "bias")}
    return _vit(config) | extra


def _vit(config: VisionConfig) -> Table:
    patterns = _VIT_ENDS | {"embeddings.position_ids": position_numbers(config)}  # in old checkpoints
    for layer, source_layer, _ in _TOWER_LAYERS:
        for part in ("weight", "bias"):
            patterns[f"encoder.layers.{{i}}.{source_layer}.{part}"] = f"blocks.{{i}}.{layer}.{part}"
    return expand(patterns, config.depth)


# Tower and connector in llama.cpp's mmproj files.
_GGUF_TOWER_ENDS = {
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


def gguf_tower(config: VisionConfig, *, swapped: bool = False) -> Table:
    """Return the table of LLaVA's mmproj files: a two-layer connector, and the tower without its final norm.

    swapped: whether the halves of the MLPs have each other's names, as in files of 2023 and 2024.
    """
    # A CLIP has a class token and a norm before its blocks; a SigLIP has a bias in its patch embedding
    # instead.
    absent = "tower.patch.bias" if config.kind == "clip" else "tower.class_token"
    patterns: Table = {name: param for name, param in _GGUF_TOWER_ENDS.items() if param != absent}
    if config.kind == "siglip":
        patterns = {name: param for name, param in patterns.items() if not name.startswith("v.pre_ln")}
    swap = {"mlp.up": "mlp.down", "mlp.down": "mlp.up"} if swapped else {}
    for layer, _, source_layer in _TOWER_LAYERS:
        layer = swap.get(layer, layer)
        for part in ("weight", "bias"):
            patterns[f"v.blk.{{i}}.{source_layer}.{part}"] = f"tower.blocks.{{i}}.{layer}.{part}"
    patterns |= dict.fromkeys(("v.position_ids", "v.embd.position_ids"), position_numbers(config))
    return expand(patterns, config.depth)
