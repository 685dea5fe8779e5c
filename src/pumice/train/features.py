"""The vision tower's features of images, cached on disk so that a frozen tower sees each image once.

A cache belongs to one tower and one image policy (its fingerprint). One process writes to it.

Shapes: M images, P tiles (M of them, more under anyres), F features of one tile, C tower width, S pixels on
a side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pumice.config import ModelConfig
from pumice.conversation import ImagePart
from pumice.errors import InputError
from pumice.files import hold, replacing, sync, whole_lines
from pumice.geometry import Layout
from pumice.images import read_image
from pumice.model.llava import Llava
from pumice.model.transfer import to_device
from pumice.processor import Processor

TILES_PER_CALL = 8  # tiles in one call of a frozen tower
_ADDED = ("final_norm", "fractional", "longest_edge", "enlarge")
IMAGES_PER_SYNC = 64  # new images whose features reach the disk together: a sync costs milliseconds


class ImageInput(NamedTuple):
    """One image that was read: its pixels (P, 3, S, S), or its features (P, F, C) if they are cached."""

    key: str | None
    pixels: Tensor | None
    features: Tensor | None


class TowerFeatures:
    """Read images (`fetch`, in any thread) and run the tower on them (`encode`)."""

    def __init__(self, model: Llava, processor: Processor, folder: Path | None, trains_tower: bool) -> None:
        """folder: of the cache. Raises InputError if the cache is another tower's or the tower learns."""
        self.model, self.processor, self.trains_tower = model, processor, trains_tower
        self.cache: FeatureCache | None = None
        if folder is not None:
            if trains_tower:
                raise InputError(
                    "feature_cache: the tower learns in this stage and its features change; leave it out"
                )
            vision = model.config.vision
            self.cache = FeatureCache(
                folder, fingerprint(model, processor.config), vision.features, vision.width
            )

    def close(self) -> None:
        """Unlock the cache for other runs."""
        if self.cache is not None:
            self.cache.close()

    def fetch(
        self, images: Sequence[ImagePart], layouts: Sequence[Layout], mirror: bool, pin: bool = False
    ) -> list[ImageInput]:
        """Read images or their cached features; safe in any thread.

        layouts: one per image, as the sample has them. mirror: flip left to right. pin: use pinned memory.
        Raises InputError on an image that cannot be read, or whose size is not the layout's any more.
        """
        inputs = []
        for source, layout in zip(images, layouts, strict=True):
            key, features, pixels = None, None, None
            # Read the file once: it may be replaced between the hash and the decoding.
            image = dataclasses.replace(source, source=read_image(source.source))
            if layout.tiles > 1 and self.processor.layouts((image,)) != (layout,):
                raise InputError(
                    f"{source.name} has another size than when its row was read, and so another number of "
                    "tokens; leave pictures as they are while a model trains"
                )
            if self.cache is not None:
                key = self.processor.key(image, layout, mirror=mirror)
                features = self.cache.read(key)
            if features is None:
                pixels = torch.from_numpy(self.processor.pixels((image,), (layout,), mirror=mirror))
                pixels = pixels.pin_memory() if pin else pixels
            elif pin:
                features = features.pin_memory()
            inputs.append(ImageInput(key, pixels, features))
        return inputs

    def encode(self, images: Sequence[ImageInput]) -> Tensor:
        """Return the tower's features (P, F, C) of the images, on the model's device.

        With a cache the tower sees one image per call, so that cached features do not depend on the batch.
        """
        device = self.model.device
        with torch.set_grad_enabled(self.trains_tower and torch.is_grad_enabled()):
            if self.cache is None:
                # One by one, because a joined tensor would not lie in pinned memory.
                parts = [to_device(i.pixels, device) for i in images if i.pixels is not None]
                pixels = torch.cat(parts)
                if self.trains_tower:  # one call, because FSDP gathers the tower in every call
                    return self._run_tower(pixels)
                return torch.cat([self._run_tower(tiles) for tiles in pixels.split(TILES_PER_CALL)])
            return torch.cat([to_device(self._encode_cached(image), device) for image in images])

    def _encode_cached(self, image: ImageInput) -> Tensor:
        """Return an image's features from the cache; compute and store them if they are missing."""
        assert self.cache is not None and image.key is not None
        # Another pack of this step may have stored them since the image was read.
        features = image.features if image.features is not None else self.cache.read(image.key)
        if features is None:
            assert image.pixels is not None
            features = self.cache.put(image.key, self._run_tower(image.pixels))
        return features

    def _run_tower(self, pixels: Tensor) -> Tensor:
        if self.trains_tower:
            return self.model.features(pixels)
        # Without autocast: a frozen tower's features must be the same in training, in the cache and in
        # answering.
        with torch.autocast(self.model.device.type, enabled=False):
            return self.model.features(pixels)


