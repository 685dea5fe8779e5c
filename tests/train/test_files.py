"""What a run keeps on disk: checkpoints, cached features, metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pumice.config import ImagePolicy
from pumice.conversation import ImagePart
from pumice.errors import InputError, WorkError
from pumice.files import sha256
from pumice.formats.load import open_model
from pumice.images import image_key
from pumice.processor import Processor
from pumice.train import checkpoint as checkpoints
from pumice.train.checkpoint import Checkpoint
from pumice.train.features import IMAGES_PER_SYNC, FeatureCache, TowerFeatures
from pumice.train.report import read_metrics

CPU = torch.device("cpu")


def point(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        weights={"a": torch.full((2,), float(step))},
        moments={"exp_avg.a": torch.full((2,), step / 2)},
        plain={"step.a": float(step)},
        rng={"cpu": torch.get_rng_state()},
        recipe={"seed": 1},
        progress={"tokens": 10 * step},
    )


def test_a_checkpoint_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoints.save(tmp_path, point(step), keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000015"]
    checkpoint = checkpoints.latest(tmp_path, {"seed": 1}, point(0).weights, CPU)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.progress) == (15, {"tokens": 150})
    assert checkpoint.weights["a"].tolist() == [15.0, 15.0]
    assert checkpoint.plain == {"step.a": 15.0}
    assert checkpoint.moments["exp_avg.a"].tolist() == [7.5, 7.5]


def test_the_newest_checkpoint_is_that_of_the_largest_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        checkpoints.save(tmp_path, point(step), keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1000000"]
    checkpoints.save(tmp_path, point(1_000_001), keep_last=2)
    found = checkpoints.latest(tmp_path, {"seed": 1}, point(0).weights, CPU)
    assert found is not None and found.step == 1_000_001


def test_a_half_written_checkpoint_is_not_seen(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, point(5), keep_last=2)
    partial = tmp_path / ".step-000010.partial"
    partial.mkdir()
    (partial / "state.json").write_bytes(b"torn")
    checkpoint = checkpoints.latest(tmp_path, {"seed": 1}, point(0).weights, CPU)
    assert checkpoint is not None and checkpoint.step == 5
    checkpoints.save(tmp_path, point(10), keep_last=2)
    assert not partial.exists()


def test_a_full_disk_leaves_the_checkpoints_before_and_nothing_else(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system has no limit of file sizes")
    checkpoints.save(tmp_path, point(5), keep_last=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))  # bytes: writing more fails
    try:
        with pytest.raises(WorkError, match=r"cannot write the checkpoint .*step-000010.*make room"):
            checkpoints.save(tmp_path, point(10), keep_last=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_no_checkpoint_and_another_recipe(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path / "none", {}, {}, CPU) is None
    checkpoints.save(tmp_path, point(5), keep_last=1)
    with pytest.raises(InputError, match=r"made with seed: 1, the recipe now says 2"):
        checkpoints.latest(tmp_path, {"seed": 2}, point(0).weights, CPU)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)


def list_names(manifest: Path) -> None:
    """Keep the names of a manifest's files alone."""
    manifest.write_text(json.dumps(list(json.loads(manifest.read_text()))))


