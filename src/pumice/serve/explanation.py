"""An answer explained, as the JSON that a page of the server's or of another's shows."""

from __future__ import annotations

from typing import Any

from pumice.assistant import Assistant, explain
from pumice.conversation import Conversation
from pumice.explain.page import to_json


def explanation_json(
    assistant: Assistant, conversation: Conversation, answer: str | None = None, **options: Any
) -> dict[str, Any]:
    """An answer explained, ready for `json.dumps` and for `mount` of page.js; no pictures in it.

    options: of `pumice.assistant.explain`. Raises InputError, whose sentence a page can show, when there is
    no picture in the conversation.
    """
    return to_json(explain(assistant, conversation, answer, **options), pictures=False)
