"""Write a model for llama.cpp: the language model as one GGUF file, tower and connector as another (mmproj).

llama.cpp differs from our model in three ways that no file can change. It resizes a picture before it pads
it, and has its own filters, so that only a picture of the tower's size arrives unchanged. It computes GELU
with tanh, from a table of 16-bit values. It puts the class token of a CLIP in the wrong position (its issue
25814).
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from pumice.capability import CHAT, LLAMA, Capability, fields
from pumice.config import (
    ChatFormat,
    ConnectorConfig,
    DecoderConfig,
    ImagePolicy,
    ModelConfig,
    VisionConfig,
)
from pumice.errors import InputError, WorkError, check_known
from pumice.formats import names as tensor_names
from pumice.formats.families import FAMILIES, INTERLEAVED
from pumice.formats.gguf.file import GgufFile, kind_name
from pumice.formats.gguf.library import llama_library
from pumice.formats.gguf.llm import DECODER_KEYS
from pumice.formats.gguf.mmproj import CLASS_TOKENS, OWN_KEY, TOWER_KEYS, own_values
from pumice.formats.gguf.vocab import write_vocabulary
from pumice.formats.hf.config import WRITTEN
from pumice.formats.hf.refusal import connector_refusal, tower_refusal
from pumice.formats.hf.write import as_mlp
from pumice.formats.text.chat_template_write import jinja_part, quoted, to_jinja
from pumice.kernels.packed import from_blocks
from pumice.model.layers import rope_inv_freq
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import Blocks, LazyStateDict, LazyTensor, as_lazy, check_written
from pumice.templates import get_template

CAPABILITY = Capability(
    "the GGUF writer",
    WRITTEN
    | {
        ModelConfig: fields(
            "decoder vision connector image template chat stop_token_ids bos_token_id image_wrap generation "
            "lora trained_pictures boxes"
        ),
        DecoderConfig: fields(LLAMA),
        VisionConfig: fields(
            "image_size width stride depth heads mlp_width norm_eps layer select activation",
            kind=("clip", "siglip", "none"),
        ),
        ConnectorConfig: fields("kind reduce factor"),
        ImagePolicy: fields("mode mean std resample pad_color several"),
        ChatFormat: fields(CHAT),
    },
)
# llama.cpp's numbers of file types; "keep" may be of several, and is called the usual one of four bits
TYPES = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "keep": 15
}  # fmt: skip
BY_LLAMA_CPP = ("q4_k_m", "q5_k_m", "q6_k")  # which nothing else quantises
TOWER_TYPES = ("f32", "f16", "q8_0")
_SENSITIVE = ("token_embd.weight", "output.weight")  # in 8 bits beside q4_0
_BLOCK = 32  # values that q8_0 and q4_0 quantise together
_PAD_COLOR = (122, 116, 104)  # llama.cpp's fixed colour


def refusal(config: ModelConfig) -> str | None:
    """Return why llama.cpp cannot compute this model; None if it can."""
    decoder, arch = config.decoder, _architecture(config)
    if decoder.qk_norm and decoder.qkv_bias:
        return "its attention has both biases and query norms, which no architecture of llama.cpp has"
    if decoder.rope_scaling and decoder.rope_scaling.kind == "llama3" and arch != "llama":
        return f"its {arch} decoder slows rotary positions as only a llama's are slowed there"
    if config.vision.kind != "none" and (reason := tower_refusal(config) or _image_refusal(config)):
        return reason
    return CAPABILITY.unsupported(config)


def _image_refusal(config: ModelConfig) -> str | None:
    if reason := connector_refusal(config, "a LLaVA's files in GGUF do not hold"):
        return reason
    if config.image.mode == "anyres":
        return (
            "llama.cpp leaves out what joins LLaVA-NeXT's tiles (image_newline, cropped padding, rows across "
            "tiles), so its answers would differ"
        )
    if config.vision.select == "cls_patch":
        return "it keeps the class token, which llama.cpp drops"
    return None


def write(
    folder: Path,
    model: LoadedParts,
    kind: str = "f16",
    tower_kind: str | None = None,
    class_token: str = "first",
) -> list[str]:
    """Write `model-{kind}.gguf` and `mmproj-{tower_kind}.gguf` of a model without adapters. Returns notes.

    kind: of TYPES, for the matrices; the rest is f32. keep: those stored in few bits as they are, f16 else.
    Rows that are no whole number of blocks are f16. tower_kind: of TOWER_TYPES, f32 or f16 by default. Both
    may be in capitals, as file names have them.
    class_token: "shifted" rotates the positions of a CLIP for a llama.cpp that puts its class token last, so
    that every patch has its own; the first patch is lost there. Raises InputError.
    """
    kind, tower_kind = kind.lower(), None if tower_kind is None else tower_kind.lower()
    tower_type = "f16" if tower_kind is None else tower_kind
    for name, options in ((kind, TYPES), (tower_type, TOWER_TYPES), (class_token, CLASS_TOKENS)):
        check_known(name, options, f"there is no {name!r} among the options of GGUF")
    if class_token == "shifted" and model.config.vision.kind != "clip":
        raise InputError(
            f"class_token shifted is for a CLIP; a tower of kind {model.config.vision.kind!r} has no class "
            "token: leave it out"
        )
    library = llama_library(f"the GGUF type {kind}") if kind in BY_LLAMA_CPP else None
    model = as_mlp(model)
    config, state, tokenizer = model.config, model.state, model.tokenizer
    # 1. The language model. llama.cpp's quantiser reads a file with the weights as they are stored.
    decoder = {name: tensor for name, tensor in state.items() if name.startswith("decoder.")}
    target = folder / f"model-{kind}.gguf"
    path, written_kind = target, kind
    if library is not None:
        whole = {torch.float32: "f32", torch.bfloat16: "bf16"}
        path, written_kind = folder / "whole.gguf", whole.get(state["decoder.embed.weight"].dtype, "f16")
    _write(
        path,
        _architecture(config),
        lambda writer: _describe_llm(writer, config, tokenizer, written_kind),
        _llm(config, decoder),
        written_kind,
    )
    notes = [] if library is None else [_quantize(library, path, target, TYPES[kind])]
    # 2. Tower and connector.
    if config.vision.kind != "none":
        tower_kind = tower_kind or ("f32" if kind == "f32" else "f16")
        shifted = "-class-token-shifted" if class_token == "shifted" else ""
        _write(
            folder / f"mmproj-{tower_kind}{shifted}.gguf",
            "clip",
            lambda writer: _describe_tower(writer, config, str(tower_kind), class_token),
            _tower(config, state, class_token),
            tower_kind,
        )
    # 3. Tell the user what llama.cpp does differently with this model.
    if '"prepend_scheme":"first"' in tokenizer.to_str():
        notes.append(
            "llama.cpp puts a space before the text behind a picture or a special token, this tokenizer only "
            "before the very first word: some tokens differ"
        )
    window = config.decoder.sliding_window
    if window is not None:
        notes.append(f"llama.cpp has no sliding window here, so its context is the window's {window} tokens")
    if config.vision.kind == "none":
        return notes
    if config.image.mode != "pad" or config.image.pad_color != _PAD_COLOR:
        color = f" and {config.image.pad_color}" if config.image.mode == "pad" else ""
        notes.append(
            f"llama.cpp pads every picture to a square with {_PAD_COLOR}, this model was trained with "
            f"{config.image.mode}{color}: only square pictures are seen alike"
        )
    if class_token == "shifted":
        notes.append(
            "the positions of the tower are rotated for a llama.cpp that puts the class token last (since "
            "May 2025, its issue 25814); one that is mended reads this mmproj wrongly: export again then"
        )
    elif config.vision.kind == "clip":
        notes.append(
            "llama.cpp has put a CLIP's class token behind its patches since May 2025 (its issue 25814), so "
            "that every feature is that of the next patch: until it is mended, answers about pictures differ"
        )
    if config.vision.activation == "gelu":
        notes.append("llama.cpp computes the tower's GELU by its tanh form")
    return notes


def _quantize(library: Any, source: Path, target: Path, number: int) -> str:
    """Let llama.cpp quantise a file, which is removed. Returns a note on the types that it chose."""
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, torch.get_num_threads()
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise WorkError(f"llama.cpp could not quantise the model to {target.name}")
    source.unlink()
    infos = GgufFile(target).infos.values()
    kinds = Counter(kind_name(info.kind) for info in infos if len(info.shape) > 1)
    return "llama.cpp chose " + ", ".join(f"{kind} for {count}" for kind, count in kinds.most_common())


def _describe_llm(writer: Any, config: ModelConfig, tokenizer: Tokenizer, kind: str) -> None:
    decoder, arch = config.decoder, _architecture(config)
    context = min(decoder.context, decoder.sliding_window or decoder.context)
    numbers = {
        "vocab_size": decoder.vocab_size,
        **{key: getattr(decoder, name) for name, key in DECODER_KEYS.items()},
        "context_length": context,
        "attention.head_count_kv": decoder.kv_heads,
        "attention.key_length": decoder.head_dim,
        "attention.value_length": decoder.head_dim,
        "rope.dimension_count": decoder.head_dim,
    }
    writer.add_string("general.type", "model")
    writer.add_uint32("general.file_type", TYPES[kind])
    for key, number in numbers.items():
        writer.add_uint32(f"{arch}.{key}", number)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", decoder.norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", decoder.rope_theta)
    if decoder.rope_scaling and decoder.rope_scaling.kind == "linear":
        writer.add_string(f"{arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{arch}.rope.scaling.factor", decoder.rope_scaling.factor)
    write_vocabulary(writer, config, tokenizer)
    chat = to_jinja(get_template(config.template, config.chat))
    writer.add_string("tokenizer.chat_template", marked(chat, config.image_wrap))


def marked(chat: str, wrap: tuple[str, str] | None = None) -> str:
    """Change a template of `to_jinja` for llama.cpp, which writes a picture's marker into the text itself.

    llama.cpp joins text and markers without the new line that our templates write after leading pictures.
    wrap: the texts around each picture.
    """
    before, _, remaining = chat.partition("{% macro said(content, trim) %}")
    _, _, after = remaining.partition("{% endmacro %}")
    left, right = map(quoted, wrap or ("", ""))
    around = "{% set left = " + left + " %}{% set right = " + right + " %}"
    said = around + jinja_part("said_by_llama_cpp")  # which marks a picture with <__media__>, or a word in it
    return before + "{% macro said(content, trim) %}" + said + "{% endmacro %}" + after


def _describe_tower(writer: Any, config: ModelConfig, kind: str, class_token: str) -> None:
    vision = config.vision
    numbers = {key: getattr(vision, name) for name, key in TOWER_KEYS.items()}
    numbers["projection_dim"] = config.decoder.width
    writer.add_string("general.type", "mmproj")
    writer.add_uint32("general.file_type", TYPES[kind])
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", vision.activation != "quick_gelu")
    for key, number in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.norm_eps)
    # Without this key llama.cpp takes the last hidden state or the one before, depending on its version.
    # State 0 is that of the embeddings.
    writer.add_array("clip.vision.feature_layer", [vision.layer % (vision.depth + 1)])
    writer.add_array("clip.vision.image_mean", list(config.image.mean))
    writer.add_array("clip.vision.image_std", list(config.image.std))
    writer.add_string(OWN_KEY, own_values(vision, config.image, config.image_wrap, class_token))


def _llm(config: ModelConfig, state: LazyStateDict) -> LazyStateDict:
    decoder = config.decoder
    table = tensor_names.inverse(tensor_names.gguf_decoder(decoder))
    names = {f"decoder.{name}": gguf_name for name, gguf_name in table.items()}
    # llama.cpp rotates neighbours in a llama.
    permuted = FAMILIES[_architecture(config)].gguf == INTERLEAVED
    heads = {"q": decoder.heads, "k": decoder.kv_heads} if permuted else {}
    tensors = {
        names[name]: _permuted(tensor, heads.get(name.split(".")[-2])) for name, tensor in state.items()
    }
    scaling = decoder.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        # GGUF stores Llama 3's scaling as the divisor of each frequency.
        head_dim, rope_theta, cpu = decoder.head_dim, decoder.rope_theta, torch.device("cpu")
        unscaled = rope_inv_freq(head_dim, rope_theta, None, cpu)
        divisors = unscaled / rope_inv_freq(head_dim, rope_theta, scaling, cpu)
        tensors["rope_freqs.weight"] = as_lazy(divisors)
    return tensors


def _tower(config: ModelConfig, state: LazyStateDict, class_token: str) -> LazyStateDict:
    """Return the tensors of tower and connector, without the final norm, which llama.cpp would apply."""
    names = tensor_names.inverse(tensor_names.gguf_tower(config.vision))
    if class_token == "shifted":
        state = state | {"tower.positions": state["tower.positions"].map(lambda rows: rows.roll(-1, 0))}
    return {gguf_name: state[name] for name, gguf_name in names.items()}


def _permuted(tensor: LazyTensor, heads: int | None) -> LazyTensor:
    """Reorder a query or key projection, so that neighbours rotate; the inverse of `gguf.llm.unpermute`."""
    if heads is None:
        return tensor

    def permute(weight: Tensor) -> Tensor:
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.transpose(1, 2).reshape(weight.shape)

    blocks = tensor.blocks
    if blocks is None:
        return tensor.map(permute)
    kind, fetch = blocks.kind, blocks.fetch
    same = Blocks(kind, lambda: from_blocks(kind, permute(fetch().blocks())))
    return replace(tensor.map(permute), blocks=same)


def _write(path: Path, arch: str, describe: Callable[[Any], None], tensors: LazyStateDict, kind: str) -> None:
    """Write one file, with one tensor at a time in memory."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    try:
        describe(writer)
        # The header with the size of every tensor comes first, then their values in the same order.
        kinds = {name: _kind(name, tensor, kind) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            quant = gguf.GGMLQuantizationType[kinds[name].upper()]
            per_block, size = gguf.GGML_QUANT_SIZES[quant]
            row = tensor.shape[-1] // per_block * size
            count = int(np.prod(tensor.shape[:-1])) * row
            shape = tensor.shape if kinds[name] in ("f32", "f16") else (*tensor.shape[:-1], row)
            dtype = np.dtype({"f32": np.float32, "f16": np.float16}.get(kinds[name], np.uint8))
            writer.add_tensor_info(name, shape, dtype, count, raw_dtype=quant)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in _values(tensors, kinds):
            writer.write_tensor_data(values)
    finally:
        writer.close()


def _values(tensors: LazyStateDict, kinds: dict[str, str]) -> Iterator[np.ndarray]:
    import gguf

    for name, tensor in tensors.items():
        if tensor.blocks is not None and kinds[name] == tensor.blocks.kind.name.lower():
            yield tensor.blocks.fetch().blocks().flatten(1).numpy()  # bit for bit
            continue
        dtype = torch.float16 if kinds[name] == "f16" else torch.float32
        value = tensor.read(torch.float32).detach().to(dtype).contiguous()
        check_written(name, tensor, value, "use --type f32")
        values = value.numpy()
        if kinds[name] not in ("f32", "f16"):
            values = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kinds[name].upper()])
        yield values


def _kind(name: str, tensor: LazyTensor, kind: str) -> str:
    """Return the type of one tensor: f32 for vectors and for the positions, which llama.cpp adds as such."""
    if len(tensor.shape) < 2 or kind == "f32" or name == "v.position_embd.weight":
        return "f32"
    if kind == "keep":
        return "f16" if tensor.blocks is None else tensor.blocks.kind.name.lower()
    if kind in ("f16", "bf16"):
        return "f16" if len(tensor.shape) == 4 else kind
    if kind == "q4_0" and name in _SENSITIVE:
        kind = "q8_0"
    return kind if len(tensor.shape) == 2 and tensor.shape[-1] % _BLOCK == 0 else "f16"


def _architecture(config: ModelConfig) -> str:
    if config.decoder.qk_norm:
        return "qwen3"
    return "qwen2" if config.decoder.qkv_bias else "llama"
