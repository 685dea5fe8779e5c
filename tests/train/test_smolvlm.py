"""A model in SmolVLM's shape is fine-tuned by a recipe, and transformers computes what was learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pumice import load
from pumice.config import IMAGE_TOKEN
from pumice.conversation import Conversation, user_message
from pumice.data.rows import Rows
from pumice.formats.export import export
from pumice.formats.hf.idefics3 import IMAGE
from pumice.formats.read import read_model
from pumice.train import run


@pytest.mark.parametrize(
    "stage",
    [
        {"learn": {"connector": 3e-3, "decoder": 3e-3}},
        {"learn": {"connector": 3e-3, "lora": 1e-2}, "lora": {"rank": 16, "alpha": 32.0}},
    ],
    ids=["full", "lora"],
)
def test_eight_rows_are_learned_and_exported(
    stage: dict[str, Any], models: ModuleType, make_recipe: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    # 1. From transformers' layout, by a recipe, until every answer is known.
    export(models.tiny(models.ARCHITECTURES["SigLIP, split (SmolVLM)"]), "hf", tmp_path / "base")
    trained = run(make_recipe(model=str(tmp_path / "base"), stage=stage, epochs=60, batch=8, pack_tokens=512))
    assistant = load(trained, quantize=None)
    asked = [
        (rows / row.image[0], row.turns[0][1].removeprefix("<image>\n"), row.turns[1][1])
        for row in Rows(rows / "rows.jsonl")
    ]
    for picture, question, answer in asked:
        assert assistant.ask(picture, question, temperature=0.0, max_new_tokens=8) == answer
    # 2. The export gives the same logits in transformers.
    export(read_model(trained), "hf", tmp_path / "out")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    sample = assistant.processor.prompt(Conversation((user_message(asked[0][1], [Image.open(asked[0][0])]),)))
    pixels = torch.from_numpy(assistant.processor.pixels(sample.images, sample.layouts))
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = np.where(sample.input_ids == IMAGE_TOKEN, tokens.convert_tokens_to_ids(IMAGE), sample.input_ids)
    with torch.inference_mode():
        expected = theirs(input_ids=torch.from_numpy(ids)[None], pixel_values=pixels[None]).logits[0]
        prompt = assistant.prompt(Conversation((user_message(asked[0][1], [asked[0][0]]),)))
        hidden = assistant.model(prompt.input_ids[None], prompt.encode_images())
        difference = (assistant.model.decoder.logits(hidden)[0] - expected).abs().max().item()
    assert difference < 1e-4 * expected.abs().max().item()
