"""Answers that are JSON of a given schema: at every step only tokens that can still lead there are allowed.

Knows: a tokenizer, JSON Schema by way of the library llguidance (of the extra `serve`). Does not know:
models; the engine asks for the tokens that are allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pumice.errors import InputError
from pumice.tokens import Tokenizer


class JsonSchema:
    """A schema, ready for any number of answers; calling it begins one. `Prompt.constraint` takes it.

    schema: a JSON Schema, or None for any JSON object. vocabulary: rows of the model's embedding. stops: the
    tokens that may end an answer. Raises InputError when the schema is none that can be followed.
    """

    def __init__(
        self, tokenizer: Tokenizer, schema: Mapping[str, Any] | None, vocabulary: int, stops: Sequence[int]
    ) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise InputError(
                "answers of a JSON schema need the package llguidance; pip install 'pumice[serve]'"
            ) from error
        if not stops:
            raise InputError(
                "this model ends its answers with text, not with a token; it cannot be held to JSON"
            )
        self.vocabulary, self.stops = vocabulary, tuple(stops)
        wanted = {"type": "object"} if schema is None else schema
        try:
            # Blanks only where they must be: a small model could write them for ever.
            self._grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(wanted), overrides={"whitespace_flexible": False}
            )
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer.backend.to_str(), n_vocab=vocabulary, eos_token=list(stops)
            )
            wrong = llguidance.LLMatcher.validate_grammar(self._grammar, self._tokenizer)
        except (TypeError, ValueError) as error:
            wrong = str(error)
        if wrong:
            raise InputError(f"the JSON schema cannot be followed ({' '.join(wrong.split())}); simplify it")

    def __call__(self) -> JsonAnswer:
        import llguidance

        return JsonAnswer(llguidance.LLMatcher(self._tokenizer, self._grammar), self.vocabulary, self.stops)


class JsonAnswer:
    """One answer on its way: a `pumice.engine.sampling.Constraint`."""

    def __init__(self, matcher: Any, vocabulary: int, stops: tuple[int, ...]) -> None:
        self._matcher, self._vocabulary, self._stops = matcher, vocabulary, list(stops)

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next."""
        if self._matcher.is_stopped():
            allowed = torch.zeros(self._vocabulary, dtype=torch.bool)
            allowed[self._stops] = True
            return allowed
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten()[: self._vocabulary].bool()

    def accept(self, token: int) -> None:
        """This one came."""
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"token {token} cannot follow in this JSON: {self._matcher.get_error()}")
