"""The end of pumice-tiny's vision tower learns which things and words belong to photographs.

    python projects/pumice-tiny/tune_tower.py MODEL TARGET --photos PHOTOS

An ImageNet tower has learnt the one thing that fills a picture. Here the 1 x 1 convolutions after its finer
features learn, without the LLM, COCO's categories and the words of COCO's and Flickr8k's captions. Each
category must be found at some place (log-mean-exp over the places, as one image token must tell it), and
everything in the mean of all places. The loss is binary cross-entropy; unknown labels do not count. TARGET
holds the whole tower.

Shapes: B pictures, F features of a picture, C channels of the stride-16 map, G places on a side of it, K
categories, T targets (the categories, then the words).
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from command import run
from rich.progress import track
from rows import coco, flickr
from rows.coco import CATEGORIES, Scene
from rows.crops import crop
from torch import Tensor, nn
from warm import telling_words
from widen import FINE

from pumice.errors import InputError
from pumice.formats.load import Opened, open_model
from pumice.formats.pumice import folder
from pumice.formats.read import find_model
from pumice.images import open_image, to_tiles
from pumice.model.efficientnet import EfficientNetLite, fine_channels
from pumice.model.llava import Llava
from pumice.train.loop import schedule

RARE = 25  # photographs that must share a word before it is learnt
BATCH = 32
RATES = {"tower": 1e-4, "heads": 2e-3}
MIRRORED = 0.7  # share of crops


def photographs(photos: Path) -> tuple[list[Scene], list[Scene]]:
    """COCO's and Flickr8k's, to learn from and held out. Raises InputError without COCO's categories."""
    if not (scenes := coco.read_coco(photos)):
        raise InputError(f"'{photos}' has no folder coco, whose categories the tower learns; check --photos")
    captions = flickr.raw_captions(photos)
    learnt, held = coco.split(scenes)
    for part, captioned in zip((learnt, held), flickr.split(flickr.read_photos(photos)), strict=True):
        # Nobody told which categories these show.
        part += [
            Scene(photo, None, None, (), (), raw_captions=tuple(captions[photo.image])) for photo in captioned
        ]
    return learnt, held


def words_of(scene: Scene) -> set[str]:
    return telling_words(" ".join(scene.raw_captions))


def targets(scenes: Sequence[Scene], words: Sequence[str]) -> Tensor:
    """(scenes, T): 1 where it is there, 0 where not, NaN where nobody said."""
    table = torch.full((len(scenes), len(CATEGORIES) + len(words)), math.nan)
    for row, scene in zip(table, scenes, strict=True):
        if scene.labels is not None:
            row[: len(CATEGORIES)] = torch.tensor([name in scene.labels for name in CATEGORIES])
        if scene.raw_captions:
            said = words_of(scene)
            row[len(CATEGORIES) :] = torch.tensor([word in said for word in words])
    return table


