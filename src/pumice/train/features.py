"""The tower's features of pictures, kept on disk where the tower is frozen: it looks at each once.

Knows the tower, files and arrays. A cache belongs to one tower and one image policy (its fingerprint)
and refuses any other. One process writes.

Shapes: M pictures, P squares of pixels (M of them, more under anyres), F features of one square, C tower
width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pumice.config import ModelConfig
from pumice.conversation import ImagePart
from pumice.errors import InputError
from pumice.files import hold
from pumice.images import image_key
from pumice.model.llava import Llava
from pumice.processor import Processor


class TowerFeatures:
    """Called with the pictures of one sample, gives the tower's features of them.

    A picture is looked at alone, so that its features never depend on what else is in a batch.
    """

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
            self.cache = FeatureCache(folder, fingerprint(model, processor.config), vision.features, vision.width)

    def close(self) -> None:
        """Let another run use the cache."""
        if self.cache is not None:
            self.cache.close()

    def __call__(self, images: Sequence[ImagePart], mirror: bool) -> Tensor:
        """Features (P, F, C) on the model's device, of the pictures mirrored left to right if asked."""
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            if self.cache is None:
                return torch.cat([self._look(image, mirror) for image in images])
            found = self.cache.get(images, mirror, lambda image: self._look(image, mirror))
            return found.to(self.model.device)

    def _look(self, image: ImagePart, mirror: bool) -> Tensor:
        pixels = self.processor.pixels((image,), mirror=mirror)
        with torch.autocast(self.model.device.type, enabled=False):
            return self.model.features(torch.from_numpy(pixels))


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
            description.write_text(json.dumps(meta))
        elif description.read_text() != json.dumps(meta):
            raise InputError(f"{folder} holds the features of another tower or image policy; remove it")
        self._keys_path, self._data_path = folder / "keys.txt", folder / "features.bin"
        self._data_path.touch()
        self._keys_path.touch()
        lines = self._keys_path.read_text().split("\n")[:-1]  # text after the last newline is torn
        whole = self._data_path.stat().st_size // (features * width * 2)  # records that are there
        self._places: dict[str, range] = {}  # picture -> its records
        self._end = 0
        for line in lines:
            key, _, squares = line.partition(" ")
            place = range(self._end, self._end + int(squares or 1))
            if place.stop > whole:
                break
            self._places[key], self._end = place, place.stop
        self._keys_path.write_text("".join(_line(*item) for item in self._places.items()))

    def close(self) -> None:
        self._lock.release()

    def get(
        self, images: Sequence[ImagePart], mirror: bool, compute: Callable[[ImagePart], Tensor]
    ) -> Tensor:
        """Features (P, F, C) bfloat16; `compute` gives those of the squares of a picture not seen before."""
        return torch.cat([self._one(image, mirror, compute) for image in images])

    def _one(self, image: ImagePart, mirror: bool, compute: Callable[[ImagePart], Tensor]) -> Tensor:
        key = image_key(image.source) + ("-mirror" if mirror else "")
        count = self.shape[0] * self.shape[1]
        if key not in self._places:
            bits = compute(image).to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
            place = range(self._end, self._end + len(bits))
            with self._data_path.open("r+b") as file:
                file.seek(place.start * count * 2)
                file.write(bits.tobytes())
            with self._keys_path.open("a") as keys:
                keys.write(_line(key, place))
            self._places[key], self._end = place, place.stop
        place = self._places[key]
        with self._data_path.open("rb") as file:
            file.seek(place.start * count * 2)
            records = np.fromfile(file, np.int16, len(place) * count)
        return torch.from_numpy(records).view(torch.bfloat16).view(len(place), *self.shape)


def _line(key: str, place: range) -> str:
    return f"{key}\n" if len(place) == 1 else f"{key} {len(place)}\n"
