"""Read the pictures of a request: from `image_url` to file bytes that are within the limits."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pumice.errors import InputError
from pumice.images import EnormousImage, image_size, open_image
from pumice.messages import decode_data_url
from pumice.serve.errors import ApiError
from pumice.serve.fetch import Fetcher
from pumice.serve.messages import ImageUrl
from pumice.serve.settings import ServerSettings
from pumice.serve.work import Account, Kind, Workers
from pumice.stopping import check_stopped

_TIFF = (b"II", b"MM")  # how such a file begins


@dataclass(frozen=True)
class PictureFile:
    """The bytes of a picture's file, and its width and height in pixels."""

    data: bytes
    size: tuple[int, int]


async def read_images(
    images: Sequence[tuple[str, ImageUrl]],
    settings: ServerSettings,
    fetcher: Fetcher | None,
    workers: Workers,
    memory: Account,
) -> list[PictureFile]:
    """Return each picture's file, in order.

    images: (field name, picture). Only headers are decoded here. memory: of the request; what is fetched
    counts. Raises ApiError, 400, that names the field when there are too many pictures, or when one cannot be
    read or has too many pixels.
    """
    if len(images) > settings.max_images:
        raise ApiError(
            400,
            f"the request shows {len(images)} pictures, {settings.max_images} are allowed; show fewer",
            param=images[settings.max_images][0],
            code="too_many_images",
        )
    fetched = await asyncio.gather(*(_fetch(param, image.url, fetcher, memory) for param, image in images))
    files = []
    for (param, image), data in zip(images, fetched, strict=True):
        if data is None:
            data = await workers.run("parse", _decode, param, image.url)
        kind: Kind = "long" if data[:2] in _TIFF else "short"  # whose size is known when it is decoded
        files.append(PictureFile(data, await workers.run(kind, _check, param, data, settings)))
    return files


def find_damaged(pictures: Mapping[str, bytes]) -> str | None:
    """Return the field of the first picture that cannot be decoded, or None. pictures: field -> file."""
    for param, data in pictures.items():
        check_stopped()
        try:
            open_image(data)
        except InputError:
            return param
    return None


async def _fetch(param: str, url: str, fetcher: Fetcher | None, memory: Account) -> bytes | None:
    """Return the bytes behind a web address, or None for a data URI."""
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        return None
    if not scheme.startswith(("http://", "https://")):
        raise ApiError(
            400,
            f"'{param}.url' begins with {url[:12]!r}; give a picture as data:image/jpeg;base64,...",
            param=param,
            code="invalid_image_url",
        )
    if fetcher is None:
        raise ApiError(
            400,
            "this server fetches no pictures from the web; send it as data:image/jpeg;base64,...",
            param=param,
            code="image_urls_not_allowed",
        )
    return await fetcher.get(url, param, memory.take)


def _check(param: str, data: bytes, settings: ServerSettings) -> tuple[int, int]:
    """Return the size of a picture in pixels, once it is checked."""
    try:
        width, height = image_size(data)
    except EnormousImage:
        excess = "has"
    except InputError as error:
        raise ApiError(400, str(error), param=param, code="invalid_image") from error
    else:
        if width * height <= settings.max_pixels:
            return width, height
        excess = f"is {width} x {height},"
    raise ApiError(
        400,
        f"the picture {excess} more than {settings.max_pixels / 1e6:g} megapixels; send a smaller copy",
        param=param,
        code="image_too_large",
    )


def _decode(param: str, url: str) -> bytes:
    try:
        return decode_data_url(url)
    except InputError as error:
        raise ApiError(400, f"'{param}.url': {error}", param=param, code="invalid_image_url") from error