def fingerprint(model: Llava, config: ModelConfig) -> str:
    """Return a hash of all that features depend on: the tower's weights and sizes, the stage's image policy.

    It hashes the configs' `repr`, so renaming or adding a field there would make every cache useless.
    """
    digest = hashlib.blake2b(repr((config.vision, config.image)).encode(), digest_size=16)
    # Fields that were added later are not in repr().
    added = [
        f"{field.name}={getattr(part, field.name)}"
        for part in (config.vision, config.image)
        for field in dataclasses.fields(part)
        if field.name in _ADDED and getattr(part, field.name) != field.default
    ]
    digest.update(" ".join(added).encode())
    for name, tensor in sorted(model.tower.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()


class FeatureCache:
    """A folder of features: `features.bin` has one record of equal size per tile, `keys.txt` names them.

    A line of `keys.txt` is an image's key, its number of tiles and the CRC-32 of its records. Caches of older
    versions have no checksum, and no number if it is 1; their records are taken as they are. Records reach
    the disk before their line: after a kill or a power cut the image is computed again. So is one whose
    records changed on the disk. Features are stored as bfloat16 bits.
    """

    def __init__(self, folder: Path, fingerprint: str, features: int, width: int) -> None:
        self._folder, self._is_new = folder, not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = hold(folder / ".lock", f"using the cache of features {folder}")
        self.shape = (features, width)
        # 1. Refuse the features of another tower: they may have the same size, so no error would follow.
        meta = {"fingerprint": fingerprint, "features": features, "width": width}
        description = folder / "cache.json"
        if not description.exists():
            with replacing(description) as file:
                json.dump(meta, file)
        elif description.read_bytes() != json.dumps(meta).encode():
            raise InputError(f"{folder} holds the features of another tower or image policy; remove it")
        self._keys_path, self._data_path = folder / "keys.txt", folder / "features.bin"
        self._data_path.touch()
        self._keys_path.touch()
        # 2. Read the keys up to the first whose records are not in the file, as after a full disk.
        record_count = self._data_path.stat().st_size // (features * width * 2)
        self._entries: dict[str, _Entry] = {}
        self._end = 0
        for line in whole_lines(self._keys_path):
            entry = _Entry.parse(line, self._end)
            if entry is None or entry.records.stop > record_count:
                break
            self._entries[entry.key], self._end = entry, entry.records.stop
        # 3. Write the keys that remain, so that new ones follow the records that are really there.
        with replacing(self._keys_path) as file:
            file.writelines(map(str, self._entries.values()))
        self._unsynced: list[_Entry] = []

    def close(self) -> None:
        """Unlock the folder for other runs. One that is new and still empty, as of a refused run, goes."""
        self.flush()
        if self._is_new and not self._entries:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def read(self, key: str) -> Tensor | None:
        """Return an image's features (P, F, C), bfloat16, or None if they are not cached or were damaged."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        count = self.shape[0] * self.shape[1]
        with self._data_path.open("rb") as file:
            file.seek(entry.records.start * count * 2)
            bits = np.fromfile(file, np.int16, len(entry.records) * count)
        if entry.checksum is not None and entry.checksum != zlib.crc32(bits.tobytes()):
            del self._entries[key]  # it is computed again and appended
            return None
        return torch.from_numpy(bits).view(torch.bfloat16).view(len(entry.records), *self.shape)

    def put(self, key: str, features: Tensor) -> Tensor:
        """Store an image's features (P, F, C) and return them as `read` will. Only one thread may write."""
        rounded = features.detach().to("cpu", torch.bfloat16).contiguous()
        bits = rounded.view(torch.int16).numpy()
        records = range(self._end, self._end + len(bits))
        with self._data_path.open("r+b") as file:
            file.seek(records.start * self.shape[0] * self.shape[1] * 2)
            file.write(bits.tobytes())
        self._end = records.stop
        entry = _Entry(key, records, zlib.crc32(bits.tobytes()))
        self._unsynced.append(entry)
        self._entries[key] = entry  # last: other threads may read the image from now on
        if len(self._unsynced) == IMAGES_PER_SYNC:
            self.flush()
        return rounded

    def flush(self) -> None:
        """Bring the records of new images to the disk, and then their lines."""
        if self._unsynced:
            sync(self._data_path)
            with self._keys_path.open("a") as keys:
                keys.writelines(map(str, self._unsynced))
            self._unsynced = []


class _Entry(NamedTuple):
    """One image of a cache: where its records lie, and their CRC-32 (None: written by an older version)."""

    key: str
    records: range
    checksum: int | None

    @classmethod
    def parse(cls, line: str, start: int) -> _Entry | None:
        """Return the entry of a line whose records begin at `start`, None if the line is damaged."""
        match = re.fullmatch(r"(\S+)(?: ([1-9]\d{0,8}))?(?: ([0-9a-f]{8}))?", line)
        if match is None:
            return None
        key, tiles, checksum = match.groups()
        return cls(
            key, range(start, start + int(tiles or 1)), None if checksum is None else int(checksum, 16)
        )

    def __str__(self) -> str:
        checksum = "" if self.checksum is None else f" {self.checksum:08x}"
        return f"{self.key} {len(self.records)}{checksum}\n"
