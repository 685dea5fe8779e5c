"""Draw docs/assets/answers.jpg, the picture of the README: these photographs, with what pumice-tiny says.

    python examples/sheet.py

The model answers four questions well and two wrongly; these are marked. The answers are as they come. Run it
again when the model changes, and look at what is marked.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

import pumice

HERE = Path(__file__).parent
TARGET = HERE.parent / "docs" / "assets" / "answers.jpg"
QUESTIONS = (
    ("dog.jpg", "Where is the dog?", ""),
    ("horses.jpg", "What animals are these?", "Wrong: horses."),
    ("kitten.jpg", "What animal is this?", ""),
    ("spaniels.jpg", "How many dogs are there?", "Wrong: two."),
    ("musicians.jpg", "What is happening here?", ""),
    ("pavilion.jpg", "Is this inside or outside?", ""),
)  # photograph, question, what is wrong with the answer
WIDTH, HEIGHT, TEXT, GAP = 380, 250, 96, 16  # of a photograph, of the words below it, between them


def main() -> None:
    assistant = pumice.load("pumice-tiny")
    sheet = Image.new("RGB", (3 * (WIDTH + GAP) + GAP, 2 * (HEIGHT + TEXT + GAP) + GAP), "#f6f4f1")
    draw = ImageDraw.Draw(sheet)
    for number, (name, question, wrong) in enumerate(QUESTIONS):
        row, column = divmod(number, 3)
        x, y = GAP + column * (WIDTH + GAP), GAP + row * (HEIGHT + TEXT + GAP)
        with Image.open(HERE / name) as photograph:
            sheet.paste(ImageOps.fit(photograph.convert("RGB"), (WIDTH, HEIGHT)), (x, y))
        answer = assistant.ask(HERE / name, question)
        draw.text((x, y + HEIGHT + 8), question, "#6b6259", ImageFont.load_default(17))
        lines = textwrap.wrap(answer, 38)[:2]
        draw.multiline_text(
            (x, y + HEIGHT + 32), "\n".join(lines), "#1d1a17", ImageFont.load_default(19), spacing=3
        )
        below = y + HEIGHT + 32 + 24 * len(lines)
        draw.text((x, below), wrong, "#b3261e", ImageFont.load_default(16))
        print(f"{name}: {question} {answer} {wrong}")
    sheet.save(TARGET, quality=82, optimize=True, progressive=True)
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
