"""The keys of GGUF metadata that are read, with the type and range of each (ggml's docs/gguf.md).

A file may hold any other key, of any value. Sizes that a model cannot have are `pumice.config`'s to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pumice.errors import InputError, shorten


class _Rule(NamedTuple):
    """What a value must be: one value of a kind, or a list of such values."""

    kind: type
    many: bool = False
    low: float = 0
    high: float = 2**31 - 1

    def allows(self, value: Any) -> bool:
        if not self.many:
            return self._allows_one(value)
        return isinstance(value, list) and all(map(self._allows_one, value))

    def _allows_one(self, value: Any) -> bool:
        if self.kind is float:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return number and math.isfinite(value) and self.low <= value <= self.high
        if self.kind is int:
            return type(value) is int and self.low <= value <= self.high
        return isinstance(value, self.kind)

    def __str__(self) -> str:
        """Return what the value should be, as an error message says it."""
        names = {
            str: ("text", "texts"),
            bool: ("true or false", ""),
            int: ("a whole number", "whole numbers"),
        }
        words = names.get(self.kind, ("a number", "numbers"))[self.many]
        limits = f" from {self.low:g} to {self.high:g}" if self.kind in (int, float) else ""
        return f"{'a list of ' * self.many}{words}{limits}"


SPECIAL_TOKENS = ("bos", "eos", "eot", "eom", "unknown")
# `*` stands for the architecture, "llama" and so on; "clip." and "pumice." begin the keys of an mmproj.
_RULES = {
    key: rule
    for keys, rule in (
        (
            "general.architecture *.rope.scaling.type clip.projector_type clip.vision.projector_type "
            "clip.vision.mm_patch_merge_type pumice.vision tokenizer.chat_template tokenizer.ggml.model "
            "tokenizer.ggml.pre",
            _Rule(str),
        ),
        (
            "clip.has_llava_projector clip.use_gelu clip.use_silu tokenizer.ggml.add_bos_token "
            "tokenizer.ggml.add_space_prefix",
            _Rule(bool),
        ),
        (
            "*.attention.head_count *.attention.head_count_kv *.attention.key_length "
            "*.attention.sliding_window *.context_length *.embedding_length *.feed_forward_length "
            "*.rope.dimension_count clip.vision.attention.head_count clip.vision.embedding_length "
            "clip.vision.feed_forward_length clip.vision.image_size clip.vision.patch_size",
            _Rule(int, low=1),
        ),
        ("*.block_count clip.vision.block_count split.count", _Rule(int)),
        (" ".join(f"tokenizer.ggml.{name}_token_id" for name in SPECIAL_TOKENS), _Rule(int)),
        ("general.alignment", _Rule(int, low=1, high=2**20)),
        ("*.attention.layer_norm_rms_epsilon clip.vision.attention.layer_norm_epsilon", _Rule(float, high=1)),
        ("*.rope.freq_base", _Rule(float, low=1, high=1e12)),
        ("*.rope.scaling.factor *.rope.scale_linear", _Rule(float, low=1e-3, high=1e6)),
        ("tokenizer.ggml.merges tokenizer.ggml.tokens", _Rule(str, many=True)),
        ("clip.vision.feature_layer tokenizer.ggml.token_type", _Rule(int, many=True)),
        ("clip.vision.image_grid_pinpoints", _Rule(int, many=True, low=1)),
        ("clip.vision.image_mean", _Rule(float, many=True, high=1)),
        ("clip.vision.image_std", _Rule(float, many=True, low=1e-6, high=1e6)),
        ("tokenizer.ggml.scores", _Rule(float, many=True, low=-1e30, high=1e30)),
    )
    for key in keys.split()
}


def check_metadata(metadata: Mapping[str, Any], label: str, architecture: str | None = None) -> None:
    """Raise InputError if a key that is read has a value of another type or outside its range.

    label: the file's name, for the message. architecture: whose sizes to check; None: only what any file has.
    """
    for pattern, rule in _RULES.items():
        if architecture is None and pattern.startswith("*"):
            continue
        key = pattern.replace("*", architecture or "", 1)
        if key in metadata and not rule.allows(metadata[key]):
            raise InputError(
                f"{label}: {key} should be {rule}, not {shorten(metadata[key], 60)}; fetch the file again"
            )
    # A token's number must be that of a token.
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    for name in SPECIAL_TOKENS:
        key = f"tokenizer.ggml.{name}_token_id"
        if metadata.get(key, -1) >= len(tokens):
            raise InputError(f"{label}: {key} is {metadata[key]}, but there are {len(tokens)} tokens")
