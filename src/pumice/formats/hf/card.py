"""The model card of an exported folder: how to ask the model in transformers and in vLLM."""

from __future__ import annotations

from pathlib import Path


def model_card(bos: str | None) -> str:
    """Return README.md. bos: the token that a prompt begins with, if there is one."""
    parts = ["card.txt"] if bos is None else ["card.txt", "card_bos.txt"]
    texts = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in parts]
    return "\n".join(texts).replace("BOS_TOKEN", bos or "")
