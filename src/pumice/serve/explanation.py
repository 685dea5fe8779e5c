"""The explanation of an answer as JSON for a web page."""

from __future__ import annotations

from typing import Any

from pumice.assistant import Assistant, explain
from pumice.conversation import Conversation
from pumice.explain.page import to_json


def explanation_json(
    assistant: Assistant, conversation: Conversation, answer: str | None = None, **options: Any
) -> dict[str, Any]:
    """Return the explanation of an answer for `json.dumps`, in the form that `mount` of page.js reads.

    answer: None lets the model answer first. The result holds no pictures. options: those of
    `pumice.assistant.explain`. Raises InputError when the conversation holds no picture.
    """
    return to_json(explain(assistant, conversation, answer, **options), pictures=False)
