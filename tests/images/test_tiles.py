"""Tiles equal the reference formulas of each mode and what transformers makes of a picture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, photograph
from PIL import Image

from pumice.config import ImagePolicy
from pumice.geometry import letterbox
from pumice.images import open_image, pixels, to_tiles

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # so that pixels() * 255 are the 8-bit values


def eight_bit(image: Image.Image, size: int, policy: ImagePolicy) -> np.ndarray:
    values = pixels(image, size, policy)
    assert values.shape == (3, size, size) and values.dtype == np.float32 and values.flags.c_contiguous
    return np.rint(values * 255).astype(int).transpose(1, 2, 0)


def expand_to_square(image: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """The formula of LLaVA's mm_utils, on arrays."""
    array = np.asarray(image)
    height, width = array.shape[:2]
    side = max(width, height)
    square = np.tile(np.array(color, np.uint8), (side, side, 1))
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = array
    return square


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([8, 32, 45]),
    st.sampled_from(["bicubic", "bilinear"]),
)
def test_pad_is_expand_to_square_then_resize(width: int, height: int, size: int, resample: str) -> None:
    image = photograph(width, height)
    policy = ImagePolicy(mode="pad", resample=resample, pad_color=(122, 116, 104), **RAW)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    square = expand_to_square(image, policy.pad_color)
    expected = Image.fromarray(square).resize((size, size), filters[resample])
    assert (eight_bit(image, size, policy) == np.asarray(expected)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64))
