"""Read the pictures and videos of a request: from addresses to files and frames within the limits."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pumice.config import ModelConfig
from pumice.conversation import Video
from pumice.errors import InputError, counted
from pumice.geometry import tile_layout
from pumice.images import EnormousImage, image_size, open_image
from pumice.media import Frames, VideoPolicy
from pumice.messages import decode_data_url
from pumice.serve.errors import invalid
from pumice.serve.fetch import Fetcher
from pumice.serve.messages import ImageUrl, VideoUrl
from pumice.serve.settings import ServerSettings
from pumice.serve.work import Account, Kind, Workers
from pumice.stopping import check_stopped
from pumice.video import read_frames

_TIFF = (b"II", b"MM")  # how such a file begins
# What is sent, its type, and the code of the error where its address is wrong.
_PICTURE = ("picture", "image/jpeg", "invalid_image_url")
_VIDEO = ("video", "video/mp4", "invalid_video_url")


@dataclass(frozen=True)
class PictureFile:
    """The bytes of a picture's file, or a video as frames; and the (width, height) of each, in pixels."""

    data: bytes | Video
    sizes: tuple[tuple[int, int], ...]


async def read_images(
    images: Sequence[tuple[str, ImageUrl | VideoUrl]],
    settings: ServerSettings,
    fetcher: Fetcher | None,
    workers: Workers,
    memory: Account,
    video: VideoPolicy | None,
) -> list[PictureFile]:
    """Return each picture's file and each video's frames, in order.

    images: (field name, picture or video). Only headers of pictures are decoded here. memory: of the request;
    what is fetched and frames count. video: of the model. Raises ApiError, 400, that names the field when
    there are too many pictures, or when one cannot be read or has too many pixels.
    """
    if len(images) > settings.max_images:
        raise invalid(
            images[settings.max_images][0],
            f"the request shows {counted(len(images), 'picture')}; show at most {settings.max_images}",
            "too_many_images",
        )
    fetched = await asyncio.gather(*(_fetch(param, image, fetcher, memory) for param, image in images))
    files = []
    for (param, image), data in zip(images, fetched, strict=True):
        if data is None:
            data = await workers.run("parse", _decode, param, image)
        if isinstance(image, VideoUrl):
            frames, sizes = await workers.run("videos", _take_frames, param, data, video, settings)
            memory.take(sum(map(len, frames.images)))
            files.append(PictureFile(Video(frames), sizes))
            continue
        kind: Kind = "long" if data[:2] in _TIFF else "short"  # whose size is known when it is decoded
        files.append(PictureFile(data, (await workers.run(kind, _check, param, data, settings),)))
    return files


def count_tiles(files: Sequence[PictureFile], config: ModelConfig) -> int:
    """Return how many tiles the tower sees of the pictures and frames of one conversation."""
    # Frames are pictures for a model that was not trained on videos, and never cut into tiles for others.
    pictures = [file for file in files if config.video is None or not isinstance(file.data, Video)]
    sizes = [size for file in pictures for size in file.sizes]
    frames = sum(len(file.sizes) for file in files) - len(sizes)
    if not config.image.uses_tiles(len(sizes)):
        return frames + len(sizes)
    return frames + sum(tile_layout(config, size).tiles for size in sizes)


def find_damaged(pictures: Mapping[str, bytes | Video]) -> str | None:
    """Return the field of the first picture that cannot be decoded, or None. pictures: field -> file."""
    for param, data in pictures.items():
        check_stopped()
        if isinstance(data, Video):  # whose frames were decoded
            continue
        try:
            open_image(data)
        except InputError:
            return param
    return None


async def _fetch(
    param: str, image: ImageUrl | VideoUrl, fetcher: Fetcher | None, memory: Account
) -> bytes | None:
    """Return the bytes behind a web address, or None for a data URI."""
    url = image.url
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        return None
    is_video = isinstance(image, VideoUrl)
    if is_video or not scheme.startswith(("http://", "https://")):
        what, form, code = _VIDEO if is_video else _PICTURE
        raise invalid(
            param, f"'{param}' begins with {url[:12]!r}; give a {what} as data:{form};base64,...", code
        )
    if fetcher is None:
        raise invalid(
            param,
            "this server fetches no pictures from the web; send it as data:image/jpeg;base64,...",
            "image_urls_not_allowed",
        )
    return await fetcher.get(url, param, memory.take)


def _take_frames(
    param: str, data: bytes, policy: VideoPolicy | None, settings: ServerSettings
) -> tuple[Frames, tuple[tuple[int, int], ...]]:
    """Return the frames of a video and their sizes in pixels, once they are checked."""
    try:
        frames = read_frames(Video(data), policy)
    except InputError as error:
        raise invalid(param, str(error), "invalid_video") from error
    return frames, tuple(_check(param, frame, settings) for frame in frames.images)


def _check(param: str, data: bytes, settings: ServerSettings) -> tuple[int, int]:
    """Return the size of a picture or a frame in pixels, once it is checked."""
    try:
        width, height = image_size(data)
    except EnormousImage:
        excess = "has"
    except InputError as error:
        raise invalid(param, str(error), "invalid_image") from error
    else:
        if width * height <= settings.max_pixels:
            return width, height
        excess = f"is {width} x {height},"
    raise invalid(
        param,
        f"the picture {excess} more than {settings.max_pixels / 1e6:g} megapixels; send a smaller copy",
        "image_too_large",
    )


def _decode(param: str, image: ImageUrl | VideoUrl) -> bytes:
    try:
        return decode_data_url(image.url)
    except InputError as error:
        *_, code = _VIDEO if isinstance(image, VideoUrl) else _PICTURE
        raise invalid(param, f"'{param}': {error}", code) from error
