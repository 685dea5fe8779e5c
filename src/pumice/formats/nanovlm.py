"""Read a checkpoint of huggingface/nanoVLM: config.json, model.safetensors, and the tokenizer it names.

C width of the tower, D of the decoder.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from tokenizers import AddedToken
from torch import Tensor

from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, VisionConfig
from pumice.config_json import naming
from pumice.errors import InputError
from pumice.formats.derived import rotary_frequencies
from pumice.formats.names import Table, convert, expand
from pumice.formats.text.read import TextSide
from pumice.formats.text.tokenizer import read_tokenizer
from pumice.media import TileMarks
from pumice.storage.download import locate
from pumice.storage.json_file import Keys
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict, open_weights
from pumice.templates import OWN, Template, get_template

NUMBER = "<image: {number}>"  # before each of several pictures; it is ordinary text
_TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json")
_ENDS: Table = {
    "vision_encoder.patch_embedding.conv.weight": "tower.patch.weight",
    "vision_encoder.patch_embedding.conv.bias": "tower.patch.bias",
    "vision_encoder.patch_embedding.position_embedding": "tower.positions",
    "vision_encoder.layer_norm.weight": "tower.post_norm.weight",
    "vision_encoder.layer_norm.bias": "tower.post_norm.bias",
    "MP.proj.weight": "connector.layers.0.weight",
    "decoder.token_embedding.weight": "decoder.embed.weight",
    "decoder.norm.weight": "decoder.norm.weight",
}
# Layers of a block: of the tower, each with weight and bias, and of the decoder, with a weight alone.
_TOWER_BLOCK = {
    "ln1": "attention_norm", "attn.q_proj": "attention.q", "attn.k_proj": "attention.k",
    "attn.v_proj": "attention.v", "attn.out_proj": "attention.o", "ln2": "mlp_norm",
    "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down",
}  # fmt: skip
_DECODER_BLOCK = {
    "norm1": "attention_norm", "attn.q_proj": "attention.q", "attn.k_proj": "attention.k",
    "attn.v_proj": "attention.v", "attn.out_proj": "attention.o", "norm2": "mlp_norm",
    "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
}  # fmt: skip


def open_nanovlm(folder: Path, template: str | None = None) -> LoadedParts:
    """Read the model in `folder`. template: a chat format instead of the config's. Raises InputError."""
    keys = Keys.of(folder / "config.json")
    # 1. The sizes, and what our model does not compute.
    keys.only("vit_cls_flag", (False,), False)
    keys.only("lm_attn_scaling", (1.0,), 1.0)
    with naming(keys.label):
        vision, decoder = _vision(keys), _decoder(keys)
    factor = keys.get("mp_pixel_shuffle_factor", int)
    with naming(f"{keys.label}: mp_pixel_shuffle_factor"):
        connector = ConnectorConfig("linear", "pixel_shuffle", factor, bias=False)
        connector.tokens(vision.grid)
    # 2. Tokens and pictures.
    text, extra = _text_side(folder, keys)
    image, marks = _pictures(keys, vision, extra)
    config, notes = text.model_config(
        template, str(folder), decoder=decoder, vision=vision, connector=connector, image=image, marks=marks
    )
    if config.image_tokens != (stated := keys.get("mp_image_token_length", int, config.image_tokens)):
        raise InputError(
            f"{keys.label}: mp_image_token_length is {stated}, but a tile of {vision.image_size} pixels makes"
            f" {config.image_tokens} tokens; correct the wrong one"
        )
    # nanoVLM writes pictures and question without a line between them.
    chat_format = get_template(config.template, config.chat)
    if isinstance(chat_format, Template):
        config = replace(config, template=OWN, chat=replace(chat_format.chat, image_line=False))
    # 3. The tensors.
    state = convert(_split(open_weights(folder)), _table(decoder, vision), str(folder))
    positions = state["tower.positions"]
    state["tower.positions"] = positions.map(lambda values: values[0], positions.shape[1:])
    return text.parts(config, state, notes)


def _vision(keys: Keys) -> VisionConfig:
    return VisionConfig(
        "siglip",
        keys.get("vit_img_size", int),
        keys.get("vit_hidden_dim", int),
        keys.get("vit_patch_size", int),
        depth=keys.get("vit_n_blocks", int),
        heads=keys.get("vit_n_heads", int),
        mlp_width=keys.get("vit_inter_dim", int),
        activation="gelu_tanh",
        norm_eps=keys.get("vit_ln_eps", float, 1e-6),
        layer=-1,
        select="full",
        final_norm=True,
    )


