"""Videos of LLaVA-NeXT-Video and LLaVA-OneVision: as transformers computes them, and after an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pumice.config import IMAGE_TOKEN
from pumice.conversation import Conversation, ImagePart, Message, Video
from pumice.errors import InputError
from pumice.explain.maps import token_boxes
from pumice.formats.export import export
from pumice.formats.hf.read import open_hf
from pumice.formats.hf.refusal import refusal
from pumice.formats.hf.write import VIDEO
from pumice.formats.load import open_model
from pumice.formats.read import read_model
from pumice.media import VideoPolicy

Llavas = Callable[[str], Path]
Change = Callable[..., None]
FRAMES = 5
TOKENS = {"next_video": FRAMES * 4, "onevision": FRAMES * 4 + 1}  # of the video; a newline ends OneVision's
POLICIES = {
    "next_video": VideoPolicy(8, pool=2, average=True),
    "onevision": VideoPolicy(32, pool=2),
}
# Of their preprocessor_config.json.
PIXELS: dict[str, Any] = {
    "do_resize": True, "size": {"shortest_edge": 16}, "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
}  # fmt: skip


def clip(folder: Path) -> ImagePart:
    noise = np.random.default_rng(1).integers(0, 256, (FRAMES, 26, 40, 3), np.uint8)
    first, *others = map(Image.fromarray, noise)
    first.save(folder / "a.gif", save_all=True, append_images=others, duration=200)
    return ImagePart(Video(folder / "a.gif"))


@pytest.mark.parametrize("exported", [False, True], ids=["as it is", "exported"])
@pytest.mark.parametrize("kind", POLICIES)
@torch.no_grad()
def test_pictures_and_frames(
    kind: str, exported: bool, llava: Llavas, models: ModuleType, tmp_path: Path
) -> None:
    """A picture in tiles and a video in one conversation, in both orders, against transformers."""
    import transformers

    folder = llava(kind)
    if exported:
        folder = tmp_path / "out"
        assert not export(read_model(llava(kind)), "hf", folder).notes
    opened = open_model(folder)
    assert opened.model.config.video == POLICIES[kind]
    hf_model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    config = hf_model.config
    if exported:
        tokens = transformers.AutoTokenizer.from_pretrained(folder)
        assert config.video_token_index == tokens.convert_tokens_to_ids(VIDEO)
    shown = [ImagePart(models.picture(40, 26)), clip(tmp_path)]
    for parts in (shown, shown[::-1], shown[1:]):
        sample = opened.processor.prompt(Conversation((Message("user", (*parts, "What?")),)))
        is_frame = [bool(image.frame) for image in sample.images]
        assert sum(is_frame) == FRAMES
        pixels = [
            torch.from_numpy(opened.processor.pixels([image], [layout]))
            for image, layout in zip(sample.images, sample.layouts, strict=True)
        ]
        ids = torch.from_numpy(sample.input_ids)[None]
        image_tokens = opened.model.encode(torch.cat(pixels), sample.layouts)
        actual = opened.model.decoder.logits(opened.model(ids, image_tokens))
        numbers = [
            config.video_token_index if frame else config.image_token_index
            for frame, layout in zip(is_frame, sample.layouts, strict=True)
            for _ in range(layout.tokens)
        ]
        assert numbers.count(config.video_token_index) == TOKENS[kind]
        hf_ids = ids.clone()
        hf_ids[ids == IMAGE_TOKEN] = torch.tensor(numbers)
        frames = torch.cat([part for part, frame in zip(pixels, is_frame, strict=True) if frame])
        tiles = [part for part, frame in zip(pixels, is_frame, strict=True) if not frame]
        images = {"pixel_values": tiles[0][None], "image_sizes": torch.tensor([[26, 40]])} if tiles else {}
        expected = hf_model(input_ids=hf_ids, pixel_values_videos=frames[None], **images).logits
        difference = (actual - expected).abs().max().item()
        print(f"{kind}, exported {exported}: {difference:.1e} of {expected.abs().max():.1f}")
        assert difference < 1e-4  # measured worst: 6.6e-06 of 8.9


def test_the_place_of_a_frame(llava: Llavas, tmp_path: Path) -> None:
    opened = open_model(llava("next_video"))
    sample = opened.processor.prompt(Conversation((Message("user", (clip(tmp_path), "What?")),)))
    boxes = token_boxes(opened.model.config, (40, 26), sample.layouts[0])
    np.testing.assert_allclose(boxes.boxes[0], [6.7, 0, 20, 13], atol=0.1)  # of the square in the middle


@pytest.mark.parametrize("kind", POLICIES)
def test_an_export_holds_the_video_policy_and_writes_videos(
    kind: str, llava: Llavas, tmp_path: Path, change: Change
) -> None:
    import transformers

    loaded = read_model(llava(kind))
    policy = replace(POLICIES[kind], max_frames=6)
    export(replace(loaded, config=replace(loaded.config, video=policy)), "hf", tmp_path / "out")
    back = read_model(tmp_path / "out")
    assert back.config.video == policy
    # transformers 5 saves the video processor inside processor_config.json.
    saved = shutil.copytree(tmp_path / "out", tmp_path / "saved")
    video_processor = json.loads((saved / "video_preprocessor_config.json").read_text())
    (saved / "video_preprocessor_config.json").unlink()
    change(saved / "processor_config.json", video_processor=video_processor)
    assert read_model(saved).config.video == policy
    # The chat template has a place for a video, as it has for a picture.
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]
    text = tokens.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert "<image>\n<video>\nWhat?" in text
    assert json.loads((tmp_path / "out/processor_config.json").read_text())["video_token"] == VIDEO
    # And again, byte for byte.
    export(back, "hf", tmp_path / "again")
    for file in sorted(path.name for path in (tmp_path / "out").iterdir()):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("kind", "policy", "words"),
    [
        ("next_video", VideoPolicy(8, pool=2), "LlavaNextVideo averages their features before"),
        ("onevision", VideoPolicy(8, pool=2, average=True), "LlavaOnevision does not average their features"),
        ("next_video", VideoPolicy(8, pool=4, average=True), "in half of a tile's rows"),
        ("llava", VideoPolicy(8), "only models with anyres show"),
    ],
)
def test_videos_that_no_class_shows_are_refused(
    kind: str, policy: VideoPolicy, words: str, llava: Llavas
) -> None:
    config = open_hf(llava(kind)).config
    assert refusal(config) is None
    assert words in str(refusal(replace(config, video=policy)))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("config.json", {"spatial_pool_mode": "max"}, "spatial_pool_mode"),
        ("config.json", {"spatial_pool_stride": 0}, "pool must be 1 or more"),
        ("video_preprocessor_config.json", {**PIXELS, "do_center_crop": False}, "do_center_crop"),
        ("video_preprocessor_config.json", PIXELS | {"crop_size": {"height": 8, "width": 8}}, "become 8"),
    ],
)
def test_a_llava_next_video_that_pools_in_another_way_is_refused(
    llava: Llavas, tmp_path: Path, file: str, values: dict[str, Any], words: str, change: Change
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(llava("next_video"), folder)
    if file == "config.json":
        change(folder / file, **values)
    else:
        (folder / file).write_text(json.dumps(values))
    with pytest.raises(InputError, match=words):
        open_hf(folder)
