"""Logits and answers of three generations of LLaVA, as the original code computed them on a CPU in fp32.

The models are too large for the repository; they stand beside it, in ../shared/golden/original, or nowhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pumice.assistant import Assistant
from pumice.conversation import Conversation, user_message
from pumice.engine.generate import naive_generate
from pumice.formats.load import open_model

FOLDER = Path(__file__).parents[1].parent / "shared" / "golden" / "original"
TEMPLATES = {"v1.0": "llava_v0", "v1.5": "v1", "v1.6": "v1"}


@pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared/golden/original is not here")
@pytest.mark.parametrize("generation", TEMPLATES)
def test_as_the_original_code_answered(generation: str) -> None:
    rows: list[dict[str, Any]] = json.loads((FOLDER / f"{generation}.json").read_text(encoding="utf-8"))
    assert len(rows) == 12
    # merge=False: the tower's fp16 weights become fp32, and are not multiplied as bf16 where that is faster.
    opened = open_model(
        FOLDER / generation, merge=False, template=TEMPLATES[generation], tower=str(FOLDER / "clip")
    )
    assistant = Assistant(opened.model, opened.processor)
    for row in rows:
        picture = FOLDER / row["picture"]
        conversation = Conversation((user_message(row["question"], [picture]),))
        text = "".join(
            piece if isinstance(piece, str) else "<image>"
            for piece in assistant.processor.pieces(conversation)
        )
        assert text == row["prompt"]
        logits = assistant.logits(picture, row["question"])
        assert logits.argmax(-1).tolist() == row["argmax"]
        last = logits[-1, : len(row["last"])]
        # They are recorded with five digits. Their README measured 1.5e-5.
        assert (last - torch.tensor(row["last"])).abs().max() < 1e-4
        assert logits[-1].norm().item() == pytest.approx(row["last_norm"], rel=1e-4)
        prompt = assistant.prompt(conversation, temperature=0.0, max_new_tokens=8)
        assert naive_generate(assistant.model, prompt) == row["greedy"][1:]