def test_pad_keeps_every_pixel_and_floors_the_offset(width: int, height: int) -> None:
    side, color = max(width, height), (1, 2, 3)
    image = Image.new("RGB", (width, height), (200, 100, 50))
    result = eight_bit(image, side, ImagePolicy(mode="pad", pad_color=color, **RAW))
    inside = (result == (200, 100, 50)).all(-1)
    assert inside.sum() == width * height and ((result == color).all(-1) | inside).all()
    ys, xs = np.nonzero(inside)
    assert (ys.min(), xs.min()) == ((side - height) // 2, (side - width) // 2)
    before, after = ys.min() + xs.min(), 2 * side - 2 - ys.max() - xs.max()
    assert after - before in (0, 1)


CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
SIZES = [(640, 480), (480, 640), (333, 500), (224, 224), (100, 61), (61, 200), (17, 200), (1, 9), (7, 1)]


def hf_pixels(kind: str, image: Image.Image, **options: object) -> np.ndarray:
    """What transformers' own processor, the one that resizes with Pillow, makes of a picture."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    make = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    return np.asarray(make(**options)(image, return_tensors="np")["pixel_values"][0])


# Measured worst case of all tests below: 0. Its order is ours: resize to whole numbers, cut or pad, divide
# by 255, normalise.
EXACT = 0.0


# The middle of these is resized alone: it begins and ends at places that single precision can hold.
MIDDLES = [(500, 400), (256, 128), (800, 128), (400, 500)]


@pytest.mark.parametrize("size", [*SIZES, *MIDDLES, (17, 1000), (50, 900)])
def test_crop_equals_transformers(size: tuple[int, int]) -> None:
    image = photograph(*size)
    options = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    expected = hf_pixels("CLIPImageProcessor", image, **options)
    actual = pixels(image, 64, ImagePolicy(mode="crop", **CLIP))
    if max(size) <= 16 * min(size):
        assert np.abs(actual - expected).max() <= EXACT
    else:  # the ends are cut first, which moves the grid by less than a pixel
        assert np.abs(actual - expected).mean() < 0.25


@pytest.mark.parametrize("size", SIZES)
def test_pad_equals_transformers(size: tuple[int, int]) -> None:
    image = photograph(*size)
    options = {"size": {"shortest_edge": 60}, "crop_size": {"height": 60, "width": 60}, "do_pad": True}
    expected = hf_pixels("LlavaImageProcessor", image, **options)
    policy = ImagePolicy(mode="pad", pad_color=(122, 116, 104), **CLIP)
    assert np.abs(pixels(image, 60, policy) - expected).max() <= EXACT


@pytest.mark.parametrize("size", SIZES)
def test_squash_equals_transformers(size: tuple[int, int]) -> None:
    image = photograph(*size)
    expected = hf_pixels("SiglipImageProcessor", image, size={"height": 54, "width": 54})
    policy = ImagePolicy(mode="squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert np.abs(pixels(image, 54, policy) - expected).max() <= EXACT


PINPOINTS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))


@pytest.mark.parametrize("size", [*SIZES, (32, 32), (65, 33), (3, 400), (400, 3)])
@pytest.mark.parametrize("kind", ["LlavaNextImageProcessor", "LlavaOnevisionImageProcessor"])
def test_tiles_equal_transformers(kind: str, size: tuple[int, int]) -> None:
    image = photograph(*size)
    options: dict[str, object] = {
        # (height, width), in our order: the order decides between equals
        "image_grid_pinpoints": [[height, width] for width, height in PINPOINTS],
        "size": {"shortest_edge": 32} if "Next" in kind else {"height": 32, "width": 32},
        "image_mean": CLIP["mean"],
        "image_std": CLIP["std"],
    }
    if "Next" in kind:
        options["crop_size"] = {"height": 32, "width": 32}
    expected = hf_pixels(kind, image, **options)
    actual = to_tiles(image, 32, ImagePolicy(mode="anyres", pinpoints=PINPOINTS, **CLIP))
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= EXACT


def test_tiles_join_to_the_letterboxed_picture() -> None:
    image = Image.new("RGB", (100, 40), (200, 100, 50))
    result = to_tiles(image, 32, ImagePolicy(mode="anyres", pinpoints=PINPOINTS, **RAW))
    assert result.shape == (4, 3, 32, 32)
    joined = np.rint(np.concatenate(list(result[1:]), 2) * 255).astype(int).transpose(1, 2, 0)
    assert joined.shape == (32, 96, 3)
    inside = (joined == (200, 100, 50)).all(-1)
    width, height = letterbox((100, 40), (96, 32))
    assert inside.sum() == width * height
    assert (joined[~inside] == 0).all()
    assert (np.rint(result[0] * 255) == np.array([200, 100, 50])[:, None, None]).all()


def test_a_mirrored_picture_is_cut_again() -> None:
    policy = ImagePolicy(mode="anyres", pinpoints=PINPOINTS, **CLIP)
    image = photograph(90, 40)
    turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.array_equal(to_tiles(image, 32, policy, mirror=True), to_tiles(turned, 32, policy))
    assert not np.array_equal(to_tiles(image, 32, policy, mirror=True), to_tiles(image, 32, policy))


@pytest.mark.parametrize("mode", ["pad", "crop", "squash"])
def test_one_square_is_mirrored_as_it_is(mode: str) -> None:
    policy, image = ImagePolicy(mode=mode), photograph(31, 20)
    expected = pixels(image, 16, policy)
    assert np.array_equal(to_tiles(image, 16, policy), expected[None])
    assert np.array_equal(to_tiles(image, 16, policy, mirror=True), expected[None, :, :, ::-1])


def test_squash_ignores_the_aspect_ratio() -> None:
    image = photograph(90, 30)
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    assert (eight_bit(image, 16, ImagePolicy(mode="squash", **RAW)) == expected).all()


def test_normalisation() -> None:
    policy = ImagePolicy(mode="squash", mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    values = pixels(Image.new("RGB", (4, 4), (255, 51, 0)), 4, policy)
    np.testing.assert_allclose(values[:, 0, 0], [1.8, 0.0, -0.15], atol=1e-6)


@pytest.mark.parametrize("mode", ["pad", "crop", "squash"])
@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 200_000), (1, 1), (2, 5000)])
def test_narrow_pictures_work(mode: str, size: tuple[int, int]) -> None:
    image = open_image(encoded(Image.new("RGB", size, (10, 200, 30)), "PNG"))
    result = eight_bit(image, 32, ImagePolicy(mode=mode, pad_color=(10, 200, 30), **RAW))
    assert (result == (10, 200, 30)).all()


def test_long_pictures_stay_in_the_middle() -> None:
    image = Image.new("RGB", (6000, 3000), "red")
    result = eight_bit(image, 60, ImagePolicy(mode="pad", pad_color=(0, 0, 255), **RAW))
    assert (result[17:43] == (255, 0, 0)).all()
    assert (result[:13] == (0, 0, 255)).all() and (result[47:] == (0, 0, 255)).all()
