"""Encode, merge, forward: pictures land at their placeholders, in order, and gradients come back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from pumice.config import IMAGE_TOKEN, DecoderConfig, ImagePolicy, LoraConfig, ModelConfig, VisionConfig
from pumice.errors import InputError
from pumice.geometry import tile_layout
from pumice.model.adapters import LoraLinear
from pumice.model.connector import arrange
from pumice.model.llava import Llava, make_tower

N, D = 4, 16
X = IMAGE_TOKEN


def make(lora: LoraConfig | None = None) -> Llava:
    config = ModelConfig(
        decoder=DecoderConfig(
            vocab_size=40, width=D, depth=2, heads=2, kv_heads=1, head_dim=8, mlp_width=24, context=64
        ),
        vision=VisionConfig(image_size=64, variant="lite0"),
        lora=lora,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Llava(config).eval()


@pytest.fixture(scope="module")
def model() -> Llava:
    return make()


def tokens(pictures: int) -> Tensor:
    return torch.randn(pictures, N, D, generator=torch.Generator().manual_seed(pictures))


def test_pictures_of_several_rows_go_to_their_places_in_order(model: Llava) -> None:
    ids = torch.tensor([
        [1, X, X, X, X, 2, X, X, X, X, 3],
        [4, 5, 6, 7, X, X, X, X, 8, 9, 10],
    ])  # fmt: skip
    image_tokens = tokens(3)
    merged = model.merge(ids, image_tokens)
    embed = model.decoder.embed.weight
    assert torch.equal(merged[0, 1:5], image_tokens[0])
    assert torch.equal(merged[0, 6:10], image_tokens[1])
    assert torch.equal(merged[1, 4:8], image_tokens[2])
    for row, column in (ids != X).nonzero().tolist():
        assert torch.equal(merged[row, column], embed[ids[row, column]])


def test_placeholders_of_one_picture_need_not_be_adjacent(model: Llava) -> None:
    ids = torch.tensor([[X, 1, X, 2, X, X]])
    merged = model.merge(ids, tokens(1))
    assert torch.equal(merged[0, [0, 2, 4, 5]], tokens(1)[0])


@pytest.mark.parametrize(("placeholders", "pictures"), [(4, 2), (8, 1), (3, 1), (0, 1), (4, None), (5, 1)])
def test_both_counts_are_in_the_message(model: Llava, placeholders: int, pictures: int | None) -> None:
    ids = torch.tensor([[1, *[X] * placeholders, 2]])
    image_tokens = None if pictures is None else tokens(pictures)
    total = (pictures or 0) * N
    with pytest.raises(
        ValueError, match=f"hold {placeholders} image placeholders, the pictures give {total} tokens"
    ):
        model.merge(ids, image_tokens)


@pytest.mark.parametrize("image_tokens", [None, torch.zeros(0, N, D)])
def test_text_alone_needs_no_picture(model: Llava, image_tokens: Tensor | None) -> None:
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.merge(ids, image_tokens), model.decoder.embed(ids))
    assert model(ids, image_tokens).shape == (1, 3, D)


def test_the_picture_changes_what_follows_it_and_nothing_before(model: Llava) -> None:
    ids = torch.tensor([[1, 2, X, X, X, X, 3, 4]])
    with torch.no_grad():
        change = (model(ids, tokens(1)) - model(ids, tokens(1) + 1)).abs().amax(-1)[0]
    assert change[:2].eq(0).all()
    assert change[2:].gt(1e-4).all()


def test_gradients_reach_every_image_token_connector_and_embedding() -> None:
    model = make()
    ids = torch.tensor([[1, X, X, X, X, 2, 3]])
    features = torch.randn(1, N, 1280)
    connected = model.connect(features)
    connected.retain_grad()
    model(ids, connected)[0, -1].square().sum().backward()
    assert connected.grad is not None
    assert connected.grad.abs().sum(-1).gt(0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.connector.parameters())
    touched = model.decoder.embed.weight.grad.abs().sum(-1)
    assert touched.nonzero().flatten().tolist() == [1, 2, 3]  # row 0 only fills the placeholders' places


def test_image_tokens_take_the_type_of_the_embedding() -> None:
    model = make()
    model.decoder.to(torch.bfloat16)
    merged = model.merge(torch.tensor([[1, X, X, X, X]]), tokens(1))
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged[0, 1:], tokens(1)[0].bfloat16())


def test_encode_is_tower_then_connector(model: Llava) -> None:
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        encoded = model.encode(pixels)
        assert torch.equal(encoded, model.connector(model.tower(pixels)))
    assert encoded.shape == (2, model.config.image_tokens, D)


TILED = ImagePolicy("anyres", pinpoints=((64, 128), (128, 64), (128, 128)))


def test_tokens_of_pictures_that_differ_may_come_in_one_row(model: Llava) -> None:
    ids = torch.tensor([[X, X, X, X, 1, X, X, X, X]])
    assert torch.equal(model.merge(ids, tokens(2).flatten(0, 1)), model.merge(ids, tokens(2)))
    with pytest.raises(ValueError, match="hold 8 image placeholders, the pictures give 7 tokens"):
        model.merge(ids, tokens(2).flatten(0, 1)[1:])


def test_tiles_are_encoded_picture_by_picture() -> None:
    plain = make()
    model = Llava(dataclasses.replace(plain.config, image=TILED)).eval()
    extra = model.load_state_dict(plain.state_dict(), strict=False)
    assert extra.missing_keys == ["image_newline"] and model.image_newline is not None
    layouts = [tile_layout(model.config, size) for size in ((50, 20), (30, 90))]
    pixels = torch.rand(sum(layout.tiles for layout in layouts), 3, 64, 64)
    with torch.no_grad():
        encoded = model.encode(pixels, layouts)
        first, second = layouts
        tiles = plain.encode(pixels)
        expected = [
            arrange(tiles[: first.tiles], first, model.image_newline),
            arrange(tiles[first.tiles :], second, model.image_newline),
        ]
        assert torch.equal(encoded, torch.cat(expected))
        assert torch.equal(encoded[:N], tiles[0])
        assert model.encode(pixels[:0], []).shape == (0, D)
    assert encoded.shape == (first.tokens + second.tokens, D)
    with pytest.raises(ValueError, match="the tower gave 6 tiles, the layouts have 3"):
        model.encode(pixels, layouts[:1])


def test_only_tiles_with_rows_have_a_newline() -> None:
    config = make().config
    assert "image_newline" not in make().state_dict()
    not_unpadded = dataclasses.replace(config, image=dataclasses.replace(TILED, unpad=False))
    assert "image_newline" not in Llava(not_unpadded).state_dict()
    model = Llava(dataclasses.replace(config, image=TILED))
    newline = model.state_dict()["image_newline"]
    assert newline.shape == (D,) and newline.std() > 0
    layout = tile_layout(model.config, (50, 20))
    model.connect(torch.randn(layout.tiles, N, 1280), [layout]).sum().backward()
    assert model.image_newline is not None and model.image_newline.grad is not None
    assert model.image_newline.grad.eq(layout.height).all()


def test_named_intermediates(model: Llava) -> None:
    ids = torch.tensor([[1, X, X, X, X, 2]])
    out: dict[str, Tensor] = {}
    with torch.no_grad():
        hidden = model(ids, tokens(1), out=out)
        assert list(out) == ["embeddings", "decoder.blocks.0", "decoder.blocks.1"]
        assert torch.equal(out["embeddings"], model.merge(ids, tokens(1)))
        assert torch.equal(model.decoder.norm(out["decoder.blocks.1"]), hidden)
        assert torch.equal(model(ids, tokens(1)), hidden)


def test_positions_default_to_counting(model: Llava) -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    counted = torch.tensor([[0, 1, 2], [0, 1, 2]])
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids, positions=counted))
        spread = model(ids, positions=counted * 3)
    assert (model(ids) - spread).abs().max() > 1e-4


def test_the_window_of_the_config_is_used() -> None:
    model = make()
    ids = torch.arange(9)[None]
    decoder = dataclasses.replace(model.config.decoder, sliding_window=3)
    narrow = Llava(dataclasses.replace(model.config, decoder=decoder)).eval()
    narrow.load_state_dict(model.state_dict())
    with torch.no_grad():
        change = (model(ids) - narrow(ids)).abs().amax(-1)[0]
    assert change[:3].lt(1e-5).all()
    assert change[3:].gt(1e-5).all()


def test_adapters_of_the_config_are_in_the_decoder_only() -> None:
    model = make(LoraConfig(rank=2, targets=("q",)))
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    assert names == ["decoder.blocks.0.attention.q", "decoder.blocks.1.attention.q"]


def test_unknown_towers_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="unknown vision tower 'clip2'; use one of"):
        make_tower(VisionConfig(kind="clip2"))