class TowerEnd(nn.Module):
    """The tower's layers after its finer features, and what reads its features while they learn."""

    def __init__(self, tower: EfficientNetLite, rates: Tensor) -> None:
        """rates: (T,), the share of pictures that have each target, from which the heads begin."""
        super().__init__()
        self.layers = nn.Sequential(*tower.blocks[tower.fine + 1 :], tower.head)
        self.places = nn.Linear(tower.head.conv.out_channels, len(CATEGORIES))
        self.whole = nn.Linear(tower.head.conv.out_channels, len(rates))
        for head in (self.places, self.whole):
            nn.init.zeros_(head.weight)
            head.bias.data = torch.logit(rates[: head.out_features])

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, K) of the best places and (B, T) of the mean, of stride-16 maps (B, C, G, G)."""
        with torch.autocast("cpu", torch.bfloat16):
            features = self.layers(maps)
        features = features.float().flatten(2).transpose(1, 2)  # (B, F, 1280)
        best = torch.logsumexp(self.places(features), 1) - math.log(features.shape[1])
        return best, self.whole(features.mean(1))

    def groups(self) -> list[dict[str, object]]:
        """What learns, for the optimiser. Depthwise kernels and norms stay as they are."""
        heads = [*self.places.parameters(), *self.whole.parameters()]
        for parameter in self.layers.parameters():
            parameter.requires_grad_(parameter.ndim == 4 and parameter.shape[1] > 1)
        tower = [p for p in self.layers.parameters() if p.requires_grad]
        return [
            {"params": tower, "rate": RATES["tower"], "weight_decay": 0.0},
            {"params": [p for p in heads if p.ndim > 1], "rate": RATES["heads"], "weight_decay": 0.3},
            {"params": [p for p in heads if p.ndim == 1], "rate": RATES["heads"], "weight_decay": 0.0},
        ]


def loss(scores: Sequence[Tensor], table: Tensor) -> Tensor:
    """Sum over the known targets, mean over the pictures."""
    total = torch.zeros(())
    for score in scores:
        wanted = table[:, : score.shape[1]]
        each = F.binary_cross_entropy_with_logits(score, wanted.nan_to_num(), reduction="none")
        total = total + each[~wanted.isnan()].sum() / len(table)
    return total


@torch.inference_mode()
def stride_16_maps(model: Llava, paths: Sequence[Path], file: Path) -> np.memmap:
    """(pictures, 2, C, G, G) in fp16 on the disk: of each picture whole, and of one crop of it."""
    tower, vision, policy = model.tower, model.config.vision, model.config.image
    size, side = vision.image_size, vision.image_size // FINE
    channels = fine_channels(vision.variant, FINE)
    maps = np.memmap(file, np.float16, "w+", shape=(len(paths), 2, channels, side, side))
    random_ = random.Random(0)
    for number, path in enumerate(track(paths, "looking at photographs")):
        picture = open_image(path)
        mirror = random_.random() < MIRRORED
        views = to_tiles(picture, size, policy), to_tiles(crop(picture, random_), size, policy, mirror=mirror)
        pixels = torch.from_numpy(np.concatenate(views))
        values = tower.stem(pixels.contiguous(memory_format=torch.channels_last))  # 1.3 times as fast
        for block in tower.blocks[: tower.fine + 1]:
            values = block(values)
        maps[number] = values.numpy()
    return maps


def tune(
    tower: EfficientNetLite, both_maps: Sequence[np.ndarray], tables: Sequence[Tensor], epochs: int
) -> list[float]:
    """Train the tower's end in place; return the held-out loss of each epoch.

    both_maps, tables: of the photographs to learn from, and of those held out.
    """
    (maps, held_maps), (table, held_table) = both_maps, tables
    known = ~table.isnan()
    rates = ((table.nan_to_num() > 0).sum(0) + 1) / (known.sum(0) + 2)
    end = TowerEnd(tower, rates)
    optimizer = torch.optim.AdamW(end.groups(), betas=(0.9, 0.98))
    per_epoch, losses = len(maps) // BATCH, []
    for epoch in track(range(epochs), "tuning the tower"):
        order = torch.randperm(len(maps)).tolist()
        for step in range(per_epoch):
            picked = order[step * BATCH : (step + 1) * BATCH]
            views = np.stack([maps[number, random.randrange(maps.shape[1])] for number in picked])
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * schedule(epoch * per_epoch + step, epochs * per_epoch, 0.05)
            loss(end(torch.from_numpy(views).float()), table[picked]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(held_out(end, held_maps, held_table))
        print(f"epoch {epoch + 1}: held-out loss {losses[-1]:.2f}")
    return losses


@torch.no_grad()
def held_out(end: TowerEnd, maps: np.ndarray, table: Tensor) -> float:
    """Mean loss of whole pictures."""
    total = 0.0
    for first in range(0, len(maps), BATCH):
        part = slice(first, first + BATCH)
        total += float(loss(end(torch.from_numpy(maps[part, 0]).float()), table[part])) * len(table[part])
    return total / len(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a built-in model or a model folder")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--photos", type=Path, required=True, help="holds coco/ and flickr8k/")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.target.absolute().parent.is_dir() or arguments.target.is_file():
        raise InputError(f"'{arguments.target}' is a file, or its folder does not exist; make that first")
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    opened = open_model(find_model(arguments.model), merge=False)
    parts = photographs(arguments.photos)
    losses = learn(opened, parts, arguments.photos, arguments.target.absolute().parent, arguments.epochs)
    save(opened, arguments.target, {"tuned_tower": {"seed": arguments.seed, "held_out_losses": losses}})


def learn(
    opened: Opened, parts: tuple[list[Scene], list[Scene]], photos: Path, scratch: Path, epochs: int
) -> list[float]:
    """Tune the opened model's tower on parts[0]; return the losses on parts[1]. Maps lie in `scratch`.

    Raises InputError where the tower has no finer features, or there are too few photographs.
    """
    model = opened.model
    if model.config.vision.also_stride != FINE:
        raise InputError("the tower needs finer features, as widen.py gives them")
    if len(parts[0]) < BATCH or not parts[1]:
        raise InputError(
            f"there are {len(parts[0])} photographs to learn from and {len(parts[1])} held out; "
            f"{BATCH} and 1 are the least"
        )
    counts = Counter(word for scene in parts[0] for word in words_of(scene))
    words = sorted(word for word, count in counts.items() if count >= RARE)
    with tempfile.TemporaryDirectory(dir=scratch) as maps_folder:
        maps = [
            stride_16_maps(model, [photos / s.photo.image for s in scenes], Path(maps_folder) / name)
            for name, scenes in zip(("train", "held"), parts, strict=True)
        ]
        return tune(model.tower, maps, [targets(scenes, words) for scenes in parts], epochs)


def save(opened: Opened, target: Path, stage: dict[str, object]) -> None:
    """Write the model with the tower that it has now; the decoder still comes from its wheel."""
    loaded, model = opened.loaded, opened.model
    state = {name: tensor for name, tensor in loaded.state.items() if not name.startswith("tower.")}
    state |= {f"tower.{name}": tensor.detach() for name, tensor in model.tower.state_dict().items()}
    sources = {name: wheel for name, wheel in loaded.parts.items() if name != "tower"}
    stages = [*loaded.provenance.get("stages", ()), stage]
    folder.save(
        target,
        loaded.config,
        state,
        tokenizer=None if "decoder" in sources else loaded.tokenizer.to_str(),
        provenance=loaded.provenance | {"stages": stages},
        parts=sources,
    )


if __name__ == "__main__":
    run(main)
