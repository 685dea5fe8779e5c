"""Answers that follow a JSON Schema: at every step, only tokens that keep the answer valid are allowed.

The library llguidance (of the extra `serve`) does the work.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pumice.engine.schema_check import SchemaCheck, compile_schema, refused, schema_text
from pumice.errors import InputError, install
from pumice.tokens import Tokenizer


class JsonSchema:
    """A compiled schema for any number of answers. Call it to start one; it is a `Prompt.constraint`.

    schema: a JSON Schema, or None for any JSON object. vocabulary: rows of the model's embedding. stops: the
    tokens that may end an answer. checked: a `SchemaCheck` of the schema has passed; else one runs now.
    Raises InputError if the schema cannot be compiled.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        schema: Mapping[str, Any] | None,
        vocabulary: int,
        stops: Sequence[int],
        *,
        checked: bool = False,
    ) -> None:
        if not stops:
            raise InputError(
                "this model ends its answers with text, not with a token; it cannot be held to JSON"
            )
        self.vocabulary, self.stops = vocabulary, tuple(stops)
        shared = _shared_tokenizer(tokenizer, vocabulary, self.stops)
        text = schema_text({"type": "object"} if schema is None else schema)
        if not checked:
            SchemaCheck(text).run()
        self._matcher = compile_schema(text, shared)

    def __call__(self) -> JsonAnswer:
        return JsonAnswer(self._matcher.deep_copy(), self.vocabulary, self.stops)


@functools.lru_cache(maxsize=1)  # it takes a second and 30 MB, for any number of schemas
def _shared_tokenizer(tokenizer: Tokenizer, vocabulary: int, stops: tuple[int, ...]) -> Any:
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise InputError(
            f"answers of a JSON schema need the package llguidance: {install('serve')}"
        ) from error
    return LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocabulary, eos_token=list(stops))


class JsonAnswer:
    """The state of one answer: a `pumice.engine.sampling.Constraint`."""

    def __init__(self, matcher: Any, vocabulary: int, stops: tuple[int, ...]) -> None:
        self._matcher, self._vocabulary, self._stops = matcher, vocabulary, list(stops)

    def allowed(self) -> Tensor:
        """Return which tokens may come next: (V,) bool. Raise InputError if the schema is too complex."""
        if self._matcher.is_stopped() and self._matcher.is_accepting():
            allowed = torch.zeros(self._vocabulary, dtype=torch.bool)
            allowed[self._stops] = True
            return allowed
        # The matcher gives one bit per token. If it finds an error now, it would allow the end.
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        allowed = bits.flatten()[: self._vocabulary].bool()
        if not allowed.any():
            raise refused("nothing can follow in this answer")
        return allowed

    def accept(self, token: int) -> None:
        """Record the chosen token. Raise InputError if it is not allowed, or if the schema is too complex."""
        if not self._matcher.consume_token(token):
            self._check()
            raise refused(f"token {token} cannot follow in this answer")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise refused(self._matcher.get_error())
