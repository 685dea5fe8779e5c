"""The families of language models and vision towers that can be read, by the model_type of transformers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from pumice.errors import InputError

# Rotary positions turn pairs of values of a head: value i with value i + d / 2 (GPT-NeoX), or value 2 i with
# value 2 i + 1 (GPT-J). The tensors of both have the same names and shapes.
HALVES, INTERLEAVED = ROTATIONS = ("halves", "interleaved")
# Which layers have the key `sliding_window`: none, whatever it says; all; those of the key `layer_types`; the
# same, if `use_sliding_window` is true.
WINDOWS = ("never", "all", "layer_types", "use_sliding_window")


@dataclass(frozen=True)
class Family:
    """A family of language models.

    defaults: the values that transformers gives to absent keys of config.json. class_name: the class in
    transformers. template: the chat format of a LLaVA of transformers that has no chat template; None: the
    user must name it. original: the name in the classes of the original LLaVA, None if it has no such class.

    Shapes and keys do not say the next three, so every row must. rotation: which values of a head rotate
    together, one of ROTATIONS; the decoder computes "halves" alone. window: which layers have the sliding
    window, one of WINDOWS. gguf: the rotation in GGUF files of the architecture of this name; None: they
    cannot be read. fields: what differs from the defaults of DecoderConfig.
    """

    defaults: dict[str, Any]
    class_name: str
    template: str | None
    original: str | None
    rotation: str
    window: str
    gguf: str | None
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("rotation", ROTATIONS), ("window", WINDOWS), ("gguf", (*ROTATIONS, None))):
            if (value := getattr(self, name)) not in allowed:
                listed = ", ".join(map(repr, allowed))
                raise InputError(f"{self.class_name}: {name} is {value!r}; use one of {listed}")


@dataclass(frozen=True)
class TowerFamily:
    """A family of vision towers. kind, fields: as in VisionConfig. defaults: as in Family."""

    kind: str
    defaults: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)


# The defaults of transformers' config classes. A model may leave out any key that has its default.
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "sliding_window": 4096,
}  # fmt: skip
_QWEN2 = _LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
_GEMMA2: dict[str, Any] = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "sliding_window": 4096, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
FAMILIES = {
    "llama": Family(_LLAMA, "LlamaForCausalLM", "v1", "Llama", HALVES, "never", gguf=INTERLEAVED),
    # In GGUF files a Mistral has the architecture llama.
    "mistral": Family(
        _MISTRAL, "MistralForCausalLM", "mistral_instruct", "Mistral", HALVES, "all", gguf=None
    ),
    "qwen2": Family(
        _QWEN2, "Qwen2ForCausalLM", "chatml", "Qwen", HALVES, "use_sliding_window", gguf=HALVES,
        fields={"qkv_bias": True},
    ),
    "qwen3": Family(
        _QWEN2 | {"head_dim": 128}, "Qwen3ForCausalLM", "chatml", None, HALVES, "use_sliding_window",
        gguf=HALVES, fields={"qk_norm": True},
    ),
    "gemma2": Family(
        _GEMMA2, "Gemma2ForCausalLM", None, None, HALVES, "layer_types", gguf=None,
        fields={"window_pattern": 2, "post_norms": True, "norm_offset": 1.0},
    ),
}  # fmt: skip
# Families of transformers that rotate neighbours, some with exactly the tensors of a Llama. A row that says
# something else of them is refused.
ROTATE_NEIGHBOURS = frozenset(("codegen", "cohere", "cohere2", "ernie4_5", "glm", "glm4", "gptj", "helium"))


def check_rotation(kind: str, label: str) -> None:
    """Raise InputError if the decoder does not rotate as this family does. label: of its config."""
    if FAMILIES[kind].rotation != HALVES or kind in ROTATE_NEIGHBOURS:
        raise InputError(
            f"{label}: rotary positions of {kind} turn neighbouring values (interleaved, as in GPT-J), which "
            "Pumice does not compute"
        )


_CLIP: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_SIGLIP = _CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_IDEFICS3 = _SIGLIP | {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
_NORMED: dict[str, Any] = {"layer": -1, "final_norm": True, "fractional": True}
TOWERS = {
    "clip_vision_model": TowerFamily("clip", _CLIP),
    "clip": TowerFamily("clip", _CLIP),
    "siglip_vision_model": TowerFamily("siglip", _SIGLIP),
    "siglip": TowerFamily("siglip", _SIGLIP),
    "idefics3_vision": TowerFamily("siglip", _IDEFICS3, _NORMED),
    "smolvlm_vision": TowerFamily("siglip", _IDEFICS3, _NORMED),
}

# What other classes of transformers and of the original code are called before `ForCausalLM` and the like.
_STEMS = {
    "Llava": "llava", "LlavaNext": "llava_next", "LlavaOnevision": "llava_onevision",
    "Idefics3": "idefics3", "SmolVLM": "smolvlm",
    "Idefics3VisionTransformer": "idefics3_vision", "SmolVLMVisionTransformer": "smolvlm_vision",
    "CLIP": "clip", "CLIPVision": "clip_vision_model",
    "Siglip": "siglip", "SiglipVision": "siglip_vision_model",
}  # fmt: skip
_ENDING = re.compile(r"(For[A-Z]\w*|Model(WithProjection)?|(Image)?Processor(Fast|Pil)?|FeatureExtractor)$")


def model_type(class_name: str) -> str | None:
    """Return the model_type that a class of a model or its processor stands for; None if it is unknown."""
    stem = _ENDING.sub("", class_name)
    for kind, family in FAMILIES.items():
        if stem == family.class_name.removesuffix("ForCausalLM"):
            return kind
        if family.original is not None and stem == f"Llava{family.original}":
            return f"llava_{family.original.lower()}"
    return _STEMS.get(stem)