def certify(old: str, new: str) -> Callable[[Path], None]:
    """Return what replaces a part of a file, and its size and SHA-256 in the manifest."""

    def spoil(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        manifest = path.parent / "manifest.json"
        entries = json.loads(manifest.read_text())
        entries[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        manifest.write_text(json.dumps(entries))

    return spoil


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        (
            "state.json",
            Path.unlink,
            r"step-000010 lacks state\.json; remove this folder to continue from step 5",
        ),
        ("tensors/all.safetensors", Path.unlink, r"lacks all\.safetensors"),
        ("rng-00000.safetensors", Path.unlink, r"lacks rng-00000\.safetensors"),
        ("manifest.json", Path.unlink, r"lacks manifest\.json"),
        ("state.json", cut, r"step-000010 is damaged \(state\.json has \d+ bytes, .*from step 5"),
        ("tensors/all.safetensors", cut, r"is damaged"),
        (
            "tensors/all.safetensors",
            flip_a_bit,
            r"is damaged \(.*has changed: its SHA-256 is not the manifest's",
        ),
        ("manifest.json", lambda path: path.write_text("{}"), r"manifest\.json does not name rng-00000"),
        ("manifest.json", lambda path: path.write_text("[]"), r"manifest\.json does not give the size"),
        ("manifest.json", list_names, r"manifest\.json does not give the size and the SHA-256 of each file"),
        ("manifest.json", lambda path: path.write_text('{"state.json": []}'), "does not give the size"),
        ("state.json", certify('"processes": 1', '"processes": null'), "has them in other types"),
        ("state.json", certify('"step": 10', '"step": "10"'), "has them in other types"),
        ("state.json", certify('"step.a": 10.0', '"step.a": "x"'), "'step.a' should be a number"),
        ("manifest.json", lambda path: path.write_text("[" * 100_000), "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_told_with_the_remedy(
    tmp_path: Path, file: str, spoil: Callable[[Path], None], message: str
) -> None:
    for step in (5, 10):
        checkpoints.save(tmp_path, point(step), keep_last=2)
    spoil(tmp_path / "step-000010" / file)
    with pytest.raises(InputError, match=message):
        checkpoints.latest(tmp_path, {"seed": 1}, point(0).weights, CPU)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, point(5), keep_last=2)
    for learned in ({"b": torch.zeros(2)}, {"a": torch.zeros(3)}):
        with pytest.raises(InputError, match=r"does not fit the model: [ab] differs; remove this folder"):
            checkpoints.latest(tmp_path, {"seed": 1}, learned, CPU)


def test_what_differs_in_a_recipe_is_named_alone(tmp_path: Path) -> None:
    then = replace(point(5), recipe={"stage": {"learn": {"connector": 0.1}, "lora": None}})
    checkpoints.save(tmp_path, then, keep_last=1)
    now = {"stage": {"learn": {"connector": 0.2}, "lora": None}}
    with pytest.raises(
        InputError, match=r"made with stage\.learn\.connector: 0\.1, the recipe now says 0\.2;"
    ):
        checkpoints.latest(tmp_path, now, point(0).weights, CPU)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            {"contents of a": "2", "data": "a", "steps": 9},
            "^the contents of a have changed since this run began;",
        ),
        ({"contents of b": "2", "data": "b", "steps": 9}, "made with data: 'a', the recipe now says 'b';"),
        ({"contents of a": "1", "data": "a", "steps": 9}, "made with steps: 5, the recipe now says 9;"),
    ],
)
def test_what_differs_first_is_told_and_no_digest(tmp_path: Path, now: dict[str, Any], message: str) -> None:
    then = replace(point(5), recipe={"contents of a": "1", "data": "a", "steps": 5})
    checkpoints.save(tmp_path, then, keep_last=1)
    with pytest.raises(InputError, match=message):
        checkpoints.latest(tmp_path, now, point(0).weights, CPU)


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, point(5), keep_last=1)
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    written = [path for path in (tmp_path / "step-000005").rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in written} == {usual}


def get(
    cache: FeatureCache,
    images: Sequence[ImagePart],
    mirror: bool,
    compute: Callable[[ImagePart], torch.Tensor],
) -> torch.Tensor:
    """As the training loop uses it."""
    checkpoint = []
    for image in images:
        key = image_key(image.source) + "-mirror" * mirror
        stored_features = cache.read(key)
        checkpoint.append(cache.put(key, compute(image)) if stored_features is None else stored_features)
    return torch.cat(checkpoint)


def test_features_are_computed_once_and_survive_a_torn_end(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (4, 4), (9, 9, 9)).save(picture)
    image, calls = ImagePart(picture), []

    def compute(part: ImagePart) -> torch.Tensor:
        calls.append(part)
        return torch.full((1, 3, 2), float(len(calls)))

    folder = tmp_path / "cache"
    cache = FeatureCache(folder, "tower", 3, 2)
    assert get(cache, [image, image], False, compute).tolist() == [[[1.0, 1.0]] * 3] * 2
    assert get(cache, [image], True, compute)[0, 0, 0] == 2  # mirrored is another picture
    with pytest.raises(InputError, match=r"another run is using the cache"):
        FeatureCache(folder, "tower", 3, 2)
    cache.close()
    with (folder / "keys.txt").open("a") as file:
        file.write("torn-key-without-its-newline")
    with (folder / "features.bin").open("ab") as file:
        file.write(b"torn")
    again = FeatureCache(folder, "tower", 3, 2)
    assert get(again, [image], False, compute)[0, 0, 0] == 1
    Image.new("RGB", (4, 4), (1, 1, 1)).save(tmp_path / "b.png")
    assert get(again, [ImagePart(tmp_path / "b.png")], False, compute)[0, 0, 0] == 3
    assert len(calls) == 3
    again.close()
    with pytest.raises(InputError, match="another tower or image policy"):
        FeatureCache(folder, "other", 3, 2)
    (folder / "features.bin").write_bytes(b"")  # keys without their records
    assert get(FeatureCache(folder, "tower", 3, 2), [image], False, compute)[0, 0, 0] == 4
    assert get(FeatureCache(folder, "tower", 3, 2), [image], True, compute)[0, 0, 0] == 5


def test_pictures_of_several_squares_are_cached_whole(tmp_path: Path) -> None:
    parts = []
    for number, tiles in enumerate((3, 1, 2)):
        Image.new("RGB", (tiles, 4), (number, 9, 9)).save(tmp_path / f"{number}.png")
        parts.append(ImagePart(tmp_path / f"{number}.png"))
    features = {part: torch.randn(n, 5, 2).bfloat16() for part, n in zip(parts, (3, 1, 2), strict=True)}
    folder = tmp_path / "cache"
    cache = FeatureCache(folder, "tower", 5, 2)
    expected = torch.cat(list(features.values()))
    assert torch.equal(get(cache, parts, False, features.__getitem__), expected)
    cache.close()
    records = (folder / "features.bin").read_bytes()
    assert len(records) == 6 * 5 * 2 * 2
    (folder / "features.bin").write_bytes(records[:-20])  # one square of the last picture is gone
    again = FeatureCache(folder, "tower", 5, 2)
    computed: list[ImagePart] = []

    def compute(part: ImagePart) -> torch.Tensor:
        computed.append(part)
        return features[part]

    assert torch.equal(get(again, parts, False, compute), expected)
    assert computed == parts[2:]


