"""Train examples/finetune.yaml on pumice-tiny itself, as the tutorial does, and ask for every row it learned.

    python .ci/finetune.py

It ends with an error unless each answer of each row is given word by word.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pumice
from pumice.conversation import Conversation
from pumice.data.rows import ImageFinder, Rows
from pumice.train import run

ROOT = Path(__file__).parent.parent


def wrong_answers(model: Path, rows: Rows, pictures: ImageFinder) -> list[str]:
    """Return what the model says instead of each answer that it should have learned."""
    assistant = pumice.load(model)
    wrong = []
    for row in rows:
        messages = row.conversation(pictures).messages
        for number, message in enumerate(messages):
            if message.role == "assistant":
                said = "".join(assistant.stream(Conversation(messages[:number]), max_new_tokens=64))
                wrong += [f"{row.id}: {said!r}, not {message.text!r}"] if said != message.text else []
    return wrong


def main() -> int:
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        model = run(Path("examples/finetune.yaml"), [f"output={folder}/run"])
        wrong = wrong_answers(model, Rows("examples/finetune.jsonl"), ImageFinder("examples"))
    print("\n".join(wrong) or "every answer of examples/finetune.jsonl is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
