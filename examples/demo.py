"""Ask `pumice-tiny` about the photographs in this folder. Run by `make demo`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pumice

HERE = Path(__file__).parent
QUESTIONS = (
    ("dog.jpg", "Where is the dog?", ""),
    ("dog.jpg", "Is there a cat in the picture?", ""),
    ("horses.jpg", "What colour is the sky?", ""),
    ("kitten.jpg", "What animal is this?", ""),
    ("musicians.jpg", "What is happening here?", ""),
    ("pavilion.jpg", "Is this inside or outside?", ""),
    ("spaniels.jpg", "How many dogs are there?", "two; it counts badly"),
)  # photograph, question, what is right where the answer is wrong


def main() -> int:
    start = time.perf_counter()
    try:
        assistant = pumice.load("pumice-tiny")
        loaded = time.perf_counter()
        for picture, question, right in QUESTIONS:
            print(f"\n{picture}\n  Q: {question}\n  A: ", end="", flush=True)
            print(assistant.ask(HERE / picture, question), flush=True)
            if right:
                print(f"     (wrong: {right})", flush=True)
    except pumice.InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    answered = time.perf_counter()
    print(
        f"\nLoading took {loaded - start:.1f} s, {len(QUESTIONS)} answers {answered - loaded:.1f} s. "
        "Ask about a photograph of your own:\n"
        '  .venv/bin/pumice ask PHOTO "What is happening here?"'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