def test_a_flipped_bit_of_a_record_is_computed_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "tower", 3, 2)
    features = {key: torch.randn(1, 3, 2).bfloat16() for key in "abc"}
    for key, value in features.items():
        cache.put(key, value)
    cache.close()
    data = bytearray((tmp_path / "features.bin").read_bytes())
    data[12] ^= 4  # in the record of b
    (tmp_path / "features.bin").write_bytes(data)
    again = FeatureCache(tmp_path, "tower", 3, 2)
    assert again.read("b") is None
    assert torch.equal(again.put("b", features["b"]), features["b"])
    again.close()
    again = FeatureCache(tmp_path, "tower", 3, 2)
    for key, value in features.items():
        read = again.read(key)
        assert read is not None and torch.equal(read, value)


def test_records_reach_the_disk_before_their_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines_at_sync = []

    def sync(path: Path) -> None:
        assert path.name == "features.bin"
        lines_at_sync.append((tmp_path / "keys.txt").read_text().count("\n"))

    cache = FeatureCache(tmp_path, "tower", 3, 2)
    monkeypatch.setattr("pumice.train.features.sync", sync)
    for number in range(IMAGES_PER_SYNC + 1):
        cache.put(str(number), torch.zeros(1, 3, 2))
    assert lines_at_sync == [0]  # one sync for a batch, and no key before it
    cache.close()
    assert lines_at_sync == [0, IMAGES_PER_SYNC]
    assert (tmp_path / "keys.txt").read_text().count("\n") == IMAGES_PER_SYNC + 1


def test_a_cache_of_an_older_version_opens(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "tower", 3, 2)
    for key, tiles in (("a", 1), ("b", 2)):
        cache.put(key, torch.full((tiles, 3, 2), float(tiles)))
    cache.close()
    (tmp_path / "keys.txt").write_text("a\nb 2\n")  # without checksums
    again = FeatureCache(tmp_path, "tower", 3, 2)
    read = again.read("b")
    assert read is not None and read.tolist() == [[[2.0, 2.0]] * 3] * 2
    again.close()
    os.truncate(tmp_path / "features.bin", 2 * 3 * 2 * 2)  # no checksum says that a tile of b is gone
    again = FeatureCache(tmp_path, "tower", 3, 2)
    assert "a" in again and again.read("b") is None


def test_a_torn_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "7",
        '{"loss": 1}',
        '{"step": "1"}',
        "[" * 100_000,
        "1" * 5000,
        '{"step": 1' + "0" * 4000 + "}",
        '{"step": 1, "loss": {}}',
        '{"step": 1, "held_out_loss": "x"}',
        '{"step": 1, "answer": "x"}',
        '{"step": 1, "question": "x", "reference": "x", "answer": 1}',
    ],
)
def test_a_line_of_metrics_that_is_no_event_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged .*; remove it"):
        read_metrics(path)


def test_features_are_kept_under_the_picture_that_was_opened(
    tiny_folder: Path, tmp_path: Path, replaced_when_opened: Any
) -> None:
    contents = []
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(tmp_path / "made.png")
        contents.append((tmp_path / "made.png").read_bytes())
    opened = open_model(tiny_folder)
    features = TowerFeatures(opened.model, opened.processor, tmp_path / "cache", trains_tower=False)
    file = tmp_path / "latest.png"
    replaced_when_opened(file, contents)
    layouts = opened.processor.layouts([ImagePart(file)])
    for data in contents:
        (image_input,) = features.fetch([ImagePart(file)], layouts, False)
        assert image_input.key == image_key(data)
        expected = opened.processor.pixels([ImagePart(data)], layouts)
        assert torch.equal(image_input.pixels, torch.from_numpy(expected))
    features.close()


@pytest.mark.parametrize("cached", [False, True])
def test_a_picture_that_gets_another_size_after_its_row_was_read(
    tiny_folder: Path, tmp_path: Path, cached: bool
) -> None:
    opened = open_model(tiny_folder)
    side = opened.model.config.vision.image_size
    tiles = ImagePolicy("anyres", pinpoints=((side, 2 * side), (2 * side, side)))
    processor = Processor(replace(opened.model.config, image=tiles), opened.processor.tokenizer)
    folder = tmp_path / "cache" if cached else None
    features = TowerFeatures(opened.model, processor, folder, trains_tower=False)
    file = tmp_path / "latest.png"
    Image.new("RGB", (90, 30)).save(file)
    layouts = processor.layouts([ImagePart(file)])
    assert len(features.fetch([ImagePart(file)], layouts, False)) == 1
    Image.new("RGB", (30, 90)).save(file)  # as many tiles, elsewhere
    with pytest.raises(InputError, match=r"latest\.png has another size than when its row was read"):
        features.fetch([ImagePart(file)], layouts, False)
    features.close()
