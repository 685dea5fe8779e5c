"""What the files of a tokenizer say, of whatever format they are."""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers


@dataclass(frozen=True)
class TokenizerFiles:
    """What a tokenizer's files say. bos, eos: the tokens' texts, None where unknown.

    adds_bos: a text that is not a chat begins with bos. chat_template: in Jinja, as written. sentencepiece:
    the bytes of tokenizer.model, where there is one, for code that reads nothing else.
    """

    backend: tokenizers.Tokenizer
    bos: str | None = None
    eos: str | None = None
    adds_bos: bool = False
    chat_template: str | None = None
    sentencepiece: bytes | None = None

    @property
    def bos_id(self) -> int | None:
        """What stands before everything, unless a chat format says otherwise."""
        return self.backend.token_to_id(self.bos) if self.adds_bos and self.bos is not None else None
