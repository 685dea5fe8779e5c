"""Train examples/finetune.yaml on pumice-tiny itself, as the tutorial does, and ask for every row it learned.

    python .ci/finetune.py

It ends with an error unless each answer of each row is given word by word. What it trained, and how many
answers were right, is kept in finetune.json beside it: a test compares that with the files as they are now.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import pumice
from pumice.conversation import Conversation
from pumice.data.rows import ImageFinder, Rows
from pumice.train import run

ROOT = Path(__file__).parent.parent
KEPT = Path(__file__).with_suffix(".json")
FILES = (
    "examples/finetune.yaml", "examples/finetune.jsonl", "recipes/finetune.yaml",
    "examples/dog.jpg", "examples/kitten.jpg", "examples/horses.jpg", "examples/spaniels.jpg",
    "src/pumice/models/pumice-tiny/config.json", "src/pumice/models/pumice-tiny/model.safetensors",
    "src/pumice/models/pumice-tiny/parts.json",
)  # fmt: skip


def digests() -> dict[str, str]:
    """Return the SHA-256 of each file that is trained with: recipe, rows, pictures and weights."""
    return {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in FILES}


def wrong_answers(model: Path, rows: Rows, pictures: ImageFinder) -> tuple[int, list[str]]:
    """Return how many answers there are, and what the model says instead of each that it has not learned."""
    assistant = pumice.load(model)
    count, wrong = 0, []
    for row in rows:
        messages = row.conversation(pictures).messages
        for number, message in enumerate(messages):
            if message.role == "assistant":
                count += 1
                said = "".join(assistant.stream(Conversation(messages[:number]), max_new_tokens=64))
                wrong += [f"{row.id}: {said!r}, not {message.text!r}"] if said != message.text else []
    return count, wrong


def main() -> int:
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        model = run(Path("examples/finetune.yaml"), [f"output={folder}/run"])
        count, wrong = wrong_answers(model, Rows("examples/finetune.jsonl"), ImageFinder("examples"))
    kept = {"files": digests(), "answers": count, "right": count - len(wrong)}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print("\n".join(wrong) or "every answer of examples/finetune.jsonl is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
