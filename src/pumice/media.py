"""How a model was trained to see pictures in tiles and videos, and to write boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pumice.errors import InputError, check_known

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # how names of files end
BoxFormName = Literal["padded", "picture", "qwen", "pixels"]  # `boxes.FORMS` says what they mean
BOX_FORMS: tuple[str, ...] = get_args(BoxFormName)


def check_box_form(name: str) -> None:
    """Raise InputError unless there is this way to write boxes."""
    check_known(name, BOX_FORMS, f"boxes: there is no form {name!r}")


@dataclass(frozen=True)
class TileMarks:
    """The texts around the tokens of an image and its tiles (Idefics3, nanoVLM)."""

    tile: str = ""  # before each tile; {row} and {column} count from 1
    row: str = ""  # after each row of tiles
    between: str = ""  # between the tiles and the whole image
    whole: str = ""  # before the whole image
    end: str = ""  # after the image
    number: str = ""  # before each of several images; {number} counts from 0

    def __post_init__(self) -> None:
        for text, words in ((self.tile, ("{row}", "{column}")), (self.number, ("{number}",))):
            rest = text
            for word in words:
                rest = rest.replace(word, "")
            if "{" in rest or "}" in rest:
                raise InputError(f"marks: {text!r} may hold only {' and '.join(words)} in braces")


@dataclass(frozen=True)
class VideoPolicy:
    """How the frames of a video are shown. Each is one square tile, without the tiles of a picture."""

    max_frames: int = 32
    fps: float = 0.0  # frames that are taken a second, up to max_frames; 0: max_frames, evenly
    longest_edge: int = 0  # pixels of a frame's longer side before it becomes the square; 0: no such step
    timestamps: bool = False  # SmolVLM2: the time before each frame, and a sentence before all
    pool: int = 1  # LLaVA-OneVision: tokens on a side are reduced by this, rounded up, bilinear
    # LLaVA-NeXT-Video: a frame is cropped as by the image mode "crop", and pool x pool of its features are
    # averaged before the connector. No newline follows.
    average: bool = False

    def __post_init__(self) -> None:
        for name in ("max_frames", "pool"):
            if getattr(self, name) < 1:
                raise InputError(f"video: {name} must be 1 or more, not {getattr(self, name)}")
        if self.fps < 0 or self.longest_edge < 0:
            raise InputError(f"video: fps {self.fps} and longest_edge {self.longest_edge} must be 0 or more")
        if self.average and self.longest_edge:
            raise InputError("video: frames are cropped (average), so longest_edge must be 0")


@dataclass(frozen=True)
class Frames:
    """Frames taken of a video as PNG files, the seconds at which each is shown, and those of the whole."""

    images: tuple[bytes, ...]
    times: tuple[float, ...]
    duration: float
