"""What test files ask."""

from __future__ import annotations

from typing import Any

SHORT = {"max_new_tokens": 12}


def image_part(source: Any) -> dict[str, Any]:
    return {"type": "image", "image": source}
