"""Answers that follow a grammar, such as a JSON Schema: at every step, only tokens that fit it are allowed.

The library llguidance (of the extra `serve`) does the work. Grammars are written in its dialect of Lark.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pumice.engine.grammar_check import check_grammars, compile_grammar, refused
from pumice.errors import InputError, library, shorten
from pumice.tokens import Tokenizer

# No optional blanks: a small model could write them for ever.
COMPACT = {"whitespace_flexible": False}
LARGEST_SCHEMA = 1 << 16  # bytes
DEEPEST_SCHEMA = 32  # levels of nesting
# llguidance's extension, by which a schema would change the grammar that is made of it.
EXTENSION = "x-guidance"


def quoted(text: str) -> str:
    """Return a text as a grammar writes it."""
    return json.dumps(text)


def json_rule(schema: Mapping[str, Any] | None, *, lenient: bool = False) -> str:
    """Return the rule of values that follow a JSON Schema, whose root is `schema`; None for any object.

    lenient: leave out what the library cannot hold an answer to, instead of refusing it. Raises InputError if
    the schema is none, too large or too deep.
    """
    schema = {"type": "object"} if schema is None else schema
    if not isinstance(schema, Mapping):
        raise refused(f"it should be an object, not {shorten(schema, 40)}", "JSON schema")
    # 1. Level by level, because `json` needs stack for each.
    level, count = [schema], 0
    for _ in range(DEEPEST_SCHEMA):
        if any(isinstance(value, Mapping) and EXTENSION in value for value in level):
            raise refused(f"{EXTENSION} is not allowed", "JSON schema")
        level = [
            child
            for value in level
            if isinstance(value, Mapping | list | tuple)
            for child in (value.values() if isinstance(value, Mapping) else value)
        ]
        count += len(level)
        if count > LARGEST_SCHEMA:
            raise refused(f"it has more than {LARGEST_SCHEMA} values", "JSON schema")
    if level:
        raise refused(f"it has more than {DEEPEST_SCHEMA} levels", "JSON schema")
    # 2. Write it, with our own settings in its root.
    try:
        text = json.dumps({**schema, EXTENSION: {**COMPACT, "lenient": lenient}})
    except (TypeError, ValueError) as error:
        raise refused(str(error), "JSON schema") from error
    if len(text) > LARGEST_SCHEMA:
        raise refused(f"it has {len(text)} bytes, more than {LARGEST_SCHEMA}", "JSON schema")
    return f"%json {text}"


class Grammar:
    """A compiled grammar for any number of answers. Call it to start one; it is a `Prompt.constraint`.

    grammar: in Lark. vocabulary: rows of the model's embedding. stops: the tokens that may end an answer.
    what: its name in an InputError, which is raised if the grammar cannot be compiled. checked: whether
    `check_grammars` found nothing wrong with it; else it is asked now.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        grammar: str,
        vocabulary: int,
        stops: Sequence[int],
        what: str = "grammar",
        *,
        checked: bool = False,
    ) -> None:
        if not stops:
            raise InputError(
                f"this model ends its answers with text, not with a token; it cannot be held to a {what}"
            )
        self.vocabulary, self.stops, self.what = vocabulary, tuple(stops), what
        shared = _compiled(tokenizer, vocabulary, self.stops)
        reason = "" if checked else check_grammars([grammar])[0]
        if not reason:
            self._matcher, reason = compile_grammar(grammar, shared)
        if reason:
            raise refused(reason, what)

    def __call__(self) -> GrammarAnswer:
        return GrammarAnswer(self._matcher.deep_copy(), self.vocabulary, self.stops, self.what)


class JsonSchema(Grammar):
    """A compiled JSON Schema, or with None any JSON object. All else is as in `Grammar`."""

    def __init__(
        self, tokenizer: Tokenizer, schema: Mapping[str, Any] | None, vocabulary: int, stops: Sequence[int]
    ) -> None:
        super().__init__(tokenizer, f"start: {json_rule(schema)}", vocabulary, stops, "JSON schema")


class GrammarAnswer:
    """The state of one answer: a `pumice.engine.sampling.Constraint`."""

    def __init__(self, matcher: Any, vocabulary: int, stops: tuple[int, ...], what: str) -> None:
        self._matcher, self._vocabulary, self._stops, self._what = matcher, vocabulary, list(stops), what

    def allowed(self) -> Tensor:
        """Return which tokens may come next: (V,) bool. Raise InputError if the grammar is too complex."""
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
            raise refused("nothing can follow in this answer", self._what)
        return allowed

    def accept(self, token: int) -> None:
        """Record the chosen token. Raise InputError if it is not allowed, or the grammar is too complex."""
        if not self._matcher.consume_token(token):
            self._check()
            raise refused(f"token {token} cannot follow in this answer", self._what)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise refused(self._matcher.get_error(), self._what)


@functools.lru_cache(1)
def _compiled(tokenizer: Tokenizer, vocabulary: int, stops: tuple[int, ...]) -> Any:
    """Return the tokenizer in the library's form. It is kept: it takes a second and 30 MB."""
    guidance = library("llguidance", "answers of a grammar need the package llguidance", "serve")
    return guidance.LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocabulary, eos_token=list(stops))
