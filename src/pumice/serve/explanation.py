"""The explanation of an answer as JSON for a web page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pumice.assistant import Assistant, explain
from pumice.conversation import Conversation
from pumice.errors import InputError
from pumice.explain.page import to_json

MAX_EXPLAINED = 512  # tokens of an answer to explain


def check_explained(assistant: Assistant, texts: Sequence[str]) -> None:
    """Raise InputError if the answer to explain, given as its texts, has too many tokens."""
    tokenizer = assistant.processor.tokenizer
    tokenizer.check_length(texts, MAX_EXPLAINED, "the answer to explain")
    tokens = sum(len(tokenizer.pieces(text)) for text in texts)
    if tokens > MAX_EXPLAINED:
        raise InputError(
            f"the answer has {tokens} tokens, at most {MAX_EXPLAINED} can be explained; send a part of it"
        )


def explanation_json(
    assistant: Assistant, conversation: Conversation, answer: str | None = None, **options: Any
) -> dict[str, Any]:
    """Return the explanation of an answer for `json.dumps`, in the form that `mount` of page.js reads.

    answer: None lets the model answer first. The result holds no pictures. options: those of
    `pumice.assistant.explain`. Raises InputError when the conversation holds no picture.
    """
    return to_json(explain(assistant, conversation, answer, **options), pictures=False)
