"""The contents of a tokenizer's files, the same for every format."""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer with what its files say. bos, eos: the tokens' texts, None if unknown.

    adds_bos: whether a text that is no chat begins with bos. chat_template: the source of the Jinja template.
    other_templates: those that other files hold, where they differ.
    sentencepiece: the bytes of tokenizer.model, if there is one, for programs that read nothing else.
    """

    backend: tokenizers.Tokenizer
    bos: str | None = None
    eos: str | None = None
    adds_bos: bool = False
    chat_template: str | None = None
    other_templates: tuple[str, ...] = ()
    sentencepiece: bytes | None = None

    @property
    def bos_id(self) -> int | None:
        """The id of the token that begins a text, unless a chat format says otherwise; None if none."""
        return self.backend.token_to_id(self.bos) if self.adds_bos and self.bos is not None else None
