"""Draw an explanation as a strip: the image, then one panel per word that is light where the word looked.

Articles and punctuation get no panel.

As in figure 3 of Show, Attend and Tell (arXiv 1502.03044), a dark image turns white with the weight, up to an
opacity of 0.8.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from pumice.explain.explanation import Explanation, PictureMap

OPACITY = 0.8
MIN_SIDE = 20  # pixels; the panel of a thinner image is stretched
GAP, MARGIN = 6, 16
WIDEST = 1600  # pixels of the strip
INK, SOFT, TINT = (27, 27, 31), (85, 86, 94), (11, 87, 208)


def strip(explanation: Explanation) -> Image.Image:
    """Draw an explanation as an RGB image, at most WIDEST wide. Many words get smaller panels."""
    # 1. Choose sizes: of a panel (`wide` x `tall`), of a line of text, and how many panels fit `across`.
    drawn_words = [number for number, word in enumerate(explanation.words) if word.is_drawn]
    side = 220 if len(drawn_words) <= 24 else 150 if len(drawn_words) <= 80 else 96
    sizes = _sizes(explanation.pictures, side)
    wide = sum(width for width, _ in sizes) + 2 * (len(sizes) - 1)
    tall = max(height for _, height in sizes)
    label = _font(max(12, side // 11))
    line = math.ceil(label.getbbox("Ágy")[3]) + 6
    across = max(1, (WIDEST - 2 * MARGIN + GAP) // (wide + GAP))
    panels = 1 + len(drawn_words)
    across = min(across, panels)
    text = _font(17)
    width = max(across * (wide + GAP) - GAP, 600)
    head = [
        *_wrap(explanation.question, text, width),
        *_wrap(explanation.answer or "(an empty answer)", text, width),
    ]
    verdict = _wrap(explanation.reliance.verdict(), _font(14), width)
    top = MARGIN + (len(head) + len(verdict)) * 24 + 8
    rows = math.ceil(panels / across)
    # 2. Write question, answer and verdict above the panels.
    canvas = Image.new("RGB", (width + 2 * MARGIN, top + rows * (tall + line + GAP) + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    for number, words in enumerate([*head, *verdict]):
        ink, font = (INK, text) if number < len(head) else (SOFT, _font(14))
        pen.text((MARGIN, MARGIN + 24 * number), words, fill=ink, font=font)
    brightest = max(
        (_peak(explanation.pictures, word) for word in range(len(explanation.words))), default=0.0
    )
    loss = explanation.reliance.loss_grey
    # 3. Draw the panels: first the images alone, then one panel per word.
    for panel in range(panels):
        x = MARGIN + panel % across * (wide + GAP)
        y = top + panel // across * (tall + line + GAP)
        word = drawn_words[panel - 1] if panel else -1
        if word >= 0:
            lean = float(np.clip(loss[word] / 3, 0, 1))  # full colour at 3 nats: twenty times less likely
            shade = tuple(round(a + (b - a) * lean) for a, b in zip(INK, TINT, strict=True))
            if lean > 0.02:
                pen.rectangle((x, y + line - 4, x + max(2, round(wide * lean)), y + line - 3), fill=TINT)
            pen.text((x, y), _cut(explanation.words[word].text, label, wide), fill=shade, font=label)
        for picture, size in zip(explanation.pictures, sizes, strict=True):
            drawn = picture.image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
            if word >= 0:
                peak = _peak(explanation.pictures, word)
                # A word with spread attention stays darker than one that looked at a spot.
                share = math.sqrt(peak / brightest) if brightest > 0 else 0.0
                drawn = _lit(drawn, picture.heat[word] * (picture.heat[word].size * share / max(peak, 1e-12)))
            canvas.paste(drawn, (x, y + line))
            x += size[0] + 2
    return canvas


def _lit(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """Darken an image and lay white over it where the heat (h, w) is high, from 0 to 1."""
    mask = Image.fromarray((255 * OPACITY * heat.clip(0, 1)).astype(np.uint8)).resize(
        picture.size, Image.Resampling.BICUBIC
    )
    soft = mask.filter(ImageFilter.GaussianBlur(max(picture.size) / max(heat.shape)))
    dark = picture.convert("L").point(lambda value: value * 0.55).convert("RGB")
    return Image.composite(Image.new("RGB", picture.size, "white"), dark, soft)


def _peak(pictures: tuple[PictureMap, ...], word: int) -> float:
    """Return the hottest cell of a word, as a multiple of the mean of an even map."""
    return max(float(p.heat[word].max() * p.heat[word].size) for p in pictures)


def _sizes(pictures: tuple[PictureMap, ...], side: int) -> list[tuple[int, int]]:
    """Return the panels' sizes: the images' shapes, `side` on the longer side, less for several images."""
    side = max(48, side // min(len(pictures), 3)) if len(pictures) > 1 else side
    sizes = []
    for picture in pictures:
        width, height = picture.image.size
        scale = side / max(width, height)
        sizes.append((max(MIN_SIDE, round(width * scale)), max(MIN_SIDE, round(height * scale))))
    return sizes


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_cut(word, font, width))
    return [line for line in lines if line] or [""]


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
