"""Answers that follow a grammar, such as a JSON Schema: at every step, only tokens that fit it are allowed.

The library llguidance (of the extra `serve`) does the work. Grammars are written in its dialect of Lark.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pumice.errors import InputError, install
from pumice.tokens import Tokenizer

# No optional blanks: a small model could write them for ever.
COMPACT = {"whitespace_flexible": False}

_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")


def quoted(text: str) -> str:
    """Return a text as a grammar writes it."""
    return json.dumps(text)


def json_rule(schema: Mapping[str, Any] | None, *, lenient: bool = False) -> str:
    """Return the rule of values that follow a JSON Schema, whose root is `schema`; None for any object.

    lenient: leave out what the library cannot hold an answer to, instead of refusing it.
    """
    schema = {"type": "object"} if schema is None else schema
    try:
        return f"%json {json.dumps({**schema, 'x-guidance': {**COMPACT, 'lenient': lenient}})}"
    except (TypeError, ValueError) as error:
        raise InputError(f"the JSON schema cannot be followed ({error}); simplify it") from error


class Grammar:
    """A compiled grammar for any number of answers. Call it to start one; it is a `Prompt.constraint`.

    grammar: in Lark. vocabulary: rows of the model's embedding. stops: the tokens that may end an answer.
    what: its name in an InputError, which is raised if the grammar cannot be compiled.
    """

    def __init__(
        self, tokenizer: Tokenizer, grammar: str, vocabulary: int, stops: Sequence[int], what: str = "grammar"
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
        self._tokenizer = _compiled(tokenizer, vocabulary, self.stops)
        try:
            self._grammar = llguidance.LLMatcher.grammar_from_lark(grammar)
            message = llguidance.LLMatcher.validate_grammar(self._grammar, self._tokenizer)
        except (TypeError, ValueError) as error:
            message = str(error)
        if message:
            reason = _PLACE.sub("", message.strip().splitlines()[0])  # the other lines repeat the grammar
            raise InputError(f"the {what} cannot be followed ({reason}); simplify it")

    def __call__(self) -> GrammarAnswer:
        import llguidance

        matcher = llguidance.LLMatcher(self._tokenizer, self._grammar)
        return GrammarAnswer(matcher, self.vocabulary, self.stops)


class JsonSchema(Grammar):
    """A compiled JSON Schema, or with None any JSON object. All else is as in `Grammar`."""

    def __init__(
        self, tokenizer: Tokenizer, schema: Mapping[str, Any] | None, vocabulary: int, stops: Sequence[int]
    ) -> None:
        super().__init__(tokenizer, f"start: {json_rule(schema)}", vocabulary, stops, "JSON schema")


class GrammarAnswer:
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
            raise RuntimeError(f"token {token} cannot follow in this grammar: {self._matcher.get_error()}")


@functools.lru_cache(2)
def _compiled(tokenizer: Tokenizer, vocabulary: int, stops: tuple[int, ...]) -> Any:
    """Return the tokenizer in the library's form. It is kept: this takes longer than most schemas."""
    import llguidance

    return llguidance.LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocabulary, eos_token=list(stops))
