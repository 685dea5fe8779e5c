"""Answers that follow a JSON Schema: at every step, only tokens that keep the answer valid are allowed.

The library llguidance (of the extra `serve`) does the work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pumice.errors import InputError, install
from pumice.tokens import Tokenizer


class JsonSchema:
    """A compiled schema for any number of answers. Call it to start one; it is a `Prompt.constraint`.

    schema: a JSON Schema, or None for any JSON object. vocabulary: rows of the model's embedding. stops: the
    tokens that may end an answer. Raises InputError if the schema cannot be compiled.
    """

    def __init__(
        self, tokenizer: Tokenizer, schema: Mapping[str, Any] | None, vocabulary: int, stops: Sequence[int]
    ) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise InputError(
                f"answers of a JSON schema need the package llguidance: {install('serve')}"
            ) from error
        if not stops:
            raise InputError(
                "this model ends its answers with text, not with a token; it cannot be held to JSON"
            )
        self.vocabulary, self.stops = vocabulary, tuple(stops)
        schema = {"type": "object"} if schema is None else schema
        try:
            # No optional blanks: a small model could write them for ever.
            self._grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_flexible": False}
            )
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer.backend.to_str(), n_vocab=vocabulary, eos_token=list(stops)
            )
            message = llguidance.LLMatcher.validate_grammar(self._grammar, self._tokenizer)
        except (TypeError, ValueError) as error:
            message = str(error)
        if message:
            raise InputError(f"the JSON schema cannot be followed ({' '.join(message.split())}); simplify it")

    def __call__(self) -> JsonAnswer:
        import llguidance

        return JsonAnswer(llguidance.LLMatcher(self._tokenizer, self._grammar), self.vocabulary, self.stops)


class JsonAnswer:
    """The state of one answer: a `pumice.engine.sampling.Constraint`."""

    def __init__(self, matcher: Any, vocabulary: int, stops: tuple[int, ...]) -> None:
        self._matcher, self._vocabulary, self._stops = matcher, vocabulary, list(stops)

    def allowed(self) -> Tensor:
        """Return which tokens may come next: (V,) bool."""
        if self._matcher.is_stopped():
            allowed = torch.zeros(self._vocabulary, dtype=torch.bool)
            allowed[self._stops] = True
            return allowed
        # The matcher gives one bit per token.
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten()[: self._vocabulary].bool()

    def accept(self, token: int) -> None:
        """Record the chosen token. Raise RuntimeError if it is not allowed."""
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"token {token} cannot follow in this JSON: {self._matcher.get_error()}")
