"""The tower's features of pictures, kept on disk where the tower is frozen: it looks at each once.

Knows the tower, files and arrays. A cache belongs to one tower and one image policy (its fingerprint)
and refuses any other. One process writes.

Shapes: M pictures, P squares of pixels (M of them, more under anyres), F features of one square, C tower
width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pumice.config import ModelConfig
from pumice.conversation import ImagePart
from pumice.errors import InputError
from pumice.files import hold, replacing, whole_lines
from pumice.geometry import Layout
from pumice.images import read_picture
from pumice.model.llava import Llava
from pumice.processor import Processor

TOGETHER = 8  # squares that a frozen tower looks at in one call


class ImageInput(NamedTuple):
    """One picture, fetched: its pixels (P, 3, S, S), or its features (P, F, C) where they were kept."""

    key: str | None
    pixels: Tensor | None
    features: Tensor | None


class TowerFeatures:
    """`fetch` reads pictures, in any thread; `look` gives the tower's features of them."""

    def __init__(self, model: Llava, processor: Processor, folder: Path | None, learns: bool) -> None:
        """folder: of a cache, or None. Raises InputError when it is another tower's, or the tower learns."""
        self.model, self.processor, self.learns = model, processor, learns
        self.cache: FeatureCache | None = None
        if folder is not None:
            if learns:
                raise InputError(
                    "feature_cache: the tower learns in this stage and its features change; leave it out"
                )
            vision = model.config.vision
            self.cache = FeatureCache(
                folder, fingerprint(model, processor.config), vision.features, vision.width
            )

    def close(self) -> None:
        """Let another run use the cache."""
        if self.cache is not None:
            self.cache.close()

    def fetch(
        self, images: Sequence[ImagePart], layouts: Sequence[Layout], mirror: bool, pin: bool = False
    ) -> list[ImageInput]:
        """What is needed of pictures before the model sees them; safe in any thread, and no torch graph.

        layouts: theirs, as their samples have them. mirror: left to right. pin: where a GPU can fetch it
        while it computes. InputError on a picture that cannot be read.
        """
        found = []
        for image, layout in zip(images, layouts, strict=True):
            key, features, pixels = None, None, None
            if self.cache is not None:
                # Read once: the file may be replaced between the key and the pixels.
                image = ImagePart(read_picture(image.source))
                key = self.processor.key(image, layout, mirror=mirror)
                features = self.cache.read(key)
            if features is None:
                pixels = torch.from_numpy(self.processor.pixels((image,), (layout,), mirror=mirror))
                pixels = pixels.pin_memory() if pin else pixels
            found.append(ImageInput(key, pixels, features))
        return found

    def look(self, pictures: Sequence[ImageInput]) -> Tensor:
        """Features (P, F, C) on the model's device.

        Where there is a cache each picture is looked at alone, so that what is kept of it never depends on
        its company; otherwise a few together, in the order given.
        """
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            if self.cache is None:
                pixels = [picture.pixels for picture in pictures if picture.pixels is not None]
                if self.learns:  # one call, as FSDP gathers the tower once a call
                    return self._tower(torch.cat(pixels))
                return torch.cat([self._tower(some) for some in torch.cat(pixels).split(TOGETHER)])
            return torch.cat([self._cached(picture) for picture in pictures]).to(self.model.device)

    def _cached(self, picture: ImageInput) -> Tensor:
        assert self.cache is not None and picture.key is not None
        found = picture.features if picture.features is not None else self.cache.read(picture.key)
        if found is None:
            assert picture.pixels is not None
            found = self.cache.put(picture.key, self._tower(picture.pixels))
        return found

    def _tower(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self.model.device.type, enabled=False):
            return self.model.features(pixels)


def fingerprint(model: Llava, config: ModelConfig) -> str:
    """Of everything that a picture's features depend on: tower weights, sizes, the stage's image policy."""
    digest = hashlib.blake2b(repr((config.vision, config.image)).encode(), digest_size=16)
    for name, tensor in sorted(model.tower.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Records of equal size in `features.bin`, one per square, in the order of the keys in `keys.txt`.

    A line of `keys.txt` is a picture's key and, unless it is 1, the number of its squares. It is written
    only after their records, so that a run killed in between loses one picture and never reads a
    half-written one. Features are kept as bfloat16 bits.
    """

    def __init__(self, folder: Path, fingerprint: str, features: int, width: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = hold(folder, "cache of features")
        self.shape = (features, width)
        meta = {"fingerprint": fingerprint, "features": features, "width": width}
        description = folder / "cache.json"
        if not description.exists():
            with replacing(description) as file:
                json.dump(meta, file)
        elif description.read_text() != json.dumps(meta):
            raise InputError(f"{folder} holds the features of another tower or image policy; remove it")
        self._keys_path, self._data_path = folder / "keys.txt", folder / "features.bin"
        self._data_path.touch()
        self._keys_path.touch()
        whole = self._data_path.stat().st_size // (features * width * 2)  # records that are there
        self._places: dict[str, range] = {}  # picture -> its records
        self._end = 0
        for line in whole_lines(self._keys_path):
            key, _, tiles = line.partition(" ")
            place = range(self._end, self._end + int(tiles or 1))
            if place.stop > whole:
                break
            self._places[key], self._end = place, place.stop
        with replacing(self._keys_path) as file:
            file.writelines(_line(*item) for item in self._places.items())

    def close(self) -> None:
        self._lock.release()

    def read(self, key: str) -> Tensor | None:
        """Features (P, F, C) bfloat16 of a picture seen before."""
        place = self._places.get(key)
        if place is None:
            return None
        count = self.shape[0] * self.shape[1]
        with self._data_path.open("rb") as file:
            file.seek(place.start * count * 2)
            records = np.fromfile(file, np.int16, len(place) * count)
        return torch.from_numpy(records).view(torch.bfloat16).view(len(place), *self.shape)

    def put(self, key: str, features: Tensor) -> Tensor:
        """Keep a picture's features (P, F, C); returns them as they will be read. One thread writes."""
        kept = features.detach().to("cpu", torch.bfloat16).contiguous()
        bits = kept.view(torch.int16).numpy()
        place = range(self._end, self._end + len(bits))
        with self._data_path.open("r+b") as file:
            file.seek(place.start * self.shape[0] * self.shape[1] * 2)
            file.write(bits.tobytes())
        with self._keys_path.open("a") as keys:
            keys.write(_line(key, place))
        self._end = place.stop
        self._places[key] = place  # last: another thread may read from now on
        return kept


def _line(key: str, place: range) -> str:
    return f"{key}\n" if len(place) == 1 else f"{key} {len(place)}\n"
