"""Which config fields a piece of code implements: a field that it does not list must keep its default.

Every consumer of a config has one `Capability`: the modules of the model, compiled code, each exporter. So
a field that is added for one of them is refused by name in all others, and never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pumice.errors import InputError, shorten

# Fields that many consumers implement: those of DecoderConfig that make it a Llama, Mistral, Qwen2 or Qwen3,
# and all of some other classes. Add a field here only if every consumer that uses the list implements it.
LLAMA = (
    "vocab_size width depth heads kv_heads head_dim mlp_width context rope_theta rope_scaling norm_eps "
    "tied_head qkv_bias qk_norm sliding_window"
)

# The other fields of DecoderConfig: those of Gemma 2.
GEMMA2 = (
    "window_pattern activation post_norms norm_offset embed_scale attention_scale attention_softcap "
    "logit_softcap"
)
CHAT = (
    "user assistant stop answer between system default_system system_in_user specials trim opening stop_once "
    "earlier tools"
)
PICTURED = "text_first image_line shared_line"  # fields of ChatFormat that only questions with pictures show
ROPE_SCALING = "kind factor low_freq_factor high_freq_factor original_context"
LORA = "rank alpha dropout targets"
_PIXELS = "mode mean std resample pad_color"  # explanations hide pictures behind pad_color in every mode
IMAGE = f"{_PIXELS} pinpoints unpad max_tiles several longest_edge enlarge"  # all fields of ImagePolicy
# The fields of ImagePolicy that each mode uses, and those of TileMarks and VideoPolicy.
MODE_FIELDS = {
    "pad": _PIXELS,
    "crop": _PIXELS,
    "squash": f"{_PIXELS} longest_edge",
    "anyres": f"{_PIXELS} pinpoints unpad max_tiles several",
    "split": f"{_PIXELS} several longest_edge",
    "grid": f"{_PIXELS} several longest_edge enlarge",
}
MODE_MARKS = dict.fromkeys(("pad", "crop", "squash"), "whole end number") | {
    "anyres": "",  # its tiles are joined, so no text can stand between them
    "split": "tile row between whole end number",
    "grid": "tile row whole end number",
}
_VIDEO = "max_frames fps longest_edge timestamps"
MODE_VIDEO = dict.fromkeys(MODE_FIELDS, _VIDEO) | {"anyres": f"{_VIDEO} pool average"}  # joined tiles shrink
# The field's values that are implemented; None: all that the config itself allows.
Values = tuple[Any, ...] | None
T = TypeVar("T")


def fields(names: str, **some: Values) -> dict[str, Values]:
    """Return the fields of one config class: `names` with all of their values, `some` with those given."""
    return dict.fromkeys(names.split()) | some


def only(names: str, part: T | None) -> T | None:
    """Return a part of a config with all fields but the named ones at their defaults; None without names."""
    if part is None or not names:
        return None
    return type(part)(**{name: getattr(part, name) for name in names.split()})


@dataclass(frozen=True)
class Capability:
    """What `consumer` implements: config class -> its fields -> their values."""

    consumer: str
    fields: Mapping[type, Mapping[str, Values]]

    def unsupported(self, config: Any) -> str | None:
        """Return the first field of a config dataclass that is set but not implemented, in words, or None.

        A field is set if its value is not the default. Configs inside the config are followed.
        """
        return next(self._unsupported(config, ""), None)

    def check(self, config: Any) -> None:
        """Raise InputError if a field of the config is set but not implemented."""
        if reason := self.unsupported(config):
            raise InputError(f"{reason}; leave it at its default, or implement it there (docs/extending.md)")

    def _unsupported(self, config: Any, path: str) -> Iterator[str]:
        listed = self.fields.get(type(config), {})
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name not in listed:
                if value != _default(field):
                    yield f"{self.consumer} does not implement {path}{field.name} = {shorten(value)}"
            elif dataclasses.is_dataclass(value):
                yield from self._unsupported(value, f"{path}{field.name}.")
            elif (values := listed[field.name]) is not None and value not in values:
                only = " or ".join(map(repr, values))
                name = f"{path}{field.name}"
                yield f"{self.consumer} does not implement {name} = {shorten(value)}, only {only}"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default  # MISSING, which equals no value: a size is always set
