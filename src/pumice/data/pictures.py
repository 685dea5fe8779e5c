"""Pictures and videos that a record names, in any of the forms that data sets have."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pumice.conversation import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, StoredImage, Video
from pumice.data.sources.source import Record
from pumice.errors import InputError, counted, cut, shorten
from pumice.media import PICTURES
from pumice.messages import decode_data_url

Image = str | StoredImage | Video  # the name of a file, a picture inside the source, or a video's file

_IMAGES = ("image", "images")
_OTHER_IMAGES = (
    "image_path", "image_paths", "image_file", "file_name", "file_names", "filename", "img", "img_path",
    "picture", "pictures", "photo", "image_url", "image_urls",
)  # fmt: skip
_VIDEOS = ("video", "videos")
# How JPEG, PNG, GIF, WebP and BMP begin as base64.
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk")
_SHORTEST_BASE64 = 64  # letters: no picture is smaller
_LONGEST_PATH = 1024  # characters
_PLACES = re.compile(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}")
# Columns that `images_of` and `videos_of` read.
MEDIA = (*_IMAGES, *_OTHER_IMAGES, *_VIDEOS)


def place_videos(turns: list[tuple[str, str]], images: list[Image], videos: list[Image]) -> list[Image]:
    """Return pictures and videos in the order of their places; each `<video>` becomes `<image>`.

    Raises InputError if there are not as many places as videos, unless there are no places at all.
    """
    order: list[bool] = []  # whether each place is a video's
    for number, (speaker, text) in enumerate(turns):
        if speaker == "human":
            order += [found == VIDEO_PLACEHOLDER for found in _PLACES.findall(text)]
            turns[number] = speaker, text.replace(VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER)
    if not any(order) and (not order or not images):
        return [*images, *videos]
    if sum(order) != len(videos):
        raise InputError(
            f"{sum(order)} {VIDEO_PLACEHOLDER} for {counted(len(videos), 'video')}; write one placeholder "
            "per video"
        )
    rest = {True: iter(videos), False: iter(images)}
    # Where pictures are too few or too many, the number of placeholders says so later.
    placed = [image for is_video in order for image in itertools.islice(rest[is_video], 1)]
    return [*placed, *rest[False]]


def beside(images: Sequence[Image], videos: Sequence[Image], question: str) -> tuple[list[Image], str]:
    """Return a question's pictures and videos in the order of their places, and the question.

    As in `place_videos`: `<video>` in the question becomes `<image>`. A single one moves to the front.
    """
    turns = [("human", question)]
    placed = place_videos(turns, list(images), list(videos))
    text = turns[0][1]
    return placed, text.replace(IMAGE_PLACEHOLDER, "").strip() if len(placed) == 1 else text


def as_pictures(messages: list[Any]) -> list[Any]:
    """Return messages with the places of videos written as those of pictures."""
    return [
        {**message, "content": content.replace(VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER)}
        if isinstance(message, dict) and isinstance(content := message.get("content"), str)
        else message
        for message in messages
    ]


def images_of(values: Record, place: str) -> list[Image]:
    """Return the pictures that the columns name. Raises InputError where two columns could be the picture."""
    found = [name for name in _IMAGES if name in values and values[name] != []]
    if not found:
        found = [name for name in _OTHER_IMAGES if values.get(name)]
        stored = [name for name, value in values.items() if name not in _VIDEOS and is_stored(value)]
        found += [name for name in stored if name not in found]
    if len(found) > 1:
        raise InputError(
            f"{place}: {found[0]!r} and {found[1]!r} could both be the picture; say which in the recipe, for "
            f"example columns: {{image: {found[0]}}}"
        )
    if not found:
        return []
    return _media_of(values, found[0], place, lambda image: image, "")


def videos_of(values: Record, place: str) -> list[Image]:
    """Return the videos that a column names."""
    name = next((name for name in _VIDEOS if values.get(name)), None)
    return [] if name is None else _media_of(values, name, place, Video, " of videos")


def _media_of(values: Record, name: str, place: str, kind: Callable[[Any], Any], what: str) -> list[Image]:
    """Return what one column names, each as a `kind`. what: ends the description of a list in an error."""
    value = structured(values[name])
    try:
        return [image_of(kind(item), place) for item in (value if isinstance(value, list) else [value])]
    except TypeError as error:
        raise InputError(
            f"{place}: {name!r} must be a path or a list of paths{what}, found {_shorten_json(value)}"
        ) from error


def image_of(value: Any, place: str) -> Image:
    """Return a picture or a video in any of its forms. Raises TypeError if it is none."""
    if isinstance(value, Video):
        name: Any = value.source
        if isinstance(name, Mapping):
            name = next((name[key] for key in ("url", "path", "video", "file_name") if name.get(key)), None)
        if isinstance(name, StoredImage):
            return value
        if not isinstance(name, str) or not name:
            raise TypeError
        return Video(name.removeprefix("file://"))
    if isinstance(value, Mapping):
        value = next(
            (value[key] for key in ("bytes", "url", "path", "image", "file_name") if value.get(key)), None
        )
    if isinstance(value, str) and value:
        if value[:5].lower() == "data:":
            value = decode_data_url(value)
        elif is_base64(value):
            value = decode_data_url(f"data:;base64,{value}")
        else:
            return value.removeprefix("file://")
    if isinstance(value, bytes):
        return StoredImage(value, f"{place.replace(chr(39), '')}, picture inside", partial(bytes, value))
    if isinstance(value, StoredImage):
        return value
    raise TypeError


def is_base64(value: str) -> bool:
    """Whether a text is a picture in one of the common formats as base64, and not a path."""
    return len(value) >= _SHORTEST_BASE64 and value.startswith(_BASE64) and "." not in value


def names_picture(value: Any) -> bool:
    """Whether a value is the path, the address or the contents of a picture, or a list of them."""
    if isinstance(value, str):
        if len(value) < _LONGEST_PATH and value.lower().endswith(PICTURES):
            return "\n" not in value
        return value[:11].lower() == "data:image/" or is_base64(value)
    if isinstance(value, list):
        return bool(value) and all(map(names_picture, value))
    if isinstance(value, Mapping):
        return any(names_picture(value.get(key)) for key in ("path", "url", "bytes"))
    return isinstance(value, StoredImage | bytes)


def is_stored(value: Any) -> bool:
    return isinstance(value, StoredImage) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, StoredImage) for item in value)
    )


def structured(value: Any) -> Any:
    """Return a list or an object that a table holds as text, written as JSON or, by pandas, as Python."""
    if not isinstance(value, str) or value[:1] + value[-1:] not in ("[]", "{}"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def _shorten_json(value: Any) -> str:
    try:
        return cut(json.dumps(value))
    except TypeError:
        return shorten(value)