def _decoder(keys: Keys) -> DecoderConfig:
    width, heads = keys.get("lm_hidden_dim", int), keys.get("lm_n_heads", int)
    if not heads or width % heads:
        raise InputError(f"lm_hidden_dim {width} is no multiple of {heads} heads")
    return DecoderConfig(
        vocab_size=keys.get("lm_vocab_size", int),
        width=width,
        depth=keys.get("lm_n_blocks", int),
        heads=heads,
        kv_heads=keys.get("lm_n_kv_heads", int),
        head_dim=width // heads,
        mlp_width=keys.get("lm_inter_dim", int),
        context=keys.get("lm_max_position_embeddings", int),
        rope_theta=keys.get("lm_re_base", float),
        norm_eps=keys.get("lm_rms_eps", float),
        tied_head=keys.get("lm_tie_weights", bool, True),
    )


def _text_side(folder: Path, keys: Keys) -> tuple[TextSide, dict[str, str]]:
    """Read the tokenizer that the config names, with its chat template and added tokens by name."""
    extra = keys.object("vlm_extra_tokens").values
    if not extra.get("image_token"):
        raise InputError(
            f"{keys.label} names no image_token in vlm_extra_tokens: its version of nanoVLM put pictures "
            "before all text, which cannot be read; train it on with a newer one"
        )
    if not all(isinstance(token, str) for token in extra.values()):
        raise InputError(f"{keys.label}: vlm_extra_tokens should be texts, not {extra!r}")
    # A folder may hold its own tokenizer, for machines without the hub.
    own = (folder / "tokenizer.json").is_file()
    source = folder if own else locate(keys.get("lm_tokenizer", str), _TOKENIZER_FILES)
    files = read_tokenizer(source)
    files.backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in extra.values()])
    chat = keys.get("lm_chat_template", str, files.chat_template or "")
    return TextSide(replace(files, chat_template=chat or None, other_templates=())), extra


def _pictures(keys: Keys, vision: VisionConfig, extra: dict[str, str]) -> tuple[ImagePolicy, TileMarks]:
    """Return how pictures become tiles. Older checkpoints show each as one."""
    plain = ImagePolicy("squash", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", (0, 0, 0))
    if "max_img_size" not in keys:
        return plain, TileMarks(number=NUMBER)
    if (whole := extra.get("global_image_token")) is None:
        raise InputError(f"{keys.label} has max_img_size, but no global_image_token in vlm_extra_tokens")
    longest, side = keys.get("max_img_size", int), vision.image_size
    if longest % side:
        raise InputError(f"{keys.label}: max_img_size {longest} is no multiple of vit_img_size {side}")
    enlarge = keys.get("resize_to_max_side_len", bool, True)
    image = replace(plain, mode="grid", resample="bicubic", longest_edge=longest, enlarge=enlarge)
    tile = extra.get("r1c1", "").replace("1", "{row}", 1).replace("1", "{column}", 1)
    for row in range(1, longest // side + 1):
        for column in range(1, longest // side + 1):
            if (token := extra.get(f"r{row}c{column}")) != (expected := tile.format(row=row, column=column)):
                raise InputError(f"{keys.label}: the token r{row}c{column} is {token!r}, not {expected!r}")
    return image, TileMarks(tile=tile, whole=whole, number=NUMBER)


def _table(decoder: DecoderConfig, vision: VisionConfig) -> Table:
    table = _ENDS | {"decoder.rotary_embd.inv_freq": rotary_frequencies(decoder)}
    # Writers store a tied head once or twice.
    table["decoder.head.weight"] = "decoder.embed.weight" if decoder.tied_head else "decoder.head.weight"
    blocks = {
        f"vision_encoder.blocks.{{i}}.{source}.{part}": f"tower.blocks.{{i}}.{layer}.{part}"
        for source, layer in _TOWER_BLOCK.items()
        for part in ("weight", "bias")
    }
    table |= expand(blocks, vision.depth)
    blocks = {
        f"decoder.blocks.{{i}}.{source}.weight": f"decoder.blocks.{{i}}.{layer}.weight"
        for source, layer in _DECODER_BLOCK.items()
    }
    return table | expand(blocks, decoder.depth)


def _split(state: LazyStateDict) -> LazyStateDict:
    """Return the tensors with the tower's joined projections (3 * C, ...) as three."""
    result: LazyStateDict = {}
    for name, tensor in state.items():
        if ".qkv_proj." not in name or tensor.shape[0] % 3:
            result[name] = tensor
            continue
        rows = tensor.shape[0] // 3
        for number, part in enumerate("qkv"):
            take = partial(_third, number=number)
            result[name.replace("qkv_proj", f"{part}_proj")] = tensor.map(take, (rows, *tensor.shape[1:]))
    return result


def _third(values: Tensor, number: int) -> Tensor:
    return values.chunk(3)[number].clone()
